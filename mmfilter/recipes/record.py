"""What was done with which recipe: in the run (`steps.json`) and beside or in every output. None of it needs torch."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmfilter import __version__
from mmfilter.core.files import read_json, write_json
from mmfilter.core.input.remote import is_url
from mmfilter.core.input.source import Source
from mmfilter.core.run.directory import RunDirectory, name_shards, unfinished
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.core.run.tables import read_table_metadata
from mmfilter.recipes.schema import Output, Recipe

STEPS = "steps.json"
"""In the run directory: step -> what it was asked for when it finished"""


def digest(value: Any) -> str:
    """Of anything that JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# --- in the run ------------------------------------------------------------------------------


def stored(run: RunDirectory, step: str) -> Any:
    """What the step was asked for when it finished; None when it did not."""
    path = run.path / STEPS
    return read_json(path).get(step) if path.exists() else None


def store(run: RunDirectory, step: str, asked: Any) -> None:
    """Say that the step is finished."""
    path = run.path / STEPS
    write_json(path, (read_json(path) if path.exists() else {}) | {step: asked})


def score_request(recipe: Recipe) -> dict[str, Any]:
    """All that decides on a score; local models and SAEs with the size and time of change of their files."""
    card, run = recipe.model.card, recipe.run
    return {
        "card": asdict(card),
        "files": {
            name: _files(Path(name)) for name in (card.model, card.sae, card.weights) if name and Path(name).exists()
        },
        "caption": recipe.inputs.caption,
        "images": recipe.inputs.images,
        "dtype": run.dtype,
        "limit": run.limit,
        "seed": run.seed,
    }


def _files(path: Path) -> str:
    """Digest of the names, sizes and times of change of a file, or of all in a folder."""
    found = sorted(inner for inner in path.rglob("*") if inner.is_file()) if path.is_dir() else [path]
    return digest([(str(item.relative_to(path)), item.stat().st_size, item.stat().st_mtime_ns) for item in found])


def all_scored(run: RunDirectory, sources: Sequence[Source], limit: int | None) -> bool:
    """Whether every shard, or as many as the limit reaches, is finished and has not changed since."""
    left, named = limit, name_shards(sources, run)
    todo = set(unfinished(run, named))
    for shard in named:
        if left is not None and left <= 0:
            return True
        if shard in todo:
            return False
        if left is not None:
            left -= read_table_metadata(run.scores(shard.name))["rows"]
    return True


def tables_digest(run: RunDirectory) -> str:
    """Of what the run holds: of every shard its stamp and counts, and the weights."""
    tables = ScoreTables(run)
    about = read_json(run.manifest)
    shards = sorted((shard.path, asdict(shard.stamp), shard.rows) for shard in tables.shards)
    return digest([shards, about.get("settings"), about.get("weights")])


# --- with an output --------------------------------------------------------------------------


def manifest_of(output: Output, *, folder: bool) -> Path:
    """Where the output says what it is: in the folder, or beside the file."""
    path = Path(output.path)
    return path / "manifest.json" if folder else path.with_name(f"{path.name}.manifest.json")


def output_digest(recipe: Recipe, output: Output) -> str:
    """Of the part of a resolved recipe that decides what is in the output: not where it goes, and not how fast."""
    values = recipe.values()
    run = {name: values["run"][name] for name in ("limit", "seed", "dtype")}
    form = {"format": output.format, "shard_size": output.shard_size}
    return digest([values["inputs"], values["model"], run, values["select"], form])


def about_output(recipe: Recipe, output: Output, run: RunDirectory) -> dict[str, Any]:
    """The recipe as an output's manifest has it; `mmfilter run` on that manifest makes the output again."""
    about = read_json(run.manifest)
    settings = about.get("settings", {})
    return {
        "recipe": recipe.values(),
        "digest": output_digest(recipe, output),
        "scores": scores_digest(recipe, run),
        "card": asdict(recipe.model.card),
        "hashes": {name: settings.get(name) for name in ("model_hash", "sae_hash")},
        "versions": {"mmfilter": __version__, "python": platform.python_version()} | about.get("versions", {}),
    }


def scores_digest(recipe: Recipe, run: RunDirectory) -> str:
    """Of the scores that a selection of the recipe rests on, those of the run to match and files with more columns
    too."""
    match, patterns = (None, ()) if recipe.select is None else (recipe.select.match, recipe.select.metadata)
    found = [tables_digest(run), None if match is None else tables_digest(RunDirectory(Path(match)))]
    local = [pattern for pattern in patterns if not is_url(pattern)]
    return digest(
        found
        + [
            [path, stamp_of(Path(path))]
            for pattern in local
            for path in (sorted(glob.glob(pattern, recursive=True)) or [pattern])
        ]
    )


def recipe_of(path: Path) -> dict[str, Any] | None:
    """What a manifest says of its recipe; None where there is no manifest or it has none."""
    return read_json(path).get("recipe") if path.exists() else None


def stamp_of(path: Path) -> list[int] | None:
    """Size and time of change, None where there is no file."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns]
