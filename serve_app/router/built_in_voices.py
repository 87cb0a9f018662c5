"""Voices that come with the weights of an engine: nobody enrolled them, and no other engine knows them."""

from __future__ import annotations

from collections.abc import Mapping

from serve_app.protocol import EngineFacts
from serve_app.voices.voice import BuiltInVoice


def built_in_voices(facts: Mapping[str, EngineFacts]) -> list[BuiltInVoice]:
    """All of the engines in ``facts``, by served name, in order."""
    return [
        BuiltInVoice(engine, name)
        for engine in sorted(facts)
        for name in sorted(facts[engine].built_in_voices)
    ]


def find_built_in_voice(asked: str, facts: Mapping[str, EngineFacts]) -> BuiltInVoice | None:
    """The first voice of the engines in ``facts`` with this id, or this name whatever its case."""
    for voice in built_in_voices(facts):
        if asked == voice.id or asked.casefold() == voice.name.casefold():
            return voice
    return None
