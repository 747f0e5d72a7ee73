"""Columns of other files in `select --where` and `--by`: sidecars and named files, against a join by hand."""

from __future__ import annotations

import json
import random
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.errors import SelectionError
from mmfilter.ops.select import select
from tests import inputs
from tests.runs import keys_of, make_run, make_shard

PER_SHARD = 12


def sidecar(path: Path, keys: list[str], first: int) -> dict[str, dict]:
    """img2dataset's parquet: all rows in completion order, failed ones too; what it says of each key that is in the tar."""
    rows = [
        {
            "key": key,
            "url": f"http://x/{key}",
            "width": 9999,
            "original_width": 100 * (first + i),
            "status": "success",
            "uid": f"{first + i:032x}",
        }
        for i, key in enumerate(keys)
    ]
    failed = [
        dict(row, status="failed_to_resize", original_width=-1, url="failed") for row in rows[:3]
    ]  # a try before the one that went well
    failed.append(dict(rows[0], key="000099999", status="failed_to_download", original_width=10**6))
    mixed = rows + failed
    random.Random(first).shuffle(mixed)
    pq.write_table(pa.Table.from_pylist(mixed), path, row_group_size=5)
    return {row["key"]: row for row in rows}


@pytest.fixture
def known(tmp_path: Path) -> dict[str, dict]:
    """Three shards in `tmp_path/data` and a run over them; two have a sidecar. What is known of each key, scores too."""
    scores, known, first = {}, {}, 0
    for number in range(3):
        keys = [f"{number:05d}{i:04d}" for i in range(PER_SHARD)]
        shard = tmp_path / f"data/{number:05d}.tar"
        make_shard(shard, keys)
        said = sidecar(shard.with_suffix(".parquet"), keys, first) if number != 1 else {key: {} for key in keys}
        values = [None if i == 5 else random.Random(first + i).random() for i in range(PER_SHARD)]
        scores[str(shard)] = [
            {"similarity": value, "width": 10 * i, "uid": f"{first + i:032x}"} for i, value in enumerate(values)
        ]
        known |= {
            key: said[key] | {"similarity": value, "width": 10 * i, "uid": f"{first + i:032x}"}
            for i, (key, value) in enumerate(zip(keys, values, strict=True))
        }
        first += PER_SHARD
    make_run(tmp_path / "run", scores)
    return known


def wanted(known: dict[str, dict], passes) -> list[str]:
    return [key for key, row in known.items() if row["similarity"] is not None and passes(row)]


def error_of(run: Path, **settings) -> str:
    with pytest.raises(SelectionError) as caught:
        select(run, SelectSettings(**{"format": "keys", "top": "100%"} | settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("where", ["original_width >= 400", "ORIGINAL_WIDTH >= 400", 'scores."original_width" >= 400'])
def test_sidecars_are_joined_by_key_on_success(known, tmp_path, where):
    found = keys_of(tmp_path / "run", tmp_path, top="100%", where=where)
    assert found == wanted(known, lambda row: row.get("original_width", -1) >= 400)
    assert len(found) == 18


def test_text_columns_and_both_kinds_at_once(known, tmp_path):
    found = keys_of(
        tmp_path / "run", tmp_path, top="100%", where="url LIKE 'http%3' OR (status IS NULL AND width < 50)"
    )
    assert found == wanted(
        known, lambda row: row.get("url", "").endswith("3") or ("url" not in row and row["width"] < 50)
    )
    assert found


def test_a_column_that_both_have_is_the_score_tables(known, tmp_path):
    found = keys_of(tmp_path / "run", tmp_path, top="100%", where="width = 20 AND coalesce(original_width, 0) >= 0")
    assert found == wanted(known, lambda row: row["width"] == 20)


def test_ranking_by_a_sidecar_column(known, tmp_path):
    scored = [key for key, row in known.items() if row["similarity"] is not None and "original_width" in row]
    best = sorted(scored, key=lambda key: -known[key]["original_width"])[:4]
    assert keys_of(tmp_path / "run", tmp_path, top="4", by="original_width") == sorted(best)
    selection = select(tmp_path / "run", SelectSettings(top="4", by="original_width", output=tmp_path / "best"))
    table = {row["key"]: row for row in pq.read_table(tmp_path / "best/selection.parquet").to_pylist()}
    assert sorted(key for key, row in table.items() if row["kept"]) == sorted(best)
    assert {key: row["score"] for key, row in table.items()} == {
        key: row.get("original_width") if row["similarity"] is not None else None for key, row in known.items()
    }
    assert selection.warnings == (
        "the parquet files beside the shards: no row for 12 of 36 samples, original_width is null there",
    )


def test_sidecars_are_not_read_unless_asked_for(known, tmp_path):
    for path in (tmp_path / "data").glob("*.parquet"):
        path.write_bytes(b"damaged")
    assert keys_of(tmp_path / "run", tmp_path, top="100%", where="width = 20") == wanted(
        known, lambda row: row["width"] == 20
    )
    assert error_of(tmp_path / "run", where="original_width > 1").startswith(
        "the parquet files beside the shards cannot be read: "
    )


def test_an_unknown_column_lists_both_sets(known, tmp_path):
    own = ", ".join(ScoreTables(RunDirectory(tmp_path / "run")).types)
    theirs = "the parquet files beside the shards: key, url, width, original_width, status, uid"
    assert error_of(tmp_path / "run", where="beauty > 1 AND original_width > 2") == (
        f"--where 'beauty > 1 AND original_width > 2' names a column 'beauty' that the score table does not have; it has {own}, original_width; {theirs}"
    )
    assert (
        error_of(tmp_path / "run", by="similarly")
        == f"no column 'similarly'; did you mean 'similarity'? the score table has {own}; {theirs}"
    )
    assert error_of(tmp_path / "run", by="url").startswith(
        "column 'url' of the score table is not a number (varchar); "
    )


def test_without_sidecars_the_words_are_those_of_the_score_table(known, tmp_path):
    for path in (tmp_path / "data").glob("*.parquet"):
        path.unlink()
    assert error_of(tmp_path / "run", by="similarly").startswith(
        "the score table has no column 'similarly'; did you mean 'similarity'? to rank by it has "
    )
    assert "names a column 'original_width' that the score table does not have; it has key, shard, row" in error_of(
        tmp_path / "run", where="original_width > 1"
    )


def test_a_condition_still_reads_nothing_else(known, tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    assert "sub-query" in error_of(tmp_path / "run", where=f"original_width > (SELECT a FROM read_csv('{secret}'))")


def test_a_key_that_comes_twice_is_refused(known, tmp_path):
    path = tmp_path / "data/00000.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table]), path)
    assert (
        error_of(tmp_path / "run", where="original_width > 1")
        == "the parquet files beside the shards: more than one row for one key (12 too many); leave one of each"
    )


def test_shards_that_share_keys_have_their_own_sidecar(tmp_path):
    scores = {}
    for number in range(2):
        shard = tmp_path / f"data/{number}.tar"
        make_shard(shard, ["a", "b"])
        pq.write_table(
            pa.table({"key": ["b", "a"], "n": [10 * number + 1, 10 * number]}), shard.with_suffix(".parquet")
        )
        scores[str(shard)] = [0.5, 0.6]
    make_run(tmp_path / "run", scores)
    tables = ScoreTables(RunDirectory(tmp_path / "run"))
    assert tables.column("n").values.tolist() == [0, 1, 10, 11]


def test_sidecars_at_a_url(tmp_path):
    make_shard(tmp_path / "0.tar", ["a", "b"])
    run = make_run(tmp_path / "run", {str(tmp_path / "0.tar"): [0.5, 0.6]})
    table = pq.read_table(run / "scores/0-0.parquet")
    about = table.schema.metadata or pq.read_metadata(run / "scores/0-0.parquet").metadata
    said = json.loads(about[b"mmfilter"]) | {"shard": "memory://beside/0.tar"}
    table = table.set_column(1, "shard", pa.array(["memory://beside/0.tar"] * 2)).replace_schema_metadata(
        {b"mmfilter": json.dumps(said).encode()}
    )
    pq.write_table(table, run / "scores/0-0.parquet")
    out = pa.BufferOutputStream()
    pq.write_table(pa.table({"key": ["b", "a"], "n": [1, 0], "m": [3, 2]}), out)
    memory = fsspec.filesystem("memory")
    memory.pipe("/beside/0.tar", (tmp_path / "0.tar").read_bytes())
    memory.pipe("/beside/0.parquet", out.getvalue().to_pybytes())
    tables = ScoreTables(RunDirectory(run))
    assert tables.column("n").values.tolist() == [0, 1]
    assert tables.column("m", "n = 1").passes.tolist() == [False, True]


def test_a_parquet_input_has_its_own_columns(tmp_path):
    """Joined by row: there may be no key in it, or the same one twice."""
    rows, scores = [], {}
    for number in range(2):
        path = inputs.as_parquet(
            tmp_path / f"data/{number}.parquet",
            inputs.pairs(9),
            row_group_size=4,
            stars=[(7 * number + 3 * i) % 10 for i in range(9)],
        )
        scores[str(path)] = [i / 9 for i in range(9)]
        rows += [(f"{i:09d}", (7 * number + 3 * i) % 10) for i in range(9)]
    run = make_run(tmp_path / "run", scores)
    assert keys_of(run, tmp_path, top="100%", where="stars >= 5") == [key for key, stars in rows if stars >= 5]
    tables = ScoreTables(RunDirectory(run))
    assert tables.column("stars").values.tolist() == [stars for _, stars in rows]
    assert "the parquet files of the input: id, image, caption, stars, file_row_number" in error_of(run, by="star")
    inputs.as_parquet(path, inputs.pairs(8), stars=list(range(8)))
    assert (
        error_of(run, by="stars")
        == f"shard {str(path)!r} has changed since it was scored, its rows may be others; score it again"
    )


# --- files that the user names ---


def write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize("by", ["uid", "key", "key as a number"])
def test_named_files_are_joined_by_uid_or_key(known, tmp_path, suffix, by):
    rng = random.Random(suffix)
    aesthetic = {key: rng.randrange(100) for key in rng.sample(list(known), 20)}
    rows = [
        {"aesthetic": n, **({"uid": known[key]["uid"]} if by == "uid" else {"key": key if by == "key" else int(key)})}
        for key, n in aesthetic.items()
    ]
    rows += [{"aesthetic": 1000, **({"uid": "f" * 32} if by == "uid" else {"key": "999" if by == "key" else 999})}]
    path = write(tmp_path / f"more{suffix}", rows)
    found = keys_of(tmp_path / "run", tmp_path, top="100%", where="aesthetic < 50 AND width < 100", metadata=(path,))
    assert found == [key for key in wanted(known, lambda row: row["width"] < 100) if aesthetic.get(key, 99) < 50]
    assert found


def test_many_files_go_before_sidecars_and_beside_them(known, tmp_path):
    keys = list(known)
    for i in range(3):
        write(
            tmp_path / f"more{i}.parquet",
            [{"uid": known[key]["uid"], "url": f"mine{i}", "clip": n} for n, key in enumerate(keys) if n % 3 == i],
        )
    found = keys_of(
        tmp_path / "run",
        tmp_path,
        top="100%",
        where="url = 'mine1' AND original_width >= 0 AND clip > 6",
        metadata=(f"{tmp_path}/more*.parquet",),
    )
    assert found == [
        key
        for n, key in enumerate(keys)
        if n % 3 == 1 and n > 6 and "original_width" in known[key] and known[key]["similarity"] is not None
    ]


def test_what_named_files_lack_is_said(known, tmp_path):
    run = tmp_path / "run"
    assert error_of(run, by="x", metadata=("nope*.csv",)) == "--metadata 'nope*.csv' matches no file; check the path"
    odd = tmp_path / "a.txt"
    odd.write_text("x")
    assert (
        error_of(run, by="x", metadata=(str(odd),))
        == f"--metadata {str(odd)!r} is none of .parquet, .csv, .tsv, .jsonl, .ndjson, .json"
    )
    path = write(tmp_path / "a.csv", [{"name": "a", "x": 1}])
    assert (
        error_of(run, by="x", metadata=(path,))
        == f"--metadata {path!r} has no column 'key' or 'uid' to find samples by; it has name, x"
    )
    path = write(tmp_path / "b.csv", [{"key": "zz", "x": 1}])
    assert (
        error_of(run, by="x", metadata=(path,))
        == f"--metadata {path!r}: no row for any sample of the run, none has the same 'key'"
    )
    path = write(tmp_path / "c.jsonl", [{"key": next(iter(known)), "x": 1}] * 2)
    assert (
        error_of(run, by="x", metadata=(path,))
        == f"--metadata {path!r}: more than one row for one key (1 too many); leave one of each"
    )
    (tmp_path / "d.parquet").write_bytes(b"damaged")
    assert error_of(run, by="x", metadata=(f"{tmp_path}/d.parquet",)).startswith(
        f"--metadata '{tmp_path}/d.parquet' cannot be read: "
    )


def test_a_file_of_uids_needs_uids_in_the_run(tmp_path):
    make_shard(tmp_path / "0.tar", ["a"])
    run = make_run(tmp_path / "run", {str(tmp_path / "0.tar"): [0.5]})
    path = write(tmp_path / "a.parquet", [{"uid": "a", "x": 1}])
    said = f"--metadata {path!r} has no column 'key' or 'uid' to find samples by, and the samples of this run have no uid; it has uid, x"
    assert error_of(run, by="x", metadata=(path,)) == said


# --- expressions over columns of other files ---


def test_formulas_groups_and_repetitions_find_columns_of_other_files(known, tmp_path):
    keys = list(known)
    rng = random.Random(1)
    said = {
        key: {"key": key, "clip": rng.randrange(1000), "source": rng.choice("ab"), "times": rng.randrange(3)}
        for key in keys
    }
    path = write(tmp_path / "more.csv", list(said.values()))
    scored = [key for key in keys if known[key]["similarity"] is not None]

    def best(among: list[str], n: int, value) -> list[str]:
        return sorted(sorted(among, key=value, reverse=True)[:n], key=keys.index)

    run = tmp_path / "run"
    by = {key: said[key]["clip"] / 1000 + known[key]["similarity"] for key in scored}
    assert keys_of(run, tmp_path, top="5", by="clip / 1000 + similarity", metadata=(path,)) == best(scored, 5, by.get)
    share = {key: sum(said[other]["clip"] < said[key]["clip"] for other in scored) for key in scored}
    assert keys_of(run, tmp_path, top="5", by="rank(clip)", metadata=(path,)) == best(scored, 5, share.get)
    similarity = {key: known[key]["similarity"] for key in scored}
    groups = [best([key for key in scored if said[key]["source"] == source], 3, similarity.get) for source in "ab"]
    assert keys_of(run, tmp_path, top="3", per="source", metadata=(path,)) == sorted(
        groups[0] + groups[1], key=keys.index
    )
    wide = [key for key in scored if known[key].get("original_width", 0) >= 400]
    found = keys_of(run, tmp_path, top="100%", where="original_width >= 400", repeat="times", metadata=(path,))
    assert sorted(found) == sorted(key for key in wide for _ in range(said[key]["times"])) and len(set(found)) < len(
        found
    )


NAMES = (
    "copies",
    "place",
    "among",
    "rank",
    "score",
    "output",
    "decision",
    "kept",
    "position",
    "closeness",
    "duplicate_of",
    "first",
    "found",
    "n",
    "h",
)


def test_columns_of_other_files_may_be_called_as_ours(known, tmp_path):
    """Every name that a query gives to a column of its own, through all that is asked in a selection."""
    keys = [key for key in known if known[key]["similarity"] is not None]
    rows = [{"key": key, **{name: i % 3 for name in NAMES}} for i, key in enumerate(known)]
    path = write(tmp_path / "more.parquet", rows)
    where = " AND ".join(f'"{name}" >= 0' for name in NAMES)
    times = {row["key"]: row["copies"] for row in rows}
    for form, target in (("shards", "shards"), ("keys", "keys")):
        select(
            tmp_path / "run",
            SelectSettings(
                top="100%",
                where=where,
                by='"score" + similarity',
                repeat="copies",
                shuffle=1,
                metadata=(path,),
                format=form,
                output=tmp_path / target,
            ),
        )
    found = (tmp_path / "keys").read_text().split()
    assert sorted(found) == sorted(key for key in keys for _ in range(times[key]))
    written = [name for shard in sorted((tmp_path / "shards").glob("*.tar")) for name in tar_names(shard)]
    assert [name.split(".")[0].split("-")[0] for name in written] == found
    table = pq.read_table(tmp_path / "shards/selection.parquet").to_pylist()
    assert {row["key"]: row["copies"] for row in table if row["kept"]} == {
        key: times[key] for key in keys if times[key]
    }
    given = {row["key"]: row["score"] for row in rows}
    assert all(
        row["score"] == pytest.approx(given[row["key"]] + known[row["key"]]["similarity"], abs=1e-6)
        for row in table
        if row["kept"]
    )


def tar_names(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return [name for name in tar.getnames() if name.endswith(".jpg")]


def test_columns_that_are_named_go_with_the_pairs(tmp_path):
    path = inputs.as_parquet(tmp_path / "0.parquet", inputs.pairs(6), stars=list(range(6)))
    run = make_run(tmp_path / "run", {str(path): [i / 6 for i in range(6)]})
    select(run, SelectSettings(top="100%", where="stars >= 2", format="parquet", output=tmp_path / "best"))
    rows = pq.read_table(tmp_path / "best/data").to_pylist()
    assert [(row["key"], row["stars"]) for row in rows] == [(f"{i:09d}", i) for i in range(2, 6)]


def test_a_column_of_decimals_ranks(tmp_path):
    make_shard(tmp_path / "x.tar", ["a", "b", "c"])
    run = make_run(tmp_path / "run", {str(tmp_path / "x.tar"): [0.5, 0.5, 0.5]})
    pq.write_table(
        pa.table({"key": ["a", "b", "c"], "stars": pa.array([2, 3, 1], pa.decimal128(5, 2))}), tmp_path / "more.parquet"
    )
    assert keys_of(run, tmp_path, top="1", by="stars", metadata=(str(tmp_path / "more.parquet"),)) == ["b"]


OURS = (
    "_at",
    "_among",
    "among",
    "place",
    "position",
    "v",
    "given",
    "found",
    "name",
    "first",
    "theirs",
    "mine",
    "my col",
    "größe",
    "select",
    'a"b',
)


def test_columns_of_other_files_may_be_called_as_what_is_inside(tmp_path):
    make_shard(tmp_path / "x.tar", [f"k{i}" for i in range(6)])
    run = make_run(tmp_path / "run", {str(tmp_path / "x.tar"): [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]})
    pq.write_table(
        pa.table({"key": [f"k{i}" for i in range(6)]} | {name: list(range(6)) for name in OURS}),
        tmp_path / "more.parquet",
    )
    files = (str(tmp_path / "more.parquet"),)
    for name in OURS:
        quoted = '"' + name.replace('"', '""') + '"'
        assert keys_of(run, tmp_path, top="2", by=f"{quoted} + 0", metadata=files) == ["k4", "k5"], name
        assert keys_of(run, tmp_path, top="100%", where=f"{quoted} = 3", metadata=files) == ["k3"], name
        assert keys_of(run, tmp_path, top="1", per=f"{quoted} % 2", metadata=files) == ["k0", "k1"], name
        assert keys_of(run, tmp_path, top="100%", repeat=f"{quoted} // 4", metadata=files) == ["k4", "k5"], name
