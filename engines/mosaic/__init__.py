"""The built-in engine: a small English voice whose every frame is moved towards the enrolled speaker.

Modules, in the order sound passes through them::

    spectrum            frames, mel bands, cepstra: the one grid everything is measured on
    source_filter       speech as pulses and noise, each with a spectrum
    base_speech         text -> source-filter parts of the base voice (engines.hibari_voice)
    espeak_process      the program in which espeak-ng, an optional extra, speaks
    espeak_speech       text -> samples of espeak-ng: other languages than English
    phone_features      what makes two frames "the same sound"
    speaker_encoder     who speaks: one vector per recording, and its gradient
    recording           what a reference recording says about its speaker
    closing_equaliser   the gain curve the speaker encoder asks for
    profile             a voice as the arrays that are stored of it
    enrolment           recording -> profile
    voice_map           profile -> where each sound of the base voice has to move
    conversion          the gain of each frame
    renderer            parts + gain -> samples, block by block
    waveform            samples as frames, to be measured and converted
    other_languages     profile -> the same voice over espeak-ng
    weight_files        the model files of its own and their checksums
    engine              the door: MosaicEngine
"""
