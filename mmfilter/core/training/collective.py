"""What the processes of one training tell each other; alone, each of these does nothing.

Under `torchrun` (gloo or nccl) every process takes its part of a batch through the same code, and sums,
maxima and the batch-wide threshold are those of the whole batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if _together() else (0, 1)


def sum_(*tensors: torch.Tensor) -> None:
    """Replace each tensor by its sum over the processes."""
    if _together():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def maximum_(*tensors: torch.Tensor) -> None:
    """Replace each tensor by its maximum over the processes."""
    if _together():
        for tensor in tensors:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)


def broadcast_(*tensors: torch.Tensor) -> None:
    """Replace each tensor by that of the first process."""
    if _together():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def wait() -> None:
    """Until every process is here."""
    if _together():
        dist.barrier()


def total(count: int, device: torch.device) -> int:
    """Sum of a number over the processes."""
    if not _together():
        return count
    tensor = torch.tensor(count, device=device)
    sum_(tensor)
    return int(tensor)


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
