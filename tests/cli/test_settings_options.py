"""Options that are made of settings: a field added is an option, a key and a keyword, without another line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import typer
from typer.testing import CliRunner

from mmfilter.cli.settings_options import command, field_help, options_of, read_config
from mmfilter.core.typed import MistypedError, setting, share


@dataclass(frozen=True)
class Size:
    GROUP: ClassVar[str] = "Size"

    width: int = 4
    """How wide.

    This is not for the help."""
    depth: int | None = None
    """How deep"""


@dataclass(frozen=True)
class Cake:
    size: Size = field(default_factory=Size)
    flavour: Literal["plum", "apple"] = "plum"
    """What it tastes of"""
    share: float | None = setting(None, flag="--slice", parse=share, expected="a share, such as 10%")
    """How much of it"""
    layers: tuple[int, ...] = (1, 2)
    """Layers"""
    notes: dict[str, object] = setting(default_factory=dict, flag="--note", metavar="KEY=VALUE")
    """What else"""
    secret: str = setting("x", option=False)
    """Nobody's business"""


@pytest.fixture
def bake():
    """Runs the command with arguments; (exit code, output, the settings it was called with)."""
    app, told = typer.Typer(rich_markup_mode=None), []

    @command(app)
    def cake(settings: Cake, config: Path | None = None) -> None:
        """Bake a cake."""
        told.append(settings)

    def run(*arguments: str):
        result = CliRunner().invoke(app, list(arguments))
        return result, told[-1] if told else None

    return run


def test_every_field_is_an_option(bake):
    assert [option.key for option in options_of(Cake)] == ["width", "depth", "flavour", "slice", "layers", "note"]
    result, made = bake("--width", "7", "--depth", "2", "--flavour", "apple", "--slice", "25%", "--layers", "3,4")
    assert result.exit_code == 0, result.output
    assert made == Cake(Size(7, 2), "apple", 0.25, (3, 4))
    assert bake("--note", "k=4")[1].notes == {"k": "4"}


def test_without_options_the_defaults_hold(bake):
    assert bake()[1] == Cake()


def test_help_has_headings_defaults_and_the_first_paragraph(bake):
    text = bake("--help")[0].output
    assert "Size:" in text
    assert "How wide." in text
    assert "[default: 4]" in text
    assert "not for the help" not in text
    assert "plum|apple" in text
    assert "--secret" not in text
    assert field_help(Cake)["flavour"] == "What it tastes of."


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--flavour", "pear"), "'pear' is not one of 'plum', 'apple'"),
        (("--slice", "most"), "'most'; expected a share, such as 10%"),
        (("--layers", "1,x"), "'1,x'; expected whole numbers with commas"),
        (("--width", "wide"), "Invalid value for '--width'"),
    ],
)
def test_a_wrong_value_is_a_usage_error(bake, arguments, words):
    result, _ = bake(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_the_command_line_goes_before_the_file(bake, tmp_path):
    file = tmp_path / "cake.yaml"
    file.write_text("width: 9\nflavour: apple\nslice: 0.5\n")
    assert bake("--config", str(file), "--width", "3")[1] == Cake(Size(3), "apple", 0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("widht: 4", "has the unknown key 'widht'; the nearest is 'width'"),
        ("width: wide", "has width 'wide'; expected a whole number"),
        ("- 4", "holds no settings; expected lines like 'batch_size: 32'"),
        ("width: [", "is not YAML"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path, text, words):
    file = tmp_path / "cake.yaml"
    file.write_text(text)
    with pytest.raises(MistypedError) as error:
        read_config(file, list(options_of(Cake)))
    assert words in str(error.value)


def test_a_missing_file_is_explained(tmp_path):
    with pytest.raises(MistypedError, match="cannot be read: No such file or directory"):
        read_config(tmp_path / "none.yaml", list(options_of(Cake)))
