"""The card that a user's words mean: one by its name, changed where more is said, or one made of a folder or hub id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmfilter.core.cards.cards import Card, card_names, load_card
from mmfilter.core.cards.sae_options import parse_options
from mmfilter.errors import ModelError


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
    options = parse_options(sae_option) if sae_option or sae is not None else None
    if options is not None and sae is None and model in card_names():  # the card's own SAE, with more said about it
        options = replace(load_card(model).sae_options, **options.stated())
    changes: dict[str, object] = {
        name: value
        for name, value in (
            ("layer", layer),
            ("sae", sae),
            ("sae_options", options),
            ("prompt", prompt),
            ("text_context", text_context),
        )
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
            raise ModelError(
                f"no card {model!r} (there is {', '.join(card_names())}); for a folder or hub id give --layer and --sae as well"
            )
        card = Card(name=model, model=model, layer=layer, sae=sae, sae_options=options)
    if threshold is not None:
        changes["threshold"] = threshold
    return replace(card, **changes)
