"""A run directory: where its files are, which shards it has, and with which settings it was made."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from mmfilter import __version__
from mmfilter.core.files import read_json, write_json
from mmfilter.core.input.places import Stamp
from mmfilter.core.input.shards import open_source, stamps
from mmfilter.core.input.source import NO_OPTIONS, InputOptions, Source
from mmfilter.core.run.tables import read_table_metadata
from mmfilter.errors import RunError


@dataclass(frozen=True)
class RunDirectory:
    """Where a run keeps its files."""

    path: Path

    @property
    def writable(self) -> bool:
        """Whether files can be made in it."""
        return os.access(self.path, os.W_OK)

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def weights(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def index(self) -> Path:
        """The folder of the index over the codes."""
        return self.path / "index"

    @property
    def duplicates(self) -> Path:
        """The table of close pairs."""
        return self.path / "duplicates.parquet"

    @property
    def dedup(self) -> Path:
        """What `dedup` decided: a row for every sample."""
        return self.path / "dedup.parquet"

    def scores(self, name: str) -> Path:
        """The score table of the shard called `name` in this run."""
        return self.path / "scores" / f"{name}.parquet"

    def codes(self, name: str) -> Path:
        """The code table of the shard called `name` in this run."""
        return self.path / "codes" / f"{name}.parquet"

    def score_tables(self) -> list[Path]:
        """All finished score tables, in the order of the inputs in the manifest, then by name.

        Raises `RunError` when there is no run or nothing in it is finished.
        """
        if not self.manifest.exists():
            raise RunError(
                f"{str(self.path)!r} is not a run: it has no manifest.json; make one with: mmfilter score SHARDS --run "
                f"{self.path}"
            )
        order = {item["name"]: i for i, item in enumerate(read_json(self.manifest)["inputs"])}
        found = sorted((self.path / "scores").glob("*.parquet"), key=lambda p: (order.get(p.stem, len(order)), p.stem))
        if not found:
            raise RunError(
                f"run {str(self.path)!r} has no finished shard yet; continue it with: mmfilter score SHARDS --run "
                f"{self.path}"
            )
        return found


@dataclass(frozen=True)
class Shard:
    """One input shard and its name in the run."""

    source: Source
    name: str

    @property
    def path(self) -> str:
        return self.source.path


@dataclass(frozen=True)
class ScoredShard:
    """An input shard of the run, as it was when it was scored."""

    path: str
    stamp: Stamp
    rows: int
    options: InputOptions = NO_OPTIONS
    """How it was read"""

    @cached_property
    def source(self) -> Source:
        """For reading it again; it is looked at when it is first asked for."""
        return open_source(self.path, self.options)


def name_shards(sources: Sequence[Source], run: RunDirectory) -> list[Shard]:
    """Give every shard a name: its file or folder name, with a digest of its path where two share one."""
    known = {item["shard"]: item["name"] for item in read_json(run.manifest)["inputs"]} if run.manifest.exists() else {}
    stems = {source.path: source.stem for source in sources}
    taken = Counter(known.values())
    taken.update(stem for path, stem in stems.items() if path not in known)

    def name(path: str, stem: str) -> str:
        return stem if taken[stem] == 1 else f"{stem}-{_digest(path)}"

    return [Shard(source, known.get(source.path) or name(source.path, source.stem)) for source in sources]


def _digest(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:8]


def unfinished(run: RunDirectory, shards: list[Shard]) -> list[Shard]:
    """Shards of which the run has not both tables, or whose input has changed since.

    What a command prints is taken to be the same as long as the command is.
    """
    there = [
        shard
        for shard in shards
        if shard.source.kind != "stdin" and run.scores(shard.name).exists() and run.codes(shard.name).exists()
    ]
    now = zip(there, stamps([shard.source for shard in there]), strict=True)
    finished = {
        shard for shard, found in now if found == Stamp.from_metadata(read_table_metadata(run.scores(shard.name)))
    }
    return [shard for shard in shards if shard not in finished]


def check_place(run: RunDirectory, sources: Iterable[Source]) -> None:
    """Raise `RunError` when the run would be written to a URL, or among the input's shards."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(run.path)):
        raise RunError(f"run {str(run.path)!r} is a URL; use a local folder and upload that")
    for source in sources:
        if source.holds(run.path):
            raise RunError(
                f"run {str(run.path)!r} is the folder of shard {source.path!r}, and nothing is written there: use "
                "another --run"
            )


def open_run(
    run: RunDirectory, settings: dict[str, Any], versions: dict[str, str], shards: list[Shard]
) -> dict[str, Any]:
    """Write the manifest of a new run, or add the shards to that of an old one with the same settings.

    Raises `RunError` naming what differs, or when the run would be written among the input's shards;
    returns the manifest.
    """
    check_place(run, [shard.source for shard in shards])
    manifest: dict[str, Any] = {
        "kind": "mmfilter run",
        "version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "settings": settings,
        "weights": None,
        "inputs": [],
    }
    if run.manifest.exists():
        manifest = read_json(run.manifest)
        _check_same(run, manifest["settings"], settings)
    known = {item["shard"] for item in manifest["inputs"]}
    manifest["inputs"] += [{"name": shard.name, "shard": shard.path} for shard in shards if shard.path not in known]
    write_json(run.manifest, manifest)
    return manifest


def _check_same(run: RunDirectory, old: dict[str, Any], new: dict[str, Any]) -> None:
    moved = {name for name in ("model", "sae") if old.get(f"{name}_hash") == new[f"{name}_hash"]}  # the same, elsewhere
    moved |= {"sae_options"} if "sae" in moved else set()
    differing = [name for name in new if old.get(name) != new[name] and name not in moved]
    if differing:
        said = "; ".join(f"{name} was {old.get(name)!r}, is now {new[name]!r}" for name in differing[:3])
        raise RunError(
            f"run {str(run.path)!r} was made with other settings ({said}): use another --run, or the old settings"
        )
