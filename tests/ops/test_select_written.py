"""What a selection writes: the bytes, the folder that explains itself, streams."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from mmfilter.core.input.ranges import OpenShards
from mmfilter.core.input.shards import open_source
from mmfilter.core.input.sources.webdataset_tar import WebdatasetTar
from mmfilter.core.output.repack import shard_starts
from mmfilter.core.output.tar_writer import ShardWriter, read_and_write, sendfile
from mmfilter.core.run.decisions import Decisions, write_decisions
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.members import Members
from mmfilter.core.run.tables import read_table_metadata
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.errors import SelectionError, ShardError
from mmfilter.ops.select import select
from tests.runs import add_table, collect, keys_of, make_run, make_shard, samples_of


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("shuffle", [None, 3])
def test_members_are_copied_byte_for_byte(tmp_path, format, shuffle):
    shards = {}
    for i in range(3):
        path = tmp_path / f"data/{i}.tar"
        make_shard(path, [f"{'d' * 70}/{i}/{'k' * 40}{j}" for j in range(20)], format=format)
        shards[str(path)] = [random.Random(100 * i + j).random() for j in range(20)]
    run = make_run(tmp_path / "run", shards)
    selection = select(run, SelectSettings(top="50%", output=tmp_path / "best", shard_size=8, shuffle=shuffle))
    originals = {}
    for shard in shards:
        content = Path(shard).read_bytes()
        originals |= {s.key: content[s.offset : s.offset + s.nbytes] for s in open_source(shard).samples()}
    expected = keys_of(run, tmp_path, top="50%", shuffle=shuffle)
    found = []
    for shard in sorted((tmp_path / "best").glob("*.tar")):
        content = shard.read_bytes()
        keys = [sample.key for sample in open_source(str(shard)).samples()]
        assert content == b"".join(originals[key] for key in keys) + bytes(1024)
        found += keys
    assert found == expected and len(found) == selection.kept == 30
    assert selection.shards_written == 4
    assert selection.nbytes_written == sum(shard.stat().st_size for shard in (tmp_path / "best").glob("*.tar"))
    subprocess.run(["tar", "-tf", tmp_path / "best/00000000.tar"], check=True, capture_output=True)
    with tarfile.open(tmp_path / "best/00000000.tar") as tar:
        assert {(member.mtime, member.uname, member.mode) for member in tar} == {(1_700_000_000, "bigdata", 0o444)}


def test_the_folder_is_complete_and_explains_itself(run, tmp_path):
    selection = select(
        run, SelectSettings(top="4", min=0.4, where="key != 'b4'", output=tmp_path / "best", shard_size=3)
    )
    best = tmp_path / "best"
    assert sorted(path.name for path in best.iterdir()) == [
        "00000000.tar",
        "00000000_stats.json",
        "00000001.tar",
        "00000001_stats.json",
        "manifest.json",
        "selection.parquet",
        "sizes.json",
    ]
    assert json.loads((best / "sizes.json").read_text()) == {"00000000.tar": 3, "00000001.tar": 1}
    assert json.loads((best / "00000001_stats.json").read_text()) == {"count": 1, "successes": 1}
    rows = pq.read_table(best / "selection.parquet").to_pylist()
    assert list(rows[0]) == ["key", "shard", "row", "score", "kept", "reason", "output_shard"]
    assert [(row["key"], row["row"], row["kept"], row["reason"], row["output_shard"]) for row in rows] == [
        ("b0", 0, False, "below --min 0.4", None),
        ("b1", 1, True, None, "00000000.tar"),
        ("b2", 2, False, "at the cut, after others by key", None),
        ("b3", 3, False, "no score: no caption: b3 has none", None),
        ("b4", 4, False, "not in --where", None),
        ("a0", 0, True, None, "00000000.tar"),
        ("a1", 1, False, "below --min 0.4", None),
        ("a2", 2, True, None, "00000000.tar"),
        ("a3", 3, True, None, "00000001.tar"),
        ("a4", 4, False, "below --min 0.4", None),
    ]
    assert [row["score"] for row in rows][:4] == [np.float32(0.1), np.float32(0.9), 0.5, None]
    assert rows[0]["shard"] == str(tmp_path / "data/b.tar")
    about = json.loads((best / "manifest.json").read_text())
    assert about == read_table_metadata(best / "selection.parquet")
    assert about["kind"] == "selection"
    assert about["settings"]["top"] == "4"
    assert about["funnel"] == [
        {"step": "in the run", "samples": 10},
        {"step": "pass --where \"key != 'b4'\"", "samples": 9},
        {"step": "have a score 'similarity'", "samples": 8},
        {"step": "at least --min 0.4", "samples": 5},
        {"step": "kept by --top 4", "samples": 4},
    ]
    assert selection.dropped == {
        "not in --where": 1,
        "below --min 0.4": 3,
        "at the cut, after others by key": 1,
        "no score: no caption": 1,
    }
    assert (selection.cut, selection.fraction_kept) == (0.5, 4 / 9)


def test_the_funnel_says_when_too_few_can_be_kept(run, tmp_path):
    selection = select(run, SelectSettings(top="100%", output=tmp_path / "best"))
    assert selection.funnel == [
        ("in the run", 10),
        ("have a score 'similarity'", 9),
        ("kept by --top 100%, of 10 asked for", 9),
    ]


def test_an_empty_selection_is_an_empty_folder(run, tmp_path):
    selection = select(run, SelectSettings(min=2, output=tmp_path / "best"))
    assert (selection.kept, selection.cut, selection.shards_written) == (0, None, 0)
    assert json.loads((tmp_path / "best/sizes.json").read_text()) == {}
    assert pq.read_table(tmp_path / "best/selection.parquet").num_rows == 10


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset leaves files open
def test_webdataset_reads_the_shards(run, tmp_path):
    select(run, SelectSettings(top="4", output=tmp_path / "best"))
    samples = list(webdataset.WebDataset(str(tmp_path / "best/00000000.tar"), shardshuffle=False))
    assert [(s["__key__"], s["txt"]) for s in samples] == [
        (key, f"caption of {key}".encode()) for key in ("b1", "b4", "a0", "a2")
    ]


@pytest.fixture
def twins(tmp_path: Path) -> Path:
    """Three shards with the keys k0 and k1 each; of the second, k0 scores low."""
    paths = [str(tmp_path / f"data/{i}/x.tar") for i in range(3)]
    for path in paths:
        make_shard(Path(path), ["k0", "k1"])
    return make_run(tmp_path / "run", {paths[0]: [0.9, 0.9], paths[1]: [0.1, 0.9], paths[2]: [0.9, 0.9]})


def test_keys_are_unique_in_an_output_shard(twins, tmp_path):
    selection = select(twins, SelectSettings(min=0.5, output=tmp_path / "best"))
    assert [[name for name, _ in members[::2]] for _, members in samples_of(tmp_path / "best")] == [
        ["k0.jpg", "k1.jpg"],
        ["k1.jpg", "k0.jpg"],
        ["k1.jpg"],
    ]
    assert selection.shards_written == 3
    assert selection.warnings == (
        "input shards share keys: 2 output shards end early, so that keys are unique in each",
    )


def test_a_stream_with_one_key_twice_in_a_row_warns(twins, tmp_path):
    selection = select(twins, SelectSettings(min=0.5, format="tar", output=tmp_path / "best.tar"))
    assert selection.warnings == (
        "input shards share keys: in 1 places two neighbours have one key, and readers merge them or "
        "stop; select into shards instead, which keeps them apart",
    )


def test_shards_end_at_their_size_or_before_a_key_they_have():
    randomness = random.Random(0)
    for _ in range(300):
        keys = [randomness.randrange(30) for _ in range(randomness.randrange(60))]
        size = randomness.randrange(1, 12)
        expected: list[list[int]] = []
        for key in keys:
            if not expected or len(expected[-1]) == size or key in expected[-1]:
                expected.append([])
            expected[-1].append(key)
        zeros = np.zeros(len(keys), int)
        starts, n_early = shard_starts(
            Members([], zeros, zeros, zeros, np.array(keys, np.uint64)).previous_with_key(), size
        )
        assert [keys[a:b] for a, b in zip(starts, [*starts, len(keys)][1:], strict=True)] == expected
        assert n_early == sum(len(a) < size for a in expected[:-1])


def test_an_existing_empty_folder_is_filled(run, tmp_path):
    (tmp_path / "best").mkdir()
    select(run, SelectSettings(top="1", output=tmp_path / "best"))
    assert [name for name, _ in samples_of(tmp_path / "best")[0][1]] == ["b1.jpg", "b1.txt"]


def test_nothing_is_left_behind_when_copying_fails(run, tmp_path):
    shard = tmp_path / "data/b.tar"
    table = RunDirectory(run).scores("b-0")
    rows = pq.read_table(table).to_pylist()
    end = rows[-1]["offset"] + 512  # the header of the last sample is there, its content is not
    with open(shard, "r+b") as file:
        file.truncate(end)
    add_table(run, "b-0", str(shard), rows, size=end, mtime_ns=shard.stat().st_mtime_ns)
    with pytest.raises(
        ShardError, match=f"has become shorter since it was scored: score it again; it ends at byte {end:,}"
    ):
        select(run, SelectSettings(top="100%", output=tmp_path / "best"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]


def test_a_table_that_cannot_be_written(run, tmp_path):
    from mmfilter.core.run.score_tables import ScoreTables

    nothing = np.zeros(10, np.int8)
    with pytest.raises(SelectionError, match=r"/none/x\.parquet' cannot be written: IO Error: Cannot open file"):
        tables = ScoreTables(RunDirectory(run))
        write_decisions(
            tables, tmp_path / "none/x.parquet", Decisions(tables.column("raw"), nothing, [None, "dropped"]), {}
        )


def test_sources_stay_as_they_are(run, tmp_path):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "data").iterdir()}
    select(run, SelectSettings(top="50%", output=tmp_path / "data" / "best"))
    (tmp_path / "data/best/manifest.json").unlink()
    assert {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "data").glob("*.tar")
    } == before
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["a.tar", "b.tar", "best"]


# --- streams ---


def test_a_tar_stream_is_the_same_as_the_shard(run, tmp_path):
    select(run, SelectSettings(top="4", output=tmp_path / "best"))
    content, selection = collect(run, SelectSettings(top="4", format="tar"))
    assert content == (tmp_path / "best/00000000.tar").read_bytes()
    assert (selection.nbytes_written, selection.kept, selection.reader_closed) == (len(content), 4, False)


def test_keys_stream(run):
    content, selection = collect(run, SelectSettings(top="2", format="keys"))
    assert content == b"b1\na0\n"
    assert selection.nbytes_written == 6


STREAM = """
import sys
from pathlib import Path
from mmfilter.ops.select import select
from mmfilter.core.selection.select_settings import SelectSettings
selection = select(Path(sys.argv[1]), SelectSettings(top="100%", format=sys.argv[2]))
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(selection.reader_closed, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def large_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("large")
    make_shard(tmp_path / "large.tar", [f"{'k' * 80}{i:05d}" for i in range(2000)])
    return make_run(tmp_path / "run", {str(tmp_path / "large.tar"): [i / 2000 for i in range(2000)]})


@pytest.mark.parametrize("format", ["tar", "keys"])
def test_a_reader_that_stops_is_a_normal_end(large_run, format):
    command = '"$0" -c "$1" "$2" "$3" | head -c 1000 | wc -c; echo ${PIPESTATUS[0]}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, STREAM, str(large_run), format],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout.split(), done.stderr) == (["1000", "0"], "True\n")


def test_stdout_may_be_a_file_opened_for_appending(large_run, tmp_path):
    command = '"$0" -c "$1" "$2" tar >> out.tar'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, STREAM, str(large_run)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "False\n")
    assert (tmp_path / "out.tar").read_bytes() == (large_run.parent / "large.tar").read_bytes().rstrip(b"\0").ljust(
        (tmp_path / "out.tar").stat().st_size, b"\0"
    )
    assert len(list(open_source(str(tmp_path / "out.tar")).samples())) == 2000


@pytest.mark.parametrize("way", [None, sendfile, read_and_write])
def test_every_way_to_copy_gives_the_same_bytes(tmp_path, way):
    content = random.Random(0).randbytes(3_000_000)
    (tmp_path / "source").write_bytes(content)
    source = WebdatasetTar(str(tmp_path / "source"))
    with OpenShards() as sources, open(tmp_path / "target", "wb") as file:
        writer = ShardWriter(file.fileno(), sources, None if way is None else [way])
        writer.copy(source, 512, 2_000_000)
        writer.copy(source, 0, 100)
        writer.finish()
    assert (tmp_path / "target").read_bytes() == content[512:2_000_512] + content[:100] + bytes(1024)


def test_remote_shards_are_copied(tmp_path):
    import fsspec

    make_shard(tmp_path / "x.tar", [f"k{i}" for i in range(5)])
    url = "memory:///selected/x.tar"
    with fsspec.open(url, "wb") as file:
        file.write((tmp_path / "x.tar").read_bytes())
    run = make_run(tmp_path / "run", {url: [0.1, 0.9, 0.8, 0.2, 0.7]})
    now = open_source(url).stamp()
    rows = pq.read_table(RunDirectory(run).scores("x-0")).to_pylist()
    add_table(run, "x-0", url, rows, size=now.size, etag=now.etag)
    select(run, SelectSettings(top="3", output=tmp_path / "best"))
    original = (tmp_path / "x.tar").read_bytes()
    expected = [original[row["offset"] : row["offset"] + row["nbytes"]] for row in (rows[1], rows[2], rows[4])]
    assert (tmp_path / "best/00000000.tar").read_bytes() == b"".join(expected) + bytes(1024)
