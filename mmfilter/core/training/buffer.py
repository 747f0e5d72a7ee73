"""A shuffle buffer between the model and the trainer: states of many samples, mixed and balanced by side.

Memory is fixed: the capacity, and what the caller added last. What comes out depends on the seed and on the
order of the states, not on how they were split over calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.core.training.state_pool import Pool
from mmfilter.errors import SAEError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Batch = tuple[torch.Tensor, torch.Tensor]
"""States (tokens, d_model) and sides (tokens,), IMAGE or TEXT"""


@dataclass(frozen=True)
class BufferSettings:
    """How states are mixed."""

    batch_size: int = 4096
    """Tokens a batch, of this process"""
    capacity: int = 131_072
    """Tokens held; each batch is a random draw from them"""
    image_fraction: float | None = None
    """Share of image tokens in every batch. None: as they come"""
    sink_factor: float | None = 10.0
    """States with a norm above so many times the median norm of their side (attention sinks) are left out. None: none
    are"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which states are held"""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("batch_size", self.batch_size), ("capacity", self.capacity)):
            if not (isinstance(value, int) and value >= 1):
                raise SAEError(f"the buffer has {name} {value!r}; expected a whole number from 1")
        if self.capacity < 2 * self.batch_size:
            raise SAEError(
                f"the buffer has capacity {self.capacity}; expected at least 2 batches of {self.batch_size}, better 32"
            )
        if self.image_fraction is not None and not 0 <= self.image_fraction <= 1:
            raise SAEError(f"the buffer has image_fraction {self.image_fraction!r}; expected a fraction from 0 to 1")
        if self.sink_factor is not None and not self.sink_factor > 1:
            raise SAEError(f"the buffer has sink_factor {self.sink_factor!r}; expected a number above 1")
        if self.dtype not in DTYPES:
            raise SAEError(f"the buffer has dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class BufferCounts:
    """What became of the tokens, (image, text) each."""

    seen: tuple[int, int]
    sinks: tuple[int, int]
    """Left out for their norm"""
    displaced: tuple[int, int]
    """Left out because the other side was too rare to fill batches with them"""


class ShuffleBuffer:
    """Give it states with `add`, then take what `batches` yields; repeat.

    A batch is drawn whenever the buffer is full. With an `image_fraction` either side has its own part of the
    capacity, and a batch is drawn when both parts are full; what the commoner side brings meanwhile takes the
    place of random states of its own.
    """

    def __init__(self, settings: BufferSettings, d_model: int) -> None:
        self.settings, self.d_model = settings, d_model
        dtype = DTYPES[settings.dtype]
        if settings.image_fraction is None:
            parts = [(settings.capacity, settings.batch_size)]
        else:
            image, image_batch = (
                round(settings.image_fraction * settings.capacity),
                round(settings.image_fraction * settings.batch_size),
            )
            parts = [(image, image_batch), (settings.capacity - image, settings.batch_size - image_batch)]
        self._pools = [Pool(capacity, d_model, [settings.seed, i], dtype) for i, (capacity, _) in enumerate(parts)]
        self._shares = [share for _, share in parts]
        self._pending: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = deque()
        """(states, sides, norms) that no pool has taken in yet"""
        self._seen, self._sinks = [0, 0], [0, 0]

    @property
    def counts(self) -> BufferCounts:
        """Of everything added so far."""
        displaced = [pool.displaced for pool in self._pools] if len(self._pools) == 2 else [0, 0]
        return BufferCounts(_pair(self._seen), _pair(self._sinks), _pair(displaced))

    def add(self, states: torch.Tensor, side: torch.Tensor, origin: str) -> None:
        """Take in states (n, d_model) of `side` (n,) IMAGE or TEXT; `origin` names shard and sample for errors.

        Raises `SAEError` when the width differs or a state is not finite; nothing of the call is taken in then.
        """
        if states.ndim != 2 or states.shape[1] != self.d_model or side.shape != states.shape[:1]:
            raise SAEError(
                f"{origin} gives states {tuple(states.shape)} and sides {tuple(side.shape)}; expected (tokens, "
                f"{self.d_model}) and (tokens,)"
            )
        states, side = states.detach().cpu(), side.to("cpu", torch.uint8)
        norms = torch.linalg.vector_norm(states, dim=1, dtype=torch.float32)
        bad = (~norms.isfinite()).nonzero()[:, 0]
        if len(bad):
            token = int(bad[0])
            kind = "image" if side[token] == IMAGE else "text"
            raise SAEError(
                f"{origin} has a state that is not finite ({kind} token {token} of {len(states)}): run the model in "
                "float32 or leave the sample out"
            )
        for which in (IMAGE, TEXT):
            self._seen[which] += int((side == which).sum())
        self._pending.append((states, side, norms))

    @property
    def level(self) -> int:
        """States that have not been drawn yet."""
        return sum(pool.level for pool in self._pools)

    def batches(self, *, last: bool = False) -> Iterator[Batch]:
        """Every batch that is ready; with `last`, when no more states will come, also what the buffer still holds.

        What is then too little for a whole batch stays in.
        """
        while self._fill():
            yield self._draw()
        if last:
            self._drop_sinks()
            while all(pool.level >= share for pool, share in zip(self._pools, self._shares, strict=True)):
                yield self._draw()

    def _fill(self) -> bool:
        """Move states from what was added into the pools until all are full, and say whether they are."""
        while self._pending or not any(pool.room for pool in self._pools):
            if not any(pool.room for pool in self._pools):
                if not self._drop_sinks():
                    return True
                continue
            states, side, norms = self._pending.popleft()
            cut = self._needed(side)
            if cut < len(side):
                self._pending.appendleft((states[cut:], side[cut:], norms[cut:]))
            for pool, mine in zip(self._pools, self._masks(side[:cut]), strict=True):
                pool.add(states[:cut][mine], side[:cut][mine], norms[:cut][mine])
        return False

    def _needed(self, side: torch.Tensor) -> int:
        """How many of these tokens it takes until every pool is full; all, if they are too few."""
        needed = 0
        for pool, mine in zip(self._pools, self._masks(side), strict=True):
            if pool.room:
                so_far = mine.cumsum(0)
                if not len(so_far) or so_far[-1] < pool.room:
                    return len(side)
                needed = max(needed, int(torch.searchsorted(so_far, pool.room)) + 1)
        return needed

    def _masks(self, side: torch.Tensor) -> list[torch.Tensor]:
        if len(self._pools) == 1:
            return [torch.ones_like(side, dtype=torch.bool)]
        return [side == IMAGE, side == TEXT]

    def _drop_sinks(self) -> int:
        if self.settings.sink_factor is None:
            return 0
        dropped = [
            sum(column)
            for column in zip(*(pool.drop_far(self.settings.sink_factor) for pool in self._pools), strict=True)
        ]
        for which in (IMAGE, TEXT):
            self._sinks[which] += dropped[which]
        return sum(dropped)

    def _draw(self) -> Batch:
        parts = [pool.draw(share) for pool, share in zip(self._pools, self._shares, strict=True)]
        return torch.cat([states for states, _ in parts]), torch.cat([side for _, side in parts])

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, plain values): contents, what is not taken in yet, and the generators; exact for `restore`."""
        tensors: dict[str, torch.Tensor] = {}
        values: list[dict[str, Any]] = []
        for i, pool in enumerate(self._pools):
            columns, about = pool.state()
            tensors |= {f"pool{i}.{name}": column for name, column in columns.items()}
            values.append(about)
        if self._pending:
            names = ("states", "side", "norms")
            tensors |= {
                f"pending.{name}": torch.cat(column)
                for name, column in zip(names, zip(*self._pending, strict=True), strict=True)
            }
        return tensors, {"settings": asdict(self.settings), "pools": values, "seen": self._seen, "sinks": self._sinks}

    def restore(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Take over what `state` returned, in a buffer of the same settings and width."""
        for i, pool in enumerate(self._pools):
            pool.restore({name: tensors[f"pool{i}.{name}"] for name in ("states", "side", "norms")}, values["pools"][i])
        self._seen, self._sinks = list(values["seen"]), list(values["sinks"])
        self._pending.clear()
        if "pending.states" in tensors:
            self._pending.append((tensors["pending.states"], tensors["pending.side"], tensors["pending.norms"]))


def _pair(counts: list[int]) -> tuple[int, int]:
    return counts[IMAGE], counts[TEXT]
