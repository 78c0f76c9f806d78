"""What a person sees, on a terminal and off it."""

import io
import math
import sys

import pytest

from maspo_ray.run_dir.progress import Progress, ProgressMode

METRICS = {"reward/mean": 0.41234, "staleness/mean": 0.5, "tokens/generated": 3000.0, "time/step_s": 2.0}
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class _Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _plain_steps(total: int, done: int, seconds_a_step: float) -> list[str]:
    clock, stream = _Clock(), io.StringIO()
    with Progress(total, "auto", stream, clock) as progress:
        for step in range(1, done + 1):
            progress.update(step, {})
            clock.now_s += seconds_a_step
    return [line.split()[1] for line in stream.getvalue().splitlines()]


def test_progress_plain_line_holds_the_facts() -> None:
    clock, stream = _Clock(), io.StringIO()
    with Progress(10, "plain", stream, clock) as progress:
        progress.evaluated(0, 0.412, (0, 0))
        progress.update(1, METRICS)
        clock.now_s += 30.0
        progress.update(2, METRICS)
    # One step took 30 s, 8 are left: 240 s. 3000 tokens in 2 s.
    facts = "reward 0.412  held-out 41.2 %  staleness 0.50  1,500 tokens/s"
    assert stream.getvalue().splitlines() == [
        "held-out accuracy after step 0: 41.2 %",
        f"step 1/10  {facts}",
        f"step 2/10  {facts}  4 min 00 s left",
    ]


def test_progress_missing_and_nan_metrics_are_left_out() -> None:
    stream = io.StringIO()
    with Progress(3, "plain", stream, _Clock()) as progress:
        progress.update(
            1, {"reward/mean": math.nan, "staleness/mean": 1.0, "tokens/generated": 5.0, "time/step_s": 0.0}
        )
    assert stream.getvalue() == "step 1/3  staleness 1.00\n"


def test_progress_slow_steps_have_a_line_each() -> None:
    assert _plain_steps(total=4, done=4, seconds_a_step=2.0) == ["1/4", "2/4", "3/4", "4/4"]


def test_progress_fast_steps_are_thinned_between_first_and_last() -> None:
    # Lines at 0.0 s, then 2.1 s (step 4), then the last step at 4.2 s - 0.7 s.
    assert _plain_steps(total=6, done=6, seconds_a_step=0.7) == ["1/6", "4/6", "6/6"]


def test_progress_run_that_stops_early_shows_its_last_step_once() -> None:
    assert _plain_steps(total=100, done=3, seconds_a_step=0.1) == ["1/100", "3/100"]
    assert _plain_steps(total=100, done=1, seconds_a_step=0.1) == ["1/100"]


def test_progress_off_writes_nothing() -> None:
    stream = _Terminal()
    with Progress(2, "off", stream) as progress:
        progress.note("starting")
        progress.evaluated(0, 0.5, (0, 0))
        progress.update(1, METRICS)
    assert stream.getvalue() == ""


def test_progress_says_over_which_versions_an_evaluation_ran() -> None:
    stream = io.StringIO()
    with Progress(10, "plain", stream, _Clock()) as progress:
        progress.evaluated(4, 0.5, (4, 6))
    assert stream.getvalue() == "held-out accuracy after step 4 (versions 4 to 6): 50.0 %\n"


@pytest.mark.parametrize(("mode", "live"), [("auto", True), ("plain", False)])
def test_progress_on_a_terminal_is_live_in_auto_only(
    mode: ProgressMode, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = _Terminal()
    with Progress(2, mode, stream) as progress:
        progress.update(1, METRICS)
    assert (HIDE_CURSOR in stream.getvalue()) is live
    assert "step 1/2" in stream.getvalue()
    assert "reward 0.412" in stream.getvalue()


def test_progress_on_a_terminal_that_cannot_redraw_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = _Terminal()
    with Progress(2, "auto", stream, _Clock()) as progress:
        progress.update(1, {})
    assert stream.getvalue() == "step 1/2\n"


def test_progress_live_exception_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream, stdout = _Terminal(), sys.stdout
    with pytest.raises(KeyError), Progress(2, "auto", stream) as progress:
        progress.update(1, METRICS)
        raise KeyError("boom")
    assert stream.getvalue().rindex(SHOW_CURSOR) > stream.getvalue().rindex(HIDE_CURSOR)
    assert sys.stdout is stdout


def test_progress_live_note_is_shown_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = _Terminal()
    with Progress(2, "auto", stream) as progress:
        progress.note("actor [red]1[/red] of 2")
    assert "actor [red]1[/red] of 2" in stream.getvalue()


def test_progress_last_step_is_shown_before_what_follows_it() -> None:
    stream = io.StringIO()
    with Progress(2, "plain", stream, _Clock()) as progress:
        progress.update(1, {})
        progress.update(2, {})
        progress.note("saving the model")
    assert stream.getvalue().splitlines() == ["step 1/2", "step 2/2", "saving the model"]
