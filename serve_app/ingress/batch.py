"""``POST /v1/audio/speech/batch``: several texts in one request, the shape of vLLM-Omni.

The body's own fields are the defaults of every item. Items are spoken side by side, and one that fails does
not disturb the others: the answer is 200, and each result says how its item went.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any

from pydantic import Field, ValidationError
from ulid import ULID

from serve_app.config import Settings
from serve_app.errors import InputTooLong, InvalidValue, TooManyAtOnce, VoiceCloneError
from serve_app.handle import RouterHandle
from serve_app.ingress.problems import error_member, from_validation
from serve_app.ingress.speech import speak_whole, usage
from serve_app.ingress.speech_body import SpeechBody, SpeechOptions
from serve_app.protocol import Caller, Priority

#: Items of one batch that are spoken at once.
_AT_ONCE = 8


class BatchBody(SpeechOptions):
    """Body of the request. Who sends many texts at once can wait: they are bulk work unless it says not."""

    priority: Priority = Field(
        default=Priority.BULK, description="'interactive' puts the items among the single requests."
    )
    items: Annotated[list[dict[str, Any]], Field(min_length=1)] = Field(
        description="Texts: {'input': …} and whatever differs from the fields beside 'items'."
    )


async def speak_batch(
    router: RouterHandle,
    body: BatchBody,
    settings: Settings,
    *,
    request_id: str,
    caller: Caller,
    priority: Priority,
) -> dict[str, Any]:
    """Speak all items; raises only for what concerns the batch as a whole."""
    limits = settings.limits
    if len(body.items) > limits.max_batch_items:
        raise InvalidValue(
            f"The batch has {len(body.items)} items; {limits.max_batch_items} are allowed. Send several.",
            param="items",
        )
    characters = sum(len(item["input"]) for item in body.items if isinstance(item.get("input"), str))
    if characters > limits.max_batch_chars:
        raise InputTooLong(
            f"The texts have {characters} characters; {limits.max_batch_chars} are allowed together. "
            "Send several batches.",
            param="items",
        )
    defaults = {name: value for name, value in body.model_dump(exclude_unset=True).items() if name != "items"}
    turn = asyncio.Semaphore(_AT_ONCE)

    async def speak(index: int) -> dict[str, Any]:
        try:
            item = _item(defaults, body.items[index])
            request = item.request(
                item.input,
                f"{request_id}-{index}",
                caller,
                priority,
                item.reference(settings.voices.reference.max_upload_bytes),
            )
            async with turn:
                spoken = await speak_whole(router, request, item.response_format, item.sample_rate)
        except VoiceCloneError as error:
            return _failed(index, error)
        return {
            "index": index,
            "status": "success",
            "audio_data": base64.b64encode(spoken.body).decode(),
            "media_type": item.response_format.media_type,
            "error": None,
            "usage": usage(item.input),
            "duration_ms": spoken.duration_ms,
            "engine": spoken.started.engine,
            "voice_id": spoken.started.voice_id or None,
            "language": spoken.started.language,
            "seed": spoken.started.seed,
            **(spoken.times(item.timestamps) if item.timestamps else {}),
        }

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(speak(index)) for index in range(len(body.items))]
    results = [task.result() for task in tasks]
    for index, result in enumerate(results):
        # The batch itself was what kept the caller's slots taken.
        if result["error"] and result["error"]["code"] == TooManyAtOnce.code:
            results[index] = await speak(index)
    succeeded = sum(result["status"] == "success" for result in results)
    return {
        "id": f"batch_{ULID()}",
        "object": "audio.speech.batch",
        "results": results,
        "total": len(results),
        "succeeded": succeeded,
        "failed": len(results) - succeeded,
    }


def _item(defaults: dict[str, Any], item: dict[str, Any]) -> SpeechBody:
    """One item with the defaults of its batch. Raises what a single request with these fields would."""
    fields = dict(item)
    if "speaker" in fields:
        fields.setdefault("voice", fields.pop("speaker"))
    try:
        speech = SpeechBody.model_validate({**defaults, **fields})
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_input=False)) from error
    speech.check()
    return speech


def _failed(index: int, error: VoiceCloneError) -> dict[str, Any]:
    return {
        "index": index,
        "status": "error",
        "audio_data": None,
        "media_type": None,
        "error": error_member(error),
        "usage": None,
    }
