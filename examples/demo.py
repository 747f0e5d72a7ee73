"""The main job on the embedded model: score the example shards, stream the best 20 % into a training loop.

At the end it counts what the selection did to the pairs that were mismatched on purpose: their label is
in each sample's JSON, where neither the model nor the selection looks.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARDS = sorted((ROOT / "examples" / "shards").glob("*.tar"))
WORK = ROOT / "demo"
RUN = WORK / "run"
BIN = Path(sys.executable).parent


def step(title: str, *command: str) -> None:
    """Show a command as the user would type it, and run it."""
    shown = [part.replace(f"{ROOT}/", "") if part != str(BIN / "mmfilter") else "mmfilter" for part in command]
    print(f"\n{title}\n$ {' '.join(shown)}", flush=True)
    subprocess.run(command, check=True)


def records(tar: io.BufferedIOBase | None, path: Path | None = None) -> list[dict]:
    """The JSON of every sample of a tar."""
    with tarfile.open(path, mode="r" if path else "r|", fileobj=tar) as file:
        return [json.load(file.extractfile(member)) for member in file if member.name.endswith(".json")]


def survivors(top: str) -> list[dict]:
    """The JSON of what `mmfilter select` lets through its pipe."""
    command = [BIN / "mmfilter", "select", str(RUN), "--top", top, "-o", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        kept = records(process.stdout)
    if process.returncode:
        sys.exit("mmfilter select failed")
    return kept


def main() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    mmfilter = str(BIN / "mmfilter")
    step("1. Score every pair inside the embedded model.", mmfilter, "score", *map(str, SHARDS), "--run", str(RUN))
    step(
        "2. Copy the best 20 % into new shards, byte for byte.",
        mmfilter,
        "select",
        str(RUN),
        "--top",
        "20%",
        "-o",
        str(WORK / "best"),
    )
    step(
        "3. Or stream them into a training loop.",
        sys.executable,
        str(ROOT / "examples" / "finetune_pipe.py"),
        str(RUN),
        "--top",
        "20%",
    )

    before = [record for shard in SHARDS for record in records(None, shard)]
    wrong = sum(record["mismatched"] for record in before)
    print("\nPairs that were mismatched on purpose:")
    print(f"  in the input            {wrong:>4} of {len(before):>5}  ({wrong / len(before):.1%})")
    for top in ("80%", "50%", "20%"):
        kept = survivors(top)
        left = sum(record["mismatched"] for record in kept)
        print(f"  in the best {top}         {left:>4} of {len(kept):>5}  ({left / len(kept):.1%})")


if __name__ == "__main__":
    main()
