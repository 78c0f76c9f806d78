"""A host's completions with the reward: what is asked by one call, and what becomes of a reward that answers nothing."""

import asyncio
from collections.abc import Awaitable, Sequence

import pytest
from rollout_house import Clock, House, moment_passes, run, settle, whole

from maspo_ray.errors import ActorLate, RunError
from maspo_ray.experience import Completion, Prompt, Verdict
from maspo_ray.hosts.messages import Ended
from maspo_ray.hosts.rollout_host import Answer


def test_completions_that_end_together_are_scored_by_one_call_and_those_apart_by_several() -> None:
    async def test(house: House) -> Answer:
        answer = house.ask(5, 6, 7, 8)
        await settle()
        for seed in (7, 5):
            house.engine.of(seed).end()
            await settle()
        # They wait for others of the moment.
        assert house.reward.calls == []
        await moment_passes()
        assert house.reward.seeds == [[7, 5]]
        house.engine.of(8).end()
        house.engine.of(6).end()
        await settle()
        # Nobody else can come.
        assert house.reward.seeds == [[7, 5], [8, 6]]
        return await answer

    answer = run(test)
    assert whole(answer) == ([5, 6, 7, 8], [5.0, 6.0, 7.0, 8.0])
    assert isinstance(answer[1], Ended) and len(answer[1].score_calls) == 2


def test_score_calls_are_in_seconds_before_the_answer_and_go_to_the_least_loaded_reward() -> None:
    clock = Clock()

    async def test(house: House) -> Answer:
        for event in house.reward.open:
            event.clear()
        answer = house.ask(5, 6)
        await settle()
        house.engine.of(5).end()
        await moment_passes()
        clock.now = 102.0
        house.engine.of(6).end()
        await settle()
        assert house.reward.calls == [(0, [5]), (1, [6])]
        clock.now = 103.0
        house.reward.open[1].set()
        await settle()
        clock.now = 107.0
        house.reward.open[0].set()
        return await answer

    _, said = run(test, clock=clock)
    # The first from 100 to 107, the second from 102 to 103; told of at 107, as they ended.
    assert isinstance(said, Ended) and said.score_calls == ((1, 5.0, 4.0), (0, 7.0, 0.0))


def test_reward_that_answers_nothing_is_late_by_name_and_others_go_on() -> None:
    async def test(house: House) -> float:
        house.reward.open[0].clear()
        answers = [house.ask(seed) for seed in (5, 6, 7, 8)]
        await settle()
        started = asyncio.get_running_loop().time()
        for asked in house.engine.running:
            asked.end()
        # By turns: two of them by the replica that answers nothing.
        found = await asyncio.gather(*answers, return_exceptions=True)
        late = [error for error in found if isinstance(error, ActorLate)]
        assert [(error.role, error.replica) for error in late] == [("reward", 0)] * 2
        await settle()
        assert sorted(house.reward.given_up) == [[5], [7]]
        assert str(late[0]).startswith("reward/0 has answered nothing for ")
        assert sorted(whole(answer)[0][0] for answer in found if not isinstance(answer, BaseException)) == [6, 8]
        assert await house.all_places_are_free(4)
        return asyncio.get_running_loop().time() - started

    # That the first was given up is no sign of the replica's life to the second.
    assert 0.5 <= run(test, places=4, deadline_s=0.5) < 0.9


def test_reward_that_answers_one_after_the_other_is_not_late() -> None:
    async def test(house: House) -> list[float]:
        turn = asyncio.Lock()
        inner = house.reward.score

        async def one_by_one(replica: int, prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
            async with turn:
                await asyncio.sleep(0.1)
                return await inner(replica, prompt, completions)

        await house.host.connect_rewards(1, one_by_one)
        answers = [house.ask(seed) for seed in range(1, 6)]
        await settle()
        for asked in house.engine.running:
            asked.end()
        # The last waits for 0.5 s, which is longer than any may answer nothing.
        return [reward for answer in await asyncio.gather(*answers) for reward in whole(answer)[1]]

    assert run(test, deadline_s=0.25) == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_reward_that_cannot_be_called_fails_the_request_and_keeps_no_work() -> None:
    async def test(house: House) -> list[int]:
        inner, replicas = house.reward.score, []

        def gone_at_first(replica: int, prompt: Prompt, completions: Sequence[Completion]) -> Awaitable[list[Verdict]]:
            replicas.append(replica)
            if len(replicas) == 1:
                raise RunError("reward/0 is gone")
            return inner(replica, prompt, completions)

        await house.host.connect_rewards(2, gone_at_first)
        answers = []
        for seed in (5, 6):
            answers.append(house.ask(seed))
            await settle()
            house.engine.of(seed).end()
            await asyncio.wait(answers)
        with pytest.raises(RunError, match="^reward/0 is gone$"):
            answers[0].result()
        assert whole(answers[1].result()) == ([6], [6.0])
        return replicas

    # The first replica again: it is the least loaded.
    assert run(test) == [0, 0]


def test_reward_with_a_verdict_too_few_is_refused() -> None:
    async def test(house: House) -> None:
        async def too_few(replica: int, prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
            return [Verdict.from_reward(1.0)]

        await house.host.connect_rewards(1, too_few)
        answer = house.ask(5, 6)
        await settle()
        for asked in house.engine.running:
            asked.end()
        with pytest.raises(RunError, match="^reward/0 gave 1 verdicts for 2 completions$"):
            await answer

    run(test)
