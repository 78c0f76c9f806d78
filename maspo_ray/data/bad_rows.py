"""Rows that cannot become prompts: each with its place and its cause; refused, or left out and counted.

Promise: no row is lost without a word. What is wrong with a row is found where it is looked at: `sources`, `run_rows`, `prompts`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from maspo_ray.errors import ConfigError

_log = logging.getLogger(__name__)

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a row.

    Attributes:
        rule: follows the row's place, such as `has no text in column prompt`.
        remedies: what can be changed, one of them; the first begins with a capital.
    """

    rule: str
    remedies: tuple[str, ...] = ("Mend it",)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that becomes no prompt.

    Attributes:
        place: such as `line 3`, or `b.jsonl, line 3` where a source has several files.
    """

    place: str
    fault: Fault


def refuse(where: str, bad: Sequence[BadRow], num_rows: int) -> ConfigError:
    """Returns the error that names the first of a source's bad rows, and says how many there are.

    Args:
        where: the source, such as `data.train.path is rows.jsonl`.
        num_rows: of the source, the bad ones among them.
    """
    first, all_bad = bad[0], len(bad) == num_rows
    remedies = first.fault.remedies if all_bad else (*first.fault.remedies, "set data.on_bad_row to skip")
    line = f"{where}; {first.place} {first.fault.rule}. {_any_of(remedies)}."
    if len(bad) > 1:
        line += (
            f" All {num_rows:,} rows are at fault." if all_bad else f" {len(bad):,} of {num_rows:,} rows are at fault."
        )
    return ConfigError(line)


def _any_of(remedies: Sequence[str]) -> str:
    *others, last = remedies
    return f"{', '.join(others)} or {last}" if others else last


def settle(where: str, bad: Sequence[BadRow], num_rows: int, on_bad_row: Literal["refuse", "skip"]) -> None:
    """Returns where a source can be used as it is.

    Raises:
        ConfigError: it has bad rows, and they are refused or there are no others.
    """
    if bad and (on_bad_row == "refuse" or len(bad) == num_rows):
        raise refuse(where, bad, num_rows)


def warn_of(where: str, bad: Sequence[BadRow], num_rows: int) -> None:
    """Says how many rows of a source are left out, and which are the first."""
    if bad:
        shown = "; ".join(f"{row.place} {row.fault.rule}" for row in bad[:_SHOWN])
        more = f"; and {len(bad) - _SHOWN:,} more" if len(bad) > _SHOWN else ""
        _log.warning("%s; left out %s of %s rows: %s%s.", where, f"{len(bad):,}", f"{num_rows:,}", shown, more)
