"""One shard, scored alone: finished tables or a reason, and nothing between the two."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.shards import open_sources
from mmfilter.core.pipeline.engine import card_weights
from mmfilter.core.pipeline.model_pass import ModelPass
from mmfilter.core.pipeline.scorer import Scorer
from mmfilter.core.pipeline.shard_pass import read_ahead, shard_pass
from mmfilter.core.run import shard_tables
from mmfilter.core.run.directory import RunDirectory, name_shards
from mmfilter.core.run.shard_tables import ShardTables
from mmfilter.core.run.tables import read_table_metadata
from mmfilter.core.scores.registry import SCORES
from mmfilter.errors import RunError

BROKEN = [("broken.jpg", b"not an image"), ("broken.txt", b"a caption")]


@pytest.fixture
def score_shards(tiny, quiet, tmp_path):
    """Scores the shards one after another; (run, result of each)."""
    card, backbone, sae = tiny
    run = RunDirectory(tmp_path / "run")
    for folder in (run.path / "scores", run.path / "codes"):
        folder.mkdir(parents=True)

    def score(*paths):
        shards = name_shards(open_sources([str(path) for path in paths]), run)
        scorer = Scorer(backbone, sae, card_weights(card, sae), card.threshold)
        by_source = {shard.source: shard for shard in shards}
        with ModelPass(backbone, DecodeSettings(), batch_size=4, workers=1) as model_pass:
            results = [
                shard_pass(
                    reading,
                    model_pass,
                    scorer,
                    ShardTables(run, by_source[reading.source], tuple(SCORES)),
                    seed=0,
                    progress=quiet,
                )
                for reading in read_ahead(by_source, lambda source: source.samples(), model_pass)
            ]
        return run, results

    return score


def files(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.path.rglob("*") if path.is_file())


def test_a_shard_becomes_two_tables(make_shard, score_shards):
    shard = make_shard(n=9, extra=BROKEN)
    run, [result] = score_shards(shard)
    assert (result.rows, result.ok, result.error) == (10, 9, None)
    assert sum(result.reasons.values()) == 1
    table = pq.read_table(run.scores("00000"))
    assert table["key"].to_pylist() == [*(f"{i:09d}" for i in range(9)), "broken"]
    assert table["ok"].to_pylist() == [True] * 9 + [False]
    assert table["similarity"].null_count == 1
    assert read_table_metadata(run.scores("00000"))["size"] == shard.stat().st_size


def test_a_truncated_shard_leaves_nothing_and_the_next_is_scored(make_shard, score_shards):
    cut = make_shard("cut.tar", n=9)
    cut.write_bytes(cut.read_bytes()[:-12_000])
    run, [bad, good] = score_shards(cut, make_shard("whole.tar", n=3))
    assert str(cut) in str(bad.error)
    assert bad.rows == 0
    assert (good.rows, good.ok) == (3, 3)
    assert all(name.startswith("whole") for name in files(run)), files(run)


def test_a_full_disk_ends_it_and_leaves_no_table(make_shard, score_shards, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_tables.TableWriter, "write", full)
    with pytest.raises(RunError, match="No space left on device; make room"):
        score_shards(make_shard(n=3))
    assert files(RunDirectory(tmp_path / "run")) == []


def test_scores_do_not_depend_on_the_shards_beside(make_shard, score_shards, tmp_path):
    first, second = make_shard("a.tar", n=5), make_shard("b.tar", n=6, seed=50)
    run, _ = score_shards(first, second)
    together = pq.read_table(run.scores("b"))
    run, _ = score_shards(second)
    assert pq.read_table(run.scores("b")).equals(together)
