"""GPT-SoVITS on servers of its own: a client of ``api_v2.py``, chosen when ``GPT_SOVITS_API_URL`` is set.

For what does not run in this process: v1, v3 and v4, Korean and Cantonese, fine-tuned pairs of weights. An
api_v2 server does one thing at a time and mixes voices if it is made to do two (GPT-SoVITS issues #740, #884,
#972), so each URL is one slot, and more speed is more URLs. A server that dies is skipped, its utterance
spoken by another one, and looked for again later. How one server is spoken to is in ``api_v2``.

::

    conditioning.arrays   samples     float32 [n], mono, 3 to 10 s at 32 kHz
                          transcript  uint8, UTF-8: what is said in them, may be empty
                          language    uint8, UTF-8: BCP-47 of that, may be empty
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from engines.contract import (
    Chunk,
    Conditioning,
    EngineError,
    ModelCorrupt,
    ModelMissing,
    NothingToSpeak,
    ReferenceUnusable,
    Samples,
    SynthesisFailed,
    UnsupportedLanguage,
    UnsupportedOption,
    Utterance,
)
from engines.gpt_sovits.api_v2 import ApiV2Server, ServerLost, State, WeightPair
from engines.gpt_sovits.options import WEIGHTS, Sampling
from engines.gpt_sovits.server_pool import ServerPool
from engines.gpt_sovits.shared_folder import SharedFolder

logger = logging.getLogger(__name__)

#: Rate of ``samples`` in a conditioning.
REFERENCE_RATE_HZ = 32_000

Version = Literal["v1", "v2", "v2Pro", "v2ProPlus", "v3", "v4"]

_SAMPLE_RATES_HZ: Mapping[str, int] = {"v3": 24_000, "v4": 48_000}
_LANGUAGES: Mapping[str, tuple[str, ...]] = {"v1": ("en", "ja", "zh")}
_NEWER_LANGUAGES = ("en", "ja", "ko", "yue", "zh")
#: Versions whose decoder cannot be prompted without words.
_NEED_TRANSCRIPT = ("v3", "v4")
#: numpy on the server takes no larger seed, and -1 would draw one.
_SEEDS = 2**32
#: How often the flags of abandoned utterances are looked at.
_LOOK_S = 0.05


class RemoteSettings(BaseModel):
    """Which servers speak, and how they are asked to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    urls: tuple[str, ...] = Field(
        min_length=1, description="Servers of `api_v2.py`; each does one thing at a time."
    )
    version: Version = Field(
        default="v2ProPlus", description="Version of the servers' weights: it decides rate and languages."
    )
    shared_dir: Path = Field(
        default=Path("~/.cache/voice-clone/gpt-sovits"),
        description="Folder for recordings that servers read; they take no uploads.",
    )
    remote_dir: str | None = Field(
        default=None, description="The same folder as the servers see it; `shared_dir` if left out."
    )
    streaming_mode: Literal[0, 1, 2, 3] = Field(
        default=0,
        description="0: an utterance when it is finished; 1: each of its fragments; 2: parts cut at pauses; "
        "3: parts of fixed length, soonest and roughest. v3 and v4 take 2 and 3 for 1.",
    )
    text_split_method: Literal["cut0", "cut1", "cut2", "cut3", "cut4", "cut5"] = Field(
        default="cut0",
        description="How a server cuts an utterance into fragments; cut0 does not, cut5 does at every sign.",
    )
    weights: dict[str, WeightPair] = Field(
        default_factory=dict,
        description="Pairs that utterances may ask for by name, in the option `weights`.",
    )
    default_weights: str | None = Field(
        default=None, description="Pair of utterances that ask for none; the first one if left out."
    )
    answer_timeout_s: float = Field(
        default=120.0, gt=0, description="A server that sends nothing for this long is given up."
    )
    connect_timeout_s: float = Field(default=5.0, gt=0, description="Longest wait for a connection.")
    probe_timeout_s: float = Field(
        default=2.0, gt=0, description="A server that holds a probe for this long is busy."
    )

    @field_validator("urls")
    @classmethod
    def _are_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parsed = httpx.URL(url)
            if parsed.scheme not in ("http", "https") or not parsed.host:
                raise ValueError(f"'{url}' is no http:// or https:// address")
        if len(set(urls)) < len(urls):
            raise ValueError("a server is named twice: it has one slot only")
        return urls

    @model_validator(mode="after")
    def _default_exists(self) -> RemoteSettings:
        if self.default_weights is not None and self.default_weights not in self.weights:
            raise ValueError(f"default_weights: there are no weights '{self.default_weights}'")
        return self

    @property
    def sample_rate_hz(self) -> int:
        """What the servers speak at."""
        return _SAMPLE_RATES_HZ.get(self.version, 32_000)


def remote_settings(environment: Mapping[str, str] = os.environ, **others: Any) -> RemoteSettings | None:
    """Settings from ``GPT_SOVITS_API_URL`` and its kin; None if it is not set. ``others``: further fields.

    ``GPT_SOVITS_API_URL`` is a list with commas; ``GPT_SOVITS_SHARED_DIR`` and ``GPT_SOVITS_REMOTE_DIR`` are
    ``shared_dir`` and ``remote_dir``. Raises ``ValidationError``.
    """
    urls = tuple(url.strip() for url in environment.get("GPT_SOVITS_API_URL", "").split(",") if url.strip())
    if not urls:
        return None
    fields: dict[str, Any] = {"urls": urls}
    for name in ("shared_dir", "remote_dir"):
        if value := environment.get(f"GPT_SOVITS_{name.upper()}"):
            fields[name] = value
    return RemoteSettings.model_validate({**fields, **others})


class RemoteBackend:
    """Speaks on api_v2 servers. As many utterances at once as there are servers; the others wait."""

    def __init__(self, settings: RemoteSettings) -> None:
        """Cheap: nobody is asked anything."""
        self.settings = settings
        here = settings.shared_dir.expanduser().absolute()
        self._folder = SharedFolder(here, settings.remote_dir or str(here))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: httpx.AsyncClient | None = None
        self._pool: ServerPool | None = None

    @property
    def sample_rate_hz(self) -> int:
        """Rate of every sample."""
        return self.settings.sample_rate_hz

    @property
    def languages(self) -> tuple[str, ...]:
        """BCP-47 primary subtags the servers speak."""
        return _LANGUAGES.get(self.settings.version, _NEWER_LANGUAGES)

    @property
    def concurrent_batches(self) -> int:
        """Calls of ``synthesize`` that may run at the same time: utterances of all share the servers."""
        return len(self.settings.urls)

    def load(self) -> None:
        """Look for the servers.

        Raises ``ModelMissing`` if none is there, ``ModelCorrupt`` if one is no api_v2.
        """
        settings = self.settings
        self._loop = loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, name="gpt-sovits-remote", daemon=True)
        self._thread.start()
        self._client = client = httpx.AsyncClient(
            timeout=httpx.Timeout(settings.answer_timeout_s, connect=settings.connect_timeout_s),
            # A proxy of this machine is for the world outside.
            trust_env=False,
        )
        servers = [
            ApiV2Server(
                url, client, sample_rate_hz=settings.sample_rate_hz, probe_timeout_s=settings.probe_timeout_s
            )
            for url in settings.urls
        ]
        self._pool = ServerPool(servers)
        try:
            states = self._run(_probe_all(servers))
            self._check_found(states)
        except BaseException:
            self.unload()
            raise
        for server, state in zip(servers, states, strict=True):
            if state is State.DEAD:
                self._pool.lost(server)

    def unload(self) -> None:
        """Leave the servers alone. ``load`` may be called again."""
        if self._loop is None or self._thread is None:
            return
        if self._client is not None:
            self._run(self._close(self._client))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = self._client = self._pool = None

    def synthesize(self, batch: Sequence[Utterance]) -> Iterator[Chunk]:
        """Speak ``batch``, each utterance on a server of its own; rows as ``Engine.synthesize`` says."""
        loop = self._loaded_loop()
        ready: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        tasks = {
            row: asyncio.run_coroutine_threadsafe(self._row(row, utterance, ready.put), loop)
            for row, utterance in enumerate(batch)
        }
        open_rows = dict(tasks)
        try:
            while open_rows:
                try:
                    chunk = ready.get(timeout=_LOOK_S)
                except queue.Empty:
                    chunk = None
                for row in [row for row in open_rows if batch[row].abandoned.is_set()]:
                    open_rows.pop(row).cancel()
                if chunk is not None and chunk.row in open_rows:
                    if chunk.last:
                        del open_rows[chunk.row]
                    yield chunk
                elif chunk is None:
                    _raise_defects(open_rows.values())
        finally:
            for task in tasks.values():
                task.cancel()

    async def _row(self, row: int, utterance: Utterance, put: Callable[[Chunk], None]) -> None:
        try:
            body, weights = await asyncio.to_thread(self._request, utterance)
            async with aclosing(self._speech(body, weights)) as parts:
                async for samples in parts:
                    put(Chunk(row, samples, last=False))
            put(Chunk(row, np.zeros(0, np.float32), last=True))
        except EngineError as error:
            put(Chunk.failure(row, error))

    async def _speech(
        self, body: Mapping[str, Any], weights: WeightPair | None
    ) -> AsyncGenerator[Samples, None]:
        """Samples from a server, or from another one if that is lost before it has said anything."""
        assert self._pool is not None  # noqa: S101 - `synthesize` has looked
        failed_on: list[ApiV2Server] = []
        spoken = False
        while True:
            async with self._pool.slot(weights, avoid=failed_on) as server:
                try:
                    if weights is not None:
                        await server.load(weights)
                    async with aclosing(server.speak(body)) as parts:
                        async for samples in parts:
                            spoken = True
                            yield samples
                except ServerLost as error:
                    logger.warning("%s was lost: %s", server.url, error)
                    self._pool.lost(server)
                    failed_on.append(server)
                    if spoken:
                        raise SynthesisFailed(
                            "A GPT-SoVITS server broke off in the middle of a text.", next_step="Try again."
                        ) from error
                else:
                    return

    def _request(self, utterance: Utterance) -> tuple[dict[str, Any], WeightPair | None]:
        """The body for an utterance, its recording put where servers read it, and the weights it needs."""
        if utterance.language not in self.languages:
            raise UnsupportedLanguage(
                f"GPT-SoVITS {self.settings.version} does not speak '{utterance.language}'.",
                next_step=f"It speaks: {', '.join(self.languages)}.",
            )
        if not any(char.isalnum() for char in utterance.text):
            raise NothingToSpeak(
                "The text has no letter or digit.", next_step="Send text with at least one letter or digit."
            )
        sampling = {name: value for name, value in utterance.options.items() if name != WEIGHTS}
        Sampling.of(sampling)
        transcript, language = self._prompt(utterance.conditioning)
        samples = np.asarray(utterance.conditioning.arrays["samples"], np.float32)
        body = {
            "text": utterance.text,
            # Lower case: a POST with "EN" is answered 400 without a reason.
            "text_lang": utterance.language.lower(),
            "ref_audio_path": self._folder.put(samples, REFERENCE_RATE_HZ),
            "prompt_text": transcript,
            "prompt_lang": language,
            "speed_factor": utterance.speed,
            "seed": utterance.seed % _SEEDS,
            "media_type": "wav",
            "streaming_mode": self.settings.streaming_mode,
            "text_split_method": self.settings.text_split_method,
            **sampling,
        }
        return body, self._weights(utterance.options.get(WEIGHTS))

    def _prompt(self, conditioning: Conditioning) -> tuple[str, str]:
        """What is said in the recording and in which language, as the servers are told."""
        transcript, language = (
            bytes(np.asarray(conditioning.arrays[name], np.uint8)).decode()
            for name in ("transcript", "language")
        )
        language = language.replace("_", "-").split("-")[0].lower()
        if not transcript and self.settings.version in _NEED_TRANSCRIPT:
            raise ReferenceUnusable(
                f"GPT-SoVITS {self.settings.version} has to know what is said in the recording of a voice.",
                next_step="Add the transcript to the voice.",
            )
        if not language:
            return transcript, "auto"
        if language in self.languages:
            return transcript, language
        if self.settings.version in _NEED_TRANSCRIPT:
            raise ReferenceUnusable(
                f"GPT-SoVITS {self.settings.version} takes no recording in '{language[:20]}'.",
                next_step=f"Enrol one in: {', '.join(self.languages)}.",
            )
        # Words of another language would be read by the rules of a wrong one; the sound alone still prompts.
        return "", "auto"

    def _weights(self, name: object) -> WeightPair | None:
        pairs = self.settings.weights
        if name is None:
            name = self.settings.default_weights or next(iter(pairs), None)
        if name is None:
            return None
        if not isinstance(name, str) or name not in pairs:
            raise UnsupportedOption(
                "There are no weights of that name.",
                next_step=f"Weights: {', '.join(pairs) or 'none are configured'}.",
            )
        return pairs[name]

    def _check_found(self, states: Sequence[State]) -> None:
        for url, state in zip(self.settings.urls, states, strict=True):
            if state is State.ANOTHER:
                raise ModelCorrupt(
                    f"What answers at {url} is no api_v2.py of GPT-SoVITS.",
                    next_step="Correct GPT_SOVITS_API_URL.",
                )
        if all(state is State.DEAD for state in states):
            raise ModelMissing(
                f"No GPT-SoVITS server answers at {', '.join(self.settings.urls)}.",
                next_step="Start `python api_v2.py`, or correct GPT_SOVITS_API_URL.",
            )

    def _loaded_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise ModelMissing("The GPT-SoVITS servers were not looked for.", next_step="Call load() first.")
        return self._loop

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loaded_loop()).result()

    async def _close(self, client: httpx.AsyncClient) -> None:
        if self._pool is not None:
            await self._pool.close()
        await client.aclose()


async def _probe_all(servers: Sequence[ApiV2Server]) -> list[State]:
    return await asyncio.gather(*(server.probe() for server in servers))


def _raise_defects(tasks: Collection[Future[None]]) -> None:
    for task in tasks:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            raise error
