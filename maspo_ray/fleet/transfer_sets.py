"""Which rollout actors change their weights together: the one place that decides."""

from maspo_ray.config import UpdateOrder


def transfer_sets(num_engines: int, update: UpdateOrder) -> tuple[tuple[int, ...], ...]:
    """Returns the replicas of each transfer group, in the order in which the groups are updated.

    `together` has one group of all, so that the bytes are sent once; `rolling` has one for each, so that the others generate while
    one changes its weights, and an engine can be replaced without the others noticing.
    """
    replicas = tuple(range(num_engines))
    if update == "rolling":
        return tuple((replica,) for replica in replicas)
    return (replicas,) if replicas else ()
