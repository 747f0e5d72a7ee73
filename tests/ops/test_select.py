"""Which samples are selected: the rule against a plain sort."""

from __future__ import annotations

import json
import math
import random
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pytest

from mmfilter.core.files import write_json
from mmfilter.core.run.score_tables import Column
from mmfilter.core.selection.choice import Decision, choose
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.core.selection.top import Top
from mmfilter.ops.select import select
from tests.runs import add_table, error_of, keys_of, make_run, make_shard, samples_of


def test_known_answers(run, tmp_path):
    assert keys_of(run, tmp_path, top="2") == ["b1", "a0"]
    assert keys_of(run, tmp_path, top="30%") == ["b1", "b4", "a0"]
    assert keys_of(run, tmp_path, min=0.5) == ["b1", "b2", "b4", "a0", "a2", "a3"]
    assert keys_of(run, tmp_path, top="20%", min=0.85) == ["b1"]
    assert keys_of(run, tmp_path, top="100%") == ["b0", "b1", "b2", "b4", "a0", "a1", "a2", "a3", "a4"]
    assert keys_of(run, tmp_path, top="2", where="key LIKE 'a%'") == ["a0", "a2"]
    assert keys_of(run, tmp_path, top="40%", where="row = 2 OR row = 3") == ["a2", "a3"]
    assert keys_of(run, tmp_path, min=0.0, where="false") == []


def test_ties_break_by_key_whatever_the_input_order(run, tmp_path):
    assert keys_of(run, tmp_path, top="4") == ["b1", "b4", "a0", "a2"]
    assert keys_of(run, tmp_path, top="5") == ["b1", "b4", "a0", "a2", "a3"]


def test_a_column_is_found_whatever_its_case(run, tmp_path):
    assert keys_of(run, tmp_path, top="2", by="Similarity") == keys_of(run, tmp_path, top="2")


def test_a_minimum_that_float32_cannot_hold(run, tmp_path):
    assert keys_of(run, tmp_path, min=1e39) == []
    assert len(keys_of(run, tmp_path, min=-1e39)) == 9


def test_an_infinite_score_ranks_and_leaves_the_record_valid_json(tmp_path):
    make_shard(tmp_path / "x.tar", ["a", "b", "c"])
    run = make_run(tmp_path / "run", {str(tmp_path / "x.tar"): [-math.inf, math.inf, 0.5]})
    assert keys_of(run, tmp_path, top="2") == ["b", "c"]
    selection = select(run, SelectSettings(top="100%", output=tmp_path / "best"))
    assert (selection.kept, selection.cut) == (3, None)
    assert json.loads((tmp_path / "best/manifest.json").read_text(), parse_constant=pytest.fail)["cut"] is None


def test_a_stored_float32_meets_the_same_decimal(run, tmp_path):
    assert keys_of(run, tmp_path, min=0.7) == ["b1", "b4", "a0"]


@pytest.mark.parametrize("top", ["20%", "33.3%", "50%", "0.5%", "99.99%", "100%", "12.5%"])
def test_quota_is_exact(top):
    for n in [0, 1, 2, 3, 4, 5, 7, 8, 10, 100, 999, 1000, 10**9 + 1]:
        exact = (Decimal(n) * Decimal(top[:-1]) / 100).quantize(Decimal(1), ROUND_HALF_UP)
        assert Top.parse(top).of(n) == int(exact)


def brute_force(rows: list[dict], by: str, top: str | None, minimum: float | None, passes) -> list[dict]:
    candidates = [row for row in rows if passes(row)]
    scored = [row for row in candidates if row["ok"] and row[by] is not None and not math.isnan(row[by])]
    left = [row for row in scored if minimum is None or row[by] >= minimum]
    if top is not None:
        n = (
            int(top)
            if top[-1] != "%"
            else int((Decimal(len(candidates)) * Decimal(top[:-1]) / 100).quantize(Decimal(1), ROUND_HALF_UP))
        )
        left = sorted(left, key=lambda row: (-row[by], row["key"], row["shard"], row["row"]))[:n]
    kept = {(row["shard"], row["row"]) for row in left}
    return [row for row in rows if (row["shard"], row["row"]) in kept]


def random_rows(randomness: random.Random) -> list[dict]:
    """Rows of one to five shards in some order, which share keys and many scores."""
    names = [f"/s{i}.tar" for i in range(randomness.randrange(1, 6))]
    randomness.shuffle(names)
    values = [None, math.nan, -1.0, 0.0, math.inf] + [
        randomness.choice([0.25, 0.5, 0.75, randomness.uniform(-1, 1)]) for _ in range(20)
    ]
    rows = []
    for name in names:
        keys = randomness.sample(["grün", "日本", "z", "Z", *(f"k{i}" for i in range(40))], randomness.randrange(0, 40))
        for row, key in enumerate(keys):
            score = randomness.choice(values)
            scores = {
                "similarity": None if score is None else float(np.float32(score)),
                "cooccurrence": float(randomness.randrange(4)),
                "width": randomness.randrange(5),
            }
            rows.append(
                {"key": key, "shard": name, "row": row, "offset": 0, "nbytes": 512, "ok": randomness.random() < 0.9}
                | scores
            )
    return rows


CONDITIONS = {
    None: lambda row: True,
    "width >= 2": lambda row: row["width"] >= 2,
    "similarity < 0.6": lambda row: row["similarity"] is not None and row["similarity"] < 0.6,
    "key > 'k2' -- and so on": lambda row: row["key"].encode() > b"k2",
}


def random_request(randomness: random.Random) -> tuple[str, str | None, float | None]:
    top = randomness.choice([None, "1", "7", "10%", "33.3%", "50%", "100%", "1000"])
    minimum = randomness.choice([None, 0.5, 1.0]) if top else 0.5
    return randomness.choice(["similarity", "cooccurrence", "width"]), top, minimum


@pytest.mark.parametrize("seed", range(12))
def test_selection_is_that_of_a_plain_sort(tmp_path, seed):
    randomness = random.Random(seed)
    rows = random_rows(randomness)
    run = tmp_path / "run"
    shards = list(dict.fromkeys(row["shard"] for row in rows)) or ["/none.tar"]
    for i, shard in enumerate(shards):
        add_table(run, f"t{i}", shard, [row for row in rows if row["shard"] == shard])
    write_json(run / "manifest.json", {"inputs": [{"name": f"t{i}", "shard": shard} for i, shard in enumerate(shards)]})
    by, top, minimum = random_request(randomness)
    where = randomness.choice(list(CONDITIONS))
    settings = SelectSettings(top=top, min=minimum, by=by, where=where, format="keys", output=tmp_path / "keys")
    there = len(brute_force(rows, by, "100%", None, CONDITIONS[where]))
    if top is not None and top[-1] != "%" and int(top) > there:
        problem = (
            f"--top {top} is more than there is: {there} samples have a score"
            if there
            else f"no sample has a score {by!r}"
        )
        assert error_of(run, top=top, by=by, where=where, format="keys").startswith(problem)
        return
    selection = select(run, settings)
    expected = brute_force(rows, by, top, minimum, CONDITIONS[where])
    assert (tmp_path / "keys").read_text() == "".join(row["key"] + "\n" for row in expected)
    assert selection.kept == len(expected)
    assert selection.candidates == sum(map(CONDITIONS[where], rows))
    assert selection.kept + sum(selection.dropped.values()) == selection.rows == len(rows)


def test_choice_is_that_of_a_plain_sort():
    randomness = random.Random(0)
    for _ in range(2000):
        rows = random_rows(randomness)
        by, top, minimum = random_request(randomness)
        passes = CONDITIONS[randomness.choice(list(CONDITIONS))]

        def first_by_key(among: np.ndarray, n: int, rows=rows) -> list[int]:
            return sorted(np.flatnonzero(among), key=lambda i: (rows[i]["key"], rows[i]["shard"], rows[i]["row"]))[:n]

        column = Column(
            np.array([math.nan if row[by] is None else row[by] for row in rows], np.float32),
            np.array([row["ok"] and row[by] is not None and not math.isnan(row[by]) for row in rows], bool),
            np.array([passes(row) for row in rows], bool),
        )
        decision = choose(
            column,
            top=None if top is None else Top.parse(top),
            minimum=minimum,
            first_by_key=first_by_key,
        )
        kept = [row for row, code in zip(rows, decision, strict=True) if code == Decision.KEPT]
        assert kept == brute_force(rows, by, top, minimum, passes)


def test_shuffle_is_a_fixed_permutation(run, tmp_path):
    plain = keys_of(run, tmp_path, top="100%")
    shuffled = keys_of(run, tmp_path, top="100%", shuffle=7)
    assert shuffled == ["a2", "b4", "a0", "b0", "b2", "a4", "a3", "a1", "b1"]
    assert sorted(shuffled) == sorted(plain)
    assert keys_of(run, tmp_path, top="100%", shuffle=8) != shuffled
    select(run, SelectSettings(top="100%", shuffle=7, output=tmp_path / "best"))
    assert [name[:2] for _, members in samples_of(tmp_path / "best") for name, _ in members[::2]] == shuffled
