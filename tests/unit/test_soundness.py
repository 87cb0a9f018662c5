"""What an engine yields is checked before anybody hears it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.contract import SynthesisFailed
from serve_app.soundness import MAX_PAUSE_S, SoundCheck

RATE_HZ = 1000
SOUND = np.full(100, 0.1, np.float32)
PAUSE = np.zeros(400, np.float32)


@given(st.lists(st.sampled_from([0.1, 0.0, -0.2]), min_size=1, max_size=40))
def test_everything_comes_out_in_order(levels: list[float]) -> None:
    check = SoundCheck(RATE_HZ)
    chunks = [np.full(50, level, np.float32) for level in levels]
    if not any(levels):
        chunks.append(SOUND)
    heard = [check.passed(chunk) for chunk in chunks]
    np.testing.assert_array_equal(np.concatenate([*heard, check.finish()]), np.concatenate(chunks))


def test_silence_waits_for_the_sound_behind_it() -> None:
    check = SoundCheck(RATE_HZ)
    assert not len(check.passed(PAUSE))
    assert len(check.passed(SOUND)) == len(PAUSE) + len(SOUND)
    assert not len(check.passed(PAUSE))
    assert len(check.finish()) == len(PAUSE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_a_failure(value: float) -> None:
    check = SoundCheck(RATE_HZ)
    check.passed(SOUND)
    with pytest.raises(SynthesisFailed, match="not numbers"):
        check.passed(np.asarray([0.1, value], np.float32))


def test_endless_silence_is_a_failure() -> None:
    check = SoundCheck(RATE_HZ)
    check.passed(SOUND)
    for _ in range(int(MAX_PAUSE_S * RATE_HZ / len(PAUSE))):
        assert not len(check.passed(PAUSE))
    with pytest.raises(SynthesisFailed, match="silent"):
        check.passed(PAUSE)


@pytest.mark.parametrize("chunks", [[], [np.zeros(0, np.float32)], [PAUSE]])
def test_no_sound_at_all_is_a_failure(chunks: list[np.ndarray]) -> None:
    check = SoundCheck(RATE_HZ)
    for chunk in chunks:
        check.passed(chunk)
    with pytest.raises(SynthesisFailed, match="no sound"):
        check.finish()
