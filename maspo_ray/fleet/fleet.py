"""Specs → actor handles, started together, ended together.

Promise: every actor of a run is created here, wrapped with `ray.remote` in one place, in the slot that the plan gave its role, and asked
where its log is; an actor that fails to set up is named with its cause; `shutdown` leaves none behind. The learner's ranks are called
through `learner`.
"""

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from maspo_ray.config import RunConfig
from maspo_ray.fleet.actor_logs import ACTOR_LOGS
from maspo_ray.fleet.calls import await_all, await_named
from maspo_ray.fleet.learner_group import LearnerDeadlines, LearnerGroup
from maspo_ray.fleet.placement import Plan, Slot
from maspo_ray.fleet.ray_session import object_store_used_bytes
from maspo_ray.fleet.reservation import Reservation
from maspo_ray.fleet.transfer_sets import transfer_sets
from maspo_ray.hosts.reward_host import RewardHost

_SHUTDOWN_S = 5.0
_MORE_CALLS = 4096
"""Calls that an async actor holds at once besides one for each group under way, so that a weight update never waits behind these; what
it works on at once is its engine's affair."""
CPU_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
"""Without these glibc returns large blocks to the system after each step and faults them in again: 10-25 % of a CPU step, and a third
of the time in which an engine loads weights."""


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
        self.learner = LearnerGroup(self._actors["learner"], config.learner, config.rollout, deadlines)

    def of_role(self, role: str) -> list[Any]:
        """Returns the handles of a role's replicas."""
        return self._actors[role]

    def handle(self, role: str, replica: int) -> Any:
        """Returns the handle of the actor that is a role's replica now; to be looked up for each call."""
        return self._actors[role][replica]

    def count(self, role: str) -> int:
        """Returns how many replicas a role has."""
        return len(self._actors[role])

    @staticmethod
    def put(value: Any) -> Any:
        """Returns a reference to a value in the object store, which keeps it as long as the reference is held."""
        return ray.put(value)

    @staticmethod
    async def object_store_used_bytes() -> float:
        return await asyncio.to_thread(object_store_used_bytes)

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
        config, threads = self._config, self._threads(slot)
        section = getattr(config, slot.role)
        if slot.role == "reward":
            arguments = {
                "reward_class": self._classes["reward"],
                "args": section.args,
                "timeout_s": section.timeout_s,
            }
            return RewardHost, arguments, True
        if slot.role == "rollout":
            arguments = {
                "model": config.model,
                "rollout": config.rollout,
                "max_model_tokens": config.max_model_tokens,
                "threads": threads,
                "seed": config.seed + slot.replica,
            }
        elif slot.role == "reference":
            arguments = {"model": config.model, "temperature": config.rollout.temperature, "threads": threads}
        else:
            arguments = {
                "model": config.model,
                "learner": config.learner,
                "objective": config.objective,
                "kl": config.kl,
                "temperature": config.rollout.temperature,
                "total_updates": config.pipeline.steps * config.learner.updates_per_batch,
                "rank": slot.replica,
                "world_size": self._world_size,
                "threads": threads,
                "seed": config.seed,
            }
        return self._classes[slot.role], {**arguments, **section.args}, slot.role == "rollout"

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
        for replicas in transfer_sets(self.count("rollout"), self._config.rollout.update):
            await self.learner.connect(replicas, [self.handle("rollout", replica) for replica in replicas])

    async def shutdown(self) -> None:
        """Lets every actor that can end itself do so, within a deadline, then ends all."""
        ending = [handle.shutdown.remote() for handle in self._actors["rollout"]] + self.learner.end()
        await asyncio.to_thread(ray.wait, ending, num_returns=len(ending), timeout=_SHUTDOWN_S)
        for handles in self._actors.values():
            for handle in handles:
                ray.kill(handle)


def import_path() -> str:
    """Returns the PYTHONPATH of what this process starts: where it finds the user's modules they must find them too."""
    return os.pathsep.join(dict.fromkeys([os.getcwd(), *filter(None, sys.path)]))


def actor_environment(slot: Slot, threads: int) -> dict[str, str]:
    """Returns the environment that an actor's process starts with; what must be set before an engine is imported."""
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": import_path(),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
    if slot.gpus == 0:
        # Ray 2.60 leaves all GPUs of the node visible to an actor that asked for none.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if slot.role != "reward" and slot.gpus == 0:
        environment |= CPU_ALLOCATOR
    return environment
