"""`init`: write a recipe for the user's shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mmfilter.cli import options


def init(
    shards: Annotated[
        list[str],
        typer.Argument(
            help="WebDataset tars, parquet files with images, LLaVA JSON, folders of images: paths, globs, brace patterns, URLs.",
            metavar="SHARDS",
        ),
    ],
    output: Annotated[str, typer.Option("-o", "--output", help="File to write, or - for stdout.")] = "recipe.yaml",
    caption: options.Caption = "auto",
    images: options.Images = None,
    allow_pipe: options.AllowPipe = False,
) -> None:
    """Write a commented recipe for your shards.

    Looks at the head of the first shard: where captions are, whether samples have uids, and how many
    there may be in all. Change what it says, then: mmfilter run recipe.yaml

    Example: mmfilter init 'examples/shards/*.tar'
    """
    from mmfilter.cli import display
    from mmfilter.core.input.shards import InputOptions
    from mmfilter.recipes.drafting import draft, look, write_draft

    found = look(shards, InputOptions(caption, images, allow_pipe))
    if output == "-":
        sys.stdout.write(draft(found))
        return
    write_draft(Path(output), draft(found))
    display.note(f"{found.told}; wrote {output}, next: mmfilter run {output} --dry-run")
