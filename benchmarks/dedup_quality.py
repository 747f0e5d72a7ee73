"""Which copies does `dedup` find, and what does it take for a copy that is not one? Beside a perceptual hash and
SemDeDup's rule.

    python benchmarks/dedup_quality.py [--originals 1000] [--plot benchmarks/dedup_quality.png]

The originals are the 1,000 example pairs; drawing and concept were kept out of the embedded model's training. Each
comes with five copies: re-encoded (JPEG quality 40), cropped (5 to 10 % of either side cut off), recoloured (hue and
brightness), rescaled (to 50 to 200 %), and one with only its caption put otherwise (and quality 75, so that its bytes
differ). In every second original the captions of the first four are paraphrases too: the same words in another of the
templates. Two versions of one original are a true pair, nothing else is, not even two vendors' drawings of one concept,
or two clocks that show 3 and 4.

- ours: pairs as `dedup` stores them, by the codes of both sides or of the image alone; its rule decides what is
  dropped.
- pHash: imagehash's 64-bit DCT hash; similarity is 1 − bits that differ / 64, so a row of the table is not comparable
  with ours, only the curves are.
- SemDeDup (Abbas et al., arXiv 2303.09540) on our image codes: k-means into √n clusters; in a cluster, from the
  farthest to the nearest of its centre, a sample is dropped when any one before it is as close as the threshold, even
  one that was dropped.

The embedded model knows icons and nothing else: these figures say how the method behaves, not what it does to
photographs. Needs `pip install imagehash matplotlib` and FAISS.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image, ImageEnhance

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "models" / "recipe"), str(ROOT / "examples")]

from machine import machine  # noqa: E402
from make_shards import KEYWORD_TEMPLATES, NAME_TEMPLATES, with_article  # noqa: E402

from mmfilter.core.codes.code_tables import CodeTables  # noqa: E402
from mmfilter.core.codes.duplicate_settings import DuplicateSettings  # noqa: E402
from mmfilter.core.codes.rule import Deduplicator  # noqa: E402
from mmfilter.core.codes.vectors import SideCodes  # noqa: E402
from mmfilter.core.input.shards import open_source  # noqa: E402
from mmfilter.core.run.directory import RunDirectory  # noqa: E402
from mmfilter.core.run.score_tables import ScoreTables  # noqa: E402
from mmfilter.ops import score as operation  # noqa: E402
from mmfilter.ops.score_settings import ScoreSettings  # noqa: E402

SHARDS = sorted((ROOT / "examples" / "shards").glob("*.tar"))
VERSIONS = ("original", "re-encoded", "cropped", "recoloured", "rescaled", "caption only")
THRESHOLDS = (0.80, 0.82, 0.84, 0.86, 0.88, 0.90, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)
SHOWN = (0.80, 0.85, 0.90, 0.95)
"""Thresholds at which the copies are told apart"""
SEED = 0


class Silent:
    """A progress that only passes notes on."""

    def start(self, phase: str, total_bytes: int | None) -> None: ...

    def advance(self, samples: int, nbytes: int) -> None: ...

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)


# --- copies ----------------------------------------------------------------------------------


def paraphrase(caption: str, rng: random.Random) -> str:
    """The same name and keywords by another template with as many keywords."""
    for template in (*KEYWORD_TEMPLATES, *NAME_TEMPLATES):  # those with keywords first: "{n}" alone would swallow them
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(template))
        if match := re.fullmatch(pattern, caption):
            parts = match.groupdict()
            break
    else:
        raise SystemExit(f"caption {caption!r} is by none of the templates of examples/make_shards.py")
    name = next(parts[key] for key in "nNaA" if key in parts)
    if name[:1].isupper():
        name = name[0].lower() + name[1:]
    name = re.sub(r"^(an?|the) ", "", name) if parts.keys() & {"a", "A"} else name
    phrase = with_article(name)
    parts |= {"n": name, "N": name.capitalize(), "a": phrase, "A": phrase.capitalize()}
    fields = keywords(template)
    others = [t for t in (*KEYWORD_TEMPLATES, *NAME_TEMPLATES) if t != template and keywords(t) == fields]
    return rng.choice(others).format(**parts)


def keywords(template: str) -> tuple[str, ...]:
    return tuple(key for key in ("k1", "k2") if f"{{{key}}}" in template)


def cropped(image: Image.Image, rng: random.Random) -> Image.Image:
    width, height = (round(side * rng.uniform(0.90, 0.95)) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def recoloured(image: Image.Image, rng: random.Random) -> Image.Image:
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] += np.uint8(rng.choice((-1, 1)) * rng.randint(8, 20) % 256)  # 11° to 28° of the circle
    return ImageEnhance.Brightness(Image.fromarray(hsv, "HSV").convert("RGB")).enhance(
        rng.choice((rng.uniform(0.75, 0.9), rng.uniform(1.1, 1.3)))
    )


def rescaled(image: Image.Image, rng: random.Random) -> Image.Image:
    factor = 2 ** rng.choice((rng.uniform(-1, -0.3), rng.uniform(0.3, 1)))
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def versions(jpeg: bytes, caption: str, rng: random.Random, *, reworded: bool) -> list[tuple[bytes, str]]:
    """Image and caption of each of `VERSIONS`."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    altered = [(image, 40), (cropped(image, rng), 90), (recoloured(image, rng), 90), (rescaled(image, rng), 90)]
    copies = [(encoded(*one), paraphrase(caption, rng) if reworded else caption) for one in altered]
    return [(jpeg, caption), *copies, (encoded(image, 75), paraphrase(caption, rng))]


def encoded(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_copies(path: Path, n: int) -> list[bytes]:
    """A shard with the versions of n originals, one after the other; their images."""
    rng, images = random.Random(SEED), []
    originals = [raw.members for shard in SHARDS for raw in open_source(str(shard)).samples()][:n]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, members in enumerate(originals):
            made = versions(members["jpg"], members["txt"].decode(), rng, reworded=number % 2 == 1)
            for which, (image, caption) in enumerate(made):
                for extension, content in (("jpg", image), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{number:04d}-{which}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                images.append(image)
    return images


# --- close pairs by each method --------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """Pairs of samples that a method holds for close, first < second, from the lowest threshold upwards."""

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray

    def at_least(self, threshold: float) -> Found:
        kept = self.similarity >= np.float32(threshold)
        return Found(self.first[kept], self.second[kept], self.similarity[kept])

    @property
    def true(self) -> np.ndarray:
        """(pairs,) bool: two versions of one original."""
        return self.first // len(VERSIONS) == self.second // len(VERSIONS)

    def quality(self, threshold: float, n: int) -> tuple[float, float]:
        """(recall, precision) among n samples."""
        true = self.at_least(threshold).true
        return true.sum() / (n * (len(VERSIONS) - 1) / 2), float(true.mean()) if len(true) else 1.0

    def recall_of(self, which: int, threshold: float, n: int, *, reworded: bool) -> float:
        """Share of the originals of which this version is found close to the original itself."""
        some = self.at_least(threshold)
        of = some.first // len(VERSIONS)
        hit = (
            some.true
            & (some.first % len(VERSIONS) == 0)
            & (some.second % len(VERSIONS) == which)
            & (of % 2 == reworded)
        )
        return hit.sum() / (n // len(VERSIONS) // 2)


def perceptual(images: list[bytes]) -> Found:
    """Pairs by imagehash's pHash."""
    bits = np.stack([imagehash.phash(Image.open(io.BytesIO(image))).hash.ravel() for image in images])
    signs = np.where(bits, 1, -1).astype(np.float32)
    parts = []
    for start in range(0, len(signs), 1000):
        near = 0.5 + signs[start : start + 1000] @ signs.T / (2 * bits.shape[1])
        first, second = np.nonzero(near >= THRESHOLDS[0])
        kept = second > first + start
        parts.append((first[kept] + start, second[kept], near[first[kept], second[kept]]))
    return Found(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def clusters(side: SideCodes, idf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cluster of each sample, its similarity to the cluster's centre) by spherical k-means of the unit vectors."""
    import faiss

    vectors = np.zeros((len(side), len(idf)), np.float32)
    vectors[side.rows, side.ids] = side.weights(idf)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    means = faiss.Kmeans(vectors.shape[1], round(len(side) ** 0.5), niter=20, spherical=True, seed=SEED)
    means.train(vectors)
    similarity, cluster = means.index.search(vectors, 1)
    return cluster[:, 0], similarity[:, 0]


# --- what is dropped -------------------------------------------------------------------------


@dataclass(frozen=True)
class Dropped:
    """What a rule leaves of the samples."""

    n_dropped: int
    copies_left: int
    """Kept samples beyond one an original"""
    originals_lost: int
    """Originals of which no version is kept"""
    without: int
    """Dropped samples to which no kept one is as close as the threshold"""

    @classmethod
    def of(cls, dropped: np.ndarray, close: Found) -> Dropped:
        represented = np.zeros(len(dropped), bool)
        for one, other in ((close.first, close.second), (close.second, close.first)):
            represented[one[~dropped[other]]] = True
        left = (~dropped).reshape(-1, len(VERSIONS)).sum(1)
        return cls(
            int(dropped.sum()),
            int((left - 1).clip(min=0).sum()),
            int((left == 0).sum()),
            int((dropped & ~represented).sum()),
        )


def semdedup(close: Found, to_centre: np.ndarray) -> np.ndarray:
    """(samples,) bool: dropped by SemDeDup's rule, given the close pairs inside clusters."""
    rank = np.argsort(np.argsort(to_centre, kind="stable"))
    dropped = np.zeros(len(to_centre), bool)
    dropped[np.where(rank[close.first] > rank[close.second], close.first, close.second)] = True
    return dropped


# --- the whole -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    n: int
    pairs: dict[str, Found]
    dropped: dict[str, list[Dropped]]
    """Method -> one for each of `THRESHOLDS`"""
    crowded: dict[str, int]
    """Method -> samples whose list of neighbours ends above the lowest threshold"""


def measure(n_originals: int, say) -> Results:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_copies(folder / "copies.tar", n_originals)
        say(f"scoring {len(images):,} pairs with the embedded model")
        operation.score(
            [str(folder / "copies.tar")],
            ScoreSettings(run=folder / "run", workers=2),
            Silent(),
        )
        scores = ScoreTables(RunDirectory(folder / "run"))
        if not scores.scored.all() or len(scores.scored) != len(images):
            raise SystemExit("some copies could not be scored")
        pairs, dropped, crowded = {}, {}, {}
        for on in ("both", "image"):
            say(f"duplicates on {on}")
            pairs[f"ours, {on}"], dropped[f"ours, {on}"], crowded[f"ours, {on}"] = ours(scores, on)
        say("SemDeDup's rule and pHash")
        tables = CodeTables(scores)
        cluster, to_centre = clusters(tables.take(np.arange(len(images))).image, tables.idf)
    wide = pairs["ours, image"]
    inside = cluster[wide.first] == cluster[wide.second]
    pairs["SemDeDup"] = narrow = Found(wide.first[inside], wide.second[inside], wide.similarity[inside])
    dropped["SemDeDup"] = [Dropped.of(semdedup(narrow.at_least(t), to_centre), wide.at_least(t)) for t in THRESHOLDS]
    pairs["pHash"] = perceptual(images)
    return Results(len(images), pairs, dropped, crowded)


def ours(scores: ScoreTables, on: str) -> tuple[Found, list[Dropped], int]:
    """Pairs as they are stored, what the rule drops at each threshold, and the number of crowded samples."""
    column = scores.column("similarity")
    decisions = []
    for threshold in THRESHOLDS:
        rule = Deduplicator(
            scores, DuplicateSettings(threshold, on), Silent()
        )  # from the second on with the stored pairs
        decisions.append(rule(column.values, column.present).of >= 0)
    stored = rule.pairs.at_least(THRESHOLDS[0])
    stored_pairs = Found(stored.first, stored.second, stored.similarity)
    return (
        stored_pairs,
        [Dropped.of(some, stored_pairs.at_least(t)) for t, some in zip(THRESHOLDS, decisions, strict=True)],
        len(stored.crowded),
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def report(results: Results) -> str:
    n, pairs = results.n, results.pairs
    parts = [
        f"{machine()}\n\nRecall / precision of pairs ({n:,} samples, {n * (len(VERSIONS) - 1) // 2:,} true pairs):\n"
    ]
    quality = [
        [f"{t:.2f}", *("{:.3f} / {:.3f}".format(*arm.quality(t, n)) for arm in pairs.values())] for t in THRESHOLDS
    ]
    parts.append(table(["threshold", *pairs], quality))
    parts.append(
        f"\nDropped; copies left (of {n * 5 // 6:,}); originals lost (of {n // 6:,}); "
        "dropped without a kept one as close:\n"
    )
    rows = [
        [
            f"{t:.2f}",
            *(
                f"{d[i].n_dropped:,}; {d[i].copies_left:,}; {d[i].originals_lost}; {d[i].without}"
                for d in results.dropped.values()
            ),
        ]
        for i, t in enumerate(THRESHOLDS)
    ]
    parts.append(table(["threshold", *results.dropped], rows))
    parts.append("\nCopies found close to their original, with the same caption / with another wording:\n")
    rows = [
        [name, f"{t:.2f}", *(told(arm, which, t, n) for arm in pairs.values())]
        for which, name in enumerate(VERSIONS)
        if which
        for t in SHOWN
    ]
    parts.append(table(["copy", "threshold", *pairs], rows))
    parts.append("\n" + "; ".join(f"{name}: {count} crowded samples" for name, count in results.crowded.items()))
    return "\n".join(parts)


def told(arm: Found, which: int, threshold: float, n: int) -> str:
    same, other = (arm.recall_of(which, threshold, n, reworded=reworded) for reworded in (False, True))
    return f"– / {(same + other) / 2:.2f}" if VERSIONS[which] == "caption only" else f"{same:.2f} / {other:.2f}"


def plot(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 4), layout="constrained")
    for name, arm in results.pairs.items():
        points = np.array([arm.quality(t, results.n) for t in THRESHOLDS])
        axes.plot(*points.T, "o-", markersize=3, label=name)
        axes.annotate(f"{THRESHOLDS[0]:.2f}", points[0], fontsize=7)
    axes.set(
        xlabel="recall of true pairs",
        ylabel="precision",
        xlim=(0, 1),
        ylim=(0, 1.02),
        title=f"Thresholds {THRESHOLDS[0]:.2f} to {THRESHOLDS[-1]:.2f}",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--originals", type=int, default=1000, help="of the 1,000 example pairs")
    parser.add_argument("--plot", type=Path, help="where to draw precision over recall")
    parser.add_argument("--json", type=Path, help="where to write the pair figures")
    options = parser.parse_args()
    results = measure(options.originals, lambda text: print(text, file=sys.stderr))
    print(report(results))
    if options.plot:
        plot(results, options.plot)
    if options.json:
        figures = {
            name: [(t, *map(float, arm.quality(t, results.n))) for t in THRESHOLDS]
            for name, arm in results.pairs.items()
        }
        options.json.write_text(json.dumps({"machine": machine(), "samples": results.n, "pairs": figures}, indent=1))


if __name__ == "__main__":
    main()
