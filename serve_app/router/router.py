"""Router: every request passes here. Voices, text, batches, order; the engines only ever see utterances."""

# No postponed annotations: Serve inspects this class when it is deployed.
import asyncio
import functools
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from pydantic import ValidationError
from ray.serve.handle import DeploymentHandle

from engines.contract import Samples
from serve_app.config import Settings
from serve_app.errors import (
    EngineFailed,
    EngineUnavailable,
    InputTooLong,
    InternalError,
    InvalidRequest,
    InvalidValue,
    ModelNotFound,
    ShuttingDown,
    Unavailable,
    UnsupportedLanguage,
    UnsupportedOption,
    VoiceCloneError,
    VoiceNotFound,
)
from serve_app.metrics import AUDIO, CHARACTERS, FIRST_AUDIO, GAPS, REFUSALS, REQUESTS, Metrics
from serve_app.process import process_activity
from serve_app.protocol import (
    AudioFrame,
    BatchProgress,
    Caller,
    ConsentRequest,
    EngineFacts,
    EnrolRequest,
    Failure,
    Priority,
    ReplicaFigures,
    RouterActivity,
    RouterFigures,
    SpeechEvent,
    SpeechRequest,
    SpeechStarted,
    UtteranceCall,
    UtteranceVerified,
)
from serve_app.router import text as texts
from serve_app.router.batch_board import BatchBoard
from serve_app.router.batching import EngineQueue, QueueLimits
from serve_app.router.built_in_voices import built_in_voices, find_built_in_voice
from serve_app.router.conditioning import ConditioningSource, VoiceConditioning, extract
from serve_app.router.consents import Consents
from serve_app.router.dispatch import REPLICA_LOST, EngineDispatch, UnreservedDispatch, rows_per_call
from serve_app.router.fair_queue import Tier
from serve_app.router.limits.admission import Admission
from serve_app.router.reuse import SeedsInUse, SpokenUtterances, content_key
from serve_app.router.rows import Listener
from serve_app.router.speech import Playback, Speech
from serve_app.router.transcription import Transcription
from serve_app.router.verification import Demand, Verification
from serve_app.transcripts.agreement import VerifyTerms
from serve_app.transcripts.transcript import Correction
from serve_app.voices.announcements import Announcement, Announcements
from serve_app.voices.consents import ConsentPage, VoiceConsent
from serve_app.voices.reference import ReferenceReader
from serve_app.voices.several_recordings import read_recordings
from serve_app.voices.store import VoicePage, VoiceStore
from serve_app.voices.visible import VisibleVoices
from serve_app.voices.voice import BuiltInVoice, Consent, NewVoice, Voice

logger = logging.getLogger("ray.serve")

#: How long to wait for a replica that should be up but does not answer.
_FACTS_TIMEOUT_S = 20.0
_SWEEP_INTERVAL_S = 3600.0
#: Transcripts of a page of voices that are read at the same time.
_READS_AT_ONCE = 32
_SEED_LIMIT = 2**63
#: Added to the seed of an utterance that is spoken again: no neighbour has come so far.
_NEXT_TRY = 2**32 + 15
#: Failures before the first audio after which another engine may speak instead.
_CANNOT_BEGIN = (Unavailable, EngineFailed)

_DISPATCH = {"router": EngineDispatch, "replica": UnreservedDispatch}

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
        self,
        engines: dict[str, DeploymentHandle[Any]],
        settings: Settings,
        transcriber: DeploymentHandle[Any] | None = None,
    ) -> None:
        self._settings = settings
        self._configured = settings
        self._metrics = Metrics()
        self._engines = {
            name: _DISPATCH[settings.engines[name].batching.form_in](handle)
            for name, handle in engines.items()
        }
        self._queues: dict[str, EngineQueue] = {}
        self._facts: dict[str, EngineFacts] = {}
        self._playing: dict[str, Playback] = {}
        self._running = self._answered = 0
        self._answering_s = 0.0
        self._batches = BatchBoard()
        self._draining = False
        self._spoken = SpokenUtterances(settings.cache.max_mb << 20, self._metrics)
        self._seeds = SeedsInUse(lambda: secrets.randbelow(_SEED_LIMIT))
        self._store = VoiceStore.open(settings.voices.store)
        # A store that cannot be written fails the deployment, with the sentence in `serve status`.
        await self._store.check()
        self._voices = VisibleVoices(
            self._store,
            aliases=settings.voices.aliases,
            shared_owners=settings.voices.shared_owners,
            shared_ids=settings.voices.shared_ids,
            max_per_owner=settings.voices.max_per_owner,
        )
        self._announcements = Announcements(self._store)
        self._reader = ReferenceReader(settings.voices.reference)
        self._consents = Consents(self._store, self._reader)
        self._sweeping = asyncio.create_task(self._sweep())
        self._admission = Admission.open(settings.limits, settings.keys)
        self._conditioning = ConditioningSource(
            self._store,
            max_bytes=settings.voices.conditioning_cache_mb << 20,
            ttl_s=settings.voices.conditioning_ttl_s,
        )
        self._transcription = Transcription(
            self._store,
            transcriber,
            timeout_s=settings.transcriber.timeout_s if settings.transcriber is not None else 0.0,
        )
        self._verification = Verification(self._transcription, self._metrics)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve with ``user_config``, at the start and whenever it changes."""
        self._settings = self._configured.reconfigured(user_config)
        self._admission.reconfigure(self._settings.limits)
        for name, queue in self._queues.items():
            queue.limits = self._queue_limits(name)

    async def _sweep(self) -> None:
        """Remove what killed enrolments left in the store, now and every hour."""
        while True:
            try:
                await self._store.sweep()
                await self._consents.sweep()
            except VoiceCloneError as error:
                logger.warning("The voice store could not be swept: %s", error.message)
            await asyncio.sleep(_SWEEP_INTERVAL_S)

    async def speak(self, request: SpeechRequest) -> AsyncGenerator[list[SpeechEvent], None]:
        """Speak a text: ``SpeechStarted`` and the first audio, then frames in order; or ``Failure``.

        In lists, because each item of a stream between deployments costs a millisecond or more.
        """
        asked_s = time.monotonic()
        client = request.caller.kind
        try:
            with self._accepted():
                self._check_length(request.text)
                async with (
                    self._admission.admit(request.caller, len(request.text)),
                    aclosing(self._speak(request, asked_s)) as events,
                ):
                    async for event in events:
                        yield event
        except VoiceCloneError as error:
            self._metrics.count(REFUSALS, client=client, code=error.code)
            yield [Failure(error)]
        except Exception as error:  # noqa: BLE001 - a defect: logged, and answered without its details
            self._metrics.count(REFUSALS, client=client, code=InternalError.code)
            yield [Failure(_defect("speak", error))]

    @contextmanager
    def _accepted(self) -> Iterator[None]:
        """Count a request as running. Raises ``ShuttingDown`` once no more are taken."""
        if self._draining:
            raise ShuttingDown("The server is shutting down. Send the request again.", retry_after_s=2.0)
        self._running += 1
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._running -= 1
            self._answered += 1
            self._answering_s += time.monotonic() - began_s

    async def _speak(self, request: SpeechRequest, asked_s: float) -> AsyncGenerator[list[SpeechEvent], None]:
        first = self._engine_name(request.model)
        text = texts.clean(request.text)
        if request.reference is not None:
            await self._consents.demanded(
                request.reference.consent, request.caller.owner, self._settings.voices
            )
        failure: VoiceCloneError | None = None
        for name in self._candidates(first, request):
            async with aclosing(self._speak_with(name, request, text, asked_s)) as events:
                try:
                    event = await anext(events)
                except _CANNOT_BEGIN as error:
                    failure = failure or error
                    continue
                except InvalidRequest:
                    # What the chosen engine could not do now, this one cannot do at all.
                    if failure is None:
                        raise
                    continue
                yield event
                async for event in events:
                    yield event
                return
        if failure is not None:
            raise failure

    def _candidates(self, first: str, request: SpeechRequest) -> list[str]:
        """The chosen engine and those that may speak in its place, in order."""
        fallback = request.fallback_engines
        if fallback is None:
            fallback = self._settings.engines[first].fallback
        return list(dict.fromkeys([first, *map(self._engine_name, fallback)]))

    async def _speak_with(
        self, name: str, request: SpeechRequest, text: str, asked_s: float
    ) -> AsyncGenerator[list[SpeechEvent], None]:
        """Speak ``text`` with one engine."""
        limits = self._settings.limits
        client = request.caller.kind
        key = self._settings.keys.get(request.caller.key)
        terms = self._verify_terms(request)
        facts = await self._engine_facts(name)
        self._check_options(request, facts)
        voice_id, language, prepared = await self._prepared(request, text, name, facts)
        # A flood of dots too long to join a neighbour has nothing to say; the rest of the text has.
        pieces = [
            piece
            for piece in texts.split(text, language, facts.card.max_chars(language))
            if texts.is_speakable(piece)
        ]
        whole = UtteranceCall(
            call_id="",
            text=text,
            language=language,
            conditioning=prepared.conditioning,
            seed=request.seed if request.seed is not None else 0,
            speed=request.speed,
            options=request.options,
        )
        queue = self._queue(name, facts)
        content = content_key(whole, prepared.digest)
        playback = Playback(facts.card.sample_rate_hz, reports=bool(request.speech_id))
        with self._seed(request, content) as seed:

            def speak(index: int, attempt: int) -> Listener:
                # Neighbours must not repeat each other's noise, a repeated request must.
                own_seed = (seed + index + attempt * _NEXT_TRY) % _SEED_LIMIT
                call = replace(whole, text=pieces[index], seed=own_seed)
                tier = _tier(request.priority, first=index == 0)
                return self._spoken.listen(
                    content_key(call, prepared.digest),
                    lambda: queue.submit(
                        call,
                        client=request.caller.client,
                        weight=key.weight if key is not None else 1.0,
                        tier=tier,
                        group=_group(call, prepared.digest, facts),
                    ),
                    keep=request.seed is not None or self._settings.cache.unseeded,
                    joined=lambda recording: queue.promote(recording, tier),
                )

            verdicts: list[UtteranceVerified] = []

            def listen(index: int) -> Listener:
                if terms is None:
                    return speak(index, 0)
                demand = Demand(terms, name, language, facts.card.sample_rate_hz, verdicts.append)
                return self._verification.listen(index, pieces[index], partial(speak, index), demand)

            speech = Speech(
                len(pieces),
                listen,
                playback,
                look_ahead_utterances=limits.look_ahead_utterances,
                look_ahead_s=limits.look_ahead_s,
                stall_timeout_s=limits.stall_timeout_s,
            )
            started = SpeechStarted(
                name, voice_id, language, facts.card.sample_rate_hz, seed, len(pieces), tuple(pieces)
            )
            outcome = "cancelled"
            self._metrics.count(CHARACTERS, len(text), engine=name, client=client)
            if request.speech_id:
                self._playing[request.speech_id] = playback
            try:
                async with aclosing(speech.parts()) as parts:
                    frame = await self._first(parts)
                    self._metrics.observe(FIRST_AUDIO, time.monotonic() - asked_s, engine=name, client=client)
                    yield [replace(started, verified=tuple(_taken(verdicts))), frame]
                    async for samples in parts:
                        yield [*_taken(verdicts), AudioFrame(samples, speech.utterance)]
                outcome = "complete"
            except VoiceCloneError:
                outcome = "failed"
                raise
            finally:
                self._playing.pop(request.speech_id, None)
                self._metrics.count(REQUESTS, engine=name, client=client, outcome=outcome)
                self._metrics.count(AUDIO, playback.sent_s, engine=name, client=client)
                self._metrics.observe(GAPS, playback.gap_s, engine=name, client=client)

    async def _prepared(
        self, request: SpeechRequest, text: str, name: str, facts: EngineFacts
    ) -> tuple[str, str, VoiceConditioning]:
        """Id of the voice (empty for a one-shot reference), language to speak, and conditioning."""
        engine = self._engines[name]
        if request.reference is not None:
            language = _language(request.language, text, facts)
            once = await self._conditioning.once(
                request.reference, facts, engine, self._reader, self._transcription
            )
            return "", language, once
        voice = await self._voice(request.voice, request.caller, name)
        language = _language(request.language, text, facts)
        if isinstance(voice, BuiltInVoice):
            return voice.id, language, await self._conditioning.built_in(voice, facts, engine)
        transcript = await self._transcription.of_voice(voice, facts.card)
        return voice.id, language, await self._conditioning.get(voice, facts, engine, transcript)

    def _verify_terms(self, request: SpeechRequest) -> VerifyTerms | None:
        terms = self._settings.verify if request.verify is None else request.verify or None
        if terms is not None and self._settings.transcriber is None:
            raise UnsupportedOption(
                "This server has no transcriber to verify speech with. Leave 'verify' out.", param="verify"
            )
        return terms

    def _seed(self, request: SpeechRequest, content: bytes) -> AbstractContextManager[int]:
        """The seed of a request: its own, one of the content's own if that is cached, else one in use."""
        if request.seed is not None:
            return nullcontext(request.seed)
        if self._settings.cache.unseeded:
            return nullcontext(int.from_bytes(content[:8], "little") % _SEED_LIMIT)
        return self._seeds.seed_for(content)

    async def _first(self, parts: AsyncGenerator[Samples, None]) -> AudioFrame:
        try:
            async with asyncio.timeout(self._settings.limits.first_audio_timeout_s):
                return AudioFrame(await anext(parts))
        except TimeoutError as error:
            raise EngineUnavailable(
                "The engine did not start to speak in time. Try again later.", retry_after_s=5.0
            ) from error
        except StopAsyncIteration as error:
            raise EngineFailed("The engine spoke nothing for this text.") from error

    async def heard(self, speech_id: str, samples: int) -> None:
        """The reader of a speech has taken ``samples`` in all. Told to every router; one of them knows it."""
        if (playback := self._playing.get(speech_id)) is not None:
            playback.heard(samples)

    async def drain(self) -> int:
        """Take no new speech or enrolment from now on; the answer is how many still run."""
        self._draining = True
        return self._running

    async def activity(self) -> RouterActivity:
        """What this router holds now: all zero when nothing runs."""
        return RouterActivity(
            process=process_activity(),
            requests=self._running,
            waiting=sum(queue.waiting for queue in self._queues.values()),
            speaking=sum(queue.speaking for queue in self._queues.values()),
            recordings=self._spoken.making,
            readers=len(self._playing),
        )

    @answers
    async def enrol(self, request: EnrolRequest) -> Voice:
        """Check a recording, compute its conditioning, and only then make it a voice."""
        with self._accepted():
            async with self._admission.admit(request.caller, characters=0):
                return await self._enrol(request)

    async def _enrol(self, request: EnrolRequest) -> Voice:
        consent = await self._consents.demanded(request.consent, request.caller.owner, self._settings.voices)
        name = self._engine_name(request.model)
        new = _new_voice(request, consent)
        await self._voices.check_new(new.name, new.owner, replace=request.replace)
        checked = await read_recordings(self._reader, [request.audio, *request.more_audio])
        reference = checked.as_reference(transcript=new.transcript, language=new.language)
        # However long the engine takes to come up: the recording cannot be enrolled without it anyway.
        facts = await self._engine_facts(name, timeout_s=None)
        transcript, hearing = await self._transcription.of_recording(
            new.transcript, new.language, checked, facts.card
        )
        if transcript is not None:
            reference = transcript.completes(reference)
        conditioning = await extract(self._engines[name], reference)
        store = self._store.replace if request.replace else self._store.create
        voice = await store(new, checked, hearing)
        await self._conditioning.keep(voice, conditioning, transcript)
        self._conditioning.refine_later(voice, reference, conditioning, self._engines[name], transcript)
        return await self._with_words(voice)

    @answers
    async def voice(self, voice: str, caller: Caller) -> Voice | BuiltInVoice:
        """One voice by id, name or alias."""
        try:
            found = await self._voice(voice, caller)
        except VoiceNotFound:
            # Perhaps of an engine that this router has not asked yet. An enrolled voice waits for no engine.
            await self._meet_engines()
            found = await self._voice(voice, caller)
        return found if isinstance(found, BuiltInVoice) else await self._with_words(found)

    @answers
    async def voices(self, caller: Caller, limit: int, after: str | None) -> VoicePage:
        """The voices there are for ``caller``, in order of enrolment, and behind them those of engines."""
        await self._meet_engines()
        built_in = built_in_voices(self._facts)
        ids = [voice.id for voice in built_in]
        if after in ids:
            page, built_in = VoicePage((), has_more=False), built_in[ids.index(after) + 1 :]
        else:
            page = await self._voices.list(caller, limit=limit, after=after)
            gate = asyncio.Semaphore(_READS_AT_ONCE)

            async def with_words(voice: Voice) -> Voice:
                async with gate:
                    return await self._with_words(voice)

            page = replace(page, voices=tuple(await asyncio.gather(*map(with_words, page.voices))))
        if page.has_more:
            return page
        room = limit - len(page.voices)
        return replace(page, built_in=tuple(built_in[:room]), has_more=len(built_in) > room)

    async def _meet_engines(self) -> None:
        """Learn what engines bring with them, of those that should be running: none is started for it."""
        names = [name for name in self._engines if self._settings.engines[name].replicas.min_replicas]
        await asyncio.gather(
            *(self._engine_facts(name, timeout_s=2.0) for name in names), return_exceptions=True
        )

    @answers
    async def delete_voice(self, voice: str, caller: Caller) -> str:
        """Remove a voice and give its id; speeches that run finish with it."""
        if (built_in := find_built_in_voice(voice, self._facts)) and voice == built_in.id:
            raise VoiceNotFound(
                f"'{built_in.name}' comes with engine '{built_in.engine}' and cannot be deleted.",
                param="voice",
            )
        voice_id, gone = await self._voices.delete(voice, caller)
        if gone is not None:
            self._conditioning.forget(gone)
        return voice_id

    @answers
    async def correct_transcript(self, voice: str, correction: Correction, caller: Caller) -> Voice:
        """Let a person say what is said in the recording of a voice, which changes how it speaks."""
        found = await self._voices.own(voice, caller)
        await self._store.correct(found, correction)
        return await self._with_words(found)

    async def _with_words(self, voice: Voice) -> Voice:
        return voice.model_copy(update={"words": await self._store.transcript(voice)})

    @answers
    async def announcements(self) -> tuple[Announcement, ...]:
        """What operators have to say and is not over, oldest first."""
        return await self._announcements.current()

    @answers
    async def announce(self, announcement: Announcement) -> bool:
        """Keep an announcement."""
        await self._announcements.put(announcement)
        return True

    @answers
    async def withdraw(self, announcement_id: str) -> bool:
        """Remove an announcement."""
        await self._announcements.remove(announcement_id)
        return True

    @answers
    async def replica_figures(self) -> dict[str, list[ReplicaFigures]]:
        """Figures of the replicas by engine."""
        figures = await asyncio.gather(*(engine.figures() for engine in self._engines.values()))
        return dict(zip(self._engines, figures, strict=True))

    async def figures(self) -> RouterFigures:
        """What an operator sees of this router."""
        return RouterFigures(self._running, self._answered, self._answering_s)

    async def report_batch(self, progress: BatchProgress) -> None:
        """A request of several texts has come this far. Told to every router, as anybody may ask any."""
        self._batches.report(progress)

    @answers
    async def batches(self, caller: Caller) -> list[BatchProgress]:
        """How far the requests of several texts of ``caller`` are."""
        return self._batches.of(caller.client)

    @answers
    async def record_consent(self, request: ConsentRequest) -> VoiceConsent:
        """Keep a recording in which a speaker consents."""
        with self._accepted():
            async with self._admission.admit(request.caller, characters=0):
                return await self._consents.record(request)

    @answers
    async def consent(self, consent_id: str, caller: Caller) -> VoiceConsent:
        """One recorded consent."""
        return await self._consents.get(consent_id, caller.owner)

    @answers
    async def consents(self, caller: Caller, limit: int, after: str | None) -> ConsentPage:
        """Recorded consents, oldest first."""
        return await self._consents.list(caller.owner, limit, after)

    @answers
    async def rename_consent(self, consent_id: str, name: str, caller: Caller) -> VoiceConsent:
        """Give a recorded consent another name."""
        return await self._consents.rename(consent_id, name, caller.owner)

    @answers
    async def delete_consent(self, consent_id: str, caller: Caller) -> VoiceConsent:
        """Remove a recorded consent and return what it was."""
        return await self._consents.delete(consent_id, caller.owner)

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

    async def _engine_facts(self, name: str, timeout_s: float | None = _FACTS_TIMEOUT_S) -> EngineFacts:
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
                name,
                self._engines[name],
                self._queue_limits(name),
                self._metrics,
                facts.card.sample_rate_hz,
            )
        return self._queues[name]

    def _queue_limits(self, name: str) -> QueueLimits:
        limits, batching = self._settings.limits, self._settings.engines[name].batching
        slots = self._facts[name].slots
        return QueueLimits(
            rows_per_call=rows_per_call(slots),
            max_rows=min(batching.max_rows or slots, slots),
            max_chars=batching.max_chars,
            max_waiting=limits.max_queued_requests,
            max_wait_s=limits.max_queue_wait_s,
            max_redo_wait_s=limits.max_redo_wait_s,
            chunk_timeout_s=batching.chunk_timeout_s,
        )

    async def _voice(self, voice: str, caller: Caller, engine: str | None = None) -> Voice | BuiltInVoice:
        """An enrolled voice, or else one that comes with an engine: with ``engine``, if one is named."""
        asked = self._settings.voices.aliases.get(voice, voice)
        try:
            return await self._voices.get(voice, caller)
        except VoiceNotFound:
            found = find_built_in_voice(asked, {engine: self._facts[engine]} if engine else self._facts)
            if found is not None:
                return found
            elsewhere = find_built_in_voice(asked, self._facts)
            if elsewhere is None:
                raise
        raise VoiceNotFound(
            f"'{elsewhere.name}' comes with engine '{elsewhere.engine}' and speaks with no other. "
            f"Set 'model' to '{elsewhere.engine}'.",
            param="voice",
        )

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


def _new_voice(request: EnrolRequest, consent: Consent | None) -> NewVoice:
    """What the store keeps of an enrolment. Raises ``InvalidValue`` for a field it cannot keep."""
    try:
        return NewVoice(
            name=request.name,
            owner=request.owner,
            language=request.language,
            transcript=request.transcript,
            description=request.description,
            consent=consent,
        )
    except ValidationError as error:
        finding = error.errors(include_url=False, include_input=False)[0]
        param = str(finding["loc"][-1])
        raise InvalidValue(f"'{param}': {finding['msg']}.", param=param) from error


def _taken(verdicts: list[UtteranceVerified]) -> list[UtteranceVerified]:
    taken, verdicts[:] = list(verdicts), []
    return taken


def _tier(priority: Priority, *, first: bool) -> Tier:
    if priority is Priority.BULK:
        return Tier.BULK_FIRST if first else Tier.BULK_NEXT
    return Tier.FIRST if first else Tier.NEXT


def _group(call: UtteranceCall, conditioning_digest: str, facts: EngineFacts) -> tuple[object, ...]:
    """What utterances of one batch must have in common, as the engine's card says."""
    values = {
        "language": call.language,
        "speed": call.speed,
        "conditioning": conditioning_digest,
        "options": json.dumps(dict(call.options), sort_keys=True, default=str),
    }
    return tuple(values[name] for name in facts.card.batch_by)


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
