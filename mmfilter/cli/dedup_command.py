"""`mmfilter dedup`: parse, find the duplicates, print."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfilter.cli.options import AsJson, RunArgument
from mmfilter.ops.dedup_settings import DedupSettings
from mmfilter.ops.score_settings import DEFAULT_RUN

if TYPE_CHECKING:
    from mmfilter.ops.dedup import BorderlinePair, DedupSummary


CAPTION_CHARS = 32
"""Of a caption in the table of pairs"""


def dedup(settings: DedupSettings, run: RunArgument = DEFAULT_RUN, as_json: AsJson = False) -> None:
    """Find exact and near duplicates in a run.

    Needs no model. The best of each group is kept; dedup.parquet in the run has every sample with what
    became of it, duplicates.parquet the close pairs. To leave duplicates out of a selection, give
    select --dedup.

    Example: mmfilter dedup runs/icons --threshold 0.95
    """
    from mmfilter.cli import display
    from mmfilter.ops import dedup as operation

    with display.TerminalProgress() as progress:
        summary = operation.dedup(run, settings, progress)
    if as_json:
        print(json.dumps(_report(summary), indent=2))
        return
    display.show_funnel(summary.funnel)
    if summary.crowded:
        display.note(
            f"{summary.crowded:,} samples have more close neighbours than are listed; "
            "they were compared with the kept ones directly"
        )
    listed = " listed" if summary.crowded else ""
    display.note(f"{summary.pairs:,} pairs{listed}, {_search(summary.index)} -> {run}/dedup.parquet")
    if settings.borderline and not summary.borderline:
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
    settings = summary.settings
    return {
        "run": str(summary.run),
        "threshold": settings.threshold,
        "on": settings.on,
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

    rows: list[tuple[str, ...]] = (
        [("similarity", "image", "text", "key", "other key", "caption", "other caption", "shard", "other shard")]
        if pairs
        else []
    )
    for p in pairs:
        captions = (one_line(caption or "", CAPTION_CHARS) for caption in (p.caption, p.other_caption))
        closeness = (f"{p.similarity:.4f}", f"{p.image:.4f}", f"{p.text:.4f}")
        rows.append((*closeness, p.key, p.other_key, *captions, Path(p.shard).name, Path(p.other_shard).name))
    return rows
