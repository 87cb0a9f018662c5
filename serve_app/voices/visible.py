"""Which voices there are for whom: one's own, the shared ones, and for an admin all.

A voice of somebody else is not there, whatever is asked about it: no answer differs from that about a voice
that does not exist. Names are looked up among one's own voices first. A shared voice can be used by everybody
and changed by its owner.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from serve_app.errors import TooManyVoices, VoiceDamaged, VoiceExists, VoiceForbidden, VoiceNotFound
from serve_app.protocol import Caller
from serve_app.voices.store import VoicePage, VoiceStore, voice_not_found
from serve_app.voices.voice import Voice, is_voice_id


class VisibleVoices:
    """The voice store as callers see it."""

    def __init__(
        self,
        store: VoiceStore,
        *,
        aliases: Mapping[str, str],
        shared_owners: Collection[str],
        shared_ids: Collection[str],
        max_per_owner: int,
    ) -> None:
        self._store = store
        self._aliases = aliases
        self._shared_owners = shared_owners
        self._shared_ids = shared_ids
        self._max_per_owner = max_per_owner

    async def get(self, voice: str, caller: Caller) -> Voice:
        """The voice of that id, name or alias. Raises ``VoiceNotFound``."""
        wanted = self._aliases.get(voice, voice)
        if is_voice_id(wanted):
            return await self._store.get(wanted, await self._visible_owner(wanted, caller))
        for owner in self._owners(caller):
            try:
                return await self._store.get(wanted, owner)
            except VoiceNotFound:
                continue
        raise voice_not_found()

    async def list(self, caller: Caller, *, limit: int, after: str | None) -> VoicePage:
        """Up to ``limit`` voices, oldest first, beginning after the id ``after``."""
        owners = None if caller.admin else self._owners(caller)
        return await self._store.list(owners, ids=self._shared_ids, limit=limit, after=after)

    async def check_new(self, name: str, owner: str, *, replace: bool) -> None:
        """Say before any work is done why a voice cannot be enrolled; ``create`` has the last word on names.

        Raises ``VoiceExists`` and ``TooManyVoices``. Enrolments at the same time may pass the limit together.
        """
        try:
            taken = await self._store.get(name, owner)
        except VoiceDamaged:
            if not replace:
                raise
        except VoiceNotFound:
            if await self._store.count(owner) >= self._max_per_owner:
                raise TooManyVoices(
                    f"There are {self._max_per_owner} voices already, as many as are allowed. "
                    "Delete one that is not needed any more."
                ) from None
        else:
            if not replace:
                raise VoiceExists(
                    f"A voice of this name is enrolled already as {taken.id}. "
                    "Choose another name or delete that one first.",
                    param="name",
                )

    async def delete(self, voice: str, caller: Caller) -> tuple[str, Voice | None]:
        """Remove a voice: its id or, if it is too damaged to know, its name; and what it was.

        Raises ``VoiceNotFound``, and ``VoiceForbidden`` for a shared voice of another.
        """
        wanted = self._aliases.get(voice, voice)
        owner = caller.owner
        if is_voice_id(wanted):
            owner = await self._visible_owner(wanted, caller)
            if owner != caller.owner and not caller.admin:
                raise _not_yours()
        try:
            gone = await self._store.delete(wanted, owner)
        except VoiceNotFound:
            # By name it may be a shared one. This raises if it is not.
            await self.get(wanted, caller)
            raise _not_yours() from None
        return (gone.id if gone else wanted), gone

    async def own(self, voice: str, caller: Caller) -> Voice:
        """A voice that ``caller`` may change. Raises ``VoiceNotFound``, ``VoiceForbidden`` for another's."""
        found = await self.get(voice, caller)
        if found.owner != caller.owner and not caller.admin:
            raise _not_yours()
        return found

    def _owners(self, caller: Caller) -> tuple[str, ...]:
        return tuple(dict.fromkeys([caller.owner, *self._shared_owners]))

    async def _visible_owner(self, voice_id: str, caller: Caller) -> str:
        """Whose voice that is. Raises ``VoiceNotFound`` unless ``caller`` sees it."""
        owner = await self._store.owner_of(voice_id)
        if caller.admin or owner in self._owners(caller) or voice_id in self._shared_ids:
            return owner
        raise voice_not_found()


def _not_yours() -> VoiceForbidden:
    return VoiceForbidden(
        "This voice is shared with you; only its owner or an admin may change it. Ask one of them.",
        param="voice",
    )
