"""The page that lists every key of the config, its type, default and meaning: docs/config.md, and what `maspo docs config` prints.

Promise: made from the sections themselves, so that it is as complete and as right as they are. Pure.
"""

import json
import types
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from maspo_ray.config.faults import sections_in
from maspo_ray.config.run import RunConfig

_INTRO = """# Config

Every key of a run's YAML, made by `maspo docs config`. Each can be given on the command line too, over the file: `--pipeline.steps 50`,
a list as `--learner.betas 0.9,0.95`, a dictionary as JSON. A key without a default must be set.
`maspo check` says which keys have no effect in a run.
"""

_BOUNDS: list[tuple[type, str, str]] = [
    (Ge, "ge", "≥ {}"),
    (Gt, "gt", "> {}"),
    (Le, "le", "≤ {}"),
    (Lt, "lt", "< {}"),
    (MinLen, "min_length", "length ≥ {}"),
    (MaxLen, "max_length", "length ≤ {}"),
]
_NAMES: dict[Any, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    Path: "path",
    Any: "anything",
}


def config_page() -> str:
    """Returns the page in Markdown."""
    described: set[type[BaseModel]] = set()
    plain = {name: field for name, field in RunConfig.model_fields.items() if not sections_in(field.annotation)}
    parts = [_INTRO, "## The run's own\n", _table("", RunConfig, plain)]
    for name, field in RunConfig.model_fields.items():
        if name not in plain:
            parts += [f"## {name}\n", f"{field.description}\n", *_section(name, field, described)]
    return "\n".join(parts)


def section_lines() -> Iterator[str]:
    """Yields a line for each section, for `--help`."""
    for name, field in RunConfig.model_fields.items():
        yield f"  {name:<12}{field.description}"


def _section(path: str, field: FieldInfo, described: set[type[BaseModel]]) -> Iterator[str]:
    """Yields the tables of a section's kinds, then those of the sections in them; a kind that has one already is not described again."""
    kinds = [kind for kind in sections_in(field.annotation) if kind not in described]
    for kind in kinds:
        described.add(kind)
        if len(sections_in(field.annotation)) > 1:
            yield f"### {path}, kind: {kind.model_fields['kind'].default}\n"
        if (text := (kind.__dict__.get("__doc__") or "").strip()) and not text.startswith("!!!"):
            yield " ".join(text.split()) + "\n"
        yield _table(f"{path}.", kind, kind.model_fields)
        for name, inner in kind.model_fields.items():
            new = [section for section in sections_in(inner.annotation) if section not in described]
            if new and len(sections_in(inner.annotation)) == 1:
                yield f"### {path}.{name}\n"
            yield from _section(f"{path}.{name}", inner, described)


def _table(prefix: str, section: type[BaseModel], fields: dict[str, FieldInfo]) -> str:
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields.items():
        meaning = " ".join(_meaning(section, name).split()).replace("|", "\\|")
        rows.append(f"| `{prefix}{name}` | {_type(field.annotation, field.metadata)} | {_default(field)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _meaning(section: type[BaseModel], name: str) -> str:
    """Returns the text under a field, of one that only has another default the text of the section that it inherits from."""
    above = (parent.model_fields.get(name) for parent in section.__mro__ if issubclass(parent, BaseModel))
    texts = (field.description for field in above if field is not None)
    return next(filter(None, texts), "This kind." if name == "kind" else "")


def _type(annotation: Any, metadata: list[Any]) -> str:
    """Returns a type as people read it, with its bounds."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(parts[0], [*parts[1:], *metadata])
    if origin in (Union, types.UnionType):
        named = [_type(part, metadata) for part in parts if part is not type(None)]
        kinds = dict.fromkeys(named)
        return " or ".join([*kinds, "null"] if type(None) in parts else kinds)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if origin is tuple:
        return _bounded(
            f"list of {_type(parts[0], [])}s" if parts[-1] is Ellipsis else f"{len(parts)} {_type(parts[0], [])}s",
            metadata,
        )
    if origin is dict:
        return "section of keys"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    return _bounded(_NAMES.get(annotation, str(annotation)), metadata)


def _bounded(text: str, metadata: list[Any]) -> str:
    bounds = [
        shown.format(f"{getattr(item, name):,}")
        for item in metadata
        for kind, name, shown in _BOUNDS
        if isinstance(item, kind)
    ]
    return f"{text} ({', '.join(bounds)})" if bounds else text


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "must be set"
    if isinstance(value, BaseModel):
        return "as below"
    return f"`{json.dumps(value, default=str)}`"
