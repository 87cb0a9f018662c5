"""The program in which espeak-ng speaks: one text, and then it ends.

    python -I -S espeak_process.py LIBRARY DATA VOICE SPEED PITCH RANGE < text > samples

The text is UTF-8. The samples are 16-bit integers, native byte order, mono, at ``RATE_HZ``. Whatever goes
wrong is one line on the standard error and exit status 1.

Why not in the engine's own process:

* espeak-ng carries state from one text to the next (its pitch flutter runs on, and more), so a text would not
  sound the same twice, and another replica could not finish an utterance unheard;
* it is made for one thread, and a text that crashes it would take all utterances of the replica along;
* it is GPL, the engine is not: here the two meet as programs do.

Only the standard library is imported, so that starting takes about 20 ms.
"""

from __future__ import annotations

import ctypes
import sys

RATE_HZ = 22_050

#: Of ``espeak-ng/speak_lib.h``: output to a callback in the calling thread; errors are returned.
_OUTPUT_SYNCHRONOUS = 2
_DO_NOT_EXIT = 0x8000
_RATE, _PITCH, _RANGE = 1, 3, 4
_POSITION_IS_CHARACTER = 1
#: UTF-8 with a pause at the end. With the flags for SSML or phonemes ``<…>`` and ``[[…]]`` would be commands.
_PLAIN_UTF8, _END_PAUSE = 1, 0x1000

_WORDS_PER_MINUTE = 175
#: The library speaks no slower than this; what lacks is stretched.
_SLOWEST_WORDS_PER_MINUTE = 80
#: Samples taken from the stretcher at once.
_READ_SAMPLES = 4096

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def speak(library: ctypes.CDLL, text: str, voice: str, speed: float, pitch: int, pitch_range: int) -> bytes:
    """16-bit samples of ``text``. ``library`` is initialised; ``pitch`` and ``pitch_range`` are 0 to 99."""
    samples = bytearray()

    def keep(block: ctypes._Pointer[ctypes.c_short], count: int, _events: int) -> int:
        if block and count > 0:
            samples.extend(ctypes.string_at(block, 2 * count))
        return 0

    callback = _Callback(keep)
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        sys.exit(f"espeak-ng has no voice {voice}")
    words_per_minute = round(_WORDS_PER_MINUTE * speed)
    library.espeak_SetParameter(_RATE, max(words_per_minute, _SLOWEST_WORDS_PER_MINUTE), 0)
    library.espeak_SetParameter(_PITCH, pitch, 0)
    library.espeak_SetParameter(_RANGE, pitch_range, 0)
    encoded = text.encode()
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    status = library.espeak_Synth(
        encoded, len(encoded) + 1, 0, _POSITION_IS_CHARACTER, 0, _PLAIN_UTF8 | _END_PAUSE, None, None
    )
    if status != 0:
        sys.exit(f"espeak-ng failed with status {status}")
    if words_per_minute < _SLOWEST_WORDS_PER_MINUTE:
        return stretched(library, bytes(samples), words_per_minute / _SLOWEST_WORDS_PER_MINUTE)
    return bytes(samples)


def stretched(library: ctypes.CDLL, samples: bytes, speed: float) -> bytes:
    """``samples`` at ``speed`` with their pitch kept, by the copy of the sonic library inside espeak-ng."""
    library.sonicCreateStream.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(library.sonicCreateStream(RATE_HZ, 1))
    library.sonicSetSpeed(stream, ctypes.c_float(speed))
    library.sonicWriteShortToStream(stream, samples, len(samples) // 2)
    library.sonicFlushStream(stream)
    block = ctypes.create_string_buffer(2 * _READ_SAMPLES)
    slow = bytearray()
    while count := library.sonicReadShortFromStream(stream, block, _READ_SAMPLES):
        slow.extend(block.raw[: 2 * count])
    return bytes(slow)


def main(library_path: str, data_path: str, voice: str, speed: str, pitch: str, span: str) -> None:
    """Speak the standard input onto the standard output."""
    try:
        library = ctypes.CDLL(library_path)
    except OSError as error:
        sys.exit(f"espeak-ng cannot be loaded: {error}")
    rate_hz = library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, data_path.encode(), _DO_NOT_EXIT)
    if rate_hz != RATE_HZ:
        sys.exit(f"espeak-ng cannot start with the data in {data_path} (status {rate_hz})")
    text = sys.stdin.buffer.read().decode()
    sys.stdout.buffer.write(speak(library, text, voice, float(speed), int(pitch), int(span)))


if __name__ == "__main__":
    main(*sys.argv[1:])
