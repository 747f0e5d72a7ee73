"""`mmfilter dedup`: parse, find the duplicates, print."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mmfilter.cli.options import DEFAULT_RUN, one_of

if TYPE_CHECKING:
    from mmfilter.ops.dedup import BorderlinePair, DedupSummary


CAPTION_CHARS = 32
"""Of a caption in the table of pairs"""


def dedup(
    run: Annotated[Path, typer.Argument(help="Run directory that score wrote.", metavar="RUN")] = DEFAULT_RUN,
    threshold: Annotated[
        float, typer.Option(help="Cosine of codes from which two samples are near-duplicates.")
    ] = 0.95,
    on: Annotated[str, typer.Option(help="Which sides have to be that close: both, image, or text.")] = "both",
    by: Annotated[str, typer.Option(help="Score column that says which of two duplicates is kept.")] = "similarity",
    borderline: Annotated[
        int, typer.Option(help="List so many pairs closest to the threshold, on either side of it.", metavar="N")
    ] = 0,
    page: Annotated[
        Optional[Path],
        typer.Option(help="Also write the pairs of --borderline as an HTML page with pictures.", metavar="FILE"),
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Search with faiss-gpu.")] = False,
    workers: Annotated[Optional[int], typer.Option(help="Threads (default: all cores).")] = None,
    memory: Annotated[
        Optional[float], typer.Option(help="GiB that the index may take in memory (default: half of what is free).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")] = False,
) -> None:
    """Find exact and near duplicates in a run.

    Needs no model. The best of each kind is kept; dedup.parquet in the run has every sample with what
    became of it, duplicates.parquet the close pairs. To leave duplicates out of a selection, give
    select --dedup.

    Example: mmfilter dedup runs/icons --threshold 0.95
    """
    from mmfilter.cli import display
    from mmfilter.ops import dedup as operation

    one_of("--on", on, ("both", "image", "text"))
    duplicates = operation.DuplicateSettings(threshold, on, gpu, workers, memory)
    settings = operation.DedupSettings(duplicates, by, borderline, page)
    with display.TerminalProgress() as progress:
        summary = operation.dedup(run, settings, progress)
    if as_json:
        print(json.dumps(_report(summary), indent=2))
        return
    display.show_funnel(summary.funnel)
    if summary.crowded:
        display.note(
            f"{summary.crowded:,} samples have more close neighbours than are listed; they were compared with the kept ones directly"
        )
    display.note(
        f"{summary.pairs:,} pairs{' listed' if summary.crowded else ''}, {_search(summary.index)} -> {run}/dedup.parquet"
    )
    if borderline and not summary.borderline:
        display.note("no pair is near the threshold")
    for line in display.aligned(_rows(summary.borderline)):
        print(line)


def _search(index: dict[str, Any]) -> str:
    """How they were searched, in words."""
    if not index["clusters"]:
        return "every sample held against every other"
    looked = f"searched in {index['clusters_searched']} of {index['clusters']:,} clusters"
    if not index["true_neighbours"]:
        return looked
    return f"{looked}, which hold {index['found']:.2%} of {index['true_neighbours']:,} close neighbours of sampled ones"


def _report(summary: DedupSummary) -> dict[str, Any]:
    duplicates = summary.settings.duplicates
    return {
        "run": str(summary.run),
        "threshold": duplicates.threshold,
        "on": duplicates.on,
        "by": summary.settings.by,
        "samples": summary.rows,
        "scored": summary.scored,
        "exact_duplicates": summary.exact,
        "near_duplicates": summary.near,
        "kept": summary.kept,
        "pairs": summary.pairs,
        "crowded": summary.crowded,
        "index": summary.index,
        "borderline": [asdict(pair) for pair in summary.borderline],
    }


def _rows(pairs: tuple[BorderlinePair, ...]) -> list[tuple[str, ...]]:
    """The table of pairs, headings first; nothing for none."""
    from mmfilter.core.run.previews import one_line

    rows = (
        [("similarity", "image", "text", "key", "other key", "caption", "other caption", "shard", "other shard")]
        if pairs
        else []
    )
    for p in pairs:
        captions = (one_line(caption or "", CAPTION_CHARS) for caption in (p.caption, p.other_caption))
        closeness = (f"{p.similarity:.4f}", f"{p.image:.4f}", f"{p.text:.4f}")
        rows.append((*closeness, p.key, p.other_key, *captions, Path(p.shard).name, Path(p.other_shard).name))
    return rows
