"""From the bytes of a sample to an image and a caption, or to the reason why not.

Shards come from the web: any member may be huge, truncated, mislabelled or hostile. Nothing here
raises for bad data; a sample that cannot be used comes back with a `reason`.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmfilter.core.input.sample import CAPTION_FIELDS, IMAGE_EXTENSIONS, RawSample

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True)
class DecodeSettings:
    """What counts as a usable sample."""

    caption: str = "auto"
    """Where the caption is: `txt`, `conversations`, the name of a JSON field, or `auto` (the `.txt`,
    else the JSON's `caption` or `text`, else its `conversations`)."""

    max_pixels: int = 64_000_000
    """Images with more pixels are not decoded (decompression bombs)."""

    min_side: int = 2
    """Images with a shorter side carry no picture (1×1 tracking pixels)."""

    max_caption_chars: int = 20_000
    """Longer captions are not tokenised."""


@dataclass
class Pair:
    """One decoded sample; `reason` is None when it can be scored."""

    row: int
    columns: dict[str, Any] = field(default_factory=dict)
    """What the score table says of the sample, by column name."""
    image: Image.Image | None = None
    caption: str = ""
    reason: str | None = None


class _Unusable(Exception):
    """Carries the reason from the place that found it to `decode`."""


def decode(raw: RawSample, shard: str, settings: DecodeSettings) -> Pair:
    """Decode one sample; never raises for what the data holds."""
    pair = Pair(raw.row, {"key": raw.key, "shard": shard, "row": raw.row, "offset": raw.offset, "nbytes": raw.nbytes})
    try:
        if raw.problem:
            raise _Unusable(raw.problem)
        record = _record(raw.members.get("json"))
        pair.columns["uid"] = record["uid"] if isinstance(record.get("uid"), str) else None
        pair.caption = _caption(raw.members, record, settings)
        pair.columns["caption_chars"] = len(pair.caption)
        pair.columns["text_hash"] = _hash(pair.caption.encode("utf-8", "surrogatepass"))
        _check_caption(pair.caption, settings)
        payload = _image_bytes(raw.members)
        pair.columns["image_hash"] = _hash(payload)
        pair.image = _image(payload, settings, pair.columns)
    except _Unusable as unusable:
        pair.reason, pair.image = str(unusable), None
    return pair


def caption_of(members: dict[str, bytes], settings: DecodeSettings) -> str | None:
    """The caption, from where the settings say it is; None where there is none."""
    try:
        return _caption(members, _record(members.get("json")), settings)
    except _Unusable:
        return None


def images_of(members: dict[str, bytes]) -> dict[str, bytes]:
    """Extension -> bytes of the members that are images, in the order of the shard."""
    return {ext: content for ext, content in members.items() if ext in IMAGE_EXTENSIONS}


def picture(payload: bytes) -> Image.Image | None:
    """An image file decoded as it is for scoring; None where it cannot be."""
    try:
        return _image(payload, DecodeSettings(), {})
    except _Unusable:
        return None


def _hash(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()[:32]


def _record(payload: bytes | None) -> dict[str, Any]:
    """The sample's JSON object; an unreadable one only matters if the caption is in it."""
    if payload is None:
        return {}
    try:
        record = json.loads(payload)
    except (ValueError, RecursionError) as error:
        return {"": f"unreadable json: {str(error)[:80]}"}
    return record if isinstance(record, dict) else {"": f"json holds a {type(record).__name__}, not an object"}


def _caption(members: dict[str, bytes], record: dict[str, Any], settings: DecodeSettings) -> str:
    where = settings.caption
    if where in ("auto", "txt") and "txt" in members:
        try:
            return members["txt"].decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise _Unusable(
                f"caption is not UTF-8: byte {error.start} of the txt is 0x{error.object[error.start]:02x}"
            ) from None
    if where == "txt":
        raise _Unusable(f"no caption: no txt among the members ({_listed(members)})")
    fields = CAPTION_FIELDS if where == "auto" else () if where == "conversations" else (where,)
    for name in fields:
        text = record.get(name)
        if isinstance(text, str):
            return text.strip()
    if where in ("auto", "conversations") and "conversations" in record:
        return _conversation(record["conversations"])
    if "" in record:
        raise _Unusable(f"no caption: {record['']}")
    wanted = "txt, no caption in the json" if where == "auto" else f"{where!r} in the json"
    raise _Unusable(f"no caption: no {wanted} (members: {_listed(members)})")


def _listed(members: dict[str, bytes]) -> str:
    return ", ".join(sorted(members)) or "none"


def _conversation(turns: Any) -> str:
    """LLaVA's `[{"from": …, "value": …}]` as one text, a turn a line, without the image placeholder."""
    if not isinstance(turns, list):
        raise _Unusable("conversations is not a list of turns")
    values = [turn.get("value") for turn in turns if isinstance(turn, dict)]
    texts = [value for value in values if isinstance(value, str)]
    if not texts or len(texts) < len(values):
        raise _Unusable("conversations has a turn without a 'value' text")
    return "\n".join(value.replace("<image>", "").strip() for value in texts).strip()


def _check_caption(caption: str, settings: DecodeSettings) -> None:
    if not caption:
        raise _Unusable("empty caption")
    if len(caption) > settings.max_caption_chars:
        raise _Unusable(f"caption has {len(caption):,} characters, more than {settings.max_caption_chars:,}")
    if any("\ud800" <= char <= "\udfff" for char in caption):
        raise _Unusable("caption is not UTF-8: it holds a lone surrogate")


def _image_bytes(members: dict[str, bytes]) -> bytes:
    found = [ext for ext in members if ext in IMAGE_EXTENSIONS]
    if not found:
        raise _Unusable(f"no image: no {', '.join(IMAGE_EXTENSIONS)} among the members ({_listed(members)})")
    if len(found) > 1:
        raise _Unusable(f"{len(found)} images ({', '.join(found)}): one per sample is expected")
    if not members[found[0]]:
        raise _Unusable(f"image is empty: the {found[0]} has 0 bytes")
    return members[found[0]]


def _image(payload: bytes, settings: DecodeSettings, columns: dict[str, Any]) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what is checked right below
            image = Image.open(io.BytesIO(payload), formats=IMAGE_FORMATS)
        columns["width"], columns["height"] = image.size
        if image.width * image.height > settings.max_pixels:
            raise _Unusable(f"image has {image.width}×{image.height} pixels, more than {settings.max_pixels:,} in all")
        if min(image.size) < settings.min_side:
            raise _Unusable(
                f"image is {image.width}×{image.height} pixels: at least {settings.min_side} a side are needed"
            )
        return to_rgb(image)
    except Image.DecompressionBombError:
        raise _Unusable(f"image has more than {settings.max_pixels:,} pixels") from None
    except UnidentifiedImageError:
        raise _Unusable("image cannot be decoded: it is no JPEG, PNG or WebP") from None
    except _Unusable:
        raise
    except Exception as error:  # decoders of hostile bytes raise almost anything; each is one bad sample
        raise _Unusable(f"image cannot be decoded: {str(error)[:120] or type(error).__name__}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Three 8-bit channels; transparent pixels show white, 16-bit greys keep their upper byte."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
