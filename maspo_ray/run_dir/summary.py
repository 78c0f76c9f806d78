"""A run's result: for the caller of `train`, for `summary.json`, and as the text that a run ends with.

Promise: pure; nothing is measured or written here. A figure that was not measured is None or NaN, and shown as such, never as 0.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run's result.

    Attributes:
        run_dir: the run's folder.
        steps: train steps done.
        accuracy_before: on the held-out set, before training; None without an evaluation.
        accuracy_after: on the held-out set, at the last evaluation; None without one after the first.
        reward_first: mean reward over the first tenth of the steps.
        reward_last: mean reward over the last tenth.
        staleness_mean: versions that the oldest token of a trained group was behind the learner, mean over groups.
        staleness_max: the same, of the stalest group.
        max_staleness: `pipeline.max_staleness`, the bound of `staleness_max`.
        learner_wait_share: share of the steps' wall time in which the learner waited for a batch.
        rollout_idle_share: share of it in which a rollout engine had nothing to generate, mean over engines.
        groups: number submitted, and by outcome: trained, filtered, stale, failed.
        seconds: role → kind of call → seconds, summed over calls, also those that ran at the same time.
        parity_max: largest |Δ log-prob| between learner and rollout engines, at any step and in any probe.
        errors: completions of training that could not be scored; evaluation_errors, of evaluations.
        interrupted: whether the run ended before its last step because it was asked to.
        failure: why it could not go on, None where it could.
        saved: what the run wrote, as paths relative to its folder.
    """

    run_dir: str
    steps: int
    accuracy_before: float | None
    accuracy_after: float | None
    eval_set: str
    reward_first: float
    reward_last: float
    staleness_mean: float
    staleness_max: float
    max_staleness: int
    learner_wait_share: float
    rollout_idle_share: float
    groups: dict[str, int]
    seconds: dict[str, dict[str, float]]
    tokens_generated: int
    tokens_trained: int
    parity_max: float
    wall_s: float
    errors: int
    evaluation_errors: int
    interrupted: bool
    saved: tuple[str, ...]
    failure: str | None = None


def duration_text(seconds: float) -> str:
    """Returns a duration for people: `8 s`, `12 min 30 s`, `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent_text(share: float | None) -> str:
    return "not measured" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def summary_text(summary: RunSummary) -> str:
    """Returns the lines that a run ends with."""
    ending = "failed after" if summary.failure else "interrupted after" if summary.interrupted else "finished:"
    rows = [
        (f"accuracy ({summary.eval_set})", _accuracy_text(summary)),
        ("reward", _reward_text(summary)),
        ("groups", _groups_text(summary.groups)),
        ("staleness", _staleness_text(summary)),
        ("waiting", _waiting_text(summary)),
        ("the time went", _time_text(summary)),
        ("at once", _at_once_text(summary)),
        ("tokens", _tokens_text(summary)),
        ("parity", f"largest |Δ log-prob| learner to rollout engine: {_number(summary.parity_max, '.2g')}"),
    ]
    if summary.errors or summary.evaluation_errors:
        counts = f"{summary.errors:,} completions of training, {summary.evaluation_errors:,} of evaluations"
        rows.append(("not scored", f"{counts} (errors and timeouts of the reward; left out)"))
    rows.append(("saved", ", ".join(summary.saved) or "nothing"))
    width = max(len(name) for name, _ in rows)
    first = f"Run {ending} {summary.steps:,} steps in {duration_text(summary.wall_s)}, in {summary.run_dir}"
    return "\n".join([first, *(f"  {name:<{width}}  {text}" for name, text in rows)])


def _number(value: float, spec: str) -> str:
    return "not measured" if math.isnan(value) else format(value, spec)


def _accuracy_text(summary: RunSummary) -> str:
    before, after = summary.accuracy_before, summary.accuracy_after
    if before is None and after is None:
        return "not measured"
    text = f"{percent_text(before)} → {percent_text(after)}"
    return text if before is None or after is None else f"{text} ({100 * (after - before):+.1f} points)"


def _reward_text(summary: RunSummary) -> str:
    first, last = _number(summary.reward_first, ".3f"), _number(summary.reward_last, ".3f")
    return f"{first} → {last} (means of the first and the last tenth of the steps)"


def _groups_text(groups: dict[str, int]) -> str:
    ends = " + ".join(f"{count:,} {name}" for name, count in groups.items() if name != "submitted")
    return f"{groups['submitted']:,} submitted = {ends}"


def _staleness_text(summary: RunSummary) -> str:
    mean, most = _number(summary.staleness_mean, ".2f"), _number(summary.staleness_max, "g")
    return f"mean {mean}, max {most} versions behind (bound {summary.max_staleness})"


def _waiting_text(summary: RunSummary) -> str:
    learner, engines = percent_text(summary.learner_wait_share), percent_text(summary.rollout_idle_share)
    return f"learner {learner} of the time, rollout engines {engines}"


def _time_text(summary: RunSummary) -> str:
    """Returns the wall time's division into the learner's activities, of which it does one at a time."""
    known = sorted(summary.seconds.get("learner", {}).items(), key=lambda item: -item[1])
    if not known:
        return "not measured"
    rest = summary.wall_s - sum(seconds for _, seconds in known)
    return ", ".join(f"{name} {percent_text(seconds / summary.wall_s)}" for name, seconds in [*known, ("rest", rest)])


def _at_once_text(summary: RunSummary) -> str:
    """Returns, for each other role, the number of its calls under way, in the mean over the run."""
    others = [
        (role, sum(names.values())) for role, names in summary.seconds.items() if role not in ("learner", "evaluation")
    ]
    return ", ".join(f"{seconds / summary.wall_s:.1f} calls to {role}" for role, seconds in others) or "not measured"


def _tokens_text(summary: RunSummary) -> str:
    text = f"{summary.tokens_generated:,} generated, {summary.tokens_trained:,} trained"
    return (
        f"{text} ({summary.tokens_generated / summary.wall_s:,.0f} generated a second)" if summary.wall_s > 0 else text
    )
