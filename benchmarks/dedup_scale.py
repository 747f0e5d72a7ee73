"""How `dedup` grows with the number of samples, and what it finds of what brute force finds.

    python benchmarks/dedup_scale.py --sizes 10000 30000 --recall 10000 --plot benchmarks/dedup_scale.png

Codes are made up with the statistics of real ones, those of the example shards: half of a sample's
features and more are those of some real sample with other strengths, the rest come as often and as
strong as they do in the examples. One sample in ten is a near-duplicate of an earlier one, at cosines of 0.85 and
more. The cosines of made-up pairs are printed beside the real ones.

Each size runs in a process of its own. Recall is the share of all pairs at or above the threshold, by
the exact cosine of every pair in float32, that `dedup` stores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from machine import machine

from mmfilter.core.codes.code_tables import CodeTables
from mmfilter.core.codes.vectors import Codes, SideCodes
from mmfilter.core.files import write_json
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.core.run.tables import CODE_TABLE, score_table
from mmfilter.core.scores.registry import SCORES
from mmfilter.core.sides import SIDES

SHARDS = Path(__file__).parents[1] / "examples" / "shards"
IN_A_SHARD = 10_000
ROW_GROUP = 1_000
STORED = 256
DUPLICATES = 0.1
POOL_OF_A_SHARD = 100
THRESHOLD = 0.95


# --- codes -----------------------------------------------------------------------------------


@dataclass
class Side:
    """What is known of a side, from real codes."""

    codes: SideCodes
    """Those of the real samples"""
    often: np.ndarray
    """(features,) float32, share of the samples that have a feature"""
    centre: np.ndarray
    """(features,) mean of the logarithm of its means"""
    spread: np.ndarray
    """(features,) their standard deviation"""

    @classmethod
    def of(cls, codes: SideCodes, n_features: int) -> Side:
        logs = np.log(codes.means.astype(np.float64))
        counts, sums, squares = (
            np.bincount(codes.ids, weights, minlength=n_features) for weights in (None, logs, logs**2)
        )
        centre = sums / np.maximum(counts, 1)
        spread = np.sqrt(np.maximum(squares / np.maximum(counts, 1) - centre**2, 0))
        return cls(codes, (counts / len(codes)).astype(np.float32), centre, spread)

    def draw(self, rng: np.random.Generator, like: np.ndarray) -> np.ndarray:
        """(samples, features): half to all of the features of each real sample in `like`, the rest by how often they
        come."""
        values = np.zeros((len(like), len(self.often)), np.float32)
        share = rng.uniform(0.5, 1, len(like)).astype(np.float32)
        row, feature = np.nonzero(rng.random(values.shape, np.float32) < self.often * (1 - share[:, None]))
        values[row, feature] = np.exp(self.centre[feature] + self.spread[feature] * rng.standard_normal(len(row)))
        real = self.codes.take(like)
        kept = rng.random(len(real.ids), np.float32) < share[real.rows]
        values[real.rows[kept], real.ids[kept]] = real.means[kept] * np.exp(
            0.3 * rng.standard_normal(kept.sum(), np.float32)
        )
        return values


def strongest(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lengths, ids, means) of the stored features of each row, strongest first."""
    k = min(STORED, values.shape[1])
    ids = np.argpartition(-values, k - 1, axis=1)[:, :k]
    largest = np.take_along_axis(values, ids, 1)
    order = np.argsort(-largest, axis=1, kind="stable")
    ids, largest = np.take_along_axis(ids, order, 1), np.take_along_axis(largest, order, 1).astype(np.float16)
    return (largest > 0).sum(1), ids[largest > 0].astype(np.uint32), largest[largest > 0]


def sides_of(codes: Codes) -> dict[str, SideCodes]:
    """Both sides by name."""
    return {"image": codes.image, "text": codes.text}


class Maker:
    """Writes runs of made-up codes."""

    def __init__(self, real: Path) -> None:
        tables = CodeTables(ScoreTables(RunDirectory(real)))
        codes = Codes.concatenate([part for part, _ in tables.read()])
        self.weights, self.idf = RunDirectory(real).weights, tables.idf
        self.sides = {side: Side.of(part, len(tables.idf)) for side, part in sides_of(codes).items()}

    def write(self, path: Path, n: int, seed: int = 0) -> None:
        """A run of `n` samples in shards of 10,000."""
        run, rng = RunDirectory(path), np.random.default_rng(seed)
        names = []
        pool: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
        for start in range(0, n, IN_A_SHARD):
            names.append(f"{start // IN_A_SHARD:05d}")
            self._shard(run, names[-1], start, min(IN_A_SHARD, n - start), rng, pool)
        run.weights.write_bytes(self.weights.read_bytes())
        write_json(run.manifest, {"inputs": [{"name": name, "shard": f"/data/{name}.tar"} for name in names]})

    def _shard(
        self,
        run: RunDirectory,
        name: str,
        start: int,
        n: int,
        rng: np.random.Generator,
        pool: dict[str, list[np.ndarray]],
    ) -> None:
        about = {
            b"mmfilter": json.dumps({"shard": f"/data/{name}.tar", "name": name, "size": 1, "mtime_ns": 1, "rows": n})
        }
        keys = [f"{i:09d}" for i in range(start, start + n)]
        for path in (run.scores(name), run.codes(name)):
            path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(run.codes(name), CODE_TABLE, compression="zstd") as writer:
            for first in range(0, n, ROW_GROUP):
                m = min(ROW_GROUP, n - first)
                columns = {
                    "key": pa.array(keys[first : first + m]),
                    "row": pa.array(np.arange(first, first + m), pa.int32()),
                }
                writer.write_table(pa.table(columns | self._codes(m, rng, pool), schema=CODE_TABLE))
            writer.add_key_value_metadata(about)
        scores = {
            "key": keys,
            "shard": [f"/data/{name}.tar"] * n,
            "row": np.arange(n),
            "ok": np.ones(n, bool),
            "similarity": rng.random(n, np.float32),
        }
        scores |= {f"{side}_hash": [f"{side[0]}{key}" for key in keys] for side in SIDES}
        columns = [
            pa.array(scores[field.name], field.type) if field.name in scores else pa.nulls(n, field.type)
            for field in score_table(SCORES)
        ]
        with pq.ParquetWriter(run.scores(name), score_table(SCORES), compression="zstd") as writer:
            writer.write_table(pa.table(columns, schema=score_table(SCORES)))
            writer.add_key_value_metadata(about)

    def _codes(self, m: int, rng: np.random.Generator, pool: dict[str, list[np.ndarray]]) -> dict[str, pa.Array]:
        copies = rng.random(m) < (DUPLICATES if pool["image"] else 0)
        like = rng.integers(0, len(self.sides["image"].codes), m)
        original = rng.integers(0, max(1, len(pool["image"])), m)
        strength = rng.uniform(0.02, 0.5, m).astype(np.float32)
        columns: dict[str, pa.Array] = {}
        for side in SIDES:
            values = self.sides[side].draw(rng, like)
            for i in np.flatnonzero(copies).tolist():
                ids, means = pool[side][original[i]]
                values[i] = 0
                values[i, ids] = means * np.exp(strength[i] * rng.standard_normal(len(ids), np.float32))
            lengths, ids, means = strongest(values)
            starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            bases = np.flatnonzero(~copies)[: POOL_OF_A_SHARD * m // IN_A_SHARD]
            pool[side] += [
                (ids[starts[i] : starts[i + 1]], means[starts[i] : starts[i + 1]].astype(np.float32)) for i in bases
            ]
            parts = {"ids": ids, "max": np.minimum(means * np.float16(3), np.float16(60_000)), "mean": means}
            columns |= {
                f"{side}_{part}": pa.ListArray.from_arrays(pa.array(starts), pa.array(array))
                for part, array in parts.items()
            }
        return columns


# --- truth -----------------------------------------------------------------------------------


def unit(side: SideCodes, idf: np.ndarray) -> np.ndarray:
    """(samples, features) float32, each of length 1."""
    vectors = np.zeros((len(side), len(idf)), np.float32)
    vectors[side.rows, side.ids] = side.weights(idf)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def all_pairs(run: Path) -> dict[tuple[int, int], float]:
    """Every pair at or above the threshold on both sides: positions -> the smaller cosine."""
    tables = CodeTables(ScoreTables(RunDirectory(run)))
    codes = Codes.concatenate([part for part, _ in tables.read()])
    close = {}
    block = 5_000
    starts = range(0, len(codes), block)
    blocks = [codes.take(np.arange(start, min(start + block, len(codes)))) for start in starts]
    for i, one in enumerate(blocks):
        mine = [unit(side, tables.idf) for side in sides_of(one).values()]
        for j in range(i, len(blocks)):
            smaller = np.minimum(
                *(a @ unit(side, tables.idf).T for a, side in zip(mine, sides_of(blocks[j]).values(), strict=True))
            )
            for a, b in np.argwhere(smaller >= THRESHOLD).tolist():
                if i < j or a < b:
                    close[i * block + a, j * block + b] = float(smaller[a, b])
    return close


def recall(run: Path) -> tuple[int, float]:
    """How many pairs there are, and the share of them that the run's table has."""
    truth = all_pairs(run)
    rows = pq.read_table(run / "duplicates.parquet", columns=["key", "other_key"]).to_pylist()
    stored = {tuple(sorted((int(row["key"]), int(row["other_key"])))) for row in rows if row["other_key"] is not None}
    return len(truth), sum(pair in stored for pair in truth) / max(1, len(truth))


def quantiles(run: Path, n: int = 1000) -> str:
    """Cosines of the pairs among the first samples of a run, per side."""
    tables = CodeTables(ScoreTables(RunDirectory(run)))
    codes = next(iter(tables.read()))[0]
    codes = codes.take(np.arange(min(n, len(codes))))
    lines = []
    for name, side in sides_of(codes).items():
        vectors = unit(side, tables.idf)
        values = (vectors @ vectors.T)[np.triu_indices(len(codes), 1)]
        lines.append(
            f"{name} " + " ".join(f"{value:.2f}" for value in np.quantile(values, (0.1, 0.5, 0.9, 0.99, 0.999)))
        )
    return ", ".join(lines)


# --- measuring -------------------------------------------------------------------------------


def measure(run: Path) -> dict:
    """`mmfilter dedup` in a fresh process: its report, seconds and peak memory."""
    command = [sys.executable, "-m", "mmfilter", "dedup", str(run), "--threshold", str(THRESHOLD), "--json"]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        report = json.load(process.stdout)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"dedup failed on {run}")
    return report | {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
    }


def row(n: int, result: dict) -> str:
    index = result["index"]
    looked = f"{index['clusters_searched']} of {index['clusters']:,}" if index["clusters"] else "all pairs"
    recalled = f"{result['recall']:.4f} of {result['truth']:,}" if "recall" in result else ""
    return (
        f"| {n:,} | {result['seconds']:.1f} | {result['cpu_seconds']:.1f} | {result['peak_mib']:,.0f} "
        f"| {result['near_duplicates']:,} | {result['pairs']:,} | {looked} | {recalled} |"
    )


def plot(results: dict[int, dict], slope: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    sizes = list(results)
    left.plot(sizes, [result["seconds"] for result in results.values()], "o-")
    left.set(
        xscale="log", yscale="log", xlabel="samples", ylabel="seconds", title=f"Time of mmfilter dedup, n^{slope:.2f}"
    )
    right.plot(sizes, [result["peak_mib"] for result in results.values()], "o-")
    right.set(xscale="log", ylim=(0, None), xlabel="samples", ylabel="peak MiB", title="Peak memory")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000])
    parser.add_argument(
        "--recall", type=int, nargs="*", default=[10_000], help="sizes at which all pairs are computed as well"
    )
    parser.add_argument(
        "--folder", type=Path, help="where to make the temporary runs (default: the system's; 1 million take some 3 GB)"
    )
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    print(machine())
    results: dict[int, dict] = {}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="dedup-scale-") as name:
        folder = Path(name)
        command = [
            sys.executable,
            "-m",
            "mmfilter",
            "score",
            f"{SHARDS}/*.tar",
            "--run",
            str(folder / "real"),
            "--json",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        maker = Maker(folder / "real")
        for n in options.sizes:
            run = folder / f"run-{n}"
            maker.write(run, n)
            if not results:
                print(
                    "\ncosines of pairs at the quantiles 0.1, 0.5, 0.9, 0.99, 0.999\n"
                    f"    real    {quantiles(folder / 'real')}\n    made up {quantiles(run)}"
                )
                print(
                    "\n| samples | s | CPU s | peak MiB | near-duplicates | pairs | searched | recall |\n"
                    + "|---" * 8
                    + "|"
                )
            results[n] = measure(run)
            if n in options.recall:
                results[n]["truth"], results[n]["recall"] = recall(run)
            print(row(n, results[n]), flush=True)
            subprocess.run(["rm", "-r", str(run)], check=True)
    if len(results) > 1:
        slope = float(
            np.polyfit(np.log(list(results)), np.log([result["seconds"] for result in results.values()]), 1)[0]
        )
        print(f"\ntime grows as n^{slope:.2f}")
        if options.plot:
            plot(results, slope, options.plot)


if __name__ == "__main__":
    main()
