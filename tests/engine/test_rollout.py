"""The rollout actor on a real vLLM engine, and weights sent to it through the real transfer group."""

from collections.abc import Iterator
from types import SimpleNamespace
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

    from maspo_ray.weight_sync.publisher import WeightPublisher

    publisher = WeightPublisher(ModuleSource(trainer), "gloo", 0, ray.util.get_node_ip_address(), 30.0)
    publisher.connect((0,), [engine], 1)
    return SimpleNamespace(publish=lambda version: publisher.publish(version, (0,)), client=publisher._groups[(0,)][0])


def _prompt(*ids: int) -> Prompt:
    return Prompt("test/0", "", np.array(ids, dtype=np.int32), "")


def _start(engine: Any, prompt: Prompt, max_new_tokens: int, seeds: list[int]) -> Any:
    return engine.generate.options(num_returns="streaming").remote(
        prompt, temperature=TEMPERATURE, max_new_tokens=max_new_tokens, seeds=seeds
    )


def _sample(engine: Any, prompt: Prompt, n: int, max_new_tokens: int) -> list[Completion]:
    objects = [ray.get(reference) for reference in _start(engine, prompt, max_new_tokens, list(range(n)))]
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


def test_rollout_samples_of_a_prompt_share_its_prefill(engine: Any) -> None:
    def watch(actor: Any) -> None:
        run, actor.cached = actor._run, []

        async def watched(*arguments: Any) -> Any:
            output = await run(*arguments)
            actor.cached.append(output.num_cached_tokens)
            return output

        actor._run = watched

    def unwatch(actor: Any) -> list[int]:
        del actor._run
        return actor.cached

    ray.get(engine.__ray_call__.remote(watch))
    # A block is of 32 tokens.
    _sample(engine, _prompt(*range(42, 2, -1)), n=4, max_new_tokens=4)
    assert sorted(ray.get(engine.__ray_call__.remote(unwatch))) == [0, 32, 32, 32]


def test_publish_new_weights_reach_a_tied_output_layer(engine: Any, trainer: PreTrainedModel, publisher: Any) -> None:
    """On CPU vLLM multiplies by a packed copy of the output layer; without packing it again it keeps the old one."""
    assert trainer.config.tie_word_embeddings
    prompt = _prompt(5, 9, 13)
    before = _sample(engine, prompt, n=4, max_new_tokens=8)
    _perturb(trainer)
    assert min(_distance(trainer, prompt, completion) for completion in before) > 0.1
    publisher.publish(7)
    for completion in _sample(engine, prompt, n=4, max_new_tokens=8):
        assert _distance(trainer, prompt, completion) < 1e-3
        assert [(span.version, span.start, span.end) for span in completion.spans] == [
            (7, 0, len(completion.token_ids))
        ]


def _perturb(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def test_publish_blocks_of_the_weights_before_are_not_served_again(
    engine: Any, trainer: PreTrainedModel, publisher: Any
) -> None:
    """Without a salt by version the prompt's first block, of 32 tokens, would be that of the first weights."""
    prompt = _prompt(*range(3, 43))
    for version in (8, 9):
        _perturb(trainer)
        publisher.publish(version)
        for completion in _sample(engine, prompt, n=4, max_new_tokens=8):
            assert _distance(trainer, prompt, completion) < 1e-3


def test_publish_requests_that_come_meanwhile_begin_at_the_new_version(
    engine: Any, trainer: PreTrainedModel, publisher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = _prompt(*range(3, 43))
    _sample(engine, prompt, n=1, max_new_tokens=1)
    streams = []
    receive = publisher.client.update_weights

    def receive_and_start(update_info: Any) -> None:
        # The engine is paused here.
        streams.append(_start(engine, prompt, 8, [0]))
        receive(update_info)

    monkeypatch.setattr(publisher.client, "update_weights", receive_and_start)
    _perturb(trainer)
    publisher.publish(12)
    [[completion]] = [ray.get(next(iter(stream))) for stream in streams]
    assert [span.version for span in completion.spans] == [12]
    assert _distance(trainer, prompt, completion) < 1e-3


def test_publish_keeps_what_running_requests_have_computed(
    engine: Any, trainer: PreTrainedModel, publisher: Any
) -> None:
    """What comes after an update is of the new weights over the old cache: not what computing all of it again would give."""
    prompt = _prompt(*range(3, 8))
    streams = [_start(engine, prompt, 56, [i]) for i in range(24)]
    # Once this one is through, those before it have begun.
    _sample(engine, prompt, n=1, max_new_tokens=1)
    _perturb(trainer)
    publisher.publish(13)
    completions = [ray.get(next(iter(stream)))[0] for stream in streams]
    through = [completion for completion in completions if len(completion.spans) == 2]
    assert through
    for completion in through:
        assert completion.spans[1].version == 13
        ids = np.concatenate([prompt.token_ids, completion.token_ids])
        again = _logprobs(trainer, ids, TEMPERATURE)[len(prompt.token_ids) - 1 :]
        after = slice(completion.spans[1].start, None)
        assert np.abs(again[after] - completion.logprobs[after]).max() > 1e-2


def test_requests_beyond_the_engines_places_wait_for_the_version_that_they_begin_at(
    engine: Any, trainer: PreTrainedModel, publisher: Any
) -> None:
    """The engine has 32 places; those behind them must share no block of the prompt that was computed before the update."""
    prompt = _prompt(*range(3, 43))
    stream = iter(_start(engine, prompt, 20, list(range(96))))
    first = ray.get(next(stream))
    _perturb(trainer)
    publisher.publish(14)
    rest = [ray.get(reference) for reference in stream]
    completions = [completion for batch in [first, *rest[1::2]] for completion in batch]
    assert len(completions) == 96
    begun_after = [c for c in completions if c.spans[0].version == 14]
    assert begun_after and len(begun_after) < len(completions)
    assert max(_distance(trainer, prompt, completion) for completion in begun_after) < 1e-3


def test_publish_with_requests_in_flight_keeps_them_and_stamps_each_version(engine: Any, publisher: Any) -> None:
    streams = [
        engine.generate.options(num_returns="streaming").remote(
            _prompt(3, 4 + i), temperature=2.0, max_new_tokens=56, seeds=[i]
        )
        for i in range(24)
    ]
    for version in range(15, 21):
        publisher.publish(version)
    completions = [ray.get(next(iter(stream)))[0] for stream in streams]
    for completion in completions:
        spans = completion.spans
        assert [span.version for span in spans] == sorted({span.version for span in spans})
        assert all(14 <= span.version <= 20 for span in spans)
        assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
        assert spans[-1].end == len(completion.token_ids) == len(completion.logprobs)
        assert np.isfinite(completion.logprobs).all()
        assert len(completion.token_ids) == 56 or completion.finish_reason == "stop"
    assert any(len(completion.spans) > 1 for completion in completions)


def test_expire_ends_what_began_before_a_version_frees_its_places_and_leaves_the_rest(
    engine: Any, publisher: Any
) -> None:
    prompt = _prompt(*range(3, 8))
    # All of the engine's 32 places.
    old = [_start(engine, prompt, 56, [8 * i + k for k in range(8)]) for i in range(4)]
    _wait_until_begun(engine, [next(iter(stream)) for stream in old])
    publisher.publish(21)
    young = _start(engine, prompt, 8, [0, 1])
    ray.get(engine.expire.remote(21))
    for stream in old:
        objects = [ray.get(reference) for reference in stream]
        assert objects[-2:] == [[], []]
        assert sum(map(len, objects[0::2])) < 8
    completions = [completion for batch in [ray.get(r) for r in young][0::2] for completion in batch]
    assert [completion.spans[0].version for completion in completions] == [21, 21]


def test_expire_of_versions_that_nothing_is_older_than_ends_nothing(engine: Any, publisher: Any) -> None:
    publisher.publish(22)
    stream = _start(engine, _prompt(5, 9), 40, [0, 1, 2, 3])
    ray.get(engine.expire.remote(22))
    assert sum(len(ray.get(reference)) for reference in stream) == 2 * 4


def _wait_until_begun(engine: Any, first: list[Any]) -> None:
    """Returns when each stream has given its first object: what it was of began at the version before the next."""
    ray.wait(first, num_returns=len(first))
