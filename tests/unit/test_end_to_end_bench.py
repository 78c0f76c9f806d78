"""The bench against TRL: which steps it counts, what it makes of the example's config."""

import json
from pathlib import Path

import pytest
import yaml

from bench.end_to_end import Step, TextParityReward, figures_of, run_config, samples_per_s, steps_of_run, text_parity
from maspo_ray.config import load_config
from maspo_ray.fleet.loading import load_classes
from maspo_ray.testing import check_reward_actor, make_prompt

EXAMPLE = Path(__file__).parents[2] / "examples/smollm2/run.yaml"


def test_samples_per_s_leaves_out_the_warm_up_and_the_end() -> None:
    steps = [Step(64, seconds, 20.0) for seconds in (90.0, 50.0, 10.0, 22.0, 1.0)]
    # (64 + 64) / (10 + 22); with the last step, 192 / 33.
    assert samples_per_s(steps, left_out_at_end=1) == 4.0
    assert samples_per_s(steps) == pytest.approx(192 / 33)


def test_samples_per_s_weighs_steps_by_their_time() -> None:
    steps = [Step(64, 1.0, 20.0)] * 2 + [Step(64, 8.0, 20.0), Step(32, 24.0, 20.0)]
    # 96 / 32; the mean of 8 and 4/3 would be 4.67.
    assert samples_per_s(steps) == 3.0


def test_steps_of_run_counts_trained_groups_alone(tmp_path: Path) -> None:
    rows = [{"step": step, "time/step_s": 2.0 * step, "completion/tokens_mean": 20.0 + step} for step in (1, 2)]
    outcomes = [("trained", 1), ("stale", None), ("trained", 2), ("trained", 2)]
    ledger = [{"outcome": outcome, "step": step} for outcome, step in outcomes]
    for name, lines in {"metrics": rows, "ledger": ledger}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # A group has 8 completions.
    assert steps_of_run(tmp_path) == [Step(8, 2.0, 21.0), Step(16, 4.0, 22.0)]


def test_figures_of_takes_the_ratio_within_each_repeat() -> None:
    # Ratios 3, 2 and 4; the ratio of the medians would be 8 / 3.
    figures = figures_of([(6.0, 2.0), (8.0, 4.0), (12.0, 3.0)])
    assert figures["trl_speedup_end_to_end"] == [3.0, 2.0, 4.0]
    assert figures["samples_per_s"] == [8.0, 6.0, 12.0]


def test_run_config_is_valid_and_neither_filters_nor_evaluates(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    tree = run_config(EXAMPLE, "examples/smollm2/model", tmp_path / "prompts.jsonl", steps=6, threads=2)
    path.write_text(yaml.safe_dump(tree))
    config = load_config(path)
    assert config.data.eval is None and config.eval.every == 0 and not config.pipeline.filter_zero_variance
    assert config.kl.coef == 0 and config.objective.kind == "grpo"
    assert (config.pipeline.groups_per_step, config.rollout.group_size, config.rollout.max_new_tokens) == (8, 8, 24)
    assert load_classes(config)["reward"] is TextParityReward


def test_text_parity_reward_scores_as_trl_side_does() -> None:
    cases = [(make_prompt("a", None), text, text_parity(text)) for text in ("ab", "abc", "")]
    assert [reward for _, _, reward in cases] == [1.0, 0.0, 1.0]
    check_reward_actor(TextParityReward(), cases)
