"""How `check` and `sae show --on` print their reports: these are the commands' data, so they go to stdout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from mmfilter.core.scores.registry import shown

if TYPE_CHECKING:
    from mmfilter.core.evaluation.evidence import Evidence
    from mmfilter.core.evaluation.fidelity import Fidelity
    from mmfilter.ops.check import CheckReport
    from mmfilter.ops.measure import Measurement

CONTROL = "caption_tokens"
"""Shown below the scores; JSON has all of both."""
SIDES = {"image": "image", "text": "caption"}


def _stdout() -> Console:
    return Console(markup=False, highlight=False)


def show_check(report: CheckReport) -> None:
    """Print the comparison as tables, and the verdict."""
    console = _stdout()
    weights = "the card" if report.card_weights else f"{report.n_fitted:,} other pairs"
    shards = "shard" if len(report.shards) == 1 else "shards"
    console.print(
        f"{report.n_pairs:,} pairs of {len(report.shards)} {shards}, each with its own caption and with another "
        f"pair's; feature weights of {weights}.\n"
    )
    table = plain_table("score", "AUC", "95 % interval", "random SAE", "difference to it", "with length")
    for name in (*shown(), CONTROL):
        score = report.scores[name]
        table.add_row(
            name,
            f"{score.auc:.3f}",
            _span(score.interval),
            *_beside_random(score),
            number(score.length_correlation, "+.2f"),
        )
    console.print(table)
    console.print()
    console.print(_fidelity_table(report.fidelity))
    console.print(f"\n{report.verdict}")


def show_measurement(measurement: Measurement) -> None:
    """Print the fidelity of an SAE on the user's pairs."""
    console = _stdout()
    console.print(f"\nOn {measurement.n_pairs:,} of your pairs:\n")
    console.print(_fidelity_table(measurement.fidelity))
    console.print(f"\n{measurement.verdict}")


def plain_table(*columns: str) -> Table:
    """A table without lines, numbers on the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def _beside_random(score: Evidence) -> tuple[str, str]:
    if score.random is None:
        return "", ""
    difference = score.against(score.random)
    return f"{difference.auc:.3f}", _span((difference.low, difference.high), "+.3f")


def _fidelity_table(fidelity: Fidelity) -> Table:
    table = plain_table("tokens", "number", "FVU", "cosine", "active (L0)", "silent features")
    for name, side in fidelity.sides.items():
        figures = (number(side.fvu, ".3f"), number(side.cosine, ".3f"), number(side.l0, ".1f"))
        table.add_row(SIDES[name], f"{side.n_tokens:,}", *figures, f"{100 * fidelity.fraction_silent[name]:.1f} %")
    return table


def _span(interval: tuple[float, float], form: str = ".3f") -> str:
    return " to ".join(f"{end:{form}}".replace("-", "−") for end in interval)


def number(value: float, form: str) -> str:
    """The number with a real minus; nothing for NaN."""
    return "" if math.isnan(value) else f"{value:{form}}".replace("-", "−")


def check_json(report: CheckReport) -> dict[str, Any]:
    """The report as JSON values."""
    return {
        "pairs": report.n_pairs,
        "fitted_on": report.n_fitted,
        "left_out": report.n_left_out,
        "bad": dict(report.reasons.most_common()),
        "shards": report.shards,
        "weights": "card" if report.card_weights else "fitted",
        "threshold": report.threshold,
        "random_sae_threshold": report.random_threshold,
        "scores": {name: _evidence_json(score, report.scores["raw"]) for name, score in report.scores.items()},
        "fidelity": fidelity_json(report.fidelity),
        "recommended": report.recommended,
        "verdict": report.verdict,
        "notes": report.notes,
    }


def _evidence_json(score: Evidence, raw: Evidence) -> dict[str, Any]:
    low, high = score.interval
    found: dict[str, Any] = {
        "auc": score.auc,
        "low": low,
        "high": high,
        "above_chance": score.above_chance,
        "length_correlation": finite(score.length_correlation),
    }
    for name, other in (("random_sae", score.random), ("raw", None if score is raw else raw)):
        if other is not None:
            difference = score.against(other)
            found[name] = {
                "auc": difference.auc,
                "low": difference.low,
                "high": difference.high,
                "this_is": difference.word,
            }
    return found


def measurement_json(measurement: Measurement) -> dict[str, Any]:
    """The measurement as JSON values."""
    return {
        "pairs": measurement.n_pairs,
        "bad": dict(measurement.reasons.most_common()),
        "shards": measurement.shards,
        "fidelity": fidelity_json(measurement.fidelity),
        "published": measurement.published,
        "verdict": measurement.verdict,
        "notes": measurement.notes,
    }


def fidelity_json(fidelity: Fidelity) -> dict[str, Any]:
    """Figures of both sides as JSON values, null where there is nothing to measure."""
    sides = {
        name: {
            "tokens": side.n_tokens,
            "fvu": finite(side.fvu),
            "cosine": finite(side.cosine),
            "l0": finite(side.l0),
            "silent_features": fidelity.fraction_silent[name],
        }
        for name, side in fidelity.sides.items()
    }
    return sides | {"features": fidelity.n_features, "dead_features": fidelity.n_dead}


def finite(value: float) -> float | None:
    """The number, None where JSON has none."""
    return value if math.isfinite(value) else None
