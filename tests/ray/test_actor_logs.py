"""Actors that really fail, on a real Ray: one line that names them and the log that has their last words."""

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from bench.simulated import simulated_config
from maspo_ray.config import PlacementConfig
from maspo_ray.errors import ActorError, ActorFailed, ActorGone, ActorLate
from maspo_ray.fleet.actor_logs import ACTOR_LOGS
from maspo_ray.fleet.calls import await_all, await_named
from maspo_ray.fleet.fleet import Fleet
from maspo_ray.fleet.placement import RoleDemand
from maspo_ray.fleet.ray_session import connected
from maspo_ray.fleet.reservation import reserve, wait_for_cluster

pytestmark = pytest.mark.ray

# Workers cannot import a test module by its name.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        with connected(PlacementConfig(object_store_gib=0.1)):
            yield


class Plain:
    """An actor as a user writes one: a plain class whose methods are no coroutines."""

    def say(self, words: str) -> int:
        print(words, file=sys.stderr, flush=True)
        return os.getpid()

    def exit(self) -> None:
        os._exit(3)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def keep(self) -> list[Any]:
        # Too large to travel with the answer.
        self.kept = ray.put(bytes(1_000_000))
        return [self.kept]

    def read(self, value: Any) -> int:
        return len(value)

    def fail(self) -> None:
        raise ValueError("no\nanswer")

    def fail_of(self, other: Any) -> None:
        ray.get(other.fail.remote())


class Coroutines:
    """One of which all methods are."""

    async def say(self, words: str) -> int:
        return Plain.say(Plain(), words)

    async def exit(self) -> None:
        os._exit(3)


def _start(actor_class: type, name: str) -> Any:
    handle: Any = ray.remote(actor_class).options(num_cpus=0).remote()
    ACTOR_LOGS.ask(name, handle)
    return handle


def _failure(actor: str, call: Any) -> ActorError:
    with pytest.raises(ActorError) as raised:
        asyncio.run(await_named(actor, "scoring", call))
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)
    return raised.value


def _is_lost(reference: Any) -> bool:
    try:
        ray.get(reference)
    except ray.exceptions.OwnerDiedError:
        return True
    return False


def _log_of(error: ActorError) -> str:
    found = re.search(r" Its log: (\S+worker-\S+\.err) \(node \S+\)$", str(error))
    assert found, str(error)
    return Path(found[1]).read_text()


@pytest.mark.parametrize("actor_class", [Plain, Coroutines])
def test_actor_that_exits_is_gone_and_its_log_has_its_last_words(own_ray: None, actor_class: type) -> None:
    actor = _start(actor_class, "reward/1")
    ray.get(actor.say.remote("these are its last words"))
    error = _failure("reward/1", actor.exit.remote())
    assert type(error) is ActorGone and (error.role, error.replica) == ("reward", 1)
    assert str(error).startswith(
        "reward/1 was lost while scoring: The actor is dead because its worker process has died."
    )
    assert "these are its last words" in _log_of(error)
    # The same of one that is asked later.
    assert str(_failure("reward/1", actor.say.remote("nothing"))) == str(error)


def test_actor_that_is_killed_is_gone(own_ray: None) -> None:
    actor = _start(Plain, "reward/2")
    pid = ray.get(actor.say.remote("killed"))
    call = actor.sleep.remote(60.0)
    os.kill(pid, signal.SIGKILL)
    error = _failure("reward/2", call)
    assert type(error) is ActorGone and "killed" in _log_of(error)


def test_object_lost_with_its_owner_is_gone_for_who_awaits_it_and_for_who_is_given_it(own_ray: None) -> None:
    owner, other = _start(Plain, "rollout/0"), _start(Plain, "reward/3")
    [kept] = ray.get(owner.keep.remote())
    ray.kill(owner)
    # Until the node has noticed, the object is still there.
    while not _is_lost(kept):
        time.sleep(0.2)
    error = _failure("rollout/0", kept)
    assert type(error) is ActorGone and "lost an object while scoring" in str(error)
    error = _failure("reward/3", other.read.remote(kept))
    assert type(error) is ActorGone and str(error).startswith(
        "reward/3 lost an object while scoring: Failed to retrieve"
    )
    assert "The object's owner has exited. Its log" in str(error)


def test_method_that_raises_has_failed_whoever_it_was_called_by(own_ray: None) -> None:
    actor, caller = _start(Plain, "reward/4"), _start(Plain, "rollout/1")
    error = _failure("reward/4", actor.fail.remote())
    assert type(error) is ActorFailed and str(error).startswith(
        "reward/4 failed while scoring: ValueError: no answer. Its log: "
    )
    error = _failure("rollout/1", caller.fail_of.remote(actor))
    assert str(error).startswith("rollout/1 failed while scoring: ValueError: no answer. Its log: ")


def test_late_actors_logs_are_all_named(own_ray: None) -> None:
    actors = {f"reward/{i}": _start(Plain, f"reward/{i}") for i in (5, 6)}
    ray.get([actor.say.remote("here") for actor in actors.values()])
    calls = {name: await_named(name, "scoring", actor.sleep.remote(1.0)) for name, actor in actors.items()}
    with pytest.raises(
        ActorLate, match=r"^reward/5, reward/6 did not .* Their logs: \S+ \(node \S+\), \S+ \(node \S+\)$"
    ):
        asyncio.run(await_all(0.1, "while scoring", calls))


def test_actor_that_died_before_it_could_say_where_its_log_is_is_among_all(own_ray: None) -> None:
    class Stillborn(Plain):
        def __init__(self) -> None:
            raise ValueError("no disk")

    error = _failure("reward/7", _start(Stillborn, "reward/7").say.remote(""))
    assert type(error) is ActorFailed
    assert re.search(r"its creation task, ValueError: no disk. Its log: among those in (\S+)$", str(error))


def test_actor_in_anothers_place_has_its_own_log(own_ray: None) -> None:
    first = _start(Plain, "reward/8")
    second = _start(Plain, "reward/8")
    ray.get([first.say.remote("of the first"), second.say.remote("of the second")])
    error = _failure("reward/8", second.exit.remote())
    assert "of the second" in _log_of(error)


class DyingLearner:
    def __init__(self, **arguments: Any) -> None:
        pass

    def rendezvous(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    def setup(self, address: str, port: int) -> None:
        print("the engine's last words", file=sys.stderr, flush=True)
        os._exit(3)

    def shutdown(self) -> None:
        pass


def test_fleet_names_the_log_of_a_rank_that_dies_in_setting_up(own_ray: None, tmp_path: Path) -> None:
    placed = wait_for_cluster([RoleDemand("learner", 1, None, 0.0, 1.0)], 10.0)
    reservation = reserve(placed, 10.0)
    try:
        fleet = Fleet(simulated_config(tmp_path), {"learner": DyingLearner}, placed, reservation)
        with pytest.raises(ActorGone, match="^learner/0 was lost while setting up: ") as raised:
            asyncio.run(fleet.setup(lambda _: None))
        asyncio.run(fleet.shutdown())
    finally:
        reservation.release()
    assert "the engine's last words" in _log_of(raised.value)


def test_fleet_names_the_log_of_an_actor_of_its_own(own_ray: None, tmp_path: Path) -> None:
    nobody: Any = SimpleNamespace(of_role=lambda role: [])
    none: Any = None
    fleet = Fleet(simulated_config(tmp_path), {}, nobody, none)
    writer = fleet.create_here(Plain)
    ray.get(writer.say.remote("the disk is full"))
    assert "the disk is full" in _log_of(_failure("Plain", writer.fail.remote()))
