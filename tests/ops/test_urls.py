"""`score` and `select` on inputs behind URLs, over the real protocols; what goes over the wire is counted by the servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmfilter.cli.app import main
from mmfilter.core.input import remote
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.errors import SelectionError, ShardError
from mmfilter.ops.score import score
from mmfilter.ops.score_settings import ScoreSettings
from mmfilter.ops.select import select
from tests import inputs
from tests.conftest import Quiet, good, write_tar
from tests.ops.test_metadata import write
from tests.runs import add_table, keys_of, make_run
from tests.servers import CUT, REPOSITORY, Log, http_server, hub_server, times


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "_PAUSES", (0.0, 0.0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def put(place: str, path: Path) -> str:
    url = f"s3://bucket/{place}"
    fsspec.filesystem("s3").put(str(path), url, recursive=path.is_dir())
    fsspec.filesystem("s3").invalidate_cache()
    return url


def shard(path: Path, n: int, first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tar(path, [member for i in range(first, first + n) for member in good(f"{i:09d}", i)])


def run_score(tiny, names, run: Path, progress=None, **settings):
    return score(names, ScoreSettings(model=tiny[0], run=run, **settings), progress or Quiet())


def scores_of(run: Path) -> list[tuple]:
    columns = ("key", "row", "ok", "similarity", "saev", "support", "caption_chars")
    return [
        tuple(row[name] for name in columns)
        for path in sorted((run / "scores").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def remote_run(run: Path, url: str, scores: list) -> Path:
    """A run over a tar at a URL, as `score` leaves it."""
    made = make_run(run, {url: scores})
    name = next((made / "scores").glob("*.parquet")).stem
    now = remote.ask(url, *(lambda filesystem, path: (filesystem.info, path))(*remote.filesystem_of(url)))
    add_table(
        made,
        name,
        url,
        pq.read_table(made / f"scores/{name}.parquet").to_pylist(),
        size=now["size"],
        etag=remote.tag_of(now),
    )
    return made


# --- S3 ---


def test_every_kind_of_input_has_the_same_scores_on_s3(s3: Log, tiny, tmp_path):
    found = inputs.pairs(9)
    kinds = {
        "tar": inputs.as_tar(tmp_path / "in/a.tar", found), "rows": inputs.as_parquet(tmp_path / "in/rows.parquet", found),
        "llava": inputs.as_llava(tmp_path / "in/data.json", found), "folder": inputs.as_folder(tmp_path / "in/folder", found),
    }  # fmt: skip
    run_score(tiny, [str(kinds["tar"])], tmp_path / "local")
    base = put("kinds", tmp_path / "in")
    for kind, path in kinds.items():
        url = f"{base}/{path.name}" + ("/" if kind == "folder" else "")
        settings = {"images": f"{base}/images"} if kind == "llava" else {}
        assert run_score(tiny, [url], tmp_path / kind, **settings).n_scored == 9
        select(tmp_path / kind, SelectSettings(top="4", output=tmp_path / f"best-{kind}"))
    want = scores_of(tmp_path / "local")
    assert all([row[:3] for row in scores_of(tmp_path / kind)] == [row[:3] for row in want] for kind in kinds)
    for kind in kinds:
        assert [row[3:] for row in scores_of(tmp_path / kind)] == [pytest.approx(row[3:], rel=1e-5) for row in want], (
            kind
        )
    select(tmp_path / "local", SelectSettings(top="4", output=tmp_path / "best-local"))
    assert (tmp_path / "best-tar/00000000.tar").read_bytes() == (tmp_path / "best-local/00000000.tar").read_bytes()
    images = {
        kind: fsspec.filesystem("tar", fo=str(tmp_path / f"best-{kind}/00000000.tar")).glob("*.jpg") for kind in kinds
    }
    assert len({tuple(names) for names in images.values()}) == 1 and len(images["tar"]) == 4


def test_scoring_goes_on_and_selecting_fetches_little(s3: Log, tiny, tmp_path):
    for number in range(2):
        shard(tmp_path / f"in/{number}.tar", 30, 30 * number)
    base = put("twice", tmp_path / "in")
    size = (tmp_path / "in/0.tar").stat().st_size
    assert run_score(tiny, [f"{base}/0.tar"], tmp_path / "run").n_shards == 1
    s3.clear()
    again = run_score(tiny, [f"{base}/*.tar"], tmp_path / "run")
    assert (again.n_skipped, again.n_shards, again.n_samples) == (1, 1, 60)
    assert s3.nbytes("0.tar") == 0 and s3.nbytes("1.tar") == (tmp_path / "in/1.tar").stat().st_size
    s3.clear()
    assert run_score(tiny, [f"{base}/{{0..1}}.tar"], tmp_path / "run").n_skipped == 2
    assert s3.nbytes() == 0, "only asked whether they have changed"
    tables = ScoreTables(RunDirectory(tmp_path / "run"))
    best = keys_of(tmp_path / "run", tmp_path, top="2")
    rows = {
        row["key"]: row
        for path in (tmp_path / "run/scores").glob("*.parquet")
        for row in pq.read_table(path).to_pylist()
    }
    s3.clear()
    select(tmp_path / "run", SelectSettings(top="2", output=tmp_path / "best"))
    needed = sum(rows[key]["nbytes"] for key in best)
    assert needed <= s3.nbytes() <= needed + remote_gap(), f"{s3.nbytes():,} bytes for {needed:,} of {2 * size:,}"
    assert tables.rows == 60


def remote_gap() -> int:
    """What may be read along between two samples."""
    from mmfilter.core.input.ranges import MAX_GAP

    return MAX_GAP


def test_few_of_many_samples_cost_few_bytes(s3: Log, tmp_path):
    """1,000 samples of some 7 MB, of which every hundredth is kept."""
    path = shard(tmp_path / "many.tar", 1000)
    run = remote_run(tmp_path / "run", put("many.tar", path), [1.0 if i % 100 == 0 else i / 1e6 for i in range(1000)])
    rows = pq.read_table(next((run / "scores").glob("*.parquet"))).to_pylist()[::100]
    s3.clear()
    select(run, SelectSettings(min=1.0, output=tmp_path / "best"))
    content = path.read_bytes()
    assert (tmp_path / "best/00000000.tar").read_bytes() == b"".join(
        content[row["offset"] : row["offset"] + row["nbytes"]] for row in rows
    ) + bytes(1024)
    assert s3.nbytes() == sum(row["nbytes"] for row in rows) < len(content) / 90
    assert len(s3.gets()) == 10


def test_a_changed_shard_is_refused_before_a_byte_is_copied(s3: Log, tmp_path):
    url = put("changing.tar", shard(tmp_path / "changing.tar", 12))
    run = remote_run(tmp_path / "run", url, [i / 12 for i in range(12)])
    put("changing.tar", shard(tmp_path / "other.tar", 12, 1))
    s3.clear()
    with pytest.raises(SelectionError) as caught:
        select(run, SelectSettings(top="3", output=tmp_path / "best"))
    assert (
        str(caught.value)
        == f"shard {url!r} has changed since it was scored, its byte ranges may be wrong; score it again"
    )
    assert not (tmp_path / "best").exists() and s3.nbytes() == 0
    fsspec.filesystem("s3").rm(url)
    with pytest.raises(SelectionError) as caught:
        select(run, SelectSettings(top="3", output=tmp_path / "best"))
    assert str(caught.value) == f"shard {url!r} does not exist; check the URL; put it back, or score the input again"


def test_a_shard_that_fails_leaves_the_others_finished(s3: Log, tiny, tmp_path):
    for number in range(3):
        shard(tmp_path / f"in/{number}.tar", 8, 8 * number)
    base = put("failing", tmp_path / "in")
    s3.fault = times(100, 501, "failing/1.tar")
    notes = Quiet()
    summary = run_score(tiny, [f"{base}/*.tar"], tmp_path / "run", notes)
    assert [error.shard for error in summary.failures] == [f"{base}/1.tar"] and summary.n_shards == 2
    assert notes.notes == [str(summary.failures[0])] and "cannot be read: the server answers 501" in notes.notes[0]
    assert sorted(path.name for path in (tmp_path / "run/scores").iterdir()) == ["0.parquet", "2.parquet"]
    s3.clear()
    again = run_score(tiny, [f"{base}/*.tar"], tmp_path / "run")
    assert (again.n_skipped, again.n_shards, again.n_scored) == (2, 1, 24)
    assert {request.path for request in s3.gets(".tar")} == {"/bucket/failing/1.tar"}


def test_a_transient_error_does_not_stop_a_selection(s3: Log, tmp_path):
    path = shard(tmp_path / "busy.tar", 12)
    run = remote_run(tmp_path / "run", put("busy.tar", path), [1.0] * 12)
    s3.fault = times(2, 503, "busy.tar")
    select(run, SelectSettings(top="100%", output=tmp_path / "best"))
    assert (tmp_path / "best/00000000.tar").read_bytes()[: path.stat().st_size // 2] == path.read_bytes()[
        : path.stat().st_size // 2
    ]


# --- columns of other files ---


def test_sidecars_on_s3(s3: Log, tmp_path):
    urls, first = {}, 0
    for number in range(3):
        url = put(f"sidecars/{number}.tar", shard(tmp_path / f"{number}.tar", 6, first))
        if number != 1:
            keys = [f"{i:09d}" for i in range(first, first + 6)]
            pq.write_table(
                pa.table({"key": keys[::-1], "stars": list(range(first, first + 6))[::-1], "status": ["success"] * 6}),
                tmp_path / "side.parquet",
            )
            put(f"sidecars/{number}.parquet", tmp_path / "side.parquet")
        urls[url], first = [0.5] * 6, first + 6
    run = make_run(tmp_path / "run", urls)
    assert keys_of(run, tmp_path, top="100%", where="stars % 5 = 0") == [f"{i:09d}" for i in (0, 5, 15)]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "tsv"])
def test_metadata_on_s3(s3: Log, tmp_path, kind):
    run = make_run(tmp_path / "run", {str(shard(tmp_path / "a.tar", 8)): [i / 8 for i in range(8)]})
    for part in range(2):
        rows = [{"key": f"{i:09d}", "stars": 10 * i} for i in range(4 * part, 4 * part + 4)]
        path = tmp_path / f"meta{part}.{kind}"
        write(path if kind != "tsv" else path.with_suffix(".csv"), rows)
        if kind == "tsv":
            path.write_text(path.with_suffix(".csv").read_text().replace(",", "\t"))
        put(f"meta-{kind}/{part}.{kind}", path)
    named = (f"s3://bucket/meta-{kind}/*.{kind}",)
    assert keys_of(run, tmp_path, top="100%", where="stars >= 30 AND stars < 60", metadata=named) == [
        "000000003",
        "000000004",
        "000000005",
    ]
    assert ScoreTables(RunDirectory(run), named).column("stars").values.tolist() == [10 * i for i in range(8)]


def test_of_metadata_only_the_columns_that_are_named_are_fetched(s3: Log, tmp_path):
    run = make_run(tmp_path / "run", {str(shard(tmp_path / "a.tar", 8)): [i / 8 for i in range(8)]})
    n = 40_000
    table = pa.table(
        {
            "key": [f"{i:09d}" for i in range(n)],
            "stars": list(range(n)),
            "url": [f"http://host{i * 7919 % 10007}/{i * 104729:x}" * 4 for i in range(n)],
        }
    )
    pq.write_table(table, tmp_path / "meta.parquet", row_group_size=10_000, compression="none", use_dictionary=False)
    url = put("meta.parquet", tmp_path / "meta.parquet")
    about = pq.read_metadata(tmp_path / "meta.parquet")
    wanted = sum(about.row_group(i).column(j).total_compressed_size for i in range(4) for j in (0, 1))
    s3.clear()
    assert ScoreTables(RunDirectory(run), (url,)).column("stars").values.tolist() == list(range(8))
    size = (tmp_path / "meta.parquet").stat().st_size
    assert s3.nbytes("meta.parquet") < wanted + 200_000 < size / 3, f"{s3.nbytes('meta.parquet'):,} of {size:,}"
    assert sum(request.method == "HEAD" for request in s3.requests) <= 2


@pytest.mark.parametrize("ranges", [True, False])
def test_metadata_and_sidecars_on_web_servers(tmp_path, ranges):
    path = shard(tmp_path / "a.tar", 6)
    table, side = tmp_path / "meta.parquet", tmp_path / "a.parquet"
    pq.write_table(pa.table({"key": [f"{i:09d}" for i in range(6)], "stars": list(range(6))}), table)
    pq.write_table(pa.table({"key": [f"{i:09d}" for i in range(6)], "moons": [i % 2 for i in range(6)]}), side)
    with http_server(
        {"/m.parquet": table.read_bytes(), "/a.tar": path.read_bytes(), "/a.parquet": side.read_bytes()}, ranges=ranges
    ) as web:
        run = make_run(tmp_path / "run", {f"{web.url}/a.tar": [0.5] * 6})
        found = keys_of(
            run,
            tmp_path,
            top="100%",
            where="stars > 2 AND moons = 1",
            metadata=(f"{web.url}/m.parquet?sign=1*2".split("?")[0],),
        )
    assert found == ["000000003", "000000005"]


def test_metadata_that_cannot_be_had(s3: Log, tmp_path):
    run = make_run(tmp_path / "run", {str(shard(tmp_path / "a.tar", 2)): [0.1, 0.2]})

    def error_of(name: str) -> str:
        with pytest.raises(SelectionError) as caught:
            select(
                run,
                SelectSettings(top="1", where="stars > 1", metadata=(name,), format="keys", output=tmp_path / "keys"),
            )
        assert "\n" not in str(caught.value) and not (tmp_path / "keys").exists()
        return str(caught.value)

    assert (
        error_of("s3://bucket/none/*.parquet")
        == "--metadata 's3://bucket/none/*.parquet' matches no file; check the path"
    )
    assert error_of("s3://bucket/none.parquet") == "--metadata 's3://bucket/none.parquet' does not exist; check the URL"
    said = "is in a bucket that does not exist; check its name, and AWS_ENDPOINT_URL_S3 where the store is not Amazon's"
    assert error_of("s3://nobucket/none.parquet") == f"--metadata 's3://nobucket/none.parquet' {said}"
    assert (
        error_of("foo://a.parquet")
        == "--metadata 'foo://a.parquet' has a protocol that fsspec does not know, 'foo'; it knows s3, gs, https, hf and others"
    )
    (tmp_path / "bad.parquet").write_text("no parquet, as long as it may be")
    url = put("bad.parquet", tmp_path / "bad.parquet")
    assert error_of(url).startswith(
        f"--metadata {url!r} cannot be read: Invalid Input Error: No magic bytes found at end of file"
    )
    s3.fault = times(100, 501, "bad.parquet")
    assert error_of(url).startswith(f"--metadata {url!r}: {url!r} cannot be read: the server answers 501 (")


# --- plain HTTP ---


def test_scoring_and_selecting_from_web_servers(tiny, tmp_path):
    path = shard(tmp_path / "a.tar", 12)
    for ranges in (True, False):
        with http_server({"/a.tar": path.read_bytes()}, ranges=ranges) as web:
            run = tmp_path / f"run-{ranges}"
            assert run_score(tiny, [f"{web.url}/a.tar"], run).n_scored == 12
            web.clear()
            if ranges:
                select(run, SelectSettings(top="1", output=tmp_path / "best"))
                assert web.nbytes() < path.stat().st_size / 4
                continue
            with pytest.raises(ShardError) as caught:
                select(run, SelectSettings(top="1", output=tmp_path / "none"))
            said = (
                "comes from a server that gives whole files only, no byte ranges; download it, and score the local file"
            )
            assert str(caught.value) == f"shard '{web.url}/a.tar' {said}"
            assert not (tmp_path / "none").exists()


def test_a_server_that_stops_in_the_middle_leaves_nothing(tiny, tmp_path):
    path = shard(tmp_path / "a.tar", 12)
    with http_server({"/a.tar": path.read_bytes(), "/b.tar": path.read_bytes()}) as web:
        web.fault = times(100, CUT, "/b.tar")
        summary = run_score(tiny, [f"{web.url}/a.tar", f"{web.url}/b.tar"], tmp_path / "run")
        assert [error.shard for error in summary.failures] == [f"{web.url}/b.tar"]
        assert str(summary.failures[0]).startswith(
            f"shard '{web.url}/b.tar' cannot be read: ClientPayloadError: Response payload is not completed"
        )
        assert [path.name for path in (tmp_path / "run/scores").iterdir()] == ["a.parquet"]
        web.fault = times(100, CUT, "/a.tar")
        with pytest.raises(ShardError) as caught:
            select(tmp_path / "run", SelectSettings(top="5", output=tmp_path / "best"))
        assert str(caught.value).startswith(f"shard '{web.url}/a.tar' cannot be read: ClientPayloadError")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "run"]
    assert json.loads((tmp_path / "run/manifest.json").read_text())["inputs"]


def test_what_cannot_be_reached_leaves_no_run(s3: Log, tmp_path, capsys):
    for url, said in (
        ("s3://bucket/none.tar", "does not exist; check the URL"),
        ("s3://bucket/none/", "is a folder without images (jpg, jpeg, png, webp)"),
    ):
        assert main(["score", url, "--run", str(tmp_path / "run")]) == 1
        assert capsys.readouterr().err == f"mmfilter: shard {url.rstrip('/')!r} {said}\n"
    assert not (tmp_path / "run").exists()


def test_scoring_and_selecting_from_the_hub(tmp_path):
    """In processes of their own: the hub's client reads its settings when it is imported."""
    shards = [shard(tmp_path / f"data/{i}.tar", 40, 40 * i) for i in range(2)]
    with hub_server({f"train/{path.name}": path.read_bytes() for path in shards}) as log:
        hub = {
            "HF_ENDPOINT": log.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "127.0.0.1",
        }

        def mmfilter(*argv: str, **more: str) -> tuple[int, str]:
            command = [sys.executable, "-m", "mmfilter", *argv]
            done = subprocess.run(command, cwd=tmp_path, env=os.environ | hub | more, capture_output=True, text=True)
            return done.returncode, done.stderr

        url = f"hf://datasets/{REPOSITORY}/train"
        assert mmfilter("score", f"{url}/*.tar", "--run", "run")[0] == 0
        assert log.nbytes(".tar") == sum(path.stat().st_size for path in shards)
        log.clear()
        assert "0 gone through" in mmfilter("score", f"{url}/*.tar", "--run", "run")[1] and log.nbytes(".tar") == 0
        assert mmfilter("select", "run", "--top", "3", "-o", "best")[0] == 0
        assert (
            mmfilter("score", *map(str, shards), "--run", "local")[0]
            == mmfilter("select", "local", "--top", "3", "-o", "same")[0]
            == 0
        )
        assert (tmp_path / "best/00000000.tar").read_bytes() == (tmp_path / "same/00000000.tar").read_bytes()
        assert 0 < log.nbytes(".tar") <= (tmp_path / "best/00000000.tar").stat().st_size + remote_gap()
        said = {
            f"{url}/9.tar": f"mmfilter: shard '{url}/9.tar' does not exist; check the URL\n",
            "hf://datasets/owner/none/9.tar": "mmfilter: shard 'hf://datasets/owner/none/9.tar' does not exist; check the URL\n",
        }
        assert {name: mmfilter("score", name, "--run", "none") for name in said} == {
            name: (1, line) for name, line in said.items()
        }
        offline = f"mmfilter: shard '{url}/0.tar' cannot be read: HF_HUB_OFFLINE says to stay offline; unset it\n"
        assert mmfilter("score", f"{url}/0.tar", "--run", "none", HF_HUB_OFFLINE="1") == (1, offline)
        assert not (tmp_path / "none").exists()
