"""The program in which a Piper voice speaks, one sentence per request, until its standard input ends.

    python -I piper_process.py VOICE.onnx THREADS SPEAKER

A request is a line of JSON, ``{"text": …, "speed": …, "sentence": n}``. The answer is a line of JSON,
``{"sentences": total, "samples": count}``, then ``count`` float32 samples of that sentence, native byte
order; or ``{"error": …}``. The first answer comes without a request, when the voice is loaded.

Nothing is remembered from request to request, so the texts of several listeners may alternate. Noise is off:
Piper draws it from a generator nobody outside can set, and the same text would not sound the same twice.

Why not in the engine's own process: Piper is GPL, the engine is not; here the two meet as programs do.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

#: Between these Piper takes phonemes; here they are text like any other.
_PHONEME_MARKS = re.compile(r"\[\[|\]\]")


def load(model: Path, threads: int) -> Any:
    """The voice, on so many threads."""
    import onnxruntime
    from piper import PiperVoice
    from piper.config import PiperConfig

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    described = json.loads(Path(f"{model}.json").read_text(encoding="utf-8"))
    return PiperVoice(session=session, config=PiperConfig.from_dict(described), download_dir=model.parent)


def speak(voice: Any, request: dict[str, Any], speaker: int | None) -> tuple[int, bytes]:
    """How many sentences the text has, and the samples of the one that was asked for."""
    from piper.config import SynthesisConfig

    sentences = [one for one in voice.phonemize(_PHONEME_MARKS.sub(" ", request["text"])) if one]
    if request["sentence"] >= len(sentences):
        return len(sentences), b""
    settings = SynthesisConfig(
        speaker_id=speaker,
        length_scale=voice.config.length_scale / request["speed"],
        noise_scale=0.0,
        noise_w_scale=0.0,
    )
    ids = voice.phonemes_to_ids(sentences[request["sentence"]])
    samples = voice.phoneme_ids_to_audio(ids, settings)
    return len(sentences), samples.astype("float32").tobytes()


def main(model: str, threads: str, speaker: str) -> None:
    """Answer requests."""
    # What libraries print must not get between the answers.
    answers, sys.stdout = sys.stdout.buffer, sys.stderr

    def answer(header: dict[str, Any], samples: bytes = b"") -> None:
        answers.write(json.dumps(header).encode() + b"\n" + samples)
        answers.flush()

    try:
        voice = load(Path(model), int(threads))
    except Exception as error:  # noqa: BLE001 - the engine says it to the operator
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({"sentences": 0, "samples": 0})
    for line in sys.stdin.buffer:
        try:
            sentences, samples = speak(voice, json.loads(line), int(speaker) if speaker else None)
        except Exception as error:  # noqa: BLE001 - the next text may be better
            answer({"error": f"{type(error).__name__}: {error}"})
        else:
            answer({"sentences": sentences, "samples": len(samples) // 4}, samples)


if __name__ == "__main__":
    main(*sys.argv[1:])
