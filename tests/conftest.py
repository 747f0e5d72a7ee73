"""Fixtures: the embedded model, and small shards made on the spot."""

from __future__ import annotations

import io
import json
import os
import tarfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.servers import Log, s3_server

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white")
THINGS = (
    "apple",
    "dog",
    "house",
    "face with tears of joy",
    "tree",
    "rocket in the night sky",
    "cat",
    "sun behind a small cloud",
)

WHOLE = ("ops", "recipes")
"""Folders of tests that run whole operations; together they take minutes"""

Member = tuple[str, bytes]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of whole operations are slow ones."""
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in WHOLE:
            item.add_marker(pytest.mark.slow)


def picture(seed: int, *, size: tuple[int, int] = (96, 80), kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """A deterministic picture: coloured blocks, so that every one differs."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return out.getvalue()


def caption(seed: int) -> str:
    """A caption of 2 to some 20 words, by seed."""
    rng = np.random.default_rng(seed)
    parts = [f"{COLOURS[rng.integers(10)]} {THINGS[rng.integers(8)]}" for _ in range(1 + seed % 4)]
    return " next to ".join(parts)


def good(key: str, seed: int, **columns: Any) -> list[Member]:
    """The members of a fine sample."""
    text = caption(seed)
    record = {"caption": text, "uid": f"{seed:032x}", **columns}
    return [(f"{key}.jpg", picture(seed)), (f"{key}.json", json.dumps(record).encode()), (f"{key}.txt", text.encode())]


def write_tar(path: Path, members: Iterable[Member]) -> Path:
    """A USTAR tar of these members, in this order."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


@pytest.fixture
def make_shard(tmp_path: Path) -> Callable[..., Path]:
    """make_shard("a.tar", n=20, seed=0): a shard of fine samples in a source folder of its own."""

    def make(name: str = "00000.tar", n: int = 20, seed: int = 0, extra: Iterable[Member] = ()) -> Path:
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        members = [member for i in range(n) for member in good(f"{i:09d}", seed + i)]
        return write_tar(folder / name, [*members, *extra])

    return make


@pytest.fixture(scope="session")
def tiny():
    """The embedded model and SAE, loaded once."""
    from mmfilter.core.cards.cards import load_card
    from mmfilter.core.model.loading import load_backbone
    from mmfilter.core.sae.pretrained import load_sae

    card = load_card("tiny")
    return card, load_backbone(card.model, card.layer, prompt=card.prompt), load_sae(card.sae)


class Quiet:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.samples = 0

    def start(self, phase: str, total_bytes: int | None) -> None:
        self.samples = 0

    def advance(self, samples: int, nbytes: int) -> None:
        self.samples += samples

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def quiet() -> Quiet:
    return Quiet()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[tuple[Log, Any]]:
    """An S3 server for the whole session, and a client of it."""
    import boto3

    with s3_server() as log:
        client = boto3.client(
            "s3",
            endpoint_url=log.url,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )
        yield log, client
        client.close()


@pytest.fixture
def s3(s3_endpoint: tuple[Log, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Log]:
    """The S3 server with an empty bucket `bucket`, as a user has one: named by the environment, and nothing else of
    this machine's settings."""
    import s3fs

    log, client = s3_endpoint
    urllib.request.urlopen(urllib.request.Request(f"{log.url}/moto-api/reset", method="POST")).close()
    client.create_bucket(Bucket="bucket")
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    settings = {
        "AWS_ENDPOINT_URL_S3": log.url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in (
        settings | {"AWS_CONFIG_FILE": str(tmp_path / "none"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}
    ).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    log.clear()
    yield log
    log.clear()
    s3fs.S3FileSystem.clear_instance_cache()
