"""How soon the command line answers, and what it imports before it does.

python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import machine

MMFILTER = Path(sys.executable).with_name("mmfilter")


def seconds(*command: str | Path, rounds: int) -> float:
    """Median wall time of a command."""
    seen = []
    for _ in range(rounds):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seen.append(time.perf_counter() - started)
    return statistics.median(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    bare = seconds(sys.executable, "-c", "pass", rounds=rounds)
    print(f"{machine()}\n\n| command | seconds (median of {rounds}) |\n|---|---|\n| python -c pass | {bare:.3f} |")
    for command in ((), ("score",), ("select",)):
        words = (*command, "--help")
        print(f"| mmfilter {' '.join(words)} | {seconds(MMFILTER, *words, rounds=rounds):.3f} |")


if __name__ == "__main__":
    main()
