"""The quick tests and a small training with the lowest or the newest versions that pyproject.toml allows.

    python tests/versions.py lowest
    python tests/versions.py newest --python python3.13

Makes an environment of its own under build/. What mmfilter runs with is taken at the lowest (or newest) version of each
dependency that pyproject.toml names; the tools of the tests are taken as they come. `--torch VERSION` takes another
torch than that: on x86-64 the registry's wheels of most versions are built for CUDA and take gigabytes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
UV = Path(sys.executable).with_name("uv")
PEERS = ("sae-lens", "eai-sparsify", "datasets")
"""Libraries that tests compare with, and skip without; their own floors are above ours"""
LAYOUT = "tests/cli/test_commands.py::test_the_command_reference_is_up_to_date"
"""The reference has the help as the pinned typer lays it out"""
TRAINING = ("--tokens", "8192", "--widths", "256", "--k", "8", "--batch-size", "1024", "--capacity", "8192")


def run(*command: str | Path, **environment: str) -> None:
    """Show a command and run it; ends the program when it fails."""
    print("$", *command, flush=True)
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | environment, check=False)
    if done.returncode:
        sys.exit(f"failed with exit status {done.returncode}: {' '.join(map(str, command))}")


def tools() -> list[str]:
    """The dev extra without the peers and the linters."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    without = (*PEERS, "ruff", "mypy", "types-", "import-linter", "deptry", "uv", "resvg-py")
    return [name for name in extras["dev"] if not name.startswith(without)]


def install(kind: str, python: str, torch: str | None) -> Path:
    """Make the environment; its Python."""
    folder = ROOT / "build" / kind
    pins = ROOT / "build" / f"{kind}.txt"
    run(UV, "venv", "--quiet", "--clear", "--python", python, folder)
    inside = folder / "bin" / "python"
    chosen = pins.with_suffix(".in")
    chosen.write_text(f"torch=={torch}\n" if torch else "")
    resolution = ("--resolution", "lowest-direct") if kind == "lowest" else ()
    run(
        UV,
        "pip",
        "compile",
        "--quiet",
        "--upgrade",
        "--python",
        inside,
        *resolution,
        "--override",
        chosen,
        "pyproject.toml",
        "--extra",
        "cpu",
        "-o",
        pins,
    )
    run(UV, "pip", "install", "--quiet", "--python", inside, "-r", pins)
    run(UV, "pip", "install", "--quiet", "--python", inside, "-c", pins, "-e", ".[cpu]", *tools())
    return inside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["lowest", "newest"])
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--torch", help="a torch of this version in place of the lowest or newest")
    options = parser.parse_args()
    started = time.perf_counter()
    python = install(options.kind, options.python, options.torch)
    print(f"installed in {time.perf_counter() - started:.0f} s", flush=True)
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    warned = ("-W", "default")  # other versions deprecate other things
    run(
        python, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *warned, "--deselect", LAYOUT, **quiet
    )
    sae = ROOT / "build" / f"{options.kind}-sae"
    run("rm", "-rf", sae)
    run(python, "-m", "mmfilter", "sae", "train", "examples/shards/*.tar", "-o", sae, *TRAINING, **quiet)


if __name__ == "__main__":
    main()
