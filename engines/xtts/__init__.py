"""XTTS-v2 (Coqui, 2023): an autoregressive model of audio tokens and a HiFi-GAN, with continuous batching.

``engine`` is the door. Behind it: ``model_files`` (checkpoint to modules), ``conditioning`` (a recording to a
voice), ``text`` (a sentence to tokens), ``decoder`` (one step of the GPT for all live rows),
``sampling``, ``vocoder`` (latents to samples, window by window), ``speech`` (one utterance on its way) and
``decode_loop`` (the thread that brings them together).
"""
