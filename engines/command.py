"""From a spec and facts about the machine to the command that starts an engine. Pure: nothing here touches the machine."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from engines.spec import OWNED_ENV, ArgValue, EngineSpec, Scalar

# `vllm serve` itself asks for a distribution called "vllm" and fails on builds published under another name.
MODULE: Final = "vllm.entrypoints.openai.api_server"

LOOPBACK: Final = "127.0.0.1"

# The gateway's environment holds secrets (admin key, database) that an engine has no use for, and engines run other
# people's code, so only what describes the machine and its libraries is handed on.
_INHERITED: Final = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD",
    "CC", "CXX", "http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "ALL_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "DO_NOT_TRACK",
})  # fmt: skip
_INHERITED_PREFIXES: Final = (
    "LC_", "XDG_", "CUDA_", "NVIDIA_", "NCCL_", "NVSHMEM_", "UCX_", "GLOO_", "HIP_", "ROCR_", "HSA_",
    "HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_", "VLLM_", "TORCH", "PYTORCH_", "TRITON_", "FLASHINFER_",
    "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "NUMBA_", "RAY_", "OTEL_",
)  # fmt: skip

# argparse collects these over repeated flags; of all others the last flag would win, so values follow one flag.
_REPEATED_FLAGS: Final = frozenset({"middleware"})


@dataclass(frozen=True, slots=True)
class Machine:
    """What engines may use of this machine."""

    cores: tuple[int, ...]  # CPU cores this process may run on
    gpus: tuple[str, ...] = ()  # NVIDIA devices, as CUDA_VISIBLE_DEVICES names them; none: engines run on the CPU
    env: Mapping[str, str] = field(default_factory=dict)  # this process's own environment


@dataclass(frozen=True, slots=True)
class Placement:
    """The part of the machine that one replica has to itself."""

    cores: tuple[int, ...] = ()  # none: not pinned
    gpus: tuple[str, ...] = ()  # none: as the engine finds them


@dataclass(frozen=True, slots=True)
class Command:
    """How to start one engine process."""

    argv: tuple[str, ...]
    env: Mapping[str, str]  # the whole environment, not an addition; holds the API key, which `ps` must not show
    cores: tuple[int, ...]  # none: not pinned
    cwd: Path


def place(specs: Sequence[EngineSpec], machine: Machine) -> list[Placement]:
    """Share the machine among replicas, given one spec for each: GPUs by how many each one needs, in order and from
    the start again when there are too few; without GPUs the cores, each replica its own while there are enough.
    Who chose devices or cores in `env` keeps them."""
    if machine.gpus:
        claimed = {gpu for spec in specs for gpu in spec.env.get("CUDA_VISIBLE_DEVICES", "").split(",")}
        pool = [gpu for gpu in machine.gpus if gpu not in claimed] or list(machine.gpus)
        placements, taken = [], 0
        for spec in specs:
            if "CUDA_VISIBLE_DEVICES" in spec.env:
                placements.append(Placement())
                continue
            count = min(world_size(spec), len(pool))
            placements.append(Placement(gpus=tuple(pool[(taken + i) % len(pool)] for i in range(count))))
            taken += count
        return placements
    pinned = [spec for spec in specs if "VLLM_CPU_OMP_THREADS_BIND" not in spec.env]
    shares = iter(_shares(machine.cores, len(pinned)))
    return [Placement(cores=next(shares)) if "VLLM_CPU_OMP_THREADS_BIND" not in s.env else Placement() for s in specs]


def _shares(cores: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
    if count > len(cores):
        return [(cores[i % len(cores)],) for i in range(count)]
    return [cores[i * len(cores) // count : (i + 1) * len(cores) // count] for i in range(count)]


def world_size(spec: EngineSpec) -> int:
    """How many devices one replica of `spec` runs on."""
    size = 1
    for flag in ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size"):
        size *= _argument(spec, flag) or 1
    return size


def _argument(spec: EngineSpec, flag: str) -> int | None:
    """A flag's value, if it is a number above 0."""
    value = spec.args.get(flag, spec.args.get(flag.replace("-", "_")))
    return (int(value) or None) if isinstance(value, int | str) and str(value).isdecimal() else None


# vLLM's own defaults for its OpenAI server: for each device without GPUs, and the largest of those for GPUs, which depend
# on the GPU's memory.
CPU_MAX_NUM_SEQS: Final = 128
GPU_MAX_NUM_SEQS: Final = 1024


def max_num_seqs(spec: EngineSpec, machine: Machine) -> int:
    """How many requests all replicas of `spec` together work on at once, at most."""
    ranks = _argument(spec, "data-parallel-size") or 1
    each = _argument(spec, "max-num-seqs")
    if each is None:
        each = GPU_MAX_NUM_SEQS if machine.gpus else CPU_MAX_NUM_SEQS * world_size(spec) // ranks
    return spec.replicas * ranks * each


# Without it, usage does not tell which tokens of a prompt came from the prefix cache.
DEFAULT_ARGS: Final[Mapping[str, ArgValue]] = {"enable-prompt-tokens-details": True}


def build(
    spec: EngineSpec,
    *,
    name: str,
    port: int,
    api_key: str,
    python: str,
    local_model: Path | None,
    placement: Placement,
    machine: Machine,
    cwd: Path,
) -> Command:
    """The command for one start of one replica. `name` is what the engine shall call the model, `python` the
    interpreter that has vLLM, `local_model` the model's place on disk if it has one."""
    model = spec.model if local_model is None else str(local_model)
    defaults = {k: v for k, v in DEFAULT_ARGS.items() if not {k, k.replace("-", "_")} & spec.args.keys()}
    return Command(
        argv=(
            python, "-m", MODULE,
            f"--model={model}", f"--served-model-name={name}", f"--host={LOOPBACK}", f"--port={port}",
            *flags(defaults | dict(spec.args)),
        ),
        env=environment(spec, placement, machine, python=python, local=local_model is not None)
        | {"VLLM_API_KEY": api_key},
        cores=placement.cores,
        cwd=cwd,
    )  # fmt: skip


def flags(args: Mapping[str, ArgValue]) -> list[str]:
    """Command-line flags of vLLM for `engine.args`."""
    out: list[str] = []
    for key, value in args.items():
        flag = "--" + (key if "." in key else key.replace("_", "-"))
        match value:
            case None:
                pass
            case True:
                out.append(flag)
            case False:
                out.append("--no-" + flag.removeprefix("--"))
            case dict():
                out.append(f"{flag}={json.dumps(value)}")
            case list() if flag.removeprefix("--") in _REPEATED_FLAGS:
                out.extend(f"{flag}={_text(item)}" for item in value)
            case list():
                out.extend([flag, *map(_text, value)])
            case _:
                # One argument, so that a value may begin with a dash.
                out.append(f"{flag}={_text(value)}")
    return out


def _text(value: Scalar) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def environment(
    spec: EngineSpec, placement: Placement, machine: Machine, *, python: str, local: bool
) -> dict[str, str]:
    """The engine's environment: Penstock's defaults, over them the machine's, over them the spec's."""
    env = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    if local:
        env["HF_HUB_OFFLINE"] = "1"
    if not machine.gpus:
        # vLLM would reserve nearly all memory for the cache, which only suits a machine with nothing else on it.
        env["VLLM_CPU_KVCACHE_SPACE"] = "2"
        if world_size(spec) == 1:
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process fewer: half the start time
    if placement.cores:
        # One core stays for the engine's HTTP server and the gateway: compute threads wait for each other by spinning,
        # so one that has to share its core slows all of them down, up to tenfold.
        env["OMP_NUM_THREADS"] = str(max(1, len(placement.cores) - 1))
    env |= {
        name: value
        for name, value in machine.env.items()
        if (name in _INHERITED or name.startswith(_INHERITED_PREFIXES)) and name not in OWNED_ENV
    }
    if "/" in python:
        # Kernels are compiled at run time with tools (ninja) that are installed beside the interpreter.
        env["PATH"] = ":".join(filter(None, (str(Path(python).parent), env.get("PATH"))))
    if placement.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(placement.gpus)
    return env | spec.env


def local_model(model: str, base: Path) -> Path:
    """Where `model` would lie on disk."""
    return base / Path(model).expanduser()


def names_a_path(model: str) -> bool:
    """Whether `model` can only be meant as a path: hub names are `name` or `owner/name`."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1


def interpreters(python: str | None, *, base: Path, own: str) -> list[str]:
    """Interpreters that may have vLLM, the best first. With `python` given, only that one; a relative path with a
    slash counts from `base`, a bare name is looked up in PATH."""
    if python is not None:
        return [str(base / Path(python).expanduser()) if "/" in python else python]
    return [str(base / ".venv-engine" / "bin" / "python"), own]
