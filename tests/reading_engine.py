"""An engine that needs to know what is said in a recording, and whose sound tells what it was told."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from engines.contract import Conditioning, Reference, ReferenceUnusable
from engines.tone.engine import ToneEngine


class ReadingEngine(ToneEngine):
    """The tone engine with a pitch that depends on the transcript and its timed words."""

    card = replace(ToneEngine.card, name="reading", needs_transcript=True, max_reference_s=10.0)

    def extract_voice(self, reference: Reference) -> Conditioning:
        """A pitch from the words."""
        if not reference.transcript or not reference.language:
            raise ReferenceUnusable("The server did not see to the transcript.")
        digest = hashlib.sha256(repr([reference.transcript, len(reference.words)]).encode()).digest()
        pitch_hz = np.asarray([110.0 + 2 * digest[0] + digest[1] / 256], np.float32)
        return Conditioning(self.card.name, self.weights_fingerprint, {"pitch_hz": pitch_hz})
