"""`mmfilter.stream`: every selected sample once an epoch, however many workers and nodes, with the shard's bytes."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path

import pytest
import webdataset as wds
from torch.utils.data import DataLoader

import mmfilter
from mmfilter.errors import SelectionError, ShardError
from tests import inputs
from tests.conftest import good, write_tar

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
N = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two shards of 30 pairs, and a run of both."""
    folder = tmp_path_factory.mktemp("stream")
    for name, first in (("a", 0), ("b", 30)):
        members = [member for i in range(first, first + 30) for member in good(f"{i:04d}", i)]
        write_tar(folder / f"{name}.tar", members)
    mmfilter.score([folder / "a.tar", folder / "b.tar"], run=folder / "run")
    return folder


def keys(samples) -> list[str]:
    return [sample["__key__"] for sample in samples]


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_workers_see_every_sample_once_an_epoch(folder, workers, start):
    samples = mmfilter.stream(folder / "run", top="100%", shuffle=7)
    context = start if workers else None
    loader = DataLoader(samples, batch_size=None, num_workers=workers, multiprocessing_context=context)
    epochs = [keys(loader) for _ in range(2)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(f"{i:04d}" for i in range(N))
    assert epochs[0] != epochs[1], "another order every epoch, also where the workers are new"


@pytest.mark.parametrize(("nodes", "workers"), [(2, 1), (3, 2), (7, 3)])
def test_nodes_and_workers_share_the_samples(folder, monkeypatch, nodes, workers):
    seen: list[str] = []
    sizes = []
    for rank in range(nodes):
        for worker in range(workers):
            for name, value in (("RANK", rank), ("WORLD_SIZE", nodes), ("WORKER", worker), ("NUM_WORKERS", workers)):
                monkeypatch.setenv(name, str(value))
            mine = keys(mmfilter.stream(folder / "run", top="50%", shuffle=1))
            sizes.append(len(mine))
            seen += mine
    assert len(seen) == len(set(seen)) == N // 2 and max(sizes) - min(sizes) <= 1


def test_it_streams_what_select_writes(folder, tmp_path):
    choice = {"top": "40%", "repeat": "CASE WHEN key < '0040' THEN 2 ELSE 1 END"}
    mmfilter.select(folder / "run", output=tmp_path / "best.tar", format="tar", **choice)
    written = list(wds.WebDataset(str(tmp_path / "best.tar"), shardshuffle=False))
    streamed = list(mmfilter.stream(folder / "run", **choice))
    assert len(written) > N * 0.4

    def members(sample):
        return {name: value for name, value in sample.items() if name != "__url__" and name != "__local_path__"}

    assert [members(sample) for sample in streamed] == [members(sample) for sample in written]
    assert {sample["__url__"] for sample in streamed} == {str(folder / "a.tar"), str(folder / "b.tar")}


@pytest.mark.parametrize("kind", ["parquet", "folder", "llava"])
def test_shards_that_are_not_tars(tmp_path, kind):
    pairs = inputs.pairs(12)
    place = {
        "parquet": lambda: inputs.as_parquet(tmp_path / "in/0.parquet", pairs),
        "folder": lambda: inputs.as_folder(tmp_path / "in", pairs),
        "llava": lambda: inputs.as_llava(tmp_path / "in/data.json", pairs),
    }[kind]()
    images = tmp_path / "in/images" if kind == "llava" else None
    mmfilter.score(place, run=tmp_path / "run", images=None if images is None else str(images))
    mmfilter.select(tmp_path / "run", top="50%", output=tmp_path / "best.tar", format="tar")
    written = list(wds.WebDataset(str(tmp_path / "best.tar"), shardshuffle=False))
    streamed = list(mmfilter.stream(tmp_path / "run", top="50%"))
    assert len(streamed) == len(written) == 6
    for one, other in zip(streamed, written, strict=True):
        assert {k: one[k] for k in one if k[:2] != "__"} == {k: other[k] for k in other if k[:2] != "__"}
        assert one["__key__"] == other["__key__"]


def test_the_order_is_the_sources_or_the_seeds(folder):
    plain = mmfilter.stream(folder / "run", top="100%")
    assert keys(plain) == keys(plain) == [f"{i:04d}" for i in range(N)] and plain.n_samples == N
    one, other = (mmfilter.stream(folder / "run", top="100%", shuffle=3) for _ in range(2))
    first, second = keys(one), keys(one)
    assert first != second and keys(other) == first
    other.set_epoch(1)
    assert keys(other) == second
    assert keys(mmfilter.stream(folder / "run", top="100%", shuffle=4)) != first


def test_a_copy_counts_for_itself(folder):
    samples = mmfilter.stream(folder / "run", top="100%", shuffle=3)
    first = keys(samples)
    stored = pickle.loads(pickle.dumps(samples))
    assert keys(stored) == keys(copy.deepcopy(samples)) != first


def test_it_is_a_pipeline_of_webdataset(folder):
    samples = mmfilter.stream(folder / "run", top="25%").decode("pil").to_tuple("jpg", "txt", "json")
    image, caption, record = next(iter(samples))
    assert image.size == (96, 80) and caption == record["caption"]


def test_what_cannot_be_streamed_is_told_before_anything_is_read(folder, tmp_path):
    write_tar(tmp_path / "a.tar", [member for i in range(4) for member in good(f"{i}", i)])
    mmfilter.score(tmp_path / "a.tar", run=tmp_path / "run")
    samples = mmfilter.stream(tmp_path / "run", top="100%")
    write_tar(tmp_path / "a.tar", [member for i in range(3) for member in good(f"x{i}", i)])
    with pytest.raises(SelectionError, match="has changed since it was scored"):
        mmfilter.stream(tmp_path / "run", top="100%")
    with pytest.raises(ShardError, match=r"a\.tar.* has (changed|become shorter) since it was scored"):
        list(samples)
    with pytest.raises(SelectionError, match="nothing says what to keep"):
        mmfilter.stream(folder / "run")
