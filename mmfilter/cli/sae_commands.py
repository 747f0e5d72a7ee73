"""`mmfilter sae …`: parse, call one operation, print. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmfilter.cli.options import AsJson, SAEName, SAEOption
from mmfilter.cli.sae_eval_command import evaluate
from mmfilter.cli.sae_train_command import train
from mmfilter.cli.settings_options import command
from mmfilter.errors import SAEError
from mmfilter.ops.measure_settings import MeasureSettings

if TYPE_CHECKING:
    from mmfilter.ops.sae_files import Description, Listed

sae_app = typer.Typer(
    help="Train, evaluate, list, show, convert and fetch sparse autoencoders.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def list_command(
    word: Annotated[str | None, typer.Argument(help="Only those with this word in any column.", metavar="WORD")] = None,
    as_json: AsJson = False,
) -> None:
    """List the SAEs of the cards and the published ones.

    Layers, licences and the like are what the publishers state; what is not established says so.

    Example: mmfilter sae list qwen
    """
    from mmfilter.ops import sae_files as operation

    entries = operation.list_saes(word)
    if not entries:
        raise SAEError(f"no SAE in the list has {word!r} in any column; mmfilter sae list shows all")
    if as_json:
        print(json.dumps([asdict(entry) for entry in entries], indent=2, ensure_ascii=False))
    else:
        _show_list(entries)


def show(
    sae: SAEName,
    settings: MeasureSettings,
    on: Annotated[
        list[str] | None, typer.Option("--on", help="Measure it on these shards; repeatable.", metavar="SHARDS")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what an SAE is: shapes, activation, hook point, what its publisher states.

    With --on it is also measured on your pairs, image and caption tokens apart: FVU, the share of the
    states' variance that it does not explain; L0, the mean number of active features a token; and the
    features that fire on no token. The other options say how.

    Example: mmfilter sae show tiny --on 'examples/shards/*.tar'
    """
    from mmfilter.cli import check_display, display
    from mmfilter.core.cards.sae_options import make_options
    from mmfilter.ops import measure
    from mmfilter.ops import sae_files as operation

    description = operation.describe(sae, make_options(settings.sae_options))
    report = asdict(description)
    measurement = None
    if on:
        settings = replace(settings, sae=sae, stated_layer=description.metadata.get("layer"))
        with display.TerminalProgress() as progress:
            measurement = measure.measure(on, settings, progress)
        report["measured"] = check_display.measurement_json(measurement)
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    _show_description(description)
    if measurement is not None:
        for note in measurement.notes:
            display.note(note)
        check_display.show_measurement(measurement)


def convert(
    sae: SAEName,
    destination: Annotated[Path, typer.Argument(help="Folder to write, in the SAELens 6 layout.", metavar="DST")],
    sae_option: SAEOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an SAE's folder that is there.")] = False,
) -> None:
    """Write an SAE as a folder that mmfilter and SAELens open as it is.

    Prints the folder on stdout, and on stderr what was folded into the weights.

    Example: mmfilter sae convert tiny sae-of-tiny --force
    """
    from mmfilter.cli import display
    from mmfilter.core.cards.sae_options import parse_options
    from mmfilter.ops import sae_files as operation

    written = operation.convert(sae, destination, parse_options(sae_option or ()), force=force)
    for line in written.metadata.get("folded", []):
        display.note(f"folded: {line}")
    for line in written.metadata.get("notes", []):
        display.note(line)
    print(destination)


def fetch(sae: Annotated[str, typer.Argument(help="hf:OWNER/REPO[@REVISION]/folder-or-file", metavar="SAE")]) -> None:
    """Download an SAE into the hub's cache and print where it lies.

    Goes on where a download stopped; later commands need no network.

    Example: mmfilter sae fetch hf:lmms-lab/llama3-llava-next-8b-hf-sae-131k/model.layers.24
    """
    from mmfilter.ops import sae_files as operation

    print(operation.fetch(sae))


for _function, _name in (
    (train, None),
    (evaluate, "eval"),
    (list_command, "list"),
    (show, None),
    (convert, None),
    (fetch, None),
):
    command(sae_app, _name)(_function)


def _show_list(entries: list[Listed]) -> None:
    """On a terminal the cards have a line of their own, since `mmfilter models` lists them; a pipe gets every row."""
    from mmfilter.cli.columns import show_columns

    seen = sys.stdout.isatty()
    cards = [entry.name for entry in entries if entry.layout == "card"] if seen else []
    rows = [
        (entry.name, entry.base, entry.layers, entry.trained_on)
        for entry in entries
        if entry.layout != "card" or not seen
    ]
    if cards:
        print(f"SAEs of the cards (mmfilter models): {', '.join(cards)}", end="\n\n" if rows else "\n")
    if rows:
        show_columns(("published" if seen else "SAE", "base model", "layers", "trained on"), rows)
    if rows and seen:
        print("\nWidths, layouts and licences: mmfilter sae list --json")


def _show_description(description: Description) -> None:
    from rich.console import Console

    said = dict(description.metadata)
    dead = f", {description.dead_rows:,} rows of norm 0" if description.dead_rows else ""
    shape = f"{description.d_model:,} -> {description.n_features:,} features"
    rows: dict[str, Any] = {
        "SAE": description.source,
        "layout": said.pop("layout", "unknown"),
        "shape": shape,
        "activation": f"{description.activation}{f', k={description.k}' if description.k else ''}",
        "thresholds": _range(description.threshold),
        "b_dec": "subtracted before encoding" if description.subtract_b_dec else "not subtracted before encoding",
        "normalisation": description.normalisation,
        "model": said.pop("model_name", "not stated"),
        "hook point": _hook(said),
        "stated L0": said.pop("stated_l0", "not stated"),
        "decoder norms": f"{_range(description.decoder_norms)}{dead}",
        "hash": description.hash,
    }
    said.pop("source", None)
    folded, notes = said.pop("folded", []), said.pop("notes", [])
    lines = [(name, value) for name, value in rows.items() if value is not None]
    lines += [("folded", line) for line in folded] + [("note", line) for line in notes]
    lines += [("stated", f"{name}: {_flat(value)}") for name, value in said.items()]
    console = Console(markup=False, highlight=False)
    for name, value in lines:
        first, *rest = textwrap.wrap(
            str(value), max(20, console.width - 16), break_long_words=False, break_on_hyphens=False
        ) or [""]
        console.print("\n".join([f"{name:<14} {first}", *(" " * 15 + line for line in rest)]), soft_wrap=True)


def _flat(value: Any) -> str:
    """A mapping as words, the rest as it is."""
    return (
        ", ".join(f"{key} {item}" for key, item in value.items() if item not in (None, []))
        if isinstance(value, dict)
        else str(value)
    )


def _hook(said: dict[str, Any]) -> str:
    names = [str(said.pop(key)) for key in ("hook_name", "hf_hook_name") if said.get(key)]
    layer = said.pop("layer", None)
    return " = ".join(names) or ("not stated" if layer is None else f"layer {layer}")


def _range(spread: dict[str, float] | None) -> str | None:
    return None if spread is None else f"{spread['min']:.4g} to {spread['max']:.4g}, median {spread['median']:.4g}"
