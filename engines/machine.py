"""What this machine has: cores, GPUs, an interpreter with vLLM. The answers of `engines.command`'s questions."""

import os
import re
import subprocess
import sys
from pathlib import Path

from engines.command import Machine, interpreters

# -I: the gateway's PYTHONPATH and the working directory must not decide what another interpreter finds.
# find_spec does not import vllm, which would take ten seconds.
_HAS_VLLM = ("-I", "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)")


def this_machine() -> Machine:
    """Cores and GPUs that this process may use, and its environment, at this moment."""
    env = dict(os.environ)
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = sorted((n for n in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", n)), key=lambda n: int(n[6:]))
        devices = [str(i) for i in range(len(gpus))]  # CUDA counts devices from 0, whatever their minor numbers
    else:
        devices = [d.strip() for d in visible.split(",") if d.strip() not in {"", "-1"}]
    return Machine(cores=tuple(sorted(os.sched_getaffinity(0))), gpus=tuple(devices), env=env)


def find_python(python: str | None, base: Path) -> str | None:
    """The interpreter that has vLLM, or None. Starts processes and waits for them: call it in a thread."""
    return next((p for p in interpreters(python, base=base, own=sys.executable) if _has_vllm(p)), None)


def _has_vllm(python: str) -> bool:
    try:
        return subprocess.run([python, *_HAS_VLLM], check=False, capture_output=True, timeout=30).returncode == 0  # noqa: S603  argv comes from the operator's own config
    except (OSError, subprocess.TimeoutExpired):
        return False


def available_memory() -> int:
    """Bytes of main memory that could be taken without swapping, as the kernel estimates it."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return sys.maxsize


def resident_memory(pid: int) -> int:
    """Bytes of main memory that a process and its descendants take. What they share counts for each of them."""
    parents, sizes = {}, {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                # "pid (name) state ppid …", where the name may hold anything; rss is the 24th field, in pages
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        parents[int(name)], sizes[int(name)] = int(fields[1]), int(fields[21])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(sizes.get(one, 0) for one in family) * os.sysconf("SC_PAGE_SIZE")
