"""The house's floors: a file of `maspo_ray` imports only files above it in the list; what must stay cheap to import does."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import maspo_ray

ROOT = Path(maspo_ray.__file__).parents[1]

# Ground floor first. A new file takes its place here, as high up as what it imports allows.
FLOORS = [
    "maspo_ray",
    "maspo_ray.errors",
    "maspo_ray.config_sections",
    "maspo_ray.config_data",
    "maspo_ray.config_objective",
    "maspo_ray.config",
    "maspo_ray.experience",
    "maspo_ray.weight_sync",
    "maspo_ray.weight_sync.buckets",
    "maspo_ray.weight_sync.gloo_engine",
    "maspo_ray.weight_sync.publisher",
    "maspo_ray.packing",
    "maspo_ray.step_record",
    "maspo_ray.protocols",
    "maspo_ray.loading",
    "maspo_ray.tensor_ops",
    "maspo_ray.advantages",
    "maspo_ray.overlong",
    "maspo_ray.objectives.base",
    "maspo_ray.objectives.maspo",
    "maspo_ray.objectives.peers",
    "maspo_ray.objectives.metrics",
    "maspo_ray.objectives.breakdown",
    "maspo_ray.objectives",
    "maspo_ray.run_paths",
    "maspo_ray.checkpoint",
    "maspo_ray.model_difference",
    "maspo_ray.seeds",
    "maspo_ray.garbage",
    "maspo_ray.staleness",
    "maspo_ray.update_watch",
    "maspo_ray.ledger",
    "maspo_ray.buffer",
    "maspo_ray.door",
    "maspo_ray.intake",
    "maspo_ray.samplers",
    "maspo_ray.data_sources",
    "maspo_ray.prompts",
    "maspo_ray.preflight",
    "maspo_ray.replay_plan",
    "maspo_ray.metrics",
    "maspo_ray.idle",
    "maspo_ray.timeline",
    "maspo_ray.summary",
    "maspo_ray.progress",
    "maspo_ray.curves",
    "maspo_ray.placement",
    "maspo_ray.reservation",
    "maspo_ray.reward_host",
    "maspo_ray.testing",
    "maspo_ray.cluster",
    "maspo_ray.fleet",
    "maspo_ray.rollout_pool",
    "maspo_ray.run_folder",
    "maspo_ray.step_recorder",
    "maspo_ray.run_record",
    "maspo_ray.checks",
    "maspo_ray.replay",
    "maspo_ray.producer",
    "maspo_ray.pipeline",
    "maspo_ray.controller",
    "maspo_ray.cli",
    "maspo_ray.__main__",
]

ENGINES = ["torch", "vllm", "deepspeed", "transformers"]


def _module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module_name(file): file for file in sorted((ROOT / "maspo_ray").rglob("*.py"))}


def _imports(module: str, tree: ast.Module) -> Iterator[str]:
    """Yields what a module imports anywhere in it, at its top, in functions and for type checkers alike."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: write the import in full"
            assert node.module is not None
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in submodules)


def _imports_of(module: str) -> set[str]:
    return set(_imports(module, ast.parse(FILES[module].read_text(encoding="utf-8"))))


def test_floors_list_every_file_once() -> None:
    assert sorted(FLOORS) == sorted(FILES)


@pytest.mark.parametrize("module", FLOORS)
def test_module_imports_only_what_is_above_it(module: str) -> None:
    above = set(FLOORS[: FLOORS.index(module)])
    own = {name for name in _imports_of(module) if name.split(".")[0] == "maspo_ray"}
    assert own <= above, f"{module} imports {sorted(own - above)}, which stand below it"


@pytest.mark.parametrize("module", FLOORS)
def test_framework_never_imports_the_actors(module: str) -> None:
    assert not {name for name in _imports_of(module) if name.split(".")[0] == "actors"}


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import actors.rewards
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from maspo_ray.config import RunConfig
def f():
    from maspo_ray import fleet, __doc__
"""
    found = set(_imports("maspo_ray.x", ast.parse(source)))
    assert found == {"actors.rewards", "typing", "maspo_ray.config", "maspo_ray.fleet", "maspo_ray"}


def _loaded_by(module: str, candidates: list[str]) -> list[str]:
    """Returns which of the candidates a fresh process holds once it has imported a module."""
    program = f"import sys, {module}; print(*[name for name in {candidates!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "module",
    ["maspo_ray.config", "maspo_ray.cli", "maspo_ray.preflight", "maspo_ray.placement", "maspo_ray.replay_plan"],
)
def test_config_and_what_answers_bad_input_load_neither_engines_nor_ray(module: str) -> None:
    assert _loaded_by(module, [*ENGINES, "ray", "actors"]) == []


def _cheap_actor_modules() -> list[str]:
    rewards = [file for file in sorted((ROOT / "actors" / "rewards").glob("*.py")) if file.stem != "__init__"]
    return [
        "actors.vllm_rollout",
        "actors.deepspeed_learner",
        "actors.hf_reference",
        *(_module_name(file) for file in rewards),
    ]


@pytest.mark.parametrize("module", _cheap_actor_modules())
def test_actor_module_loads_no_engine_until_setup(module: str) -> None:
    # The driver and `maspo check` import every actor's module to look at its class.
    assert _loaded_by(module, [*ENGINES, "math_verify", "reasoning_gym"]) == []
