"""A YAML file → the tree of its keys, in which none is given twice.

Promise: a key that stands twice in one section is refused with both lines, since PyYAML would keep the last and drop the first, whole
sections included. A key that a merge (`<<`) brings may be given again: that is what merging is for.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from maspo_ray.errors import ConfigError

_MERGE_TAG = "tag:yaml.org,2002:merge"


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the sections of a config's file.

    Raises:
        ConfigError: it is not there, is not YAML, holds no sections, or gives a key twice.
    """
    if not path.is_file():
        raise ConfigError(f"config is {path}; there is no such file. Give the path of a YAML file.")
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, yaml.SafeLoader)
        twice = list(_given_twice(root)) if root is not None else []
        tree = None if twice else yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ConfigError(f"config is {path}; it is not YAML{where}. Mend the file.") from None
    if twice:
        raise ConfigError(
            "\n".join(
                f"{key} is given twice (lines {first} and {second} of {path}); only the last would count. Put both into one."
                for key, first, second in twice
            )
        )
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(f"config is {path}; it must hold sections such as `model:`. Mend the file.")
    return tree


def _given_twice(root: yaml.Node) -> Iterator[tuple[str, int, int]]:
    """Yields the dotted path of each key that a section gives twice, and both lines, counted from 1."""
    pending, seen = [("", root)], set()
    while pending:
        prefix, node = pending.pop(0)
        # An alias is the node that it stands for, which may hold itself.
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending += [(f"{prefix}{i}.", item) for i, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                # With its tag, since 1 and '1' are two keys.
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines and key.tag != _MERGE_TAG:
                    yield f"{prefix}{key.value}", lines[name], line
                lines.setdefault(name, line)
                pending.append((f"{prefix}{key.value}.", value))
