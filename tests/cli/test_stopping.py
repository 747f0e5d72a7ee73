"""Real signals to real commands: nothing half written, one line, and the same command again gives the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmfilter.cli.app import main
from mmfilter.cli.stopping import Stopped, stopping
from mmfilter.core.files import write_json
from mmfilter.core.run.tables import TableWriter, score_table
from mmfilter.core.scores.registry import SCORES
from tests.codes import clustered, write_run
from tests.conftest import good, write_tar
from tests.runs import make_run

COMMAND = """import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from mmfilter.cli.app import main
sys.exit(main())"""
"""Also where the tests run in the background of a shell, or under nohup, which have their children ignore these signals"""

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
ATTEMPTS = 10
"""A command that is done before the signal comes is started anew"""


def line(number: signal.Signals) -> str:
    return f"mmfilter: {WORDS[number]}; what is finished is kept and nothing is half written: the same command goes on from there\n"


def start(here: Path, *argv: str, **streams) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", COMMAND, *argv], cwd=here, stderr=subprocess.PIPE, **streams)


def stop(
    here: Path, argv: list[str], number: signal.Signals, at_work: Callable[[], bool], clean: Callable[[], None]
) -> None:
    """Send the signal once the command is at work; checks its exit code and what it says last."""
    for _ in range(ATTEMPTS):
        with start(here, *argv) as process:
            while process.poll() is None and not at_work():
                time.sleep(0.0005)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        if process.returncode != 0:
            assert (process.returncode, said.decode().splitlines(True)[-1]) == (128 + number, line(number))
            assert b"Traceback" not in said
            return
        clean()
    pytest.fail(f"{argv} was done before the signal {ATTEMPTS} times")


def contents(path: Path) -> dict[str, bytes] | bytes:
    if path.is_file():
        return path.read_bytes()
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pairs, which selections repeat until writing takes a while."""
    folder = tmp_path_factory.mktemp("few")
    shard = write_tar(folder / "few.tar", [member for i in range(20) for member in good(f"{i:09d}", i)])
    return make_run(folder / "run", {str(shard): [{"similarity": i / 20, "uid": f"{i:032x}"} for i in range(20)]})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "copies", "options"),
    [
        ("best", 150, ["--shard-size", "500"]),
        ("best", 150, ["--format", "parquet"]),
        ("best", 150, ["--format", "hf", "--shard-size", "500"]),
        ("best", 150, ["--format", "llava-json"]),
        ("best.tar", 150, ["--format", "tar"]),
        ("best.txt", 1000, ["--format", "keys"]),
        ("best.npy", 1000, ["--format", "datacomp"]),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else None,
)
def test_a_selection_is_whole_or_not_there(run, tmp_path, monkeypatch, name, copies, options):
    (tmp_path / "stopped").mkdir()
    (tmp_path / "whole").mkdir()
    here = tmp_path / "stopped"
    argv = ["select", str(run), "--top", "100%", "--repeat", str(copies), *options, "-o", name]

    def at_work() -> bool:
        found = next(here.glob(f".{name}.*.tmp"), None)
        return found is not None and (found.is_file() or any(found.iterdir()))

    for number in (signal.SIGINT, signal.SIGTERM):
        stop(here, argv, number, at_work, lambda: remove(here / name))
        assert list(here.iterdir()) == []
    monkeypatch.chdir(here)
    assert main(argv) == 0
    monkeypatch.chdir(tmp_path / "whole")
    assert main(argv) == 0
    assert [path.name for path in here.iterdir()] == [name]
    assert contents(here / name) == contents(tmp_path / "whole" / name)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("form", ["tar", "keys", "datacomp"])
def test_a_stream_ends_with_the_exit_code(run, tmp_path, form, number):
    """Nobody reads on, so that the command waits in the middle of writing."""
    with start(
        tmp_path, "select", str(run), "--top", "100%", "--repeat", "1000", "--format", form, stdout=subprocess.PIPE
    ) as process:
        first = process.stdout.read(1)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert process.stderr.read().decode() == line(number)
        assert 0 < len(first + process.stdout.read()) <= 1 << 20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_score_keeps_what_is_finished_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", [member for j in range(5 if i == 0 else 30) for member in good(f"{j}", j)])
    argv = ["score", "0.tar", "1.tar", "--run", "run", "--batch-size", "1"]
    tables = tmp_path / "run/scores"
    stop(tmp_path, argv, signal.SIGINT, (tables / "0.parquet").exists, lambda: shutil.rmtree("run"))
    assert [path.name for path in tables.iterdir()] == ["0.parquet"]
    finished = contents(tables)
    stop(tmp_path, argv, signal.SIGTERM, lambda: any(tables.glob(".1.*.tmp")), lambda: shutil.rmtree("run"))
    assert contents(tables) == finished
    assert main(argv) == 0
    assert main([{"run": "whole"}.get(word, word) for word in argv]) == 0
    for folder in ("scores", "codes"):
        assert contents(tmp_path / "run" / folder) == contents(tmp_path / "whole" / folder)


@pytest.mark.slow
def test_dedup_is_done_or_not(tmp_path):
    argv = ["dedup", "run"]
    whole = write_run(tmp_path / "elsewhere/run", clustered(3000, seed=1))
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = contents(run)

    def again() -> None:
        shutil.rmtree(run)
        shutil.copytree(whole, run)

    stop(
        tmp_path,
        argv,
        signal.SIGINT,
        lambda: any(path.name not in before and ".tmp" in path.name for path in run.iterdir()),
        again,
    )
    assert {name: content for name, content in contents(run).items() if name in before} == before
    assert not [path.name for path in run.rglob("*.tmp")]
    for folder in (tmp_path, whole.parent):
        subprocess.run([sys.executable, "-m", "mmfilter", *argv], cwd=folder, check=True, capture_output=True)
    assert contents(run / "dedup.parquet") == contents(whole / "dedup.parquet")


@pytest.mark.slow
def test_a_recipe_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "a.tar", [member for j in range(10) for member in good(f"{j}", j)])
    assert main(["init", "a.tar"]) == 0
    argv = [
        "run",
        "recipe.yaml",
        "--set",
        "select.repeat='200'",
        "--set",
        "select.top=100%",
        "--set",
        "outputs.0.format=llava-json",
    ]
    stop(tmp_path, argv, signal.SIGTERM, lambda: any(tmp_path.glob(".best.*.tmp/*")), lambda: shutil.rmtree("best"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "mmfilter-run", "recipe.yaml"]
    capfd.readouterr()
    assert main(argv) == 0
    said = capfd.readouterr().err.splitlines()
    assert said[0] == f"score   finished before: 10 of 10 samples have scores -> {tmp_path}/mmfilter-run"
    assert len(contents(tmp_path / "best/images")) == 2000
    assert main(argv) == 0
    assert capfd.readouterr().err.splitlines()[-1] == f"select  finished before: {tmp_path}/best (llava-json)"


@pytest.mark.slow
def test_what_a_library_makes_of_a_signal_is_still_one_line(tmp_path):
    """DuckDB ends a query with an error of its own."""
    rows = [{"key": f"{i}", "shard": "/gone.tar", "row": i, "ok": True, "similarity": 0.5} for i in range(40_000)]
    writer = TableWriter(tmp_path / "run/scores/gone.parquet", score_table(SCORES))
    writer.write(rows)
    writer.finish({"kind": "scores", "shard": "/gone.tar", "name": "gone", "rows": len(rows)})
    write_json(tmp_path / "run/manifest.json", {"inputs": [{"name": "gone", "shard": "/gone.tar"}]})
    slow = "list_sum(list_transform(range(3000), lambda x: sin(x + row)))"
    with start(tmp_path, "select", "run", "--top", "100%", "--by", slow, "--format", "keys") as process:
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said.decode()) == (130, line(signal.SIGINT))


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def test_two_signals_at_once_are_one_wish(monkeypatch):
    with stopping() as stop:
        with pytest.raises(Stopped):
            send(signal.SIGTERM)
        send(signal.SIGTERM)  # the terminal and a parent both sent it: tidying up goes on
        assert (stop.exit_code, stop.word) == (143, "terminated")
        monkeypatch.setattr("mmfilter.cli.stopping._ONE_WISH", 0)
        with pytest.raises(Stopped):
            send(signal.SIGHUP)


def test_handlers_are_those_from_before_afterwards():
    before = [signal.getsignal(number) for number in WORDS]
    with stopping():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in WORDS] == before


def test_a_signal_that_is_to_be_ignored_is(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stopping() as stop:
            send(signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)
