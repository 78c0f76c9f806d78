"""One run from its config to its summary: checks, Ray, actors, the pipeline, and the way back down.

Promise: nothing is started before the config's files and classes are checked; however a run ends, by its last step, an error or a
signal, its actors are ended, its files closed, its summary is written, and what was saved is said.
"""

import asyncio
from contextlib import suppress
from enum import Enum, auto

from maspo_ray.config import RunConfig
from maspo_ray.config.without_effect import warn_of_keys_without_effect
from maspo_ray.data.prompts import RunPrompts, load_run_prompts
from maspo_ray.data.run_rows import RunRows
from maspo_ray.data.stream import train_stream
from maspo_ray.data.tokenizers import load_model_config, load_tokenizer
from maspo_ray.data.vocabulary import check_vocabulary
from maspo_ray.dtype_speed import warn_of_slow_bfloat16
from maspo_ray.errors import ActorError, RunError
from maspo_ray.evaluation.evaluator import Evaluator
from maspo_ray.fleet.fleet import Fleet
from maspo_ray.fleet.loading import Plugins, load_plugins
from maspo_ray.fleet.memory import estimate_memory, warn_of_what_does_not_fit
from maspo_ray.fleet.placement import Plan, demands
from maspo_ray.fleet.ray_session import connected, object_store_bytes
from maspo_ray.fleet.reservation import Reservation, reserve, wait_for_cluster
from maspo_ray.groups.intake import Intake
from maspo_ray.hosts.engine_table import EngineTable
from maspo_ray.pipeline.loop import Pipeline
from maspo_ray.pipeline.wait_watch import watch_waits
from maspo_ray.preflight import check_object_store, preflight
from maspo_ray.rollouts.error_watch import ErrorWatch
from maspo_ray.rollouts.pool import RolloutPool
from maspo_ray.run_dir.hold import held_run_dir, remove_partial
from maspo_ray.run_dir.journal import Journal
from maspo_ray.run_dir.summary import RunSummary, summary_text
from maspo_ray.sampling import say_what_the_ratio_leaves_out
from maspo_ray.stop_signals import cancelled_by_signals, stop_signals, stop_was_asked

_SIGNAL_S = 1.0
"""A signal to a whole job reaches its processes within this time of each other."""


def train(config: RunConfig, resume: bool = False) -> RunSummary:
    """Trains as the config says; returns what the run came to, also when it was interrupted.

    Raises:
        ConfigError: the config names something that is not there; no actor was started.
        RunError: the run could not go on.
    """
    with stop_signals():
        warn_of_keys_without_effect(config)
        rows = preflight(config, resume)
        plugins = load_plugins(config)
        warn_of_slow_bfloat16(config.model, config.learner)
        say_what_the_ratio_leaves_out(config.rollout)
        with held_run_dir(config.run_dir):
            prompts = _load_prompts(config, rows, plugins)
            with connected(config.placement) as may_grow:
                plan = wait_for_cluster(demands(config), config.placement.wait_s if may_grow else 0.0)
                check_object_store(config, object_store_bytes())
                warn_of_what_does_not_fit(estimate_memory(config, plan))
                reservation = reserve(plan, config.placement.wait_s)
                try:
                    return asyncio.run(_Session(config, plugins, prompts, rows, plan, reservation).run())
                finally:
                    reservation.release()


class _End(Enum):
    """How a run ends that did not fail."""

    FINISHED = auto()
    INTERRUPTED = auto()


def _load_prompts(config: RunConfig, rows: RunRows, plugins: Plugins) -> RunPrompts:
    """Returns the prompts of training and of evaluations; what is wrong with a row is said before anything starts."""
    rows.read_all()
    rows.check_answers(plugins.check_answer, config.reward.actor)
    tokenizer = load_tokenizer(config.model)
    prompts = load_run_prompts(rows, config.data, tokenizer)
    rows.warn()
    by_field = {f"data.train.sources.{name}" if name else "data.train": own for name, own in prompts.train.items()}
    num_ids = load_model_config(config.model).get_text_config().vocab_size
    check_vocabulary(config.model.path, tokenizer, num_ids, {**by_field, "data.eval": prompts.held_out})
    return prompts


class _Session:
    """A run on a Ray that is there, in slots that are reserved."""

    def __init__(
        self,
        config: RunConfig,
        plugins: Plugins,
        prompts: RunPrompts,
        rows: RunRows,
        plan: Plan,
        reservation: Reservation,
    ) -> None:
        self._config = config
        self._plugins = plugins
        self._prompts = prompts
        self._journal = Journal(config)
        self._journal.files.write_left_out(rows.left_out())
        self._errors = ErrorWatch(config.reward.max_error_rate)
        self._fleet = Fleet(config, plugins.classes, plan, reservation)
        pipeline = config.pipeline
        self._intake = Intake(
            pipeline.groups_per_step, pipeline.max_staleness, pipeline.steps, plugins.late_policy, self._journal.ledger
        )

    async def run(self) -> RunSummary:
        """Returns what the run has come to; where it failed, the error that it raises says so too."""
        end = await self._end_of_work()
        self._journal.close()
        # Whoever has asked the run to end may not wait for the actors.
        with suppress(RunError):
            self._journal.files.write_summary(self._summary(end))
        await self._fleet.shutdown()
        remove_partial(self._config.run_dir)
        try:
            self._journal.draw()
            self._journal.files.write_summary(summary := self._summary(end))
        except RunError as error:
            end = end if isinstance(end, Exception) else error
            summary = self._summary(end)
        if isinstance(end, Exception):
            end.add_note(summary_text(summary))
            raise end
        return summary

    async def _end_of_work(self) -> "Exception | _End":
        """Runs the run; returns how it ended."""
        failure: BaseException
        try:
            with self._journal, cancelled_by_signals():
                await self._work()
            return _End.FINISHED
        except asyncio.CancelledError:
            return _End.INTERRUPTED
        except BaseExceptionGroup as group:
            failure = _first_cause(group)
        except Exception as error:
            failure = error
        if not isinstance(failure, Exception):
            raise failure
        if isinstance(failure, ActorError):
            # A scheduler's signal reaches Ray's processes too, and the end of one of them may be known before it.
            await asyncio.sleep(_SIGNAL_S)
            if stop_was_asked():
                return _End.INTERRUPTED
        return failure

    def _summary(self, end: "Exception | _End") -> RunSummary:
        return self._journal.summarise(
            groups=self._intake.counts,
            errors=self._errors.errors,
            evaluation_errors=self._errors.evaluation_errors,
            interrupted=end is _End.INTERRUPTED,
            failure=_one_line(end) if isinstance(end, Exception) else None,
        )

    async def _work(self) -> None:
        config, journal = self._config, self._journal
        journal.note("starting the actors")
        await self._set_up()
        pool = RolloutPool(
            self._fleet,
            EngineTable(self._fleet.count("rollout")),
            self._errors,
            journal.timeline,
            config.rollout.timeout_s,
            config.pipeline.weight_sync_timeout_s,
        )
        prompts = train_stream(self._prompts.train, config.data, self._plugins.sampler, config.seed)
        held_out = self._prompts.held_out
        evaluator = Evaluator(pool, held_out, config.eval, config.rollout, config.seed) if held_out else None
        await Pipeline(config, self._fleet, pool, prompts, self._intake, evaluator, journal).run()

    async def _set_up(self) -> None:
        """Returns once all actors are up."""
        journal = self._journal

        with journal.timeline.span("learner", "set-up"):
            saying = asyncio.create_task(watch_waits(journal))
            try:
                with journal.waiting("the actors; each is named as it comes up"):
                    await self._fleet.setup(journal.note)
            finally:
                saying.cancel()


def _one_line(error: Exception) -> str:
    text = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


def _first_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Returns the first error of a group that is not itself one."""
    first = group.exceptions[0]
    return _first_cause(first) if isinstance(first, BaseExceptionGroup) else first
