"""What tests of duplicates share: running `dedup`, reading what it decided, samples that crowd together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmfilter.core.codes import index as index_module
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.ops.dedup import dedup
from mmfilter.ops.dedup_settings import DedupSettings
from mmfilter.ops.select import select
from tests.codes import Sample, near, side
from tests.conftest import Quiet


def run_dedup(run: Path, quiet: Quiet, threshold: float = 0.9, on: str = "both", **settings):
    return dedup(run, DedupSettings(threshold, on, **settings), quiet)


def decided(path: Path) -> dict:
    """What `greedy` gives, out of a table of decisions."""
    result = {}
    for row in pq.read_table(path).to_pylist():
        if row["kept"]:
            result[row["shard"], row["row"]] = None
        elif "duplicate" in row["reason"]:
            result[row["shard"], row["row"]] = (row["duplicate_shard"], row["duplicate_row"], row["similarity"])
    return result


def check_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for where, one in wanted.items():
        other = found[where]
        assert (one is None) == (other is None), where
        if one is not None:
            assert other[:2] == one[:2] and other[2] == pytest.approx(one[2], abs=1e-6)


def small_clusters(monkeypatch) -> None:
    """Clusters from 100 samples on, so that a test of a few thousand goes through them."""
    monkeypatch.setattr(index_module, "FLAT", 100)


def crowd(n: int) -> list[Sample]:
    """Two crowds of n near one another, some between them and some apart."""
    rng = np.random.default_rng(9)
    centres = [(side(rng), side(rng)) for _ in range(2)]
    samples = []
    for i in range(2 * n + 40):
        image, text = centres[i % 2] if i < 2 * n else (side(rng), side(rng))
        image, text = near(rng, image, rng.choice([0.02, 0.15, 0.25])), near(rng, text, 0.05)
        samples.append(
            Sample(
                f"{i:05d}",
                f"/data/s{i % 3}.tar",
                i // 3,
                image,
                text,
                float(np.float32(rng.random())),
                f"i{i}",
                f"t{i}",
            )
        )
    return samples


def keys_of(run: Path, tmp_path: Path, **settings) -> list[str]:
    target = tmp_path / "keys.txt"
    target.unlink(missing_ok=True)
    select(run, SelectSettings(format="keys", output=target, **settings))
    return target.read_text().split()
