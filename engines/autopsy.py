"""Why an engine ended, in one line, from its exit status and its last log lines. Pure."""

import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

# What vLLM and the logging libraries write before the message: "(EngineCore pid=7) ERROR 11-24 06:51:03 [core.py:9] "
_PREFIX: Final = re.compile(
    r"^(\([^)]*pid=\d+\)\s*)?((DEBUG|INFO|WARNING|ERROR|CRITICAL)[: ]+)?(\d\d-\d\d \d\d:\d\d:\d\d )?(\[[^\]]*:\d+\] )?"
)
_ERROR_LINE: Final = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit|Failure)\b.*")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why an engine is not there."""

    reason: str  # one line
    hopeless: bool = False  # starting it again in the same way cannot help
    port_taken: bool = False  # another port will do


_RULES: Final[Sequence[tuple[re.Pattern[str], Callable[[re.Match[str]], Verdict]]]] = (
    (
        re.compile(r"unrecognized arguments: (.+)"),
        lambda m: Verdict(f"vLLM does not know this flag: {m[1]} (see engine.args)", hopeless=True),
    ),
    (
        re.compile(r": error: (.+)"),
        lambda m: Verdict(f"vLLM does not accept engine.args: {m[1]}", hopeless=True),
    ),
    (
        re.compile(r"No module named '?vllm\b"),
        lambda _: Verdict(
            "the interpreter has no vLLM: run scripts/setup-engine, or set engine.python to one that has it",
            hopeless=True,
        ),
    ),
    (
        re.compile(r"[Aa]ddress already in use"),
        lambda _: Verdict("its port was taken by another process", port_taken=True),
    ),
    (
        re.compile(r".*(out of memory|OutOfMemory|MemoryError|[Cc]annot allocate memory|std::bad_alloc).*"),
        lambda m: Verdict(f"out of memory: {m[0].strip()}"),
    ),
)


def explain(status: int, log: Sequence[str]) -> Verdict:
    """`status` as a shell gives it (128 + n: ended by signal n), `log` the engine's last lines, oldest first."""
    lines = [_PREFIX.sub("", line, count=1).strip() for line in log]
    for pattern, verdict in _RULES:
        for line in reversed(lines):
            if match := pattern.search(line):
                return _short(verdict(match))
    if status == 128 + signal.SIGKILL:
        return Verdict("killed (SIGKILL), most likely because the machine is out of memory")
    how = f"ended by {_signal_name(status - 128)}" if status > 128 else f"exited with code {status}"
    error = next((line for line in reversed(lines) if _ERROR_LINE.match(line)), None)
    return _short(Verdict(how if error is None else f"{how}: {error}"))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _short(verdict: Verdict, limit: int = 300) -> Verdict:
    if len(verdict.reason) <= limit:
        return verdict
    return Verdict(verdict.reason[: limit - 1] + "…", verdict.hopeless, verdict.port_taken)
