"""Which replica of a role takes the next piece of work.

Promise: the least loaded replica that is up takes it; where none is up, the least loaded that is updating, which begins with it once it is
up again; a replica that is away takes none. Work that was taken is given back exactly once. A pure state machine: it owns no handles, no
tasks and no clock; the time comes as an argument, in seconds of any one clock that never goes back.
"""

from collections.abc import Iterable
from enum import Enum

import numpy as np


class ReplicaState(Enum):
    """Whether a replica can work. The value is added to its load when replicas are compared: each state comes after those before it,
    however much work its replicas have."""

    UP = 0
    UPDATING = 2**40
    AWAY = 2**50


class EngineTable:
    """Counts the work of the replicas of one role, numbered from 0, all up and without work at first."""

    def __init__(self, num_replicas: int) -> None:
        assert num_replicas >= 1, f"num_replicas is {num_replicas}; work needs someone to do it."
        self._states = [ReplicaState.UP] * num_replicas
        # Outstanding work, with what the state adds.
        self._loads = np.zeros(num_replicas, np.int64)
        self._pieces = [0] * num_replicas
        self._heard_at = [0.0] * num_replicas

    def __len__(self) -> int:
        return len(self._states)

    def state(self, replica: int) -> ReplicaState:
        return self._states[replica]

    def outstanding(self, replica: int) -> int:
        """Returns how much work a replica has taken and not given back."""
        return int(self._loads[replica]) - self._states[replica].value

    def set_state(self, replicas: Iterable[int], state: ReplicaState) -> None:
        """Moves replicas into a state; work that they have taken stays theirs until it is given back."""
        for replica in replicas:
            self._loads[replica] += state.value - self._states[replica].value
            self._states[replica] = state

    def take(self, work: int, now: float, only: int | None = None) -> int | None:
        """Returns the replica that takes a piece of work, None where all that may are away.

        Args:
            work: how much it is, in any one unit; `give_back` must come to as much.
            only: the replica that must take it; by default the table chooses.
        """
        replica = int(self._loads.argmin()) if only is None else only
        if self._states[replica] is ReplicaState.AWAY:
            return None
        self._loads[replica] += work
        if self._pieces[replica] == 0:
            # It had nothing to answer before.
            self._heard_at[replica] = now
        self._pieces[replica] += 1
        return replica

    def lighten(self, replica: int, work: int) -> None:
        """A part of a piece of work is done; only the rest is given back with it."""
        assert 0 <= work <= self.outstanding(replica), f"replica {replica} has less work than {work}."
        self._loads[replica] -= work

    def give_back(self, replica: int, work: int, now: float | None) -> None:
        """A piece of work has ended, in whatever way.

        Args:
            now: when the replica answered; None where it did not, and was given up.
        """
        assert self._pieces[replica] > 0, f"replica {replica} gave work back; it has none."
        self.lighten(replica, work)
        self._pieces[replica] -= 1
        if now is not None:
            self._heard_at[replica] = now

    def hear(self, replica: int, now: float) -> None:
        """A replica has shown that its work goes on."""
        self._heard_at[replica] = now

    def silences(self, now: float) -> dict[int, float]:
        """Returns, for each replica that has work, how many seconds ago something was last heard of it."""
        return {i: now - heard for i, heard in enumerate(self._heard_at) if self._pieces[i]}
