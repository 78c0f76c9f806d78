"""The learner's ranks as one thing: what each call gives them, its deadline, and whom a missed one names."""

import asyncio
import math
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maspo_ray.config import CheckpointConfig, LearnerConfig, PipelineConfig, RolloutConfig, UpdateOrder
from maspo_ray.errors import ActorGone, ActorLate
from maspo_ray.fleet.actor_logs import ACTOR_LOGS
from maspo_ray.fleet.learner_group import LearnerDeadlines, LearnerGroup
from maspo_ray.fleet.transfer_sets import transfer_sets

DEADLINES = LearnerDeadlines(setup_s=0.11, step_s=0.12, engine_call_s=0.02, checkpoint_s=0.14)


@pytest.fixture(autouse=True)
def _no_logs() -> None:
    """Of other tests' actors nothing is known here."""
    ACTOR_LOGS.clear()


class _Rank:
    """Answers every call with `answer`, after so many seconds where it is one of `slow`; keeps what it was given."""

    def __init__(self, answer: Any = None, slow: Sequence[str] = ()) -> None:
        self.given: list[tuple[Any, ...]] = []
        self._answer = answer
        self._slow = slow

    def __getattr__(self, method: str) -> SimpleNamespace:
        async def call(*arguments: Any) -> Any:
            self.given.append((method, *arguments))
            if method in self._slow:
                await asyncio.sleep(math.inf)
            return ("10.0.0.1", 29500) if method == "rendezvous" else self._answer

        return SimpleNamespace(remote=call)


class _Actors:
    """Where the ranks and the engines are found, the latter by their replicas."""

    def __init__(self, ranks: Sequence[_Rank], engines: dict[int, Any]) -> None:
        self.roles: dict[str, Any] = {"learner": list(ranks), "rollout": engines}

    def handle(self, role: str, replica: int) -> Any:
        return self.roles[role][replica]

    def count(self, role: str) -> int:
        return len(self.roles[role])


def _group_of(actors: _Actors, share_prompts: bool = False) -> LearnerGroup:
    learner = LearnerConfig(max_tokens_per_micro_batch=64, share_prompts=share_prompts)
    return LearnerGroup(actors, learner, RolloutConfig(), DEADLINES)


def _group(*ranks: _Rank, share_prompts: bool = False, engines: dict[int, Any] | None = None) -> LearnerGroup:
    return _group_of(_Actors(ranks, engines or {}), share_prompts)


def _engine(check: Callable[[], Coroutine[Any, Any, None]]) -> Any:
    return SimpleNamespace(check=SimpleNamespace(remote=check))


async def _alive() -> None:
    pass


async def _silent() -> None:
    await asyncio.sleep(math.inf)


async def _dead() -> None:
    raise ActorGone.of("rollout/4", "rollout/4 was lost while transferring weights: it died")


def test_setup_gives_every_rank_the_first_ones_address_and_says_that_it_is_up() -> None:
    ranks, notes = [_Rank(), _Rank()], []
    group = _group(*ranks)
    asyncio.run(group.setup(notes.append))
    assert [rank.given for rank in ranks] == [
        [("rendezvous",), ("setup", "10.0.0.1", 29500)],
        [("setup", "10.0.0.1", 29500)],
    ]
    assert notes == ["learner/0 is up", "learner/1 is up"]
    assert (group.data_ranks, group.shares_prompts) == (2, False)


@pytest.mark.parametrize("can_share", [True, False])
def test_setup_asks_whether_prompts_can_be_shared_and_says_when_they_cannot(can_share: bool) -> None:
    notes: list[str] = []
    group = _group(_Rank(can_share), share_prompts=True)
    asyncio.run(group.setup(notes.append))
    assert group.shares_prompts is can_share
    assert any("cannot share" in note for note in notes) is not can_share


def test_calls_give_each_rank_its_share_and_return_what_rank_0_answers(tmp_path: Path) -> None:
    ranks = [_Rank("of rank 0"), _Rank("of rank 1")]
    shares: Any = [(("plan of 0",), ("a", "b")), (("plan of 1",), ("c",))]
    pairs: Any = [("prompt", "completion")]

    async def run() -> list[Any]:
        group = _group(*ranks, engines={2: "engine 2", 3: "engine 3"})
        await group.connect((2, 3))
        answers = [await group.train(6, shares), await group.publish(7, (2, 3)), await group.logprobs(pairs)]
        await group.save(tmp_path / "a" / ".." / "b")
        await group.save_state(tmp_path / "c")
        await group.load_state(tmp_path / "d")
        return answers

    assert asyncio.run(run()) == ["of rank 0"] * 3
    assert ranks[1].given == [
        ("connect", (2, 3), ("engine 2", "engine 3"), 1, "gloo", 0.02),
        ("train_step", 6, ("plan of 1",), "c"),
        ("publish", 7, (2, 3)),
        ("completion_logprobs", pairs),
        ("save", str(tmp_path / "b")),
        ("save_state", str(tmp_path / "c")),
        ("load_state", str(tmp_path / "d")),
    ]
    assert ranks[0].given[1] == ("train_step", 6, ("plan of 0",), "a", "b")


CALLS: dict[str, tuple[str, Callable[[LearnerGroup], Coroutine[Any, Any, Any]], str, str]] = {
    "rendezvous": (
        "rendezvous",
        lambda group: group.setup(lambda _: None),
        "0.11 s while starting",
        "pipeline.setup_timeout_s",
    ),
    "setup": (
        "setup",
        lambda group: group.setup(lambda _: None),
        "0.11 s while setting up",
        "pipeline.setup_timeout_s",
    ),
    "train": (
        "train_step",
        lambda group: group.train(0, [((), ())]),
        "0.12 s while training",
        "pipeline.step_timeout_s",
    ),
    "logprobs": (
        "completion_logprobs",
        lambda group: group.logprobs([]),
        "0.12 s while scoring completions",
        "pipeline.step_timeout_s",
    ),
    "save": ("save", lambda group: group.save(Path()), "0.14 s while saving the model", "checkpoint.timeout_s"),
    "save_state": (
        "save_state",
        lambda group: group.save_state(Path()),
        "0.14 s while saving its state",
        "checkpoint.timeout_s",
    ),
    "load_state": (
        "load_state",
        lambda group: group.load_state(Path()),
        "0.14 s while loading its state",
        "checkpoint.timeout_s",
    ),
    "connect": (
        "connect",
        lambda group: group.connect(()),
        "0.12 s while connecting to the engines",
        "pipeline.weight_sync_timeout_s",
    ),
}


@pytest.mark.parametrize(("slow", "call", "said", "deadline"), CALLS.values(), ids=CALLS)
def test_call_that_is_late_names_the_rank_and_its_own_deadline(
    slow: str, call: Callable[[LearnerGroup], Coroutine[Any, Any, Any]], said: str, deadline: str
) -> None:
    with pytest.raises(ActorLate) as raised:
        asyncio.run(call(_group(_Rank(slow=[slow]))))
    assert str(raised.value).startswith(
        f"learner/0 did not answer within {said}; the deadline follows from {deadline}."
    )
    assert raised.value.actor == "learner/0"


def test_deadlines_are_the_configs() -> None:
    pipeline = PipelineConfig(setup_timeout_s=1, step_timeout_s=2, weight_sync_timeout_s=3)
    assert LearnerDeadlines.of(pipeline, CheckpointConfig(timeout_s=4)) == LearnerDeadlines(1, 2, 3, 4)


def _publish(rank: _Rank, engines: list[Callable[[], Coroutine[Any, Any, None]]]) -> Any:
    """Returns what comes of publishing to rollout/3, rollout/4, …, which give such signs of life."""
    replicas = tuple(range(3, 3 + len(engines)))

    async def run() -> Any:
        handles = {replica: _engine(check) for replica, check in zip(replicas, engines, strict=True)}
        group = _group(rank, engines=handles)
        await group.connect(replicas)
        return await group.publish(3, replicas)

    return asyncio.run(run())


@pytest.mark.parametrize(("check", "kind"), [(_silent, ActorLate), (_dead, ActorGone)])
def test_publish_that_is_late_is_the_failure_of_the_engine_that_gives_no_sign_of_life(
    check: Callable[[], Coroutine[Any, Any, None]], kind: type[ActorLate | ActorGone]
) -> None:
    with pytest.raises(
        kind, match=r"^learner/0 did not answer within 0\.12 s while publishing version 3.* rollout/4 "
    ) as raised:
        _publish(_Rank(slow=["publish"]), [_alive, check])
    assert raised.value.actor == "rollout/4"


def test_publish_that_is_late_while_all_engines_answer_names_the_learner() -> None:
    with pytest.raises(ActorLate, match=r"^learner/0 did not answer within 0\.12 s while publishing version 3; [^/]*$"):
        _publish(_Rank(slow=["publish"]), [_alive, _alive])


def test_publish_in_time_asks_no_engine() -> None:
    assert _publish(_Rank(7), [_silent]) == 7


def test_publish_to_a_group_that_another_has_replaced_is_a_bug() -> None:
    async def run() -> None:
        group = _group(_Rank(), engines=dict.fromkeys(range(2), _engine(_alive)))
        await group.connect((0, 1))
        await group.connect((1,))
        await group.publish(3, (1,))
        await group.publish(3, (0, 1))

    with pytest.raises(AssertionError, match=r"no transfer group is of the rollout actors \(0, 1\)"):
        asyncio.run(run())


def test_replica_that_was_replaced_is_called_by_its_new_handle() -> None:
    old, new = _Rank(), _Rank()
    actors = _Actors([old], {0: "old engine"})

    async def run() -> None:
        group = _group_of(actors)
        await group.connect((0,))
        actors.roles = {"learner": [new], "rollout": {0: "new engine"}}
        await group.connect((0,))
        await group.publish(1, (0,))

    asyncio.run(run())
    assert [call[:3] for call in old.given] == [("connect", (0,), ("old engine",))]
    assert [call[:3] for call in new.given] == [("connect", (0,), ("new engine",)), ("publish", 1, (0,))]


@pytest.mark.parametrize(
    ("num_engines", "update", "sets"),
    [(3, "together", ((0, 1, 2),)), (3, "rolling", ((0,), (1,), (2,))), (0, "together", ()), (0, "rolling", ())],
)
def test_transfer_sets_are_one_for_all_or_one_for_each(
    num_engines: int, update: UpdateOrder, sets: tuple[tuple[int, ...], ...]
) -> None:
    assert transfer_sets(num_engines, update) == sets
