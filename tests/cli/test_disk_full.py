"""Commands for which there is not enough room: one line, exit 1, and nothing half written. The limit is that of a file's size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.codes import clustered, write_run
from tests.conftest import good, write_tar
from tests.runs import make_run

pytestmark = pytest.mark.slow

LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from mmfilter.cli.app import main
sys.exit(main())
"""


def limited(here: Path, limit: int, *argv: str, **streams) -> tuple[int, str]:
    """Exit code and last line of a command none of whose files may have more bytes."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *argv],
        cwd=here,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
        **streams,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()[-1]


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    shard = write_tar(folder / "few.tar", [member for i in range(20) for member in good(f"{i:09d}", i)])
    return make_run(folder / "run", {str(shard): [{"similarity": i / 20, "uid": f"{i:032x}"} for i in range(20)]})


@pytest.mark.parametrize(
    ("form", "name", "limit"),
    [
        ("shards", "best", 20_000),
        ("parquet", "best", 20_000),
        ("hf", "best", 20_000),
        ("llava-json", "best", 4_000),
        ("datacomp", "best", 500),
        ("tar", "best.tar", 20_000),
        ("keys", "best.txt", 500),
        ("datacomp", "best.npy", 500),
    ],
)
def test_a_selection_that_does_not_fit(run, tmp_path, form, name, limit):
    command = ["select", str(run), "--top", "100%", "--repeat", "5", "--format", form, "-o", name]
    assert limited(tmp_path, limit, *command) == (1, f"mmfilter: output {name!r} cannot be written: File too large")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize("form", ["tar", "keys", "datacomp"])
def test_a_stream_that_does_not_fit(run, tmp_path, form):
    with open("/dev/full", "wb") as full:
        said = limited(tmp_path, 1 << 30, "select", str(run), "--top", "100%", "--format", form, stdout=full)
    assert said == (1, "mmfilter: output 'stdout' cannot be written: No space left on device")


def test_a_score_that_does_not_fit(tmp_path):
    write_tar(tmp_path / "a.tar", [member for i in range(60) for member in good(f"{i:09d}", i)])
    command = ["score", "a.tar", "--run", "run"]
    code, said = limited(tmp_path, 5_000, *command)
    assert code == 1 and said.startswith("mmfilter: 'run/weights.safetensors' cannot be written (")
    assert said.endswith("); make room and run the same command again")
    weights = 120_000  # they fit, the codes of 60 pairs do not
    assert limited(tmp_path, weights, *command) == (
        1, "mmfilter: run 'run' cannot be written: File too large; make room and run the same command again: what is finished is kept",
    )  # fmt: skip
    assert everything(tmp_path / "run") == ["manifest.json", "weights.safetensors"]


def test_a_dedup_that_does_not_fit(tmp_path):
    run = write_run(tmp_path / "run", clustered(300, seed=1))
    before = everything(run)
    assert limited(tmp_path, 2_000, "dedup", "run") == (1, "mmfilter: run 'run' cannot be written: File too large")
    assert everything(run) == before


def test_an_sae_that_does_not_fit(tmp_path):
    code, said = limited(tmp_path, 20_000, "sae", "convert", "tiny", "mine")
    assert code == 1 and said.startswith("mmfilter: 'mine' cannot be written: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(run, tmp_path):
    tmp_path.chmod(0o500)
    for form, name in [("shards", "best"), ("tar", "best.tar"), ("datacomp", "best.npy")]:
        command = ["select", str(run), "--top", "1", "--format", form, "-o", str(tmp_path / name)]
        assert limited(run, 1 << 30, *command) == (
            1,
            f"mmfilter: output {str(tmp_path / name)!r} cannot be written: Permission denied",
        )
    tmp_path.chmod(0o700)
