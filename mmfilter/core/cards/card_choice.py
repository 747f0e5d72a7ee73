"""Which model and SAE, and how to prompt: from a user's words to a card.

A card by its name, changed where more is said, or one made of a folder or hub id.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from mmfilter.core.cards.cards import Card, TextContext, card_names, load_card
from mmfilter.core.cards.sae_options import make_options
from mmfilter.core.typed import setting
from mmfilter.errors import ModelError, SAEError


@dataclass(frozen=True)
class ModelSettings:
    """The model and the SAE that pairs are scored with; None is what the card says."""

    GROUP: ClassVar[str] = "Model and SAE"

    model: str | Card = setting("tiny", key="name")
    """Card name, local folder or hub id"""
    layer: int | None = None
    """Layer whose output the SAE reads, from 0; -1 for the shared space of CLIP and its kin (default: the card's)"""
    sae: str | None = None
    """SAE: a folder, hf:OWNER/REPO/folder, saelens:RELEASE/ID, or a card (default: the card's own)"""
    sae_options: dict[str, Any] = setting(default_factory=dict, flag="--sae-option", metavar="KEY=VALUE")
    """What the SAE's files leave open, as KEY=VALUE; repeatable"""
    prompt: str | None = None
    """Prompt with {caption} in it (default: the card's, or the model's chat template)"""
    text_context: TextContext | None = None
    """Text states with the image in context, or of the caption alone: none (default: the card's)"""
    threshold: float | None = None
    """A feature is present on a side above this activation (default: the card's)"""

    @cached_property
    def card(self) -> Card:
        """The card that this means; raises `ModelError` and `SAEError`."""
        return _card(self.model, self.layer, self.sae, self)


@dataclass(frozen=True)
class SAEChoice(ModelSettings):
    """An SAE, and the model that it is measured with."""

    sae: str | None = setting(None, option=False)
    """The SAE that is measured"""
    model: str | Card | None = None  # type: ignore[assignment]
    """Card name, local folder or hub id (default: the card called like the SAE)"""
    layer: int | None = None
    """Layer whose output the SAE reads (default: the card's, else what the SAE states)"""
    threshold: float | None = setting(None, option=False)
    """Of no use here"""
    stated_layer: int | None = setting(None, option=False)
    """The layer that the SAE's files name"""

    @cached_property
    def card(self) -> Card:
        """The model that is named, with this SAE, else the card called like the SAE."""
        named_like_it = self.sae in card_names()
        if self.model is None and not named_like_it:
            raise SAEError(
                f"measuring SAE {self.sae!r} needs the model that it belongs to: --model CARD-OR-FOLDER, "
                "and --layer where the SAE does not state it"
            )
        if self.model in (None, self.sae):
            return _card(str(self.sae), None, None, self)
        layer = self.layer if self.layer is not None else self.stated_layer
        return _card(self.model or "", layer, self.sae, self)


@dataclass(frozen=True)
class TrainedModel(ModelSettings):
    """The model that an SAE is trained on: a card's, or a folder or hub id with a layer; no SAE is needed."""

    layer: int | None = None
    """Layer whose output is trained on, from 0; -1 for the shared space of CLIP and its kin (default: the card's)"""
    sae: str | None = setting(None, option=False)
    """Not used"""
    sae_options: dict[str, Any] = setting(default_factory=dict, option=False)
    """Not used"""
    threshold: float | None = setting(None, option=False)
    """Not used"""

    @cached_property
    def card(self) -> Card:
        """The card; its SAE is not used."""
        if isinstance(self.model, Card):
            card = self.model
        elif self.model in card_names():
            card = replace(load_card(self.model), cannot_score="")
        elif self.layer is None:
            raise ModelError(_no_card(self.model, "--layer"))
        else:
            card = Card(name=self.model, model=self.model, layer=self.layer, sae="")
        return replace(card, **_given(self, "layer", "prompt", "text_context"))


def other_checkpoint(name: str, card: Card, prompt: str | None) -> Card:
    """The card with another checkpoint in it: a card's, with its prompt, or a folder's or hub id's, with the same
    prompt."""
    if name not in card_names():
        return replace(card, name=name, model=name, revision=None)
    other = load_card(name)
    return replace(
        card,
        name=name,
        model=other.model,
        revision=other.revision,
        prompt=prompt or other.prompt,
        cannot_score=other.cannot_score,
    )


def _card(model: str | Card, layer: int | None, sae: str | None, said: ModelSettings) -> Card:
    """The card called `model`, or one made of a folder or hub id with layer and SAE.

    What changes a code (layer, SAE, prompt, text context) makes the card's own feature weights void.
    """
    known = isinstance(model, Card) or model in card_names()
    options = make_options(said.sae_options) if said.sae_options or sae is not None else None
    changes = _given(said, "prompt", "text_context")
    changes |= {name: value for name, value in (("layer", layer), ("sae", sae)) if value is not None}
    if known:
        card = model if isinstance(model, Card) else load_card(str(model))
        if options is not None:  # of the card's own SAE, where no other is named: more that is said about it
            changes["sae_options"] = options if sae is not None else replace(card.sae_options, **options.stated())
        if any(getattr(card, name) != value for name, value in changes.items()):
            changes["weights"] = None
        else:
            changes = {}
    else:
        if layer is None or sae is None:
            raise ModelError(_no_card(str(model), "--layer and --sae"))
        card = Card(
            name=str(model),
            model=str(model),
            layer=layer,
            sae=sae,
        )
        if options is not None:
            card = replace(card, sae_options=options)
    return replace(card, **changes, **_given(said, "threshold"))


def _given(said: ModelSettings, *names: str) -> dict[str, Any]:
    """Those of the fields that say something."""
    values = {
        "layer": said.layer,
        "prompt": said.prompt,
        "text_context": said.text_context,
        "threshold": said.threshold,
    }
    return {name: values[name] for name in names if values[name] is not None}


def _no_card(model: str, needed: str) -> str:
    return f"no card {model!r} (there is {', '.join(card_names())}); for a folder or hub id give {needed} as well"
