"""A pool of states of fixed size from which batches are drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class Pool:
    """States with their sides and norms; a state that comes when the pool is full takes the place of a random one.

    Every random number is a 64-bit draw of the pool's own generator for one state, in the order of the states,
    so that what happens does not depend on how many come at a time.
    """

    def __init__(self, capacity: int, d_model: int, seed: list[int], dtype: torch.dtype) -> None:
        self._columns = {
            "states": torch.zeros(capacity, d_model, dtype=dtype),
            "side": torch.zeros(capacity, dtype=torch.uint8),
            "norms": torch.zeros(capacity),
        }
        self.capacity = capacity
        self.level = 0
        """Places in use, always the first ones"""
        self.displaced = 0
        """States that had to make room before they were drawn"""
        self._random = np.random.PCG64(seed)

    @property
    def room(self) -> int:
        """Free places."""
        return self.capacity - self.level

    def add(self, states: torch.Tensor, side: torch.Tensor, norms: torch.Tensor) -> None:
        """Take in these states (n, d_model), the later ones at the cost of random others once there is no room."""
        fit = min(self.room, len(states))
        places = torch.arange(self.level, self.level + len(states))
        self.level += fit
        late = len(states) - fit
        self.displaced += late
        kept = torch.arange(len(states))
        if late:
            if not self.capacity:
                return
            places[fit:] = torch.from_numpy((self._random.random_raw(late) % np.uint64(self.level)).astype(np.int64))
            _, back = np.unique(places.numpy()[::-1], return_index=True)  # the last one that came to a place has it
            kept = torch.from_numpy(len(states) - 1 - back)
        for name, column in zip(self._columns, (states, side, norms), strict=True):
            self._columns[name][places[kept]] = column[kept].to(self._columns[name].dtype)

    def draw(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take out n random states: (states (n, d_model), side (n,))."""
        chosen = np.argpartition(self._random.random_raw(self.level), n - 1)[:n] if n else np.zeros(0, np.int64)
        places = torch.from_numpy(chosen)
        drawn = self._columns["states"][places], self._columns["side"][places].long()
        self._remove(places)
        return drawn

    def drop_far(self, factor: float) -> list[int]:
        """Leave out states whose norm exceeds `factor` times the median norm of their side; how many of each side."""
        norms, side = self._columns["norms"][: self.level], self._columns["side"][: self.level]
        dropped, far = [0, 0], torch.zeros(self.level, dtype=torch.bool)
        for which in range(2):
            mine = side == which
            if mine.any():
                outside = mine & (norms > factor * norms[mine].median())
                dropped[which] = int(outside.sum())
                far |= outside
        self._remove(far.nonzero()[:, 0])
        return dropped

    def _remove(self, places: torch.Tensor) -> None:
        """Free these places; the last states move into the gaps."""
        if not len(places):
            return
        end = self.level - len(places)
        tail = torch.ones(len(places), dtype=torch.bool)
        tail[places[places >= end] - end] = False
        sources, gaps = tail.nonzero()[:, 0] + end, places[places < end].sort().values
        for column in self._columns.values():
            column[gaps] = column[sources]
        self.level = end

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, plain values) for `restore`."""
        tensors = {name: column[: self.level] for name, column in self._columns.items()}
        return tensors, {"displaced": self.displaced, "random": self._random.state}

    def restore(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Take over what `state` returned, in a pool of the same capacity."""
        self.level = len(tensors["norms"])
        for name, column in self._columns.items():
            column[: self.level] = tensors[name]
        self.displaced, self._random.state = values["displaced"], values["random"]
