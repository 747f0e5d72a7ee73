"""What a selection refuses, and in which words."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmfilter.core.files import write_json
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.errors import SelectionError
from mmfilter.ops.select import select
from tests.runs import add_table, error_of, keys_of, make_run, make_shard


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing says what to keep: give --top 20%, --top 5000 or --min 0.3"),
        (
            {"where": "ok"},
            "nothing says what to keep: give --top 20%, --top 5000 or --min 0.3; to keep all that pass "
            "--where add --top 100%",
        ),
        ({"top": "0.2"}, "--top '0.2' is neither a percentage up to 100% nor a count from 1; write 20% or 5000"),
        ({"top": "101%"}, "--top '101%' is neither a percentage up to 100% nor a count from 1; write 20% or 5000"),
        ({"top": "0"}, "--top '0' is neither a percentage up to 100% nor a count from 1; write 20% or 5000"),
        (
            {"top": "9" * 5000},
            f"--top {'9' * 5000!r} is neither a percentage up to 100% nor a count from 1; write 20% or 5000",
        ),
        (
            {"top": f"1.{'1' * 5000}%"},
            f"--top '1.{'1' * 5000}%' is neither a percentage up to 100% nor a count from 1; write 20% or 5000",
        ),
        ({"min": math.nan}, "--min is nan; give a number"),
        ({"min": -math.inf}, "--min is -inf; give a number"),
        (
            {"top": "1", "format": "zip"},
            "--format is 'zip'; expected one of shards, tar, keys, datacomp, parquet, llava-json, hf",
        ),
        (
            {"top": "1", "output": "s3://bucket/best"},
            "output 's3://bucket/best' is a URL; select into a local folder and upload that",
        ),
        (
            {"top": "1", "output": Path("s3://bucket/best")},
            "output 's3:/bucket/best' is a URL; select into a local folder and upload that",
        ),
        ({"top": "1", "output": "x", "shard_size": 0}, "--shard-size is 0; at least 1 is needed"),
        ({"top": "1", "output": "x", "shuffle": -1}, "--shuffle is -1; at least 0 is needed"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(SelectionError) as caught:
        SelectSettings(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize("form", ["shards", "hf", "llava-json"])
def test_a_folder_cannot_go_to_stdout(run, form):
    wanted = f"{form} cannot go to stdout: give a new folder with -o DIR, or --format tar or keys"
    assert error_of(run, top="1", format=form) == wanted


RANKS = (
    "to rank by it has row, offset, nbytes, width, height, caption_chars, n_image_tokens, n_text_tokens, "
    "saev, cooccurrence, "
    "l0, l0_image, l0_text, l1, l1_image, l1_text, similarity, support, raw, random"
)


def test_a_column_that_cannot_rank(run):
    assert error_of(run, top="1", by="similarty", format="keys") == (
        f"the score table has no column 'similarty'; did you mean 'similarity'? {RANKS}"
    )
    assert error_of(run, top="1", by="beauty", format="keys") == f"the score table has no column 'beauty'; {RANKS}"
    assert (
        error_of(run, top="1", by="key", format="keys")
        == f"column 'key' of the score table is not a number (varchar); {RANKS}"
    )
    assert error_of(run, top="1", by="ok", format="keys").startswith(
        "column 'ok' of the score table is not a number (boolean);"
    )


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("width >", 'is not possible: syntax error at or near ")"'),
        (
            "beauty > 1",
            "names a column 'beauty' that the score table does not have; it has key, shard, row, offset, "
            "nbytes, ok, reason, uid, image_hash,",
        ),
        ("scores.beauty > 1", "names a column 'beauty' that the score table does not have; it has key, shard, row"),
        ("avg(width) > 1", "is not possible: Binder Error: WHERE clause cannot contain aggregates!"),
        ("true; DROP VIEW scores", 'is not possible: syntax error at or near ";"'),
        ("true); DROP VIEW scores; SELECT (1", "is not possible: Only SELECT statements can be serialized to json!"),
        ("true); SELECT (1", "is more than a condition; write what could follow WHERE, such as 'width >= 256 AND ok'"),
        ("1) LIMIT (1", "is more than a condition; write what could follow WHERE, such as 'width >= 256 AND ok'"),
        (
            "1) UNION SELECT (1",
            "is more than a condition; write what could follow WHERE, such as 'width >= 256 AND ok'",
        ),
        ("$secret", "is more than a condition; write what could follow WHERE, such as 'width >= 256 AND ok'"),
        (
            "key IN (SELECT key FROM scores)",
            "has a sub-query; only a condition over the columns of one row is possible",
        ),
        (" ", "is no condition; write what could follow WHERE, such as 'width >= 256 AND ok'"),
        ("COLUMNS(*) IS NOT NULL", "has a * for several columns; name each"),
        ("random() < 0.5", "uses random(), which is another number each time; the column 'random' is a seeded one"),
        (
            "EXISTS (FROM read_text('/etc/hostname'))",
            "has a sub-query; only a condition over the columns of one row is possible",
        ),
        (
            "key LIKE (FROM '/etc/hostname')",
            "has a sub-query; only a condition over the columns of one row is possible",
        ),
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

    from mmfilter.core.run.score_tables import ScoreTables

    database = ScoreTables(RunDirectory(run)).connect(locked=True)
    assert database.execute("SELECT count(*) FROM scores").fetchone() == (10,)
    for query in [
        "FROM read_text('/etc/hostname')",
        "COPY (SELECT 1) TO 'x.csv'",
        "SET lock_configuration = false",
        "ATTACH 'x.db'",
    ]:
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
    assert (
        refused("data/a.tar", format="tar") == "output 'data/a.tar' exists already; name a new file, or delete it first"
    )
    os.mkfifo(tmp_path / "pipe")
    assert refused("pipe") == "output 'pipe' is a device or a pipe; name a new folder"
    assert refused("pipe", format="tar") == "output 'pipe' is a device or a pipe; name a new file, or - for stdout"
    assert error_of(run, top="1", output="/") == "output '/' is not empty; name a new folder, or delete it first"
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
    add_table(
        run,
        "stdin",
        "-",
        [{"key": "a", "shard": "-", "row": 0, "offset": 0, "nbytes": 512, "ok": True, "similarity": 0.5}],
    )
    write_json(run / "manifest.json", {"inputs": [{"name": "stdin", "shard": "-"}]})
    message = (
        f"run {str(run)!r} was scored from stdin, so there is no shard to copy from; use --format keys or datacomp"
    )
    assert error_of(run, top="1", output=tmp_path / "best") == message
    assert keys_of(run, tmp_path, top="1") == ["a"]


def test_an_unfinished_run_says_so(run, tmp_path):
    manifest = json.loads((run / "manifest.json").read_text())
    write_json(run / "manifest.json", {"inputs": manifest["inputs"] + [{"name": "c", "shard": "/c.tar"}]})
    selection = select(run, SelectSettings(top="1", output=tmp_path / "best"))
    assert selection.warnings == ("shards of the run that are not scored yet and take no part: 1",)


def test_a_damaged_run(run, tmp_path):
    add_table(run, "b-0", "/b.tar", [{"key": "x", "row": 3, "ok": True, "similarity": 1.0}])
    assert (
        error_of(run, top="1", output=tmp_path / "best")
        == f"the score tables of run {str(run)!r} are not in row order; score the shards again"
    )
    add_table(run, "b-0", "/b.tar", [], rows=2)
    assert (
        error_of(run, top="1", format="keys")
        == f"the score tables of run {str(run)!r} hold 5 rows but say 7; score the shards again"
    )
    assert error_of(tmp_path, top="1", format="keys").startswith(
        f"{str(tmp_path)!r} is not a run: it has no manifest.json"
    )


def test_odd_paths_are_no_patterns(tmp_path):
    folder = tmp_path / "lr=3 *[x]?'"
    make_shard(folder / "a[1].tar", ["k0", "k1"])
    run = make_run(folder / "run", {str(folder / "a[1].tar"): [0.1, 0.9]})
    selection = select(run, SelectSettings(top="1", where="ok", output=folder / "best"))
    assert selection.kept == 1
    assert pq.read_table(folder / "best/selection.parquet").column("kept").to_pylist() == [False, True]
