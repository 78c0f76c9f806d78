"""The house's shelves: a package of `maspo_ray` imports only packages above it in the list; what must stay cheap to import does."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import maspo_ray

ROOT = Path(maspo_ray.__file__).parents[1]

# Ground floor first: a package, or a file of the ground's own, imports only what stands above it in the list; a file of a package, of its
# own package, only what stands above it there. A new file takes its place here, as high up as what it imports allows.
FLOORS: dict[str, list[str]] = {
    "maspo_ray": [],
    "maspo_ray.errors": [],
    "maspo_ray.threads": [],
    "maspo_ray.stop_signals": [],
    "maspo_ray.terminal": [],
    "maspo_ray.actor_failures": [],
    "maspo_ray.config": [
        "section",
        "sampling",
        "sections",
        "learner",
        "placement",
        "output",
        "data",
        "objective",
        "faults",
        "yaml_file",
        "run",
        "without_effect",
        "page",
        "",
    ],
    "maspo_ray.experience": [],
    "maspo_ray.sampling": [],
    "maspo_ray.packing": [],
    "maspo_ray.weight_sync": ["", "buckets", "checksum", "gloo_engine", "gloo_trainer", "publisher"],
    "maspo_ray.protocols": [],
    "maspo_ray.testing": [],
    "maspo_ray.advantages": [],
    "maspo_ray.objectives": ["tensor_ops", "base", "maspo", "peers", "metrics", "breakdown", ""],
    "maspo_ray.data": [
        "",
        "bad_rows",
        "tables",
        "files",
        "sources",
        "run_rows",
        "tokenizers",
        "vocabulary",
        "prompts",
        "samplers",
        "stream",
    ],
    "maspo_ray.model_shape": [],
    "maspo_ray.model_limits": [],
    "maspo_ray.zero_stage": [],
    "maspo_ray.actor_memory": [],
    "maspo_ray.dtype_speed": [],
    "maspo_ray.groups": ["", "staleness", "ledger", "buffer", "late_policy", "intake", "overlong"],
    "maspo_ray.run_dir": [
        "",
        "hold",
        "paths",
        "checkpoint",
        "step_record",
        "metrics",
        "sinks",
        "timeline",
        "waits",
        "summary",
        "progress",
        "curves",
        "folder",
        "history",
        "journal",
    ],
    "maspo_ray.preflight": [],
    "maspo_ray.hosts": [
        "",
        "idle",
        "messages",
        "places",
        "engine_table",
        "scorer",
        "rollout_host",
        "reward_host",
    ],
    "maspo_ray.fleet": [
        "",
        "process_guard",
        "ray_node",
        "own_ray",
        "ray_session",
        "blueprint",
        "loading",
        "placement",
        "memory",
        "reservation",
        "environment",
        "transfer_sets",
        "actor_logs",
        "calls",
        "handles",
        "reward_calls",
        "learner_group",
        "fleet",
    ],
    "maspo_ray.rollouts": ["", "seeds", "error_watch", "pool", "references", "publishing"],
    "maspo_ray.evaluation": ["", "evaluator", "parity", "schedule"],
    "maspo_ray.replay": ["", "model_difference", "plan", "replay"],
    "maspo_ray.pipeline": ["", "garbage", "update_watch", "wait_watch", "record_queue", "producer", "loop"],
    "maspo_ray.controller": [],
    "maspo_ray.cli": [],
    "maspo_ray.__main__": [],
}


def _files(floor: str) -> list[str]:
    """Returns the modules of a floor in their order; of a package, "" is its own `__init__`."""
    return [f"{floor}.{name}" if name else floor for name in FLOORS[floor] or [""]]


MODULES = [module for floor in FLOORS for module in _files(floor)]

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
    assert sorted(MODULES) == sorted(FILES)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_is_above_it(module: str) -> None:
    floor = next(floor for floor in FLOORS if module in _files(floor))
    own_package = _files(floor)
    names = list(FLOORS)
    below = {module for floor in names[: names.index(floor)] for module in _files(floor)}
    allowed = below | set(own_package[: own_package.index(module)])
    own = {name for name in _imports_of(module) if name.split(".")[0] == "maspo_ray"}
    assert own <= allowed, f"{module} imports {sorted(own - allowed)}, which stand below it in the list"


@pytest.mark.parametrize("module", MODULES)
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
    ["maspo_ray.config", "maspo_ray.cli", "maspo_ray.preflight", "maspo_ray.fleet.placement", "maspo_ray.replay.plan"],
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


@pytest.mark.parametrize("flags", [[], ["--model.dtype", "bfloat16"]])
def test_check_answers_without_an_engine(tmp_path: Path, flags: list[str]) -> None:
    # An import of torch alone takes seconds, in which `maspo check` has answered.
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"head_dim": 32}')
    (tmp_path / "model/tokenizer.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    config = "model: {path: model, dtype: float32}\ndata: {train: {kind: jsonl, path: rows.jsonl}}\nplacement: {cpus_per_node: 9}\n"
    (tmp_path / "run.yaml").write_text(config)
    arguments = ["check", "run.yaml", *flags]
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from maspo_ray.cli import main; code = main({arguments!r}); "
        f"sys.exit(code or ' '.join(n for n in {[*ENGINES, 'ray']!r} if n in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
