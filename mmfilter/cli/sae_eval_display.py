"""How `sae eval` prints its report: it is the command's data, so it goes to stdout."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mmfilter.cli.check_display import SIDES, fidelity_json, finite, number, plain_table

if TYPE_CHECKING:
    from mmfilter.core.evaluation.fidelity import Fidelity
    from mmfilter.core.evaluation.spliced_loss import SplicedLoss
    from mmfilter.core.evaluation.weight_spread import WeightSpread
    from mmfilter.ops.evaluate import Evaluation, Trial

SHOWN_QUANTILES = ("p10", "median", "p90")


def show_evaluation(evaluation: Evaluation, sae: str) -> None:
    """Print what was found, one block for each model and context."""
    console = Console(markup=False, highlight=False)
    shards = "shard" if len(evaluation.shards) == 1 else "shards"
    console.print(
        f"SAE {sae}, {evaluation.n_features:,} features at layer {evaluation.layer}, on {evaluation.n_pairs:,} pairs "
        "of "
        f"{len(evaluation.shards)} {shards}; beside it random directions, as many and as sparse.",
        soft_wrap=not console.is_terminal,
    )
    for trial in evaluation.trials:
        _show_trial(console, trial, evaluation.n_pairs)
    console.print(f"\ncross-modal weights on {next(iter(evaluation.weights.values())).n_pairs:,} pairs")
    table = plain_table("SAE", "weighted", "one-sided", "caption", "image", "never", "10 %", "median", "90 %")
    for name, spread in evaluation.weights.items():
        table.add_row(name, *_spread_row(spread))
    console.print(table)


def _show_trial(console: Console, trial: Trial, n_pairs: int) -> None:
    context = "captions alone, no image" if trial.text_only else "images and captions"
    fewer = "" if trial.n_pairs == n_pairs else f", {trial.n_pairs:,} pairs"
    console.print(f"\n{trial.model}: {context}{fewer}", soft_wrap=True)
    table = plain_table("tokens", "number", "SAE", "FVU", "expl./dim.", "cosine", "active (L0)", "silent", "dense")
    for side, word in SIDES.items():
        for which, fidelity in trial.fidelity.items():
            if fidelity.sides[side].n_tokens:
                table.add_row(*_side_row(fidelity, side, word, which))
    console.print(table)
    for which, fidelity in trial.fidelity.items():
        if not trial.text_only:
            console.print(_features(which, fidelity))
    console.print(
        f"caption loss: {trial.no_loss}" if trial.loss is None else _loss(trial.loss), soft_wrap=not console.is_terminal
    )


def _side_row(fidelity: Fidelity, name: str, word: str, which: str) -> tuple[str, ...]:
    side = fidelity.sides[name]
    figures = [
        number(value, form)
        for value, form in (
            (side.fvu, ".3f"),
            (side.explained_by_dimension, ".3f"),
            (side.cosine, ".3f"),
            (side.l0, ".1f"),
        )
    ]
    return word, f"{side.n_tokens:,}", which, *figures, _percent(fidelity.fraction_silent[name]), f"{side.n_dense:,}"


def _features(which: str, fidelity: Fidelity) -> str:
    if fidelity.n_dead == fidelity.n_features:
        return f"{which}: all features dead"
    return (
        f"{which}: {fidelity.n_dead:,} features dead; {_percent(fidelity.fraction_shared)} of the others fire on both "
        "sides"
    )


def _loss(loss: SplicedLoss) -> str:
    said = ", ".join(
        [
            f"{loss.clean:.3f} as it is",
            *(f"{value:.3f} {name}" for name, value in loss.spliced.items()),
            f"{loss.zero:.3f} zeroed",
        ]
    )
    text = f"caption loss (nats a token, {loss.n_tokens:,} tokens): {said}\n"
    if loss.meaningless:
        return f"{text}CE recovered means nothing here: {loss.meaningless}"
    care = f"\n(with care: {loss.caution})" if loss.caution else ""
    return (
        f"{text}CE recovered: {', '.join(f'{_percent(share)} {name}' for name, share in loss.recovered.items())}{care}"
    )


def _spread_row(spread: WeightSpread) -> tuple[str, ...]:
    counts = (spread.n_weighted, spread.n_one_sided, spread.n_text_only, spread.n_image_only, spread.n_never)
    return *(f"{count:,}" for count in counts), *(
        number(spread.quantiles.get(name, math.nan), ".3f") for name in SHOWN_QUANTILES
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %".replace("-", "−")


def evaluation_json(evaluation: Evaluation, sae: str) -> dict[str, Any]:
    """The report as JSON values, null where there is nothing to measure."""
    return {
        "sae": sae,
        "features": evaluation.n_features,
        "layer": evaluation.layer,
        "pairs": evaluation.n_pairs,
        "bad": dict(evaluation.reasons.most_common()),
        "shards": evaluation.shards,
        "trials": [_trial_json(trial) for trial in evaluation.trials],
        "weights": {name: _spread_json(spread) for name, spread in evaluation.weights.items()},
        "notes": evaluation.notes,
    }


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {
        "model": trial.model,
        "text_only": trial.text_only,
        "pairs": trial.n_pairs,
        "fidelity": {which: _fidelity_json(fidelity) for which, fidelity in trial.fidelity.items()},
        "loss": None if trial.loss is None else _loss_json(trial.loss),
        "no_loss": trial.no_loss or None,
    }


def _fidelity_json(fidelity: Fidelity) -> dict[str, Any]:
    found = fidelity_json(fidelity)
    for name, side in fidelity.sides.items():
        found[name] |= {
            "explained_variance": finite(side.explained_variance),
            "explained_by_dimension": finite(side.explained_by_dimension),
            "dense_features": side.n_dense,
        }
    return found | {"shared_features": fidelity.n_shared, "fraction_shared": finite(fidelity.fraction_shared)}


def _loss_json(loss: SplicedLoss) -> dict[str, Any]:
    return {
        "tokens": loss.n_tokens,
        "left_out": loss.n_left_out,
        "clean": finite(loss.clean),
        "zero": finite(loss.zero),
        "uniform": loss.uniform,
        "context_free": finite(loss.context_free),
        "spliced": {name: finite(value) for name, value in loss.spliced.items()},
        "ce_recovered": {name: finite(share) for name, share in loss.recovered.items()},
        "meaningless": loss.meaningless or None,
        "caution": loss.caution or None,
    }


def _spread_json(spread: WeightSpread) -> dict[str, Any]:
    return asdict(spread) | {"mean": finite(spread.mean)}
