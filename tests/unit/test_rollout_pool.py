"""Which engine a prompt goes to, and what comes back of it; with the real table and fake handles, without Ray."""

import asyncio
from collections.abc import Awaitable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maspo_ray.errors import ActorLate
from maspo_ray.experience import CompletionFacts, Prompt, Sampling, Verdict
from maspo_ray.hosts.engine_table import EngineTable, ReplicaState
from maspo_ray.hosts.messages import Beat, Ended, Expired, Priority, SampleRequest, ScoreCall
from maspo_ray.rollouts.error_watch import ErrorWatch
from maspo_ray.rollouts.pool import RolloutPool
from maspo_ray.run_dir.timeline import Timeline

FACTS = CompletionFacts(3, 2, 2, "stop")


def _prompt(tokens: int) -> Prompt:
    return Prompt("p/0", "", np.zeros(tokens, np.int32), None)


class _Engines:
    """Rollout actors whose requests end when the test says so; know which engine each went to."""

    def __init__(self, count: int) -> None:
        self.asked: list[tuple[int, SampleRequest, asyncio.Future[Any]]] = []
        self.beats: list[Beat] = [Beat(0.5, 2.0, 7, 0, {}) for _ in range(count)]
        self.oldest_versions: list[int | None] = []

    def handle(self, role: str, replica: int) -> Any:
        assert role == "rollout"

        def sample(request: SampleRequest) -> tuple[str, Awaitable[Any]]:
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self.asked.append((replica, request, answer))
            return f"payload of {request.request_id}", answer

        def beat(oldest_version: int | None) -> Awaitable[Beat]:
            self.oldest_versions.append(oldest_version)
            return asyncio.sleep(0, self.beats[replica])

        remote = SimpleNamespace(remote=sample)
        return SimpleNamespace(
            sample=SimpleNamespace(options=lambda num_returns: remote), beat=SimpleNamespace(remote=beat)
        )

    def count(self, role: str) -> int:
        return len(self.beats)


def _pool(
    engines: _Engines, timeout_s: float = 60.0, answer_s: float = 5.0, errors: ErrorWatch | None = None
) -> RolloutPool:
    table = EngineTable(engines.count("rollout"))
    return RolloutPool(engines, table, errors or ErrorWatch(1.0), Timeline(lambda _: None), timeout_s, answer_s)


def _ended(count: int, reward: float = 1.0) -> Ended:
    return Ended((FACTS,) * count, (Verdict.from_reward(reward),) * count)


# How many tokens the prompt of a request that starts has, or which of them is to end.
ACTIONS = st.lists(
    st.one_of(st.tuples(st.just("start"), st.integers(1, 9)), st.tuples(st.just("end"), st.integers(0, 20)))
)


@given(num_engines=st.integers(1, 5), actions=ACTIONS)
def test_sample_goes_to_the_first_engine_with_the_fewest_outstanding_tokens(
    num_engines: int, actions: list[tuple[str, int]]
) -> None:
    samples, new_tokens = 2, 3
    engines = _Engines(num_engines)
    expected: list[int] = []

    async def run() -> None:
        pool = _pool(engines)
        outstanding = [0] * num_engines
        running: dict[int, int] = {}
        async with asyncio.TaskGroup() as tasks:
            for what, number in [*actions, *(("end", i) for i in range(len(actions)))]:
                if what == "start":
                    expected.append(outstanding.index(min(outstanding)))
                    running[len(expected) - 1] = samples * (number + new_tokens)
                    outstanding[expected[-1]] += samples * (number + new_tokens)
                    sampling = Sampling(1.0, new_tokens)
                    tasks.create_task(pool.sample(_prompt(number), sampling, [1] * samples))
                elif number in running:
                    outstanding[expected[number]] -= running.pop(number)
                    engines.asked[number][2].set_result(_ended(samples))
                for _ in range(6):
                    await asyncio.sleep(0)
        assert [pool.table.outstanding(i) for i in range(num_engines)] == [0] * num_engines

    asyncio.run(run())
    assert [engine for engine, *_ in engines.asked] == expected


def test_sample_of_an_engine_that_is_updating_waits_for_none_that_is_up() -> None:
    async def run() -> list[int]:
        engines = _Engines(3)
        pool = _pool(engines)
        pool.table.set_state([0, 1], ReplicaState.UPDATING)
        tasks = [asyncio.ensure_future(pool.sample(_prompt(1), Sampling(1.0, 4), [1])) for _ in range(3)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return [engine for engine, *_ in engines.asked]

    assert asyncio.run(run()) == [2, 2, 2]


def test_sample_returns_the_payload_unread_its_engine_and_the_rollouts() -> None:
    async def run() -> None:
        engines, events = _Engines(2), []
        timeline = Timeline(events.append, iter(range(100, 200)).__next__)
        pool = RolloutPool(engines, EngineTable(2), ErrorWatch(1.0), timeline, 60.0, 5.0)
        task = asyncio.ensure_future(
            pool.sample(_prompt(2), Sampling(0.5, 4), [5, 6], Priority.PROBE, scored=True, replica=1)
        )
        await asyncio.sleep(0)
        [(replica, request, answer)] = engines.asked
        assert (replica, request.seeds, request.priority, request.sampling) == (
            1,
            (5, 6),
            Priority.PROBE,
            Sampling(0.5, 4),
        )
        answer.set_result(
            Ended((FACTS, FACTS), (Verdict.from_reward(1.0), Verdict.from_reward(0.0)), (ScoreCall(3, 2.0, 0.5),))
        )
        sampled = await task
        assert sampled is not None
        assert (sampled.payload, sampled.replica) == (f"payload of {request.request_id}", 1)
        assert [rollout.verdict.reward for rollout in sampled.rollouts] == [1.0, 0.0]
        assert timeline.totals()["reward"] == {"score": 1.5}
        assert pool.describe() == "none with an engine"

    asyncio.run(run())


def test_sample_that_an_engine_ended_for_its_age_is_none() -> None:
    async def run() -> None:
        engines = _Engines(1)
        pool = _pool(engines)
        task = asyncio.ensure_future(pool.sample(_prompt(2), Sampling(1.0, 4), [5]))
        await asyncio.sleep(0)
        engines.asked[0][2].set_result(Expired())
        assert await task is None

    asyncio.run(run())


def test_sample_of_an_engine_that_fails_raises_and_takes_its_work_off_the_table() -> None:
    async def run() -> None:
        engines = _Engines(1)
        pool = _pool(engines)
        task = asyncio.ensure_future(pool.sample(_prompt(2), Sampling(1.0, 4), [5]))
        await asyncio.sleep(0)
        engines.asked[0][2].set_exception(RuntimeError("the engine is out of blocks"))
        with pytest.raises(RuntimeError, match="out of blocks"):
            await task
        assert pool.table.outstanding(0) == 0

    asyncio.run(run())


def test_sample_counts_a_reward_s_faults_by_what_it_was_for() -> None:
    async def run() -> None:
        errors = ErrorWatch(1.0)
        engines = _Engines(1)
        pool = _pool(engines, errors=errors)
        for priority in (Priority.PROBE, Priority.TRAINING, Priority.PROBE):
            task = asyncio.ensure_future(pool.sample(_prompt(2), Sampling(1.0, 4), [5], priority))
            await asyncio.sleep(0)
            unscored = Verdict(float("nan"), False, cause="no", outcome="error")  # type: ignore[arg-type]
            engines.asked[-1][2].set_result(Ended((FACTS,), (unscored,)))
            await task
        assert (errors.errors, errors.evaluation_errors) == (1, 2)

    asyncio.run(run())


def test_beat_gives_idle_share_and_tokens_and_takes_what_is_done_off_the_table() -> None:
    async def run() -> None:
        engines = _Engines(2)
        pool = _pool(engines)
        task = asyncio.ensure_future(pool.sample(_prompt(2), Sampling(1.0, 4), [5, 6, 7]))
        await asyncio.sleep(0)
        assert pool.table.outstanding(0) == 3 * 6
        request_id = engines.asked[0][1].request_id
        engines.beats = [Beat(1.0, 4.0, 10, 2, {request_id: 1}), Beat(4.0, 4.0, 0, 0, {})]
        beats = await pool.beat(7)
        # ¼ and 1 of the time; one of three completions is left.
        assert (beats.idle_share, beats.tokens) == (0.625, 10)
        assert pool.table.outstanding(0) == 6
        assert engines.oldest_versions == [7, 7]
        engines.asked[0][2].set_result(_ended(3))
        await task
        assert pool.table.outstanding(0) == 0

    asyncio.run(run())


@pytest.mark.parametrize("ends_some", [False, True])
def test_check_silence_ends_the_run_where_an_engine_ends_nothing(ends_some: bool) -> None:
    async def run() -> None:
        engines = _Engines(2)
        pool = _pool(engines, timeout_s=0.1)
        task = asyncio.ensure_future(pool.sample(_prompt(2), Sampling(1.0, 4), [5, 6]))
        await asyncio.sleep(0.15)
        engines.beats[0] = Beat(0.0, 1.0, 3, int(ends_some), {engines.asked[0][1].request_id: 2})
        if ends_some:
            await pool.check_silence()
            # What was asked in between is told at the step's end.
            assert (await pool.beat()).tokens == 3 + 3 + 7
        else:
            with pytest.raises(ActorLate, match=r"^rollout/0 has ended no completion for .* rollout.timeout_s is 0.1"):
                await pool.check_silence()
        task.cancel()

    asyncio.run(run())


def test_call_that_was_given_up_is_no_sign_of_life_and_one_that_was_answered_is() -> None:
    async def run() -> list[float]:
        engines = _Engines(1)
        pool = _pool(engines)
        tasks = [asyncio.ensure_future(pool.sample(_prompt(2), Sampling(1.0, 4), [5])) for _ in range(3)]
        await asyncio.sleep(0.1)
        now, silences = asyncio.get_running_loop().time, []
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        silences.append(pool.table.silences(now())[0])
        engines.asked[1][2].set_result(_ended(1))
        await tasks[1]
        silences.append(pool.table.silences(now())[0])
        tasks[2].cancel()
        return silences

    given_up, answered = asyncio.run(run())
    assert answered < 0.1 <= given_up


def test_check_silence_of_engines_without_work_asks_nobody() -> None:
    async def run() -> list[int | None]:
        engines = _Engines(2)
        pool = _pool(engines, timeout_s=0.0)
        await pool.check_silence()
        return engines.oldest_versions

    assert asyncio.run(run()) == []


def test_check_silence_of_an_engine_whose_samples_are_only_being_scored_is_patient() -> None:
    async def run() -> None:
        engines = _Engines(1)
        pool = _pool(engines, timeout_s=0.1)
        task = asyncio.ensure_future(pool.sample(_prompt(2), Sampling(1.0, 4), [5, 6]))
        await asyncio.sleep(0.15)
        engines.beats[0] = Beat(0.0, 1.0, 0, 0, {engines.asked[0][1].request_id: 0})
        await pool.check_silence()
        task.cancel()

    asyncio.run(run())
