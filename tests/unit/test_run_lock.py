"""RUN_DIR belongs to one run: a second is refused, a dead one is no obstacle, and a run that made nothing leaves nothing in the way."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from bench.simulated import simulated_config
from maspo_ray.config import LoggingConfig
from maspo_ray.errors import ConfigError, RunError
from maspo_ray.run_dir.folder import RunFiles
from maspo_ray.run_dir.hold import LOCK, check_run_dir, held_run_dir
from maspo_ray.run_dir.sinks import whole_file

HOLD = """
import sys
from pathlib import Path
from maspo_ray.run_dir.hold import held_run_dir
with held_run_dir(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def _begin(run_dir: Path) -> None:
    """Writes all that a run writes before its first step, and when it fails there."""
    config = simulated_config(run_dir)
    files = RunFiles(config.model_copy(update={"logging": LoggingConfig()}))
    files.write_left_out([{"source": "data.train", "row": "line 1", "cause": "has a prompt without text"}])
    files.write_note("starting the actors")
    files.write_ledger({"group": 0})
    files.step_record(1).parent.mkdir()
    for name in ("summary.json", "curves.png"):
        with whole_file(run_dir / name) as partial:
            partial.touch()


def test_run_dir_of_a_run_under_way_is_refused_by_name_until_its_process_is_gone(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, run_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        refused = rf"^run_dir is {run_dir}; the run of process {other.pid} on \S+ is writing into it. Give another"
        with pytest.raises(ConfigError, match=refused):
            check_run_dir(run_dir, resume=False)
        with pytest.raises(ConfigError, match=refused), held_run_dir(run_dir):
            pass
        assert run_dir.exists()
        other.kill()
    assert (run_dir / LOCK).exists()
    check_run_dir(run_dir, resume=False)
    with held_run_dir(run_dir):
        pass


def test_run_dir_of_many_that_begin_at_once_is_one_runs(tmp_path: Path) -> None:
    together, over = Barrier(8), Barrier(8)

    def run() -> bool:
        together.wait()
        try:
            with held_run_dir(tmp_path / "run"):
                over.wait()
        except ConfigError:
            over.wait()
            return False
        return True

    for _ in range(20):
        with ThreadPoolExecutor(8) as threads:
            assert sum(threads.map(lambda _: run(), range(8))) == 1


@pytest.mark.parametrize("error", [ConfigError("model.path is x"), KeyboardInterrupt()])
def test_error_of_the_input_leaves_the_folder_as_it_was(tmp_path: Path, error: BaseException) -> None:
    run_dir, mine = tmp_path / "new", tmp_path / "mine"
    with pytest.raises(type(error)), held_run_dir(run_dir):
        _begin(run_dir)
        raise error
    assert not run_dir.exists()
    (mine / "tensorboard").mkdir(parents=True)
    (mine / "ideas.txt").touch()
    with pytest.raises(type(error)), held_run_dir(mine):
        _begin(mine)
        raise error
    assert sorted(path.name for path in mine.iterdir()) == [LOCK, "ideas.txt", "tensorboard"]


def test_failure_before_the_first_step_keeps_its_files_and_is_cleared_by_the_next_run(tmp_path: Path) -> None:
    with pytest.raises(RunError), held_run_dir(tmp_path / "run"):
        _begin(tmp_path / "run")
        raise RunError("rollout.engine is wrong")
    assert (tmp_path / "run" / "notes.jsonl").exists()
    check_run_dir(tmp_path / "run", resume=False)
    with held_run_dir(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


@pytest.mark.parametrize(
    "make",
    [
        lambda run_dir: (run_dir / "metrics.jsonl").write_text('{"step": 1}\n'),
        lambda run_dir: (run_dir / "eval.jsonl").write_text('{"step": 0}\n'),
        lambda run_dir: (run_dir / "checkpoints" / "step_000001").mkdir(parents=True),
        lambda run_dir: (run_dir / "final").mkdir(),
    ],
    ids=["a step", "an evaluation", "a checkpoint", "a model"],
)
def test_run_that_made_something_stands_in_the_way_however_it_ended(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    with pytest.raises(ConfigError), held_run_dir(tmp_path):
        _begin(tmp_path)
        make(tmp_path)
        raise ConfigError("found late")
    assert (tmp_path / "config.yaml").exists()
    (tmp_path / "summary.json").write_text(json.dumps({"interrupted": False, "failure": "found late"}))
    kind = "a finished" if (tmp_path / "final").exists() else "an unfinished"
    with pytest.raises(ConfigError, match=f"it already holds {kind} run"):
        check_run_dir(tmp_path, resume=False)
    with pytest.raises(ConfigError, match=f"it already holds {kind} run"), held_run_dir(tmp_path):
        pass


def test_config_of_a_users_own_in_run_dir_is_no_runs_leftover(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="it already holds"), held_run_dir(tmp_path):
        pass
    assert (tmp_path / "config.yaml").read_text() == "mine"
