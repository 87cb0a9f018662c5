# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Clone a voice and let it speak
#
# This notebook talks to the graph through its Ray handle: no HTTP, no port. It joins a graph that runs on
# this machine, or starts one.

# %%
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np
import soundfile

from benchmarks.speakers import DEMO_SPEAKER, enrolment_clip, speaker, write_wav
from serve_app.environment import prepare_environment

prepare_environment()  # before Ray is imported

from serve_app.client import HandleClient
from serve_app.server import ensure_graph

ensure_graph()
tts = HandleClient()
tts.models()

# %% [markdown]
# ## Enrol
#
# A recording of one speaker, 1 to 30 seconds, in any common format. Ours is in the public domain; record your
# own and put its path here.

# %%
person = speaker(DEMO_SPEAKER)
write_wav(enrolment_clip(person), "reference.wav")
print(person.source, "-", person.licence)

voice = tts.enrol(
    "quickstart", "reference.wav", consent="Public-domain recording.", language="en", replace=True
)
voice

# %% [markdown]
# ## Speak
#
# The value of the cell is a player.

# %%
speech = tts.speak("Good morning. I have never said this sentence before.", voice=voice.id, seed=1)
speech

# %% [markdown]
# ## Listen while it speaks
#
# Chunks come as soon as they exist; leaving the `with` block early stops the engine.

# %%
with tts.stream("Chunks arrive one by one, long before the sentence has been finished.", voice.id) as stream:
    print(stream.started)
    print([f"{1000 * len(chunk) / stream.started.sample_rate_hz:.0f} ms" for chunk in stream])

# %% [markdown]
# ## Look
#
# Reference above, result below.

# %%
reference, reference_hz = soundfile.read("reference.wav", dtype="float32")
figure, axes = plt.subplots(2, 1, figsize=(10, 6), constrained_layout=True)
shown = ((reference, reference_hz, "reference"), (speech.samples, speech.sample_rate_hz, "speech"))
for axis, (samples, rate_hz, title) in zip(axes, shown, strict=True):
    axis.specgram(samples + 1e-7, NFFT=512, Fs=rate_hz, noverlap=384, vmin=-120, cmap="magma")
    axis.set(title=title, xlabel="seconds", ylabel="Hz", ylim=(0, 8000))
figure.savefig("quickstart.png", dpi=90)

# %% [markdown]
# ## Four voices at once
#
# The same recording, played slower or faster, makes four different speakers. Their requests run at the same
# time and share batches.

# %%
names = []
for factor in (0.85, 0.95, 1.05, 1.2):
    name = f"quickstart {factor}"
    soundfile.write("variant.wav", reference, round(reference_hz * factor))
    tts.enrol(name, "variant.wav", consent="Public-domain recording.", replace=True)
    names.append(name)

with ThreadPoolExecutor(len(names)) as threads:
    speeches = list(threads.map(lambda name: tts.speak("All four of us speak at once.", name, seed=1), names))
for name, one in zip(names, speeches, strict=True):
    loudness = float(np.sqrt(np.mean(one.samples**2)))
    print(f"{name}: {one.duration_s:.2f} s, level {20 * np.log10(loudness):.0f} dBFS")

# %% [markdown]
# ## Leave no trace

# %%
for name in [*names, voice.id]:
    tts.delete_voice(name)
tts.close()
