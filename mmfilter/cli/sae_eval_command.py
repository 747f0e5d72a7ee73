"""`sae eval`: parse, evaluate, print."""

from __future__ import annotations

import json
from dataclasses import replace

from mmfilter.cli.options import AsJson, SAEName, Shards
from mmfilter.ops.evaluate_settings import EvaluateSettings


def evaluate(sae: SAEName, shards: Shards, settings: EvaluateSettings, as_json: AsJson = False) -> None:
    """Evaluate an SAE on your pairs, beside random directions of its shape.

    How it reconstructs image and caption tokens (FVU, cosine, L0, silent and dense features), how much of
    the model's next-token loss on captions survives when the reconstructions take the place of its states
    (CE recovered), which features fire on both sides, and their cross-modal weights. The whole model is
    loaded. What the figures mean: docs/evaluating.md.

    Example: mmfilter sae eval tiny 'examples/shards/*.tar'
    """
    from mmfilter.cli import display, sae_eval_display
    from mmfilter.ops import evaluate as operation

    settings = replace(settings, sae=sae, stated_layer=_stated_layer(sae, settings))
    with display.TerminalProgress() as progress:
        evaluation = operation.evaluate(shards, settings, progress)
    for note in evaluation.notes:
        display.note(note)
    if as_json:
        print(json.dumps(sae_eval_display.evaluation_json(evaluation, sae), indent=2))
    else:
        sae_eval_display.show_evaluation(evaluation, sae)


def _stated_layer(sae: str, settings: EvaluateSettings) -> int | None:
    """The layer that the SAE's files name, where the card or --layer does not settle it."""
    from mmfilter.core.cards.sae_options import make_options
    from mmfilter.core.sae.pretrained import load_sae

    if settings.layer is not None or settings.model in (None, sae):
        return None
    layer: int | None = load_sae(sae, make_options(settings.sae_options)).metadata.get("layer")
    return layer
