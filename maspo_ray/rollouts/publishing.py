"""A version's way from the learner to the engines.

Promise: when `publish` returns, every engine samples from the version's weights, and its checksum has shown it: it differs from the one
before where the learner's weights have changed, and is the same on all replicas. Each transfer set (`fleet.transfer_sets`) changes by
itself, while the others generate.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from maspo_ray.config import Dtype
from maspo_ray.errors import RunError
from maspo_ray.experience import PublishReport, UpdateReport
from maspo_ray.fleet.calls import await_all, await_named
from maspo_ray.fleet.handles import Handles
from maspo_ray.hosts.engine_table import EngineTable, ReplicaState
from maspo_ray.run_dir.timeline import Timeline

_LEAST_CHANGE: Mapping[Dtype, float] = {"float32": 2**-33, "bfloat16": 2**-18}
"""‖Δw‖ / ‖w‖ of an update that moves about one weight in a thousand to its neighbour in the dtype, which are 2^-23 and 2^-8 apart: of the
100,000 values and more that the checksums of a model look at, some are among them."""


def must_show(reports: Sequence[UpdateReport], dtype: Dtype) -> bool:
    """Returns whether a batch's updates must change the engines' checksums.

    An update that was applied need not: its gradient can be 0, and what a schedule's last steps change can be lost in rounding.

    Args:
        dtype: of the weights that are sent.
    """
    # A learner that does not say how far its weights moved says by `applied` that they have.
    sizes = [report.metrics.get("learner/update_to_weight", math.inf) for report in reports if report.applied]
    return any(size > _LEAST_CHANGE[dtype] for size in sizes)


class Sends(Protocol):
    """What sends the learner's weights."""

    async def publish(self, version: int, replicas: tuple[int, ...]) -> PublishReport: ...


class WeightChecksums:
    """Holds the engines' checksums against each other and against those of the version before. A pure state machine."""

    def __init__(self) -> None:
        self._before: str | None = None

    def check(self, version: int, checksums: Sequence[str | None], changed: bool) -> None:
        """Takes up the replicas' checksums after an update, in their order; None where an engine has none.

        Args:
            changed: whether the learner's weights differ from the version before by so much that it must show.

        Raises:
            RunError: an engine's weights did not change with the learner's, or differ from another's.
        """
        known = {replica: checksum for replica, checksum in enumerate(checksums) if checksum is not None}
        if not known:
            return
        stale = [replica for replica, checksum in known.items() if changed and checksum == self._before]
        if stale:
            raise RunError(
                f"{_names(stale)} did not take up version {version}: the weights are those of the version before, though the learner's "
                "have changed. See its log."
            )
        first, *others = known.items()
        odd = [replica for replica, checksum in others if checksum != first[1]]
        if odd:
            raise RunError(
                f"{_names(odd)} and rollout/{first[0]} hold different weights after version {version} was published to them. See "
                "their logs."
            )
        self._before = first[1]


def _names(replicas: Sequence[int]) -> str:
    return ", ".join(f"rollout/{replica}" for replica in replicas)


class WeightUpdates:
    """Publishes versions to the engines.

    Args:
        sets: the replicas that change together, one set after the other.
        answer_s: how long an engine may take to give its checksum.
    """

    def __init__(
        self,
        learner: Sends,
        actors: Handles,
        table: EngineTable,
        sets: Sequence[tuple[int, ...]],
        timeline: Timeline,
        answer_s: float,
    ) -> None:
        self._learner = learner
        self._actors = actors
        self._table = table
        self._sets = sets
        self._timeline = timeline
        self._answer_s = answer_s
        self._checksums = WeightChecksums()

    async def publish(self, version: int, changed: bool) -> dict[str, float]:
        """Sends the learner's weights as a version; returns what it took, by its names in metrics.jsonl.

        Args:
            changed: whether they differ from the version before by so much that it must show (`must_show`).

        Raises:
            RunError: an engine did not take them up; it is named.
        """
        seconds, pauses = 0.0, []
        with self._timeline.span("learner", "publish", version=version):
            for replicas in self._sets:
                report = await self._publish_to(replicas, version)
                seconds += report.seconds
                pauses += [went_on - stopped for stopped, went_on in report.pauses]
        self._checksums.check(version, await self._ask_checksums(), changed)
        return {"time/publish_s": seconds, "time/rollout_paused_s": sum(pauses) / len(pauses)}

    async def _publish_to(self, replicas: tuple[int, ...], version: int) -> PublishReport:
        started = self._timeline.now()
        self._table.set_state(replicas, ReplicaState.UPDATING)
        report = await self._learner.publish(version, replicas)
        self._table.set_state(replicas, ReplicaState.UP)
        for replica, (stopped, went_on) in zip(replicas, report.pauses, strict=True):
            self._timeline.add(f"rollout/{replica}", "paused", started + stopped, started + went_on)
        return report

    async def _ask_checksums(self) -> list[str | None]:
        calls = {}
        for replica in range(len(self._table)):
            name = f"rollout/{replica}"
            call = self._actors.handle("rollout", replica).weight_checksum.remote()
            calls[name] = await_named(name, "computing the checksum of its weights", call)
        return await await_all(
            self._answer_s, "with the checksum of its weights; the deadline is pipeline.weight_sync_timeout_s", calls
        )
