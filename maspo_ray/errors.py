"""How a run ends by somebody's fault: a wrong input, a run that cannot go on, an actor that failed.

Promise: a line reads `<field> is <value>; <rule>. <what to change>.`; an actor's failure says which actor it was, so that one part of the
run can decide what becomes of it.
"""

from typing import Self


class ConfigError(ValueError):
    """The input is wrong: found before anything is started. The message is for the user, one line for each fault."""


class RunError(RuntimeError):
    """The run cannot go on. The message names the cause."""


class ActorError(RunError):
    """An actor failed, in one line. It crosses Ray whole, from an actor that saw another fail to the controller.

    Args:
        replica: None for an actor that its role has one of.
        log: a sentence that says where the actor's log is; "" where that is not known.
    """

    def __init__(self, message: str, role: str, replica: int | None, log: str = "") -> None:
        # All of them, so that pickling, which calls the class with `args`, keeps them.
        super().__init__(message, role, replica, log)
        self.message = message
        self.role = role
        self.replica = replica
        self.log = log

    @classmethod
    def of(cls, actor: str, message: str) -> Self:
        """Returns the failure of an actor named `role/replica`, or by its role alone."""
        role, _, replica = actor.partition("/")
        return cls(message, role, int(replica) if replica else None)

    @property
    def actor(self) -> str:
        return self.role if self.replica is None else f"{self.role}/{self.replica}"

    def with_log(self, log: str) -> Self:
        """Returns this failure with where the actor's log is, unless it says so already."""
        return self if self.log else type(self)(self.message, self.role, self.replica, log)

    def __str__(self) -> str:
        if not self.log:
            return self.message
        return f"{self.message}{'' if self.message.endswith(('.', '!', '?')) else '.'} {self.log}"


class ActorFailed(ActorError):
    """The actor's code raised."""


class ActorGone(ActorError):
    """The actor died or cannot be reached, or an object that it held is lost."""


class ActorLate(ActorError):
    """The actor gave no answer by its deadline."""
