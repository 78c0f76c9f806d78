"""Specs → actor handles, started together, ended together.

Promise: every actor of a run is created here, wrapped with `ray.remote` in one place, in the slot that the plan gave its role; an actor that
fails to set up is named with its cause; `shutdown` leaves none behind.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from maspo_ray.config import RunConfig
from maspo_ray.errors import RunError
from maspo_ray.fleet.calls import LateError, all_within, named, within
from maspo_ray.fleet.environment import actor_environment, import_path
from maspo_ray.fleet.placement import Plan, Slot
from maspo_ray.fleet.ray_session import object_store_used_bytes
from maspo_ray.fleet.reservation import Reservation
from maspo_ray.hosts.reward_host import RewardHost
from maspo_ray.weight_sync import backend_for

_SHUTDOWN_S = 5.0
_TRANSFER_CALLS = 6
"""A transfer is at most so many calls, one after the other, each with the deadline `pipeline.weight_sync_timeout_s`."""
_MORE_CALLS = 4096
"""Calls that an async actor holds at once besides one for each group under way, so that a weight update never waits behind these; what
it works on at once is its engine's affair."""


class Fleet:
    """The actors of a run, by role, in the order of their replicas."""

    def __init__(self, config: RunConfig, classes: dict[str, type], plan: Plan, reservation: Reservation) -> None:
        self._config = config
        self._classes = classes
        self._world_size = len(plan.of_role("learner"))
        self.shares_prompts = False
        self._actors = {
            role: [self._create(slot, reservation) for slot in plan.of_role(role)]
            for role in ("rollout", "reward", "reference", "learner")
        }

    def of_role(self, role: str) -> list[Any]:
        """Returns the handles of a role's replicas."""
        return self._actors[role]

    @staticmethod
    def put(value: Any) -> Any:
        """Returns a reference to a value in the object store, which keeps it as long as the reference is held."""
        return ray.put(value)

    @staticmethod
    async def object_store_used_bytes() -> float:
        return await asyncio.to_thread(object_store_used_bytes)

    def create_here(self, actor_class: type) -> Any:
        """Returns an actor of the framework's own on this process's node, which sees the run's folder; it takes none of the CPUs."""
        node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        environment = {"env_vars": {"PYTHONPATH": import_path()}}
        handle: Any = (
            ray.remote(actor_class).options(num_cpus=0, scheduling_strategy=node, runtime_env=environment).remote()
        )
        self._actors.setdefault("own", []).append(handle)
        return handle

    def _create(self, slot: Slot, reservation: Reservation) -> Any:
        actor_class, arguments, is_async = self._blueprint(slot)
        return (
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
        """Sets up all actors at once and opens the weight-transfer group, if there is anyone to transfer to."""

        async def one(role: str, replica: int, *arguments: Any) -> None:
            await named(f"{role}/{replica} failed to set up", self.of_role(role)[replica].setup.remote(*arguments))
            note(f"{role}/{replica} is up")

        learners = self.of_role("learner")
        limit = self._config.pipeline.setup_timeout_s
        late = "the actors were not up within pipeline.setup_timeout_s"
        rendezvous = await within(limit, late, named("learner/0 failed to start", learners[0].rendezvous.remote()))
        calls = [one("learner", rank, *rendezvous) for rank in range(len(learners))]
        calls += [one(role, i) for role in ("rollout", "reward", "reference") for i in range(len(self.of_role(role)))]
        await within(limit, late, asyncio.gather(*calls))
        if self._config.learner.share_prompts:
            self.shares_prompts = await self.learners("shares_prompts")
            if not self.shares_prompts:
                note(
                    "learner.share_prompts is on; the attention of this model and model.attn_implementation cannot share, so that each "
                    "completion has a prompt of its own"
                )
        if self.of_role("rollout"):
            await self._connect()

    async def _connect(self) -> None:
        """Opens the weight-transfer group."""
        rollout = self._config.rollout
        await self.learners(
            "connect",
            self.of_role("rollout"),
            max(1, int(rollout.gpus)),
            rollout.update,
            backend_for(rollout.gpus),
            self._config.pipeline.weight_sync_timeout_s,
        )

    async def learners(self, method: str, *arguments: Any) -> Any:
        """Calls a method on every rank at once; returns what rank 0 returns."""
        return await self.learners_each(method, [arguments] * self._world_size)

    async def learners_each(self, method: str, arguments: Sequence[Sequence[Any]]) -> Any:
        """Calls a method on every rank at once, each with its own arguments; returns what rank 0 returns.

        Raises:
            RunError: a rank failed, or did not answer by its deadline; it is named.
        """
        calls = {
            f"learner/{rank}": named(f"learner/{rank} failed in {method}", getattr(handle, method).remote(*given))
            for rank, (handle, given) in enumerate(zip(self.of_role("learner"), arguments, strict=True))
        }
        pipeline = self._config.pipeline
        field, seconds = "step_timeout_s", pipeline.step_timeout_s
        transfers = method in ("connect", "publish")
        if transfers:
            # A transfer's own deadlines come first and name the rollout actor.
            clients = len(self.of_role("rollout")) if self._config.rollout.update == "rolling" else 1
            field, seconds = "weight_sync_timeout_s", _TRANSFER_CALLS * clients * pipeline.weight_sync_timeout_s
        try:
            return (await all_within(seconds, f"in {method}; its deadline follows from pipeline.{field}", calls))[0]
        except LateError as late:
            if transfers:
                try:
                    await self._check_rollouts()
                except RunError as found:
                    # A broadcast over NCCL cannot be given up, so that the learner may hang in it because of another.
                    raise RunError(f"{late} {found}") from None
            raise

    async def _check_rollouts(self) -> None:
        """Asks every engine for a sign of life.

        Raises:
            RunError: some did not give it, and are named; one that has died, by itself.
        """
        calls = {
            f"rollout/{i}": named(f"rollout/{i} failed in a weight transfer", handle.check.remote())
            for i, handle in enumerate(self.of_role("rollout"))
        }
        seconds = self._config.pipeline.weight_sync_timeout_s
        await all_within(seconds, "in a weight transfer; its deadline is pipeline.weight_sync_timeout_s", calls)

    async def shutdown(self) -> None:
        """Lets every actor that can end itself do so, within a deadline, then ends all."""
        ending = [handle.shutdown.remote() for role in ("rollout", "learner") for handle in self.of_role(role)]
        await asyncio.to_thread(ray.wait, ending, num_returns=len(ending), timeout=_SHUTDOWN_S)
        for handles in self._actors.values():
            for handle in handles:
                ray.kill(handle)
