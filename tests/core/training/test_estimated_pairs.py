"""How many pairs a training takes its shards to hold: near the true number, whatever they are."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from mmfilter.core.input.shards import open_source
from mmfilter.core.training.shard_states import estimated_pairs
from tests import inputs


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, str]:
    base, pairs = tmp_path_factory.mktemp("estimate"), inputs.pairs(250)
    for key, image, _ in pairs:
        (base / f"{key}.jpg").write_bytes(image)
    rows = inputs.as_parquet(base / "rows/0.parquet", pairs)
    pq.write_table(pq.read_table(rows), rows, compression="none")  # these small images are mostly the same headers
    return {
        "tar": str(inputs.as_tar(base / "data/0.tar", pairs)),
        "folder": f"{inputs.as_folder(base / 'folder', pairs)}/",
        "parquet": str(rows),
        "jsonl": str(inputs.as_llava(base / "data.jsonl", pairs)),
    }


@pytest.mark.parametrize("kind", ["tar", "folder", "parquet"])
def test_the_estimate_is_near(shards, kind):
    assert estimated_pairs([open_source(shards[kind])] * 2) == pytest.approx(500, rel=0.15)


def test_of_several_kinds_each_has_its_own_size_of_a_pair(shards):
    assert estimated_pairs([open_source(shards[kind]) for kind in ("parquet", "tar", "folder")]) == pytest.approx(
        750, rel=0.15
    )


def test_images_beside_a_json_do_not_count(shards):
    """The shard's size is that of the JSON."""
    jsonl = shards["jsonl"]
    assert estimated_pairs([open_source(jsonl)]) == pytest.approx(250, rel=0.15)


def test_a_stream_has_no_size():
    assert estimated_pairs([open_source("-")]) is None
