"""The learner's ranks as one thing: typed calls, each to all ranks at once and with a deadline of its own.

Promise: every rank and engine is looked up when it is called. A rank that fails or does not answer is named; where a weight transfer hangs because of an engine, the engine is named. Holds
no weights and decides nothing: what a rank does is its actor's (`protocols.LearnerActor`).
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from maspo_ray.config import CheckpointConfig, LearnerConfig, PipelineConfig, RolloutConfig
from maspo_ray.errors import ActorError, ActorLate
from maspo_ray.experience import PublishReport, UpdateReport
from maspo_ray.fleet.calls import await_all, await_named
from maspo_ray.fleet.handles import Handles
from maspo_ray.packing import RankPlan
from maspo_ray.weight_sync import backend_for

_TRANSFER_CALLS = 6
"""A transfer is at most so many calls to its engines, one after the other, each of which the learner gives `engine_call_s`."""


@dataclass(frozen=True, slots=True)
class LearnerDeadlines:
    """How long the ranks may take, in seconds.

    Attributes:
        engine_call_s: for an engine's part in a weight transfer.
    """

    setup_s: float
    step_s: float
    engine_call_s: float
    checkpoint_s: float

    @classmethod
    def of(cls, pipeline: PipelineConfig, checkpoint: CheckpointConfig) -> Self:
        return cls(
            pipeline.setup_timeout_s, pipeline.step_timeout_s, pipeline.weight_sync_timeout_s, checkpoint.timeout_s
        )


class LearnerGroup:
    """The learner.

    Args:
        actors: where its ranks are found, and the rollout actors that it sends its weights to.
    """

    def __init__(
        self, actors: Handles, learner: LearnerConfig, rollout: RolloutConfig, deadlines: LearnerDeadlines
    ) -> None:
        self._actors = actors
        self._wants_shared_prompts = learner.share_prompts
        self._rollout_gpus = rollout.gpus
        self._deadlines = deadlines
        self._shares_prompts = False
        self._connected: set[tuple[int, ...]] = set()

    @property
    def data_ranks(self) -> int:
        """How many shares a batch is dealt into."""
        return self._actors.count("learner")

    @property
    def shares_prompts(self) -> bool:
        """Whether several completions may stand behind one copy of their prompt; known after `setup`."""
        return self._shares_prompts

    async def setup(self, note: Callable[[str], None]) -> None:
        """Sets up all ranks; `note` is told of each, and where prompts cannot be shared though the config says so."""
        seconds, deadline = self._deadlines.setup_s, "pipeline.setup_timeout_s"

        async def set_up(rank: int, address: str, port: int) -> None:
            await await_named(f"learner/{rank}", "setting up", self._rank(rank).setup.remote(address, port))
            note(f"learner/{rank} is up")

        rendezvous = await_named("learner/0", "starting", self._rank(0).rendezvous.remote())
        [(address, port)] = await await_all(
            seconds, _describe_deadline("starting", deadline), {"learner/0": rendezvous}
        )
        calls = {f"learner/{rank}": set_up(rank, address, port) for rank in range(self.data_ranks)}
        await await_all(seconds, _describe_deadline("setting up", deadline), calls)
        if not self._wants_shared_prompts:
            return
        asked = [handle.shares_prompts.remote() for handle in self._ranks()]
        self._shares_prompts = await self._answer("setting up", asked, seconds, deadline)
        if not self._shares_prompts:
            note(
                "learner.share_prompts is on; the attention of this model and model.attn_implementation cannot share, so that each "
                "completion has a prompt of its own"
            )

    async def connect(self, replicas: tuple[int, ...]) -> None:
        """Opens a weight-transfer group to rollout actors, in place of those that any of them was in."""
        self._connected = {known for known in self._connected if not set(known) & set(replicas)} | {replicas}
        engines = tuple(self._engine(replica) for replica in replicas)
        timeout_s = self._deadlines.engine_call_s
        workers = max(1, int(self._rollout_gpus))
        backend = backend_for(self._rollout_gpus)
        calls = [rank.connect.remote(replicas, engines, workers, backend, timeout_s) for rank in self._ranks()]
        await self._transfer("connecting to the engines", calls, replicas)

    async def train(
        self, version: int, shares: Sequence[tuple[tuple[RankPlan, ...], tuple[Any, ...]]]
    ) -> list[UpdateReport]:
        """Returns what the updates of a batch came to.

        Args:
            version: of the weights that meet the batch.
            shares: each rank's, as `packing.pack` made them: a plan for each update, and references to the payloads.
        """
        calls = [
            handle.train_step.remote(version, plans, *payloads)
            for handle, (plans, payloads) in zip(self._ranks(), shares, strict=True)
        ]
        reports: list[UpdateReport] = await self._step("training", calls)
        return reports

    async def publish(self, version: int, replicas: tuple[int, ...]) -> PublishReport:
        """Sends the weights as `version` to the actors of one `connect`ed group; the report has their pauses in its order."""
        assert replicas in self._connected, f"no transfer group is of the rollout actors {replicas}"
        calls = [handle.publish.remote(version, replicas) for handle in self._ranks()]
        report: PublishReport = await self._transfer(f"publishing version {version}", calls, replicas)
        return report

    async def logprobs(
        self, pairs: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]]
    ) -> Sequence[NDArray[np.float32]]:
        """Returns, for each pair of a prompt's and a completion's token ids, the completion's [tokens] float32 log-probs at the
        sampling temperature."""
        calls = [handle.completion_logprobs.remote(pairs) for handle in self._ranks()]
        logprobs: Sequence[NDArray[np.float32]] = await self._step("scoring completions", calls)
        return logprobs

    async def save(self, folder: Path) -> None:
        """Writes a Hugging Face model and its tokenizer."""
        path = str(folder.resolve())
        await self._checkpoint("saving the model", [handle.save.remote(path) for handle in self._ranks()])

    async def save_state(self, folder: Path) -> None:
        """Writes what a later `load_state` of as many ranks goes on from."""
        path = str(folder.resolve())
        await self._checkpoint("saving its state", [handle.save_state.remote(path) for handle in self._ranks()])

    async def load_state(self, folder: Path) -> None:
        """Reads what `save_state` wrote, in place of what the model's folder holds."""
        path = str(folder.resolve())
        await self._checkpoint("loading its state", [handle.load_state.remote(path) for handle in self._ranks()])

    def end(self) -> list[Any]:
        """Asks every rank to end; returns what is ready when they have."""
        return [handle.shutdown.remote() for handle in self._ranks()]

    async def _step(self, doing: str, calls: Sequence[Awaitable[Any]]) -> Any:
        return await self._answer(doing, calls, self._deadlines.step_s, "pipeline.step_timeout_s")

    async def _checkpoint(self, doing: str, calls: Sequence[Awaitable[Any]]) -> None:
        await self._answer(doing, calls, self._deadlines.checkpoint_s, "checkpoint.timeout_s")

    async def _transfer(self, doing: str, calls: Sequence[Awaitable[Any]], replicas: tuple[int, ...]) -> Any:
        # The learner's own deadlines for its engines come first, and name the engine.
        seconds = _TRANSFER_CALLS * self._deadlines.engine_call_s
        try:
            return await self._answer(doing, calls, seconds, "pipeline.weight_sync_timeout_s")
        except ActorLate as late:
            # A broadcast over NCCL cannot be given up, so that a rank may hang in it because of an engine.
            try:
                await self._check_engines(replicas)
            except ActorError as found:
                both = type(found)(f"{late.message} {found.message}", found.role, found.replica, found.log)
                raise both from None
            raise

    async def _check_engines(self, replicas: tuple[int, ...]) -> None:
        """Asks the engines of a transfer group for a sign of life.

        Raises:
            ActorError: some did not give it, and are named; one that has died, by itself.
        """
        calls = {
            f"rollout/{replica}": await_named(
                f"rollout/{replica}", "transferring weights", self._engine(replica).check.remote()
            )
            for replica in replicas
        }
        where = _describe_deadline("transferring weights", "pipeline.weight_sync_timeout_s")
        await await_all(self._deadlines.engine_call_s, where, calls)

    def _rank(self, rank: int) -> Any:
        return self._actors.handle("learner", rank)

    def _ranks(self) -> list[Any]:
        return [self._rank(rank) for rank in range(self.data_ranks)]

    def _engine(self, replica: int) -> Any:
        return self._actors.handle("rollout", replica)

    async def _answer(self, doing: str, calls: Sequence[Awaitable[Any]], seconds: float, deadline: str) -> Any:
        """Returns what rank 0 answers, once all have."""
        named = {f"learner/{rank}": await_named(f"learner/{rank}", doing, call) for rank, call in enumerate(calls)}
        return (await await_all(seconds, _describe_deadline(doing, deadline), named))[0]


def _describe_deadline(doing: str, deadline: str) -> str:
    return f"while {doing}; the deadline follows from {deadline}"
