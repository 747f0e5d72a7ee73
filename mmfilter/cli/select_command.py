"""`select`: its options and what it prints."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from mmfilter.cli.options import DEFAULT_RUN, destination, one_of


def select(
    run: Annotated[Path, typer.Argument(help="Run directory that score wrote.", metavar="RUN")] = DEFAULT_RUN,
    top: Annotated[Optional[str], typer.Option(help="Keep the best: a share (20%) or a number (5000).")] = None,
    min_score: Annotated[Optional[float], typer.Option("--min", help="Keep scores of at least this.")] = None,
    by: Annotated[
        str, typer.Option(help="Score column to rank by, or a formula: '0.7 * similarity + 0.3 * rank(saev)'.")
    ] = "similarity",
    where: Annotated[Optional[str], typer.Option(help="SQL condition on the score table: who is a candidate.")] = None,
    metadata: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Parquet, CSV or JSONL with more columns for --where, --by, --per and --repeat; repeatable.",
            metavar="FILES",
        ),
    ] = None,
    dedup: Annotated[
        Optional[float],
        typer.Option(help="Of candidates whose codes are at least this close keep the best only.", metavar="COSINE"),
    ] = None,
    dedup_on: Annotated[str, typer.Option(help="Which sides have to be that close: both, image, or text.")] = "both",
    per: Annotated[
        Optional[str], typer.Option(help="Apply --top within each value of this column or formula.", metavar="EXPR")
    ] = None,
    diverse: Annotated[
        bool, typer.Option("--diverse", help="Keep --top pairs that together cover all features, not just the best.")
    ] = False,
    match: Annotated[
        Optional[Path],
        typer.Option(help="Keep --top pairs that are together like the data of this run.", metavar="TARGET_RUN"),
    ] = None,
    repeat: Annotated[
        Optional[str], typer.Option(help="Write a kept pair as often as this column or formula says.", metavar="EXPR")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the funnel and write nothing.")] = False,
    shuffle: Annotated[
        Optional[int], typer.Option(help="Shuffle the output with this seed (default: source order).", metavar="SEED")
    ] = None,
    output: Annotated[
        Optional[str],
        typer.Option(
            "-o", "--output", help="Directory to write (a file for tar, keys and *.npy), or - for a stream on stdout."
        ),
    ] = None,
    output_format: Annotated[
        Optional[str],
        typer.Option(
            "--format",
            help="shards, tar, keys, datacomp, parquet, llava-json, or hf (default: shards for a directory, tar for a stream).",
        ),
    ] = None,
    shard_size: Annotated[
        int, typer.Option(help="Samples in an output shard, parquet file or folder of images.")
    ] = 10_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the funnel as JSON on stderr.")] = False,
) -> None:
    """Copy the best pairs of a run, byte for byte.

    Needs no model: it reads the score tables and copies byte ranges.

    Example: mmfilter select runs/icons --top 20% -o best/
    """
    from mmfilter.cli import display
    from mmfilter.ops import select as operation

    one_of("--dedup-on", dedup_on, ("both", "image", "text"))
    form, path = destination(output, output_format, sys.stdout.isatty() and not dry_run)
    settings = operation.SelectSettings(
        top=top, min=min_score, by=by, where=where, metadata=tuple(metadata or ()), dedup=dedup, dedup_on=dedup_on, per=per, diverse=diverse,
        match=match, repeat=repeat, dry_run=dry_run, shuffle=shuffle, format=form, output=path, shard_size=shard_size,
    )  # fmt: skip
    with display.TerminalProgress() as progress:
        selection = operation.select(run, settings, progress=progress)
    if selection.reader_closed:
        silence_stdout()
    for warning in selection.warnings:
        display.note(warning)
    if as_json:
        print(json.dumps(display.selection_report(selection), indent=2), file=sys.stderr)
    else:
        display.show_funnel(selection.funnel)


def silence_stdout() -> None:
    """After the consumer has gone: keep Python's flush at exit from complaining."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
