"""`init`: write a recipe for the user's shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mmfilter.cli.options import Shards
from mmfilter.core.input.source import InputOptions


def init(
    shards: Shards,
    inputs: InputOptions,
    output: Annotated[str, typer.Option("-o", "--output", help="File to write, or - for stdout.")] = "recipe.yaml",
) -> None:
    """Write a commented recipe for your shards.

    Looks at the first samples of the first shard: where captions are, whether samples have uids, and how many
    there may be in all. Edit what it says, then: mmfilter run recipe.yaml

    Example: mmfilter init 'examples/shards/*.tar'
    """
    from mmfilter.cli import display
    from mmfilter.recipes.drafting import draft, look, write_draft

    summary = look(shards, inputs)
    if output == "-":
        sys.stdout.write(draft(summary))
        return
    write_draft(Path(output), draft(summary))
    display.note(f"{summary.told}; wrote {output}, next: mmfilter run {output} --dry-run")
