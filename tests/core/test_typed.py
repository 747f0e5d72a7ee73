"""Typed values from YAML and from text, and what is said of those that are not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from mmfilter.core.typed import (
    MistypedError,
    check_fields,
    close,
    combined,
    expected,
    keyed,
    parsed,
    read,
    setting,
    share,
    typed,
)
from mmfilter.errors import SelectionError


@dataclass(frozen=True)
class Inner:
    size: int = setting(3, least=1)
    side: Literal["both", "image"] = "both"


@dataclass(frozen=True)
class Outer:
    name: str = setting(required=True, missing="name it")
    inner: Inner = setting(default_factory=Inner)
    many: tuple[Inner, ...] = ()
    folder: Path = setting(Path("here"), key="directory")


def test_sections_become_their_classes():
    values = {"name": "a", "inner": {"size": 4}, "many": [{"side": "image"}, {}], "directory": "there"}
    assert read(Outer, values, what="a test") == Outer(
        name="a", inner=Inner(4), many=(Inner(side="image"), Inner()), folder=Path("there")
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "sise": 4}, "sise is not a key of a test; the nearest is"),
        ({"name": "a", "inner": {"sise": 4}}, "inner.sise is not a key of a test; the nearest is inner.size"),
        ({"name": "a", "size": 4}, "size is not a key of a test; the nearest is inner.size"),
        ({"inner": {}}, "name is missing; name it"),
        ({"name": "a", "inner": {"size": "four"}}, "inner.size is 'four'; expected a whole number"),
        ({"name": "a", "inner": {"size": True}}, "inner.size is True; expected a whole number"),
        ({"name": "a", "many": {"size": 4}}, "many is {'size': 4}; expected a list"),
        ({"name": "a", "many": [{}, {"side": "left"}]}, "many.1.side is 'left'; expected one of both, image"),
        ({"name": "a", "inner": 4}, "inner is 4; expected keys such as size, side"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(values, message):
    with pytest.raises(MistypedError) as error:
        read(Outer, values, what="a test")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "1e6", 1_000_000),
        (int | None, "none", None),
        (bool, "true", True),
        (float, "1e-3", 0.001),
        (int | float, "0.5", 0.5),
        (int | float, "20", 20),
        (tuple[int, ...], "256,512", (256, 512)),
        (Literal["a", "b"], "b", "b"),
    ],
)
def test_text_becomes_a_value(kind, text, value):
    found = parsed(kind, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (int, "1.5"),
        (int, "nan"),
        (int, "none"),
        (float, "inf"),
        (bool, "yes"),
        (tuple[int, ...], "256,"),
        (Literal["a", "b"], "c"),
    ],
)
def test_text_that_says_no_such_value_is_refused(kind, text):
    with pytest.raises(ValueError):
        parsed(kind, text)


def test_yaml_reads_numbers_that_it_takes_for_words():
    assert typed(float, "1e-3", "lr") == 0.001
    assert typed(float, 3, "lr") == 3.0
    assert typed(int | None, None, "k") is None
    assert typed(tuple[str, ...], "one", "shards") == ("one",)


@pytest.mark.parametrize(("text", "value"), [("10%", 0.1), ("0.25", 0.25), ("0", 0.0), ("100%", 1.0)])
def test_a_share_is_a_percentage_or_a_fraction(text, value):
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["101%", "-1%", "2", "many", "nan"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ValueError):
        share(text)


def test_options_by_key_name_the_key_and_the_nearest():
    assert keyed({"k": int, "side": str}, {"k": "4"}, "--x") == {"k": 4}
    with pytest.raises(MistypedError, match="--x has the unknown key 'sid'; the nearest is 'side'"):
        keyed({"k": int, "side": str}, {"sid": "4"}, "--x")
    with pytest.raises(MistypedError, match="--x has k 'four'; expected a whole number"):
        keyed({"k": int}, {"k": "four"}, "--x")


def test_settings_are_checked_by_what_their_fields_say():
    with pytest.raises(SelectionError, match="--size is 0; at least 1 is needed"):
        check_fields(Inner(0), SelectionError)
    with pytest.raises(SelectionError, match="--side is 'left'; expected one of both, image"):
        check_fields(Inner(side="left"), SelectionError)
    outer = Outer(name="a", folder="there")
    check_fields(outer)
    assert outer.folder == Path("there")


def test_settings_are_combined_by_name_and_later_ones_win():
    @dataclass(frozen=True)
    class Other:
        size: int = 8
        colour: str = "red"

    assert combined(Inner, Inner(5, "image"), Other()) == Inner(8, "image")
    assert combined(Inner, Other(), size=1) == Inner(1)


def test_kinds_in_words_and_names_that_were_meant():
    assert expected(Literal["a", "b"] | None) == "one of a, b"
    assert expected(int | float) == "a number"
    assert close("thresold", ["threshold", "top"]) == "threshold"
    assert close("zzz", ["threshold", "top"]) is None
