"""Runs with made-up codes: samples in clusters of near-duplicates, and the same questions answered by brute force."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mmfilter.core.files import write_json
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.tables import CODE_TABLE, TableWriter, score_table
from mmfilter.core.scores.registry import SCORES

FEATURES = 600
REFERENCE = 1000
SAMPLES = np.random.default_rng(11).integers(0, REFERENCE, FEATURES)
"""Reference samples in which each feature fires"""


@dataclass(frozen=True)
class Sample:
    key: str
    shard: str
    row: int
    image: dict[int, float]
    text: dict[int, float]
    score: float | None
    image_hash: str = ""
    text_hash: str = ""


def side(rng: np.random.Generator, n: int = 40) -> dict[int, float]:
    """Features with the means of a side, heavy-tailed."""
    ids = rng.choice(FEATURES, n, replace=False)
    return {int(j): float(value) for j, value in zip(ids, np.float16(rng.gamma(0.7, 1, n) + 1e-3), strict=True)}


def near(rng: np.random.Generator, of: dict[int, float], noise: float) -> dict[int, float]:
    """The same features with other means; `noise` 0.3 is a cosine of some 0.95."""
    return {j: float(np.float16(value * np.exp(noise * rng.standard_normal()))) for j, value in of.items()}


def clustered(n: int, *, seed: int = 0, shards: int = 3, share: float = 0.5, ties: bool = True) -> list[Sample]:
    """`n` samples, some `share` of them near to an earlier one on one side or both, some with its hashes."""
    rng = np.random.default_rng(seed)
    samples: list[Sample] = []
    rows = [0] * shards
    for i in range(n):
        image, text, hashes = side(rng), side(rng, int(rng.integers(1, 30))), (f"i{i}", f"t{i}")
        if samples and rng.random() < share:
            old = samples[rng.integers(len(samples))]
            image = near(rng, old.image, rng.choice([0.1, 0.25, 0.35])) if rng.random() < 0.8 else image
            text = near(rng, old.text, rng.choice([0.05, 0.2, 0.3])) if rng.random() < 0.8 else text
            hashes = tuple(
                theirs if rng.random() < 0.15 else mine
                for mine, theirs in zip(hashes, (old.image_hash, old.text_hash), strict=True)
            )
        score = None if rng.random() < 0.03 else float(np.float32(round(rng.random(), 1 if ties else 7)))
        shard = int(rng.integers(shards))
        samples.append(
            Sample(f"{rng.integers(n // 2):05d}", f"/data/s{shard}.tar", rows[shard], image, text, score, *hashes)
        )
        rows[shard] += 1
    return samples


def write_run(path: Path, samples: list[Sample], *, shards: list[str] | None = None, group: int = 50) -> Path:
    """A run with these samples; `shards` is the order of its inputs, `group` the size of row groups."""
    run = RunDirectory(path)
    shards = shards or sorted({sample.shard for sample in samples})
    for shard in shards:
        name = Path(shard).stem
        mine = sorted((sample for sample in samples if sample.shard == shard), key=lambda sample: sample.row)
        scores, codes = TableWriter(run.scores(name), score_table(SCORES)), TableWriter(run.codes(name), CODE_TABLE)
        for start in range(0, len(mine), group):
            some = mine[start : start + group]
            scores.write([_score_row(sample) for sample in some])
            codes.write([_code_row(sample) for sample in some if sample.score is not None])
        about: dict[str, Any] = {"shard": shard, "name": name, "size": 1, "mtime_ns": 1, "rows": len(mine)}
        codes.finish({"kind": "codes"} | about)
        scores.finish({"kind": "scores"} | about)
    save_file({"samples": SAMPLES}, run.weights, {"n_samples": str(REFERENCE)})
    write_json(run.manifest, {"inputs": [{"name": Path(shard).stem, "shard": shard} for shard in shards]})
    return path


def _score_row(sample: Sample) -> dict[str, Any]:
    ok = sample.score is not None
    place = None if sample.shard.endswith("/") else 0  # a folder has no byte ranges
    row = {"key": sample.key, "shard": sample.shard, "row": sample.row, "offset": place, "nbytes": place}
    row |= {"ok": ok, "reason": None if ok else "no caption: none"}
    return row | {
        "image_hash": sample.image_hash,
        "text_hash": sample.text_hash,
        "similarity": sample.score,
        "width": len(sample.text),
    }


def _code_row(sample: Sample) -> dict[str, Any]:
    row: dict[str, Any] = {"key": sample.key, "row": sample.row}
    for name, features in (("image", sample.image), ("text", sample.text)):
        ids = sorted(features, key=lambda j: (-features[j], j))
        row |= {
            f"{name}_ids": ids,
            f"{name}_max": [2 * features[j] for j in ids],
            f"{name}_mean": [features[j] for j in ids],
        }
    return row


# --- brute force -----------------------------------------------------------------------------


def dense(samples: list[Sample], name: str) -> np.ndarray:
    """Unit vectors of a side, float64 (samples, features): idf · mean."""
    idf = np.log((1 + REFERENCE) / (1 + SAMPLES))
    vectors = np.zeros((len(samples), FEATURES))
    for vector, sample in zip(vectors, samples, strict=True):
        for j, value in getattr(sample, name).items():
            vector[j] = float(np.float16(value)) * idf[j]
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def first_of_group(samples: list[Sample], on: str) -> list[int]:
    """For each sample the index of the first, by key, shard and row, of those with its hashes."""

    def hashes(sample: Sample) -> tuple[str, ...]:
        return {
            "image": (sample.image_hash,),
            "text": (sample.text_hash,),
            "both": (sample.image_hash, sample.text_hash),
        }[on]

    first: dict[tuple[str, ...], int] = {}
    for i in sorted(range(len(samples)), key=lambda i: (samples[i].key, samples[i].shard, samples[i].row)):
        if samples[i].score is not None:
            first.setdefault(hashes(samples[i]), i)
    return [i if sample.score is None else first[hashes(sample)] for i, sample in enumerate(samples)]


def similarities(samples: list[Sample], on: str) -> np.ndarray:
    """(samples, samples): 1 for the same hashes, else the cosine of the groups' first samples, float32."""
    cosines = [dense(samples, name) @ dense(samples, name).T for name in ("image", "text")]
    smallest = {"image": cosines[0], "text": cosines[1], "both": np.minimum(*cosines)}[on].astype(np.float32)
    first = np.array(first_of_group(samples, on))
    smallest = smallest[first][:, first]
    smallest[first[:, None] == first[None]] = 1
    return smallest


def greedy(
    samples: list[Sample], on: str, threshold: float, among=lambda sample: True
) -> dict[tuple[str, int], tuple[str, int, float] | None]:
    """The rule, straight: (shard, row) -> None for a kept sample, or the kept one that it is dropped for and their
    similarity.

    That is the closest, then the best; samples with the same hashes are dropped for the same one.
    """
    cosine, first = similarities(samples, on), first_of_group(samples, on)
    dropped_for: dict[int, int] = {}
    rank = [i for i, sample in enumerate(samples) if sample.score is not None and among(sample)]
    rank.sort(key=lambda i: (-samples[i].score, samples[i].key, samples[i].shard, samples[i].row))
    kept: list[int] = []
    result: dict[tuple[str, int], tuple[str, int, float] | None] = {}
    for i in rank:
        close = [j for j in kept if cosine[i, j] >= np.float32(threshold)]
        best = dropped_for.get(first[i], max(close, key=lambda j: (cosine[i, j], -kept.index(j)), default=None))
        result[samples[i].shard, samples[i].row] = (
            None if best is None else (samples[best].shard, samples[best].row, float(cosine[i, best]))
        )
        if best is None:
            kept.append(i)
        elif first[best] != first[i]:
            dropped_for[first[i]] = best
    return result
