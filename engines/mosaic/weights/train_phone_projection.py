"""Train ``phone_projection.safetensors``: directions of the cepstral context that tell phones apart.

Development only. The base model is its own teacher: its graph knows which phone every frame belongs to, so
60 Harvard sentences (IEEE, 1969, lists 1 to 6), spoken with vocal tracts of seven lengths through two
bandwidths, give labelled frames. Needs the ``onnx`` package besides the engine's own dependencies::

    python engines/mosaic/weights/train_phone_projection.py
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx  # type: ignore[import-not-found, unused-ignore]
import onnxruntime
from hibari import Hibari
from numpy.typing import NDArray
from safetensors.numpy import save_file

from engines.mosaic.base_speech import parts_from_outputs
from engines.mosaic.phone_features import CepstralNorm, padded, with_context
from engines.mosaic.source_filter import Parts
from engines.mosaic.spectrum import F32, cepstra, log_energy, log_power, mel_bank

_TARGET = Path(__file__).parent / "phone_projection.safetensors"
#: Tensor of the graph that holds the index of the phone each 25 ms belong to.
_ALIGNMENT = "/ReduceSum_1_output_0"
_DIRECTIONS = 20
_VOCAL_TRACTS = (0.8, 0.88, 0.96, 1.0, 1.04, 1.12, 1.2)
_BANDWIDTHS_HZ = (5000.0, 7600.0)
_NOT_PHONES = frozenset(" ˈˌ_.,?!")
_MIN_FRAMES_PER_PHONE = 200
_SHRINKAGE = 1e-3
_SPEECH_DB = -35.0

_SENTENCES = """\
The birch canoe slid on the smooth planks.
Glue the sheet to the dark blue background.
It's easy to tell the depth of a well.
These days a chicken leg is a rare dish.
Rice is often served in round bowls.
The juice of lemons makes fine punch.
The box was thrown beside the parked truck.
The hogs were fed chopped corn and garbage.
Four hours of steady work faced us.
A large size in stockings is hard to sell.
The boy was there when the sun rose.
A rod is used to catch pink salmon.
The source of the huge river is the clear spring.
Kick the ball straight and follow through.
Help the woman get back to her feet.
A pot of tea helps to pass the evening.
Smoky fires lack flame and heat.
The soft cushion broke the man's fall.
The salt breeze came across from the sea.
The girl at the booth sold fifty bonds.
The small pup gnawed a hole in the sock.
The fish twisted and turned on the bent hook.
Press the pants and sew a button on the vest.
The swan dive was far short of perfect.
The beauty of the view stunned the young boy.
Two blue fish swam in the tank.
Her purse was full of useless trash.
The colt reared and threw the tall rider.
It snowed, rained, and hailed the same morning.
Read verse out loud for pleasure.
Hoist the load to your left shoulder.
Take the winding path to reach the lake.
Note closely the size of the gas tank.
Wipe the grease off his dirty face.
Mend the coat before you go out.
The wrist was badly strained and hung limp.
The stray cat gave birth to kittens.
The young girl gave no clear response.
The meal was cooked before the bell rang.
What joy there is in living.
A king ruled the state in the early days.
The ship was torn apart on the sharp reef.
Sickness kept him home the third week.
The wide road shimmered in the hot sun.
The lazy cow lay in the cool grass.
Lift the square stone over the fence.
The rope will bind the seven books at once.
Hop over the fence and plunge in.
The friendly gang left the drug store.
Mesh wire keeps chicks inside.
The frosty air passed through the coat.
The crooked maze failed to fool the mouse.
Adding fast leads to wrong sums.
The show was a flop from the very start.
A saw is a tool used for making boards.
The wagon moved on well oiled wheels.
March the soldiers past the next hill.
A cup of sugar makes sweet fudge.
Place a rosebush near the porch steps.
Both lost their lives in the raging storm.
""".splitlines()

Labels = NDArray[np.str_]


def aligned_speech() -> list[tuple[Parts, Labels]]:
    """Every sentence as parts, with the phone of each frame."""
    base = Hibari()
    graph = onnx.load(base.model_path)
    graph.graph.output.append(onnx.helper.make_tensor_value_info(_ALIGNMENT, onnx.TensorProto.INT64, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    speech = []
    for sentence in _SENTENCES:
        phonemes = base.phonemize(sentence)[0]
        outputs = session.run(
            None, {"ids": np.asarray([base.ids(phonemes)], np.int64), "speed": np.ones(1, np.float32)}
        )
        parts = parts_from_outputs(outputs[:6])
        symbols = np.array(["_", *[symbol for symbol in phonemes if symbol in base.vocab], "_"])
        # The graph aligns frames of 25 ms; ours are half as long.
        phone_of_frame = np.repeat(outputs[6].reshape(-1), 2)[: len(parts)]
        speech.append((parts, symbols[phone_of_frame]))
    return speech


def training_frames(speech: list[tuple[Parts, Labels]]) -> tuple[F32, Labels]:
    """Context vectors [frames, CONTEXT_SIZE] of many imitated speakers, and the phone of each."""
    random = np.random.default_rng(0)
    contexts, labels = [], []
    for vocal_tract in _VOCAL_TRACTS:
        for bandwidth_hz in _BANDWIDTHS_HZ:
            pitch = random.uniform(0.5, 1.15)
            powers = [
                replace(parts, f0_hz=parts.f0_hz * np.float32(pitch)).with_vocal_tract(vocal_tract).power()
                for parts, _ in speech
            ]
            # Recordings have a noise floor; the base voice has none.
            powers = [power + power.mean() * np.float32(10 ** random.uniform(-6, -3.5)) for power in powers]
            energy = np.concatenate([log_energy(power) for power in powers])
            loud = energy > np.percentile(energy, 97) + log_power(_SPEECH_DB)
            sound = np.concatenate([cepstra(mel_bank(bandwidth_hz).log_mel(power)) for power in powers])
            contexts.append(with_context(padded(CepstralNorm.of(sound[loud])(sound)))[loud])
            labels.append(np.concatenate([phones for _, phones in speech])[loud])
    return np.concatenate(contexts), np.concatenate(labels)


def discriminant_directions(contexts: F32, labels: Labels) -> F32:
    """LDA: directions [CONTEXT_SIZE, _DIRECTIONS], within-phone variance one along each."""
    phones, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    usable = [
        number
        for number, phone in enumerate(phones)
        if phone not in _NOT_PHONES and counts[number] >= _MIN_FRAMES_PER_PHONE
    ]
    chosen = np.isin(index, usable)
    data, groups = contexts[chosen].astype(np.float64), index[chosen]
    within = np.zeros((data.shape[1], data.shape[1]))
    between = np.zeros_like(within)
    overall = data.mean(axis=0)
    for group in usable:
        members = data[groups == group]
        centred = members - members.mean(axis=0)
        within += centred.T @ centred / len(data)
        offset = members.mean(axis=0) - overall
        between += np.outer(offset, offset) * len(members) / len(data)
    within = (1 - _SHRINKAGE) * within + _SHRINKAGE * np.trace(within) / len(within) * np.eye(len(within))
    variance, axes = np.linalg.eigh(within)
    whitening = axes / np.sqrt(variance)
    _, rotation = np.linalg.eigh(whitening.T @ between @ whitening)
    directions: F32 = (whitening @ rotation[:, ::-1][:, :_DIRECTIONS]).astype(np.float32)
    return directions


def main() -> None:
    """Train, write the file, say what was written."""
    directions = discriminant_directions(*training_frames(aligned_speech()))
    save_file({"projection": np.ascontiguousarray(directions)}, _TARGET)
    digest = hashlib.sha256(_TARGET.read_bytes()).hexdigest()
    sys.stdout.write(f"{_TARGET}: {_TARGET.stat().st_size} bytes, sha256 {digest}\n")


if __name__ == "__main__":
    main()
