"""A first recipe for shards that nothing is known of yet but their head."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmfilter.core.cards.cards import card_names, load_card
from mmfilter.core.files import atomic
from mmfilter.core.input.decode import DecodeSettings, caption_of
from mmfilter.core.input.places import STDIN
from mmfilter.core.input.sample import CAPTION_FIELDS, RawSample
from mmfilter.core.input.shards import open_sources
from mmfilter.core.input.source import NO_OPTIONS, InputOptions, Source
from mmfilter.errors import RecipeError

HEAD = 100
"""Samples that are looked at"""

_UID = re.compile(r"[0-9a-fA-F]{32}")


@dataclass(frozen=True)
class Look:
    """What the head of the first shard says."""

    patterns: tuple[str, ...]
    n_shards: int
    n_samples: int | None
    """Estimate over all shards from the sizes of tars; None where these are unknown, as of most URLs"""
    caption: str
    """Where all captions that were seen are; `auto` where that is more than one place, or something else than tars"""
    has_uid: bool
    """Whether every sample that was seen has a uid of 32 hexadecimal digits, as DataComp's have"""
    output: Literal["shards", "llava-json", "keys"] = "shards"
    """The format that these pairs are most likely wanted in; only keys where nothing can be read again"""
    options: InputOptions = NO_OPTIONS
    """What the user says of them"""

    @property
    def told(self) -> str:
        """In words."""
        shards = f"{self.n_shards:,} {'shard' if self.n_shards == 1 else 'shards'}"
        return shards + ("" if self.n_samples is None else f" with about {self.n_samples:,} samples")


def look(patterns: Sequence[str], options: InputOptions = NO_OPTIONS) -> Look:
    """Look at the first shard; raises `ShardError`, and `RecipeError` when there is nothing to see or nothing to
    use."""
    if STDIN in patterns:
        raise RecipeError("a recipe names its shards, so that it can go on with them; '-' is a tar on stdin")
    sources = open_sources(patterns, options)
    first = sources[0]
    with ExitStack() as stack:
        samples = first.samples()
        stack.callback(getattr(samples, "close", lambda: None))
        head = list(itertools.islice(samples, HEAD))
    if not head:
        raise RecipeError(f"shard {first.path!r} holds no samples: nothing to write a recipe for")
    if all(raw.problem for raw in head):
        hint = "; --images names the folder of its images" if first.kind == "llava-json" else ""
        raise RecipeError(
            f"none of the first {len(head)} samples of shard {first.path!r} can be used, the first has: "
            f"{head[0].problem}{hint}"
        )
    uids = [_uid(raw) for raw in head]
    found = _caption(head)
    return Look(
        tuple(patterns),
        len(sources),
        _estimate(sources, head),
        caption=options.caption
        if options.caption != "auto"
        else found
        if all(source.is_tar for source in sources)
        else "auto",
        has_uid=all(uid and _UID.fullmatch(uid) for uid in uids),
        output="keys"
        if any(source.once for source in sources)
        else "llava-json"
        if found == "conversations"
        else "shards",
        options=options,
    )


def _estimate(sources: Sequence[Source], head: list[RawSample]) -> int | None:
    if len(sources) == 1 and len(head) < HEAD:
        return len(head)
    if any(source.remote or source.kind != "tar" for source in sources):
        return None
    total = sum(source.stamp().size or 0 for source in sources)
    end = (head[-1].offset or 0) + (head[-1].nbytes or 0)
    return max(len(head), _rounded(total * len(head) / end))


def _rounded(value: float) -> int:
    """To two significant digits: more than that an estimate does not know."""
    return int(float(f"{value:.2g}"))


def _caption(head: list[RawSample]) -> str:
    """The one place where all captions are, else `auto`."""
    places = ("txt", *CAPTION_FIELDS, "conversations")
    found = Counter(
        next((place for place in places if caption_of(raw.members, DecodeSettings(place)) is not None), "")
        for raw in head
    )
    found.pop("", None)
    return next(iter(found)) if len(found) == 1 else "auto"


def _uid(raw: RawSample) -> str | None:
    try:
        record = json.loads(raw.members.get("json", b"null"))
    except (ValueError, RecursionError):
        return None
    uid = record.get("uid") if isinstance(record, dict) else None
    return uid if isinstance(uid, str) else None


def write_draft(path: Path, text: str) -> None:
    """Write it; raises `RecipeError` when the file is there already or cannot be written."""
    if os.path.lexists(path):
        raise RecipeError(f"{str(path)!r} is there already; name another file with -o, or delete it first")
    try:
        with atomic(path) as temporary:
            temporary.write_text(text, "utf-8")
    except OSError as error:
        raise RecipeError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error


def draft(found: Look) -> str:
    """The recipe as YAML with comments."""
    scoring = [name for name in card_names() if not load_card(name).cannot_score]
    plain = re.fullmatch("[a-z_]+", found.caption)
    caption = found.caption if plain else json.dumps(found.caption, ensure_ascii=False)
    return _DRAFT.format(
        told=found.told,
        shards="\n".join(f"    - {json.dumps(pattern, ensure_ascii=False)}" for pattern in found.patterns),
        caption=f"{caption}  ".ljust(19),
        more=_more(found.options),
        cards="\n".join(f"  #   {name}" for name in scoring if name != "tiny"),
        output=_OUTPUTS[found.output],
        datacomp=_DATACOMP if found.has_uid else "",
    )


def _more(options: InputOptions) -> str:
    """Lines for what has been said of the inputs beside where their captions are."""
    images = "" if options.images is None else f"  images: {json.dumps(options.images, ensure_ascii=False)}\n"
    return images + ("  allow_pipe: true            # runs the commands in a shell\n" if options.allow_pipe else "")


_SHARDS = """  - path: best
    format: shards            # or parquet, hf, llava-json, datacomp (new folders), tar, keys (new files)
    shard_size: 10000"""

_LLAVA = """  - path: best
    format: llava-json        # captions are conversations; or shards, parquet, hf, datacomp (new folders), \
tar, keys (new files)
    shard_size: 10000"""

_KEYS = """  - path: best.txt
    format: keys              # what a command prints cannot be read again, so nothing else is possible"""

_OUTPUTS = {"shards": _SHARDS, "llava-json": _LLAVA, "keys": _KEYS}

_DATACOMP = """
  # The samples have uids, so this is possible too, for DataComp's resharder:
  # - path: subset.npy
  #   format: datacomp"""

_DRAFT = """\
# Written by mmfilter init: {told}.
# mmfilter run recipe.yaml --dry-run says what would be done; without --dry-run it is done, and goes on where it was
# stopped.
# Relative paths are relative to the directory where mmfilter runs, not to this file.

inputs:
  shards:                     # paths, globs, brace patterns, URLs
{shards}
  caption: {caption}# txt, conversations, the name of a JSON field or parquet column, or auto
{more}
model:
  # tiny is embedded, for trying this out on icons and emoji; on photographs its scores mean nothing.
  # For real data name the card of a real model (mmfilter models list):
{cards}
  name: tiny
  # layer: 12                 # for a local folder or hub id without a card: the layer, and an SAE for it
  # sae: my-sae

run:
  directory: mmfilter-run     # scores, codes and duplicates, for this recipe and its later versions
  device: auto                # cpu, cuda, cuda:1
  batch_size: 32
  # limit: 1000               # score only so many samples, for a first look

# check:                      # can the scores tell true pairs from shuffled ones here? Costs two passes over the sample
#   sample: 1000

# dedup:                      # leaves near-duplicates out; needs pip install 'mmfilter[cpu]'
#   threshold: 0.95
#   on: both                  # or image, text

select:
  top: 20%                    # a share or a number; or min: 0.3
  by: similarity              # a score, or a formula such as '0.7 * similarity + 0.3 * rank(saev)'
  # where: width >= 200 AND caption_chars >= 5

outputs:
{output}{datacomp}
"""
