"""The rollout actor on a real vLLM engine, and weights sent to it through the real transfer group."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.vllm_rollout import VLLMRollout
from maspo_ray.config import ModelConfig, RolloutConfig
from maspo_ray.experience import Completion, Prompt

pytestmark = [pytest.mark.engine, pytest.mark.ray]
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def engine(tiny_model: str, own_ray: None) -> Iterator[Any]:
    actor = (
        ray.remote(VLLMRollout)
        .options(num_cpus=1, max_concurrency=100)
        .remote(
            model=ModelConfig(path=tiny_model, dtype="float32"),
            rollout=RolloutConfig(kv_cache_gib=0.06, max_concurrent_requests=32),
            max_model_tokens=63,
            threads=1,
            seed=0,
        )
    )
    ray.get(actor.setup.remote())
    yield actor
    ray.get(actor.shutdown.remote())
    ray.kill(actor)


@pytest.fixture(scope="module")
def trainer(tiny_model: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def publisher(engine: Any, trainer: PreTrainedModel) -> Any:
    from vllm.distributed.weight_transfer import ModuleSource

    from maspo_ray.weight_sync.publisher import RolloutClient, WeightPublisher

    return WeightPublisher(
        ModuleSource(trainer), RolloutClient([engine], 1, 30.0), "gloo", 0, ray.util.get_node_ip_address(), 30.0
    )


def _prompt(*ids: int) -> Prompt:
    return Prompt("test/0", "", np.array(ids, dtype=np.int32), "")


def _sample(engine: Any, prompt: Prompt, n: int, max_new_tokens: int) -> list[Completion]:
    stream = engine.generate.options(num_returns="streaming").remote(
        prompt, temperature=TEMPERATURE, max_new_tokens=max_new_tokens, seeds=list(range(n))
    )
    objects = [ray.get(reference) for reference in stream]
    facts = [fact for batch in objects[1::2] for fact in batch]
    completions = [completion for batch in objects[0::2] for completion in batch]
    assert [fact.num_tokens for fact in facts] == [len(completion.token_ids) for completion in completions]
    assert len(completions) == n
    return completions


@torch.no_grad()
def _logprobs(model: PreTrainedModel, ids: NDArray[np.int32], temperature: float) -> NDArray[np.float32]:
    row = torch.from_numpy(ids.astype(np.int64))[None]
    logits = model(row).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(1, row[0, 1:, None])[:, 0].numpy()


def _distance(model: PreTrainedModel, prompt: Prompt, completion: Completion) -> float:
    ids = np.concatenate([prompt.token_ids, completion.token_ids])
    expected = _logprobs(model, ids, TEMPERATURE)[len(prompt.token_ids) - 1 :]
    return float(np.abs(expected - completion.logprobs).max())


def test_rollout_behaviour_logprobs_are_those_at_the_sampling_temperature(
    engine: Any, trainer: PreTrainedModel
) -> None:
    prompt = _prompt(5, 9, 13)
    completions = _sample(engine, prompt, n=8, max_new_tokens=16)
    assert max(_distance(trainer, prompt, completion) for completion in completions) < 1e-3


def test_rollout_samples_with_the_same_seed_are_equal_and_with_others_differ(engine: Any) -> None:
    first, second = (_sample(engine, _prompt(5, 9), n=4, max_new_tokens=12) for _ in range(2))
    texts = [sorted(completion.token_ids.tobytes() for completion in run) for run in (first, second)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 4


def test_publish_new_weights_reach_a_tied_output_layer(engine: Any, trainer: PreTrainedModel, publisher: Any) -> None:
    """On CPU vLLM multiplies by a packed copy of the output layer; without packing it again it keeps the old one."""
    assert trainer.config.tie_word_embeddings
    prompt = _prompt(5, 9, 13)
    before = _sample(engine, prompt, n=4, max_new_tokens=8)
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert min(_distance(trainer, prompt, completion) for completion in before) > 0.1
    publisher.publish(7)
    for completion in _sample(engine, prompt, n=4, max_new_tokens=8):
        assert _distance(trainer, prompt, completion) < 1e-3
        assert [(span.version, span.start, span.end) for span in completion.spans] == [
            (7, 0, len(completion.token_ids))
        ]


def test_publish_with_requests_in_flight_keeps_them_and_stamps_each_version(engine: Any, publisher: Any) -> None:
    streams = [
        engine.generate.options(num_returns="streaming").remote(
            _prompt(3, 4 + i), temperature=2.0, max_new_tokens=56, seeds=[i]
        )
        for i in range(24)
    ]
    for version in range(8, 14):
        publisher.publish(version)
    completions = [ray.get(next(iter(stream)))[0] for stream in streams]
    for completion in completions:
        spans = completion.spans
        assert [span.version for span in spans] == sorted({span.version for span in spans})
        assert all(7 <= span.version <= 13 for span in spans)
        assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
        assert spans[-1].end == len(completion.token_ids) == len(completion.logprobs)
        assert np.isfinite(completion.logprobs).all()
        assert len(completion.token_ids) == 56 or completion.finish_reason == "stop"
    assert any(len(completion.spans) > 1 for completion in completions)
