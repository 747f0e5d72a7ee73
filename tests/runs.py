"""Runs made by hand over small shards, and the questions that tests ask of a selection from one."""

from __future__ import annotations

import io
import os
import random
import tarfile
from pathlib import Path

import pytest

from mmfilter.core.files import write_json
from mmfilter.core.input.shards import open_source
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.tables import TableWriter, score_table
from mmfilter.core.scores.registry import SCORES
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.errors import RunError, SelectionError
from mmfilter.ops.select import Selection, select


def make_shard(path: Path, keys: list[str], *, format: int = tarfile.GNU_FORMAT, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    randomness = random.Random(f"{path.name} {seed}")
    with tarfile.open(path, "w", format=format) as tar:
        for key in keys:
            for ext, content in [
                ("jpg", randomness.randbytes(randomness.randrange(2000))),
                ("txt", f"caption of {key}".encode()),
            ]:
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size, info.mtime, info.uname, info.mode = len(content), 1_700_000_000, "bigdata", 0o444
                tar.addfile(info, io.BytesIO(content))


def add_table(run: Path, name: str, shard: str, table: list[dict], **metadata) -> None:
    writer = TableWriter(RunDirectory(run).scores(name), score_table(SCORES))
    for start in range(0, len(table), 7):  # several row groups
        writer.write(table[start : start + 7])
    now = open_source(shard).stamp() if os.path.exists(shard) else None
    stamped = {"size": now.size, "mtime_ns": now.mtime_ns, "etag": now.etag} if now else {}
    writer.finish({"kind": "scores", "shard": shard, "name": name, "rows": len(table)} | stamped | metadata)


def make_run(run: Path, shards: dict[str, list]) -> Path:
    """A run over existing shards: path -> for each sample a score, None, or a dict of columns."""
    inputs = []
    for shard, scores in shards.items():
        name = Path(shard).stem + f"-{len(inputs)}"
        rows = []
        for sample, score in zip(open_source(shard).samples(), scores, strict=True):
            columns = score if isinstance(score, dict) else {"similarity": score}
            ok = columns.get("similarity") is not None
            rows.append(
                {"key": sample.key, "shard": shard, "row": sample.row, "offset": sample.offset, "nbytes": sample.nbytes}
                | {"ok": ok, "reason": None if ok else f"no caption: {sample.key} has none"}
                | columns
            )
        add_table(run, name, shard, rows)
        inputs.append({"name": name, "shard": shard})
    write_json(RunDirectory(run).manifest, {"inputs": inputs})
    return run


def keys_of(run: Path, tmp_path: Path, **settings) -> list[str]:
    target = tmp_path / "keys.txt"
    target.unlink(missing_ok=True)
    select(run, SelectSettings(format="keys", output=target, **settings))
    return target.read_text().split()


def samples_of(folder: Path) -> list[tuple[str, list[tuple[str, bytes]]]]:
    """Output shard and its members, in order."""
    shards = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            shards.append((shard.name, [(member.name, tar.extractfile(member).read()) for member in tar]))
    return shards


def error_of(run: Path, **settings) -> str:
    with pytest.raises((SelectionError, RunError)) as caught:
        select(run, SelectSettings(**settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


def collect(run: Path, settings: SelectSettings) -> tuple[bytes, Selection]:
    receive, send = os.pipe()
    with os.fdopen(receive, "rb") as reader, os.fdopen(send, "wb") as writer:
        selection = select(run, settings, stdout=writer)
        writer.close()
        return reader.read(), selection


def kept_keys(run: Path, **settings) -> list[str]:
    """What `--format keys` prints."""
    return collect(run, SelectSettings(format="keys", **settings))[0].decode().split()


def refused(run: Path, **settings) -> str:
    """Like `error_of`; keys are asked for unless a format is given."""
    return error_of(run, **{"format": "keys", **settings})


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of all that is in a folder."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}
