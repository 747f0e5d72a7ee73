"""Selecting: the rule against a plain sort, the bytes, the outputs, and what is refused."""

from __future__ import annotations

import io
import json
import math
import os
import random
import subprocess
import sys
import tarfile
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from mmfilter.core.data.artifacts import SCORE_TABLE, RunDirectory, TableWriter, read_table_metadata, write_json
from mmfilter.core.data.choice import Decision, Top, choose
from mmfilter.core.data.repack import Members, _shard_starts
from mmfilter.core.data.shard_writer import ShardWriter, Sources, _read_and_write, _sendfile
from mmfilter.core.data.shards import read_samples, stamp
from mmfilter.errors import RunError, SelectionError, ShardError
from mmfilter.ops.select import Selection, SelectSettings, select


def make_shard(path: Path, keys: list[str], *, format: int = tarfile.GNU_FORMAT, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    randomness = random.Random(f"{path.name} {seed}")
    with tarfile.open(path, "w", format=format) as tar:
        for key in keys:
            for ext, content in [("jpg", randomness.randbytes(randomness.randrange(2000))), ("txt", f"caption of {key}".encode())]:
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size, info.mtime, info.uname, info.mode = len(content), 1_700_000_000, "bigdata", 0o444
                tar.addfile(info, io.BytesIO(content))


def add_table(run: Path, name: str, shard: str, table: list[dict], **metadata) -> None:
    writer = TableWriter(RunDirectory(run).scores(name), SCORE_TABLE)
    for start in range(0, len(table), 7):  # several row groups
        writer.write(table[start : start + 7])
    now = stamp(shard) if os.path.exists(shard) else None
    stamped = {"size": now.size, "mtime_ns": now.mtime_ns, "etag": now.etag} if now else {}
    writer.finish({"kind": "scores", "shard": shard, "name": name, "rows": len(table)} | stamped | metadata)


def make_run(run: Path, shards: dict[str, list]) -> Path:
    """A run over existing shards: path -> for each sample a score, None, or a dict of columns."""
    inputs = []
    for shard, scores in shards.items():
        name = Path(shard).stem + f"-{len(inputs)}"
        rows = []
        for sample, score in zip(read_samples(shard), scores, strict=True):
            columns = score if isinstance(score, dict) else {"similarity": score}
            ok = columns.get("similarity") is not None
            rows.append(
                {"key": sample.key, "shard": shard, "row": sample.row, "offset": sample.offset, "nbytes": sample.nbytes}
                | {"ok": ok, "reason": None if ok else f"no caption: {sample.key} has none"}
                | columns
            )
        add_table(run, name, shard, rows)
        inputs.append({"name": name, "shard": shard})
    write_json(RunDirectory(run).manifest, {"inputs": inputs})
    return run


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


def keys_of(run: Path, tmp_path: Path, **settings) -> list[str]:
    target = tmp_path / "keys.txt"
    target.unlink(missing_ok=True)
    select(run, SelectSettings(format="keys", output=target, **settings))
    return target.read_text().split()


def samples_of(folder: Path) -> list[tuple[str, list[tuple[str, bytes]]]]:
    """Output shard and its members, in order."""
    found = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found.append((shard.name, [(member.name, tar.extractfile(member).read()) for member in tar]))
    return found


def error_of(run: Path, **settings) -> str:
    with pytest.raises((SelectionError, RunError)) as caught:
        select(run, SelectSettings(**settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- the rule ---


def test_known_answers(run, tmp_path):
    assert keys_of(run, tmp_path, top="2") == ["b1", "a0"]
    assert keys_of(run, tmp_path, top="30%") == ["b1", "b4", "a0"]
    assert keys_of(run, tmp_path, min=0.5) == ["b1", "b2", "b4", "a0", "a2", "a3"]
    assert keys_of(run, tmp_path, top="20%", min=0.85) == ["b1"]
    assert keys_of(run, tmp_path, top="100%") == ["b0", "b1", "b2", "b4", "a0", "a1", "a2", "a3", "a4"]
    assert keys_of(run, tmp_path, top="2", where="key LIKE 'a%'") == ["a0", "a2"]
    assert keys_of(run, tmp_path, top="40%", where="row = 2 OR row = 3") == ["a2", "a3"]
    assert keys_of(run, tmp_path, min=0.0, where="false") == []


def test_ties_break_by_key_whatever_the_input_order(run, tmp_path):
    assert keys_of(run, tmp_path, top="4") == ["b1", "b4", "a0", "a2"]
    assert keys_of(run, tmp_path, top="5") == ["b1", "b4", "a0", "a2", "a3"]


def test_a_stored_float32_meets_the_same_decimal(run, tmp_path):
    assert keys_of(run, tmp_path, min=0.7) == ["b1", "b4", "a0"]


@pytest.mark.parametrize("top", ["20%", "33.3%", "50%", "0.5%", "99.99%", "100%", "12.5%"])
def test_quota_is_exact(top):
    for n in [0, 1, 2, 3, 4, 5, 7, 8, 10, 100, 999, 1000, 10**9 + 1]:
        exact = (Decimal(n) * Decimal(top[:-1]) / 100).quantize(Decimal(1), ROUND_HALF_UP)
        assert Top.parse(top).of(n) == int(exact)


def brute_force(rows: list[dict], by: str, top: str | None, minimum: float | None, passes) -> list[dict]:
    candidates = [row for row in rows if passes(row)]
    scored = [row for row in candidates if row["ok"] and row[by] is not None and not math.isnan(row[by])]
    left = [row for row in scored if minimum is None or row[by] >= minimum]
    if top is not None:
        n = int(top) if top[-1] != "%" else int((Decimal(len(candidates)) * Decimal(top[:-1]) / 100).quantize(Decimal(1), ROUND_HALF_UP))
        left = sorted(left, key=lambda row: (-row[by], row["key"], row["shard"], row["row"]))[:n]
    kept = {(row["shard"], row["row"]) for row in left}
    return [row for row in rows if (row["shard"], row["row"]) in kept]


def random_rows(randomness: random.Random) -> list[dict]:
    """Rows of one to five shards in some order, which share keys and many scores."""
    names = [f"/s{i}.tar" for i in range(randomness.randrange(1, 6))]
    randomness.shuffle(names)
    values = [None, math.nan, -1.0, 0.0, math.inf] + [randomness.choice([0.25, 0.5, 0.75, randomness.uniform(-1, 1)]) for _ in range(20)]
    rows = []
    for name in names:
        keys = randomness.sample(["grün", "日本", "z", "Z", *(f"k{i}" for i in range(40))], randomness.randrange(0, 40))
        for row, key in enumerate(keys):
            score = randomness.choice(values)
            scores = {
                "similarity": None if score is None else float(np.float32(score)),
                "cooccurrence": float(randomness.randrange(4)),
                "width": randomness.randrange(5),
            }
            rows.append({"key": key, "shard": name, "row": row, "offset": 0, "nbytes": 512, "ok": randomness.random() < 0.9} | scores)
    return rows


CONDITIONS = {
    None: lambda row: True,
    "width >= 2": lambda row: row["width"] >= 2,
    "similarity < 0.6": lambda row: row["similarity"] is not None and row["similarity"] < 0.6,
    "key > 'k2' -- and so on": lambda row: row["key"].encode() > b"k2",
}


def random_request(randomness: random.Random) -> tuple[str, str | None, float | None]:
    top = randomness.choice([None, "1", "7", "10%", "33.3%", "50%", "100%", "1000"])
    minimum = randomness.choice([None, 0.5, 1.0]) if top else 0.5
    return randomness.choice(["similarity", "cooccurrence", "width"]), top, minimum


@pytest.mark.parametrize("seed", range(12))
def test_selection_is_that_of_a_plain_sort(tmp_path, seed):
    randomness = random.Random(seed)
    rows = random_rows(randomness)
    run = tmp_path / "run"
    shards = list(dict.fromkeys(row["shard"] for row in rows)) or ["/none.tar"]
    for i, shard in enumerate(shards):
        add_table(run, f"t{i}", shard, [row for row in rows if row["shard"] == shard])
    write_json(run / "manifest.json", {"inputs": [{"name": f"t{i}", "shard": shard} for i, shard in enumerate(shards)]})
    by, top, minimum = random_request(randomness)
    where = randomness.choice(list(CONDITIONS))
    settings = SelectSettings(top=top, min=minimum, by=by, where=where, format="keys", output=tmp_path / "keys")
    there = len(brute_force(rows, by, "100%", None, CONDITIONS[where]))
    if top is not None and top[-1] != "%" and int(top) > there:
        assert error_of(run, top=top, by=by, where=where, format="keys").startswith(f"--top {top} is more than there is: {there} samples have a score")
        return
    selection = select(run, settings)
    expected = brute_force(rows, by, top, minimum, CONDITIONS[where])
    assert (tmp_path / "keys").read_text() == "".join(row["key"] + "\n" for row in expected)
    assert selection.kept == len(expected)
    assert selection.candidates == sum(map(CONDITIONS[where], rows))
    assert selection.kept + sum(selection.dropped.values()) == selection.rows == len(rows)


def test_choice_is_that_of_a_plain_sort():
    randomness = random.Random(0)
    for _ in range(2000):
        rows = random_rows(randomness)
        by, top, minimum = random_request(randomness)
        passes = CONDITIONS[randomness.choice(list(CONDITIONS))]

        def first_by_key(among: np.ndarray, n: int, rows=rows) -> list[int]:
            return sorted(np.flatnonzero(among), key=lambda i: (rows[i]["key"], rows[i]["shard"], rows[i]["row"]))[:n]

        decision = choose(
            np.array([math.nan if row[by] is None else row[by] for row in rows], np.float32),
            np.array([row["ok"] and row[by] is not None and not math.isnan(row[by]) for row in rows], bool),
            np.array([passes(row) for row in rows], bool),
            top=None if top is None else Top.parse(top),
            minimum=minimum,
            first_by_key=first_by_key,
        )
        kept = [row for row, code in zip(rows, decision, strict=True) if code == Decision.KEPT]
        assert kept == brute_force(rows, by, top, minimum, passes)


def test_shuffle_is_a_fixed_permutation(run, tmp_path):
    plain = keys_of(run, tmp_path, top="100%")
    shuffled = keys_of(run, tmp_path, top="100%", shuffle=7)
    assert shuffled == ["a2", "b4", "a0", "b0", "b2", "a4", "a3", "a1", "b1"]
    assert sorted(shuffled) == sorted(plain)
    assert keys_of(run, tmp_path, top="100%", shuffle=8) != shuffled
    select(run, SelectSettings(top="100%", shuffle=7, output=tmp_path / "best"))
    assert [name[:2] for _, members in samples_of(tmp_path / "best") for name, _ in members[::2]] == shuffled


# --- what is written ---


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
        originals |= {s.key: content[s.offset : s.offset + s.nbytes] for s in read_samples(shard)}
    expected = keys_of(run, tmp_path, top="50%", shuffle=shuffle)
    found = []
    for shard in sorted((tmp_path / "best").glob("*.tar")):
        content = shard.read_bytes()
        keys = [sample.key for sample in read_samples(str(shard))]
        assert content == b"".join(originals[key] for key in keys) + bytes(1024)
        found += keys
    assert found == expected and len(found) == selection.kept == 30
    assert selection.shards_written == 4
    assert selection.nbytes_written == sum(shard.stat().st_size for shard in (tmp_path / "best").glob("*.tar"))
    subprocess.run(["tar", "-tf", tmp_path / "best/00000000.tar"], check=True, capture_output=True)
    with tarfile.open(tmp_path / "best/00000000.tar") as tar:
        assert {(member.mtime, member.uname, member.mode) for member in tar} == {(1_700_000_000, "bigdata", 0o444)}


def test_the_folder_is_complete_and_explains_itself(run, tmp_path):
    selection = select(run, SelectSettings(top="4", min=0.4, where="key != 'b4'", output=tmp_path / "best", shard_size=3))
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
    assert selection.funnel == [("in the run", 10), ("have a score 'similarity'", 9), ("kept by --top 100%, of 10 asked for", 9)]


def test_an_empty_selection_is_an_empty_folder(run, tmp_path):
    selection = select(run, SelectSettings(min=2, output=tmp_path / "best"))
    assert (selection.kept, selection.cut, selection.shards_written) == (0, None, 0)
    assert json.loads((tmp_path / "best/sizes.json").read_text()) == {}
    assert pq.read_table(tmp_path / "best/selection.parquet").num_rows == 10


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_webdataset_reads_the_shards(run, tmp_path):
    select(run, SelectSettings(top="4", output=tmp_path / "best"))
    samples = list(webdataset.WebDataset(str(tmp_path / "best/00000000.tar"), shardshuffle=False))
    assert [(s["__key__"], s["txt"]) for s in samples] == [(key, f"caption of {key}".encode()) for key in ("b1", "b4", "a0", "a2")]


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
    assert selection.warnings == ("input shards share keys: 2 output shards end early, so that keys are unique in each",)


def test_a_stream_with_one_key_twice_in_a_row_warns(twins, tmp_path):
    selection = select(twins, SelectSettings(min=0.5, format="tar", output=tmp_path / "best.tar"))
    assert selection.warnings == (
        "input shards share keys: in 1 places two neighbours have one key, and readers merge them or stop; select into shards instead, which keeps them apart",
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
        starts, n_early = _shard_starts(Members([], zeros, zeros, zeros, np.array(keys, np.uint64)).previous_with_key(), size)
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
    with pytest.raises(ShardError, match=f"has become shorter since it was scored: score it again; it ends at byte {end:,}"):
        select(run, SelectSettings(top="100%", output=tmp_path / "best"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]


def test_a_table_that_cannot_be_written(run, tmp_path):
    from mmfilter.core.data.score_tables import ScoreTables

    nothing = np.zeros(10, np.int8)
    with pytest.raises(SelectionError, match=r"/none/x\.parquet' cannot be written: IO Error: Cannot open file"):
        tables = ScoreTables(RunDirectory(run))
        tables.write_decisions(tmp_path / "none/x.parquet", tables.column("raw"), nothing, labels=[None, "dropped"], metadata={})


def test_sources_stay_as_they_are(run, tmp_path):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "data").iterdir()}
    select(run, SelectSettings(top="50%", output=tmp_path / "data" / "best"))
    (tmp_path / "data/best/manifest.json").unlink()
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "data").glob("*.tar")} == before
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["a.tar", "b.tar", "best"]


# --- streams ---


def collect(run: Path, settings: SelectSettings) -> tuple[bytes, Selection]:
    receive, send = os.pipe()
    with os.fdopen(receive, "rb") as reader, os.fdopen(send, "wb") as writer:
        selection = select(run, settings, stdout=writer)
        writer.close()
        return reader.read(), selection


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
from mmfilter.ops.select import SelectSettings, select
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
    done = subprocess.run(["bash", "-c", command, sys.executable, STREAM, str(large_run), format], capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["1000", "0"], "True\n")


def test_stdout_may_be_a_file_opened_for_appending(large_run, tmp_path):
    command = '"$0" -c "$1" "$2" tar >> out.tar'
    done = subprocess.run(["bash", "-c", command, sys.executable, STREAM, str(large_run)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "False\n")
    assert (tmp_path / "out.tar").read_bytes() == (large_run.parent / "large.tar").read_bytes().rstrip(b"\0").ljust(
        (tmp_path / "out.tar").stat().st_size, b"\0"
    )
    assert len(list(read_samples(str(tmp_path / "out.tar")))) == 2000


@pytest.mark.parametrize("way", [None, _sendfile, _read_and_write])
def test_every_way_to_copy_gives_the_same_bytes(tmp_path, way):
    content = random.Random(0).randbytes(3_000_000)
    (tmp_path / "source").write_bytes(content)
    with Sources() as sources, open(tmp_path / "target", "wb") as file:
        writer = ShardWriter(file.fileno(), sources)
        if way is not None:
            writer._ways = [way]
        writer.copy(str(tmp_path / "source"), 512, 2_000_000)
        writer.copy(str(tmp_path / "source"), 0, 100)
        writer.finish()
    assert (tmp_path / "target").read_bytes() == content[512:2_000_512] + content[:100] + bytes(1024)


def test_remote_shards_are_copied(tmp_path):
    import fsspec

    make_shard(tmp_path / "x.tar", [f"k{i}" for i in range(5)])
    url = "memory:///selected/x.tar"
    with fsspec.open(url, "wb") as file:
        file.write((tmp_path / "x.tar").read_bytes())
    run = make_run(tmp_path / "run", {url: [0.1, 0.9, 0.8, 0.2, 0.7]})
    now = stamp(url)
    rows = pq.read_table(RunDirectory(run).scores("x-0")).to_pylist()
    add_table(run, "x-0", url, rows, size=now.size, etag=now.etag)
    select(run, SelectSettings(top="3", output=tmp_path / "best"))
    original = (tmp_path / "x.tar").read_bytes()
    expected = [original[row["offset"] : row["offset"] + row["nbytes"]] for row in (rows[1], rows[2], rows[4])]
    assert (tmp_path / "best/00000000.tar").read_bytes() == b"".join(expected) + bytes(1024)


# --- what is refused ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing says what to keep: give --top 20%, --top 5000 or --min 0.3"),
        ({"where": "ok"}, "nothing says what to keep: give --top 20%, --top 5000 or --min 0.3; to keep all that pass --where add --top 100%"),
        ({"top": "0.2"}, "--top '0.2' is neither a percentage up to 100% nor a count from 1; write 20% or 5000"),
        ({"top": "101%"}, "--top '101%' is neither a percentage up to 100% nor a count from 1; write 20% or 5000"),
        ({"top": "0"}, "--top '0' is neither a percentage up to 100% nor a count from 1; write 20% or 5000"),
        ({"min": math.nan}, "--min is nan; give a number"),
        ({"top": "1", "format": "zip"}, "--format 'zip' is unknown; choose from shards, tar, keys, datacomp, parquet, llava-json, hf"),
        ({"top": "1"}, "shards cannot go to stdout: give a new folder with -o DIR, or --format tar or keys"),
        ({"top": "1", "format": "hf"}, "hf cannot go to stdout: give a new folder with -o DIR, or --format tar or keys"),
        ({"top": "1", "format": "llava-json"}, "llava-json cannot go to stdout: give a new folder with -o DIR, or --format tar or keys"),
        ({"top": "1", "output": "s3://bucket/best"}, "output 's3://bucket/best' is a URL; select into a local folder and upload that"),
        ({"top": "1", "output": Path("s3://bucket/best")}, "output 's3:/bucket/best' is a URL; select into a local folder and upload that"),
        ({"top": "1", "output": "x", "shard_size": 0}, "--shard-size is 0; at least 1 is needed"),
        ({"top": "1", "output": "x", "shuffle": -1}, "--shuffle is -1; a seed from 0 is needed"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(SelectionError) as caught:
        SelectSettings(**settings)
    assert str(caught.value) == message


RANKS = (
    "to rank by it has row, offset, nbytes, width, height, caption_chars, n_image_tokens, n_text_tokens, saev, cooccurrence, "
    "l0, l0_image, l0_text, l1, l1_image, l1_text, similarity, support, raw, random"
)


def test_a_column_that_cannot_rank(run):
    assert error_of(run, top="1", by="similarty", format="keys") == (f"the score table has no column 'similarty'; did you mean 'similarity'? {RANKS}")
    assert error_of(run, top="1", by="beauty", format="keys") == f"the score table has no column 'beauty'; {RANKS}"
    assert error_of(run, top="1", by="key", format="keys") == f"column 'key' of the score table is no number (varchar); {RANKS}"
    assert error_of(run, top="1", by="ok", format="keys").startswith("column 'ok' of the score table is no number (boolean);")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("width >", 'is not possible: syntax error at or near ")"'),
        ("beauty > 1", "names a column 'beauty' that the score table does not have; it has key, shard, row, offset, nbytes, ok, reason, uid, image_hash,"),
        ("scores.beauty > 1", "names a column 'beauty' that the score table does not have; it has key, shard, row"),
        ("avg(width) > 1", "is not possible: Binder Error: WHERE clause cannot contain aggregates!"),
        ("true; DROP VIEW scores", 'is not possible: syntax error at or near ";"'),
        ("true); DROP VIEW scores; SELECT (1", "is not possible: Only SELECT statements can be serialized to json!"),
        ("true); SELECT (1", "is more than a condition; write what could follow WHERE, such as 'width >= 256 AND ok'"),
        ("1) LIMIT (1", "is more than a condition; write what could follow WHERE, such as 'width >= 256 AND ok'"),
        ("1) UNION SELECT (1", "is more than a condition; write what could follow WHERE, such as 'width >= 256 AND ok'"),
        ("$secret", "is more than a condition; write what could follow WHERE, such as 'width >= 256 AND ok'"),
        ("key IN (SELECT key FROM scores)", "has a sub-query; only a condition over the columns of one row is possible"),
        ("EXISTS (FROM read_text('/etc/hostname'))", "has a sub-query; only a condition over the columns of one row is possible"),
        ("key LIKE (FROM '/etc/hostname')", "has a sub-query; only a condition over the columns of one row is possible"),
    ],
)
def test_a_condition_that_is_none(run, where, message):
    assert error_of(run, top="1", where=where, format="keys").startswith(f"--where {where!r} {message}")


def test_a_condition_that_fails_on_a_row(run):
    where = "CAST(key AS INTEGER) > 1"
    message = error_of(run, top="1", where=where, format="keys")
    assert message.startswith(f"--where {where!r} fails: Conversion Error: Could not convert string '")
    assert "' to INT32" in message  # of which row, depends on which thread is first


def test_the_database_of_a_condition_is_locked(run):
    import duckdb

    from mmfilter.core.data.score_tables import ScoreTables

    database = ScoreTables(RunDirectory(run))._connect(locked=True)
    assert database.execute("SELECT count(*) FROM scores").fetchone() == (10,)
    for query in ["FROM read_text('/etc/hostname')", "COPY (SELECT 1) TO 'x.csv'", "SET lock_configuration = false", "ATTACH 'x.db'"]:
        with pytest.raises(duckdb.Error, match=r"disabled|locked"):
            database.execute(query).fetchall()


def test_an_output_in_the_way(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "rundir").symlink_to(run)

    def refused(name: str, **settings) -> str:
        return error_of(run, top="1", output=tmp_path / name, **settings).replace(str(tmp_path) + "/", "")

    assert refused("full") == "output 'full' is not empty; name a new folder, or delete it first"
    assert refused("full/file") == "output 'full/file' is a file; name a new folder, or delete it first"
    assert refused("data") == "output 'data' holds shards of the input; name a new folder"
    assert refused("link") == "output 'link' holds shards of the input; name a new folder"
    assert refused("run") == "output 'run' is in the run directory 'run'; write beside it"
    assert refused("run/best") == "output 'run/best' is in the run directory 'run'; write beside it"
    assert refused("rundir/scores/best") == "output 'rundir/scores/best' is in the run directory 'run'; write beside it"
    assert refused("data/a.tar", format="tar") == "output 'data/a.tar' exists already; name a new file, or delete it first"
    os.mkfifo(tmp_path / "pipe")
    assert refused("pipe") == "output 'pipe' is a device or a pipe; name a new folder"
    assert refused("pipe", format="tar") == "output 'pipe' is a device or a pipe; name a new file, or - for stdout"
    assert refused("full/file/best") == "output 'full/file/best' cannot be written: Not a directory"


def test_a_changed_or_missing_shard(run, tmp_path):
    shard = tmp_path / "data/b.tar"
    os.utime(shard, ns=(0, 12345))
    changed = f"shard {str(shard)!r} has changed since it was scored, its byte ranges may be wrong; score it again"
    assert error_of(run, top="1", output=tmp_path / "best") == changed
    shard.unlink()
    missing = f"shard {str(shard)!r} cannot be found: No such file or directory; put it back, or score the input again"
    assert error_of(run, top="1", output=tmp_path / "best") == missing
    assert not (tmp_path / "best").exists()
    assert keys_of(run, tmp_path, top="1") == ["b1"], "keys need no shard"
    select(run, SelectSettings(top="1", where="key LIKE 'a%'", output=tmp_path / "best"))


def test_a_run_from_stdin_gives_keys_only(tmp_path):
    run = tmp_path / "run"
    add_table(run, "stdin", "-", [{"key": "a", "shard": "-", "row": 0, "offset": 0, "nbytes": 512, "ok": True, "similarity": 0.5}])
    write_json(run / "manifest.json", {"inputs": [{"name": "stdin", "shard": "-"}]})
    message = f"run {str(run)!r} was scored from stdin, so there is no shard to copy from; use --format keys"
    assert error_of(run, top="1", output=tmp_path / "best") == message
    assert keys_of(run, tmp_path, top="1") == ["a"]


def test_an_unfinished_run_says_so(run, tmp_path):
    manifest = json.loads((run / "manifest.json").read_text())
    write_json(run / "manifest.json", {"inputs": manifest["inputs"] + [{"name": "c", "shard": "/c.tar"}]})
    selection = select(run, SelectSettings(top="1", output=tmp_path / "best"))
    assert selection.warnings == ("shards of the run that are not scored yet and take no part: 1",)


def test_a_damaged_run(run, tmp_path):
    add_table(run, "b-0", "/b.tar", [{"key": "x", "row": 3, "ok": True, "similarity": 1.0}])
    assert error_of(run, top="1", output=tmp_path / "best") == f"the score tables of run {str(run)!r} are not in row order; score the shards again"
    add_table(run, "b-0", "/b.tar", [], rows=2)
    assert error_of(run, top="1", format="keys") == f"the score tables of run {str(run)!r} hold 5 rows but say 7; score the shards again"
    assert error_of(tmp_path, top="1", format="keys").startswith(f"{str(tmp_path)!r} is no run: it has no manifest.json")


def test_odd_paths_are_no_patterns(tmp_path):
    folder = tmp_path / "lr=3 *[x]?'"
    make_shard(folder / "a[1].tar", ["k0", "k1"])
    run = make_run(folder / "run", {str(folder / "a[1].tar"): [0.1, 0.9]})
    selection = select(run, SelectSettings(top="1", where="ok", output=folder / "best"))
    assert selection.kept == 1
    assert pq.read_table(folder / "best/selection.parquet").column("kept").to_pylist() == [False, True]
