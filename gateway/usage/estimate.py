"""What a prompt will cost and how long an answer will be, guessed from what the engines counted before.

For one event loop; nothing here blocks. A wrong guess costs nobody anything for long: limits settle to the real count.
"""

from typing import Final

_FIRST_RATIO: Final = 0.3  # tokens per byte of a request: English text with its JSON around it
_FIRST_WEIGHT: Final = 1024.0  # bytes that the first ratio weighs, against those of real requests
_RATIO_DECAY: Final = 0.99  # per request

_FIRST_ANSWER: Final = 256  # tokens
_PERCENTILE: Final = 0.95
_REFRESH: Final = 16  # answers between two looks at the histogram
_ANSWER_DECAY: Final = 0.95  # per look, so that about 300 answers are remembered
_BUCKETS: Final = 33


class PromptEstimator:
    """Tokens per byte of one model, for prompts that cannot be counted."""

    __slots__ = ("_bytes", "_tokens")

    def __init__(self) -> None:
        self._bytes = _FIRST_WEIGHT
        self._tokens = _FIRST_WEIGHT * _FIRST_RATIO

    def estimate(self, size: int) -> int:
        """Tokens of a prompt of `size` bytes, at least 1."""
        return max(1, round(size * self._tokens / self._bytes))

    def observe(self, size: int, tokens: int) -> None:
        """An engine counted `tokens` in a prompt of `size` bytes. Without either there is nothing to learn."""
        if size > 0 and tokens > 0:
            self._bytes = self._bytes * _RATIO_DECAY + size
            self._tokens = self._tokens * _RATIO_DECAY + tokens


class AnswerLengths:
    """What one model's answers have been: a histogram with a bucket for every power of two, that forgets slowly."""

    __slots__ = ("_counts", "_expected", "_until_refresh")

    def __init__(self) -> None:
        self._counts = [0.0] * _BUCKETS  # [n]: answers whose length has n bits
        self._expected = _FIRST_ANSWER
        self._until_refresh = _REFRESH

    def expected(self) -> int:
        """The length in tokens that 95 % of the answers stay below."""
        return self._expected

    def observe(self, tokens: int) -> None:
        self._counts[min(tokens.bit_length(), _BUCKETS - 1)] += 1
        self._until_refresh -= 1
        if not self._until_refresh:
            self._until_refresh = _REFRESH
            self._expected = _percentile(self._counts)
            self._counts = [count * _ANSWER_DECAY for count in self._counts]


def _percentile(counts: list[float]) -> int:
    """The 95th percentile, taking lengths as evenly spread within a bucket. At least 1."""
    rest = _PERCENTILE * sum(counts)
    bits = 0
    while rest > counts[bits]:
        rest -= counts[bits]
        bits += 1
    low = 1 << bits >> 1
    return max(1, low + round((low - 1) * rest / counts[bits]))
