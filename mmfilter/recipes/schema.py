"""What a recipe says: a section a dataclass, a key a field. The operations' own settings are made of it.

What a section says of a step is checked by that step's settings (`ScoreSettings`, `SelectSettings`, …), in
their words; here is only what there is to say, and of what kind.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mmfilter.core.cards.card_choice import card_for
from mmfilter.core.cards.cards import Card, card_names
from mmfilter.core.codes.duplicates import DuplicateSettings
from mmfilter.core.codes.index import On
from mmfilter.core.input.shards import STDIN, is_url
from mmfilter.core.input.source import InputOptions
from mmfilter.core.output.destination import Format
from mmfilter.errors import RecipeError
from mmfilter.ops.dedup import DedupSettings
from mmfilter.ops.select import SelectSettings


@dataclass(frozen=True)
class Inputs:
    """The pairs, and how they are read. What a sample is belongs here."""

    shards: tuple[str, ...]
    """WebDataset tars, parquet with images, LLaVA JSON, folders of images: paths, globs, brace patterns, URLs"""
    caption: str = "auto"
    """Where captions are (see `DecodeSettings`)"""
    images: str | None = None
    """Folder that the images of LLaVA JSON are in"""
    allow_pipe: bool = False
    """Run `pipe:` inputs in a shell"""

    def __post_init__(self) -> None:
        if not self.shards:
            raise RecipeError("inputs.shards names no shard; expected paths, globs, brace patterns or URLs")
        if STDIN in self.shards:
            raise RecipeError(
                "inputs.shards is '-', a tar on stdin, which cannot be read again; a recipe names its shards"
            )

    @property
    def options(self) -> InputOptions:
        """As sources take them."""
        return InputOptions(self.caption, self.images, self.allow_pipe)


@dataclass(frozen=True)
class Model:
    """The model and the SAE that pairs are scored with; None is what the card says."""

    name: str = "tiny"
    """A card, or with `layer` and `sae` a local folder or hub id"""
    layer: int | None = None
    sae: str | None = None
    sae_options: dict[str, Any] = field(default_factory=dict)
    """What the SAE's files leave open (see `SAEOptions`)"""
    prompt: str | None = None
    text_context: Literal["image", "none"] | None = None
    threshold: float | None = None

    def card(self) -> Card:
        """The card that this means; raises `ModelError` and `SAEError`."""
        options = [f"{key}={value}" for key, value in self.sae_options.items()]
        return card_for(self.name, self.layer, self.sae, self.prompt, self.text_context, self.threshold, options)


@dataclass(frozen=True)
class Run:
    """Where the pass over the model is kept, and how it goes."""

    directory: str = "mmfilter-run"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device_map: Literal["auto"] | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    compile: bool = False
    trust_remote_code: bool = False
    batch_size: int = 32
    workers: int = 4
    limit: int | None = None
    """Score only the first so many samples"""
    seed: int = 0
    """Seed of the `random` score"""
    max_bad: float = 0.1
    """With a larger share of samples without a score the recipe ends after scoring"""

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad <= 1:
            raise RecipeError(f"run.max_bad is {self.max_bad}; expected a share from 0 to 1, such as 0.1")


@dataclass(frozen=True)
class Check:
    """Whether the scores tell true pairs from shuffled ones; told, and written into the run."""

    sample: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Dedup:
    """Duplicates in the whole run; a selection leaves them out unless `select.dedup` says otherwise."""

    threshold: float = 0.95
    on: On = "both"
    by: str = "similarity"

    def settings(self) -> DedupSettings:
        """For the operation."""
        return DedupSettings(DuplicateSettings(self.threshold, self.on), self.by)


@dataclass(frozen=True)
class Select:
    """What to keep (see `SelectSettings`)."""

    top: str | int | float | None = None
    """As `SelectSettings` has it; a number with a point is refused there"""
    min: float | None = None
    by: str = "similarity"
    where: str | None = None
    dedup: float | Literal[False] | None = None
    """A cosine; false keeps duplicates; None is what the section dedup says"""
    dedup_on: On | None = None
    per: str | None = None
    diverse: bool = False
    match: str | None = None
    """Run directory"""
    repeat: str | None = None
    metadata: tuple[str, ...] = ()
    """Files whose columns `where`, `by`, `per` and `repeat` may name"""
    shuffle: int | None = None


@dataclass(frozen=True)
class Output:
    """One thing to write."""

    path: str
    """New folder, or new file for tar, keys and `*.npy`"""
    format: Format = "shards"
    shard_size: int = 10_000


@dataclass(frozen=True)
class Recipe:
    """The whole of it. A section that is None is a step left out."""

    inputs: Inputs
    model: Model = field(default_factory=Model)
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
                    f"outputs.{real.index(path)}.path and outputs.{i}.path are both {self.outputs[i].path!r}; each output needs a place of its own"
                )
            for j, other in enumerate(real):
                if path.startswith(other + os.sep):
                    raise RecipeError(
                        f"outputs.{i}.path {self.outputs[i].path!r} is in outputs.{j}.path {self.outputs[j].path!r}; name a place beside it"
                    )

    def resolved(self) -> Recipe:
        """The same recipe with every default of the selection spelled out, and with paths that mean the same in any folder."""
        model = replace(
            self.model,
            name=_absolute(self.model.name),
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
            run=replace(self.run, directory=_place(self.run.directory)),
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
        select = self.select
        threshold, on = self._duplicates(select)
        return SelectSettings(
            top=None if select.top is None else str(select.top), min=select.min, by=select.by, where=select.where,
            dedup=None if threshold is False else threshold, dedup_on=on, per=select.per, diverse=select.diverse,
            match=None if select.match is None else Path(select.match), repeat=select.repeat, metadata=select.metadata, shuffle=select.shuffle, dry_run=dry_run,
            format=output.format, output=output.path, shard_size=output.shard_size,
        )  # fmt: skip

    def values(self) -> dict[str, Any]:
        """As it is written, in lists and mappings."""
        return _plain(asdict(self))


def _absolute(name: str) -> str:
    """The path of a local model or SAE; the name of a card, or of something on the hub, as it is."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if name not in card_names() and os.path.exists(path) else name


def _whole(path: str) -> str:
    """An input that means the same in any folder, with the slash that makes a folder of a URL; commands as they are."""
    return path if path.startswith("pipe:") else _place(path) + ("/" if path.endswith("/") and not is_url(path) else "")


def _place(path: str) -> str:
    """A path that means the same in any folder; URLs as they are."""
    return path if is_url(path) else os.path.abspath(os.path.expanduser(path))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
