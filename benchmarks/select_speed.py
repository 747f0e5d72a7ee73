"""How fast `select` copies, and how fast it chooses.

    python benchmarks/select_speed.py [copy] [choose] [--gib 8] [--rows 10000000] [--json]

copy    `--top 20%` of local shards into a folder, against a bare loop of os.copy_file_range over the
        same byte ranges; both take turns, the ratio is that of the medians. The files are in the page
        cache, so this measures the program and not the disk.
choose  the choice among the rows of 1,000 score tables in a fresh process: alone, and with a key list or
        selection.parquet written; seconds, and peak resident memory with imports.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmfilter.core.files import write_json
from mmfilter.core.input.shards import open_source
from mmfilter.core.run.decisions import Decisions, write_decisions
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.core.run.tables import METADATA_KEY, TableWriter, score_table
from mmfilter.core.scores.registry import SCORES
from mmfilter.core.selection.choice import Decision, Top, choose
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.ops.select import select

SHARD_BYTES = 512 << 20
IMAGE_BYTES = 35_000
"""Mean size of an image; that of img2dataset's at 512 pixels"""
N_TABLES = 1_000


# --- copying ---------------------------------------------------------------------------------


def make_shard(path: Path, nbytes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    noise = rng.bytes(4 * IMAGE_BYTES)
    with open(path, "wb") as file:
        row = 0
        while file.tell() < nbytes:
            key = f"{seed:05d}{row:06d}"
            image = noise[: int(rng.gamma(4, IMAGE_BYTES / 4)) % len(noise)]
            for ext, content in (
                ("jpg", image),
                ("json", b'{"url": "https://example.org/1.jpg"}'),
                ("txt", b"a caption of some words"),
            ):
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(content)
                file.write(info.tobuf() + content + bytes(-len(content) % 512))
            row += 1
        file.write(bytes(1024))


def make_run(run: Path, shards: list[Path]) -> None:
    rng = np.random.default_rng(0)
    for shard in shards:
        now = open_source(str(shard)).stamp()
        rows = [
            {
                "key": s.key,
                "shard": str(shard),
                "row": s.row,
                "offset": s.offset,
                "nbytes": s.nbytes,
                "ok": True,
                "similarity": rng.random(),
            }
            for s in open_source(str(shard)).samples()
        ]
        writer = TableWriter(RunDirectory(run).scores(shard.stem), score_table(SCORES))
        writer.write(rows)
        writer.finish(
            {"shard": str(shard), "name": shard.stem, "size": now.size, "mtime_ns": now.mtime_ns, "rows": len(rows)}
        )
    write_json(RunDirectory(run).manifest, {"inputs": [{"name": shard.stem, "shard": str(shard)} for shard in shards]})


def kept_ranges(run: Path) -> list[tuple[str, int, int]]:
    """The byte ranges that `--top 20%` copies."""
    tables = ScoreTables(RunDirectory(run))
    members = tables.members(decide(tables) == Decision.KEPT)
    return [(shard.path, offset, nbytes) for shard, offset, nbytes, _ in members.ranges(0, len(members))]


def decide(tables: ScoreTables) -> np.ndarray:
    column = tables.column("similarity")
    return choose(
        column,
        top=Top.parse("20%"),
        minimum=None,
        first_by_key=tables.first_by_key,
    )


def bare_copy(ranges: list[tuple[str, int, int]], target: Path) -> int:
    sources = {shard: os.open(shard, os.O_RDONLY) for shard in {shard for shard, _, _ in ranges}}
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    total = 0
    for shard, offset, nbytes in ranges:
        while nbytes:
            copied = os.copy_file_range(sources[shard], out, nbytes, offset_src=offset)
            offset, nbytes, total = offset + copied, nbytes - copied, total + copied
    for fd in (*sources.values(), out):
        os.close(fd)
    return total


def timed(work: Callable[[], int]) -> tuple[float, int]:
    """Seconds, and the bytes that were written."""
    os.sync()
    started = time.perf_counter()
    nbytes = work()
    return time.perf_counter() - started, nbytes


def measure_copy(folder: Path, gib: float, rounds: int) -> dict:
    shards = []
    for i in range(max(1, round(gib * 2**30 / SHARD_BYTES))):
        shards.append(folder / f"{i:05d}.tar")
        make_shard(shards[-1], min(SHARD_BYTES, int(gib * 2**30)), i)
    make_run(folder / "run", shards)
    ranges = kept_ranges(folder / "run")
    settings = SelectSettings(top="20%", output=folder / "best")
    ours, bare = [], []
    for i in range(rounds + 1):  # the first round warms up
        for which in (ours, bare) if i % 2 else (bare, ours):
            if which is ours:
                seconds, nbytes = timed(lambda: select(folder / "run", settings).nbytes_written)
                shutil.rmtree(folder / "best")
            else:
                seconds, nbytes = timed(lambda: bare_copy(ranges, folder / "bare.tar"))
                (folder / "bare.tar").unlink()
            which.append(nbytes / seconds)
    ours_median, bare_median = statistics.median(ours[1:]), statistics.median(bare[1:])
    return {
        "bytes": nbytes,
        "ranges": len(ranges),
        "rounds": rounds,
        "select_bytes_per_s": ours_median,
        "bare_bytes_per_s": bare_median,
        "ratio": ours_median / bare_median,
        "select_spread": [min(ours[1:]), max(ours[1:])],
        "bare_spread": [min(bare[1:]), max(bare[1:])],
    }


# --- choosing --------------------------------------------------------------------------------


def make_tables(run: Path, rows: int) -> None:
    """Full score tables with random scores, 2 % of them without; written column by column."""
    rng = np.random.default_rng(0)
    n = rows // N_TABLES
    RunDirectory(run).scores("x").parent.mkdir(parents=True)
    for i in range(N_TABLES):
        shard, name = f"/data/{i:05d}.tar", f"{i:05d}"
        bad = rng.random(n) < 0.02
        columns = {
            "key": pa.array([f"{i:05d}{j:04d}" for j in range(n)]),
            "shard": pa.array([shard] * n),
            "row": pa.array(np.arange(n), pa.int32()),
            "offset": pa.array(np.arange(n) * 40_960),
            "nbytes": pa.array(np.full(n, 40_960)),
            "ok": pa.array(~bad),
            "reason": pa.array(np.where(bad, "image cannot be decoded", None), pa.string()),
        }
        table = pa.table(
            [columns.get(field.name, _random(rng, field, n, bad)) for field in score_table(SCORES)],
            schema=score_table(SCORES),
        )
        with pq.ParquetWriter(RunDirectory(run).scores(name), score_table(SCORES), compression="zstd") as writer:
            writer.write_table(table)
            writer.add_key_value_metadata(
                {METADATA_KEY: json.dumps({"shard": shard, "name": name, "size": 1, "mtime_ns": 1, "rows": n})}
            )
    write_json(
        RunDirectory(run).manifest,
        {"inputs": [{"name": f"{i:05d}", "shard": f"/data/{i:05d}.tar"} for i in range(N_TABLES)]},
    )


def _random(rng: np.random.Generator, field: pa.Field, n: int, bad: np.ndarray) -> pa.Array:
    if pa.types.is_floating(field.type):
        return pa.array(rng.random(n, np.float32), mask=bad)
    if pa.types.is_string(field.type):
        return pa.array([digest.hex() for digest in np.frombuffer(rng.bytes(16 * n), "V16").tolist()])
    return pa.array(rng.integers(1, 1000, n), field.type)


def child(run: Path, task: str) -> None:
    """One task in this process; prints its seconds and peak memory."""
    started = time.perf_counter()
    if task == "keys":
        select(run, SelectSettings(top="20%", format="keys", output=run.parent / "keys.txt"))
        (run.parent / "keys.txt").unlink()
    else:
        tables = ScoreTables(RunDirectory(run))
        decision = decide(tables)
        if task == "decisions":
            members = tables.members(decision == Decision.KEPT)
            output = np.full(len(decision), -1, np.int32)
            output[decision == Decision.KEPT] = np.arange(len(members)) // 10_000
            labels = [None, *("dropped" for _ in list(Decision)[1:])]
            outcome = Decisions(tables.column("similarity"), decision, labels, output)
            write_decisions(tables, run.parent / "selection.parquet", outcome, {})
            (run.parent / "selection.parquet").unlink()
    seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps({"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1000})
    )


def measure_choice(folder: Path, rows: int, rounds: int) -> dict:
    make_tables(folder / "run", rows)
    figures = {}
    for task in ("choice", "keys", "decisions"):
        runs = []
        for _ in range(rounds):
            command = [sys.executable, __file__, "--child", task, "--run", str(folder / "run")]
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        figures[task] = {
            "seconds": statistics.median(run["seconds"] for run in runs),
            "seconds_spread": [min(run["seconds"] for run in runs), max(run["seconds"] for run in runs)],
            "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
            "peak_mb": max(run["peak_mb"] for run in runs),
        }
    return {"rows": rows, "tables": N_TABLES, "rounds": rounds} | figures


# --- report ----------------------------------------------------------------------------------


def report(results: dict) -> str:
    lines = []
    if copy := results.get("copy"):
        lines += [
            "| copying 20 % into shards | GB | ranges | select GB/s | bare copy_file_range GB/s | ratio |",
            "|---|---|---|---|---|---|",
            f"| median of {copy['rounds']} | {copy['bytes'] / 1e9:.2f} | {copy['ranges']:,} "
            f"| {copy['select_bytes_per_s'] / 1e9:.2f} | {copy['bare_bytes_per_s'] / 1e9:.2f} | {copy['ratio']:.2f} |",
            "",
        ]
    if choice := results.get("choose"):
        lines += [
            f"| choosing 20 % of {choice['rows']:,} rows in {choice['tables']:,} tables "
            "| s | CPU s, with start | peak MB |",
            "|---|---|---|---|",
        ]
        for task, label in (
            ("choice", "choice alone"),
            ("keys", "with a key list"),
            ("decisions", "with byte ranges and selection.parquet"),
        ):
            part = choice[task]
            lines.append(f"| {label} | {part['seconds']:.2f} | {part['cpu_seconds']:.2f} | {part['peak_mb']:,.0f} |")
        lines.append("")
    machine = results["machine"]
    before, after = machine["load"]
    lines.append(
        f"{machine['cpus']} CPUs, {machine['system']}, Python {machine['python']}, "
        f"load {before:.1f} before and {after:.1f} after"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", choices=["copy", "choose", []], default=[], help="what to measure (default: both)"
    )
    parser.add_argument("--gib", type=float, default=8, help="size of the shards to select from")
    parser.add_argument("--rows", type=int, default=10_000_000, help="score rows to choose among")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make the temporary files (default: the system's)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.run, args.child)
        return
    results = {}
    load = [os.getloadavg()[0]]
    for part in args.parts or ["copy", "choose"]:
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="select-speed-") as folder:
            path = Path(folder).resolve()
            results[part] = (
                measure_copy(path, args.gib, args.rounds)
                if part == "copy"
                else measure_choice(path, args.rows, args.rounds)
            )
    load.append(os.getloadavg()[0])
    results["machine"] = {
        "cpus": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "load": load,
    }
    print(json.dumps(results, indent=2) if args.json else report(results))


if __name__ == "__main__":
    main()
