"""Rollout actors for tests: a real vLLM engine in its host, without rewards."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from actors.vllm_rollout import VLLMRollout
from maspo_ray.config import ModelConfig, RolloutConfig
from maspo_ray.experience import Completion, Prompt, Sampling
from maspo_ray.hosts.messages import Ended, Priority, SampleRequest
from maspo_ray.hosts.rollout_host import RolloutHost

PLACES = 32
_request_ids = itertools.count()


def start_rollout(model: str, cpus: int = 0, **keys: Any) -> Any:
    """Returns the handle of a rollout actor, with more keys of `rollout`; its `setup` is the caller's."""
    rollout = RolloutConfig(kv_cache_gib=0.06, max_concurrent_requests=PLACES, **keys)
    arguments = {
        "model": ModelConfig(path=model, dtype="float32"),
        "rollout": rollout,
        "max_model_tokens": 63,
        "threads": 1,
        "seed": 0,
    }
    actor: Any = ray.remote(RolloutHost).options(num_cpus=cpus, max_concurrency=200)
    return actor.remote(VLLMRollout, arguments, PLACES, 30.0)


def make_prompt(*ids: int) -> Prompt:
    return Prompt("test/0", "", np.array(ids, dtype=np.int32), "")


def ask(
    rollout: Any,
    prompt: Prompt,
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    priority: Priority = Priority.TRAINING,
) -> tuple[Any, Any]:
    """Begins to sample; returns references to the payload and to the answer."""
    return ask_as(rollout, prompt, seeds, Sampling(temperature, max_new_tokens), priority)


def ask_as(
    rollout: Any, prompt: Prompt, seeds: Sequence[int], sampling: Sampling, priority: Priority = Priority.TRAINING
) -> tuple[Any, Any]:
    """Begins to sample in a way of its own; returns as `ask` does."""
    request = SampleRequest(next(_request_ids), prompt, sampling, tuple(seeds), priority, scored=False)
    payload, answer = rollout.sample.options(num_returns=2).remote(request)
    return payload, answer


def completions_of(asked: tuple[Any, Any]) -> list[Completion]:
    """Returns what was asked for, once it has ended, in the order of the seeds."""
    group, answer = ray.get(list(asked))
    assert isinstance(answer, Ended)
    assert [fact.num_tokens for fact in answer.facts] == [len(c.token_ids) for c in group.completions]
    return list(group.completions)


def sample(
    rollout: Any, prompt: Prompt, seeds: Sequence[int], max_new_tokens: int, temperature: float = 1.0
) -> list[Completion]:
    """Returns completions of a prompt."""
    return completions_of(ask(rollout, prompt, seeds, max_new_tokens, temperature))
