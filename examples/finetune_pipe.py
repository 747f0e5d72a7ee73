"""Fine-tune on the survivors of a selection, from the pipe or from mmfilter.stream.

A deliberately small consumer that is real all the same: samples arrive through webdataset, are decoded, and a linear
CLIP-like head learns to tell which caption belongs to which image. Put your own model where `Matcher` is.

    python examples/finetune_pipe.py runs/icons --top 20%                 # reads the tar that mmfilter select writes
    python examples/finetune_pipe.py runs/icons --top 20% --stream        # reads byte ranges in workers, shuffled

The pipe needs nothing but a shell and works in any language; the stream shares the samples among nodes and workers, and
shuffles them anew every epoch.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
import webdataset as wds
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import mmfilter

BUCKETS = 4096


def image_tensor(image: Image.Image) -> torch.Tensor:
    """(3·16·16,) in [-1, 1]."""
    pixels = torch.frombuffer(bytearray(image.convert("RGB").resize((16, 16)).tobytes()), dtype=torch.uint8)
    return pixels.float() / 127.5 - 1


def caption_tensor(caption: str) -> torch.Tensor:
    """(BUCKETS,) hashed bag of words; the hash must not differ between processes."""
    out = torch.zeros(BUCKETS)
    for word in caption.lower().split():
        out[sum(ord(char) * 31**i for i, char in enumerate(word)) % BUCKETS] = 1.0
    return out


class Matcher(nn.Module):
    """Two linear towers into one space, trained with InfoNCE."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(3 * 16 * 16, 64), nn.Linear(BUCKETS, 64)

    def forward(self, images: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        logits = 10 * F.normalize(self.image(images), dim=1) @ F.normalize(self.text(captions), dim=1).T
        return F.cross_entropy(logits, torch.arange(len(logits)))


def prepared(samples: wds.FluidInterface, batch_size: int) -> wds.FluidInterface:
    """Batches of (images, captions) from samples of either way."""
    pairs = samples.decode("pil").to_tuple("jpg;jpeg;png;webp", "txt").map_tuple(image_tensor, caption_tensor)
    return pairs.batched(batch_size, partial=False)


def from_pipe(run: str, selection: list[str], batch_size: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """webdataset starts the command and reads the tar as it is written."""
    program = Path(sys.executable).with_name("mmfilter")
    command = shlex.join([str(program), "select", run, *selection, "-o", "-"])
    return prepared(wds.WebDataset(f"pipe:{command}", shardshuffle=False), batch_size)


def from_stream(run: str, top: str, batch_size: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """The selection's byte ranges, read by two workers; every epoch in another order."""
    samples = prepared(mmfilter.stream(run, top=top, shuffle=0), batch_size)
    return DataLoader(samples, batch_size=None, num_workers=2)


def finetune(batches: Iterable[tuple[torch.Tensor, torch.Tensor]], *, epochs: int) -> list[float]:
    """Train; returns the mean loss of each epoch."""
    torch.manual_seed(0)
    model = Matcher()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    means = []
    for epoch in range(epochs):
        losses, n_pairs = [], 0
        for images, captions in batches:
            loss = model(images, captions)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            n_pairs += len(images)
        if not losses:
            sys.exit("the selection has fewer pairs than a batch: nothing to train on")
        means.append(sum(losses) / len(losses))
        print(f"epoch {epoch + 1}: {n_pairs} pairs, loss {means[-1]:.3f}")
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="mmfilter-run")
    parser.add_argument("--top", default="20%")
    parser.add_argument("--stream", action="store_true", help="use mmfilter.stream in place of the pipe")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=20)
    options, selection = parser.parse_known_args()
    if options.stream:
        batches = from_stream(options.run, options.top, options.batch_size)
    else:
        batches = from_pipe(options.run, ["--top", options.top, *selection], options.batch_size)
    finetune(batches, epochs=options.epochs)


if __name__ == "__main__":
    main()
