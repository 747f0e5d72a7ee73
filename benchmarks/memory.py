"""Peak memory of `mmfilter score` over the number of samples: it must not grow.

Each size runs in a process of its own on shards of 10,000 samples made by repeating the example shards.

    python benchmarks/memory.py --sizes 1000 10000 100000 --plot benchmarks/memory.png
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import machine

SHARDS = sorted((Path(__file__).parents[1] / "examples" / "shards").glob("*.tar"))
IN_A_SHARD = 10_000


def write_shards(folder: Path, n: int) -> None:
    """`n` samples in shards of 10,000; pictures and captions repeat, keys do not."""
    import io
    import tarfile

    from mmfilter.core.input.shards import open_source

    samples = [sample for path in SHARDS for sample in open_source(str(path)).samples()]
    for start in range(0, n, IN_A_SHARD):
        with tarfile.open(folder / f"{start // IN_A_SHARD:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(start, min(n, start + IN_A_SHARD)):
                for ext, payload in samples[i % len(samples)].members.items():
                    info = tarfile.TarInfo(f"{i:09d}.{ext}")
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))


def peak_mib(n: int) -> tuple[float, float]:
    """(peak MiB, samples/s) of scoring `n` samples in a fresh process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder, n)
        command = [sys.executable, "-m", "mmfilter", "score", f"{folder}/*.tar", "--run", f"{folder}/run", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            report = json.load(process.stdout)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"score failed on {n:,} samples")
        return usage.ru_maxrss / 1024, report["samples_per_second"]


def plot(rows: list[tuple[int, float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3), layout="constrained")
    axes.plot([row[0] for row in rows], [row[1] for row in rows], "o-")
    axes.set(xscale="log", ylim=(0, None), xlabel="samples", ylabel="peak MiB", title="Peak memory of mmfilter score")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    print(f"{machine()}\n\n| samples | peak MiB | samples/s |\n|---|---|---|")
    rows = []
    for n in options.sizes:
        rows.append((n, *peak_mib(n)))
        print(f"| {n:,} | {rows[-1][1]:,.0f} | {rows[-1][2]:,.0f} |", flush=True)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
