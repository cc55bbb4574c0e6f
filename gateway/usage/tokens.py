from pathlib import Path
from typing import Any

BIG = 16384


class CannotCount(Exception):
    pass


class TokenCounter:
    def count_chat(self, body: dict[str, Any]) -> int:
        return 1

    def count_prompt(self, p: object) -> int:
        return 1


def load_counter(p: Path) -> TokenCounter | None:
    return None
