"""What pydantic and argparse find wrong with a config, as one line each.

Promise: a line reads `<field> is <value>; <rule>. <what to change>.`
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from maspo_ray.config.data import SOURCE_KINDS

_UNION_TAGS = {"maspo", "grpo", *SOURCE_KINDS}


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel], FieldInfo]]:
    """Yields of every key of a tree of sections its dotted path, the section that it is in and its field; sections come before their keys."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", model, field
        for section in sections_in(field.annotation):
            yield from fields_of(section, f"{prefix}{name}.")


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Returns the sections that a field's type names, in its order: the kinds of a union, none for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def field_paths(model: type[BaseModel]) -> Iterator[str]:
    """Yields the dotted path of every key of a tree of sections."""
    return (path for path, _, _ in fields_of(model))


def describe_validation_errors(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Returns one line for each fault that pydantic found."""
    return [_describe(item, root) for item in error.errors(include_url=False)]


def _describe(item: ErrorDetails, root: type[BaseModel]) -> str:
    path = ".".join(str(part) for i, part in enumerate(item["loc"]) if not (i and part in _UNION_TAGS))
    value, message = item["input"], item["msg"]
    if item["type"] == "extra_forbidden":
        return _unknown_key(path, f"{path} is {value!r}", root)
    if item["type"] == "missing":
        return f"{path} is not set; it is required. Add it to the config."
    if item["type"] == "value_error":
        message = message.removeprefix("Value error, ")
        if " is " in message and isinstance(value, (dict, BaseModel)):
            return f"{path}.{message}" if path else message
        return f"{path} is {value!r}; {message}."
    if item["type"] in ("union_tag_not_found", "union_tag_invalid"):
        allowed = item.get("ctx", {}).get("expected_tags", ", ".join(map(repr, SOURCE_KINDS)))
        given = item.get("ctx", {}).get("tag", "not set")
        return f"{path}.kind is {given}; it must be one of {allowed}. Set it."
    return f"{path} is {value!r}; {message[0].lower()}{message[1:]}. Change {path}."


def describe_repeated_flags(flags: Sequence[str], root: type[BaseModel]) -> list[str]:
    """Returns one line for each flag that is given twice, of which the last counts; those of lists and dictionaries add up."""
    fields = {path: field.annotation for path, _, field in fields_of(root)}
    given: dict[str, list[str]] = {}
    for flag, following in zip_longest(flags, flags[1:], fillvalue=""):
        name, equals, value = flag.partition("=")
        path = name.removeprefix("--")
        if name.startswith("--") and path in fields and not _adds_up(fields[path]):
            given.setdefault(path, []).append(value if equals else following)
    return [
        f"--{path} is given as {' and as '.join(values)}; the last counts."
        for path, values in given.items()
        if len(values) > 1
    ]


def _adds_up(annotation: Any) -> bool:
    parts = get_args(annotation)
    return bool(sections_in(annotation)) or get_origin(annotation) in (tuple, dict) or any(map(_adds_up, parts))


def describe_flag_error(message: str, root: type[BaseModel]) -> str:
    """Returns the line for what argparse could not read."""
    flag = re.search(r"(?:unrecognized arguments|argument):? (--)?([^\s:=]+)", message)
    name = flag.group(2).removeprefix("--") if flag else ""
    if "unrecognized arguments" in message:
        shown = f"--{name}" if flag and flag.group(1) else name
        return _unknown_key(name, f"{shown} is given", root)
    if "expected" in message:
        return f"--{name} is given without a value; a flag needs one. Write --{name} VALUE."
    return f"--{name} cannot be read; {message.removeprefix('error parsing CLI: ')}. Change --{name}."


def _unknown_key(path: str, subject: str, root: type[BaseModel]) -> str:
    if path in (known := list(field_paths(root))):
        return (
            f"{subject}; another kind has this key. Set {path.rpartition('.')[0]}.kind to that one, or remove the key."
        )
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    remedy = f"Did you mean {near[0]}?" if near else "Remove it."
    return f"{subject}; there is no such key. {remedy}"
