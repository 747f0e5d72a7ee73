"""What a recipe says: a section a dataclass, a key a field. The operations' own settings are made of it.

What a section says of a step is checked by that step's settings (`ScoreSettings`, `SelectSettings`, …), in
their words; here is only what there is to say, and of what kind.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from mmfilter.core.cards.card_choice import ModelSettings
from mmfilter.core.cards.cards import card_names
from mmfilter.core.codes.duplicate_settings import On
from mmfilter.core.input.places import PIPE, STDIN
from mmfilter.core.input.remote import is_url
from mmfilter.core.input.source import InputOptions
from mmfilter.core.output.formats import Format
from mmfilter.core.pipeline.pass_settings import BatchSettings, DeviceSettings
from mmfilter.core.selection.select_settings import ChoiceSettings, SelectSettings
from mmfilter.core.typed import combined, key_of, setting
from mmfilter.errors import RecipeError
from mmfilter.ops.check_settings import CheckSettings
from mmfilter.ops.dedup_settings import DedupSettings
from mmfilter.ops.score_settings import RunSettings


@dataclass(frozen=True)
class Inputs(InputOptions):
    """The pairs, and how they are read. What a sample is belongs here."""

    shards: tuple[str, ...] = setting(required=True, missing="name paths, globs, brace patterns or URLs")
    """WebDataset tars, parquet with images, LLaVA JSON, folders of images: paths, globs, brace patterns, URLs"""

    def __post_init__(self) -> None:
        if not self.shards:
            raise RecipeError("inputs.shards names no shard; expected paths, globs, brace patterns or URLs")
        if STDIN in self.shards:
            raise RecipeError(
                "inputs.shards is '-', a tar on stdin, which cannot be read again; a recipe names its shards"
            )


@dataclass(frozen=True)
class Run(BatchSettings, DeviceSettings, RunSettings):
    """Where the pass over the model is kept, and how it goes."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad <= 1:
            raise RecipeError(f"run.max_bad is {self.max_bad}; expected a share from 0 to 1, such as 0.1")


@dataclass(frozen=True)
class Check:
    """Whether the scores tell true pairs from shuffled ones; told, and written into the run."""

    sample: int = CheckSettings.sample
    seed: int = CheckSettings.seed


@dataclass(frozen=True)
class Dedup:
    """Duplicates in the whole run; a selection leaves them out unless `select.dedup` says otherwise."""

    threshold: float = DedupSettings.threshold
    on: On = DedupSettings.on
    by: str = DedupSettings.by

    def settings(self) -> DedupSettings:
        """For the operation."""
        return combined(DedupSettings, self)


@dataclass(frozen=True)
class Select(ChoiceSettings):
    """What to keep."""

    top: str | int | float | None = None  # type: ignore[assignment]
    """As `ChoiceSettings` has it; a number with a point is refused there"""
    dedup: float | Literal[False] | None = None
    """A cosine; false keeps duplicates; None is what the section dedup says"""
    dedup_on: On | None = None  # type: ignore[assignment]
    """None is what the section dedup says"""
    match: str | None = None  # type: ignore[assignment]
    """Run directory"""
    shuffle: int | None = None
    """Seed of a random output order; None keeps the order of the source"""


@dataclass(frozen=True)
class Output:
    """One thing to write."""

    path: str = setting(
        required=True, kw_only=False, missing="name a new folder, or a new file for tar, keys and *.npy"
    )
    """New folder, or new file for tar, keys and `*.npy`"""
    format: Format = "shards"
    shard_size: int = SelectSettings.shard_size


@dataclass(frozen=True)
class Recipe:
    """The whole of it. A section that is None is a step left out."""

    inputs: Inputs = setting(
        required=True, kw_only=False, missing="name the shards there, such as 'inputs: {shards: data/*.tar}'"
    )
    model: ModelSettings = field(default_factory=ModelSettings)
    run: Run = field(default_factory=Run)
    check: Check | None = None
    dedup: Dedup | None = None
    select: Select | None = None
    outputs: tuple[Output, ...] = ()

    def __post_init__(self) -> None:
        if self.outputs and self.select is None:
            raise RecipeError(
                "the recipe has outputs and no section select; say what to keep, such as 'select: {top: 20%}'"
            )
        if self.select is not None and not self.outputs:
            raise RecipeError(
                "the recipe has a section select and no outputs; say where to, such as 'outputs: [{path: best}]'"
            )
        real = [os.path.realpath(os.path.expanduser(output.path)) for output in self.outputs]
        for i, path in enumerate(real):
            if path in real[:i]:
                raise RecipeError(
                    f"outputs.{real.index(path)}.path and outputs.{i}.path are both {self.outputs[i].path!r}; each "
                    "output needs a place of its own"
                )
            for j, other in enumerate(real):
                if path.startswith(other + os.sep):
                    raise RecipeError(
                        f"outputs.{i}.path {self.outputs[i].path!r} is in outputs.{j}.path {self.outputs[j].path!r}; "
                        "name a place beside it"
                    )

    def resolved(self) -> Recipe:
        """The same recipe with every default of the selection spelled out, and with paths that mean the same in any
        folder."""
        model = replace(
            self.model,
            model=_absolute(str(self.model.model)),
            sae=None if self.model.sae is None else _absolute(self.model.sae),
        )
        select = self.select
        if select is not None:
            threshold, on = self._duplicates(select)
            match = None if select.match is None else _place(select.match)
            metadata = tuple(map(_place, select.metadata))
            select = replace(
                select,
                top=None if select.top is None else str(select.top),
                dedup=threshold,
                dedup_on=on,
                match=match,
                metadata=metadata,
            )
        return replace(
            self,
            inputs=replace(
                self.inputs,
                shards=tuple(map(_whole, self.inputs.shards)),
                images=self.inputs.images and _whole(self.inputs.images),
            ),
            model=model,
            run=replace(self.run, run=_place(str(self.run.run))),
            select=select,
            outputs=tuple(replace(output, path=_place(output.path)) for output in self.outputs),
        )

    def _duplicates(self, select: Select) -> tuple[float | Literal[False], On]:
        """Threshold of the selection's duplicates, False to keep them, and on which sides."""
        default = Dedup() if self.dedup is None else self.dedup
        threshold = select.dedup
        if threshold is None:
            threshold = False if self.dedup is None else self.dedup.threshold
        return threshold, select.dedup_on or default.on

    def selection(self, output: Output, *, dry_run: bool = False) -> SelectSettings:
        """Settings of the selection that makes `output`; raises `SelectionError` for what cannot be."""
        select = Select() if self.select is None else self.select
        threshold, on = self._duplicates(select)
        return combined(
            SelectSettings,
            select,
            top=None if select.top is None else str(select.top),
            dedup=None if threshold is False else threshold,
            dedup_on=on,
            match=None if select.match is None else Path(select.match),
            dry_run=dry_run,
            format=output.format,
            output=output.path,
            shard_size=output.shard_size,
        )

    def values(self) -> dict[str, Any]:
        """As it is written, in lists and mappings."""
        return {
            item.name: None if (part := getattr(self, item.name)) is None else _written(part)
            for item in sorted(fields(self), key=lambda item: SECTIONS.index(item.name))
        }


SECTIONS = ("inputs", "model", "run", "check", "dedup", "select", "outputs")
WRITTEN: dict[type, tuple[str, ...]] = {
    Inputs: ("shards", "caption", "images", "allow_pipe"),
    ModelSettings: ("name", "layer", "sae", "sae_options", "prompt", "text_context", "threshold"),
    Run: (
        "directory",
        "device",
        "dtype",
        "device_map",
        "attention",
        "compile",
        "trust_remote_code",
        "batch_size",
        "workers",
        "limit",
        "seed",
        "max_bad",
    ),
    Select: (
        "top",
        "min",
        "by",
        "where",
        "dedup",
        "dedup_on",
        "per",
        "diverse",
        "match",
        "repeat",
        "metadata",
        "shuffle",
    ),
    Output: ("path", "format", "shard_size"),
}
"""Keys in the order in which a recipe is written; one that came later follows where it says something"""


def _written(section: Any) -> Any:
    """A section, or a list of them, in lists and mappings."""
    if isinstance(section, tuple):
        return [_written(part) for part in section]
    values = {key_of(item): (getattr(section, item.name), item.default) for item in fields(section)}
    order = WRITTEN.get(type(section), tuple(values))
    later = [key for key, (value, default) in values.items() if key not in order and value != default]
    return {key: _plain(values[key][0]) for key in (*order, *later)}


def _absolute(name: str) -> str:
    """The path of a local model or SAE; the name of a card, or of something on the hub, as it is."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if name not in card_names() and os.path.exists(path) else name


def _whole(path: str) -> str:
    """An input that means the same in any folder, with the slash that makes a folder of a URL; commands as they are."""
    return path if path.startswith(PIPE) else _place(path) + ("/" if path.endswith("/") and not is_url(path) else "")


def _place(path: str) -> str:
    """A path that means the same in any folder; URLs as they are."""
    return path if is_url(path) else os.path.abspath(os.path.expanduser(path))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
