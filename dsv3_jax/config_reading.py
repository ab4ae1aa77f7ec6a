"""What a person wrote, a ConfigDict and assignments to its fields, as a `Config`; and problems with it."""

import ast
import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """One thing wrong with a configuration."""

    field: str  # Dotted, as on the command line without `config.`.
    value: Any
    fix: str

    def __str__(self) -> str:
        return f"  {self.field} = {self.value!r}: {self.fix}"


class ConfigError(ValueError):
    """A configuration that cannot run; the message lists every problem with its field, value and fix."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        count = len(self.problems)
        title = f"{count} problem{'s' if count > 1 else ''} in the configuration:"
        super().__init__("\n".join([title, *map(str, self.problems)]))


def override(tree: Any, assignments: Iterable[str]) -> list[Problem]:
    """Applies `a.b.c=value` assignments to a ConfigDict in place; unknown names come back as problems."""
    problems = []
    for assignment in assignments:
        path, _, text = assignment.partition("=")
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node[name] if isinstance(node, Mapping) or hasattr(node, "keys") and name in node else None
            if node is None:
                break
        if node is None or not hasattr(node, "keys") or leaf not in node:
            problems.append(Problem(path, text, _unknown(path, _names(tree))))
            continue
        try:
            node[leaf] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            node[leaf] = {"true": True, "false": False}.get(text.lower(), text)
    return problems


def _names(tree: Any, prefix: str = "") -> list[str]:
    names = []
    for name in tree.keys():
        value = tree[name]
        names += _names(value, f"{prefix}{name}.") if hasattr(value, "keys") else [f"{prefix}{name}"]
    return names


def _unknown(path: str, names: list[str]) -> str:
    def last(name: str) -> str:
        return name.rpartition(".")[2]

    # Of fields whose own name is much like it, whatever their section; else of all.
    alike = difflib.get_close_matches(last(path), {last(name) for name in names}, n=1, cutoff=0.75)
    close = difflib.get_close_matches(
        path, [name for name in names if not alike or last(name) in alike], n=1, cutoff=0 if alike else 0.5
    )
    return f"unknown field; did you mean {close[0]}?" if close else "unknown field; remove it"


def convert(cls: type, tree: Any, prefix: str, unknown: list[Problem], wrong_types: list[Problem]) -> Any:
    """`tree` as the dataclass `cls`; what is wrong with names and with types is added to the lists."""
    hints = typing.get_type_hints(cls)
    defaults = cls()
    values = {}
    for name in tree.keys():
        value, path = tree[name], prefix + name
        if name not in hints:
            names = [prefix + known for known in hints]
            unknown.append(Problem(path, _plain(value), _unknown(path, names)))
        elif dataclasses.is_dataclass(hints[name]):
            if hasattr(value, "keys"):
                values[name] = convert(hints[name], value, path + ".", unknown, wrong_types)
            else:
                wrong_types.append(Problem(path, value, "must be a section of fields"))
        else:
            try:
                values[name] = _coerce(hints[name], value)
            except TypeError as error:
                wrong_types.append(Problem(path, value, f"{error}, for example {getattr(defaults, name)!r}"))
    return dataclasses.replace(defaults, **values)


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else value


def _coerce(kind: Any, value: Any) -> Any:
    """The value as `kind`; integers written as floats (1e6) and floats written as integers are taken."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool and isinstance(value, bool) or kind is str and isinstance(value, str):
        return value
    if kind is int and number and math.isfinite(value) and int(value) == value:
        return int(value)
    if kind is float and number and math.isfinite(value):
        return float(value)
    if isinstance(kind, types.GenericAlias) and isinstance(value, list | tuple):
        with contextlib.suppress(TypeError):  # It names the item's type; the field is a list.
            return tuple(_coerce(kind.__args__[0], item) for item in value)
    wanted = {bool: "true or false", str: "text", int: "a whole number", float: "a finite number"}
    raise TypeError(f"must be {wanted.get(kind, 'a list of finite numbers')}")
