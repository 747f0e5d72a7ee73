"""The samples of a run's shards: the limit over all of them, and streams that can be read only once."""

from __future__ import annotations

import pytest

from mmfilter.core.input.places import Stamp
from mmfilter.core.input.sample import RawSample
from mmfilter.core.input.shards import open_source
from mmfilter.core.input.source import Source
from mmfilter.core.pipeline.intake import Intake


class Stream(Source):
    """A source of which the second reading would find nothing."""

    once = True

    def __init__(self, n: int) -> None:
        super().__init__("-")
        self.readings = 0
        self._n = n

    def stamp(self) -> Stamp:
        return Stamp()

    def samples(self, max_member_bytes: int = 0):
        self.readings += 1
        for row in range(self._n):
            yield RawSample(f"s{row}", row, None, None, {}, None)


def rows(samples) -> list[int]:
    return [raw.row for raw in samples]


@pytest.mark.parametrize(("limit", "expected"), [(None, [6, 6]), (4, [4, 0]), (6, [6, 0]), (9, [6, 3]), (0, [0, 0])])
def test_the_limit_counts_over_all_shards(make_shard, limit, expected):
    sources = [open_source(str(make_shard(f"{i}.tar", n=6))) for i in range(2)]
    intake = Intake(limit)
    assert [len(rows(intake.samples(source))) for source in sources] == expected
    assert intake.exhausted is (limit is not None and limit <= 9)


def test_samples_that_were_scored_before_count():
    intake = Intake(5)
    intake.use_up(3)
    assert rows(intake.samples(Stream(9))) == [0, 1]
    assert intake.exhausted


def test_a_head_is_not_used_up(make_shard):
    source = open_source(str(make_shard(n=6)))
    intake = Intake(5)
    assert rows(intake.head(source, 3)) == [0, 1, 2]
    assert rows(intake.head(source, 50)) == [0, 1, 2, 3, 4], "no further than the limit"
    assert rows(intake.samples(source)) == [0, 1, 2, 3, 4]


def test_the_head_of_a_stream_is_read_once_and_comes_again_in_the_pass():
    stream, intake = Stream(7), Intake()
    assert rows(intake.head(stream, 3)) == rows(intake.head(stream, 3)) == [0, 1, 2]
    assert rows(intake.samples(stream)) == [0, 1, 2, 3, 4, 5, 6]
    assert stream.readings == 1
