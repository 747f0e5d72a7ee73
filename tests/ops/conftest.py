"""A run to select from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import make_run, make_shard


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two shards with five samples each, one without a score."""
    for name in ("b", "a"):
        make_shard(tmp_path / f"data/{name}.tar", [f"{name}{i}" for i in range(5)])
    scores = {
        str(tmp_path / "data/b.tar"): [0.1, 0.9, 0.5, None, 0.7],
        str(tmp_path / "data/a.tar"): [0.8, 0.2, 0.5, 0.5, 0.3],
    }
    return make_run(tmp_path / "run", scores)
