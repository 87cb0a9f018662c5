"""GPT-SoVITS (RVC-Boss, 2024): a GPT that writes semantic tokens, and a VITS that speaks them.

``engine`` is the door, ``settings`` and ``options`` what can be set there; ``backend`` is what stands
behind it: ``in_process`` runs the model here, ``remote`` asks servers of api_v2. ``reference_window`` is
the part of a recording that is used. Its parts: ``convert`` and ``checkpoint``
(published files to safetensors, and those to modules), ``package`` (gsv-tts-lite, made quiet), ``text`` (a
sentence to phones), ``voice`` and ``voice_features`` (a recording to what is kept of it, and that to a
prompt and a speaker), ``sampling`` and ``decoder`` (one step of the GPT for all live rows), ``vocoder`` and
``onset`` (tokens to samples, window by window), ``speech`` (one utterance on its way) and ``decode_loop``
(the thread that brings them together).
"""
