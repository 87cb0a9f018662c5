"""The one thread that speaks: a token for every live utterance, then the windows that are due, and again.

Utterances of any calls join and leave between two turns. A turn is

1. drop what nobody waits for;
2. take one waiting utterance into a free slot and read its prompt;
3. one decode step for all slots;
4. speak windows, those first that a listener needs first.

One prompt a turn keeps newcomers from stopping everybody else. Nothing but this thread touches the GPT, and
SoVITS but for the features of new voices, which leave no trace in it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from math import ceil

import torch

from engines.contract import Chunk, EngineError, ModelError, OutOfMemory, SynthesisFailed
from engines.gpt_sovits.decoder import Decoder
from engines.gpt_sovits.sampling import Sampler
from engines.gpt_sovits.speech import Gone, Order, Speech
from engines.gpt_sovits.vocoder import Vocoder, noise_seed

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
        self._sampler = Sampler(slots, decoder.vocabulary, decoder.end_token, device)
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
        self._thread = threading.Thread(target=self._run, name="gpt-sovits-decode", daemon=True)
        self._thread.start()

    def submit(self, orders: Sequence[Order]) -> None:
        """Speak ``orders``, in order of arrival. Raises ``ModelError`` after ``close``."""
        with self._news:
            if self._closing:
                raise ModelError("The gpt_sovits engine is not loaded.", next_step="Call load() first.")
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
        stopped = ModelError("The gpt_sovits engine was unloaded.", next_step="Try again.")
        for order in [*(speech.order for speech in self._open), *self._waiting]:
            order.outbox.put(Chunk.failure(order.row, stopped))

    def _turn(self) -> None:
        try:
            self._drop_abandoned()
            self._admit()
            if self._live:
                self._step()
            self._speak()
        # The thread serves everybody: whatever fails, it goes on, and those it failed are told.
        except Exception as error:
            logger.exception("A turn of the decode loop failed.")
            for speech in self._open:
                if not speech.closed:
                    speech.fail(as_engine_error(error))
        for slot, speech in list(self._live.items()):
            if speech.decoded or speech.closed:
                self._release(slot)
        self._open = [speech for speech in self._open if not speech.closed]
        self.turns += 1

    def _release(self, slot: int) -> None:
        del self._live[slot]
        self._free.append(slot)

    def _drop_abandoned(self) -> None:
        for speech in self._open:
            if speech.order.unwanted:
                speech.leave()
        for slot, speech in list(self._live.items()):
            if speech.closed:
                self._release(slot)
        self._open = [speech for speech in self._open if not speech.closed]

    def _admit(self) -> None:
        """Take the next utterance that somebody waits for, if there is a slot, up to its first token."""
        while self._free:
            with self._news:
                if not self._waiting:
                    return
                order = self._waiting.popleft()
            if order.unwanted:
                order.outbox.put(Gone(order.row))
                continue
            try:
                self._begin(order)
            except Exception as error:  # noqa: BLE001 - it is this utterance that failed, the others go on
                order.outbox.put(Chunk.failure(order.row, as_engine_error(error)))
            return

    def _begin(self, order: Order) -> None:
        # Two generators: when a window is spoken, and how many tokens are there by then, depends on the load.
        tokens, noise = (
            torch.Generator().manual_seed(seed) for seed in (order.seed % 2**63, noise_seed(order.seed))
        )
        voicing = self._vocoder.begin(order.spoken_phones, order.colour, order.speed, noise)
        speech = Speech(order, voicing, self._window_tokens)
        slot = self._free[-1]
        self._sampler.begin(slot, order.sampling, order.prompt, tokens)
        logits = self._decoder.begin(slot, order.phones, order.prompt)
        self._live[self._free.pop()] = speech
        self._open.append(speech)
        self._take([slot], logits[None])

    def _step(self) -> None:
        slots = sorted(slot for slot, speech in self._live.items() if not (speech.decoded or speech.closed))
        if not slots:
            return
        speeches = [self._live[slot] for slot in slots]
        logits = self._decoder.step(
            slots,
            [speech.tokens[-1] for speech in speeches],
            [len(speech.order.prompt) + len(speech.tokens) - 1 for speech in speeches],
        )
        self._take(slots, logits)

    def _take(self, slots: Sequence[int], logits: torch.Tensor) -> None:
        """Draw the next token of each slot."""
        for slot, token in zip(slots, self._sampler.draw(slots, logits), strict=True):
            if token is None:
                self._live[slot].fail(
                    SynthesisFailed("The model gave values that are not numbers.", next_step="Try again.")
                )
            else:
                self._live[slot].add(token, self._decoder.end_token)

    def _speak(self) -> None:
        due = sorted(
            (speech for speech in self._open if speech.due and not speech.closed),
            key=lambda speech: speech.urgency_s,
        )
        if self._device.type == "cpu":
            # As many as keep pace with decoding.
            due = due[: max(1, ceil(len(self._live) / max(self._window_tokens)))]
        for speech in due:
            tokens, last = speech.take_window()
            try:
                samples = self._vocoder.window(speech.voicing, tokens, last=last).float().cpu().numpy()
            except Exception as error:  # noqa: BLE001 - this utterance failed, the others go on
                speech.fail(as_engine_error(error))
                continue
            chunk = speech.chunk(samples, last, self._sample_rate_hz)
            if speech.closed and speech.ran_away:
                self.runaways += 1
                logger.warning(
                    "An utterance of %d phones was ended after %d tokens: the model did not stop.",
                    len(speech.order.spoken_phones),
                    len(speech.tokens),
                )
            if len(chunk.samples) or chunk.last:
                speech.order.outbox.put(chunk)


def as_engine_error(error: Exception) -> EngineError:
    """``error`` as the contract has it."""
    if isinstance(error, EngineError):
        return error
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
        return OutOfMemory("Not enough memory for this utterance.", next_step="Use fewer slots.")
    return SynthesisFailed(f"Synthesis failed: {error}", next_step="Try again; report it if it stays.")
