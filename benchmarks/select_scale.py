"""Can `select` choose among a hundred million rows on one machine?

    python benchmarks/select_scale.py --rows 100000000 --folder /big/disk

Makes a run of random scores, uids, hashes and codes in tables of 100,000 rows, and gives it to
`mmfilter select` as a user would, each question in a process of its own: seconds, CPU seconds and peak
resident memory. The codes are a few features a side, so that they fit a disk; what grows with the rows
is all there. `--match` has a small run of the same making as its target.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from machine import machine
from safetensors.numpy import save_file

from mmfilter.core.files import write_json
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.tables import CODE_TABLE, METADATA_KEY, score_table
from mmfilter.core.scores.registry import SCORES

IN_A_TABLE = 100_000
IN_A_ROW_GROUP = 10_000
N_FEATURES = 2_048
WAYS: dict[str, list[str]] = {
    "top": ["--dry-run"],
    "where": ["--where", "width >= 500 AND key LIKE '%7'", "--dry-run"],
    "formula": ["--by", "0.7 * similarity + 0.3 * rank(saev)", "--dry-run"],
    "per": ["--per", "width // 10", "--dry-run"],
    "repeat": ["--repeat", "CASE WHEN similarity > 0.9 THEN 2 ELSE 1 END", "--dry-run"],
    "keys": ["--format", "keys", "-o", "keys.txt"],
    "datacomp": ["--format", "datacomp", "-o", "subset"],
    "match": ["--match", "target", "--dry-run"],
    "diverse": ["--diverse", "--dry-run"],
}
"""Name -> options beside `--top 20%`; `datacomp` into a folder writes selection.parquet too"""


def make_run(path: Path, rows: int, seed: int, features_a_side: int, *, favourite: int = 0) -> None:
    """A run of `rows` samples; features come by Zipf's law, counted from number `favourite` on."""
    run, rng = RunDirectory(path), np.random.default_rng(seed)
    names = [f"{i:05d}" for i in range(-(-rows // IN_A_TABLE))]
    for where in (run.scores("x"), run.codes("x")):
        where.parent.mkdir(parents=True)
    frequencies = np.roll(1 / np.arange(1, N_FEATURES + 1) ** 0.8, favourite)
    drawn = rng.choice(N_FEATURES, 1 << 20, p=frequencies / frequencies.sum()).astype(np.uint32)
    for i, name in enumerate(names):
        n = min(IN_A_TABLE, rows - i * IN_A_TABLE)
        about = {"shard": f"/data/{name}.tar", "name": name, "size": 1, "mtime_ns": 1, "rows": n}
        keys = pa.array([f"{name}{j:05d}" for j in range(n)])
        _write(run.scores(name), _scores(rng, about["shard"], keys), about)
        _write(run.codes(name), _codes(rng, keys, drawn, features_a_side), about)
    samples = np.minimum(1000, (1000 * features_a_side * frequencies / frequencies.sum()) + 1).astype(np.int64)
    save_file({"samples": samples}, run.weights, {"n_samples": "1000"})
    write_json(run.manifest, {"inputs": [{"name": name, "shard": f"/data/{name}.tar"} for name in names]})


def _scores(rng: np.random.Generator, shard: str, keys: pa.Array) -> pa.Table:
    n = len(keys)
    bad = rng.random(n) < 0.02
    columns = {
        "key": keys,
        "shard": pa.array([shard] * n),
        "row": pa.array(np.arange(n), pa.int32()),
        "offset": pa.array(np.arange(n) * 40_960),
        "nbytes": pa.array(np.full(n, 40_960)),
        "ok": pa.array(~bad),
        "reason": pa.array(np.where(bad, "image cannot be decoded", None), pa.string()),
    }
    return pa.table(
        [columns.get(field.name, _random(rng, field, n, bad)) for field in score_table(SCORES)],
        schema=score_table(SCORES),
    )


def _random(rng: np.random.Generator, field: pa.Field, n: int, bad: np.ndarray) -> pa.Array:
    if pa.types.is_floating(field.type):
        return pa.array(rng.random(n, np.float32), mask=bad)
    if pa.types.is_string(field.type):  # 32 hexadecimal digits
        return pa.StringArray.from_buffers(
            n, pa.py_buffer(np.arange(n + 1, dtype=np.int32) * 32), pa.py_buffer(rng.bytes(16 * n).hex().encode())
        )
    return pa.array(rng.integers(1, 1000, n), field.type)


def _codes(rng: np.random.Generator, keys: pa.Array, drawn: np.ndarray, k: int) -> pa.Table:
    n = len(keys)
    starts = pa.array(np.arange(n + 1, dtype=np.int32) * k)
    columns = {"key": keys, "row": pa.array(np.arange(n), pa.int32())}
    for side in ("image", "text"):
        ids = np.sort(drawn[rng.integers(0, len(drawn), (n, k))], axis=1)
        ids += np.cumsum(np.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (1, 0))), axis=1).astype(np.uint32) * 7
        means = rng.gamma(2, 0.1, (n, k)).astype(np.float16)
        arrays = {"ids": ids % N_FEATURES, "max": means * np.float16(3), "mean": means}
        columns |= {
            f"{side}_{part}": pa.ListArray.from_arrays(starts, pa.array(values.ravel()))
            for part, values in arrays.items()
        }
    return pa.table(columns, schema=CODE_TABLE)


def _write(path: Path, table: pa.Table, about: dict) -> None:
    with pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=["shard", "reason"]) as writer:
        writer.write_table(table, row_group_size=IN_A_ROW_GROUP)
        writer.add_key_value_metadata({METADATA_KEY: json.dumps(about)})


def measure(folder: Path, way: str, top: str) -> dict:
    """One `mmfilter select` in a process of its own."""
    command = [sys.executable, "-m", "mmfilter", "select", "run", "--top", top, *WAYS[way]]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    for left in ("keys.txt", "subset"):
        shutil.rmtree(folder / left) if (folder / left).is_dir() else (folder / left).unlink(missing_ok=True)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{said}")
    return {
        "way": way,
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_gib": used.ru_maxrss / 2**20,
        "said": said,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", choices=[*WAYS, []], default=[], help="what to ask (default: all)")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--top", default="20%")
    parser.add_argument("--features", type=int, default=6, help="features a side in the codes")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to make the run, about 200 bytes a row (default: the system's folder for temporary files)",
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the run in --folder, and use it again when it is there"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="select-scale-") as temporary:
        folder = args.folder.resolve() if args.keep else Path(temporary)
        if not (folder / "run").exists():
            make_run(folder / "run", args.rows, 0, args.features)
            make_run(folder / "target", 20_000, 1, args.features, favourite=200)
        figures = []
        for way in args.ways or WAYS:
            figures.append(measure(folder, way, args.top))
            print(
                f"{way}: {figures[-1]['seconds']:.0f} s, {figures[-1]['peak_gib']:.2f} GiB", file=sys.stderr, flush=True
            )
    if args.json:
        print(json.dumps(figures, indent=2))
        return
    print(f"| `--top {args.top}` of {args.rows:,} rows with | s | CPU s | peak GiB |\n|---|---|---|---|")
    for one in figures:
        way = " ".join(WAYS[one["way"]])
        print(f"| `{way}` | {one['seconds']:.0f} | {one['cpu_seconds']:.0f} | {one['peak_gib']:.2f} |")
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
