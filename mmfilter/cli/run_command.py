"""`run`: follow a recipe, and say what became of its steps."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mmfilter.recipes.steps import Step


def run_recipe(
    recipe: Annotated[
        Path, typer.Argument(help="Recipe, or the manifest.json of what a recipe made.", metavar="RECIPE")
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a key, as select.top=30%; repeatable.", metavar="KEY.KEY=VALUE"),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done, with the funnel once there are scores; write nothing."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the steps as JSON on stdout.")] = False,
) -> None:
    """Go the whole way of a recipe: score, find duplicates, select, write.

    A step that is finished is skipped, so the same command goes on where it was stopped. An output
    that was made with another recipe is never written over. Relative paths are relative to the current
    directory.

    Example: mmfilter run examples/recipes/web-pairs.yaml
    """
    from mmfilter.cli import display
    from mmfilter.recipes.reading import read_recipe
    from mmfilter.recipes.steps import follow

    read = read_recipe(recipe, changes or ())
    with display.TerminalProgress() as progress:
        steps = follow(read, progress, _tell, dry_run=dry_run)
    if as_json:
        print(json.dumps({"steps": [_report(step) for step in steps]}, indent=2))


def _tell(step: Step) -> None:
    """A step's line, with the funnel of a selection under it."""
    from mmfilter.cli import display

    display.stderr().print(f"{step.name:<8}{'would ' if step.state == 'planned' else ''}{step.text}", soft_wrap=True)
    display.show_funnel(list(step.funnel))
    for warning in step.warnings:
        display.note(warning)


def _report(step: Step) -> dict[str, Any]:
    return asdict(step) | {"funnel": [{"step": label, "samples": n} for label, n in step.funnel]}
