"""One training: on what, with what, and where to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.source import Source
from mmfilter.core.model.backbone import Backbone
from mmfilter.core.model.loading import model_hash
from mmfilter.core.pipeline.pass_settings import DeviceSettings
from mmfilter.core.training import collective
from mmfilter.core.training.cache import CachedStates
from mmfilter.core.training.run_settings import TrainRunSettings
from mmfilter.core.training.shard_states import Position, ShardStates, sizes_of
from mmfilter.core.training.summary import TrainProgress

CHECKPOINTS = "checkpoints"


class TrainRun:
    """What does not change while a training goes on, and its states from any position."""

    def __init__(
        self,
        sources: Sequence[Source],
        backbone: Backbone,
        settings: TrainRunSettings,
        device: DeviceSettings,
        progress: TrainProgress,
    ) -> None:
        self.sources, self.backbone, self.settings, self.progress = sources, backbone, settings, progress
        self.device = device
        self.rank, self.processes = collective.world()

    @property
    def first(self) -> bool:
        """Whether this process writes what all share."""
        return self.rank == 0

    def folder(self, name: str) -> Path:
        """Where the SAE of that name goes."""
        return self.settings.output / name if name else self.settings.output

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints of all SAEs."""
        return self.settings.output / CHECKPOINTS

    def checkpoints_of(self, name: str) -> Path:
        """Folder of the checkpoints of the SAE of that name."""
        return self.checkpoints / (name or "sae")

    def live(self, sources: Sequence[Source], position: Position | None) -> ShardStates:
        """States as the model gives them."""
        settings = self.settings
        return ShardStates(
            sources,
            self.backbone,
            DecodeSettings(settings.caption),
            batch_size=settings.pairs,
            workers=settings.workers,
            seed=settings.seed,
            position=position,
        )

    def cached(self, folder: Path, position: Position | None) -> CachedStates:
        """States of a cache, this process' part."""
        return CachedStates(
            folder,
            self.about(),
            seed=self.settings.seed,
            rank=self.rank,
            processes=self.processes,
            position=position,
        )

    def about(self) -> dict[str, Any]:
        """What the states are of; names and sizes, so that a folder may be moved."""
        about = {
            "model_hash": model_hash(self.settings.card.model, self.backbone.model.config),
            "layer": self.backbone.layer,
            "prompt": self.backbone.prompt,
            "text_context": self.backbone.text_context,
            "caption": self.settings.caption,
            "shards": [
                [source.path.rpartition("/")[2], size]
                for source, size in zip(self.sources, sizes_of(self.sources), strict=True)
            ],
        }
        if self.settings.images is not None:
            about["images"] = os.path.basename(self.settings.images.rstrip("/"))
        return about

    def source(self, position: Position | None) -> ShardStates | CachedStates:
        """What this process trains on, from where a checkpoint left off."""
        if self.settings.cache is not None:
            return self.cached(self.settings.cache, position)
        return self.live(self.sources[self.rank :: self.processes], position)

    def hook_point(self) -> dict[str, Any]:
        """Where the states come from, in the words of SAELens and of transformers."""
        model, layer = self.settings.card.model, self.backbone.layer
        said = {"model_name": Path(model).name if Path(model).is_dir() else model, "layer": layer}
        stream = self.backbone.joint_stream
        if stream is None:
            return said | {"hook_name": "shared space of both towers"}
        block = next(name for name, module in self.backbone.model.named_modules() if module is stream.hooked)
        return said | {"hook_name": f"blocks.{layer}.hook_resid_post", "hf_hook_name": block}
