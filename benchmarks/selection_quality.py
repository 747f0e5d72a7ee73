"""Does a set chosen by --match look more like the target, and does one chosen by --diverse show more, than the best by
score?

    python benchmarks/selection_quality.py [--samples 2000] [--draws 3] [--top 200] [--json]

The example pairs are split in two halves by drawing. From one half a pool is drawn as the web would: concepts by
Zipf's law, so a few come often and most hardly ever, each time moved, re-encoded and with its own or another caption of
the concept; 15 % of the captions belong to another pair. `mmfilter` scores the pool with the embedded model, and the
ways to choose the same number of pairs are compared:

match    the target is a run over the pairs of the *other* half that show a theme (flags, people, faces). How many of
         the chosen pairs show the theme, and how many of the pool's concepts of the theme are among them
diverse  how many of the pool's concepts are among the chosen

Mean and standard deviation over draws. CPU only; 15 s a draw.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from machine import machine
from PIL import Image

from mmfilter.core.input.shards import open_source
from mmfilter.core.progress import Silence
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.ops import score as scoring
from mmfilter.ops.score_settings import ScoreSettings
from mmfilter.ops.select import select

ROOT = Path(__file__).parents[1]
THEMES = {"flags": r"^flag of ", "people": r"\b(man|woman|person|people|men|women|boy|girl)\b", "faces": r"\bface\b"}
MISMATCHED = 0.15


@dataclass(frozen=True)
class Pair:
    concept: str
    caption: str
    jpeg: bytes


def examples() -> list[Pair]:
    """The example pairs whose caption is right."""
    pairs = []
    for path in sorted((ROOT / "examples" / "shards").glob("*.tar")):
        for raw in open_source(str(path)).samples():
            about = json.loads(raw.members["json"])
            if not about["mismatched"]:
                pairs.append(Pair(about["concept"], about["caption"], raw.members["jpg"]))
    return pairs


def moved(jpeg: bytes, rng: np.random.Generator) -> bytes:
    """The picture shifted by a few pixels and encoded again."""
    pixels = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    shifted = np.roll(pixels, rng.integers(-6, 7, 2), (0, 1))
    file = io.BytesIO()
    Image.fromarray(shifted).save(file, "JPEG", quality=int(rng.integers(60, 95)))
    return file.getvalue()


def draw_pool(pairs: list[Pair], n: int, rng: np.random.Generator) -> list[Pair]:
    """`n` pairs, concepts by Zipf's law in random order; some captions change places."""
    by_concept: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_concept.setdefault(pair.concept, []).append(pair)
    concepts = sorted(by_concept)
    often = 1 / (1 + rng.permutation(len(concepts)))
    pool = []
    for i in rng.choice(len(concepts), n, p=often / often.sum()):
        shown, worded = (by_concept[concepts[i]][rng.integers(len(by_concept[concepts[i]]))] for _ in range(2))
        pool.append(Pair(shown.concept, worded.caption, moved(shown.jpeg, rng)))
    wrong = rng.choice(n, round(MISMATCHED * n), replace=False)
    captions = [pool[i].caption for i in np.roll(wrong, 1)]
    for i, caption in zip(wrong.tolist(), captions, strict=True):
        pool[i] = Pair(pool[i].concept, caption, pool[i].jpeg)
    return pool


def scored(pairs: list[Pair], folder: Path, name: str) -> Path:
    """A run over these pairs, keys being their numbers."""
    shard = folder / f"{name}.tar"
    with tarfile.open(shard, "w") as tar:
        for i, pair in enumerate(pairs):
            for ext, content in (("jpg", pair.jpeg), ("txt", pair.caption.encode())):
                info = tarfile.TarInfo(f"{i:06d}.{ext}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    run = folder / name
    scoring.score([str(shard)], ScoreSettings(run=run, device="cpu"), Silence())
    return run


def chosen(run: Path, folder: Path, **settings) -> np.ndarray:
    """Numbers of the pairs that `select` keeps."""
    keys = folder / "keys.txt"
    keys.unlink(missing_ok=True)
    select(run, SelectSettings(format="keys", output=keys, **settings))
    return np.array([int(key) for key in keys.read_text().split()])


def one_draw(pairs: list[Pair], n: int, top: int, seed: int, say: Callable[[str], None]) -> list[dict]:
    """Rows: question, way, and its figures."""
    rng = np.random.default_rng(seed)
    half = rng.random(len(pairs)) < 0.5
    pool = draw_pool([pair for pair, mine in zip(pairs, half, strict=True) if mine], n, rng)
    concepts = np.array([pair.concept for pair in pool])
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say(f"draw {seed}: scoring a pool of {n:,}")
        run = scored(pool, folder, "pool")
        similarity = pq.read_table(run / "scores" / "pool.parquet", columns=["similarity"]).column(0).to_numpy()
        ways = {
            "best by score": chosen(run, folder, top=str(top)),
            "at random": np.sort(rng.choice(n, top, replace=False)),
        }
        by_theme = {}
        for theme, words in THEMES.items():
            target = [
                pair for pair, mine in zip(pairs, half, strict=True) if not mine and re.search(words, pair.concept)
            ]
            by_theme[theme] = chosen(run, folder, top=str(top), match=scored(target, folder, theme))
        covering = ways | {"--diverse": chosen(run, folder, top=str(top), diverse=True)}
    for theme, words in THEMES.items():
        like = np.array([bool(re.search(words, concept)) for concept in concepts])
        for way, kept in {"the pool": np.arange(n), **ways, "--match": by_theme[theme]}.items():
            covered = len(set(concepts[kept][like[kept]])) / len(set(concepts[like]))
            figures = {
                "share": float(like[kept].mean()),
                "covered": covered,
                "similarity": float(similarity[kept].mean()),
            }
            rows.append({"question": f"match {theme}", "way": way} | figures)
    for way, kept in {"the pool": np.arange(n), **covering}.items():
        figures = {
            "share": 1.0,
            "covered": len(set(concepts[kept])) / len(set(concepts)),
            "similarity": float(similarity[kept].mean()),
        }
        rows.append({"question": "diverse", "way": way} | figures)
    return rows


def summary(draws: list[list[dict]]) -> list[dict]:
    """Mean and standard deviation of each figure over draws."""
    rows = []
    for same in zip(*draws, strict=True):
        figures = {name: [row[name] for row in same] for name in ("share", "covered", "similarity")}
        spread = {
            f"{name}_sd": float(np.std(values, ddof=1)) if len(values) > 1 else None for name, values in figures.items()
        }
        rows.append(
            {"question": same[0]["question"], "way": same[0]["way"]}
            | {name: float(np.mean(v)) for name, v in figures.items()}
            | spread
        )
    return rows


def shown(row: dict, name: str, digits: int) -> str:
    spread = row[f"{name}_sd"]
    return f"{row[name]:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="pairs in the pool")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--top", type=int, default=200, help="pairs to choose")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    where = machine()
    pairs = examples()
    draws = [
        one_draw(pairs, options.samples, options.top, seed, lambda text: print(text, file=sys.stderr))
        for seed in range(options.draws)
    ]
    rows = summary(draws)
    if options.json:
        print(json.dumps({"machine": where, "options": vars(options), "rows": rows}, indent=1))
        return
    print(f"{where}\n\n{options.top} chosen of {options.samples:,}, {options.draws} draws\n")
    print("| question | way | share of the theme | concepts covered | mean similarity |\n|---|---|---|---|---|")
    for row in rows:
        share = "" if row["question"] == "diverse" else shown(row, "share", 3)
        covered, similarity = shown(row, "covered", 3), shown(row, "similarity", 3)
        print(f"| {row['question']} | {row['way']} | {share} | {covered} | {similarity} |")


if __name__ == "__main__":
    main()
