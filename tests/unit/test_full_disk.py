"""A disk that fills up while a run writes: one line says it, and every file holds whole lines. The limit is the kernel's, on the size of
files that a process may write."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.simulated import simulated_config
from maspo_ray.run_dir.folder import RunFiles

LIMITED = """
import resource, sys
from pathlib import Path
from maspo_ray.errors import RunError
from maspo_ray.run_dir.sinks import JsonlWriter, whole_file
from maspo_ray.run_dir.timeline import TraceWriter

folder = Path(sys.argv[1])
rows, trace = JsonlWriter(folder / "metrics.jsonl"), TraceWriter(folder / "timeline.json")
(folder / "summary.json").write_text("the one before")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

def until_full(write):
    try:
        for i in range(1000):
            write(i)
    except RunError as error:
        print(error)

until_full(lambda i: rows.write({"step": i, "text": "x" * 37}))
until_full(lambda i: trace.write('{"name": "a span"}'))

def write_summary(i):
    with whole_file(folder / "summary.json") as partial:
        partial.write_bytes(bytes(2000))

until_full(write_summary)
rows.close()
"""


def test_full_disk_is_one_line_and_leaves_whole_lines(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    names = ("metrics.jsonl", "timeline.json", "summary.json")
    assert done.stdout.splitlines() == [
        f"{tmp_path / name} cannot be written (File too large). Make room there, or give a run_dir that has it."
        for name in names
    ]
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("}\n") and len(text) > 900
    assert [json.loads(line)["step"] for line in text.splitlines()] == list(range(text.count("\n")))
    # As of a run that was not closed, but with its last event whole.
    assert len(json.loads((tmp_path / "timeline.json").read_text() + "]")) > 40
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert (tmp_path / "summary.json").read_text() == "the one before"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
def test_output_in_any_encoding_ends_nothing(encoding: str) -> None:
    program = (
        "import sys\nfrom maspo_ray.terminal import patient_streams\n"
        "with patient_streams(): print('learner → engine ≤ 1e-3'); print('über', file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        timeout=60,
        env={"PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0
    shown = done.stdout.decode(encoding)
    assert shown == ("learner → engine ≤ 1e-3\n" if encoding == "utf-16" else "learner ? engine ? 1e-3\n")
    # Python's own way of standard error.
    assert done.stderr.decode(encoding) == ("\\xfcber\n" if encoding == "ascii" else "über\n")


def test_output_that_nobody_takes_ends_nothing() -> None:
    program = (
        "import sys\nfrom maspo_ray.terminal import patient_streams\nsys.stdin.read()\n"
        "with patient_streams():\n for i in range(10_000): print(i, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == b""


def test_room_for_the_summary_is_free_once_the_files_are_closed(tmp_path: Path) -> None:
    files = RunFiles(simulated_config(tmp_path))
    assert (tmp_path / ".room").stat().st_size > 200_000
    files.close()
    assert not (tmp_path / ".room").exists()
