"""The same pairs as a tar, a folder, a parquet file and LLaVA JSON, in one order and under the same keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import caption, picture, write_tar

Pair = tuple[str, bytes, str]
"""Key, JPEG, caption"""

IMAGE_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pairs(n: int, seed: int = 0) -> list[Pair]:
    return [(f"{i:09d}", picture(seed + i), caption(seed + i)) for i in range(n)]


def as_tar(path: Path, samples: Sequence[Pair]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tar(
        path,
        [member for key, image, text in samples for member in ((f"{key}.jpg", image), (f"{key}.txt", text.encode()))],
    )


def as_folder(path: Path, samples: Sequence[Pair]) -> Path:
    path.mkdir(parents=True)
    for key, image, text in samples:
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / f"{key}.jpg").write_bytes(image)
        (path / f"{key}.txt").write_text(text)
    return path


def as_parquet(path: Path, samples: Sequence[Pair], *, row_group_size: int = 7, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([{"bytes": image, "path": f"{key}.jpg"} for key, image, _ in samples], IMAGE_STRUCT)
    table = {
        "id": [key for key, _, _ in samples],
        "image": images,
        "caption": [text for _, _, text in samples],
        **columns,
    }
    pq.write_table(pa.table(table), path, row_group_size=row_group_size)
    return path


def record(key: str, text: str, image: Any) -> dict[str, Any]:
    """A record as LLaVA has it; the turns are joined to `text` again."""
    first, _, rest = text.partition("\n")
    turns = [{"from": "human", "value": f"<image>\n{first}"}] + ([{"from": "gpt", "value": rest}] if rest else [])
    return {"id": key, "image": image, "conversations": turns}


def as_llava(path: Path, samples: Sequence[Pair], *, images: str = "images") -> Path:
    (path.parent / images).mkdir(parents=True)
    for key, image, _ in samples:
        (path.parent / images / f"{key}.jpg").write_bytes(image)
    records = [record(key, text, f"{key}.jpg") for key, _, text in samples]
    content = (
        "".join(json.dumps(item) + "\n" for item in records)
        if path.suffix == ".jsonl"
        else json.dumps(records, indent=2)
    )
    path.write_text(content)
    return path
