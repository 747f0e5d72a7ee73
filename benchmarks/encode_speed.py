"""Time of SAE encoding against its matrix product alone: what selecting the active features costs.

Arms, interleaved in one process on the same states; the products go in chunks of the size that is
fastest here:

    product    the product as SAE.encode does it (oneDNN on a CPU), chunk by chunk: what the others are held against
    addmm      torch.addmm of states and encoder (MKL), into memory that lies ready
    topk       SAE.encode, topk
    jumprelu   SAE.encode, jumprelu with a threshold for each feature that some 60 a token pass, and the 50 strongest of
               these
    relu       SAE.encode, relu with the 50 strongest a token

    python benchmarks/encode_speed.py --tokens 4096 --d-model 1024 --features 16384 --k 32 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from machine import machine

from mmfilter.core.sae.autoencoder import DENSE_CHUNK_ELEMENTS, SAE

CHUNKS = (128, 256, 512, 1024)
"""Rows of a chunk that are tried for the product."""


class Arms:
    """The ways from states to codes, or only to pre-activations."""

    def __init__(self, options: argparse.Namespace) -> None:
        g = torch.Generator().manual_seed(0)
        d, n = options.d_model, options.features
        self.states = torch.randn(options.tokens, d, generator=g).to(options.device)
        encoder = torch.randn(d, n, generator=g) / d**0.5
        parts = (encoder, torch.full((n,), -2.0), encoder.T.contiguous(), torch.zeros(d))
        jumps = SAE(*parts, activation="jumprelu", threshold=0.6 + 0.2 * torch.rand(n, generator=g))
        saes = {"topk": SAE(*parts, activation="topk", k=options.k), "jumprelu": jumps, "relu": SAE(*parts)}
        self.saes = {name: sae.to(options.device) for name, sae in saes.items()}
        self.dense = self.saes["topk"].W_enc.new_empty(max(*CHUNKS, DENSE_CHUNK_ELEMENTS // n), n)

    def product(self, rows: int) -> None:
        for part in self.states.split(rows):
            self.saes["relu"].preactivations(part)

    def addmm(self, rows: int) -> None:
        sae = self.saes["relu"]
        for part in self.states.split(rows):
            torch.addmm(sae.b_enc, part, sae.W_enc, out=self.dense[: len(part)])

    def seconds(self, work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        if self.states.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started


@torch.inference_mode()
def measure(arms: Arms, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """The products' best chunk size, and seconds of each arm in each round, after one round to warm up."""
    rows, slow = _best_chunk(arms, arms.product), _best_chunk(arms, arms.addmm)
    work = {"product": lambda: arms.product(rows), "addmm": lambda: arms.addmm(slow)}
    work |= {name: lambda sae=sae: sae.encode(arms.states) for name, sae in arms.saes.items()}
    times: dict[str, list[float]] = {name: [] for name in work}
    for i in range(rounds + 1):
        for name, once in work.items():
            seconds = arms.seconds(once)
            if i:
                times[name].append(seconds)
    return rows, times


def _best_chunk(arms: Arms, product: Callable[[int], None]) -> int:
    return min(CHUNKS, key=lambda rows: min(arms.seconds(lambda: product(rows)) for _ in range(2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--features", type=int, default=16384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = f"{machine()}, {options.threads} threads"
    rows, times = measure(Arms(options), options.rounds)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times["product"], strict=True))
        for name in times
        if name != "product"
    }
    if options.json:
        print(
            json.dumps(
                {"machine": about, "rows a chunk of the product": rows, "seconds": times, "ratios": ratios}, indent=2
            )
        )
        return
    shape = (
        f"{options.tokens:,} states, {options.d_model:,} -> {options.features:,}, float32, k={options.k}; "
        f"the product in chunks of {rows}"
    )
    print(f"{about}\n{shape}\n\n| arm | ms (median of {options.rounds}) | times the product |\n|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {1000 * seconds:,.0f} | {f'{ratios[name]:.2f}' if name in ratios else ''} |")


if __name__ == "__main__":
    main()
