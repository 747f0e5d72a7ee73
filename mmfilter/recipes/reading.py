"""From a YAML file and `--set` to a `Recipe`; whatever is not a key, or of another kind, is named with its place.

`on`, `off`, `yes` and `no` are words here as in YAML 1.2: in YAML 1.1, PyYAML's default, the key `on` is true.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mmfilter.core.typed import MistypedError, read
from mmfilter.errors import RecipeError
from mmfilter.recipes.schema import Recipe

_BOOL = "tag:yaml.org,2002:bool"


class _Loader(yaml.SafeLoader):
    """Knows `true` and `false` only, and refuses a key that comes twice, of which PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 (PyYAML's)
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
        problem = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RecipeError(
            f"recipe {str(path)!r} cannot be read: {problem}; write one with: mmfilter init SHARDS -o {path}"
        ) from error
    values = _manifest(text, path) if path.suffix == ".json" else _parsed(text, f"recipe {str(path)!r}")
    if not isinstance(values, dict):
        raise RecipeError(
            f"recipe {str(path)!r} holds no sections; expected lines like 'inputs:'; write one with: mmfilter init "
            "SHARDS"
        )
    for change in changes:
        _change(values, change)
    try:
        return read(Recipe, values, what="a recipe")
    except MistypedError as error:
        raise RecipeError(str(error)) from error


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
        raise RecipeError(f"{what} is not YAML: {_problem(error)}") from error


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong, after the line that it is in."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    context = getattr(error, "context", None)
    context = f" {context}" if context else ""
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
