"""`sae eval`: its options and what it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from mmfilter.cli import options

if TYPE_CHECKING:
    from mmfilter.core.cards.cards import Card


def evaluate(
    sae: options.SAEName,
    shards: options.Shards,
    model: Annotated[
        Optional[str], typer.Option(help="Card name, local folder or hub id (default: the card called like the SAE).")
    ] = None,
    layer: Annotated[
        Optional[int],
        typer.Option(help="Layer whose output the SAE reads (default: the card's, else what the SAE states)."),
    ] = None,
    text_only: Annotated[
        bool,
        typer.Option(
            "--text-only", help="Evaluate on captions without an image too, through the language model alone."
        ),
    ] = False,
    also: Annotated[
        Optional[list[str]],
        typer.Option(help="Evaluate on another checkpoint of the same architecture too; repeatable.", metavar="MODEL"),
    ] = None,
    sae_option: options.SAEOption = None,
    prompt: options.Prompt = None,
    text_context: options.TextContext = None,
    caption: options.Caption = "auto",
    images: options.Images = None,
    allow_pipe: options.AllowPipe = False,
    sample: Annotated[int, typer.Option(help="Pairs to evaluate on, from the heads of up to 10 shards.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the random SAE.")] = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    attn: options.Attention = "sdpa",
    trust_remote_code: options.TrustRemoteCode = False,
    batch_size: options.BatchSize = 32,
    workers: options.Workers = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Evaluate an SAE on your pairs, beside random directions of its shape.

    How it reconstructs image and caption tokens (FVU, cosine, L0, silent and dense features), how much of
    the model's next-token loss on captions survives when the reconstructions take the place of its states
    (CE recovered), which features fire on both sides, and their cross-modal weights. The whole model is
    loaded. What the figures mean: docs/evaluating.md.

    Example: mmfilter sae eval tiny 'examples/shards/*.tar'
    """
    from mmfilter.cli import display, sae_eval_display
    from mmfilter.ops import evaluate as operation

    options.one_of("--text-context", text_context, ("image", "none"))
    if layer is None and model is not None and model != sae:
        layer = _stated_layer(sae, sae_option or ())
    card = options.card_of_sae(sae, "sae eval", model, layer, prompt, text_context, sae_option or ())
    settings = operation.EvaluateSettings(
        card=card, also=tuple(_another(name, card, prompt) for name in also or ()), text_only=text_only, sample=sample, seed=seed,
        device=options.device_settings(device, dtype, device_map, attn, False, trust_remote_code),
        batch_size=batch_size, workers=workers, caption=caption, images=images, allow_pipe=allow_pipe,
    )  # fmt: skip
    with display.TerminalProgress() as progress:
        evaluation = operation.evaluate(shards, settings, progress)
    for note in evaluation.notes:
        display.note(note)
    if as_json:
        print(json.dumps(sae_eval_display.evaluation_json(evaluation, sae), indent=2))
    else:
        sae_eval_display.show_evaluation(evaluation, sae)


def _stated_layer(sae: str, sae_option: Sequence[str]) -> int | None:
    """The layer that the SAE's files name."""
    from mmfilter.core.cards.sae_options import parse_options
    from mmfilter.core.sae.pretrained import load_sae

    return load_sae(sae, parse_options(sae_option)).metadata.get("layer")


def _another(name: str, card: Card, prompt: str | None) -> Card:
    """The card with another checkpoint in it: a card's, with its prompt, or a folder's or hub id's, with the same prompt."""
    from mmfilter.core.cards.cards import card_names, load_card

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
