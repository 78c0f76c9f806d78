"""Where each actor writes its log.

Promise: an actor is asked as soon as it is created, so that the answer is there when it dies; nothing ever waits for it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
import ray._private.worker


class ActorLogs:
    """The logs of a run's actors, by their names."""

    def __init__(self) -> None:
        self._answers: dict[str, Any] = {}
        self._paths: dict[str, str] = {}

    def ask(self, actor: str, handle: Any) -> None:
        """Asks an actor, which may have another's name in whose place it comes."""
        self._paths[actor] = f"among those in {_folder()}"
        self._answers[actor] = answer = handle.__ray_call__.remote(_own_log).future()
        answer.add_done_callback(partial(self._take, actor))

    def clear(self) -> None:
        """Forgets all of them."""
        self._answers.clear()
        self._paths.clear()

    def sentence(self, actors: Sequence[str]) -> str:
        """Returns where to look for the actors' last words, "" where nobody was asked."""
        known = [self._paths[actor] for actor in actors if actor in self._paths]
        if not known:
            return ""
        return f"Its log: {known[0]}" if len(known) == 1 else f"Their logs: {', '.join(known)}"

    def _take(self, actor: str, answer: Any) -> None:
        if not answer.cancelled() and answer.exception() is None and self._answers[actor] is answer:
            self._paths[actor] = answer.result()


ACTOR_LOGS = ActorLogs()
"""A process has one Ray at a time, and one fleet on it."""


def _own_log(_: Any) -> str:
    """Returns where this actor's process writes its standard error, and with it what its engine says."""
    # Ray 2.60 has no public name for it.
    path = ray._private.worker.global_worker.get_err_file_path()
    return f"{path} (node {ray.util.get_node_ip_address()})"


def _folder() -> str:
    node = ray._private.worker.global_worker.node
    assert node is not None, "an actor is created before Ray is there"
    return str(node.get_logs_dir_path())
