import math

import pytest

from gateway.limits.base import Refused, Standing, Window
from gateway.limits.headers import limit_headers
from gateway.wire import errors


def test_a_limit_that_does_not_exist_has_no_headers() -> None:
    assert limit_headers(Standing(None, None)) == b""


def test_each_limit_tells_limit_remaining_and_reset() -> None:
    assert limit_headers(Standing(Window(600, 599, 60.0), Window(200_000, 0, 0.012))) == (
        b"x-ratelimit-limit-requests: 600\r\n"
        b"x-ratelimit-remaining-requests: 599\r\n"
        b"x-ratelimit-reset-requests: 1m0s\r\n"
        b"x-ratelimit-limit-tokens: 200000\r\n"
        b"x-ratelimit-remaining-tokens: 0\r\n"
        b"x-ratelimit-reset-tokens: 12ms\r\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, b"0s"),
        (0.0001, b"1ms"),
        (0.9991, b"1s"),
        (0.999, b"999ms"),
        (1.0, b"1s"),
        (1.5, b"1.5s"),
        (6.0, b"6s"),
        (10.0, b"10s"),
        (10.25, b"10.25s"),
        (59.9999, b"1m0s"),
        (60.0, b"1m0s"),
        (60.5, b"1m0.5s"),
        (100.05, b"1m40.05s"),
    ],
)
def test_resets_are_durations_rounded_up_to_a_millisecond(seconds: float, text: bytes) -> None:
    assert b"\r\nx-ratelimit-reset-tokens: %b\r\n" % text in limit_headers(Standing(None, Window(1, 1, seconds)))


def verdict(wait: float | None) -> dict[bytes, bytes]:
    return dict(errors.headers(errors.over_limit(Refused("requests", wait, Standing(None, None), 5))))


@pytest.mark.parametrize("wait", [0.0001, 0.25, 1.0, 1.0001, 59.5, 60.4999])
def test_whoever_waits_as_long_as_the_header_says_has_waited_long_enough(wait: float) -> None:
    sent = {name: int(value) for name, value in verdict(wait).items()}
    assert sent == {b"retry-after": math.ceil(wait), b"retry-after-ms": math.ceil(wait * 1000)}
    assert sent[b"retry-after"] >= sent[b"retry-after-ms"] / 1000 >= wait


def test_what_can_never_pass_is_not_to_be_tried_again() -> None:
    assert verdict(None) == {b"x-should-retry": b"false"}
