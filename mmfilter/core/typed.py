"""Values of a stated type, read from YAML, JSON or text; and settings, whose fields say all there is to say of them.

A setting is declared once, as the field of a frozen dataclass: its type, default and docstring, and what else `setting`
takes. The command line, recipes, `--config` files and `--sae-option` are made of these fields, here and in
`cli/settings_options`.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mmfilter.errors import MMFilterError

S = TypeVar("S")


class MistypedError(MMFilterError):
    """A value is not of its type, or a key is unknown; whoever reads the file or option says so in its own class."""


# --- declaring -------------------------------------------------------------------------------


def setting(  # noqa: PLR0913 (each says one more thing of a field)
    default: Any = MISSING,
    *,
    flag: str | None = None,
    key: str | None = None,
    metavar: str | None = None,
    least: int | None = None,
    group: str | None = None,
    parse: Callable[[str], Any] | None = None,
    expected: str | None = None,
    shown: str | None = None,
    option: bool = True,
    required: bool = False,
    kw_only: bool | None = None,
    missing: str | None = None,
    default_factory: Callable[[], Any] | None = None,
) -> Any:
    """A field of settings.

    `flag` is what the option is called (default: `--` and the name), with a comma between several; `key` the name in a
    recipe; `metavar` what stands for the value in help; `least` the smallest value; `group` its heading in
    help where that is not its class's `GROUP`; `parse` what reads it from text, `expected` that in words and `shown`
    its default in words; `option` whether the command line has it, `required` that there is no default (such a field is
    keyword-only unless `kw_only` says otherwise), `missing` what to do then."""
    about = {
        "flag": flag,
        "key": key,
        "metavar": metavar,
        "least": least,
        "group": group,
        "parse": parse,
        "expected": expected,
        "shown": shown,
        "option": option,
        "missing": missing,
    }
    metadata = {name: value for name, value in about.items() if value is not None}
    if default_factory is not None:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata, kw_only=required if kw_only is None else kw_only)


def flag_of(item: Field[Any]) -> str:
    """What the option of a field is called."""
    flag = item.metadata.get("flag")
    return "--" + item.name.replace("_", "-") if flag is None else str(flag).split(",")[-1].split("/")[0]


def key_of(item: Field[Any]) -> str:
    """What a field is called in a recipe."""
    return str(item.metadata.get("key", item.name))


@cache
def types_of(cls: type) -> dict[str, Any]:
    """Field of a settings class -> its type."""
    hints = get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


def check_fields(settings: Any, error: type[MMFilterError] = MMFilterError) -> None:
    """Raise `error` for the first field that is none of its choices, or too small; texts become paths where these
    belong."""
    kinds = types_of(settings.__class__)
    for item in fields(settings):
        value = getattr(settings, item.name)
        if (
            isinstance(value, str)
            and Path in alternatives(kinds[item.name])
            and str not in alternatives(kinds[item.name])
        ):
            object.__setattr__(settings, item.name, Path(value))  # where a notebook gives a text
        choices = choices_of(kinds[item.name])
        if choices and value is not None and value not in choices:
            raise error(f"{flag_of(item)} is {value!r}; expected one of {', '.join(map(str, choices))}")
        least = item.metadata.get("least")
        if least is not None and value is not None and value < least:
            raise error(f"{flag_of(item)} is {value}; at least {least} is needed")


def combined(cls: type[S], *parts: Any, **more: Any) -> S:
    """Settings made of the fields of the same names of other settings; `more` goes first, later parts before
    earlier."""
    values: dict[str, Any] = {}
    names = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    for part in parts:
        values |= {item.name: getattr(part, item.name) for item in fields(part) if item.name in names}
    return cls(**(values | more))


# --- reading ---------------------------------------------------------------------------------


def read(cls: type[S], values: Any, place: str = "", *, what: str, root: type | None = None) -> S:
    """Settings from the mapping that says them, with sections in sections.

    Raises `MistypedError` naming the place: for a key that is not one of `what`, with the nearest (one of that name
    anywhere in `root`, or the most alike here), for a missing key, and for a value of another type.
    """
    if not isinstance(values, Mapping):
        keys = ", ".join(map(key_of, fields(cls)[:3]))  # type: ignore[arg-type]
        raise MistypedError(f"{place} is {values!r}; expected keys such as {keys}")
    kinds, by_key = types_of(cls), {key_of(item): item for item in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in by_key:
            near = _nearest_key(str(key), cls, place, root or cls)
            raise MistypedError(f"{_at(place, key)} is not a key of {what}; the nearest is {near}")
    _check_complete(by_key, values, place)

    def part(kind: Any, value: Any, at: str) -> Any:
        section, several = _section(kind)
        if section is None:
            return typed(kind, value, at)
        if several:
            if not isinstance(value, (list, tuple)):
                raise MistypedError(f"{at} is {value!r}; expected a list")
            return tuple(
                read(section, inner, f"{at}.{i}", what=what, root=root or cls) for i, inner in enumerate(value)
            )
        if value is None and kind is not section:
            return None
        return read(section, {} if value is None else value, at, what=what, root=root or cls)

    return cls(
        **{by_key[key].name: part(kinds[by_key[key].name], value, _at(place, key)) for key, value in values.items()}
    )


def _check_complete(by_key: Mapping[str, Field[Any]], values: Mapping[str, Any], place: str) -> None:
    for key, item in by_key.items():
        if key not in values and item.default is MISSING and item.default_factory is MISSING:
            raise MistypedError(f"{_at(place, key)} is missing; {item.metadata.get('missing', 'it has no default')}")


def _section(kind: Any) -> tuple[Any, bool]:
    """The settings class that a kind stands for, None for one that is none, and whether for a list of them."""
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        return (inner if is_dataclass(inner) else None), True
    options = [option for option in alternatives(kind) if option is not type(None)]
    return (options[0] if len(options) == 1 and is_dataclass(options[0]) else None), False


def typed(kind: Any, value: Any, place: str) -> Any:
    """A value of YAML or JSON as one of its kind; raises `MistypedError`."""
    options = [inner for inner in alternatives(kind) if inner is not type(None)]
    if value is None and len(options) < len(alternatives(kind)):
        return None
    for option in options:
        if get_origin(option) is tuple:
            return _typed_list(option, value, place)
        if get_origin(option) is dict:
            if not isinstance(value, Mapping):
                raise MistypedError(f"{place} is {value!r}; expected keys and values")
            return dict(value)
        if _fits(option, value):
            return float(value) if option is float else option(value) if option is Path else value
    raise MistypedError(f"{place} is {value!r}; expected {expected(kind)}")


def _typed_list(kind: Any, value: Any, place: str) -> tuple[Any, ...]:
    inner = get_args(kind)[0]
    parts = [value] if isinstance(value, str) and inner is str else value
    if not isinstance(parts, (list, tuple)):
        raise MistypedError(f"{place} is {value!r}; expected a list")
    return tuple(typed(inner, part, f"{place}.{i}") for i, part in enumerate(parts))


def parsed(kind: Any, value: Any) -> Any:
    """A value of its kind, or the text that says it: `1e6`, `true`, `none`, `256,512`; raises `ValueError`."""
    options = alternatives(kind)
    if value is None or (type(None) in options and str(value).lower() == "none"):
        if type(None) in options:
            return None
        raise ValueError(value)
    options = tuple(option for option in options if option is not type(None))
    if get_origin(options[0]) is tuple:
        inner = get_args(options[0])[0]
        parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
        return tuple(parsed(inner, part) for part in parts)
    if choices := choices_of(kind):
        by_word = {str(choice): choice for choice in choices}
        if str(value) not in by_word:
            raise ValueError(value)
        return by_word[str(value)]
    if set(options) == {int, float}:
        number = _number(value)
        return int(number) if number >= 1 and number == int(number) else number
    return _PARSERS.get(options[0], options[0])(value)


def _boolean(value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise ValueError(value)
    return str(value).lower() == "true"


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError(value)
    return float(value)


def _whole(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError(value)
    return int(number)


_PARSERS: dict[Any, Callable[[Any], Any]] = {bool: _boolean, int: _whole, float: _number}


def share(text: str) -> float:
    """`10%` or `0.1` as a fraction; raises `ValueError`."""
    value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def keyed(kinds: Mapping[str, Any], values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Values by key, each of its kind or text that says it; raises `MistypedError` naming key and nearest, or value."""
    for key in values:
        if key not in kinds:
            raise MistypedError(f"{what} has the unknown key {key!r}; the nearest is {nearest(str(key), kinds)!r}")
    found: dict[str, Any] = {}
    for key, value in values.items():
        try:
            found[key] = parsed(kinds[key], value)
        except (ValueError, TypeError) as error:
            raise MistypedError(f"{what} has {key} {value!r}; expected {expected(kinds[key])}") from error
    return found


def expected(kind: Any) -> str:
    """A kind in words: `a whole number`, `one of both, image, text`."""
    words: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        Path: "a path",
    }
    parts = []
    options = [option for option in alternatives(kind) if option is not type(None)]
    for option in options:
        if option is int and float in options:
            continue
        if get_origin(option) is Literal:
            choices = [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in get_args(option)]
            parts.append(choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}")
        elif get_origin(option) is tuple:
            inner = get_args(option)[0]
            parts.append("whole numbers with commas" if inner is int else "numbers with commas")
        else:
            parts.append(words.get(option, str(option)))
    return " or ".join(parts)


def choices_of(kind: Any) -> tuple[Any, ...]:
    """The values of a `Literal`, or of one that may be None; () for another kind."""
    for option in alternatives(kind):
        if get_origin(option) is Literal:
            return get_args(option)
    return ()


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that was probably meant."""
    return difflib.get_close_matches(name, list(names), 1, cutoff=0)[0]


def close(name: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant, None where none is like it."""
    return next(iter(difflib.get_close_matches(name, list(names), 1)), None)


def alternatives(kind: Any) -> Sequence[Any]:
    """The types of a union, or the one type."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _fits(kind: Any, value: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value is choice or (value == choice and isinstance(value, str)) for choice in get_args(kind))
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, (int, float)) or (isinstance(value, str) and _says_number(value))
    return isinstance(value, str if kind is Path else kind)


def _says_number(text: str) -> bool:
    try:
        float(text)  # YAML 1.1 takes 1e-3 for a word
    except ValueError:
        return False
    return True


def _at(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)


def _nearest_key(key: str, cls: type, place: str, root: type) -> str:
    elsewhere = [name for name in _all_keys(root, "") if name.rpartition(".")[2] == key]
    return elsewhere[0] if elsewhere else _at(place, nearest(key, map(key_of, fields(cls))))  # type: ignore[arg-type]


def _all_keys(cls: type, place: str) -> list[str]:
    keys = []
    for item in fields(cls):  # type: ignore[arg-type]
        kind, at = types_of(cls)[item.name], _at(place, key_of(item))
        keys.append(at)
        section, several = _section(kind)
        if section is not None:
            keys += _all_keys(section, at + (".0" if several else ""))
    return keys
