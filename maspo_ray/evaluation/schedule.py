"""When evaluations are made, beside training.

Promise: they run one after the other, in the order of their steps; training waits for one only where the pipeline calls `finish`: before
version 1 is published, after the last step, and after each one that is due in a synchronous run. Each is told to the journal with the
versions that it ran over.
"""

import asyncio

from maspo_ray.config import EvalConfig
from maspo_ray.evaluation.evaluator import EvalResult, Evaluator
from maspo_ray.run_dir.journal import Journal


class EvaluationSchedule:
    """Begins the evaluations that are due.

    Args:
        evaluator: None where a run has no held-out prompts; then none is due.
        steps: of the run.
    """

    def __init__(self, evaluator: Evaluator | None, config: EvalConfig, steps: int, journal: Journal) -> None:
        self._evaluator = evaluator
        self._config = config
        self._steps = steps
        self._journal = journal
        self._latest: asyncio.Task[None] | None = None

    def begin(self, step: int, tasks: asyncio.TaskGroup) -> None:
        """Starts the evaluation after a step in `tasks`, if one is due."""
        every = self._config.every
        if self._evaluator is not None and (step in (0, self._steps) or (every and step % every == 0)):
            self._latest = tasks.create_task(self._run(self._evaluator, step, self._latest))

    async def finish(self) -> None:
        """Waits until those that were begun are done."""
        if self._latest is not None:
            with self._journal.timeline.span("learner", "evaluate"), self._journal.waiting("an evaluation"):
                # A failure of it ends the task group, and this with it.
                await asyncio.wait([self._latest])

    async def _run(self, evaluator: Evaluator, step: int, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await before
        with self._journal.timeline.span("evaluation", "evaluate", step=step):
            result = await evaluator.evaluate()
        versions = (result.min_version, result.max_version)
        self._journal.evaluation(step, result.accuracy, versions, self._row(step, result))

    def _row(self, step: int, result: EvalResult) -> dict[str, object]:
        return {
            "step": step,
            "version": result.min_version,
            "max_version": result.max_version,
            "set": self._config.name,
            "accuracy": result.accuracy,
            "k": result.samples,
            "num_prompts": result.num_prompts,
            "unscored": result.unscored,
        }
