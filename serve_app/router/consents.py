"""Consent: what a request says about it, against what this server demands."""

from __future__ import annotations

import time

from pydantic import ValidationError

from serve_app.config import VoiceSettings
from serve_app.errors import ConsentNotFound, ConsentRequired, InvalidValue
from serve_app.protocol import ConsentRequest
from serve_app.voices.consents import ConsentPage, ConsentStore, VoiceConsent
from serve_app.voices.reference import ReferenceReader
from serve_app.voices.store import VoiceStore
from serve_app.voices.voice import Consent

#: What an id of a consent begins with; a statement in words never is one such word.
_ID_PREFIX = "cons_"


class Consents:
    """Keeps recorded consents, and decides whether what came with a request is enough."""

    def __init__(self, voices: VoiceStore, reader: ReferenceReader) -> None:
        self._store = ConsentStore(voices.objects)
        self._reader = reader

    async def demanded(self, said: str, owner: str, settings: VoiceSettings) -> Consent | None:
        """What was agreed to: ``said`` is a statement, the id of a recorded consent, or nothing.

        Raises ``ConsentRequired`` for nothing where consent is required, and for an id that is not known.
        """
        said = said.strip()
        if not said:
            if settings.consent == "required":
                raise ConsentRequired(
                    "This server clones no voice without consent. Send the speaker's statement, or the id of "
                    "a recorded consent, in 'consent'.",
                    param="consent",
                )
            return None
        if not said.startswith(_ID_PREFIX) or len(said.split()) > 1:
            return Consent(statement=said, recorded_at=int(time.time()))
        try:
            recorded = await self._store.get(said, owner)
        except ConsentNotFound as error:
            raise ConsentRequired(
                "There is no recorded consent of this id. List consents: GET /v1/audio/voice_consents.",
                param="consent",
            ) from error
        return Consent(
            statement=f"Recorded consent of {recorded.name}.",
            recorded_at=recorded.created_at,
            who=recorded.name,
            id=recorded.id,
        )

    async def record(self, request: ConsentRequest) -> VoiceConsent:
        """Check a recording as that of a voice is checked, and keep it."""
        recording = await self._reader.read(request.audio)
        try:
            return await self._store.create(request.name, request.language, request.caller.owner, recording)
        except ValidationError as error:
            raise _invalid(error) from error

    async def get(self, consent_id: str, owner: str) -> VoiceConsent:
        """One consent."""
        return await self._store.get(consent_id, owner)

    async def list(self, owner: str, limit: int, after: str | None) -> ConsentPage:
        """Some of a caller's consents."""
        return await self._store.list(owner, limit=limit, after=after)

    async def rename(self, consent_id: str, name: str, owner: str) -> VoiceConsent:
        """Give a consent another name."""
        try:
            return await self._store.rename(consent_id, name, owner)
        except ValidationError as error:
            raise _invalid(error) from error

    async def delete(self, consent_id: str, owner: str) -> VoiceConsent:
        """Remove a consent."""
        return await self._store.delete(consent_id, owner)

    async def sweep(self) -> None:
        """Remove what killed requests left."""
        await self._store.sweep()


def _invalid(error: ValidationError) -> InvalidValue:
    finding = error.errors(include_url=False, include_input=False)[0]
    param = str(finding["loc"][-1])
    return InvalidValue(f"'{param}': {finding['msg']}.", param=param)
