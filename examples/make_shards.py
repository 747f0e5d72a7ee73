"""Make the example shards: 1,000 icon-caption pairs, laid out as img2dataset would write them.

    python examples/make_shards.py [--out examples/shards]

Nothing in them was trained on: the icons are those of the set kept apart, and of the concepts that were held out of
the training sets; the caption templates are used nowhere else. Some pairs carry the caption of another pair on
purpose and say so in their JSON. The same command writes the same bytes (given the same Pillow and resvg).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "models" / "recipe"))

from captions import COLOURS, Words, held_out, words_of  # noqa: E402
from icons import COLOUR_SETS, HELD_OUT_SET, PACKAGES, Icon, icons_of, render  # noqa: E402

SHARDS, PAIRS_PER_SHARD, IMAGES_OF_KEPT_SET = 2, 500, 700
SIDE, QUALITY = 128, 90
MISMATCHED = 0.15
MTIME = 1_700_000_000
HELD_OUT_SETS = (*COLOUR_SETS, "fluent-emoji-high-contrast", "ph")

NAME_TEMPLATES = (
    "an icon showing {a}",
    "{n} in emoji style",
    "here you see {a}",
    "{A}, drawn as an icon",
    "stock icon: {n}",
    "the emoji for {n}",
    "Simple picture showing {a}.",
)
KEYWORD_TEMPLATES = (
    "{n} emoji, {k1}",
    "a drawing of {a}, {k1} and {k2}",
    "{N} – {k1}, {k2}",
    "{N} ({k1}, {k2})",
    "{n} sticker for messages about {k1}",
)


@dataclass(frozen=True)
class Pair:
    """One sample before it is written: its drawing, background and caption."""

    icon: Icon
    words: Words
    pixels: np.ndarray
    """(128, 128, 3) uint8"""
    caption: str

    @property
    def url(self) -> str:
        return f"npm:{PACKAGES[self.icon.set][0]}/{self.icon.name}"


def choose_icons(rng: random.Random) -> list[Icon]:
    """Icons of the kept set and of held-out concepts, in random order; flags, which abound, from the kept set only."""
    kept = icons_of(HELD_OUT_SET)
    held = [icon for name in HELD_OUT_SETS for icon in icons_of(name) if held_out(icon.concept)]
    held = [icon for icon in held if not words_of(icon.concept).name.startswith("flag of ")]
    total = SHARDS * PAIRS_PER_SHARD
    chosen = rng.sample(kept, IMAGES_OF_KEPT_SET) + rng.sample(held, total - IMAGES_OF_KEPT_SET)
    rng.shuffle(chosen)
    return chosen


def drawn(icon: Icon, colour: str | None, rng: random.Random) -> np.ndarray | None:
    """RGB pixels of the icon on white or on a plain colour; ``colour`` tints an icon that has none of its own."""
    side = round(SIDE * rng.uniform(0.72, 0.94))
    rgba = render(icon, side)
    if rgba is None:
        return None
    plain = [rgb for name, rgb in COLOURS.items() if name not in (colour, "white", "black")]
    background = (255, 255, 255) if colour or rng.random() < 0.6 else rng.choice(plain)
    if colour:
        rgba = np.concatenate([np.broadcast_to(np.uint8(COLOURS[colour]), (*rgba.shape[:2], 3)), rgba[..., 3:]], 2)
    canvas = Image.new("RGBA", (SIDE, SIDE), background)
    corner = (SIDE - side) // 2
    canvas.alpha_composite(Image.fromarray(rgba), (corner, corner))
    return np.asarray(canvas.convert("RGB"))


def with_article(name: str) -> str:
    """``a red apple``; names in the plural and flags go without or with ``the``."""
    if name.startswith("flag of "):
        return f"the {name}"
    if name.endswith("s") and not name.endswith("ss"):
        return name
    return f"{'an' if name[0] in 'aeio' or name.startswith('up') else 'a'} {name}"


def caption_of(words: Words, colour: str | None, rng: random.Random) -> str:
    """One caption by one of the templates."""
    name = f"{colour} {words.name}" if colour else words.name
    phrase = with_article(name)
    forms = {"n": name, "N": name.capitalize(), "a": phrase, "A": phrase.capitalize()}
    keywords = [k for k in words.keywords if k not in name]
    if len(keywords) < 2 or rng.random() < 0.55:
        return rng.choice(NAME_TEMPLATES).format(**forms)
    first, second = rng.sample(keywords, 2)
    return rng.choice(KEYWORD_TEMPLATES).format(**forms, k1=first, k2=second)


def make_pairs(rng: random.Random) -> list[Pair]:
    """All pairs, captions still right."""
    pairs = []
    for icon in choose_icons(rng):
        mono = icon.set not in (*COLOUR_SETS, HELD_OUT_SET)
        colour = rng.choice([c for c in COLOURS if c != "white"]) if mono else None
        words = words_of(icon.concept, "|".join(icon.names))
        pixels = drawn(icon, colour, rng)
        if pixels is None:
            raise SystemExit(f"{icon.set} {icon.name} cannot be drawn: take another seed")
        pairs.append(Pair(icon, words, pixels, caption_of(words, colour, rng)))
    return pairs


def mismatch(pairs: list[Pair], rng: random.Random) -> dict[int, str]:
    """Pair number -> caption of another concept, for the share that is wrong on purpose."""
    chosen = rng.sample(range(len(pairs)), round(MISMATCHED * len(pairs)))
    while True:
        sources = rng.sample(chosen, len(chosen))
        if all(pairs[a].words.name != pairs[b].words.name for a, b in zip(chosen, sources, strict=True)):
            return {a: pairs[b].caption for a, b in zip(chosen, sources, strict=True)}


def record_of(key: str, pair: Pair, caption: str, jpeg: bytes, *, mismatched: bool) -> dict:
    """The sample's JSON: img2dataset's columns behind the additional ones."""
    size = {"width": SIDE, "height": SIDE, "original_width": SIDE, "original_height": SIDE}
    status = {"key": key, "status": "success", "error_message": None}
    return {
        "uid": hashlib.md5(f"{key} {pair.url}".encode(), usedforsecurity=False).hexdigest(),
        "mismatched": mismatched,
        "concept": pair.words.name,
        "set": pair.icon.set,
        "caption": caption,
        "url": pair.url,
        **status,
        **size,
        "exif": "{}",
        "sha256": hashlib.sha256(jpeg).hexdigest(),
    }


def jpeg_of(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(content), MTIME, 0o444
    member.uname = member.gname = "bigdata"
    tar.addfile(member, io.BytesIO(content))


def write_shard(folder: Path, number: int, pairs: list[Pair], wrong: dict[int, str]) -> None:
    """One tar with its parquet and statistics; ``wrong`` is numbered from the shard's first pair."""
    records = []
    with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, pair in enumerate(pairs):
            key, caption, jpeg = f"{number * 10**4 + index:09d}", wrong.get(index, pair.caption), jpeg_of(pair.pixels)
            record = record_of(key, pair, caption, jpeg, mismatched=index in wrong)
            add(tar, f"{key}.jpg", jpeg)
            add(tar, f"{key}.json", json.dumps(record, indent=4).encode())
            add(tar, f"{key}.txt", caption.encode())
            records.append(record)
    schema = pa.Table.from_pylist(records).schema
    schema = schema.set(schema.get_field_index("error_message"), pa.field("error_message", pa.string()))
    pq.write_table(pa.Table.from_pylist(records, schema=schema), folder / f"{number:05d}.parquet")
    stats = {
        "count": len(pairs),
        "successes": len(pairs),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 0.0,
        "start_time": float(MTIME),
        "end_time": float(MTIME),
        "status_dict": {"success": len(pairs)},
    }
    (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats, indent=4))


def main() -> None:
    """Write both shards."""
    parser = argparse.ArgumentParser(description="Make the example shards of icon-caption pairs.")
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "shards")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(20)
    pairs = make_pairs(rng)
    wrong = mismatch(pairs, rng)
    for number in range(SHARDS):
        first = number * PAIRS_PER_SHARD
        here = {i - first: caption for i, caption in wrong.items() if first <= i < first + PAIRS_PER_SHARD}
        write_shard(folder, number, pairs[first : first + PAIRS_PER_SHARD], here)


if __name__ == "__main__":
    main()
