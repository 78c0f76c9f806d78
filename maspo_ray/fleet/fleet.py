"""Specs → actor handles, started together, ended together.

Promise: every actor of a run is created here, wrapped with `ray.remote` in one place, in the slot that the plan gave its role, and asked
where its log is; an actor that fails to set up is named with its cause; `shutdown` leaves none behind. The learner's ranks are called
through `learner`.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from maspo_ray.config import RewardConfig, RunConfig
from maspo_ray.errors import RunError
from maspo_ray.fleet.actor_logs import ACTOR_LOGS
from maspo_ray.fleet.blueprint import constructor_arguments
from maspo_ray.fleet.calls import await_all, await_named
from maspo_ray.fleet.environment import actor_environment, import_path
from maspo_ray.fleet.learner_group import LearnerDeadlines, LearnerGroup
from maspo_ray.fleet.placement import Plan, Slot
from maspo_ray.fleet.ray_session import object_store_used_bytes
from maspo_ray.fleet.reservation import Reservation
from maspo_ray.fleet.reward_calls import RewardCalls
from maspo_ray.fleet.transfer_sets import transfer_sets
from maspo_ray.hosts.reward_host import RewardHost
from maspo_ray.hosts.rollout_host import RolloutHost
from maspo_ray.threads import call_aside

_SHUTDOWN_S = 5.0
_KILL_S = 3.0
"""What Ray may take to end actors: it asks its head, which may be gone."""
_MORE_CALLS = 4096
"""Calls that Ray lets an async actor run at once besides one for each group under way: room for evaluations, probes and the calls of a
weight update, which must not queue behind groups. How many completions an engine works on at once is its host's affair
(`rollout.max_concurrent_requests`)."""
_GRACE_S = 10.0
_STATE_S = 120.0
"""Ray's own state is asked for in every step; it comes within milliseconds while its head lives."""


def score_deadline_s(reward: RewardConfig, group_size: int) -> float:
    """Returns how long a reward actor may answer no call: by `reward.timeout_s` one of a whole group has ended, scored together and then,
    where that raised, each completion by itself."""
    return reward.timeout_s * (group_size + 1) + _GRACE_S


class Fleet:
    """The actors of a run, by role, in the order of their replicas.

    Attributes:
        learner: all its ranks.
    """

    def __init__(self, config: RunConfig, classes: dict[str, type], plan: Plan, reservation: Reservation) -> None:
        self._config = config
        self._classes = classes
        self._world_size = len(plan.of_role("learner"))
        self._actors = {
            role: [self._create(slot, reservation) for slot in plan.of_role(role)]
            for role in ("rollout", "reward", "reference", "learner")
        }
        deadlines = LearnerDeadlines.of(config.pipeline, config.checkpoint)
        self.learner = LearnerGroup(self, config.learner, config.rollout, deadlines)

    def handle(self, role: str, replica: int) -> Any:
        """Returns the handle of the actor that is a role's replica now; to be looked up for each call."""
        return self._actors[role][replica]

    def count(self, role: str) -> int:
        """Returns how many replicas a role has."""
        return len(self._actors[role])

    @property
    def transfer_sets(self) -> tuple[tuple[int, ...], ...]:
        """The rollout replicas that change their weights together, one set after the other."""
        return transfer_sets(self.count("rollout"), self._config.rollout.update)

    @staticmethod
    async def object_store_used_bytes() -> float:
        try:
            async with asyncio.timeout(_STATE_S):
                return await call_aside(object_store_used_bytes)
        except TimeoutError:
            silence = f"Ray has not said for {_STATE_S:g} s how full its object store is"
            raise RunError(f"{silence}: its head is gone, or overloaded. See `ray status`.") from None

    def create_here(self, actor_class: type) -> Any:
        """Returns an actor of the framework's own on this process's node, which sees the run's folder; it takes none of the CPUs. Its
        name in a failure is its class's."""
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        environment = {"env_vars": {"PYTHONPATH": import_path()}}
        handle: Any = (
            ray.remote(actor_class).options(num_cpus=0, scheduling_strategy=node, runtime_env=environment).remote()
        )
        ACTOR_LOGS.ask(actor_class.__name__, handle)
        self._actors.setdefault("own", []).append(handle)
        return handle

    def _create(self, slot: Slot, reservation: Reservation) -> Any:
        actor_class, arguments, is_async = self._blueprint(slot)
        handle: Any = (
            ray.remote(actor_class)
            .options(
                num_cpus=slot.cpus,
                num_gpus=slot.gpus,
                scheduling_strategy=reservation.strategy(slot),
                max_concurrency=self._config.pipeline.max_groups_under_way + _MORE_CALLS if is_async else 1,
                runtime_env={"env_vars": actor_environment(slot, self._threads(slot))},
            )
            .remote(**arguments)
        )
        ACTOR_LOGS.ask(f"{slot.role}/{slot.replica}", handle)
        return handle

    def _blueprint(self, slot: Slot) -> tuple[type, dict[str, Any], bool]:
        """Returns the class to start in a slot, its constructor's arguments, and whether its methods are coroutines."""
        config = self._config
        section = getattr(config, slot.role)
        arguments = constructor_arguments(config, slot.role, slot.replica, self._threads(slot), self._world_size)
        if slot.role == "reward":
            hosted = {"reward_class": self._classes["reward"], "args": section.args, "timeout_s": section.timeout_s}
            return RewardHost, hosted, True
        if slot.role == "rollout":
            hosted = {
                "engine_class": self._classes["rollout"],
                "arguments": {**arguments, **section.args},
                "max_concurrent_requests": config.rollout.max_concurrent_requests,
                "score_deadline_s": score_deadline_s(config.reward, config.rollout.group_size),
            }
            return RolloutHost, hosted, True
        return self._classes[slot.role], {**arguments, **section.args}, False

    def _threads(self, slot: Slot) -> int:
        """Returns how many threads an engine gets: what its section says, or its share of CPUs."""
        return getattr(self._config, slot.role).threads or max(1, int(slot.cpus))

    async def setup(self, note: Callable[[str], None]) -> None:
        """Sets up all actors at once and opens the weight-transfer groups, if there is anyone to transfer to."""

        async def set_up(role: str, replica: int) -> None:
            actor = f"{role}/{replica}"
            await await_named(actor, "setting up", self.handle(role, replica).setup.remote())
            note(f"{actor} is up")

        calls = {
            f"{role}/{replica}": set_up(role, replica)
            for role in ("rollout", "reward", "reference")
            for replica in range(self.count(role))
        }
        where = "while setting up; the deadline is pipeline.setup_timeout_s"
        await asyncio.gather(self.learner.setup(note), await_all(self._config.pipeline.setup_timeout_s, where, calls))
        await self._connect_rewards()
        for replicas in self.transfer_sets:
            await self.learner.connect(replicas)

    async def _connect_rewards(self) -> None:
        """Tells the rollout hosts where completions are scored."""
        rewards, num_rewards = RewardCalls(self._actors["reward"]), self.count("reward")
        calls = {}
        for replica in range(self.count("rollout")):
            call = self.handle("rollout", replica).connect_rewards.remote(num_rewards, rewards)
            calls[f"rollout/{replica}"] = await_named(f"rollout/{replica}", "taking the reward actors", call)
        where = "when given the reward actors; the deadline is pipeline.setup_timeout_s"
        await await_all(self._config.pipeline.setup_timeout_s, where, calls)

    async def shutdown(self) -> None:
        """Lets every actor that can end itself do so, within a deadline, then ends all; also where Ray itself has ended."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_SHUTDOWN_S + _KILL_S):
                await call_aside(self._end_actors)
        ACTOR_LOGS.clear()

    def _end_actors(self) -> None:
        ending = [handle.shutdown.remote() for role in ("rollout", "reward") for handle in self._actors[role]]
        ending += self.learner.end()
        ray.wait(ending, num_returns=len(ending), timeout=_SHUTDOWN_S)
        for handles in self._actors.values():
            for handle in handles:
                ray.kill(handle)
