"""From what an operator writes to the command line of an engine: by table."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engines.command import (
    Machine,
    Placement,
    build,
    environment,
    flags,
    interpreters,
    local_model,
    max_num_seqs,
    names_a_path,
    place,
    world_size,
)
from engines.spec import ArgValue, EngineSpec

CPU = Machine(cores=(0, 1))
GPU = Machine(cores=(0, 1), gpus=("0",))


def spec(**fields: Any) -> EngineSpec:
    return EngineSpec(model="org/m", **fields)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, []),
        ({"dtype": "float32"}, ["--dtype=float32"]),
        ({"max_model_len": 2048}, ["--max-model-len=2048"]),
        ({"gpu-memory-utilization": 0.5}, ["--gpu-memory-utilization=0.5"]),
        ({"enforce-eager": True, "enable-prefix-caching": False}, ["--enforce-eager", "--no-enable-prefix-caching"]),
        ({"seed": None}, []),
        ({"seed": -1}, ["--seed=-1"]),
        ({"lora-modules": ["a=/a", "b=/b"]}, ["--lora-modules", "a=/a", "b=/b"]),
        ({"middleware": ["a.b", "c.d"]}, ["--middleware=a.b", "--middleware=c.d"]),
        ({"hf-overrides": {"x": [1, True]}}, ['--hf-overrides={"x": [1, true]}']),
        ({"hf-overrides.rope_scaling": "x"}, ["--hf-overrides.rope_scaling=x"]),
        ({"some-list": [True, 1, 0.5]}, ["--some-list", "true", "1", "0.5"]),
    ],
)
def test_flags(args: dict[str, ArgValue], expected: list[str]) -> None:
    assert flags(spec(args=args).args) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"args": {"port": 9}}, "'port' is set by Penstock: each start takes a free port"),
        ({"args": {"served_model_name": "x"}}, "'served_model_name' is set by Penstock"),
        ({"args": {"api-key": "x"}}, "'api-key' is set by Penstock: each start makes a random key"),
        ({"args": {"ssl-keyfile": "x"}}, "'ssl-keyfile' is set by Penstock"),
        ({"args": {"no-enable-ssl-refresh": True}}, "is set by Penstock"),
        ({"args": {"--dtype": "x"}}, "write flags without leading dashes: 'dtype' instead of '--dtype'"),
        ({"args": {"d type": "x"}}, "'d type' is not the name of a flag"),
        ({"args": {"max-num-seqs": 1, "max_num_seqs": 2}}, "are the same flag"),
        ({"env": {"VLLM_API_KEY": "x"}}, "VLLM_API_KEY is set by Penstock: each start makes a random key"),
        ({"env": {"VLLM_SERVER_DEV_MODE": "1"}}, "VLLM_SERVER_DEV_MODE is set by Penstock"),
        ({"env": {"A=B": "1"}}, "'A=B' is not the name of an environment variable"),
        ({"env": {"A": "1\0"}}, "the value of A holds a NUL character"),
        ({"env": {"A": 1}}, "Input should be a valid string"),
        ({"replicas": 0}, "greater than or equal to 1"),
        ({"replicas": 65}, "less than or equal to 64"),
        ({"replicas": "2"}, "Input should be a valid integer"),
        ({"start_timeout": 0}, "greater than 0"),
        ({"python": ""}, "at least 1 character"),
        ({"replica": 2}, "Extra inputs are not permitted"),
    ],
)
def test_what_a_spec_may_not_say(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(**fields)
    assert message in str(caught.value)


def test_every_field_of_a_spec_is_described() -> None:
    assert [name for name, field in EngineSpec.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("cores", "replicas", "expected"),
    [
        ((0, 1), 1, [(0, 1)]),
        ((0, 1), 2, [(0,), (1,)]),
        ((0, 1), 3, [(0,), (1,), (0,)]),
        ((2, 3, 5, 7, 11), 2, [(2, 3), (5, 7, 11)]),
        ((4,), 2, [(4,), (4,)]),
    ],
)
def test_cores_are_shared(cores: tuple[int, ...], replicas: int, expected: list[tuple[int, ...]]) -> None:
    assert [p.cores for p in place([spec()] * replicas, Machine(cores))] == expected


def test_who_binds_threads_itself_is_not_pinned_and_takes_no_share() -> None:
    own = spec(env={"VLLM_CPU_OMP_THREADS_BIND": "0-1"})
    assert place([own, spec(), spec()], CPU) == [Placement(), Placement(cores=(0,)), Placement(cores=(1,))]


def tensor_parallel(size: int | str) -> EngineSpec:
    return spec(args={"tensor_parallel_size": size})


@pytest.mark.parametrize(
    ("gpus", "specs", "expected"),
    [
        ("0", [spec()], [("0",)]),
        ("0 1 2 3", [tensor_parallel(2), tensor_parallel("2")], [("0", "1"), ("2", "3")]),
        ("0 1 2", [tensor_parallel(2), spec()], [("0", "1"), ("2",)]),
        ("0 1", [spec(), spec(), spec()], [("0",), ("1",), ("0",)]),
        ("0 1", [tensor_parallel(4)], [("0", "1")]),
        ("0 1", [spec(env={"CUDA_VISIBLE_DEVICES": "0"}), spec()], [(), ("1",)]),
        ("0", [spec(env={"CUDA_VISIBLE_DEVICES": "0"}), spec()], [(), ("0",)]),
        ("MIG-a MIG-b", [spec(), spec()], [("MIG-a",), ("MIG-b",)]),
    ],
)
def test_gpus_are_shared(gpus: str, specs: list[EngineSpec], expected: list[tuple[str, ...]]) -> None:
    placements = place(specs, Machine((0, 1), gpus=tuple(gpus.split())))
    assert [p.gpus for p in placements] == expected
    assert {p.cores for p in placements} == {()}


@pytest.mark.parametrize(
    ("machine", "replicas", "args", "expected"),
    [
        (CPU, 1, {}, 128),
        (CPU, 3, {"max-num-seqs": 8}, 24),
        (CPU, 1, {"max_num_seqs": "8"}, 8),
        (CPU, 1, {"tensor-parallel-size": 2}, 256),
        (CPU, 1, {"tensor-parallel-size": 2, "data-parallel-size": 2}, 512),
        (CPU, 1, {"max-num-seqs": 8, "tensor-parallel-size": 2, "data_parallel_size": 2}, 16),
        (GPU, 1, {}, 1024),
        (GPU, 2, {"tensor-parallel-size": 4}, 2048),
        (GPU, 1, {"max-num-seqs": 256}, 256),
        (GPU, 1, {"max-num-seqs": None}, 1024),
    ],
)
def test_max_num_seqs(machine: Machine, replicas: int, args: dict[str, ArgValue], expected: int) -> None:
    assert max_num_seqs(spec(replicas=replicas, args=args), machine) == expected


def test_world_size() -> None:
    args: dict[str, ArgValue] = {"tensor-parallel-size": 2, "pipeline-parallel-size": "3", "data-parallel-size": None}
    assert world_size(spec(args=args)) == 6
    assert world_size(spec(args={"tensor-parallel-size": "auto"})) == 1


def env_of(
    engine: EngineSpec, machine: Machine = CPU, *, placement: Placement | None = None, local: bool = False
) -> dict[str, str]:
    return environment(engine, placement or Placement(), machine, python="/e/bin/python", local=local)


def test_an_engine_inherits_the_machine_but_no_secrets() -> None:
    inherited = {
        "PATH": "/bin",
        "HF_TOKEN": "hf",
        "LC_ALL": "C",
        "PENSTOCK_ADMIN_KEY": "secret",
        "DATABASE_URL": "secret",
        "PYTHONPATH": "/x",
        "VLLM_API_KEY": "secret",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_LOGGING_LEVEL": "DEBUG",
    }
    env = env_of(spec(), Machine((0,), env=inherited))
    assert env == {
        "PATH": "/e/bin:/bin",
        "HF_TOKEN": "hf",
        "LC_ALL": "C",
        "VLLM_LOGGING_LEVEL": "DEBUG",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


@pytest.mark.parametrize(
    ("engine", "machine", "placement", "local", "expected"),
    [
        (spec(), CPU, Placement(), False, {"HF_HUB_OFFLINE": None, "OMP_NUM_THREADS": None}),
        (spec(), CPU, Placement(), True, {"HF_HUB_OFFLINE": "1"}),
        (spec(env={"HF_HUB_OFFLINE": "0"}), CPU, Placement(), True, {"HF_HUB_OFFLINE": "0"}),
        (spec(), CPU, Placement(cores=(0,)), False, {"OMP_NUM_THREADS": "1"}),
        (spec(), CPU, Placement(cores=(0, 1, 2, 3)), False, {"OMP_NUM_THREADS": "3"}),
        (spec(env={"OMP_NUM_THREADS": "8"}), CPU, Placement(cores=(0,)), False, {"OMP_NUM_THREADS": "8"}),
        (tensor_parallel(2), CPU, Placement(), False, {"VLLM_ENABLE_V1_MULTIPROCESSING": None}),
        (
            spec(),
            Machine((0,), ("0", "1"), {"CUDA_VISIBLE_DEVICES": "0,1"}),
            Placement(gpus=("1",)),
            False,
            {
                "CUDA_VISIBLE_DEVICES": "1",
                "VLLM_CPU_KVCACHE_SPACE": None,
                "VLLM_ENABLE_V1_MULTIPROCESSING": None,
                "OMP_NUM_THREADS": None,
            },
        ),
        (
            spec(env={"CUDA_VISIBLE_DEVICES": "5"}),
            Machine((0,), ("0",), {"CUDA_VISIBLE_DEVICES": "0"}),
            Placement(),
            False,
            {"CUDA_VISIBLE_DEVICES": "5"},
        ),
    ],
)
def test_environment(
    engine: EngineSpec, machine: Machine, placement: Placement, local: bool, expected: dict[str, str | None]
) -> None:
    env = env_of(engine, machine, placement=placement, local=local)
    assert {name: env.get(name) for name in expected} == expected


def test_the_whole_command() -> None:
    command = build(
        spec(args={"dtype": "float32"}, env={"A": "1"}),
        name="org/m",
        port=4711,
        api_key="s3cret",
        python="/e/bin/python",
        local_model=Path("/models/m"),
        placement=Placement(cores=(1,)),
        machine=CPU,
        cwd=Path("/base"),
    )
    assert command.argv == (
        "/e/bin/python",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model=/models/m",
        "--served-model-name=org/m",
        "--host=127.0.0.1",
        "--port=4711",
        "--enable-prompt-tokens-details",
        "--dtype=float32",
    )
    assert (command.cores, command.cwd) == ((1,), Path("/base"))
    assert command.env["VLLM_API_KEY"] == "s3cret"
    assert command.env["A"] == "1"
    assert "s3cret" not in " ".join(command.argv)


def test_a_hub_name_stays_a_name() -> None:
    command = build(
        spec(),
        name="m",
        port=1,
        api_key="k",
        python="python3",
        local_model=None,
        placement=Placement(),
        machine=CPU,
        cwd=Path("/base"),
    )
    assert "--model=org/m" in command.argv
    assert "PATH" not in command.env


@pytest.mark.parametrize(
    ("model", "is_path"),
    [
        (".models/x", True),
        ("./x", True),
        ("/srv/x", True),
        ("~/x", True),
        ("a/b/c", True),
        ("org/name", False),
        ("gpt2", False),
    ],
)
def test_paths_and_hub_names(model: str, is_path: bool) -> None:
    assert names_a_path(model) is is_path


def test_where_a_model_would_lie() -> None:
    assert local_model("x/y", Path("/base")) == Path("/base/x/y")
    assert local_model("/srv/y", Path("/base")) == Path("/srv/y")


@pytest.mark.parametrize(
    ("python", "expected"),
    [
        (None, ["/base/.venv-engine/bin/python", "/own/python"]),
        ("/opt/python", ["/opt/python"]),
        ("env/bin/python", ["/base/env/bin/python"]),
        ("python3.12", ["python3.12"]),
    ],
)
def test_where_an_interpreter_with_vllm_may_be(python: str | None, expected: list[str]) -> None:
    assert interpreters(python, base=Path("/base"), own="/own/python") == expected
