"""How many requests of a model are at work at once, and how many wait, where the config leaves it open."""

import math

import pytest

from engines.command import Machine
from gateway.compose import bounds
from gateway.config.load import parse

CPU = Machine(cores=(0, 1))
ENGINE = "engine: {model: m, replicas: 2, args: {max-num-seqs: 16}}"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (ENGINE, (64, 64)),
        ("engine: {model: m}", (256, 256)),
        (f"{ENGINE}, max_open_requests: 5", (5, 5)),
        (f"{ENGINE}, max_queue: 7", (64, 7)),
        (f"{ENGINE}, max_open_requests: 5, max_queue: 0", (5, 0)),
        ("endpoints: [http://h]", (math.inf, 0)),
        ("endpoints: [http://h], max_open_requests: 5", (5, 5)),
        (f"{ENGINE}, endpoints: [http://h]", (math.inf, 0)),  # nobody knows what that one takes
    ],
)
def test_bounds(fields: str, expected: tuple[float, int]) -> None:
    config = parse(f"models: {{tiny: {{{fields}}}}}\nauth: none", "p.yaml", {})
    assert bounds(config.models["tiny"], CPU) == expected
