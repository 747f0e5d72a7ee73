"""From settings to options: a command's parameter whose type is a settings class stands for one option a field.

A field's default is the option's, a `Literal` gives its choices, the first paragraph of the docstring under the field
its help, and the `GROUP` of the class that declares it its heading. So a setting is declared once, where it is used.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from mmfilter.core.cards.sae_options import statements_to_values
from mmfilter.core.typed import MistypedError, alternatives, expected, flag_of, keyed, parsed, types_of

OTHER = "Other"
"""Heading of options that belong to no group"""

Convert = Callable[[Any], Any]


class GroupedCommand(TyperCommand):
    """A command whose help has its options under headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then a section for each group, in the order of the parameters."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                argument = parameter.param_type_name == "argument"
                heading = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or OTHER
                sections.setdefault(heading, []).append(record)
        if OTHER in sections:  # last, and without a heading of its own where it is the only one
            others = sections.pop(OTHER)
            sections[OTHER if sections.keys() - {"Arguments"} else "Options"] = others
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


@dataclass(frozen=True)
class SettingOption:
    """A field of settings as an option."""

    item: Field[Any]
    kind: Any
    """The field's type"""
    group: str
    help: str

    @property
    def key(self) -> str:
        """The parameter's name, and what it is called in a configuration file: the option's name."""
        return key_of_option(self.item)

    @property
    def default(self) -> Any:
        """The field's own, None where there is nothing to show."""
        return None if self.item.default is MISSING or self.item.default == () else self.item.default

    @property
    def parameter(self) -> inspect.Parameter:
        """As typer takes it."""
        annotation, as_it_is = self._annotation
        flags = str(self.item.metadata.get("flag") or flag_of(self.item)).split(",")
        option = typer.Option(
            *flags,
            help=self.help if as_it_is or self.default is None else f"{self.help}  [default: {self._shown_default}]",
            metavar=self.item.metadata.get("metavar"),
            rich_help_panel=self.group,
            show_default=as_it_is and self.default is not None,
        )
        required = self.item.default is MISSING and self.item.default_factory is MISSING
        return inspect.Parameter(
            self.key,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if required else self.default if as_it_is else None,
            annotation=Annotated[annotation, option],
        )

    @property
    def _shown_default(self) -> str:
        return str(self.item.metadata.get("shown", self.default))

    @property
    def _annotation(self) -> tuple[Any, bool]:
        """The type that typer is told, and whether its values are the field's."""
        first, optional = self._first, type(None) in alternatives(self.kind)
        if get_origin(first) is dict or (get_origin(first) is tuple and not self._in_words):
            return list[str] | None, False
        if self._in_words:
            return str | None, False
        return (first | None if optional and first is not bool else first), True

    @property
    def _first(self) -> Any:
        kinds = [kind for kind in alternatives(self.kind) if kind is not type(None)]
        return Path if Path in kinds and self.item.default is not None else kinds[0]

    @property
    def _in_words(self) -> bool:
        """Whether its value is read here: numbers with commas, a number that may be none, or what has a reader."""
        first = self._first
        numbers = get_origin(first) is tuple and bool({*alternatives(get_args(first)[0])} & {int, float})
        return (
            numbers
            or "parse" in self.item.metadata
            or (type(None) in alternatives(self.kind) and self.default is not None)
        )

    def value(self, given: Any) -> Any:
        """What was given on the command line, as the field has it; raises `typer.BadParameter`."""
        if self._in_words:
            return self.item.default if given is None else self._parsed(given)
        if get_origin(self._first) is dict:
            return statements_to_values(given or ())
        return tuple(given or ()) if get_origin(self._first) is tuple else given

    def _parsed(self, text: str) -> Any:
        try:
            return self.item.metadata.get("parse", functools.partial(parsed, self.kind))(text)
        except (ValueError, TypeError) as error:
            words = self.item.metadata.get("expected") or expected(self.kind)
            raise typer.BadParameter(f"{text!r}; expected {words}", param_hint=flag_of(self.item)) from error


def key_of_option(item: Field[Any]) -> str:
    """The option's name, as Python and YAML have it."""
    return flag_of(item).removeprefix("--").replace("-", "_")


def options_of(cls: type) -> Iterator[SettingOption]:
    """The options of a settings class, and of settings within it."""
    kinds, words = types_of(cls), field_help(cls)
    groups = {
        name: getattr(base, "GROUP", OTHER)
        for base in reversed(cls.__mro__)
        for name in vars(base).get("__annotations__", {})
    }
    for item in fields(cls):
        if is_dataclass(kinds[item.name]):
            yield from options_of(kinds[item.name])
        elif item.metadata.get("option", True):
            group = item.metadata.get("group") or groups[item.name]
            yield SettingOption(item, kinds[item.name], group, words.get(item.name, ""))


def made(cls: type, values: Mapping[str, Any]) -> Any:
    """Settings of a class from values by option, those of settings within it among them."""
    given: dict[str, Any] = {}
    for item in fields(cls):
        kind, key = types_of(cls)[item.name], key_of_option(item)
        if isinstance(kind, type) and is_dataclass(kind):
            given[item.name] = made(kind, values)
        elif key in values and item.metadata.get("option", True):
            given[item.name] = values[key]
    return cls(**given)


# --- commands --------------------------------------------------------------------------------


def command(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command; its parameters of settings classes become options.

    A parameter `config` gives it a YAML file with the same names, of which the command line overrides keys.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        app.command(name, cls=GroupedCommand)(_expanded(function))
        return function

    return register


def _expanded(function: Callable[..., None]) -> Callable[..., None]:
    """The function as typer takes it, with an option a field."""
    hints = get_type_hints(function, include_extras=True)
    own: list[inspect.Parameter] = []
    settings: dict[str, list[SettingOption]] = {}
    classes: dict[str, type] = {}
    for parameter in inspect.signature(function).parameters.values():
        kind = hints[parameter.name]
        if is_dataclass(kind) and isinstance(kind, type):
            classes[parameter.name], settings[parameter.name] = kind, list(options_of(kind))
        else:
            own.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(function)
    def run(**given: Any) -> None:
        context = given.pop(_CONTEXT)
        for name, options in settings.items():
            values = {option.key: option.value(given.pop(option.key)) for option in options}
            config = given.get("config")
            if config is not None:
                told = {option.key for option in options if _is_told(context, option.key)}
                values |= {key: value for key, value in read_config(config, options).items() if key not in told}
            given[name] = made(classes[name], values)
        given.pop("config", None)
        function(**given)

    context = inspect.Parameter(_CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [*own, *(option.parameter for options in settings.values() for option in options), context]
    positional = [p for p in parameters if isinstance(_info(p), typer.models.ArgumentInfo)]
    others = [p for p in parameters if p not in positional]
    last = [p for p in others if p.name in ("as_json",)]
    ordered = [*positional, *(p for p in others if p not in last), *last]
    run.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in ordered}
    return run


_CONTEXT = "typer_context"


def _info(parameter: inspect.Parameter) -> Any:
    """What typer is told of a parameter beside its type."""
    return next(iter(getattr(parameter.annotation, "__metadata__", ())), None)


def _is_told(context: Any, name: str) -> bool:
    """Whether an option was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def read_config(path: Path, options: list[SettingOption]) -> dict[str, Any]:
    """A YAML file of settings, by option; raises `MistypedError` for an unknown key, naming the nearest, or a wrong
    value."""
    import yaml

    what = f"--config {str(path)!r}"
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise MistypedError(f"{what} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MistypedError(f"{what} is not YAML: {' '.join(str(error).split())[:160]}") from error
    if not isinstance(values, Mapping):
        raise MistypedError(f"{what} holds no settings; expected lines like 'batch_size: 32'")
    return keyed({option.key: option.kind for option in options}, values, what)


# --- help ------------------------------------------------------------------------------------


def field_help(cls: type) -> dict[str, str]:
    """Field -> the first paragraph of the docstring under it, of the class and what it inherits from."""
    words: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base):
            words |= _docstrings(base.__module__).get(base.__qualname__, {})
    return words


@functools.cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """Class -> field -> docstring under it, in a module's source."""
    source = Path(str(sys.modules[module].__file__)).read_text("utf-8")
    return {
        node.name: dict(_field_docstrings(node)) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)
    }


def _field_docstrings(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for statement, following in zip(node.body, node.body[1:], strict=False):
        documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and documented:
            first = str(following.value.value).strip().split("\n\n")[0]  # type: ignore[attr-defined]
            text = " ".join(first.replace("`", "").split()).removesuffix(".")
            yield statement.target.id, f"{text}."
