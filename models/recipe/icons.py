"""Fetch the icon and emoji sets, map every icon to a concept, and render them with resvg.

A concept is a string: ``e:<emoji>`` for an icon that draws a Unicode emoji, ``i:<name>`` for any other icon.
So one concept has a drawing by each vendor that draws it, which is what the model generalises over.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image

COLOUR_SETS = ("noto", "noto-v1", "fluent-emoji-flat", "emojione", "fxemoji", "flat-color-icons")
MONO_SETS = ("fluent-emoji-high-contrast", "ph", "mdi")
"""Drawn in one colour, which we choose; the caption then names it."""
TRAIN_SETS = COLOUR_SETS + MONO_SETS
HELD_OUT_SET = "twemoji"
"""Never trained or tuned on: it stands for a drawing style that the model has not seen."""

PACKAGES = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5"),
    "fluent-emoji-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "emojione": ("@iconify-json/emojione", "1.2.3"),
    "fxemoji": ("@iconify-json/fxemoji", "1.2.2"),
    "flat-color-icons": ("@iconify-json/flat-color-icons", "1.2.3"),
    "fluent-emoji-high-contrast": ("@iconify-json/fluent-emoji-high-contrast", "1.2.6"),
    "ph": ("@iconify-json/ph", "1.2.2"),
    "mdi": ("@iconify-json/mdi", "1.2.3"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
    "unicode-emoji-json": ("unicode-emoji-json", "0.9.0"),
    "cldr": ("cldr-annotations-full", "48.2.0"),
    "emojibase": ("emojibase-data", "17.0.0"),
    "emojilib": ("emojilib", "4.0.3"),
}

VARIANT_OF_ANOTHER = re.compile(
    r"\d|alpha|logo|google|microsoft|apple|github|language|numeric|off$|alert|-box|file-|format|variant|circle$|square$"
    r"|plus|minus|check|remove|edit|cog$|sync|account-|database-|cellphone-|folder-|email-|calendar-|arrow|outline$"
)
"""Names in mdi that are letters, brands or another icon with a badge: hundreds of near-copies without new words."""


@dataclass(frozen=True)
class Icon:
    """One drawing: its set, its name there, its concept and the SVG body with its view box (left, top, width,
    height)."""

    set: str
    name: str
    concept: str
    names: tuple[str, ...]
    body: str
    view_box: tuple[float, float, float, float]


def icon_cache() -> Path:
    """Folder of the npm tarballs: ``$MMFILTER_ICON_CACHE``, else ``build/icons``."""
    return Path(os.environ.get("MMFILTER_ICON_CACHE", Path(__file__).parents[2] / "build" / "icons"))


@cache
def package_folder(name: str) -> Path:
    """Unpacked npm package of a set or word list, fetched with ``npm pack`` when the cache lacks it."""
    package, version = PACKAGES[name]
    stem = f"{package.removeprefix('@').replace('/', '-')}-{version}"
    folder = Path(__file__).parents[2] / "build" / "icons" / "unpacked" / stem
    if not folder.exists():
        tarball = icon_cache() / f"{stem}.tgz"
        if not tarball.exists():
            tarball.parent.mkdir(parents=True, exist_ok=True)
            command = ["npm", "pack", f"{package}@{version}", "--pack-destination", str(tarball.parent)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        partial = folder.with_name(folder.name + ".partial")
        with tarfile.open(tarball) as archive:
            archive.extractall(partial, filter="data")
        partial.rename(folder)
    return folder / "package"


@cache
def read_json(name: str, path: str) -> dict:
    """One JSON file of a package."""
    return json.loads((package_folder(name) / path).read_text(encoding="utf-8"))


def slug(name: str) -> str:
    """``Flag: Côte d’Ivoire`` and ``flag-cote-divoire`` should meet: lower case, words joined by a hyphen."""
    name = name.lower().replace("’", "").replace("'", "").replace("&", "and")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


@cache
def emoji_by_slug() -> dict[str, str]:
    """Slug of each Unicode emoji name (and, where they are unambiguous, of its CLDR and emojilib names) -> emoji."""
    emoji = read_json("unicode-emoji-json", "data-by-emoji.json")
    table = {}
    for char, facts in emoji.items():
        table[slug(facts["name"])] = char
        if facts["group"] == "Flags" and facts["name"].startswith("flag "):
            country = slug(facts["name"][5:])
            table |= {f"flag-{country}": char, f"flag-for-{country}": char, f"flag-for-flag-{country}": char}
    annotations = read_json("cldr", "annotations/en/annotations.json")["annotations"]["annotations"]
    shortcodes = read_json("emojilib", "dist/emoji-en-US.json")
    for char in emoji:
        bare = char.replace("\ufe0f", "")
        for name in annotations.get(bare, {}).get("tts", []) + shortcodes.get(char, [])[:1]:
            table.setdefault(slug(name), char)
    return table | {name.replace("-", ""): char for name, char in reversed(table.items()) if "-" in name}


@cache
def emoji_by_codepoints() -> dict[str, str]:
    """``1f600`` -> emoji, as iconify's chars.json writes it (without variation selectors)."""
    emoji = read_json("unicode-emoji-json", "data-by-emoji.json")
    return {"-".join(f"{ord(c):x}" for c in char if c != "\ufe0f"): char for char in emoji}


def view_box(icon: dict, icons: dict) -> tuple[float, float, float, float]:
    """The square view box in which an iconify icon is centred."""
    width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    side = max(width, height)
    return icon.get("left", 0) - (side - width) / 2, icon.get("top", 0) - (side - height) / 2, side, side


def emoji_icons(set_name: str) -> Iterator[Icon]:
    """Icons of a set that draw a Unicode emoji, one for each emoji."""
    icons = read_json(set_name, "icons.json")
    by_name = {name: name for name in icons["icons"]}
    by_name |= {a: d["parent"] for a, d in icons.get("aliases", {}).items() if set(d) == {"parent"}}
    chars = {name: emoji_by_codepoints().get(code) for code, name in read_json(set_name, "chars.json").items()}
    seen = set()
    for name, source in by_name.items():
        char = chars.get(name) or emoji_by_slug().get(slug(name)) or emoji_by_slug().get(name.replace("-", ""))
        if char and char not in seen and source in icons["icons"]:
            seen.add(char)
            icon = icons["icons"][source]
            yield Icon(set_name, name, f"e:{char}", (), icon["body"], view_box(icon, icons))


def name_kept(set_name: str, name: str) -> bool:
    """Whether an icon's name says in words what it draws."""
    if set_name == "ph":
        return name.endswith("-fill") and not re.search(r"\d|logo", name)
    if set_name == "mdi":
        return not VARIANT_OF_ANOTHER.search(name) and name.count("-") <= 2
    return not re.search(r"\d|logo", name)


def named_icons(set_name: str) -> Iterator[Icon]:
    """Icons of a set that has names only, with the plain aliases as further names."""
    icons = read_json(set_name, "icons.json")
    aliases: dict[str, list[str]] = {}
    for alias, facts in icons.get("aliases", {}).items():
        if set(facts) == {"parent"} and not re.search(r"\d|-box|outline", alias):
            aliases.setdefault(facts["parent"], []).append(alias)
    for name, icon in icons["icons"].items():
        if name_kept(set_name, name) and not icon.get("hidden"):
            words = tuple(a.removesuffix("-fill").replace("-", " ") for a in aliases.get(name, []))
            yield Icon(set_name, name, f"i:{name.removesuffix('-fill')}", words, icon["body"], view_box(icon, icons))


def icons_of(set_name: str) -> list[Icon]:
    """All icons of a set that have a concept."""
    named = set_name in ("ph", "mdi", "flat-color-icons")
    return list(named_icons(set_name) if named else emoji_icons(set_name))


def render(icon: Icon, size: int) -> np.ndarray | None:
    """RGBA pixels (size, size, 4), uint8, straight alpha; None for a body that resvg refuses or that is empty."""
    import resvg_py

    box = " ".join(f"{v:g}" for v in icon.view_box)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{size}" height="{size}" color="#000">{icon.body}</svg>'
    )
    try:
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))
    except ValueError:
        return None
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    pixels = np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.BICUBIC))
    return pixels if (pixels[..., 3] > 20).mean() >= 0.02 else None


def _render_64(icon: Icon) -> np.ndarray | None:
    return render(icon, 64)


def render_all(path: Path) -> None:
    """Write icons.npz: pixels (n, 64, 64, 4) uint8, set (n,), concept (n,), names (n,) joined by ``|``."""
    icons = [icon for name in (*TRAIN_SETS, HELD_OUT_SET) for icon in icons_of(name)]
    with Pool() as pool:
        drawn = [(i, p) for i, p in zip(icons, pool.map(_render_64, icons, chunksize=64), strict=True) if p is not None]
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial,
        pixels=np.stack([p for _, p in drawn]),
        set=np.array([i.set for i, _ in drawn]),
        concept=np.array([i.concept for i, _ in drawn]),
        names=np.array(["|".join(i.names) for i, _ in drawn]),
    )
    partial.rename(path)
