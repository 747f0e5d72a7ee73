"""What the words know of a concept, and captions made of it.

Three families of templates: ``TRAIN`` is a small grammar with many fillers, ``CHOICE`` and ``REPORT`` are short
lists that share no template with it, since strangers will phrase captions their own way.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from functools import cache

from icons import read_json

PLAIN_WORDS = re.compile(r"^[a-z][a-z '\-]{1,20}$")
MAX_KEYWORDS = 14

COLOURS = {
    "red": (220, 40, 40),
    "green": (50, 170, 70),
    "blue": (50, 90, 220),
    "yellow": (245, 215, 60),
    "orange": (245, 140, 40),
    "purple": (140, 60, 190),
    "pink": (245, 130, 180),
    "brown": (130, 80, 45),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
    "gray": (140, 140, 140),
    "cyan": (70, 200, 220),
}

PREFIXES = (
    "", "", "", "a ", "a ", "the ", "one ", "an emoji of ", "an emoji of a ", "emoji: ", "emoji showing ",
    "picture of ", "a picture of a ", "an image of ", "image of a ", "a photo of a ", "photo of ", "drawing of ",
    "a drawing of a ",
    "an icon of ", "icon of a ", "icon showing a ", "icon for ", "a small {s} icon of ", "illustration of ",
    "an illustration of a ", "a {s} illustration of ", "a {s} drawing of a ", "{s} picture of ", "{s} ", "a {s} ",
    "a symbol for ", "symbol of ", "sign for ", "this is ", "this is a ", "here is a ", "there is a ", "it shows a ",
    "this image shows ", "this icon depicts ", "a graphic of ", "graphic showing ", "cartoon of a ", "a cartoon ",
    "sticker of a ", "a sticker with ", "clip art of ", "artwork of ", "a sketch of a ", "a view of a ",
    "depiction of ", "vector image of ", "a logo with a ", "close up of a ", "my favourite ", "look at this ",
    "representation of ",
)  # fmt: skip
SUFFIXES = (
    "", "", "", "", "", " emoji", " icon", " symbol", " sign", " drawing", " picture", " in {s} style", ", {s} style",
    " in a {s} design", " illustration", " vector art", " clipart", " sticker", " graphic", " image", " cartoon",
    ", isolated", ", centered", " for the web", " for an app", ", high quality", ", digital art", " shown here",
    ".", "!",
)  # fmt: skip
STYLES = (
    "flat", "simple", "cute", "colorful", "colourful", "modern", "minimal", "small", "tiny", "big", "clean", "bright",
    "nice", "cartoon", "vector", "stylized", "glossy", "retro", "bold", "digital",
)  # fmt: skip
BACKGROUNDS = (
    " on a {c} background",
    " on {c} background",
    " against a {c} background",
    ", {c} background",
    " with {c} behind it",
    " on {c}",
    " over a {c} backdrop",
    " in front of a {c} wall",
)
KEYWORD_ORDERS = (
    "{n}, {k}",
    "{n}: {k}",
    "{n} {k}",
    "{k} {n}",
    "{n} ({k})",
    "{k}: {n}",
    "{n} with {k}",
    "{n} for {k}",
    "{k}, {n}",
    "{n} - {k}",
    "{n} meaning {k}",
    "{n} about {k}",
    "{n} tagged {k}",
)
"""Ways to put a name beside its keywords"""
SIDE_BY_SIDE = (
    "{a} left of {b}",
    "{a} next to {b}",
    "{a} and {b}",
    "{a} beside {b}",
    "{a} to the left of {b}",
    "{a}, {b}",
)
STACKED = ("{a} above {b}", "{a} over {b}", "{a} on top of {b}", "{a} and {b}")

CHOICE_TEMPLATES = (
    "{n}",
    "an emoji that looks like {n}",
    "tiny pictogram: {n}",
    "we can see a {n} here",
    "{n} ({k1})",
    "a web graphic with {n} on it",
    "{k1} and {k2}: {n}",
    "{n}, also called {k1}",
    "the {n} as a cartoon figure",
    "messenger smiley, {n}",
)
REPORT_TEMPLATES = (
    "{n}",
    "a rendering of {n}",
    "an emoji depicting {n}",
    "{n}, used for {k1}",
    "people send {n} in chats",
    "glyph named {n}",
    "{k1} / {k2} / {n}",
    "the well known {n} pictogram",
    "cute little {n} artwork",
    "{n} as seen on a phone",
)


@dataclass(frozen=True)
class Words:
    """What can be said of a concept: its name, other names, keywords and the group it belongs to."""

    name: str
    names: tuple[str, ...]
    keywords: tuple[str, ...]
    group: str | None


@cache
def _subgroups() -> dict[int, str]:
    messages = read_json("emojibase", "en/messages.json")
    return {m["order"]: m["message"].replace("-", " ") for m in messages["subgroups"]}


@cache
def _emojibase() -> dict[str, dict]:
    return {d["emoji"].replace("\ufe0f", ""): d for d in read_json("emojibase", "en/data.json")}


def _emoji_words(char: str) -> Words:
    """Name from Unicode, keywords from CLDR, emojibase and emojilib."""
    facts = read_json("unicode-emoji-json", "data-by-emoji.json")[char]
    bare = char.replace("\ufe0f", "")
    base = _emojibase().get(bare, {})
    cldr = read_json("cldr", "annotations/en/annotations.json")["annotations"]["annotations"].get(bare, {})
    shortcodes = [w.replace("_", " ") for w in read_json("emojilib", "dist/emoji-en-US.json").get(char, [])]
    name = facts["name"].lower()
    if facts["group"] == "Flags" and name.startswith("flag "):
        name = f"flag of {name[5:]}"
    others = [*cldr.get("tts", []), base.get("label", ""), *shortcodes[:1]]
    names = [n.lower().replace("flag: ", "flag of ") for n in others]
    keywords = {w.lower() for w in [*cldr.get("default", []), *(base.get("tags") or []), *shortcodes]}
    plain = sorted(w for w in keywords - {name} if PLAIN_WORDS.match(w))
    return Words(name, _distinct(name, names), tuple(plain[:MAX_KEYWORDS]), _subgroups().get(base.get("subgroup")))


def _distinct(name: str, others: list[str]) -> tuple[str, ...]:
    """Other names in plain letters that are not the name itself."""
    return tuple(dict.fromkeys(n for n in others if n != name and PLAIN_WORDS.match(n)))


def words_of(concept: str, icon_names: str = "") -> Words:
    """Words of a concept; ``icon_names`` are an icon's aliases, joined by ``|``."""
    kind, value = concept.split(":", 1)
    if kind == "e":
        return _emoji_words(value)
    name = value.replace("-", " ")
    return Words(name, _distinct(name, icon_names.lower().split("|")), (), None)


def held_out(concept: str) -> bool:
    """Whether the concept belongs to the 10 % kept out of training, by a hash of its name, in every set."""
    digest = hashlib.md5(("h" + words_of(concept).name).encode(), usedforsecurity=False).hexdigest()
    return int(digest, 16) % 10 == 0


def _pick_name(words: Words, rng: random.Random) -> str:
    return rng.choice(words.names) if words.names and rng.random() < 0.3 else words.name


def _fill(template: str, rng: random.Random) -> str:
    return template.replace("{s}", rng.choice(STYLES))


def _with_keywords(name: str, keywords: list[str], rng: random.Random) -> str:
    """A name and one to four keywords in one of the ways that people list them."""
    some = keywords[: rng.randint(1, 4)]
    joined = rng.choice((" ", ", ", ", ", " and ")).join(some)
    return rng.choice(KEYWORD_ORDERS).format(n=name, k=joined)


def core_phrase(words: Words, rng: random.Random) -> str:
    """The part of a caption that says what is drawn: name, name and keywords, or keywords only."""
    name = _pick_name(words, rng)
    keywords = list(words.keywords)
    rng.shuffle(keywords)
    draw = rng.random()
    if not keywords or draw < 0.55:
        return f"{words.group}, {name}" if words.group and rng.random() < 0.1 else name
    if draw < 0.85:
        return _with_keywords(name, keywords, rng)
    return rng.choice((" ", ", ", ", ")).join(keywords[: rng.randint(2, 4)])


def drop_words(text: str, rng: random.Random, probability: float) -> str:
    """Leave out each word with the probability, but never all of them."""
    words = text.split(" ")
    kept = [w for w in words if rng.random() >= probability]
    return " ".join(kept) if kept else text


def train_caption(words: Words, rng: random.Random, *, tint: str | None, background: str | None) -> str:
    """One caption of the training grammar, lower case."""
    core = core_phrase(words, rng)
    if rng.random() < 0.1:
        core = drop_words(core, rng, 0.25)
    core = f"{tint} {core}" if tint else core
    text = core
    if rng.random() < 0.75:
        text = _fill(rng.choice(PREFIXES), rng) + core + _fill(rng.choice(SUFFIXES), rng)
    return text + rng.choice(BACKGROUNDS).format(c=background) if background else text


def pair_caption(first: str, second: str, rng: random.Random, *, side_by_side: bool, background: str | None) -> str:
    """Caption of a scene with two items, the first one left of or above the second."""
    text = rng.choice(SIDE_BY_SIDE if side_by_side else STACKED).format(a=first, b=second)
    if rng.random() < 0.3:
        text = _fill(rng.choice(PREFIXES), rng) + text
    return text + rng.choice(BACKGROUNDS).format(c=background) if background else text


def test_caption(words: Words, templates: tuple[str, ...], rng: random.Random, *, tint: str | None = None) -> str:
    """A caption by one of the templates kept apart from training."""
    keywords = list(words.keywords) or [words.group or "things"]
    rng.shuffle(keywords)
    name = f"{tint} {words.name}" if tint else words.name
    return rng.choice(templates).format(n=name, k1=keywords[0], k2=keywords[-1])
