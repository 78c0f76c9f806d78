"""What pydantic and argparse find wrong with a config, as one line each.

Promise: a line reads `<field> is <value>; <rule>. <what to change>.`
"""

import difflib
import re
from collections.abc import Iterator
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_UNION_TAGS = {"maspo", "grpo", "jsonl", "huggingface", "reasoning_gym"}


def field_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yields the dotted path of every key of a tree of sections."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        pending = [field.annotation]
        while pending:
            annotation = pending.pop()
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from field_paths(annotation, f"{prefix}{name}.")
            else:
                pending.extend(get_args(annotation))


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
        allowed = item.get("ctx", {}).get("expected_tags", "'jsonl', 'huggingface', 'reasoning_gym'")
        given = item.get("ctx", {}).get("tag", "not set")
        return f"{path}.kind is {given}; it must be one of {allowed}. Set it."
    return f"{path} is {value!r}; {message[0].lower()}{message[1:]}. Change {path}."


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
