"""Every error of Ray's becomes one line that names the actor."""

import pickle
import threading
from typing import Any

import pytest
from ray import exceptions
from ray._raylet import ActorID
from ray.core.generated.common_pb2 import ActorDiedErrorContext, ErrorType
from ray.exceptions import RayError, RayTaskError

from maspo_ray.actor_failures import actor_error
from maspo_ray.errors import ActorError, ActorFailed, ActorGone, ActorLate, RunError

OBJECT = "00748392bcd969cc"
ACTOR_ID = ActorID.from_random()
OUT_OF_MEMORY = (
    "Task was killed due to the node running low on memory.\nMemory on the node (IP: 10.0.0.1, ID: 57e0) where the task "
    "(actor ID: 2f10, name=VLLMRollout.__init__, pid=139, memory used=9.71GB) was running was 28.52GB / 30.00GB (0.95), which "
    "exceeds the memory usage threshold of 0.95. Ray killed this worker (ID: 98) because it was the most recently scheduled "
    "task; to see more information about memory usage on this node, use `ray logs raylet.out -ip 10.0.0.1`.\nTop 10 memory "
    "users:\nPID\tMEM(GB)\tCOMMAND\n139\t9.71\tray::VLLMRollout\nRefer to the documentation on how to address it."
)
TRACEBACK = (
    'Traceback (most recent call last):\n  File "my_rewards.py", line 3, in score\n    raise ValueError("no answer")\n'
    "ValueError: no answer"
)


def _stored(cause: BaseException) -> RayTaskError:
    """Returns what Ray stores for an exception in an actor's method."""
    return RayTaskError("ray::A.f()", TRACEBACK, cause, "ray::A.f", 1, "10.0.0.1")


def _of_task(cause: BaseException) -> RayTaskError:
    """Returns what Ray raises of it: an instance of a class that inherits from the cause's too."""
    raised: RayTaskError = _stored(cause).as_instanceof_cause()
    return raised


def _died() -> exceptions.ActorDiedError:
    context = ActorDiedErrorContext(
        class_name="VLLMRollout",
        actor_id=ACTOR_ID.binary(),
        pid=139,
        node_ip_address="10.0.0.1",
        error_message="The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
        "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
        "killed by the OOM killer due to high memory usage, (2) ray stop --force was called.",
    )
    return exceptions.ActorDiedError(context)


LOST: list[tuple[RayError, str]] = [
    (
        _died(),
        "was lost while generating: The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit "
        "detail: Worker unexpectedly exits with a connection error code 2.",
    ),
    (exceptions.ActorDiedError(), "was lost while generating: The actor died unexpectedly before finishing this task."),
    (
        exceptions.RayActorError(),
        "was lost while generating: The actor experienced an error before finishing this task.",
    ),
    (
        exceptions.ActorUnavailableError("rpc error\ncode 14", ACTOR_ID.binary()),
        f"was lost while generating: The actor {ACTOR_ID.hex()} is unavailable: rpc error code 14. The task may or may not have been "
        "executed on the actor.",
    ),
    (
        exceptions.OutOfMemoryError(OUT_OF_MEMORY),
        "was lost while generating: Task was killed due to the node running low on memory. Memory on the node (IP: 10.0.0.1, ID: 57e0) "
        "where the task (actor ID: 2f10, name=VLLMRollout.__init__, pid=139, memory used=9.71GB) was running was 28.52GB / 30.00GB "
        "(0.95), which exceeds the memory usage threshold of 0.95.",
    ),
    (
        exceptions.WorkerCrashedError(),
        "was lost while generating: The worker died unexpectedly while executing this task.",
    ),
    (exceptions.NodeDiedError("The node is dead."), "was lost while generating: The node is dead."),
    (exceptions.LocalRayletDiedError(), "was lost while generating: The task's local raylet died."),
    (exceptions.AsyncioActorExit(), "was lost while generating: AsyncioActorExit"),
    (
        exceptions.ActorPlacementGroupRemoved(),
        "was lost while generating: The placement group corresponding to this Actor has been removed.",
    ),
    (exceptions.TaskPlacementGroupRemoved(), "was lost while generating: The placement group"),
    (
        exceptions.ActorUnschedulableError("node 57 is dead"),
        "was lost while generating: The actor is not schedulable: node 57 is dead",
    ),
    (exceptions.TaskUnschedulableError("node 57 is dead"), "was lost while generating: The task is not schedulable"),
    (
        exceptions.ObjectLostError(OBJECT, None, ""),
        f"lost an object while generating: Failed to retrieve object {OBJECT}. All copies of {OBJECT} have been lost due to node failure.",
    ),
    (
        exceptions.OwnerDiedError(OBJECT, b"", ""),
        f"lost an object while generating: Failed to retrieve object {OBJECT}. The object's owner has exited.",
    ),
    (
        exceptions.ObjectReconstructionFailedError(OBJECT, ErrorType.OBJECT_UNRECONSTRUCTABLE_PUT, None, b"", ""),
        f"lost an object while generating: Failed to retrieve object {OBJECT}. "
        "[OBJECT_UNRECONSTRUCTABLE_PUT] The object cannot be reconstructed because it was created by ray.put(), which has no task lineage.",
    ),
    (
        exceptions.ObjectFetchTimedOutError(OBJECT, b"", ""),
        f"lost an object while generating: Failed to retrieve object {OBJECT}. Fetch for",
    ),
    (
        exceptions.ReferenceCountingAssertionError(OBJECT, b"", ""),
        f"lost an object while generating: Failed to retrieve object {OBJECT}. The object has already been deleted",
    ),
    (
        exceptions.ObjectFreedError(OBJECT, b"", ""),
        f"lost an object while generating: Failed to retrieve object {OBJECT}. The object was manually freed",
    ),
]
FAILED: list[tuple[RayError, str]] = [
    (_of_task(ValueError("no\n  answer")), "failed while generating: ValueError: no answer"),
    (_of_task(ValueError()), "failed while generating: ValueError"),
    (_stored(_of_task(ValueError("within a task"))), "failed while generating: ValueError: within a task"),
    (
        _of_task(RuntimeError(f"a worker failed:\n{TRACEBACK}")),
        "failed while generating: RuntimeError: a worker failed: ValueError: no answer",
    ),
    (
        exceptions.ActorDiedError(_stored(ValueError("no answer"))),
        "failed while generating: ActorDiedError: The actor died because of an error raised in its creation task, ValueError: no answer",
    ),
    (
        exceptions.RuntimeEnvSetupError("pip failed\nNo space left"),
        "failed while generating: RuntimeEnvSetupError: Failed to set up runtime environment. pip failed No space left",
    ),
    (
        exceptions.ObjectStoreFullError("Failed to put object 00 in object store because it is full."),
        "failed while generating: ObjectStoreFullError: Failed to put object 00 in object store because it is full. The local object "
        "store is full of objects that are still in scope and cannot be evicted.",
    ),
    (
        exceptions.OutOfDiskError("Failed to put object 00."),
        "failed while generating: OutOfDiskError: Failed to put object 00.",
    ),
    (exceptions.GetTimeoutError("Get timed out."), "failed while generating: GetTimeoutError: Get timed out."),
    (exceptions.TaskCancelledError(), "failed while generating: TaskCancelledError"),
    (exceptions.PlasmaObjectNotAvailable(), "failed while generating: PlasmaObjectNotAvailable"),
    (
        exceptions.RaySystemError("no raylet", TRACEBACK),
        "failed while generating: RaySystemError: System error: no raylet traceback: ValueError: no answer",
    ),
    (exceptions.RpcError("unreachable"), "failed while generating: RpcError: unreachable"),
    (
        exceptions.UnserializableException(TRACEBACK),
        "failed while generating: UnserializableException: Failed to deserialize exception.",
    ),
    (exceptions.PendingCallsLimitExceeded("too many"), "failed while generating: PendingCallsLimitExceeded: too many"),
    (exceptions.ObjectRefStreamEndOfStreamError(), "failed while generating: ObjectRefStreamEndOfStreamError"),
]


def _assert_one_line(found: ActorError, kind: type[ActorError], expected: str) -> None:
    line = str(found)
    assert type(found) is kind
    assert line.startswith(f"rollout/0 {expected}")
    assert "\n" not in line and "Traceback" not in line and "\x1b" not in line and 'File "' not in line
    for advice in ("RAY_record_ref_creation_sites", "ray logs", "ray memory", "common causes"):
        assert advice not in line
    assert (found.role, found.replica) == ("rollout", 0)


@pytest.mark.parametrize(("error", "expected"), LOST, ids=[type(error).__name__ for error, _ in LOST])
def test_actor_error_of_what_is_lost_is_one_line(error: RayError, expected: str) -> None:
    _assert_one_line(actor_error(error, "rollout/0", "generating"), ActorGone, expected)


@pytest.mark.parametrize(("error", "expected"), FAILED, ids=[type(error).__name__ for error, _ in FAILED])
def test_actor_error_of_what_failed_is_one_line(error: RayError, expected: str) -> None:
    _assert_one_line(actor_error(error, "rollout/0", "generating"), ActorFailed, expected)


# Not the first: an actor that does not catch an `ActorDiedError` with its cause fails in Ray 2.60 of not being able to pickle it.
@pytest.mark.parametrize("error", [error for error, _ in LOST[1:]], ids=[type(error).__name__ for error, _ in LOST[1:]])
def test_actor_error_of_a_method_that_met_an_error_of_ray_is_that_error(error: RayError) -> None:
    alone, met = actor_error(error, "learner/1", "training"), actor_error(_of_task(error), "learner/1", "training")
    assert (type(met), str(met)) == (type(alone), str(alone))


def test_actor_error_of_an_exception_that_cannot_be_pickled_says_what_it_was() -> None:
    cause: Any = ValueError("no answer")
    cause.lock = threading.Lock()
    line = str(
        actor_error(RayTaskError("ray::A.f()", TRACEBACK, cause, "ray::A.f", 1, "10.0.0.1"), "reward/0", "scoring")
    )
    assert "ValueError: no answer" in line and "\n" not in line


def test_actor_error_of_a_runs_own_error_keeps_its_message() -> None:
    found = actor_error(_of_task(RunError("reward.timeout_s is 0; raise it.")), "reward/2", "scoring")
    assert (type(found), str(found), found.actor) == (ActorFailed, "reward.timeout_s is 0; raise it.", "reward/2")


def test_actor_error_of_another_actor_stays_that_ones() -> None:
    late = ActorLate.of("rollout/1", "rollout/1 did not answer within 1 s while pausing.")
    found = actor_error(_of_task(late), "learner/0", "publishing version 3")
    assert (type(found), str(found), found.actor) == (ActorLate, str(late), "rollout/1")


def test_every_error_that_ray_lists_is_covered() -> None:
    tried = {type(error) for error, _ in LOST + FAILED}
    # Of no call to an actor: of Ray's channels, of a name or a client, of tasks in another language; the rest are these' base classes.
    elsewhere = {
        exceptions.RayError,
        exceptions.RayTaskError,
        exceptions.RayChannelError,
        exceptions.RayChannelTimeoutError,
        exceptions.RayCgraphCapacityExceeded,
        exceptions.OufOfBandObjectRefSerializationException,
        exceptions.ActorAlreadyExistsError,
        exceptions.ActorHandleNotFoundError,
        exceptions.AuthenticationError,
    }
    assert not set(exceptions.RAY_EXCEPTION_TYPES) - tried - elsewhere


@pytest.mark.parametrize("kind", [ActorFailed, ActorGone, ActorLate])
@pytest.mark.parametrize("replica", [None, 0, 12])
def test_actor_error_survives_pickling(kind: type[ActorError], replica: int | None) -> None:
    error = kind("it is gone", "rollout", replica, "Its log: /logs/a.err")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (again.message, again.role, again.replica, again.log) == ("it is gone", "rollout", replica, error.log)
    assert str(again) == str(error) == "it is gone. Its log: /logs/a.err"


def test_actor_error_that_knows_its_log_keeps_it() -> None:
    error = ActorGone.of("rollout/1", "it is gone").with_log("Its log: /a")
    assert str(error) == "it is gone. Its log: /a"
    assert error.with_log("Its log: /b") is error
    assert str(ActorGone.of("rollout/1", "it is gone").with_log("")) == "it is gone"
