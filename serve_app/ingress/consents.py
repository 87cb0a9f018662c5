"""Recorded consents over HTTP: ``/v1/audio/voice_consents``, OpenAI's shapes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from pydantic import BaseModel, Field

from serve_app.handle import RouterHandle
from serve_app.ingress.callers import Callers
from serve_app.protocol import ConsentRequest
from serve_app.voices.consents import VoiceConsent


class RenameBody(BaseModel):
    """Body of ``POST /v1/audio/voice_consents/{id}``."""

    name: str = Field(min_length=1, max_length=100)


def consent_object(consent: VoiceConsent) -> dict[str, Any]:
    """A consent as clients see it."""
    return {
        "object": "audio.voice_consent",
        "id": consent.id,
        "name": consent.name,
        "language": consent.language,
        "created_at": consent.created_at,
    }


def routes(router: RouterHandle, callers: Callers) -> APIRouter:
    """Record, list, show, rename and delete consents."""
    api = APIRouter(prefix="/v1/audio/voice_consents", tags=["consents"])

    @api.post("")
    async def record(
        request: Request,
        name: Annotated[str, Form(min_length=1, max_length=100, description="Whose consent it is.")],
        language: Annotated[str, Form(min_length=2, max_length=35, description="BCP-47.")],
        recording: Annotated[UploadFile, File(description="The speaker saying so, 1 to 30 s.")],
    ) -> dict[str, Any]:
        """Keep a recording in which a speaker consents."""
        consent = await router.record_consent(
            ConsentRequest(
                name=name,
                language=language,
                audio=await recording.read(),
                request_id=request.state.request_id,
                caller=callers.caller(request.scope),
            )
        )
        return consent_object(consent)

    @api.get("")
    async def list_consents(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=200)] = None,
    ) -> dict[str, Any]:
        """Consents, oldest first."""
        page = await router.consents(callers.caller(request.scope), limit, after)
        consents = [consent_object(consent) for consent in page.consents]
        return {
            "object": "list",
            "data": consents,
            "first_id": consents[0]["id"] if consents else None,
            "last_id": consents[-1]["id"] if consents else None,
            "has_more": page.has_more,
        }

    @api.get("/{consent_id}")
    async def get_consent(consent_id: str, request: Request) -> dict[str, Any]:
        """One consent."""
        return consent_object(await router.consent(consent_id, callers.caller(request.scope)))

    @api.post("/{consent_id}")
    async def rename(consent_id: str, body: RenameBody, request: Request) -> dict[str, Any]:
        """Give a consent another name."""
        caller = callers.caller(request.scope)
        return consent_object(await router.rename_consent(consent_id, body.name, caller))

    @api.delete("/{consent_id}")
    async def delete_consent(consent_id: str, request: Request) -> dict[str, Any]:
        """Remove a consent. Voices enrolled with it stay, with what was noted then."""
        gone = await router.delete_consent(consent_id, callers.caller(request.scope))
        return {"id": gone.id, "object": "audio.voice_consent", "deleted": True}

    return api
