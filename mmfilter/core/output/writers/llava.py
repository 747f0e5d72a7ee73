"""LLaVA's training data: one JSON list of `{id, image, conversations}`, and the image files beside it.

No path comes from the data: files are named by what is harmless of a key.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from mmfilter.core.output.writers.kept import Kept, KeptSample, Written

FILE = "llava.json"
IMAGES = "images"
PLACEHOLDER = "<image>"
"""Where a conversation has an image; LLaVA puts the images of an item there, one each"""
PROMPT = "Describe the image."
"""What the human asks where the data has a caption only"""

_MAX_NAME = 80


def write_llava(folder: Path, kept: Kept) -> Written:
    """Write `llava.json` and `images/00000000/` …, of `shard_size` samples each."""
    (folder / IMAGES).mkdir()
    names: dict[int, set[str]] = {}
    nbytes = 0
    uneven, first = 0, ""
    with open(folder / FILE, "xb") as file:
        separator = b"[\n"
        for number, samples in kept.batches():
            if number not in names:
                names = {number: set()}
                (folder / IMAGES / f"{number:08d}").mkdir()
            for sample in samples:
                paths = [f"{number:08d}/{_name(sample, ext, names[number])}" for ext in sample.images]
                nbytes += _write_images(folder / IMAGES, paths, sample)
                entry = _entry(sample, paths)
                if _placeholders(entry) != len(paths):
                    uneven, first = uneven + 1, first or sample.key
                file.write(separator + _encoded(entry))
                separator = b",\n"
        file.write(b"\n]\n" if separator == b",\n" else b"[]\n")
    warnings: tuple[str, ...] = ()
    if uneven:
        warnings = (
            f"{uneven:,} samples do not have {PLACEHOLDER} once for each image in their words (first: key {first!r}): "
            "LLaVA trains on these without the image, or stops",
        )
    return Written(nbytes + (folder / FILE).stat().st_size, kept.number, f"{IMAGES}/%08d", kept.n_shards, warnings)


def _write_images(folder: Path, paths: list[str], sample: KeptSample) -> int:
    for path, content in zip(paths, sample.images.values(), strict=True):
        with open(folder / path, "xb", buffering=0) as file:
            file.write(content)
    return sum(map(len, sample.images.values()))


def _name(sample: KeptSample, ext: str, taken: set[str]) -> str:
    """A file name that is new in its folder, also where upper and lower case are one."""
    harmless = re.sub(r"[^A-Za-z0-9_-]+", "_", sample.key)[:_MAX_NAME]
    if harmless != sample.key:
        harmless += f"-{hashlib.sha256(sample.key.encode()).hexdigest()[:8]}"
    name, n = f"{harmless}.{ext}", 1
    while name.lower() in taken:
        n += 1
        name = f"{harmless}-{n}.{ext}"
    taken.add(name.lower())
    return name


def _entry(sample: KeptSample, paths: list[str]) -> dict[str, Any]:
    """One item of the list; `image` is a list where a sample has several, as LLaVA-NeXT has it."""
    record = _record(sample.members.get("json"))
    conversations = record.get("conversations")
    if not _are_turns(conversations):
        placeholders = f"{PLACEHOLDER}\n" * len(paths)
        conversations = [{"from": "human", "value": placeholders + PROMPT}, {"from": "gpt", "value": sample.caption}]
    given = record.get("id")
    return {
        "id": given if isinstance(given, str | int) else sample.key,
        "image": paths[0] if len(paths) == 1 else paths,
        "conversations": conversations,
    }


def _placeholders(entry: dict[str, Any]) -> int:
    return sum(turn["value"].count(PLACEHOLDER) for turn in entry["conversations"] if isinstance(turn["value"], str))


def _record(content: bytes | None) -> dict[str, Any]:
    try:
        record = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _are_turns(conversations: Any) -> bool:
    return (
        isinstance(conversations, list)
        and bool(conversations)
        and all(isinstance(turn, dict) and "value" in turn for turn in conversations)
    )


def _encoded(entry: dict[str, Any]) -> bytes:
    try:
        return json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can hold and UTF-8 cannot
        return json.dumps(entry).encode()
