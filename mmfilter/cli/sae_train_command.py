"""`sae train`: parse, train with live figures, print."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmfilter.cli.options import AsJson, Shards
from mmfilter.core.training.run_settings import TrainRunSettings

if TYPE_CHECKING:
    from mmfilter.core.training.statistics import StepStats
    from mmfilter.core.training.summary import TrainSummary


def train(
    shards: Shards,
    settings: TrainRunSettings,
    config: Annotated[  # noqa: ARG001 (the settings are made with it)
        Path | None,
        typer.Option("--config", help="YAML file with any of the options; the command line overrides it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train an SAE on image and text states of your pairs.

    Writes a folder in the SAELens 6 layout with statistics, cross-modal weights, a log and its curves. The
    same command continues where a killed one stopped. Under torchrun every process takes its share.

    Example: mmfilter sae train 'examples/shards/*.tar' -o my-sae --tokens 100000 --widths 1024
    """
    from mmfilter.ops import train as operation

    with TrainingTerminal(settings.tensorboard) as progress:
        summary = operation.train(shards, settings, progress)
    show(summary, as_json=as_json)


class TrainingTerminal:
    """Live figures on stderr in a terminal, a line every tenth of the way elsewhere; TensorBoard where asked for."""

    def __init__(self, tensorboard: Path | None) -> None:
        from mmfilter.cli.display import TerminalProgress

        self._bars, self._shown, self._last = TerminalProgress(), 0.0, 0
        self._board: Any = None
        if tensorboard:
            from mmfilter.core.training.tensorboard import Board

            self._board = Board(tensorboard)

    def __enter__(self) -> TrainingTerminal:
        self._bars.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.__exit__(*error)
        if self._board is not None:
            self._board.close()

    def start(self, phase: str, total_bytes: int | None) -> None:
        self._bars.start(phase, total_bytes)

    def advance(self, samples: int, nbytes: int) -> None:
        self._bars.advance(samples, nbytes)

    def note(self, text: str) -> None:
        self._bars.note(text)

    def step(self, name: str, stats: StepStats, total_tokens: int, tokens_per_second: float) -> None:
        """One SAE's step."""
        from mmfilter.core.training.summary import flat

        if self._board is not None:
            self._board.add(name, flat(stats))
        tenth = 10 * stats.tokens // total_tokens
        live = sys.stderr.isatty()
        if live and time.monotonic() - self._shown < 0.2 and stats.tokens < total_tokens:
            return
        self._shown = time.monotonic()
        left = max(0, total_tokens - stats.tokens) / tokens_per_second if tokens_per_second else 0
        text = (
            f"{name + ': ' if name else ''}{stats.tokens / total_tokens:4.0%}  loss {stats.loss:.4g}  FVU "
            f"{stats.fvu:.3f}  L0 {stats.l0:.1f}  "
            f"dead {stats.dead:.1%}  {tokens_per_second:,.0f} tokens/s  {left / 60:.0f} min left"
        )
        if live:
            self._bars.describe(text)
        elif tenth > self._last:
            self._bars.note(text)
        self._last = max(self._last, tenth)


def show(summary: TrainSummary, *, as_json: bool) -> None:
    """Where the SAEs are, on stdout; what was left out, on stderr."""
    from mmfilter.cli import display
    from mmfilter.core.training.summary import flat

    for error in summary.failures:
        display.note(f"{error}; the pairs before that were trained on")
    for reason, count in summary.left_out.items():
        display.note(f"{count:,} samples left out: {reason}")
    if any(summary.sinks):
        display.note(f"{summary.sinks[0]:,} image and {summary.sinks[1]:,} text tokens left out as attention sinks")
    if as_json:
        saes = [{"folder": str(sae.folder), "last_step": flat(sae.last) if sae.last else None} for sae in summary.saes]
        print(json.dumps({"saes": saes, "tokens": summary.tokens, "seconds": summary.seconds}, indent=2))
        return
    for sae in summary.saes:
        if sae.last is not None:
            figures = f"FVU {sae.last.fvu:.3f}, L0 {sae.last.l0:.1f}, {sae.last.dead:.1%} dead"
            display.note(
                f"{sae.folder}: {sae.settings.n_features:,} features, {figures} after {sae.last.tokens:,} tokens; "
                f"curves in {sae.folder}/training.html"
            )
        print(sae.folder)
