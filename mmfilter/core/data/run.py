"""A run: which shards it has, with which settings it was made, and the tables of the shard at hand."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from mmfilter import __version__
from mmfilter.core.data import artifacts
from mmfilter.core.data.artifacts import CODE_TABLE, SCORE_TABLE, RunDirectory, TableWriter
from mmfilter.core.data.places import PIPE, STDIN
from mmfilter.core.data.remote import without_query
from mmfilter.core.data.shards import Stamp, stamps
from mmfilter.core.data.sources.image_folder import is_folder
from mmfilter.errors import RunError


@dataclass(frozen=True)
class Shard:
    """One input shard and its name in the run."""

    path: str
    name: str


@dataclass(frozen=True)
class ScoredShard:
    """An input shard of the run, as it was when it was scored."""

    path: str
    stamp: Stamp
    rows: int


def name_shards(paths: list[str], run: RunDirectory) -> list[Shard]:
    """Give every shard a name: its file or folder name, with a digest of its path where two share one."""
    known = {item["shard"]: item["name"] for item in artifacts.read_json(run.manifest)["inputs"]} if run.manifest.exists() else {}
    stems = {path: _stem(path) for path in paths}
    taken = Counter(known.values())
    taken.update(stem for path, stem in stems.items() if path not in known)

    def name(path: str, stem: str) -> str:
        return stem if taken[stem] == 1 else f"{stem}-{_digest(path)}"

    return [Shard(path, known.get(path) or name(path, stem)) for path, stem in stems.items()]


def _stem(path: str) -> str:
    if path == STDIN:
        return "stdin"
    if path.startswith(PIPE):
        named = re.findall(r"[\w-]+(?=\.tar\b)", path)
        return f"pipe-{named[-1] if named else _digest(path)}"
    if is_folder(path):
        folder, _, number = path.rpartition("/")
        return os.path.basename(folder) + number.replace("#", "-") or "folder"
    return re.sub(r"\.(tar|parquet|jsonl?)$", "", without_query(path).rstrip("/").rpartition("/")[2])


def _digest(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:8]


def unfinished(run: RunDirectory, shards: list[Shard]) -> list[Shard]:
    """Shards of which the run has not both tables, or whose input has changed since.

    What a command prints is taken to be the same as long as the command is.
    """
    there = [shard for shard in shards if shard.path != STDIN and run.scores(shard.name).exists() and run.codes(shard.name).exists()]
    now = zip(there, stamps([shard.path for shard in there]), strict=True)
    finished = {shard for shard, found in now if found == Stamp.from_metadata(artifacts.read_table_metadata(run.scores(shard.name)))}
    return [shard for shard in shards if shard not in finished]


def check_place(run: RunDirectory, paths: list[str]) -> None:
    """Raise `RunError` when the run would be written to a URL, or among the input's shards."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(run.path)):
        raise RunError(f"run {str(run.path)!r} is a URL; use a local folder and upload that")
    for path in paths:
        if in_source(run.path, path):
            raise RunError(f"run {str(run.path)!r} is the folder of shard {path!r}, and nothing is written there: use another --run")


def open_run(run: RunDirectory, settings: dict[str, Any], versions: dict[str, str], shards: list[Shard]) -> dict[str, Any]:
    """Write the manifest of a new run, or add the shards to that of an old one with the same settings.

    Raises `RunError` naming what differs, or when the run would be written among the input's shards;
    returns the manifest.
    """
    check_place(run, [shard.path for shard in shards])
    manifest: dict[str, Any] = {
        "kind": "mmfilter run",
        "version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "settings": settings,
        "weights": None,
        "inputs": [],
    }
    if run.manifest.exists():
        manifest = artifacts.read_json(run.manifest)
        _check_same(run, manifest["settings"], settings)
    known = {item["shard"] for item in manifest["inputs"]}
    manifest["inputs"] += [{"name": shard.name, "shard": shard.path} for shard in shards if shard.path not in known]
    artifacts.write_json(run.manifest, manifest)
    return manifest


def in_source(path: str | os.PathLike[str], shard: str) -> bool:
    """Whether a path is the folder that a local shard is in, or, where the shard is a folder, lies anywhere in it."""
    if not os.path.isabs(shard):
        return False
    folder, real = os.path.realpath(os.path.dirname(shard)), os.path.realpath(path)
    return real == folder or (is_folder(shard) and real.startswith(os.path.join(folder, "")))


def _check_same(run: RunDirectory, old: dict[str, Any], new: dict[str, Any]) -> None:
    moved = {name for name in ("model", "sae") if old.get(f"{name}_hash") == new[f"{name}_hash"]}  # the same, elsewhere
    moved |= {"sae_options"} if "sae" in moved else set()
    differing = [name for name in new if old.get(name) != new[name] and name not in moved]
    if differing:
        said = "; ".join(f"{name} was {old.get(name)!r}, is now {new[name]!r}" for name in differing[:3])
        raise RunError(f"run {str(run.path)!r} was made with other settings ({said}): use another --run, or the old settings")


@dataclass
class ShardTables:
    """The score table and the code table of one shard, under temporary names until it is finished."""

    run: RunDirectory
    shard: Shard
    rows: int = 0
    ok: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Kind of problem -> samples"""

    def __post_init__(self) -> None:
        self._scores = TableWriter(self.run.scores(self.shard.name), SCORE_TABLE)
        self._codes = TableWriter(self.run.codes(self.shard.name), CODE_TABLE)

    def write(self, rows: list[dict[str, Any]], codes: list[dict[str, Any]]) -> None:
        """Append rows of both tables, in the order of the shard; raises `RunError` when the disk is full."""
        with self._explained():
            self._scores.write(rows)
            self._codes.write(codes)
        self.rows += len(rows)
        self.ok += len(codes)
        self.reasons.update(row["reason"].split(":")[0] for row in rows if not row["ok"])

    def finish(self, before: Stamp) -> None:
        """Move both tables into place; the score table last, since its existence means finished."""
        about = {
            "version": __version__,
            "shard": self.shard.path,
            "name": self.shard.name,
            "size": before.size,
            "mtime_ns": before.mtime_ns,
            "etag": before.etag,
            "rows": self.rows,
            "ok": self.ok,
            "reasons": dict(self.reasons),
        }
        with self._explained():
            self._codes.finish({"kind": "codes"} | about)
            self._scores.finish({"kind": "scores"} | about)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"run {str(self.run.path)!r} cannot be written: {artifacts.reason(error)}; make room and run the same command again: what is finished is kept"
            ) from error

    def abandon(self) -> None:
        """Drop both tables."""
        self._scores.abandon()
        self._codes.abandon()
