"""Can the scores of the embedded model tell true captions from shuffled ones? On drawings it has never seen.

    python benchmarks/quality.py [--json]

1,912 icons of Twemoji, a set that was neither trained nor tuned on, one pair each, captions by templates of their own;
half of the captions are shuffled among samples. `mmfilter` scores the pairs with the embedded default, and each score's
ROC AUC is that of true against shuffled pairs (0.5 is chance), with the bootstrap's 95 % interval over pairs. The
controls: caption length, a seeded random number, the raw states without an SAE, and an SAE of random directions with
the same mean number of active features a token and a τ at which as many co-occur in a pair, whose feature weights are
fitted on the pairs themselves.

Needs node's npm (it fetches the icons and words once, 30 MB) and resvg-py.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "models" / "recipe"))

from evaluate import CONTROL_SEED, CONTROL_STEP, interval, states_of  # noqa: E402
from evaluate_raw import auc  # noqa: E402
from machine import machine  # noqa: E402
from pairs import make_tar  # noqa: E402

from mmfilter.core.cards.cards import Card, load_card  # noqa: E402
from mmfilter.core.evaluation.random_sae import random_twin  # noqa: E402
from mmfilter.core.input.shards import open_source  # noqa: E402
from mmfilter.core.pipeline.engine import load  # noqa: E402
from mmfilter.core.pipeline.pass_settings import DeviceSettings  # noqa: E402
from mmfilter.ops import score as operation  # noqa: E402
from mmfilter.ops.score_settings import ScoreSettings  # noqa: E402

SHARD = ROOT / "build" / "recipe" / "eval" / "report.tar"
SCORES = ("similarity", "support", "saev", "cooccurrence", "l0", "l1", "raw", "random", "caption_chars")


class Silent:
    """A progress that says nothing."""

    def start(self, phase: str, total_bytes: int | None) -> None: ...

    def advance(self, samples: int, nbytes: int) -> None: ...

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)


def scored(card: Card, run: Path) -> dict[str, np.ndarray]:
    """The score columns of every pair of the shard, in its order."""
    operation.score([str(SHARD)], ScoreSettings(card, run=run), Silent())
    table = pq.read_table(run / "scores" / f"{SHARD.stem}.parquet", columns=["row", *SCORES]).sort_by("row")
    return {name: table[name].to_numpy() for name in SCORES}


def control(card: Card, folder: Path) -> Card:
    """The card with an SAE of random directions, saved in the folder."""
    backbone, sae = load(card, DeviceSettings(device="cpu"))
    twin = random_twin(sae, states_of(SHARD, backbone).batches[::CONTROL_STEP], card.threshold, seed=CONTROL_SEED)
    twin.sae.save(folder)
    return replace(card, sae=str(folder), weights=None, threshold=twin.threshold)


def facts() -> dict[str, np.ndarray]:
    """Which pairs are shuffled, and which show a concept that was held out of training."""
    rows = [json.loads(raw.members["json"]) for raw in open_source(str(SHARD)).samples()]
    return {name: np.array([row[name] for row in rows]) for name in ("shuffled", "new")}


def measure(say: Callable[[str], None]) -> list[dict]:
    """A row for each score: AUC, interval, AUC on seen and on held-out concepts."""
    make_tar(SHARD, "report")
    known, card = facts(), load_card("tiny")
    with tempfile.TemporaryDirectory() as folder:
        say("scoring 1,912 pairs with the embedded model")
        columns = scored(card, Path(folder) / "run")
        say("the same with an SAE of random directions")
        beside = scored(control(card, Path(folder) / "sae"), Path(folder) / "control")
    columns |= {f"{name} of a random SAE": beside[name] for name in ("similarity", "support", "saev")}
    shuffled, new = known["shuffled"], known["new"]
    rows = []
    for name, values in columns.items():
        parts = {
            part: auc(values[~shuffled & of], values[shuffled & of])
            for part, of in (("auc", shuffled | True), ("seen", ~new), ("held_out", new))
        }
        low, high = interval(values, shuffled)
        rows.append({"score": name, **parts, "low": low, "high": high})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    as_json = parser.parse_args().json
    rows = measure(lambda text: print(text, file=sys.stderr))
    if as_json:
        print(json.dumps({"machine": machine(), "scores": rows}, indent=1))
        return
    print(f"{machine()}\n\n| score | AUC | 95 % interval | concepts seen in training | concepts held out |")
    print("|---|---|---|---|---|")
    for row in rows:
        interval = f"{row['low']:.3f}–{row['high']:.3f}"
        print(f"| {row['score']} | {row['auc']:.3f} | {interval} | {row['seen']:.3f} | {row['held_out']:.3f} |")


if __name__ == "__main__":
    main()
