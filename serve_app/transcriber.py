"""TranscriberReplica: puts the recogniser into a Serve replica. It scales to zero: recordings are rare."""

# No postponed annotations: Serve inspects this class when it is deployed.
import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engines.contract import ModelError, Samples
from serve_app.errors import InternalError, TranscriberUnavailable, VoiceCloneError
from serve_app.protocol import Failure
from serve_app.transcripts.recogniser import Recogniser, RecogniserConfig
from serve_app.transcripts.transcript import Hearing

logger = logging.getLogger("ray.serve")


class TranscriberReplica:
    """One recogniser. A call never raises: it answers ``Failure``."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._recogniser = Recogniser(RecogniserConfig.model_validate(config))
        self._unusable: ModelError | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hear")
        # A deployment that scales to zero is tried out by its first caller, long after the start. One that
        # only died would keep that caller waiting for a replica that never comes up: so it lives, and says
        # what is wrong.
        try:
            self._recogniser.load()
        except ModelError as error:
            logger.critical("The transcriber cannot work: %s", error)
            self._unusable = error

    async def hear(self, samples: Samples, sample_rate_hz: int, language: str) -> Hearing | Failure:
        """What is said in a recording, mono float32 [n]; ``language`` as in ``Recogniser.hear``."""
        if self._unusable is not None:
            return Failure(
                TranscriberUnavailable(
                    "The transcriber has no model to hear with. Send the transcript of the recording, "
                    "or ask the operator to look into the log."
                )
            )
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._thread, self._recogniser.hear, samples, sample_rate_hz, language
            )
        except VoiceCloneError as error:
            return Failure(error)
        except Exception:
            logger.exception("The recogniser failed.")
            return Failure(
                InternalError("The transcriber failed on this recording. Send the transcript with it.")
            )
