"""Options that commands share, and how their words become settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mmfilter.errors import ModelError

if TYPE_CHECKING:
    from mmfilter.core.model.cards import Card

DEFAULT_RUN = Path("mmfilter-run")


def card_for(
    model: str,
    layer: int | None,
    sae: str | None,
    prompt: str | None,
    text_context: str | None,
    threshold: float | None,
    sae_option: Sequence[str] = (),
) -> Card:
    """The card called `model`, or one made of a folder or hub id with --layer and --sae.

    What changes a code (layer, SAE, prompt, text context) makes the card's own feature weights void.
    """
    from mmfilter.core.model.cards import Card, card_names, load_card
    from mmfilter.core.model.sae_options import parse_options

    options = parse_options(sae_option) if sae_option or sae is not None else None
    changes: dict[str, object] = {
        name: value
        for name, value in (("layer", layer), ("sae", sae), ("sae_options", options), ("prompt", prompt), ("text_context", text_context))
        if value is not None
    }
    if model in card_names():
        card = load_card(model)
        if any(getattr(card, name) != value for name, value in changes.items()):
            changes["weights"] = None
        else:
            changes = {}
    else:
        if layer is None or sae is None:
            raise ModelError(f"no card {model!r} (there is {', '.join(card_names())}); for a folder or hub id give --layer and --sae as well")
        card = Card(name=model, model=model, layer=layer, sae=sae, sae_options=options)
    if threshold is not None:
        changes["threshold"] = threshold
    return replace(card, **changes)


def destination(output: str | None, form: str | None, stdout_is_terminal: bool) -> tuple[str, Path | None]:
    """The format to write and where to (None: stdout); a tar is never poured into a terminal."""
    one_of("--format", form, ("shards", "tar", "keys"))
    path = None if output in (None, "-") else Path(output)
    form = form or ("shards" if path else "tar")
    if form == "shards" and path is None:
        raise typer.BadParameter("shards need a directory: -o DIR", param_hint="--format")
    if form == "tar" and path is None and stdout_is_terminal:
        raise typer.BadParameter("say where to: -o DIR for shards, or pipe the tar stream into a consumer", param_hint="-o")
    return form, path


def share(text: str) -> float:
    """`10%` or `0.1` as a fraction."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"{text!r} is no share; expected something like 10% or 0.1", param_hint="--max-bad")
    return value


def one_of(option: str, value: str | None, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices (exit 2)."""
    if value is not None and value not in choices:
        raise typer.BadParameter(f"{value!r}; expected one of {', '.join(choices)}", param_hint=option)
