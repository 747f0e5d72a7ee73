"""What the operations share that take a sample of the user's pairs through a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmfilter.core.cards.cards import Card
from mmfilter.core.input.shards import InputOptions
from mmfilter.core.pipeline.engine import DeviceSettings
from mmfilter.errors import MMFilterError


@dataclass(frozen=True)
class PassSettings:
    """Which model, how it runs, and how the pairs are read."""

    card: Card
    """Model, layer, SAE and how to prompt"""
    device: DeviceSettings = field(default_factory=DeviceSettings)
    """Where and how models run"""
    batch_size: int = 32
    workers: int = 4
    """Threads that decode and pre-process"""
    caption: str = "auto"
    """Where the caption is (see `DecodeSettings`)"""
    images: str | None = None
    """Folder that the images of LLaVA JSON are in (see `InputOptions`)"""
    allow_pipe: bool = False
    """Run `pipe:` inputs in a shell"""

    @property
    def inputs(self) -> InputOptions:
        """How inputs that do not explain themselves are read."""
        return InputOptions(self.caption, self.images, self.allow_pipe)

    def check_at_least(self, **least: int) -> None:
        """Raise `MMFilterError` for the first of these settings that is too small, by the name of its option."""
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise MMFilterError(f"--{name.replace('_', '-')} is {getattr(self, name)}; at least {bound} is needed")
