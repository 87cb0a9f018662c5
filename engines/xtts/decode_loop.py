"""The one thread that speaks: decodes a token for every live utterance, then vocodes what is due, and again.

Utterances of any calls join and leave between two turns. A turn is

1. drop what nobody waits for;
2. take one waiting utterance into a free slot and read its prompt;
3. one decode step for all slots;
4. vocode windows, the ones first that a listener needs first.

One prompt a turn keeps newcomers from stopping everybody else. On a CPU windows are vocoded one at a time
(side by side they fall out of its cache, and are slower) and few a turn; on CUDA all that are due, those of
equal size together.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from math import ceil

import numpy as np
import torch
from torch import Tensor

from engines.contract import EngineError, ModelError, OutOfMemory, SynthesisFailed
from engines.xtts.decoder import Decoder
from engines.xtts.ending import Ending
from engines.xtts.sampling import Sampler
from engines.xtts.speech import Order, Speech
from engines.xtts.vocoder import Vocoder, Window

logger = logging.getLogger(__name__)


class DecodeLoop:
    """Speaks orders. ``submit`` from any thread; results go to each order's outbox."""

    def __init__(
        self,
        decoder: Decoder,
        vocoder: Vocoder,
        slots: int,
        window_tokens: Sequence[int],
        device: torch.device,
        sample_rate_hz: int,
        threads: int | None = None,
    ) -> None:
        self._decoder, self._vocoder, self._device = decoder, vocoder, device
        self._sampler = Sampler(slots, decoder.vocabulary, decoder.start_token, device)
        self._window_tokens, self._sample_rate_hz = tuple(window_tokens), sample_rate_hz
        self._threads = threads
        self._news = threading.Condition()
        self._waiting: deque[Order] = deque()
        self._closing = False
        self._free = list(reversed(range(slots)))
        #: By slot, and all that are not closed, in order of arrival.
        self._live: dict[int, Speech] = {}
        self._open: list[Speech] = []
        #: Turns done; whoever waits sees by it that the loop works.
        self.turns = 0
        #: Utterances that did not end by themselves.
        self.runaways = 0
        self._thread = threading.Thread(target=self._run, name="xtts-decode", daemon=True)
        self._thread.start()

    @property
    def live_slots(self) -> int:
        """Slots in use."""
        return len(self._live)

    def submit(self, orders: Sequence[Order]) -> None:
        """Speak ``orders``, in order of arrival. Raises ``ModelError`` after ``close``."""
        with self._news:
            if self._closing:
                raise ModelError("The xtts engine is not loaded.", next_step="Call load() first.")
            self._waiting.extend(orders)
            self._news.notify()

    def close(self) -> None:
        """Stop after the turn; what is open fails. Returns when the thread has ended."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join()

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while True:
                with self._news:
                    while not (self._closing or self._waiting or self._open):
                        self._news.wait()
                    if self._closing:
                        break
                self._turn()
        stopped = ModelError("The xtts engine was unloaded.", next_step="Try again.")
        for speech in self._open:
            speech.fail(stopped)
        for order in self._waiting:
            self._speech(order).fail(stopped)

    def _turn(self) -> None:
        try:
            self._drop_abandoned()
            self._admit()
            if self._live:
                self._step()
            self._vocode()
        # The thread serves everybody: whatever fails, it goes on, and those it failed are told.
        except Exception as error:
            logger.exception("A turn of the decode loop failed.")
            for speech in self._open:
                if not speech.closed:
                    speech.fail(_told(error))
        for slot, speech in list(self._live.items()):
            if speech.decoded or speech.closed:
                del self._live[slot]
                self._free.append(slot)
        self._open = [speech for speech in self._open if not speech.closed]
        self.turns += 1

    def _drop_abandoned(self) -> None:
        for speech in self._open:
            if speech.order.unwanted:
                speech.leave()
        self._open = [speech for speech in self._open if not speech.closed]
        for slot, speech in list(self._live.items()):
            if speech.closed:
                del self._live[slot]
                self._free.append(slot)

    def _admit(self) -> None:
        """Take the next utterance that somebody waits for, if there is a slot, up to its first token."""
        while self._free:
            with self._news:
                if not self._waiting:
                    return
                speech = self._speech(self._waiting.popleft())
            if speech.order.unwanted:
                speech.leave()
                continue
            slot = self._free.pop()
            self._live[slot] = speech
            self._open.append(speech)
            order = speech.order
            try:
                self._sampler.begin(slot, order.sampling, order.seed)
                logits, latent = self._decoder.begin(slot, order.text_tokens, order.latents)
                self._take([slot], logits[None], latent[None])
            except Exception as error:  # noqa: BLE001 - it is this utterance that failed, the others go on
                speech.fail(_told(error))
            return

    def _step(self) -> None:
        slots = sorted(slot for slot, speech in self._live.items() if not (speech.decoded or speech.closed))
        if not slots:
            return
        speeches = [self._live[slot] for slot in slots]
        logits, latents = self._decoder.step(
            slots, [speech.tokens[-1] for speech in speeches], [len(speech.tokens) for speech in speeches]
        )
        self._take(slots, logits, latents)

    def _take(self, slots: Sequence[int], logits: Tensor, latents: Tensor) -> None:
        """Draw the next token of each slot."""
        tokens = self._sampler.draw(slots, logits)
        for slot, token, latent in zip(slots, tokens, latents, strict=True):
            speech = self._live[slot]
            if token is None:
                speech.fail(
                    SynthesisFailed("The model gave values that are not numbers.", next_step="Try again.")
                )
            else:
                speech.add(token, latent, self._decoder.stop_token)

    def _vocode(self) -> None:
        due = sorted(
            (speech for speech in self._open if speech.due and not speech.closed),
            key=lambda speech: speech.urgency_s,
        )
        if self._device.type == "cpu":
            # As many as keep pace with decoding.
            due = due[: max(1, ceil(len(self._live) / max(self._window_tokens)))]
        by_size: dict[int, list[tuple[Speech, Window, bool]]] = defaultdict(list)
        for number, speech in enumerate(due):
            window, last = speech.take_window()
            if window is None:
                if last:
                    self._deliver(speech, np.zeros(0, np.float32), last)
                continue
            size = -number if self._device.type == "cpu" else window.features.shape[1]
            by_size[size].append((speech, window, last))
        for group in by_size.values():
            self._vocode_together(group)

    def _vocode_together(self, group: Sequence[tuple[Speech, Window, bool]]) -> None:
        try:
            waves = self._vocoder.samples(
                [window for _, window, _ in group], [speech.order.embedding for speech, _, _ in group]
            )
            pieces = [wave.cpu().numpy().copy() for wave in waves]
        except Exception as error:  # noqa: BLE001 - these utterances failed, the others go on
            for speech, _, _ in group:
                speech.fail(_told(error))
            return
        for (speech, _, last), samples in zip(group, pieces, strict=True):
            self._deliver(speech, samples, last)

    def _deliver(self, speech: Speech, samples: np.ndarray, last: bool) -> None:
        chunk = speech.chunk(samples, last, self._sample_rate_hz)
        if speech.closed and speech.ran_away:
            self.runaways += 1
            logger.warning(
                "An utterance of %d text tokens was ended after %d audio tokens: the model did not stop.",
                len(speech.order.text_tokens),
                len(speech.tokens),
            )
        if len(chunk.samples) or chunk.last:
            speech.order.outbox.put(chunk)

    def _speech(self, order: Order) -> Speech:
        stretch = self._vocoder.stretch(order.speed)
        return Speech(order, stretch, self._window_tokens, Ending(self._sample_rate_hz))


def _told(error: Exception) -> EngineError:
    """``error`` as the contract has it."""
    if isinstance(error, EngineError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory("Not enough memory for this utterance.", next_step="Use fewer slots.")
    return SynthesisFailed(f"Synthesis failed: {error}", next_step="Try again; report it if it stays.")


def is_out_of_memory(error: Exception) -> bool:
    """True if ``error`` is how Python, CUDA or torch on a CPU says that memory is used up."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
