"""Captions and pictures read again from every kind of input, and what is shown of those that cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmfilter.core.files import write_json
from mmfilter.core.input.shards import expand, open_source
from mmfilter.core.input.source import InputOptions
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.previews import Preview, one_line, previews, problems
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.core.run.tables import TableWriter, score_table
from mmfilter.core.scores.registry import SCORES
from tests.conftest import picture, write_tar
from tests.inputs import as_folder, as_llava, as_parquet, as_tar, pairs

N = 9


def scored(run: Path, *inputs: Path, images: Path | None = None) -> ScoreTables:
    """The score tables of a run of these inputs."""
    shards, options = expand([*map(str, inputs)]), InputOptions(images=None if images is None else str(images))
    for i, shard in enumerate(shards):
        rows = [
            {"key": s.key, "shard": shard, "row": s.row, "offset": s.offset, "nbytes": s.nbytes, "ok": True}
            for s in open_source(shard, options).samples()
        ]
        now, writer = open_source(shard).stamp(), TableWriter(RunDirectory(run).scores(f"{i}"), score_table(SCORES))
        writer.write(rows)
        writer.finish({"shard": shard, "name": f"{i}", "size": now.size, "mtime_ns": now.mtime_ns, "rows": len(rows)})
    about = {
        "inputs": [{"name": f"{i}", "shard": shard} for i, shard in enumerate(shards)],
        "settings": {"images": options.images},
    }
    write_json(RunDirectory(run).manifest, about)
    return ScoreTables(RunDirectory(run))


@pytest.mark.parametrize(
    ("make", "name"), [(as_tar, "a.tar"), (as_folder, "a"), (as_parquet, "a.parquet"), (as_llava, "a.json")]
)
def test_any_input_shows_its_captions_and_image_files(make, name, tmp_path):
    wanted = pairs(N)
    tables = scored(tmp_path / "run", make(tmp_path / "in" / name, wanted), images=tmp_path / "in" / "images")
    at = [7, 0, 7, 3]
    assert previews(tables, at) == [Preview(wanted[i][2], wanted[i][1]) for i in at]
    assert previews(tables, np.array([], np.int64)) == []


def test_one_that_cannot_be_read_leaves_the_others(tmp_path):
    wanted = pairs(3 * N)
    shards = [as_tar(tmp_path / f"{i}.tar", wanted[i * N : (i + 1) * N]) for i in range(3)]
    tables = scored(tmp_path / "run", *shards)
    shards[0].unlink()
    as_tar(shards[1], pairs(N, seed=50)[::-1])
    found = previews(tables, [0, N + 1, 2 * N, 1])
    assert found[2] == Preview(wanted[2 * N][2], wanted[2 * N][1])
    assert [preview.image is None for preview in found] == [True, True, False, True]
    assert (
        str(shards[0]) in found[0].problem
        and found[1].problem == f"shard {str(shards[1])!r} does not hold sample '{N + 1:09d}' where it was scored"
    )
    assert problems(found) == [found[0].problem, found[1].problem]


def test_text_from_anywhere_is_safe_on_a_terminal():
    assert one_line("a\x1b[31m red\n\tcar\u202e \u200b", 40) == "a[31m red car"
    assert one_line("a b c d e f", 6) == "a b c…" and one_line("äpple 🍎", 20) == "äpple 🍎"


def test_a_sample_with_several_images_shows_the_first(tmp_path):
    first, second = picture(1), picture(2, kind="PNG")
    shard = write_tar(tmp_path / "a.tar", [("k.jpg", first), ("k.png", second), ("k.txt", b"two pictures")])
    assert previews(scored(tmp_path / "run", shard), [0]) == [Preview("two pictures", first)]
