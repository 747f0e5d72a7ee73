"""Options that commands share, and how their words become settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmfilter.errors import ModelError

if TYPE_CHECKING:
    from mmfilter.core.model.cards import Card

DEFAULT_RUN = Path("mmfilter-run")


def card_for(
    model: str,
    layer: int | None,
    sae: Path | None,
    prompt: str | None,
    text_context: str | None,
    threshold: float | None,
) -> Card:
    """The card called `model`, or one made of a folder or hub id with --layer and --sae.

    What changes a code (layer, SAE, prompt, text context) makes the card's own feature weights void.
    """
    from mmfilter.core.model.cards import Card, card_names, load_card

    changes: dict[str, object] = {
        name: value
        for name, value in (("layer", layer), ("sae", str(sae) if sae else None), ("prompt", prompt), ("text_context", text_context))
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
        card = Card(name=model, model=model, layer=layer, sae=str(sae))
    if threshold is not None:
        changes["threshold"] = threshold
    return replace(card, **changes)
