"""From a YAML file and `--set` to a `Recipe`; whatever is no key, or of another kind, is named with its place.

`on`, `off`, `yes` and `no` are words here as in YAML 1.2: in YAML 1.1, PyYAML's default, the key `on` is true.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from mmfilter.errors import RecipeError
from mmfilter.recipes.schema import Recipe

_BOOL = "tag:yaml.org,2002:bool"


class _Loader(yaml.SafeLoader):
    """Knows `true` and `false` only, and refuses a key that comes twice, of which PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} comes twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with `KEY.KEY=VALUE` changes; raises `RecipeError`.

    The file is YAML, or `*.json`: the manifest of an output that a recipe made.
    """
    if path.is_dir():
        raise RecipeError(
            f"recipe {str(path)!r} is a folder; name a recipe, or the manifest.json of an output that a recipe made"
        )
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise RecipeError(
            f"recipe {str(path)!r} cannot be read: {problem}; write one with: mmfilter init SHARDS -o {path}"
        ) from error
    values = _manifest(text, path) if path.suffix == ".json" else _parsed(text, f"recipe {str(path)!r}")
    if not isinstance(values, dict):
        raise RecipeError(
            f"recipe {str(path)!r} holds no sections; expected lines like 'inputs:'; write one with: mmfilter init SHARDS"
        )
    for change in changes:
        _change(values, change)
    return build(Recipe, values, "")


def _manifest(text: str, path: Path) -> Any:
    """The recipe in an output's manifest."""
    try:
        about = json.loads(text)
        return about["recipe"]["recipe"]
    except ValueError as error:
        raise RecipeError(f"{str(path)!r} is not valid JSON ({error})") from error
    except (KeyError, TypeError, IndexError) as error:
        raise RecipeError(
            f"{str(path)!r} holds no recipe; expected the manifest of an output that mmfilter run made"
        ) from error


def _parsed(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # derived from the safe loader
    except yaml.YAMLError as error:
        raise RecipeError(f"{what} is no YAML: {_problem(error)}") from error


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong, after the line that it is in."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    context = f" {error.context}" if error.context else ""
    return f"line {mark.line + 1}, column {mark.column + 1}{context}: {problem}"


def _change(values: dict[str, Any], change: str) -> None:
    """Put `select.top=30%` or `outputs.0.path=best` into the values of a recipe."""
    place, equals, text = change.partition("=")
    if not equals or not all(part.strip() for part in place.split(".")):
        raise RecipeError(f"--set {change!r} is not KEY.KEY=VALUE, such as select.top=30%")
    inner: Any = values
    *way, last = place.strip().split(".")
    for i, part in enumerate(way):
        inner = _step(inner, part, ".".join(way[: i + 1]), change)
    value = _parsed(text, f"--set {change!r}")
    if isinstance(inner, list):
        inner[_index(inner, last, change)] = value
    else:
        inner[last] = value


def _step(inner: Any, part: str, place: str, change: str) -> Any:
    if isinstance(inner, list):
        found = inner[_index(inner, part, change)]
    else:
        if inner.get(part) is None:
            inner[part] = {}
        found = inner[part]
    if not isinstance(found, (dict, list)):
        raise RecipeError(f"--set {change!r}: {place} is {found!r} in the recipe and has no keys")
    return found


def _index(inner: list[Any], part: str, change: str) -> int:
    if not part.isdecimal() or int(part) >= len(inner):
        raise RecipeError(
            f"--set {change!r}: {part!r} is none of the {len(inner)} parts of that list; they count from 0"
        )
    return int(part)


def build(cls: type, values: Any, place: str) -> Any:
    """A section from the mapping that says it; raises `RecipeError`."""
    if not isinstance(values, Mapping):
        raise RecipeError(
            f"{place} is {values!r}; expected keys such as {', '.join(item.name for item in fields(cls)[:3])}"
        )
    kinds = get_type_hints(cls)
    for key in values:
        if key not in kinds:
            raise RecipeError(
                f"{_at(place, key)} is no key of a recipe; the nearest is {_nearest(str(key), cls, place)}"
            )
    for item in fields(cls):
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise RecipeError(f"{_at(place, item.name)} is missing; {_EXPECTED.get(item.name, 'it has no default')}")
    return cls(**{key: _value(kinds[key], value, _at(place, key)) for key, value in values.items()})


_EXPECTED = {
    "inputs": "name the shards there, such as 'inputs: {shards: data/*.tar}'",
    "shards": "name paths, globs, brace patterns or URLs",
    "path": "name a new folder, or a new file for tar, keys and *.npy",
}


def _at(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)


def _nearest(key: str, cls: type, place: str) -> str:
    """The key that was probably meant: one of that name in another section, or the most alike in this one."""
    elsewhere = [name for name in _all_keys(Recipe, "") if name.rpartition(".")[2] == key]
    if elsewhere:
        return elsewhere[0]
    names = [item.name for item in fields(cls)]
    return _at(place, difflib.get_close_matches(key, names, 1, cutoff=0)[0])


def _all_keys(cls: type, place: str) -> list[str]:
    found = []
    for name, kind in get_type_hints(cls).items():
        found.append(_at(place, name))
        if get_origin(kind) is tuple and is_dataclass(get_args(kind)[0]):
            found += _all_keys(get_args(kind)[0], _at(place, f"{name}.0"))
        for inner in (kind, *get_args(kind)):
            if get_origin(kind) is not tuple and is_dataclass(inner):
                found += _all_keys(inner, _at(place, name))
    return found


def _value(kind: Any, value: Any, place: str) -> Any:
    """The value as one of its kind; raises `RecipeError`."""
    if get_origin(kind) in (Union, types.UnionType):
        return _one_of(get_args(kind), value, place)
    if is_dataclass(kind):
        return build(kind, {} if value is None else value, place)
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        parts = [value] if isinstance(value, str) and inner is str else value
        if not isinstance(parts, (list, tuple)):
            raise RecipeError(f"{place} is {value!r}; expected a list")
        return tuple(_value(inner, part, f"{place}.{i}") for i, part in enumerate(parts))
    if get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise RecipeError(f"{place} is {value!r}; expected keys and values")
        return dict(value)
    if not _fits(kind, value):
        raise RecipeError(f"{place} is {value!r}; expected {_told((kind,))}")
    return float(value) if kind is float else value


def _one_of(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    if value is None:
        return None
    some = [kind for kind in kinds if kind is not type(None)]
    if len(some) == 1:
        return _value(some[0], value, place)
    for kind in some:
        if _fits(kind, value):
            return float(value) if kind is float else value
    raise RecipeError(f"{place} is {value!r}; expected {_told(some)}")


def _fits(kind: Any, value: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value is choice or (value == choice and isinstance(value, str)) for choice in get_args(kind))
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, (int, float)) or (isinstance(value, str) and _is_number(value))
    return isinstance(value, kind)


def _is_number(text: str) -> bool:
    try:
        float(text)  # YAML 1.1 takes 1e-3 for a word
    except ValueError:
        return False
    return True


def _told(kinds: Sequence[Any]) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    told = []
    for kind in kinds:
        if kind is int and float in kinds:
            continue
        if get_origin(kind) is Literal:
            choices = [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in get_args(kind)]
            told.append(choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}")
        else:
            told.append(words[kind])
    return " or ".join(told)
