"""`dedup`, `search` and `select --dedup` through `main`: what goes where, exit codes, words, and no torch."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmfilter.cli.app import main
from mmfilter.core.pages.gallery import thumbnail
from tests.codes import clustered, greedy, write_run
from tests.conftest import caption, picture
from tests.inputs import Pair, as_folder

SAMPLES = [dataclasses.replace(sample, key=f"{i:05d}") for i, sample in enumerate(clustered(300, seed=30))]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("dedup") / "run", SAMPLES)


def test_a_summary_on_stderr_and_nothing_on_stdout(run, capsys):
    assert main(["dedup", str(run), "--threshold", "0.9"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    scored = sum(sample.score is not None for sample in SAMPLES)
    kept = sum(value is None for value in greedy(SAMPLES, "both", 0.9).values())
    numbers = [int(line.split()[0]) for line in err.splitlines()[:4]]
    assert (numbers[0], numbers[1], numbers[3]) == (300, scored, kept)
    assert "without exact duplicates (same image and text)" in err and "without near-duplicates at 0.9" in err
    assert f"every sample held against every other -> {run}/dedup.parquet" in err


def test_json_and_borderline_pairs_on_stdout(run, capsys):
    assert main(["dedup", str(run), "--threshold", "0.9", "--borderline", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["samples"] == 300
        and report["kept"] == report["scored"] - report["exact_duplicates"] - report["near_duplicates"]
    )
    assert main(["dedup", str(run), "--threshold", "0.9", "--borderline", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "similarity",
        "image",
        "text",
        "key",
        "other",
        "key",
        "caption",
        "other",
        "caption",
        "shard",
        "other",
        "shard",
    ]
    assert [line.split()[0] for line in lines[1:]] == [
        f"{pair['similarity']:.4f}" for pair in report["borderline"]
    ] and len(lines) == 4


def test_a_search_is_a_table_or_json_on_stdout(run, capsys):
    arguments = ["search", str(run), "--key", "00003", "-n", "4"]
    assert main([*arguments, "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert (
        len(hits) == 4
        and hits[0]["cosine"] >= hits[1]["cosine"]
        and {"key", "shard", "row", "image", "text", "scores"} <= hits[0].keys()
    )
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["cosine", "image", "text", "similarity", "support", "saev", "key", "caption", "shard"]
    assert [line.split()[0] for line in lines[1:]] == [f"{hit['cosine']:.4f}" for hit in hits]
    assert main(["search", str(run), "--feature", "7", "-n", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == ["image", "text"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> tuple[Path, dict[str, Pair]]:
    """A run of samples that can be looked at, and these by key."""
    found = [(f"{i:05d}", picture(i), f"caption {i}\nof \x1b[31m{caption(i)}") for i in range(40)]
    folder = as_folder(tmp_path_factory.mktemp("seen") / "icons", found)
    samples = [
        dataclasses.replace(sample, key=key, shard=f"{folder}/", row=i)
        for i, (sample, (key, *_)) in enumerate(zip(clustered(40, seed=31), found, strict=True))
    ]
    return write_run(folder.parent / "run", samples), {pair[0]: pair for pair in found}


def test_a_search_shows_captions_and_pictures(seen, tmp_path, capsys):
    run, pairs = seen
    page = tmp_path / "found.html"
    arguments = ["search", str(run), "--key", "00007", "-n", "3"]
    assert main([*arguments, "--json", "--page", str(page)]) == 0
    out, err = capsys.readouterr()
    hits = json.loads(out)
    assert [hit["caption"] for hit in hits] == [pairs[hit["key"]][2] for hit in hits] and len(hits) == 3 and err == ""
    pictures = re.findall(r'base64,([^"]+)"', page.read_text("utf-8"))
    assert [base64.b64decode(small) for small in pictures] == [
        thumbnail(pairs[key][1]) for key in ("00007", *(hit["key"] for hit in hits))
    ]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    number = int(hits[0]["key"])
    assert (
        f"{number:05d}  caption {number} of [31m{caption(number)}"[:54] in lines[1]
        and lines[1].endswith("  icons")
        and "\x1b" not in lines[1]
    )


def test_borderline_pairs_show_captions_and_pictures(seen, tmp_path, capsys):
    run, pairs = seen
    page = tmp_path / "pairs.html"
    assert main(["dedup", str(run), "--threshold", "0.9", "--borderline", "4", "--json", "--page", str(page)]) == 0
    listed = json.loads(capsys.readouterr().out)["borderline"]
    assert [(pair["caption"], pair["other_caption"]) for pair in listed] == [
        (pairs[pair["key"]][2], pairs[pair["other_key"]][2]) for pair in listed
    ]
    text = page.read_text("utf-8")
    wanted = sorted(listed, key=lambda pair: -pair["similarity"])
    pictures = [base64.b64decode(small) for small in re.findall(r'base64,([^"]+)"', text)]
    assert (
        pictures == [thumbnail(pairs[pair[key]][1]) for pair in wanted for key in ("key", "other_key")]
        and len(wanted) == 4
    )
    verdicts = re.findall(r"<h2>([\d.]+) (duplicates|not close enough)", text)
    assert [(float(value), said) for value, said in verdicts] == [
        (round(pair["similarity"], 4), "duplicates" if pair["similarity"] >= 0.9 else "not close enough")
        for pair in wanted
    ]


def test_what_cannot_be_read_is_said_and_the_rest_is_found(run, capsys):
    assert main(["search", str(run), "--key", "00003", "-n", "4"]) == 0
    out, err = capsys.readouterr()
    assert (
        len(out.splitlines()) == 5
        and "mmfilter: no caption: shard '/data/s2.tar' does not exist; check the path" in err
    )


def test_select_prints_the_funnel(run, capfd):
    assert main(["select", str(run), "--top", "10%", "--dedup", "0.9", "--format", "keys"]) == 0
    out, err = capfd.readouterr()
    assert len(out.split()) == 30
    assert (
        "without exact duplicates (same image and text)" in err
        and "without near-duplicates (--dedup 0.9)" in err
        and "kept by --top 10%" in err
    )


@pytest.mark.slow
def test_no_torch_is_imported(run):
    script = (
        "import sys; from mmfilter.cli.app import main; code = main(sys.argv[1:]); print('torch' in sys.modules, code)"
    )
    for arguments in (
        ["dedup"],
        ["search", "--feature", "3", "-n", "1"],
        ["select", "--top", "5", "--dedup", "0.9", "--format", "keys", "-o", f"{run}.txt"],
    ):
        command = [sys.executable, "-c", script, arguments[0], str(run), *arguments[1:]]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "False 0"


@pytest.mark.parametrize("argv", [["dedup", "--help"], ["search", "--help"]])
def test_help_imports_nothing_heavy(argv):
    heavy = "('torch', 'transformers', 'pyarrow', 'duckdb', 'faiss', 'numpy')"
    script = f"import sys; from mmfilter.cli.app import main; main({argv!r}); print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()[
            -1
        ]
        == "[]"
    )


EXPLAINED = {
    "a page of another kind": (
        ["search", "{run}", "--key", "00003", "--page", "x.tar"],
        "--page 'x.tar' is the page to write: give a name that ends in .html",
    ),
    "a page of no pairs": (
        ["dedup", "{run}", "--page", "x.html"],
        "--page shows the pairs of --borderline: say how many, as in --borderline 20",
    ),
    "threshold": (
        ["dedup", "{run}", "--threshold", "1.5"],
        "the similarity threshold is 1.5; give one above 0 and up to 1, such as 0.95",
    ),
    "select": (
        ["select", "{run}", "--top", "5", "--dedup", "0", "--format", "keys"],
        "the similarity threshold is 0.0; give one above 0",
    ),
    "memory": (
        ["dedup", "{run}", "--memory", "-1"],
        "--memory is -1; give GiB above 0, or leave it out to use half of what is free",
    ),
    "column": (["dedup", "{run}", "--by", "beauty"], "no column 'beauty'"),
    "no run": (["dedup", "nowhere"], "'nowhere' is not a run: it has no manifest.json"),
    "nothing to look for": (
        ["search", "{run}"],
        "say what to look for, one of: --key KEY, --image FILE and/or --text WORDS, --feature NUMBER",
    ),
    "no key": (["search", "{run}", "--key", "zebra"], "there is no sample with key 'zebra' in run"),
}


@pytest.mark.parametrize("case", EXPLAINED)
def test_what_cannot_be_done_is_one_line_and_exit_1(run, capsys, case):
    arguments, words = EXPLAINED[case]
    assert main([part.format(run=run) for part in arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith("mmfilter: ") and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["dedup", "--on", "sound"],
        ["search", "--key", "x", "--on", "sound"],
        ["select", "--top", "5", "--dedup-on", "sound"],
    ],
)
def test_wrong_usage_exits_2(argv, capsys):
    assert main(argv) == 2
    assert "Usage: mmfilter" in capsys.readouterr().err
