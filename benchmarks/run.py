"""Every benchmark, one after the other: what `make bench` runs.

    python benchmarks/run.py              all
    python benchmarks/run.py startup      one or more by name

All take some thirty minutes on two cores, a third of them dedup_scale.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS: dict[str, list[str]] = {
    "quality": ["quality.py"],
    "startup": ["startup.py"],
    "encode_speed": ["encode_speed.py"],
    "score_speed": ["score_speed.py", "--samples", "1000", "--rounds", "5"],
    "selection_quality": ["selection_quality.py"],
    "select_speed": ["select_speed.py", "--gib", "4"],
    "select_scale": ["select_scale.py", "--rows", "10000000"],
    "train_speed": ["train_speed.py", "--rounds", "4", "--learn-steps", "300"],
    "dedup_scale": [
        *("dedup_scale.py", "--sizes", "10000", "30000", "100000", "300000", "1000000"),
        *("--recall", "100000", "--plot", str(HERE / "dedup_scale.png")),
    ],
    "dedup_quality": ["dedup_quality.py", "--plot", str(HERE / "dedup_quality.png")],
    "memory": ["memory.py", "--sizes", "1000", "10000", "100000", "--plot", str(HERE / "memory.png")],
}


def main(names: list[str]) -> int:
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        print(f"no benchmark {sorted(unknown)[0]!r}; there is {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or BENCHMARKS:
        script, *options = BENCHMARKS[name]
        print(f"\n## {name}\n\n    python benchmarks/{' '.join([script, *map(_shown, options)])}\n", flush=True)
        started = time.perf_counter()
        if subprocess.run([sys.executable, HERE / script, *options]).returncode:
            failed.append(name)
        print(f"\n({time.perf_counter() - started:.0f} s)", flush=True)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _shown(option: str) -> str:
    return option.replace(f"{HERE.parent}/", "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
