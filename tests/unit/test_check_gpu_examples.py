"""`maspo check` on the GPU examples: it accepts them and says where their actors go, on a machine without a GPU or a network."""

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from actors.vllm_rollout import engine_arguments
from maspo_ray.cli import main
from maspo_ray.config import ModelConfig, RolloutConfig, RunConfig, load_config
from maspo_ray.weight_sync import backend_for

GPU = Path(__file__).parents[2] / "examples" / "gpu"
NODES = {"7b_2x8.yaml": 2, "1.5b_1x8.yaml": 1}

# Refuses what a check must do without: the network, and packages that take seconds or may not be there.
GUARDED = """
import sys

def guard(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"asked for the network: {args}")
    if event == "import" and args[0].partition(".")[0] in {"datasets", "huggingface_hub", "torch", "ray", "vllm"}:
        raise SystemExit(f"imported {args[0]}")

sys.addaudithook(guard)
from maspo_ray.cli import main

sys.exit(main(["check", sys.argv[1]]))
"""


def _printed(name: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, object], list[list[str]]]:
    """Returns the resolved config and the rows of the plan, without the heading, that `maspo check` prints."""
    assert main(["check", str(GPU / name)]) == 0
    tree, heading, tables = capsys.readouterr().out.partition("node    role")
    # Behind it stands the estimate of memory.
    table, memory, _ = tables.partition("\nmemory")
    assert heading and memory
    return yaml.safe_load(tree), [line.split() for line in table.splitlines()[1:]]


def test_gpu_examples_are_the_ones_that_are_tested() -> None:
    assert {path.name for path in GPU.glob("*.yaml")} == NODES.keys()


@pytest.mark.parametrize(("name", "nodes"), NODES.items(), ids=NODES)
def test_check_gpu_example_plans_6_rollouts_and_2_learners_on_each_node(
    name: str, nodes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    _, rows = _printed(name, capsys)
    names = [f"node-{i}" for i in range(nodes)]
    actors = [row for row in rows if row[1] != "used/available"]
    # Each node: 6 rollouts and 2 learner ranks with a GPU each, 8 rewards with none.
    assert Counter((row[0], row[1], row[3]) for row in actors) == {
        (node, role, gpus): count
        for node in names
        for role, gpus, count in (("rollout", "1", 6), ("learner", "1", 2), ("reward", "0", 8))
    }
    ranks = [(row[0], int(row[2])) for row in actors if row[1] == "learner"]
    assert ranks == [(node, 2 * i + j) for i, node in enumerate(names) for j in range(2)]
    # 6 rollouts of 4 CPUs, 2 learners of 8, 8 rewards of 1: 24 + 16 + 8 = 48.
    used = [row for row in rows if row[1] == "used/available"]
    assert [(row[0], row[3], row[4].partition("/")[0]) for row in used] == [(node, "8/8", "48") for node in names]


@pytest.mark.parametrize("name", NODES)
def test_check_gpu_example_prints_the_resolved_config(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tree, _ = _printed(name, capsys)
    assert RunConfig.model_validate(tree) == load_config(GPU / name)
    # Of the paper, arXiv:2602.17550.
    assert tree["objective"]["alpha"] == {"7b_2x8.yaml": 0.3, "1.5b_1x8.yaml": 0.5}[name]  # type: ignore[index]


@pytest.mark.parametrize("name", NODES)
def test_check_gpu_example_needs_no_network_and_no_engine(name: str) -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", GUARDED, GPU / name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    # The promise is 5 s; the rest is for a machine that does other things beside.
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("name", NODES)
def test_gpu_example_runs_engines_and_weight_transfer_on_gpus(name: str) -> None:
    config = load_config(GPU / name)
    arguments = engine_arguments(config.model, config.rollout, config.max_model_tokens, seed=0)
    assert backend_for(config.rollout.gpus) == "nccl" and arguments["weight_transfer_config"] == {"backend": "nccl"}
    assert arguments["max_model_len"] <= 32768, "the models' own context"


@pytest.mark.parametrize(("gpus", "executor"), [(1, None), (2, "mp")])
def test_tensor_parallel_engine_does_not_ask_ray_for_gpus_of_its_own(gpus: int, executor: str | None) -> None:
    arguments = engine_arguments(ModelConfig(path="org/model"), RolloutConfig(gpus=gpus), 32, seed=0)
    assert arguments.get("distributed_executor_backend") == executor
