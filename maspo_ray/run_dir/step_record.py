"""What one step of the learner consumed, as one file of columns: `RUN_DIR/steps/step_000007.npz`.

Promise: what is read back calls `train_step` with the same plans over payloads of the same contents, bit for bit, so that the learner
computes the same step. What a step does not consume, the texts, is not kept. A file that has the record's name is whole.

The file is numpy's, without pickled objects: flat columns, and beside what varies in length a column of counts. Rows are, by the column,
the groups of the batch, their completions one after the other, or the tokens of these one after the other.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
from numpy.typing import NDArray

from maspo_ray.errors import ConfigError
from maspo_ray.experience import Completion, Experience, Prompt, SampledGroup, VersionSpan
from maspo_ray.packing import Bundle, Item, RankPlan

_FORMAT = 2
_PAYLOAD, _REFERENCES = range(2)

T = TypeVar("T")
Share = tuple[tuple[RankPlan, ...], tuple[Any, ...]]
"""A rank's plans, one for each update, and the payloads that their positions speak of (`packing.pack`)."""


@dataclass(frozen=True, slots=True)
class RecordedGroup:
    """A group of a step's batch.

    Attributes:
        replica: of the rollout actor that sampled it.
        sampled: the prompt without its text and answer, the completions without their texts.
        seeds: of the completions' sampling; -1 where the engine was left to choose.
        rewards: as the reward gave them; NaN for a completion that could not be scored.
        advantages: None for a completion that is not trained on.
        reference_logprobs: of each completion; None without KL.
    """

    group_id: int
    submitted_version: int
    replica: int
    sampled: SampledGroup
    seeds: tuple[int, ...]
    rewards: tuple[float, ...]
    advantages: tuple[float | None, ...]
    reference_logprobs: tuple[NDArray[np.float32], ...] | None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step that was read back.

    Attributes:
        version: of the weights that met the batch.
        shares: each rank's plans and payloads, as `train_step` takes them.
    """

    step: int
    version: int
    groups: tuple[RecordedGroup, ...]
    shares: tuple[Share, ...]


def number_references(
    batch: Sequence[Experience], shares: Sequence[Share]
) -> tuple[list[Experience], list[Share], tuple[Any, ...]]:
    """Returns a batch and its shares with a number in place of each reference, and the references in the order of their numbers.

    A reference within an argument of a call is one more that Ray has to keep count of, in the process that borrows it and its owner.
    """
    numbers: dict[Any, int] = {}

    def number(reference: Any) -> int:
        return numbers.setdefault(reference, len(numbers))

    experiences = []
    for experience in batch:
        logprobs = experience.reference_logprobs
        group = replace(experience.group, payload=number(experience.group.payload))
        reference_logprobs = None if logprobs is None else number(logprobs)
        experiences.append(Experience(group, experience.advantages, reference_logprobs))
    own = [(plans, tuple([number(payload) for payload in payloads])) for plans, payloads in shares]
    return experiences, own, tuple(numbers)


def write_step(
    path: Path,
    step: int,
    version: int,
    batch: Sequence[Experience],
    shares: Sequence[Share],
    values: Mapping[Any, Any],
) -> None:
    """Writes the record of a step.

    Args:
        shares: of each rank, as `pack` made them of the batch.
        values: what each reference of the batch refers to; of a batch whose references are numbered, what each number stands for.
    """
    columns = {
        "format": np.array(_FORMAT),
        "step": np.array(step),
        "version": np.array(version),
        **_group_columns(batch, values),
        **_completion_columns(batch, values),
        **_plan_columns(batch, shares),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **{name: _compact(column) for name, column in columns.items()})
    partial.replace(path)


def read_step(path: Path) -> StepRecord:
    """Returns a step's record.

    Raises:
        ConfigError: the file is not there, or is not such a record.
    """
    with _opened(path) as file:
        columns = dict(file)
        groups = tuple(_groups(columns))
        return StepRecord(int(columns["step"]), int(columns["version"]), groups, tuple(_shares(columns, groups)))


def ranks_of(path: Path) -> int:
    """Returns how many learner ranks made a step, without reading what they consumed.

    Raises:
        ConfigError: as `read_step`.
    """
    with _opened(path) as file:
        return int(file["ranks"])


@contextmanager
def _opened(path: Path) -> Iterator[Mapping[str, NDArray[Any]]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if file["format"] != _FORMAT:
                raise ValueError(f"its format is {file['format']}, not {_FORMAT}")
            yield file
    except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile, ZlibError) as error:
        cause = "there is no such file" if isinstance(error, FileNotFoundError) else f"it cannot be read ({error})"
        raise ConfigError(f"the step's record is {path}; {cause}. Restore it.") from None


def _group_columns(batch: Sequence[Experience], values: Mapping[Any, Any]) -> dict[str, NDArray[Any]]:
    groups = [experience.group for experience in batch]
    prompts: list[Prompt] = [values[group.payload].prompt for group in groups]
    return {
        "group_id": np.array([group.group_id for group in groups]),
        "prompt_id": np.array([group.prompt_id for group in groups]),
        "submitted_version": np.array([group.submitted_version for group in groups]),
        "replica": np.array([group.replica for group in groups]),
        "prompt_tokens": np.array([len(prompt.token_ids) for prompt in prompts]),
        "prompt_token_ids": np.concatenate([prompt.token_ids for prompt in prompts]),
        "completions": np.array([len(group.rollouts) for group in groups]),
    }


def _completion_columns(batch: Sequence[Experience], values: Mapping[Any, Any]) -> dict[str, NDArray[Any]]:
    rollouts = [rollout for experience in batch for rollout in experience.group.rollouts]
    completions: list[Completion] = [own for e in batch for own in values[e.group.payload].completions]
    spans = [span for completion in completions for span in completion.spans]
    seeds = [seed for e in batch for seed in e.group.seeds or (-1,) * len(e.group.rollouts)]
    columns = {
        "seed": np.array(seeds),
        "finish_reason": np.array([completion.finish_reason for completion in completions]),
        "reward": np.array([rollout.verdict.reward for rollout in rollouts], np.float64),
        # What is not trained on has none.
        "advantage": np.array([math.nan if a is None else a for e in batch for a in e.advantages], np.float64),
        "tokens": np.array([len(completion.token_ids) for completion in completions]),
        "token_ids": np.concatenate([completion.token_ids for completion in completions]),
        "behaviour_logprobs": np.concatenate([completion.logprobs for completion in completions]),
        "spans": np.array([len(completion.spans) for completion in completions]),
        "span_version": np.array([span.version for span in spans]),
        "span_tokens": np.array([span.end - span.start for span in spans]),
    }
    references = [own for e in batch if e.reference_logprobs is not None for own in values[e.reference_logprobs]]
    if references:
        columns["reference_logprobs"] = np.concatenate(references)
    return columns


def _plan_columns(batch: Sequence[Experience], shares: Sequence[Share]) -> dict[str, NDArray[Any]]:
    """Returns the plans of all ranks, in which a bundle names its group and an item its completion by their rows."""
    group_rows = {experience.group.group_id: row for row, experience in enumerate(batch)}
    sizes = [len(experience.group.rollouts) for experience in batch]
    firsts = list(accumulate(sizes, initial=0))
    plans = [plan for own, _ in shares for plan in own]
    micro_batches = [bundles for plan in plans for bundles in plan.micro_batches]
    bundles = [bundle for own in micro_batches for bundle in own]
    items = [firsts[group_rows[bundle.group_id]] + item.sample for bundle in bundles for item in bundle.items]
    return {
        "ranks": np.array(len(shares)),
        "plan_batch_tokens": np.array([plan.batch_tokens for plan in plans]),
        "plan_micro_batches": np.array([len(plan.micro_batches) for plan in plans]),
        "micro_batch_bundles": np.array([len(own) for own in micro_batches]),
        "bundle_group": np.array([group_rows[bundle.group_id] for bundle in bundles]),
        "bundle_items": np.array([len(bundle.items) for bundle in bundles]),
        "item_completion": np.array(items),
    }


def _compact(column: NDArray[Any]) -> NDArray[Any]:
    """Returns whole numbers in the smallest type that holds them all, other columns as they are."""
    if column.dtype.kind not in "iu" or not column.size:
        return column
    kind = np.result_type(np.min_scalar_type(column.min()), np.min_scalar_type(column.max()))
    return column.astype(kind) if kind.kind in "iu" else column


def _groups(columns: Mapping[str, NDArray[Any]]) -> Iterator[RecordedGroup]:
    prompts = iter(_cut(columns["prompt_token_ids"].astype(np.int32), columns["prompt_tokens"]))
    completions, row = list(_completions(columns)), 0
    references = None
    if "reference_logprobs" in columns:
        references = _cut(columns["reference_logprobs"], columns["tokens"])
    seeds, rewards, advantages = (columns[name].tolist() for name in ("seed", "reward", "advantage"))
    facts = ("group_id", "submitted_version", "replica", "prompt_id", "completions")
    for group_id, version, replica, prompt_id, count in zip(*(columns[name].tolist() for name in facts), strict=True):
        own = slice(row, row + count)
        row += count
        yield RecordedGroup(
            group_id=group_id,
            submitted_version=version,
            replica=replica,
            sampled=SampledGroup(Prompt(prompt_id, "", next(prompts), None), tuple(completions[own])),
            seeds=tuple(seeds[own]),
            rewards=tuple(rewards[own]),
            advantages=tuple(None if math.isnan(advantage) else advantage for advantage in advantages[own]),
            reference_logprobs=None if references is None else tuple(references[own]),
        )


def _completions(columns: Mapping[str, NDArray[Any]]) -> Iterator[Completion]:
    counts = columns["tokens"]
    token_ids = _cut(columns["token_ids"].astype(np.int32), counts)
    logprobs = _cut(columns["behaviour_logprobs"], counts)
    spans = iter(zip(columns["span_version"].tolist(), columns["span_tokens"].tolist(), strict=True))
    facts = (columns[name].tolist() for name in ("spans", "finish_reason"))
    for ids, own_logprobs, num_spans, finish_reason in zip(token_ids, logprobs, *facts, strict=True):
        own, start = [], 0
        for version, length in _take(spans, num_spans):
            own.append(VersionSpan(version, start, start + length))
            start += length
        yield Completion(ids, own_logprobs, tuple(own), finish_reason, "")


def _shares(columns: Mapping[str, NDArray[Any]], groups: Sequence[RecordedGroup]) -> Iterator[Share]:
    ranks = int(columns["ranks"])
    plans = _plans(columns, groups)
    updates = len(columns["plan_batch_tokens"]) // ranks
    for _ in range(ranks):
        own = tuple(_take(plans, updates))
        used = {bundle.payload // 2 for plan in own for bundles in plan.micro_batches for bundle in bundles}
        payloads: list[Any] = []
        for row, group in enumerate(groups):
            # Positions are the same on every rank; a rank is sent what its own plans speak of.
            payloads += (group.sampled, group.reference_logprobs) if row in used else (None, None)
        yield own, tuple(payloads)


def _plans(columns: Mapping[str, NDArray[Any]], groups: Sequence[RecordedGroup]) -> Iterator[RankPlan]:
    """Yields the plans, rank by rank, with positions in payloads of two for each group: the sampled group, the references."""
    firsts = np.repeat(np.cumsum(columns["completions"]) - columns["completions"], columns["completions"]).tolist()
    advantages = columns["advantage"].tolist()
    items, bundle_rows, bundle_sizes, micro_batches = (
        iter(columns[name].tolist())
        for name in ("item_completion", "bundle_group", "bundle_items", "micro_batch_bundles")
    )

    def item(group: RecordedGroup, row: int) -> Item:
        sample = row - firsts[row]
        return Item(sample, advantages[row], len(group.sampled.completions[sample].token_ids))

    def bundle(row: int) -> Bundle:
        group, first = groups[row], 2 * row
        own = tuple(item(group, of) for of in _take(items, next(bundle_sizes)))
        references = None if group.reference_logprobs is None else first + _REFERENCES
        return Bundle(first + _PAYLOAD, references, group.group_id, group.replica, own)

    counts = zip(columns["plan_micro_batches"].tolist(), columns["plan_batch_tokens"].tolist(), strict=True)
    for num_micro_batches, batch_tokens in counts:
        own = tuple(
            tuple(bundle(row) for row in _take(bundle_rows, size)) for size in _take(micro_batches, num_micro_batches)
        )
        yield RankPlan(own, batch_tokens)


def _take(values: Iterator[T], count: int) -> list[T]:
    return list(islice(values, count))


def _cut(flat: NDArray[Any], counts: NDArray[Any]) -> list[NDArray[Any]]:
    return np.split(flat, np.cumsum(counts)[:-1])
