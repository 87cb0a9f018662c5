"""Router: every request passes here. Voices, text, batches, order; the engines only ever see utterances."""

# No postponed annotations: Serve inspects this class when it is deployed.
import asyncio
import functools
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Concatenate, ParamSpec, TypeVar

from pydantic import ValidationError
from ray.serve.handle import DeploymentHandle
from ulid import ULID

from serve_app.config import Settings
from serve_app.errors import (
    ConsentRequired,
    EngineFailed,
    EngineUnavailable,
    InputTooLong,
    InternalError,
    InvalidValue,
    ModelNotFound,
    UnsupportedLanguage,
    UnsupportedOption,
    VoiceCloneError,
    VoiceExists,
    VoiceNotFound,
)
from serve_app.protocol import (
    AudioFrame,
    EngineFacts,
    EnrolRequest,
    Failure,
    SpeechEvent,
    SpeechRequest,
    SpeechStarted,
    UtteranceCall,
)
from serve_app.router import text as texts
from serve_app.router.batching import EngineQueue, Row
from serve_app.router.conditioning import ConditioningSource, extract
from serve_app.router.dispatch import REPLICA_LOST, EngineDispatch
from serve_app.voices.reference import ReferenceReader
from serve_app.voices.store import VoicePage, VoiceStore
from serve_app.voices.voice import Consent, NewVoice, Voice

logger = logging.getLogger("ray.serve")

#: How long to wait for a replica that should be up but does not answer.
_FACTS_TIMEOUT_S = 20.0
_SWEEP_INTERVAL_S = 3600.0
_SEED_LIMIT = 2**63

P = ParamSpec("P")
T = TypeVar("T")


def answers(
    method: Callable[Concatenate["Router", P], Awaitable[T]],
) -> Callable[Concatenate["Router", P], Awaitable[T | Failure]]:
    """Turn what a unary method raises into a ``Failure`` answer."""

    @functools.wraps(method)
    async def answer(self: "Router", /, *args: P.args, **kwargs: P.kwargs) -> T | Failure:
        try:
            return await method(self, *args, **kwargs)
        except VoiceCloneError as error:
            return Failure(error)
        except Exception as error:  # noqa: BLE001 - a defect: logged, and answered without its details
            return Failure(_defect(method.__name__, error))

    return answer


def _defect(where: str, error: Exception) -> InternalError:
    logger.error("Defect in router.%s", where, exc_info=error)
    return InternalError("Something went wrong on our side. The log has the details under the request id.")


class Router:
    """One router replica: a queue per engine, the voice store, and the conditioning it has seen."""

    # Ray awaits an asynchronous constructor; the type checker does not know of one.
    async def __init__(  # type: ignore[misc]
        self, engines: dict[str, DeploymentHandle[Any]], settings: Settings
    ) -> None:
        self._settings = settings
        self._engines = {name: EngineDispatch(handle) for name, handle in engines.items()}
        self._queues: dict[str, EngineQueue] = {}
        self._facts: dict[str, EngineFacts] = {}
        self._store = VoiceStore.open(settings.voices.store)
        # A store that cannot be written fails the deployment, with the sentence in `serve status`.
        await self._store.check()
        self._sweeping = asyncio.create_task(self._sweep())
        self._reader = ReferenceReader(settings.voices.reference)
        self._conditioning = ConditioningSource(
            self._store,
            max_bytes=settings.voices.conditioning_cache_mb << 20,
            ttl_s=settings.voices.conditioning_ttl_s,
        )

    async def _sweep(self) -> None:
        """Remove what killed enrolments left in the store, now and every hour."""
        while True:
            try:
                await self._store.sweep()
            except VoiceCloneError as error:
                logger.warning("The voice store could not be swept: %s", error.message)
            await asyncio.sleep(_SWEEP_INTERVAL_S)

    async def speak(self, request: SpeechRequest) -> AsyncGenerator[list[SpeechEvent], None]:
        """Speak a text: ``SpeechStarted`` and the first audio, then frames in order; or ``Failure``.

        In lists, because each item of a stream between deployments costs a millisecond or more.
        """
        try:
            async with aclosing(self._speak(request)) as events:
                async for event in events:
                    yield event
        except VoiceCloneError as error:
            yield [Failure(error)]
        except Exception as error:  # noqa: BLE001 - a defect: logged, and answered without its details
            yield [Failure(_defect("speak", error))]

    async def _speak(self, request: SpeechRequest) -> AsyncGenerator[list[SpeechEvent], None]:
        name = self._engine_name(request.model)
        self._check_length(request.text)
        text = texts.clean(request.text)
        facts = await self._engine_facts(name)
        self._check_options(request, facts)
        voice = await self._voice(request.voice, request.owner)
        language = _language(request.language, text, facts)
        conditioning = await self._conditioning.get(voice, facts, self._engines[name])
        seed = request.seed if request.seed is not None else secrets.randbelow(_SEED_LIMIT)
        # A flood of dots too long to join a neighbour has nothing to say; the rest of the text has.
        pieces = [
            piece
            for piece in texts.split(text, language, facts.card.max_chars(language))
            if texts.is_speakable(piece)
        ]

        def submit(index: int) -> Row:
            call = UtteranceCall(
                call_id=str(ULID()),
                text=pieces[index],
                language=language,
                conditioning=conditioning,
                # Neighbours must not repeat each other's noise, a repeated request must.
                seed=(seed + index) % _SEED_LIMIT,
                speed=request.speed,
                options=request.options,
            )
            return self._queue(name, facts).submit(call)

        started = SpeechStarted(name, voice.id, language, facts.card.sample_rate_hz, seed, len(pieces))
        rows: deque[Row] = deque()
        submitted = 0
        silent = True
        try:
            while submitted < len(pieces) or rows:
                while submitted < len(pieces) and len(rows) < self._settings.limits.look_ahead_utterances:
                    rows.append(submit(submitted))
                    submitted += 1
                samples = aiter(rows[0])
                if silent:
                    yield [started, await self._first(samples)]
                    silent = False
                async for part in samples:
                    yield [AudioFrame(part)]
                rows.popleft()
        finally:
            for row in rows:
                row.leave()

    async def _first(self, samples: AsyncIterator[Any]) -> AudioFrame:
        try:
            async with asyncio.timeout(self._settings.limits.first_audio_timeout_s):
                return AudioFrame(await anext(samples))
        except TimeoutError as error:
            raise EngineUnavailable(
                "The engine did not start to speak in time. Try again later.", retry_after_s=5.0
            ) from error
        except StopAsyncIteration as error:
            raise EngineFailed("The engine spoke nothing for this text.") from error

    @answers
    async def enrol(self, request: EnrolRequest) -> Voice:
        """Check a recording, compute its conditioning, and only then make it a voice."""
        settings = self._settings.voices
        if settings.consent == "required" and not request.consent.strip():
            raise ConsentRequired(
                "This server enrols no voice without consent. Send the speaker's statement in 'consent'.",
                param="consent",
            )
        name = self._engine_name(request.model)
        new = _new_voice(request)
        if not request.replace:
            await self._refuse_taken_name(new)
        checked = await self._reader.read(request.audio)
        reference = checked.as_reference(transcript=new.transcript, language=new.language)
        conditioning = await extract(self._engines[name], reference)
        store = self._store.replace if request.replace else self._store.create
        voice = await store(new, checked)
        await self._conditioning.keep(voice, conditioning)
        self._conditioning.refine_later(voice, reference, conditioning, self._engines[name])
        return voice

    async def _refuse_taken_name(self, new: NewVoice) -> None:
        """Say so before any work is done; ``create`` decides for good."""
        try:
            taken = await self._store.get(new.name, new.owner)
        except VoiceNotFound:
            return
        raise VoiceExists(
            f"A voice of this name is enrolled already as {taken.id}. "
            "Choose another name or delete that one first.",
            param="name",
        )

    @answers
    async def voice(self, voice: str, owner: str = "public") -> Voice:
        """One voice by id, name or alias."""
        return await self._voice(voice, owner)

    @answers
    async def voices(self, owner: str = "public", limit: int = 100, after: str | None = None) -> VoicePage:
        """Voices in order of enrolment."""
        return await self._store.list(owner, limit=limit, after=after)

    @answers
    async def delete_voice(self, voice: str, owner: str = "public") -> Voice:
        """Remove a voice; speeches that run finish with it."""
        found = await self._voice(voice, owner)
        await self._store.delete(found.id, owner)
        self._conditioning.forget(found)
        return found

    @answers
    async def models(self) -> dict[str, EngineFacts | None]:
        """Served engines by name; None for one that has no running replica now."""
        facts = await asyncio.gather(
            *(self._engine_facts(name, timeout_s=2.0) for name in self._engines), return_exceptions=True
        )
        return {
            name: fact if isinstance(fact, EngineFacts) else None
            for name, fact in zip(self._engines, facts, strict=True)
        }

    @answers
    async def ready(self) -> bool:
        """True if the default engine answers."""
        await self._engine_facts(self._settings.default_name, timeout_s=2.0)
        return True

    def _engine_name(self, model: str | None) -> str:
        name = self._settings.served_engine(model)
        if name is None:
            raise ModelNotFound(
                f"No such model. Served: {', '.join(self._engines)}. List models: GET /v1/models.",
                param="model",
            )
        return name

    async def _engine_facts(self, name: str, timeout_s: float = _FACTS_TIMEOUT_S) -> EngineFacts:
        if name not in self._facts:
            try:
                async with asyncio.timeout(timeout_s):
                    self._facts[name] = await self._engines[name].describe()
            except (TimeoutError, *REPLICA_LOST) as error:
                raise EngineUnavailable(
                    f"Engine '{name}' is not running yet. Try again in a moment.", retry_after_s=5.0
                ) from error
        return self._facts[name]

    def _queue(self, name: str, facts: EngineFacts) -> EngineQueue:
        if name not in self._queues:
            self._queues[name] = EngineQueue(
                self._engines[name],
                max_rows=facts.slots,
                max_waiting=self._settings.limits.max_queued_utterances,
            )
        return self._queues[name]

    async def _voice(self, voice: str, owner: str) -> Voice:
        return await self._store.get(self._settings.voices.aliases.get(voice, voice), owner)

    def _check_length(self, text: str) -> None:
        limit = self._settings.limits.max_input_chars
        if len(text) > limit:
            raise InputTooLong(
                f"The text has {len(text)} characters; {limit} are allowed. Send it in parts.",
                param="input",
            )

    @staticmethod
    def _check_options(request: SpeechRequest, facts: EngineFacts) -> None:
        unknown = sorted(set(request.options) - set(facts.card.options))
        if unknown:
            raise UnsupportedOption(
                f"Engine '{facts.card.name}' has no option '{unknown[0][:40]}'. "
                f"Its options: {', '.join(facts.card.options) or 'none'}.",
                param="engine_options",
            )


def _new_voice(request: EnrolRequest) -> NewVoice:
    """What the store keeps of an enrolment. Raises ``InvalidValue`` for a field it cannot keep."""
    statement = request.consent.strip()
    try:
        return NewVoice(
            name=request.name,
            owner=request.owner,
            language=request.language,
            transcript=request.transcript,
            consent=Consent(statement=statement, recorded_at=int(time.time())) if statement else None,
        )
    except ValidationError as error:
        finding = error.errors(include_url=False, include_input=False)[0]
        param = str(finding["loc"][-1])
        raise InvalidValue(f"'{param}': {finding['msg']}.", param=param) from error


def _language(wanted: str | None, text: str, facts: EngineFacts) -> str:
    """The language to speak: what was asked for, else what the text is in."""
    if wanted:
        language = wanted.lower().replace("_", "-").split("-")[0]
    else:
        language = texts.find_language(text, facts.languages)
    if language not in facts.languages:
        found = "is asked for" if wanted else "seems to be the language of the text"
        raise UnsupportedLanguage(
            f"'{language[:20]}' {found}, which engine '{facts.card.name}' does not speak. "
            f"{facts.card.about_languages(facts.languages)} "
            "Choose another engine (GET /v1/models), or set 'language' if the guess is wrong.",
            param="language",
        )
    return language
