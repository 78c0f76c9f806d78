"""How completions are sampled: from the config to what an engine is asked for; and what a ratio is worth where a part of the policy is sampled."""

import logging
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from actors.vllm_rollout import VLLMRollout, engine_arguments
from maspo_ray.config import EvalConfig, GrpoConfig, ModelConfig, RolloutConfig
from maspo_ray.experience import Sampling
from maspo_ray.objectives import policy_loss
from maspo_ray.sampling import evaluation_sampling, say_what_the_ratio_leaves_out, training_sampling

ROLLOUT = RolloutConfig(
    temperature=0.7,
    max_new_tokens=64,
    min_new_tokens=2,
    top_p=0.9,
    top_k=20,
    min_p=0.05,
    stop=("</answer>",),
    stop_token_ids=(7, 9),
)


def test_training_is_sampled_as_rollout_says() -> None:
    assert training_sampling(ROLLOUT) == Sampling(0.7, 64, 2, 0.9, 20, 0.05, ("</answer>",), (7, 9))
    assert training_sampling(RolloutConfig(max_new_tokens=8)) == Sampling(1.0, 8)


def test_an_evaluation_ends_completions_as_training_does_and_draws_from_the_whole_policy() -> None:
    assert evaluation_sampling(EvalConfig(), ROLLOUT) == Sampling(
        1.0, 64, 2, stop=("</answer>",), stop_token_ids=(7, 9)
    )


def test_an_evaluations_own_keys_go_before_training_s() -> None:
    config = EvalConfig(
        temperature=0.6, top_p=0.95, top_k=1, min_p=0.1, min_new_tokens=0, stop=("\n",), stop_token_ids=()
    )
    assert evaluation_sampling(config, ROLLOUT) == Sampling(0.6, 64, 0, 0.95, 1, 0.1, ("\n",), ())


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"top_p": 0}, "greater than 0"),
        ({"top_p": 1.1}, "less than or equal to 1"),
        ({"top_k": 0}, "greater than or equal to 1"),
        ({"min_p": 1}, "less than 1"),
        ({"stop": ["a", ""]}, "an empty string would end every completion at once"),
        ({"stop_token_ids": [-1]}, "greater than or equal to 0"),
    ],
)
@pytest.mark.parametrize("section", [RolloutConfig, EvalConfig])
def test_sampling_key_out_of_its_range_is_refused(section: Any, keys: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        section(**keys)


def test_a_single_token_to_draw_from_is_for_evaluations_alone() -> None:
    assert EvalConfig(top_k=1).top_k == 1
    with pytest.raises(ValidationError, match="completions of a group would all be the same"):
        RolloutConfig(top_k=1)


def test_a_lone_stop_is_a_list_of_it() -> None:
    config = RolloutConfig.model_validate({"stop": "</answer>", "stop_token_ids": 7})
    assert (config.stop, config.stop_token_ids) == (("</answer>",), (7,))


# The engine.


@pytest.mark.parametrize(
    ("keys", "mode"),
    [
        ({}, "processed_logprobs"),
        ({"temperature": 0.7, "stop": ("a",), "stop_token_ids": (3,)}, "processed_logprobs"),
        ({"top_p": 0.9}, "raw_logprobs"),
        ({"top_k": 5}, "raw_logprobs"),
        ({"min_p": 0.1}, "raw_logprobs"),
        ({"min_new_tokens": 1}, "raw_logprobs"),
    ],
)
def test_an_engine_that_takes_tokens_from_the_policy_says_log_probs_before_it_does(
    keys: dict[str, Any], mode: str
) -> None:
    arguments = engine_arguments(ModelConfig(path="org/model"), RolloutConfig(**keys), max_model_tokens=32, seed=0)
    assert arguments["logprobs_mode"] == mode


@pytest.mark.engine
def test_vllm_is_asked_for_what_the_sampling_says() -> None:
    model = ModelConfig(path="org/model")
    engine = VLLMRollout(model=model, rollout=ROLLOUT, max_model_tokens=80, threads=1, seed=0)
    asked = engine._parameters(training_sampling(ROLLOUT), seed=3)
    assert (asked.temperature, asked.top_p, asked.top_k, asked.min_p, asked.seed) == (0.7, 0.9, 20, 0.05, 3)
    assert (asked.max_tokens, asked.min_tokens) == (64, 2)
    assert (asked.stop, asked.stop_token_ids, asked.include_stop_str_in_output) == (["</answer>"], [7, 9], True)
    plain = engine._parameters(Sampling(1.0, 8), seed=None)
    assert (plain.top_p, plain.top_k, plain.min_p, plain.min_tokens, plain.stop) == (1.0, 0, 0.0, 0, [])


# The ratio. A policy over four tokens, and top_p 0.75, which leaves the first two of them: 0.5 + 0.3 = 0.8.

OLD = torch.tensor([0.5, 0.3, 0.15, 0.05])
KEPT = OLD[:2].sum()


def _ratios(new: torch.Tensor, behaviour: torch.Tensor) -> list[float]:
    """Returns π / μ of the tokens that may be drawn."""
    loss = policy_loss(new[:2].log(), behaviour.log(), torch.ones(2), GrpoConfig())
    return loss.ratio.tolist()


def test_ratio_of_whole_policies_is_one_where_nothing_has_changed() -> None:
    assert _ratios(OLD, OLD[:2]) == pytest.approx([1.0, 1.0])
    # Renormalised, μ is 0.625 and 0.375: each ratio would be 0.8, the share that is kept, on the edge of a clip at 1 ± 0.2.
    assert _ratios(OLD, OLD[:2] / KEPT) == pytest.approx([0.8, 0.8])


def test_ratio_of_whole_policies_leaves_out_the_change_of_what_is_kept() -> None:
    new = torch.tensor([0.55, 0.33, 0.07, 0.05])
    # 0.55 / 0.5 and 0.33 / 0.3.
    whole = _ratios(new, OLD[:2])
    assert whole == pytest.approx([1.1, 1.1])
    # Of what may be drawn nothing has changed: 0.55 / 0.88 = 0.5 / 0.8. The factor between the two is 0.8 / 0.88.
    parts = [(a / new[:2].sum() / (b / KEPT)).item() for a, b in zip(new[:2], OLD[:2], strict=True)]
    assert parts == pytest.approx([1.0, 1.0])
    assert [ratio * (0.8 / 0.88) for ratio in whole] == pytest.approx(parts)


def test_gradient_of_whole_policies_moves_what_is_kept_only_by_advantages_that_do_not_cancel() -> None:
    """Drawn as the part is, 0.625 and 0.375, advantages of a group cancel: 0.625 · 0.6 − 0.375 · 1 = 0."""
    logits = OLD.log().requires_grad_()
    drawn, advantages = OLD[:2] / KEPT, torch.tensor([0.6, -1.0])
    (logits.log_softmax(-1)[:2] * drawn * advantages).sum().backward()
    assert logits.grad is not None
    # As for the part alone: nothing goes to the tokens that were not to be drawn, and nothing comes from them.
    assert logits.grad[2:].tolist() == pytest.approx([0.0, 0.0], abs=1e-7)
    part = OLD.log()[:2].requires_grad_()
    (part.log_softmax(-1) * drawn * advantages).sum().backward()
    assert part.grad is not None
    assert logits.grad[:2].tolist() == pytest.approx(part.grad.tolist())


def test_what_the_ratio_leaves_out_is_said_where_it_leaves_something_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "maspo_ray")
    say_what_the_ratio_leaves_out(RolloutConfig(temperature=0.7, stop=("a",)))
    assert caplog.messages == []
    say_what_the_ratio_leaves_out(RolloutConfig(top_p=0.9, min_new_tokens=4))
    [said] = caplog.messages
    assert said.startswith("rollout.top_p is 0.9 and rollout.min_new_tokens is 4; ") and "docs/pipeline.md" in said
