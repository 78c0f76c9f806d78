"""The rollout actor on a real vLLM engine, and weights sent to it through the real transfer group."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from numpy.typing import NDArray
from rollouts import ask, completions_of, make_prompt, sample, start_rollout
from transformers import AutoModelForCausalLM, PreTrainedModel

from maspo_ray.experience import Completion, Prompt
from maspo_ray.hosts.messages import Expired, Priority

pytestmark = [pytest.mark.engine, pytest.mark.ray]
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def engine(tiny_model: str, own_ray: None) -> Iterator[Any]:
    actor = start_rollout(tiny_model, cpus=1)
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


def _start(engine: Any, prompt: Prompt, max_new_tokens: int, seeds: list[int]) -> tuple[Any, Any]:
    return ask(engine, prompt, seeds, max_new_tokens, TEMPERATURE)


def _sample(engine: Any, prompt: Prompt, n: int, max_new_tokens: int) -> list[Completion]:
    return sample(engine, prompt, range(n), max_new_tokens, TEMPERATURE)


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
    prompt = make_prompt(5, 9, 13)
    completions = _sample(engine, prompt, n=8, max_new_tokens=16)
    assert max(_distance(trainer, prompt, completion) for completion in completions) < 1e-3


def test_rollout_samples_with_the_same_seed_are_equal_and_with_others_differ(engine: Any) -> None:
    first, second = (_sample(engine, make_prompt(5, 9), n=4, max_new_tokens=12) for _ in range(2))
    texts = [sorted(completion.token_ids.tobytes() for completion in run) for run in (first, second)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 4


def test_rollout_samples_of_a_prompt_share_its_prefill(engine: Any) -> None:
    def watch(host: Any) -> None:
        engine, host.cached = host._engine._engine, []
        generate = engine.generate

        async def watched(*arguments: Any) -> Any:
            async for output in generate(*arguments):
                yield output
            host.cached.append(output.num_cached_tokens)

        engine.generate = watched

    def unwatch(host: Any) -> list[int]:
        del host._engine._engine.generate
        return host.cached

    ray.get(engine.__ray_call__.remote(watch))
    # A block is of 32 tokens.
    _sample(engine, make_prompt(*range(42, 2, -1)), n=4, max_new_tokens=4)
    assert sorted(ray.get(engine.__ray_call__.remote(unwatch))) == [0, 32, 32, 32]


def test_publish_new_weights_reach_a_tied_output_layer(engine: Any, trainer: PreTrainedModel, publisher: Any) -> None:
    """On CPU vLLM multiplies by a packed copy of the output layer; without packing it again it keeps the old one."""
    assert trainer.config.tie_word_embeddings
    prompt = make_prompt(5, 9, 13)
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
    prompt = make_prompt(*range(3, 43))
    for version in (8, 9):
        _perturb(trainer)
        publisher.publish(version)
        for completion in _sample(engine, prompt, n=4, max_new_tokens=8):
            assert _distance(trainer, prompt, completion) < 1e-3


def test_publish_requests_that_come_meanwhile_begin_at_the_new_version(
    engine: Any, trainer: PreTrainedModel, publisher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = make_prompt(*range(3, 43))
    _sample(engine, prompt, n=1, max_new_tokens=1)
    asked = []
    receive = publisher.client.update_weights

    def receive_and_start(update_info: Any) -> None:
        # The engine is paused here.
        asked.append(_start(engine, prompt, 8, [0]))
        receive(update_info)

    monkeypatch.setattr(publisher.client, "update_weights", receive_and_start)
    _perturb(trainer)
    publisher.publish(12)
    [[completion]] = map(completions_of, asked)
    assert [span.version for span in completion.spans] == [12]
    assert _distance(trainer, prompt, completion) < 1e-3


def test_publish_keeps_what_running_requests_have_computed(
    engine: Any, trainer: PreTrainedModel, publisher: Any
) -> None:
    """What comes after an update is of the new weights over the old cache: not what computing all of it again would give."""
    prompt = make_prompt(*range(3, 8))
    # Five times as many as the engine has places: whenever the update comes, some are running.
    asked = [_start(engine, prompt, 56, list(range(8 * i, 8 * i + 8))) for i in range(20)]
    completions_of(asked[0])
    _perturb(trainer)
    publisher.publish(13)
    completions = [completion for one in asked for completion in completions_of(one)]
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
    prompt = make_prompt(*range(3, 43))
    # Twelve times as many as there are places: whenever the update comes, some have not begun.
    asked = [_start(engine, prompt, 20, list(range(8 * i, 8 * i + 8))) for i in range(48)]
    completions_of(asked[0])
    _perturb(trainer)
    publisher.publish(14)
    completions = [completion for one in asked for completion in completions_of(one)]
    assert len(completions) == 384
    begun_after = [c for c in completions if c.spans[0].version == 14]
    assert begun_after and len(begun_after) < len(completions)
    assert max(_distance(trainer, prompt, completion) for completion in begun_after) < 1e-3


def test_publish_with_requests_in_flight_keeps_them_and_stamps_each_version(engine: Any, publisher: Any) -> None:
    asked = [ask(engine, make_prompt(3, 4 + i), range(5), 56, temperature=2.0) for i in range(24)]
    for version in range(15, 21):
        publisher.publish(version)
    completions = [completion for one in asked for completion in completions_of(one)]
    for completion in completions:
        spans = completion.spans
        assert [span.version for span in spans] == sorted({span.version for span in spans})
        assert all(14 <= span.version <= 20 for span in spans)
        assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
        assert spans[-1].end == len(completion.token_ids) == len(completion.logprobs)
        assert np.isfinite(completion.logprobs).all()
        assert len(completion.token_ids) == 56 or completion.finish_reason == "stop"
    assert any(len(completion.spans) > 1 for completion in completions)


def _wait_for_beat(engine: Any, ended: int) -> None:
    """Returns when so many completions have ended since the last beat."""
    while ended > 0:
        ended -= ray.get(engine.beat.remote()).ended


def test_beat_ends_what_began_before_a_version_frees_its_places_and_leaves_the_rest(
    engine: Any, publisher: Any
) -> None:
    prompt = make_prompt(*range(3, 8))
    ray.get(engine.beat.remote())
    # Six times as many as the engine has places: whenever the update comes, some are running and some have not begun.
    old = [_start(engine, prompt, 56, [8 * i + k for k in range(8)]) for i in range(24)]
    _wait_for_beat(engine, ended=1)
    publisher.publish(21)
    young = _start(engine, prompt, 8, [0, 1])
    ray.get(engine.beat.remote(21))
    whole = [asked for asked in old if ray.get(asked[1]) != Expired()]
    assert len(whole) < len(old)
    begun = [{completion.spans[0].version for completion in completions_of(asked)} for asked in whole]
    # What began before the update and is whole had ended by then.
    assert {21} in begun and all(versions in ({20}, {21}) for versions in begun)
    assert [completion.spans[0].version for completion in completions_of(young)] == [21, 21]
    assert ray.get(engine.beat.remote()).unfinished == {}


def test_beat_of_a_version_that_nothing_is_older_than_ends_nothing(engine: Any, publisher: Any) -> None:
    publisher.publish(22)
    asked = _start(engine, make_prompt(5, 9), 40, [0, 1, 2, 3])
    ray.get(engine.beat.remote(22))
    assert len(completions_of(asked)) == 4


def test_probes_go_before_what_waits_for_a_place(engine: Any) -> None:
    prompt = make_prompt(*range(3, 8))
    backlog = [_start(engine, prompt, 56, [16 * i + k for k in range(16)]) for i in range(12)]
    probe = ask(engine, make_prompt(5, 9), [0], 1, TEMPERATURE, Priority.PROBE)
    ray.get(probe[1])
    # Of 192 completions 32 have a place at once.
    ended, _ = ray.wait([answer for _, answer in backlog], num_returns=12, timeout=0)
    assert len(ended) <= 4
    for asked in backlog:
        completions_of(asked)


def test_weight_checksum_changes_with_the_weights_alone(engine: Any, trainer: PreTrainedModel, publisher: Any) -> None:
    before = ray.get(engine.weight_checksum.remote())
    publisher.publish(23)
    assert ray.get(engine.weight_checksum.remote()) == before
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.mul_(1 + 1e-5)
    publisher.publish(24)
    assert ray.get(engine.weight_checksum.remote()) != before
