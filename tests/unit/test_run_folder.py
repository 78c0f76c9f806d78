"""A run's folder: what stands in its way is one line, and leaves nothing behind that reads like a run."""

from pathlib import Path

import pytest

from bench.simulated import simulated_config
from maspo_ray.errors import ConfigError, RunError
from maspo_ray.run_dir.checkpoint import whole_folder
from maspo_ray.run_dir.folder import RunFiles


def test_folder_that_cannot_be_opened_is_one_line_and_holds_no_run(tmp_path: Path) -> None:
    config = simulated_config(tmp_path)
    config = config.model_copy(update={"logging": config.logging.model_copy(update={"tensorboard": True})})
    (tmp_path / "tensorboard").write_text("a file where the folder would be")
    with pytest.raises(ConfigError) as caught:
        RunFiles(config)
    assert str(caught.value).startswith(f"run_dir is {tmp_path}; it cannot be written to (")
    assert len(str(caught.value).splitlines()) == 1
    assert not any((tmp_path / name).exists() for name in ("metrics.jsonl", "config.yaml"))


def test_folder_has_its_name_once_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "final"
    with pytest.raises(KeyboardInterrupt), whole_folder(folder) as partial:
        partial.mkdir()
        (partial / "left").touch()
        raise KeyboardInterrupt
    assert not folder.exists()
    with whole_folder(folder) as partial:
        partial.mkdir()
        (partial / "model").touch()
        assert not folder.exists()
    # Nothing is left of the first.
    assert [path.name for path in folder.iterdir()] == ["model"]
    assert list(tmp_path.iterdir()) == [folder]


def test_folder_that_was_written_on_another_nodes_disk_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"the driver finds nothing\. Take a run_dir that all nodes share"),
        whole_folder(tmp_path / "final"),
    ):
        pass
