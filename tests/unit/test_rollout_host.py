"""The rollout host over an engine and a reward whose every answer the test gives: what comes out of a request, when and in which order."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_house import MOMENT_S, PROMPT, Clock, House, moment_passes, run, settle, whole

from maspo_ray.experience import Completion, VersionSpan
from maspo_ray.hosts.messages import Beat, Ended, Expired, Priority
from maspo_ray.hosts.rollout_host import Answer, date_first_span

# What comes out.


def test_answer_is_in_the_order_of_the_seeds_whichever_ended_first() -> None:
    async def test(house: House) -> Answer:
        answer = house.ask(7, 8, 9)
        await settle()
        for seed, tokens in ((9, 3), (7, 1), (8, 2)):
            house.engine.of(seed).end(tokens)
            await moment_passes()
        assert house.reward.seeds == [[9], [7], [8]]
        return await answer

    group, said = answer = run(test)
    assert whole(answer) == ([7, 8, 9], [7.0, 8.0, 9.0])
    assert group is not None and group.prompt is PROMPT
    assert isinstance(said, Ended) and [fact.num_tokens for fact in said.facts] == [1, 2, 3]


def test_answer_of_a_request_that_is_not_scored_asks_no_reward() -> None:
    async def test(house: House) -> Answer:
        answer = house.ask(7, 8, scored=False)
        await settle()
        for asked in house.engine.running:
            asked.end()
        found = await answer
        assert house.reward.calls == []
        return found

    answer = run(test)
    assert whole(answer) == ([7, 8], [])
    assert isinstance(answer[1], Ended) and answer[1].score_calls == ()


# Places.


def test_probes_overtake_training_that_waits_for_a_place() -> None:
    async def test(house: House) -> list[int | None]:
        answers = [house.ask(1, 2, 3)]
        await settle()
        answers.append(house.ask(8, 9, priority=Priority.PROBE))
        await settle()
        for _ in range(5):
            [running] = house.engine.running
            running.end()
            await settle()
        await asyncio.gather(*answers)
        return [asked.seed for asked in house.engine.asked]

    assert run(test, places=1) == [1, 8, 9, 2, 3]


def test_engine_that_raises_fails_its_request_alone() -> None:
    async def test(house: House) -> None:
        failing, other = house.ask(5, 6, 7), house.ask(8)
        await settle()
        house.engine.of(6).end()
        await settle()
        # One is about to be scored, one takes longer to end than that may wait.
        house.engine.linger_s = 1.5 * MOMENT_S
        house.engine.of(5).completion.set_exception(ValueError("no"))
        with pytest.raises(ValueError, match="^no$"):
            await failing
        assert house.engine.of(7).completion.cancelled()
        assert house.reward.calls == []
        assert (await house.host.beat()).unfinished == {1: 1}
        house.engine.of(8).end()
        assert whole(await other) == ([8], [8.0])
        assert await house.all_places_are_free(4)

    run(test, places=4)


def test_request_that_is_cancelled_leaves_nothing_behind() -> None:
    clock = Clock()

    async def test(house: House) -> None:
        cancelled = house.ask(5, 6, 7)
        await settle()
        house.engine.of(6).end()
        await settle()
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert house.engine.running == []
        clock.now = 103.0
        assert await house.host.beat() == Beat(idle_s=3.0, of_s=3.0, tokens=1, ended=1, unfinished={})
        assert await house.all_places_are_free(2)
        assert house.reward.calls == []

    run(test, places=2, clock=clock)


# Weights.


def test_no_completion_begins_while_weights_change_and_what_runs_goes_on() -> None:
    async def test(house: House) -> None:
        running = house.ask(5)
        await settle()
        await house.host.start_weight_update()
        waiting = house.ask(6, 7)
        await settle()
        assert [asked.seed for asked in house.engine.asked] == [5]
        house.engine.of(5).end()
        assert whole(await running) == ([5], [5.0])
        assert [asked.seed for asked in house.engine.asked] == [5]
        await house.host.finish_weight_update(1)
        await settle()
        assert [(asked.seed, asked.cache_key) for asked in house.engine.asked] == [(5, "v0"), (6, "v1"), (7, "v1")]
        for seed in (6, 7):
            house.engine.of(seed).end(version=1)
        _, said = await waiting
        assert isinstance(said, Ended) and [fact.min_version for fact in said.facts] == [1, 1]
        assert house.engine.weights == ["start", "finish 1"]

    run(test)


def test_no_completion_begins_where_the_next_update_starts_at_once() -> None:
    async def test(house: House) -> None:
        await house.host.start_weight_update()
        waiting = house.ask(5)
        await settle()
        # No turn of the event loop between the two: what waits is awoken within the second.
        await house.host.finish_weight_update(1)
        await house.host.start_weight_update()
        await settle()
        assert house.engine.asked == []
        await house.host.finish_weight_update(2)
        await settle()
        house.engine.of(5).end(version=2)
        _, said = await waiting
        assert house.engine.of(5).cache_key == "v2"
        assert isinstance(said, Ended) and said.facts[0].min_version == 2

    run(test)


def test_completion_is_dated_by_the_weights_that_it_began_with() -> None:
    async def test(house: House) -> Answer:
        answer = house.ask(5)
        await settle()
        await house.update(3)
        # Its prompt was computed after the update: all tokens are stamped with it.
        house.engine.of(5).end(tokens=4, version=3)
        return await answer

    group, said = run(test)
    assert group is not None and group.completions[0].spans == (VersionSpan(0, 0, 4),)
    assert isinstance(said, Ended) and (said.facts[0].min_version, said.facts[0].max_version) == (0, 0)


@pytest.mark.parametrize(
    ("began_with", "stamps", "expected"),
    [
        (3, [(3, 0, 5)], [(3, 0, 5)]),
        (3, [(3, 0, 2), (4, 2, 5)], [(3, 0, 2), (4, 2, 5)]),
        # An update came between the engine's taking it and its first token.
        (3, [(4, 0, 5)], [(3, 0, 5)]),
        (3, [(4, 0, 2), (5, 2, 5)], [(3, 0, 2), (5, 2, 5)]),
    ],
)
def test_spans_begin_at_the_version_that_a_completion_began_with(
    began_with: int, stamps: list[tuple[int, int, int]], expected: list[tuple[int, int, int]]
) -> None:
    ids, logprobs = np.arange(5, dtype=np.int32), np.zeros(5, np.float32)
    completion = date_first_span(
        Completion(ids, logprobs, tuple(VersionSpan(*s) for s in stamps), "length", "x"), began_with
    )
    assert completion.spans == tuple(VersionSpan(*span) for span in expected)
    assert (completion.token_ids is ids, completion.logprobs is logprobs) == (True, True)
    assert (completion.finish_reason, completion.text) == ("length", "x")


def test_engine_that_stamps_weights_that_it_no_longer_has_is_refused() -> None:
    async def test(house: House) -> None:
        await house.update(1)
        answer = house.ask(5)
        await settle()
        house.engine.of(5).end(version=0)
        with pytest.raises(
            ValueError, match=r"^the engine stamped a token with version 0; its completion began with version 1\."
        ):
            await answer

    run(test)


# How it fares.


def test_beat_says_what_ended_what_has_not_and_how_long_the_engine_was_idle() -> None:
    clock = Clock()

    async def test(house: House) -> list[Beat]:
        beats = [await house.host.beat()]
        clock.now = 103.0
        answers = [house.ask(5, 6), house.ask(7)]
        await settle()
        clock.now = 104.0
        beats.append(await house.host.beat())
        house.engine.of(6).end(tokens=3)
        house.engine.of(7).end(tokens=5)
        await settle()
        beats.append(await house.host.beat())
        clock.now = 106.0
        house.engine.of(5).end(tokens=2)
        await asyncio.gather(*answers)
        clock.now = 110.0
        return [*beats, await house.host.beat()]

    assert run(test, clock=clock) == [
        Beat(idle_s=0.0, of_s=0.0, tokens=0, ended=0, unfinished={}),
        Beat(idle_s=3.0, of_s=4.0, tokens=0, ended=0, unfinished={0: 2, 1: 1}),
        Beat(idle_s=0.0, of_s=0.0, tokens=8, ended=2, unfinished={0: 1}),
        # From 106 on.
        Beat(idle_s=4.0, of_s=6.0, tokens=2, ended=1, unfinished={}),
    ]


def test_engine_is_idle_while_its_last_completions_are_scored() -> None:
    clock = Clock()

    async def test(house: House) -> Beat:
        house.reward.open[0].clear()
        answer = house.ask(5)
        await settle()
        house.engine.of(5).end()
        await settle()
        clock.now = 102.0
        beat = await house.host.beat()
        house.reward.open[0].set()
        await answer
        return beat

    assert run(test, clock=clock) == Beat(idle_s=2.0, of_s=2.0, tokens=1, ended=1, unfinished={0: 0})


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["train", "probe", "end", "fail", "cancel", "expire", "start", "finish"]),
        st.integers(0, 20),
        st.integers(0, 3),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(places=st.integers(1, 4), steps=STEPS)
def test_whatever_happens_every_request_comes_out_once_and_the_counts_add_up(
    places: int, steps: list[tuple[str, int, int]]
) -> None:
    async def test(house: House) -> None:
        version, updating = 0, False
        answers: list[asyncio.Task[Answer]] = []
        beats: list[Beat] = []
        for kind, which, turns in steps:
            running, open_answers = house.engine.running, [answer for answer in answers if not answer.done()]
            if kind in ("train", "probe"):
                priority = Priority.TRAINING if kind == "train" else Priority.PROBE
                answers.append(house.ask(*range(which % 3 + 1), priority=priority))
            elif kind == "end" and running:
                running[which % len(running)].end(tokens=which + 1, version=version)
            elif kind == "fail" and running:
                running[which % len(running)].completion.set_exception(ValueError("no"))
            elif kind == "cancel" and open_answers:
                open_answers[which % len(open_answers)].cancel()
            elif kind == "expire":
                beats.append(await house.host.beat(version))
            elif kind == "start" and not updating:
                updating = True
                await house.host.start_weight_update()
            elif kind == "finish" and updating:
                updating, version = False, version + 1
                await house.host.finish_weight_update(version)
            for _ in range(turns):
                await asyncio.sleep(0)
            assert len(house.engine.running) <= places
        if updating:
            await house.host.finish_weight_update(version + 1)
        while not all(answer.done() for answer in answers):
            for asked in house.engine.running:
                asked.end()
            await asyncio.sleep(0)
        for found in await asyncio.gather(*answers, return_exceptions=True):
            if isinstance(found, BaseException):
                assert isinstance(found, ValueError | asyncio.CancelledError)
            elif found != (None, Expired()):
                seeds, rewards = whole(found)
                assert seeds == list(range(len(seeds))) == rewards
        beats.append(await house.host.beat())
        assert beats[-1].unfinished == {}
        # An end that the engine came to in the moment of a cancellation counts or not; no other can be missing or too many.
        ended, tokens = sum(beat.ended for beat in beats), sum(beat.tokens for beat in beats)
        done = [
            a.completion for a in house.engine.asked if not a.completion.cancelled() and not a.completion.exception()
        ]
        assert ended <= len(done) and tokens <= sum(len(completion.result().token_ids) for completion in done)
        groups = [answer.result()[0] for answer in answers if not answer.cancelled() and not answer.exception()]
        assert ended >= sum(len(group.completions) for group in groups if group is not None)
        assert await house.all_places_are_free(places)

    run(test, places=places)
