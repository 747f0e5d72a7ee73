"""Fine-tune on the survivors of a selection, straight from the pipe.

A deliberately small consumer that is real all the same: webdataset starts `mmfilter select … -o -`, reads
the tar stream as it is written, decodes it, and a linear CLIP-like head learns to tell which caption
belongs to which image. Put your own model where `Matcher` is.

    python examples/finetune_pipe.py runs/icons --top 20%
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import webdataset as wds
from PIL import Image
from torch import nn

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


def pipeline(run: str, selection: list[str], batch_size: int) -> wds.WebDataset:
    """Batches of (images, captions) from the selection's stream."""
    mmfilter = Path(sys.executable).with_name("mmfilter")
    command = shlex.join([str(mmfilter), "select", run, *selection, "-o", "-"])
    data = wds.WebDataset(f"pipe:{command}", shardshuffle=False).decode("pil").to_tuple("jpg;jpeg;png;webp", "txt")
    return data.map_tuple(image_tensor, caption_tensor).batched(batch_size, partial=False)


def finetune(run: str, selection: list[str], *, epochs: int, batch_size: int) -> list[float]:
    """Train; returns the mean loss of each epoch."""
    torch.manual_seed(0)
    model = Matcher()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    means = []
    for epoch in range(epochs):
        losses = []
        for images, captions in pipeline(run, selection, batch_size):
            loss = model(images, captions)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        if not losses:
            sys.exit(f"the selection has fewer than {batch_size} pairs: nothing to train on")
        means.append(sum(losses) / len(losses))
        print(f"epoch {epoch + 1}: {len(losses) * batch_size} pairs, loss {means[-1]:.3f}")
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="mmfilter-run")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=20)
    options, selection = parser.parse_known_args()
    finetune(options.run, selection or ["--top", "20%"], epochs=options.epochs, batch_size=options.batch_size)


if __name__ == "__main__":
    main()
