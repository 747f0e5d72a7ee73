"""The command line through `main`: exit codes, the exact words of errors, stdout for data only."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mmfilter.cli.app import command_paths, main
from mmfilter.cli.select_command import check_terminal
from mmfilter.core.selection.select_settings import SelectSettings
from tests import inputs
from tests.conftest import good, write_tar

ROOT = Path(__file__).parents[2]
COMMANDS = list(command_paths())


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """A run over two shards of 12 samples, one of them bad."""
    folder = tmp_path_factory.mktemp("scored")
    (folder / "source").mkdir()
    for i in range(2):
        members = [member for j in range(12) for member in good(f"{12 * i + j:09d}", 12 * i + j)]
        write_tar(
            folder / "source" / f"0000{i}.tar", [*members, ("zz.jpg", b"no image"), ("zz.txt", b"x")] if i else members
        )
    assert main(["score", f"{folder}/source/*.tar", "--run", f"{folder}/run", "--json"]) == 0
    return folder


def test_score_reports_json_on_stdout_and_nothing_else(scored, capsys):
    assert main(["score", f"{scored}/source/*.tar", "--run", f"{scored}/again", "--json"]) == 0
    out = capsys.readouterr().out
    report = json.loads(out)
    assert (report["samples"], report["scored"], report["shards"], report["skipped_shards"]) == (25, 24, 2, 0)
    assert report["bad"] == {"image cannot be decoded": 1}
    values = [
        row["similarity"]
        for i in range(2)
        for row in pq.read_table(scored / "run" / "scores" / f"0000{i}.parquet").to_pylist()
        if row["ok"]
    ]
    assert report["scores"]["similarity"]["n"] == 24
    assert report["scores"]["similarity"]["max"] == pytest.approx(max(values))
    assert report["scores"]["similarity"]["mean"] == pytest.approx(sum(values) / 24, abs=1e-6)


def test_score_prints_a_summary_on_stderr(scored, capsys):
    assert main(["score", f"{scored}/source/*.tar", "--run", f"{scored}/again2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        "24 of 25 samples have scores; 25 gone through in " in captured.err
        and "1 without a score: image cannot be decoded" in captured.err
    )
    assert "similarity" in captured.err and "█" in captured.err


def test_a_finished_run_is_left_alone(scored, capsys):
    assert main(["score", f"{scored}/source/*.tar", "--run", f"{scored}/run"]) == 0
    assert "2 finished before" in capsys.readouterr().err


def test_too_many_bad_samples_exit_1_with_the_tables_kept(scored, capfd):
    assert main(["score", f"{scored}/source/00001.tar", "--run", f"{scored}/strict", "--max-bad", "5%"]) == 1
    assert "7.7% of the samples have no score, more than --max-bad 5% allows" in capfd.readouterr().err
    assert (
        main(["score", f"{scored}/source/00001.tar", "--run", f"{scored}/strict", "--max-bad", "5%"]) == 1
    )  # nor when it is found finished
    assert (scored / "strict" / "scores" / "00001.parquet").exists()
    assert main(["select", f"{scored}/strict", "--top", "3", "--format", "keys"]) == 0


def test_keys_on_stdout_funnel_on_stderr(scored, capfd):
    assert main(["select", f"{scored}/run", "--top", "20%", "--format", "keys"]) == 0
    out, err = capfd.readouterr()
    rows = [row for i in range(2) for row in pq.read_table(scored / "run" / "scores" / f"0000{i}.parquet").to_pylist()]
    best = sorted((row for row in rows if row["ok"]), key=lambda row: (-row["similarity"], row["key"]))[:5]
    assert out.split() == sorted(row["key"] for row in best)  # 20 % of 25 rows, in source order
    assert [line.split()[0] for line in err.splitlines()] == ["25", "24", "5"]


def test_a_tar_stream_on_stdout(scored, capfdbinary):
    assert main(["select", f"{scored}/run", "--top", "3", "-o", "-"]) == 0
    with tarfile.open(fileobj=io.BytesIO(capfdbinary.readouterr().out)) as tar:
        assert len({name.split(".")[0] for name in tar.getnames()}) == 3


def test_shards_in_a_directory(scored, tmp_path):
    assert main(["select", f"{scored}/run", "--min", "-1", "-o", f"{tmp_path}/best", "--shard-size", "10"]) == 0
    assert sorted(path.name for path in (tmp_path / "best").glob("*.tar")) == [
        "00000000.tar",
        "00000001.tar",
        "00000002.tar",
    ]
    assert json.loads((tmp_path / "best" / "sizes.json").read_text()) == {
        "00000000.tar": 10,
        "00000001.tar": 10,
        "00000002.tar": 4,
    }


@pytest.mark.parametrize("form", ["parquet", "hf", "llava-json", "datacomp"])
def test_other_formats_in_a_directory(scored, tmp_path, form):
    made = {
        "parquet": "data/00000002.parquet",
        "hf": "data/train-00002-of-00003.parquet",
        "llava-json": "images/00000002",
        "datacomp": "sample_ids.npy",
    }
    assert (
        main(
            ["select", f"{scored}/run", "--min", "-1", "-o", f"{tmp_path}/best", "--shard-size", "10", "--format", form]
        )
        == 0
    )
    assert (tmp_path / "best" / made[form]).exists()
    assert json.loads((tmp_path / "best/manifest.json").read_text())["settings"]["format"] == form
    assert pq.read_table(tmp_path / "best/selection.parquet")["kept"].to_pylist().count(True) == 24


EXPLAINED = {
    "missing shard": (["score", "nowhere.tar"], "nowhere.tar"),
    "no match": (["score", "nowhere/*.tar"], "nowhere/*.tar"),
    "pipe": (["score", "pipe:cat x.tar"], "would run a shell"),
    "no card": (
        ["score", "{source}/00000.tar", "--model", "huge"],
        "for a folder or hub id give --layer and --sae as well",
    ),
    "no SAE": (
        ["score", "{source}/00000.tar", "--sae", "nowhere"],
        "SAE 'nowhere' is not there; expected a folder, a file, hf:OWNER/REPO/FOLDER",
    ),
    "no GPU": (["score", "{source}/00000.tar", "--device", "cuda:7"], "device 'cuda:7' was asked for"),
    "run among shards": (["score", "{source}/00000.tar", "--run", "{source}"], "is the folder of shard"),
    "batch": (["score", "{source}/00000.tar", "--batch-size", "0"], "--batch-size is 0; at least 1 is needed"),
    "no run": (
        ["select", "nowhere", "--top", "5", "-o", "x"],
        "'nowhere' is not a run: it has no manifest.json; make one with: mmfilter score SHARDS --run nowhere",
    ),
    "no column": (["select", "{run}", "--top", "5", "--by", "beauty", "-o", "x"], "no column 'beauty'"),
    "nothing asked": (["select", "{run}", "-o", "x"], "give --top 20%, --top 5000 or --min 0.3"),
    "source folder": (["select", "{run}", "--top", "5", "-o", "{source}"], "holds shards of the input"),
    "run folder": (["select", "{run}", "--top", "5", "-o", "{run}/best"], "is in the run directory"),
}


@pytest.mark.parametrize("case", EXPLAINED)
def test_what_cannot_be_done_is_one_line_and_exit_1(scored, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    arguments, words = EXPLAINED[case]
    arguments = [part.format(source=scored / "source", run=scored / "run") for part in arguments]
    if arguments[0] == "score" and "--run" not in arguments:
        arguments += ["--run", str(tmp_path / "run")]
    if "cuda:7" in arguments and __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("mmfilter: ") and words in err and err.count("\n") == 1


USAGE = {
    "unknown option": ["score", "x.tar", "--wrong"],
    "no shards": ["score"],
    "share": ["score", "x.tar", "--max-bad", "lots"],
    "text context": ["score", "x.tar", "--text-context", "both"],
    "format": ["select", "--top", "5", "--format", "zip"],
    "shards to stdout": ["select", "--top", "5", "--format", "shards"],
    "tables to stdout": ["select", "--top", "5", "--format", "parquet", "-o", "-"],
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_exits_2(case, capsys):
    assert main(USAGE[case]) == 2
    assert "Usage: mmfilter" in capsys.readouterr().err


def test_a_tar_is_not_poured_into_a_terminal():
    def check(is_terminal: bool, **settings) -> None:
        check_terminal(SelectSettings(top="5", **settings), is_terminal=is_terminal)

    with pytest.raises(Exception, match="say where to"):
        check(True)
    with pytest.raises(
        Exception, match=r"say where to: -o subset\.npy, or -o DIR for the subset file with a table of all decisions"
    ):
        check(True, format="datacomp")
    check(False, format="datacomp")
    check(True, format="keys")
    check(False)
    check(True, output="best")


@pytest.mark.parametrize(
    ("output", "form", "meant"),
    [
        (None, None, ("tar", None)),
        ("-", None, ("tar", None)),
        ("best", None, ("shards", "best")),
        ("a", "keys", ("keys", "a")),
    ],
)
def test_what_is_written_where_nothing_is_said(output, form, meant):
    settings = SelectSettings(top="5", output=output, format=form)
    assert (settings.format, settings.output) == meant


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "said"),
    [("tar", "say where to: -o DIR for shards, or pipe the tar stream into a consumer"), ("datacomp", "-o subset.npy")],
)
def test_a_real_terminal_gets_nothing(form, said, tmp_path):
    screen, terminal = os.openpty()
    try:
        command = [sys.executable, "-m", "mmfilter", "select", f"{tmp_path}", "--top", "1", "--format", form]
        done = subprocess.run(command, stdout=terminal, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2 and said in " ".join(done.stderr.split())
        os.set_blocking(screen, False)
        with pytest.raises(BlockingIOError):
            os.read(screen, 1)
    finally:
        os.close(screen)
        os.close(terminal)


@pytest.mark.slow
def test_stdin_is_scored_as_it_streams(scored):
    shard = (scored / "source" / "00000.tar").read_bytes()
    command = [sys.executable, "-m", "mmfilter", "score", "-", "--run", f"{scored}/piped", "--json"]
    done = subprocess.run(command, input=shard, capture_output=True, check=True)
    assert json.loads(done.stdout)["scored"] == 12
    direct = pq.read_table(scored / "run" / "scores" / "00000.parquet").drop(["shard"])
    assert pq.read_table(scored / "piped" / "scores" / "stdin.parquet").drop(["shard"]) == direct


@pytest.mark.slow
def test_stdin_also_fits_weights(scored):
    shard = (scored / "source" / "00000.tar").read_bytes()
    command = [sys.executable, "-m", "mmfilter", "score", "--prompt", "<s><image> {caption}", "--json", "--run"]
    subprocess.run([*command, f"{scored}/fit-piped", "-"], input=shard, capture_output=True, check=True)
    subprocess.run([*command, f"{scored}/fit", f"{scored}/source/00000.tar"], capture_output=True, check=True)
    piped, direct = (
        json.loads((scored / name / "manifest.json").read_text())["weights"] for name in ("fit-piped", "fit")
    )
    assert piped["hash"] == direct["hash"] and piped["n_samples"] == 12


BROKEN = {
    "in a payload": (lambda content: content[:5000], "truncated"),
    "at a member boundary": (lambda content: content[: content.index(b"000000003.jpg")], "truncated"),
    "in a header": (lambda content: content[: content.index(b"000000003.jpg") + 100], "truncated"),
    "empty file": (lambda _: b"", "0 bytes"),
    "no tar": (lambda _: b"hello world " * 900, "tar"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_shard_is_named_and_the_others_are_kept(scored, tmp_path, capsys, case):
    cut, words = BROKEN[case]
    (tmp_path / "a.tar").write_bytes((scored / "source" / "00000.tar").read_bytes())
    (tmp_path / "b.tar").write_bytes(cut((scored / "source" / "00000.tar").read_bytes()))
    assert main(["score", f"{tmp_path}/a.tar", f"{tmp_path}/b.tar", "--run", f"{tmp_path}/run"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "1 of 2 shards could not be read to their end" in last and "b.tar" in last and words in last
    assert "byte" in last or case == "no tar"
    assert [path.name for path in (tmp_path / "run" / "scores").iterdir()] == ["a.parquet"]
    (tmp_path / "b.tar").write_bytes((scored / "source" / "00001.tar").read_bytes())
    assert main(["score", f"{tmp_path}/a.tar", f"{tmp_path}/b.tar", "--run", f"{tmp_path}/run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["shards"], report["skipped_shards"]) == (1, 1)


def test_an_empty_tar_has_nothing_to_score(tmp_path, capsys):
    shard = write_tar(tmp_path / "a.tar", [])
    assert main(["score", str(shard), "--run", f"{tmp_path}/run"]) == 1
    assert "the shards hold no samples: nothing to score" in capsys.readouterr().err


def test_an_unordered_tar_says_how_to_sort_it(tmp_path, capsys):
    members = [member for i in range(4) for member in good(f"{i}", i)]
    shard = write_tar(tmp_path / "a.tar", sorted(members, key=lambda member: member[0].split(".")[1]))
    assert main(["score", str(shard), "--run", f"{tmp_path}/run"]) == 1
    rows = pq.read_table(tmp_path / "run" / "scores" / "a.parquet").to_pylist()
    assert len(rows) == 12 and not any(row["ok"] for row in rows)
    assert any("--sort=name" in row["reason"] for row in rows)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_an_example_and_a_place_in_the_readme(command, capsys):
    assert main([*command, "--help"]) == 0
    said, words = capsys.readouterr().out, f"mmfilter {' '.join(command)}"
    assert re.search(rf"Example: {words}\s", said)
    assert re.search(rf"{words}\b", (ROOT / "README.md").read_text("utf-8"))


def test_the_command_reference_is_up_to_date():
    subprocess.run([sys.executable, ROOT / "docs" / "make_reference.py", "--check"], check=True)


@pytest.mark.parametrize("argv", [["--help"], ["score", "--help"], ["select", "--help"], ["check", "--help"]])
def test_help_imports_nothing_heavy(argv):
    script = f"import sys; from mmfilter.cli.app import main; main({argv!r}); print([m for m in ('torch', 'transformers', 'pyarrow', 'duckdb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_version(capsys):
    from mmfilter import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmfilter {__version__}\n"


# --- other inputs ---


def test_llava_json_and_a_metadata_file(tmp_path, capfd):
    found = inputs.pairs(6)
    inputs.as_llava(tmp_path / "llava/data.json", found)
    command = [
        "score",
        f"{tmp_path}/llava/data.json",
        "--images",
        f"{tmp_path}/llava/images",
        "--run",
        f"{tmp_path}/run",
    ]
    assert main(command) == 0
    (tmp_path / "more.csv").write_text("key,stars\n" + "".join(f"{key},{i}\n" for i, (key, *_) in enumerate(found)))
    capfd.readouterr()
    assert (
        main(
            [
                "select",
                f"{tmp_path}/run",
                "--top",
                "100%",
                "--metadata",
                f"{tmp_path}/more.csv",
                "--where",
                "stars > 3",
                "--format",
                "keys",
            ]
        )
        == 0
    )
    assert capfd.readouterr().out.split() == ["000000004", "000000005"]
    assert (
        main(
            [
                "select",
                f"{tmp_path}/run",
                "--top",
                "2",
                "--by",
                "stars",
                "--metadata",
                f"{tmp_path}/more.csv",
                "-o",
                f"{tmp_path}/best",
            ]
        )
        == 0
    )
    with tarfile.open(tmp_path / "best/00000000.tar") as tar:
        assert tar.getnames() == ["000000004.json", "000000004.jpg", "000000005.json", "000000005.jpg"]
    assert main([*command[:3], f"{tmp_path}/elsewhere", *command[4:]]) == 1
    assert "was made with other settings (images was " in capfd.readouterr().err


def test_a_command_as_input(scored, tmp_path, capfd):
    shard = f"pipe:cat {scored}/source/00000.tar"
    assert main(["score", shard, "--allow-pipe", "--run", f"{tmp_path}/run"]) == 0
    capfd.readouterr()
    assert main(["score", "pipe:echo no luck >&2; exit 3", "--allow-pipe", "--run", f"{tmp_path}/failed"]) == 1
    [said, error] = capfd.readouterr().err.splitlines()[-2:]
    assert "failed with exit status 3 (no luck)" in error and "Traceback" not in said
    assert main(["check", shard, "--run", "x"]) == 2
    assert main(["check", shard]) == 1
    assert "or allow it with --allow-pipe" in capfd.readouterr().err
