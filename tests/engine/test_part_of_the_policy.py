"""Sampling from a part of the policy on a real vLLM engine: which tokens are drawn, what ends a completion, and whose log-probs come back."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from rollouts import ask_as, completions_of, make_prompt, start_rollout
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from maspo_ray.config import RolloutConfig
from maspo_ray.experience import Completion, Sampling
from maspo_ray.sampling import training_sampling

pytestmark = [pytest.mark.engine, pytest.mark.ray]
KEYS: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 24}
PROMPT = make_prompt(5, 9, 13)


@pytest.fixture(scope="module")
def engine(tiny_model: str, own_ray: None) -> Iterator[Any]:
    actor = start_rollout(tiny_model, cpus=1, **KEYS)
    ray.get(actor.setup.remote())
    yield actor
    ray.get(actor.shutdown.remote())
    ray.kill(actor)


@pytest.fixture(scope="module")
def model(tiny_model: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def _sample(engine: Any, n: int = 32, **changed: Any) -> list[Completion]:
    sampling: Sampling = replace(training_sampling(RolloutConfig(**KEYS)), **changed)
    return completions_of(ask_as(engine, PROMPT, range(n), sampling))


@torch.no_grad()
def _whole(model: PreTrainedModel, completion: Completion) -> torch.Tensor:
    """Returns [tokens, vocab], transformers' log-probs of all tokens at the temperature where each of the completion was drawn."""
    ids = np.concatenate([PROMPT.token_ids, completion.token_ids]).astype(np.int64)
    logits = model(torch.from_numpy(ids)[None]).logits[0, len(PROMPT.token_ids) - 1 : -1].float()
    return (logits / KEYS["temperature"]).log_softmax(-1)


def _own(model: PreTrainedModel, completion: Completion) -> torch.Tensor:
    tokens = torch.from_numpy(completion.token_ids.astype(np.int64))
    return _whole(model, completion).gather(1, tokens[:, None])[:, 0]


@pytest.mark.parametrize(
    "changed",
    [
        {"top_k": 8, "min_p": 0.2, "min_new_tokens": 8},
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in ({}, {"top_p": 1.0, "top_k": 4}, {"top_p": 1.0, "min_p": 0.5})
        ),
    ],
)
def test_logprobs_are_the_whole_policys_and_tokens_are_from_its_part(
    engine: Any, model: PreTrainedModel, changed: dict[str, Any]
) -> None:
    sampling = replace(training_sampling(RolloutConfig(**KEYS)), **changed)
    for completion in _sample(engine, **changed):
        own, whole = _own(model, completion), _whole(model, completion)
        assert (own - torch.tensor(completion.logprobs)).abs().max() < 1e-3
        # Of the tokens that are more probable than the one drawn.
        above = whole > own[:, None] + 1e-4
        assert (whole.exp() * above).sum(-1).max() <= sampling.top_p + 1e-4
        assert above.sum(-1).max() < (sampling.top_k or 64)
        assert (own - whole.amax(-1)).exp().min() >= sampling.min_p - 1e-3
        assert len(completion.token_ids) >= sampling.min_new_tokens


def test_stop_tokens_end_a_completion_but_not_before_its_fewest_tokens(engine: Any, model: PreTrainedModel) -> None:
    stops = tuple(range(20, 50))
    assert min(len(completion.token_ids) for completion in _sample(engine, stop_token_ids=stops)) < 5
    for completion in _sample(engine, stop_token_ids=stops, min_new_tokens=5):
        *before, last = completion.token_ids.tolist()
        assert not set(before) & set(stops) and len(before) >= 4
        assert completion.finish_reason == ("stop" if last in stops else "length")
        # What was banned is in the learner's distribution, and in the log-prob.
        assert (_own(model, completion) - torch.tensor(completion.logprobs)).abs().max() < 1e-3


def test_a_stop_string_is_the_end_of_tokens_and_text(engine: Any, tiny_model: str) -> None:
    tokenizer, stops = AutoTokenizer.from_pretrained(tiny_model), ("7", "41", "1")
    completions = _sample(engine, stop=stops, min_new_tokens=3)
    ended = [completion for completion in completions if completion.text.endswith(stops)]
    assert len(ended) > 16
    for completion in ended:
        assert completion.finish_reason == "stop"
        assert len(completion.logprobs) == len(completion.token_ids) == completion.spans[-1].end > 3
        # The last token may hold more than the string; before it there is none but in the first three tokens.
        whole, before, early = (
            tokenizer.decode(completion.token_ids[:end], skip_special_tokens=True) for end in (None, -1, 3)
        )
        assert whole.startswith(completion.text)
        assert not any(stop in before.removeprefix(early) for stop in stops)


def test_a_greedy_evaluation_takes_the_most_probable_token(engine: Any, model: PreTrainedModel) -> None:
    for completion in _sample(engine, n=2, temperature=0.0, top_p=1.0):
        assert _whole(model, completion).argmax(-1).tolist() == completion.token_ids.tolist()
