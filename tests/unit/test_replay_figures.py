"""The line that a replay says of a step: what the learner made now, and what the run's row has."""

import math

from maspo_ray.replay.replay import _line


def test_skipped_step_has_no_figures_on_either_side() -> None:
    # Of a step whose updates were all left out the learner says NaN, and the row null.
    now = {"loss": math.nan, "learner/grad_norm": math.nan}
    assert _line(3, now, {"loss": None, "learner/grad_norm": None}) == (
        "step 3: loss - (in the run -), gradient norm - (in the run -)"
    )
    assert _line(4, {"loss": 0.125, "learner/grad_norm": 2.5}, {"loss": 0.125}) == (
        "step 4: loss 0.125 (in the run 0.125), gradient norm 2.5 (in the run -)"
    )
