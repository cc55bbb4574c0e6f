"""Whoever sleeps to the next beat wakes together with all others, wherever in the interval it began."""

import pytest
from hypothesis import given, strategies as st

from gateway import beat

INTERVALS = st.sampled_from([0.001, 0.25, 1.0, 2.0, 8.0])


@given(now=st.floats(0, 1e8), interval=INTERVALS)
def test_a_beat_is_a_multiple_that_is_not_near(now: float, interval: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beat, "monotonic", lambda: now)
        pause = beat.until_beat(interval)
    close = 1e-6
    assert interval / 2 - close <= pause <= interval * 1.5 + close
    beats = (now + pause) / interval
    assert abs(beats - round(beats)) * interval < close
