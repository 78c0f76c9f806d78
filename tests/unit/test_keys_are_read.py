"""No key of the config is a dead letter: each is read by code outside the config itself, and a test sets it to something.

Both are found in the source, by the types of its variables. That a key has the effect it promises is for the test that sets it.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

import maspo_ray
from maspo_ray.config import RunConfig
from maspo_ray.config.faults import fields_of, sections_in

ROOT = Path(maspo_ray.__file__).parents[1]

Types = tuple[type[BaseModel], ...]

# Of sources, by their place in data.train.
KEYS = {(section, path.rpartition(".")[2]): path for path, section, _ in reversed(list(fields_of(RunConfig)))}
SECTIONS: dict[str, type[BaseModel]] = {
    parent.__name__: parent
    for section in [RunConfig, *(section for section, _ in KEYS)]
    for parent in section.__mro__
    if issubclass(parent, BaseModel) and parent.__module__.startswith("maspo_ray")
}
ALIASES: dict[str, Types] = {
    "ObjectiveConfig": tuple(sections_in(RunConfig.model_fields["objective"].annotation)),
    "DataSource": tuple(SECTIONS[name] for name in SECTIONS if name.endswith("Source")),
    "TrainSource": tuple(SECTIONS[name] for name in SECTIONS if name.endswith("Source")),
}
ROLES: Types = tuple(SECTIONS[name] for name in ("RolloutConfig", "RewardConfig", "ReferenceConfig", "LearnerConfig"))

NOT_SET: dict[str, str] = {
    "data.train.subset": "a dataset of the hub with several configurations, which no test can reach; it is passed on beside name and split",
    "learner.max_skipped_updates": "test_update_watch.py gives UpdateWatch the number itself",
    "logging.steps": "on by default, as all tests of replays take it",
    "pipeline.parity_bound": "test_parity.py gives ParityBounds the number itself",
    "pipeline.parity_prompts": "how many prompts the probe takes, whichever the number",
    "rollout.timeout_s": "test_rollout_pool.py gives RolloutPool the number itself",
}
"""Keys that no test sets, each with its reason."""


class _Reads(ast.NodeVisitor):
    """Notes which keys a module reads, by what its annotations and assignments say of its variables."""

    def __init__(self, own: type[BaseModel] | None = None) -> None:
        self.reads: set[tuple[type[BaseModel], str]] = set()
        self._names: dict[str, Types] = {} if own is None else {"self": (own,)}
        self._attributes: dict[str, Types] = {}

    def _named_in(self, annotation: ast.expr | None) -> Types:
        if annotation is None:
            return ()
        names = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]
        return tuple(
            t for name in names for t in (*ALIASES.get(name, ()), *((SECTIONS[name],) if name in SECTIONS else ()))
        )

    def _types_of(self, node: ast.expr) -> Types:
        if isinstance(node, ast.Name):
            return self._names.get(node.id, ())
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in self._attributes:
                return self._attributes[node.attr]
            fields = (found.model_fields.get(node.attr) for found in self._types_of(node.value))
            return tuple(t for field in fields if field is not None for t in sections_in(field.annotation))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            return ROLES
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("values", "items")
        ):
            return self._types_of(node.func.value)
        if isinstance(node, ast.Dict):
            return tuple(t for value in node.values for t in self._types_of(value))
        if isinstance(node, ast.IfExp):
            return (*self._types_of(node.body), *self._types_of(node.orelse))
        return ()

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, other in zip(target.elts, value.elts, strict=True):
                self._assign(one, other)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            name_of = target.value.id
            self._names[name_of] = (*self._names.get(name_of, ()), *self._types_of(value))
        elif types := self._types_of(value):
            for name in [target, *(target.elts if isinstance(target, ast.Tuple) else [])]:
                if isinstance(name, ast.Name):
                    self._names[name.id] = types
                elif isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name) and name.value.id == "self":
                    self._attributes[name.attr] = types

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self._attributes = self._attributes, {}
        for item in node.body:
            # The fields of a dataclass.
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                self._attributes[item.target.id] = self._named_in(item.annotation)
        self.generic_visit(node)
        self._attributes = before

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        before = dict(self._names)
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            if types := self._named_in(argument.annotation):
                self._names[argument.arg] = types
        self.generic_visit(node)
        self._names = before

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._assign(target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self._assign(node.target, node.value)

    def visit_For(self, node: ast.For) -> None:
        self._assign(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._assign(node.target, node.iter)
        self.generic_visit(node)

    def _comprehend(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        for generator in node.generators:
            self.visit(generator)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehend

    def visit_Attribute(self, node: ast.Attribute) -> None:
        for found in self._types_of(node.value):
            # Or one of its kinds, found out by `isinstance`.
            kinds = [kind for kind in SECTIONS.values() if issubclass(kind, found) and node.attr in kind.model_fields]
            self.reads |= {(kind, node.attr) for kind in ([found] if node.attr in found.model_fields else kinds)}
        self.generic_visit(node)


@cache
def _reads() -> frozenset[tuple[type[BaseModel], str]]:
    """Returns the keys that the framework and the catalogue read; within the config, only its properties count, not its checks."""
    found: set[tuple[type[BaseModel], str]] = set()
    for file in [*(ROOT / "maspo_ray").rglob("*.py"), *(ROOT / "actors").rglob("*.py")]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if file.parent.name != "config":
            visitor = _Reads()
            visitor.visit(tree)
            found |= visitor.reads
            continue
        for section in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in SECTIONS):
            visitor = _Reads(SECTIONS[section.name])
            for method in (item for item in section.body if isinstance(item, ast.FunctionDef)):
                decorators = {d.id for d in method.decorator_list if isinstance(d, ast.Name)}
                if "property" in decorators or not method.decorator_list:
                    visitor.visit(method)
            found |= visitor.reads
    return frozenset(found)


def _set_in(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yields what a test sets: a section's name or class, and a key of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            path = node.value.removeprefix("--")
            section, _, key = path.rpartition(".")
            yield section, key.partition("=")[0]
        elif isinstance(node, ast.Dict):
            yield from (("", key) for key in _keys_of(node))
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant):
                    yield from ((str(key.value), inner) for inner in _keys_of(value))
        elif isinstance(node, ast.Call):
            name = node.func.value if isinstance(node.func, ast.Attribute) else node.func
            if isinstance(name, ast.Name):
                yield from ((name.id, keyword.arg) for keyword in node.keywords if keyword.arg)
                yield from ((name.id, key) for argument in node.args for key in _keys_of(argument))
            yield from (("", keyword.arg) for keyword in node.keywords if keyword.arg)
            for keyword in node.keywords:
                yield from ((keyword.arg or "", key) for key in _keys_of(keyword.value))


def _keys_of(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Dict):
        yield from (str(key.value) for key in node.keys if isinstance(key, ast.Constant))


@cache
def _set_by_tests() -> frozenset[tuple[str, str]]:
    files = [file for file in (ROOT / "tests").rglob("*.py") if file.name != Path(__file__).name]
    return frozenset(pair for file in files for pair in _set_in(ast.parse(file.read_text(encoding="utf-8"))))


def _leaves() -> list[tuple[type[BaseModel], str, str]]:
    return [
        (section, name, path)
        for (section, name), path in KEYS.items()
        if name != "kind" and not sections_in(section.model_fields[name].annotation)
    ]


def test_every_key_is_read_by_code_outside_the_config() -> None:
    unread = {
        path
        for section, name, path in _leaves()
        if not any((parent, name) in _reads() for parent in section.__mro__ if issubclass(parent, BaseModel))
    }
    assert unread == set()


def test_every_key_is_set_by_a_test() -> None:
    unset = set()
    places: dict[str, set[str]] = {}
    for _, name, path in _leaves():
        places.setdefault(name, set()).add(path.replace("train.sources.", "train."))
    for section, name, path in _leaves():
        where = path.rpartition(".")[0]
        names = [where, where.rpartition(".")[2], *(parent.__name__ for parent in section.__mro__)]
        if name in SECTIONS["RoleConfig"].model_fields:
            # The same lines read it for all roles.
            names += ["rollout", "reward", "reference", "learner"]
        if len(places[name]) == 1:
            # A test's own helper may take the key without its section, where no other has one of this name.
            names.append("")
        if not any((place, name) in _set_by_tests() for place in names):
            unset.add(path)
    assert unset == NOT_SET.keys()


@pytest.mark.parametrize(
    ("source", "read"),
    [
        ("def f(config: RunConfig): return config.eval.samples", {"eval.samples"}),
        ("def f(config: RunConfig):\n    part = config.eval\n    return part.samples", {"eval.samples"}),
        ("class A:\n    def __init__(self, e: EvalConfig | None): self._e = e\n    def g(self): return self._e.name", {"eval.name"}),
        # Another's attribute of the same name, and one that is only written into.
        ("def f(other): return other.samples", set()),
        ("def f(config: RunConfig): return config.eval", set()),
    ],
)  # fmt: skip
def test_reads_are_found_by_type(source: str, read: set[str]) -> None:
    visitor = _Reads()
    visitor.visit(ast.parse(source))
    assert {KEYS[key] for key in visitor.reads if key in KEYS} - {"eval"} == read
