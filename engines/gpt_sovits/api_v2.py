"""One ``api_v2.py`` server of GPT-SoVITS over HTTP: what it is asked, and what its answers mean.

Read and observed at commit 48b1a01 (2026-08). What makes it unlike other servers:

- Whatever fails while it infers is answered **200 with one second of zeros at 16 000 Hz**; streamed, the
connection   drops after that second. A text with nothing to say gets the same second, and no drop.
- A streamed WAV begins with a header of size 0; everything behind it is samples, cut anywhere.
- It has no health route. ``POST /tts {}`` costs nothing and is answered 400 "ref_audio_path is required".
While it   infers without streaming it answers nobody: silence means busy, a refused connection means dead.
- Weights are global: whoever switches them switches them for everyone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from enum import StrEnum
from typing import Any

import httpx
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from engines.contract import ReferenceUnusable, Samples, SynthesisFailed

logger = logging.getLogger(__name__)

#: Rate of the second of zeros that stands for a failure. No version speaks at it.
_FAILURE_RATE_HZ = 16_000
#: A header is 44 bytes, or a little more where a library adds chunks of its own.
_LONGEST_HEADER_BYTES = 4096
_WAV_RATE = slice(24, 28)


class State(StrEnum):
    """What a probe found."""

    READY = "ready"
    #: It holds the connection and does not answer: it works for somebody.
    BUSY = "busy"
    DEAD = "dead"
    #: Something answers, and it is not api_v2.
    ANOTHER = "another"


class ServerLost(Exception):
    """The server is gone, or went while it answered. Another one may do the same work."""


class WeightPair(BaseModel):
    """Two files on the server, which it loads when they are wanted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpt: str = Field(min_length=1, description="Path of the GPT weights (`.ckpt`) on the server.")
    sovits: str = Field(min_length=1, description="Path of the SoVITS weights (`.pth`) on the server.")


class ApiV2Server:
    """One server. Everything but ``probe`` is for whoever holds its one slot."""

    def __init__(
        self, url: str, client: httpx.AsyncClient, *, sample_rate_hz: int, probe_timeout_s: float
    ) -> None:
        """``client`` carries the timeouts of work; ``sample_rate_hz`` is the rate it has to speak at."""
        self.url = url.rstrip("/")
        self._client = client
        self._sample_rate_hz = sample_rate_hz
        self._probe_timeout_s = probe_timeout_s
        #: The pair it was last told to load; None if that is not known.
        self.weights: WeightPair | None = None
        #: Longest time between two parts of a stream so far: it cannot be stopped within one.
        self.longest_step_s = 0.0

    async def probe(self) -> State:
        """Ask for nothing and see who answers."""
        timeout = httpx.Timeout(self._probe_timeout_s)
        try:
            answer = await self._client.post(f"{self.url}/tts", json={}, timeout=timeout)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            return State.DEAD
        except httpx.TimeoutException:
            return State.BUSY
        except httpx.HTTPError:
            return State.DEAD
        is_api = answer.status_code == 400 and "ref_audio_path" in _message(answer)
        return State.READY if is_api else State.ANOTHER

    async def load(self, weights: WeightPair) -> None:
        """Have it load ``weights`` unless it has. Raises ``ServerLost`` or ``SynthesisFailed``."""
        if weights == self.weights:
            return
        # Half a switch is a pair that nobody asked for.
        self.weights = None
        for route, path in (("set_gpt_weights", weights.gpt), ("set_sovits_weights", weights.sovits)):
            try:
                answer = await self._client.get(f"{self.url}/{route}", params={"weights_path": path})
            except httpx.HTTPError as error:
                raise ServerLost(f"{type(error).__name__} while weights were loaded") from error
            if answer.status_code != 200:
                logger.error("%s: %s refused %s: %s", self.url, route, path, _message(answer))
                raise SynthesisFailed(
                    "A GPT-SoVITS server could not load its weights.",
                    next_step="The operator finds the reason in the log; `weights` names the files.",
                )
        self.weights = weights

    async def speak(self, body: Mapping[str, Any]) -> AsyncGenerator[Samples, None]:
        """``POST /tts``: samples as they come, float32 [n], at the rate of this server.

        Raises ``ServerLost`` if the connection cannot be made or drops, ``ReferenceUnusable`` if it refuses
        the recording, ``SynthesisFailed`` for any other refusal and for silence in place of speech.
        """
        try:
            async with self._client.stream("POST", f"{self.url}/tts", json=dict(body)) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    raise self._refusal(answer)
                began_s = time.monotonic()
                async with aclosing(self._samples(answer.aiter_raw())) as samples:
                    async for part in samples:
                        self.longest_step_s = max(self.longest_step_s, time.monotonic() - began_s)
                        yield part
                        began_s = time.monotonic()
        except httpx.HTTPError as error:
            raise ServerLost(type(error).__name__) from error

    async def _samples(self, parts: AsyncIterator[bytes]) -> AsyncGenerator[Samples, None]:
        """The sound of a WAV body. Leading zeros are held back until there is sound after them."""
        held: list[Samples] = []
        sounded = False
        async with aclosing(_pcm(parts)) as items:
            async for item in items:
                if isinstance(item, int):
                    self._check_rate(item)
                    continue
                held.append(item)
                if sounded or item.any():
                    sounded = True
                    yield held[0] if len(held) == 1 else np.concatenate(held)
                    held = []
        if not sounded:
            raise _silence()

    def _check_rate(self, rate_hz: int) -> None:
        if rate_hz == _FAILURE_RATE_HZ:
            raise _silence()
        if rate_hz != self._sample_rate_hz:
            raise SynthesisFailed(
                f"A GPT-SoVITS server speaks at {rate_hz} Hz instead of {self._sample_rate_hz} Hz.",
                next_step="It runs another version: set `version` to that of its weights.",
            )

    def _refusal(self, answer: httpx.Response) -> SynthesisFailed | ReferenceUnusable:
        reason = _message(answer)
        logger.warning("%s refused with %d: %s", self.url, answer.status_code, reason)
        if "not exists" in reason:
            return SynthesisFailed(
                "A GPT-SoVITS server does not see the recording of this voice.",
                next_step="Let it read the shared folder: `shared_dir` here is `remote_dir` there.",
            )
        # Its own sentence is Chinese; the numbers in it are not.
        if "3~10" in reason:
            return ReferenceUnusable(
                "A GPT-SoVITS server refused the recording of this voice for its length.",
                next_step="Enrol 3 to 10 s of speech.",
            )
        if "not supported in version" in reason:
            return SynthesisFailed(
                "A GPT-SoVITS server does not speak this language.",
                next_step="It runs another version: set `version` to that of its weights.",
            )
        return SynthesisFailed(
            f"A GPT-SoVITS server refused the text with status {answer.status_code}.",
            next_step="The operator finds its reason in the log.",
        )


async def _pcm(parts: AsyncIterator[bytes]) -> AsyncGenerator[int | Samples, None]:
    """The rate of a WAV in Hz, then its samples. Raises ``SynthesisFailed`` if it is none."""
    head = b""
    pending: bytes | None = None
    async for part in parts:
        if pending is None:
            head += part
            data = head.find(b"data", 12)
            if data < 0 or len(head) < data + 8:
                if len(head) > _LONGEST_HEADER_BYTES:
                    break
                continue
            yield int.from_bytes(head[_WAV_RATE], "little")
            # Its size is 0 where it is streamed, and whatever follows is sound.
            pending, part = b"", head[data + 8 :]
        pending += part
        whole = len(pending) // 2 * 2
        if whole:
            yield np.frombuffer(pending[:whole], "<i2").astype(np.float32) / np.float32(32768)
            # A chunk may end in the middle of a sample.
            pending = pending[whole:]
    if pending is None and head:
        raise SynthesisFailed(
            "A GPT-SoVITS server answered with something that is no WAV.",
            next_step="Check that GPT_SOVITS_API_URL points to api_v2.py.",
        )


def _silence() -> SynthesisFailed:
    return SynthesisFailed(
        "A GPT-SoVITS server failed on this text: it answered with silence.",
        next_step="Try again, or another text; its own log has the reason.",
    )


def _message(answer: httpx.Response) -> str:
    """What an error body says: its ``message`` and ``Exception``."""
    try:
        body = answer.json()
    except ValueError:
        return answer.text[:300]
    if not isinstance(body, dict):
        return ""
    return " ".join(str(body[key]) for key in ("message", "Exception") if body.get(key))[:300]
