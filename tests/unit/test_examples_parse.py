"""Every config that ships: parses, names classes that are there, and fits the nodes that it is written for."""

import re
from pathlib import Path

import pytest
import yaml

from maspo_ray.config import DataConfig, load_config
from maspo_ray.fleet.loading import load_classes
from maspo_ray.fleet.placement import config_nodes, demands, plan

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = sorted({*EXAMPLES.rglob("run*.yaml"), *(EXAMPLES / "gpu").glob("*.yaml")})
NAMES = [str(config.relative_to(EXAMPLES)) for config in CONFIGS]


def test_examples_are_found() -> None:
    assert {"quickstart/run.yaml", "custom_reward/run.yaml"} <= {Path(name).as_posix() for name in NAMES}


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_example_parses_and_its_classes_are_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An example's own reward lies beside its config.
    monkeypatch.syspath_prepend(path.parent)
    classes = load_classes(load_config(path))
    assert {"rollout", "reward", "learner"} <= classes.keys()


def test_sections_shown_in_the_docs_of_the_data_are_right() -> None:
    shown = re.findall(
        r"^```yaml\n(.*?)^```", (EXAMPLES.parent / "docs" / "data.md").read_text(), re.MULTILINE | re.DOTALL
    )
    kinds = {DataConfig.model_validate(yaml.safe_load(block)["data"]).train.kind for block in shown}
    assert kinds == {"parquet", "huggingface", "mix"}


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_example_does_not_depend_on_a_folder_of_somebodys_machine(path: Path) -> None:
    config = load_config(path)
    assert not config.run_dir.is_absolute() and not Path(config.model.path).is_absolute()


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_example_fits_the_nodes_that_it_names(path: Path) -> None:
    config = load_config(path)
    if config.placement.nodes is None:
        # Written for the machine that it is started on: two CPU cores are enough.
        config = load_config(path, ["--placement.nodes", "1", "--placement.cpus_per_node", "2"])
    planned = plan(demands(config), config_nodes(config.placement))
    assert planned.of_role("learner") and planned.of_role("rollout") and planned.of_role("reward")
