"""What the terminal shows: progress and summaries, on stderr; stdout is for data."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mmfilter.core.selection.funnel import Selection
    from mmfilter.ops.score import ScoreSummary

BARS = " ▁▂▃▄▅▆▇█"


def stderr() -> Console:
    """A console on stderr that never guesses at markup or numbers in our texts."""
    return Console(stderr=True, markup=False, highlight=False)


def note(text: str) -> None:
    """Say something that the user should know."""
    stderr().print(f"mmfilter: {text}", soft_wrap=True)


class _Rate(ProgressColumn):
    """Samples a second since the phase began."""

    def render(self, task: Task) -> Text:
        samples = task.fields["samples"]
        rate = samples / task.elapsed if task.elapsed else 0.0
        return Text(f"{samples:,} samples  {rate:,.0f}/s")


class TerminalProgress:
    """A bar on stderr when it is a terminal; nothing but notes when it is not."""

    def __init__(self) -> None:
        self._console = stderr()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self._console,
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task: Any = None
        self._samples = 0

    def __enter__(self) -> TerminalProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, phase: str, total_bytes: int | None) -> None:
        """Begin a phase; time left is known when the size of the input is."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._samples = 0
        self._task = self._bar.add_task(phase, total=total_bytes, samples=0)

    def advance(self, samples: int, nbytes: int) -> None:
        """Count samples done and the bytes that they took in their shard."""
        self._samples += samples
        self._bar.update(self._task, advance=nbytes, samples=self._samples)

    def describe(self, text: str) -> None:
        """Put figures in the place of the phase's name."""
        self._bar.update(self._task, description=text)

    def note(self, text: str) -> None:
        """Say something that the user should know, above the bar."""
        self._console.print(f"mmfilter: {text}", soft_wrap=True)


def score_report(summary: ScoreSummary, columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """The summary of a scoring run as JSON values; `columns` are all rows of the run, NaN without score."""
    return {
        "run": str(summary.run),
        "samples": summary.n_samples,
        "scored": summary.n_scored,
        "new_samples": summary.n_new,
        "shards": summary.n_shards,
        "skipped_shards": summary.n_skipped,
        "failed_shards": [
            {"shard": error.shard, "offset": error.offset, "problem": str(error)} for error in summary.failures
        ],
        "bad": dict(summary.reasons.most_common()),
        "seconds": round(summary.seconds, 3),
        "samples_per_second": round(summary.samples_per_second, 2),
        "scores": {name: _statistics(values) for name, values in columns.items()},
    }


def _statistics(values: np.ndarray) -> dict[str, float | int | None]:
    values = values[np.isfinite(values)]
    names = ("min", "p10", "median", "p90", "max")
    statistics: dict[str, float | int | None] = {"n": len(values), "mean": None, **dict.fromkeys(names)}
    if not len(values):
        return statistics
    quantiles = np.quantile(values.astype(np.float64), (0, 0.1, 0.5, 0.9, 1))
    statistics["mean"] = float(values.mean(dtype=np.float64))
    statistics.update(zip(names, map(float, quantiles), strict=True))
    return statistics


def show_score(summary: ScoreSummary, columns: dict[str, np.ndarray], ranked_by: str) -> None:
    """Print the summary table and the histogram of the score that `select` ranks by."""
    console = stderr()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("score")
    for name in ("mean", "min", "10 %", "median", "90 %", "max"):
        table.add_column(name, justify="right")
    for name, values in columns.items():
        stats = _statistics(values)
        if stats["n"]:
            table.add_row(name, *(f"{stats[part]:.3f}" for part in ("mean", "min", "p10", "median", "p90", "max")))
    console.print(table)
    console.print()
    _show_histogram(console, ranked_by, columns[ranked_by])
    _show_counts(console, summary)


def _show_histogram(console: Console, name: str, values: np.ndarray) -> None:
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    counts, _ = np.histogram(values, bins=50, range=(low, high if high > low else low + 1))
    heights = np.ceil(counts / counts.max() * (len(BARS) - 1)).astype(int)
    console.print(f"{name}  {low:.3f} {''.join(BARS[h] for h in heights)} {high:.3f}\n")


def _show_counts(console: Console, summary: ScoreSummary) -> None:
    pace = f" in {summary.seconds:.1f} s ({summary.samples_per_second:,.0f}/s)" if summary.n_new else ""
    skipped = f", {summary.n_skipped} finished before" if summary.n_skipped else ""
    shards = "shard" if summary.n_shards == 1 else "shards"
    console.print(
        f"{summary.n_scored:,} of {summary.n_samples:,} samples have scores; {summary.n_new:,} gone through{pace}, "
        f"{summary.n_shards} {shards}{skipped} -> {summary.run}",
        soft_wrap=True,
    )
    for reason, count in summary.reasons.most_common():
        console.print(f"  {count:,} without a score: {reason}", soft_wrap=True)


def show_funnel(funnel: list[tuple[str, int]]) -> None:
    """Print a selection's funnel, one step a line."""
    console = stderr()
    width = max((len(f"{count:,}") for _, count in funnel), default=0)
    for label, count in funnel:
        console.print(f"  {count:>{width},}  {label}", soft_wrap=True)


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of words in columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def selection_report(selection: Selection) -> dict[str, Any]:
    """A selection as JSON values."""
    return {
        "rows": selection.rows,
        "candidates": selection.candidates,
        "scored": selection.scored,
        "kept": selection.kept,
        "written": selection.written,
        "cut": selection.cut,
        "dropped": selection.dropped,
        "shards_written": selection.shards_written,
        "bytes_written": selection.nbytes_written,
        "funnel": [{"step": step, "samples": count} for step, count in selection.funnel],
    }
