"""What the operations share that take pairs through a model: what of the input, which model, on what, how many at a
time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmfilter.core.cards.card_choice import ModelSettings, SAEChoice
from mmfilter.core.input.source import InputOptions
from mmfilter.core.typed import check_fields, setting


@dataclass(frozen=True)
class DeviceSettings:
    """Where and how a model runs; what it computes stays the same but for rounding."""

    GROUP: ClassVar[str] = "Device"

    device: str = "auto"
    """cpu, cuda, cuda:1, or auto: cuda where there is one"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the model; auto is bfloat16 on a GPU and float32 on a CPU"""
    device_map: Literal["auto"] | None = None
    """Spread a model that is larger than one GPU over all of them"""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = setting("sdpa", flag="--attn")
    """Attention implementation"""
    compile: bool = False
    """Compile the model's blocks: slow to start, faster after that"""
    trust_remote_code: bool = False
    """Run model code that the checkpoint brings along"""


@dataclass(frozen=True)
class BatchSettings:
    """How many pairs at a time."""

    GROUP: ClassVar[str] = "Speed"

    batch_size: int = setting(32, least=1)
    """Pairs that go through the model together"""
    workers: int = setting(4, least=1)
    """Threads that decode and pre-process"""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class PassSettings(BatchSettings, DeviceSettings, InputOptions, ModelSettings):
    """Which model, how it runs, and how the pairs are read."""


@dataclass(frozen=True)
class SAEPassSettings(BatchSettings, DeviceSettings, InputOptions, SAEChoice):
    """The same for an SAE that is measured."""


@dataclass(frozen=True)
class EncodeSettings(DeviceSettings):
    """Where the run's model and SAE are, and what they run on."""

    GROUP: ClassVar[str] = "The run's model"

    model: str | None = None
    """Where the run's model is now, if it has moved: card, folder or hub id"""
    sae: str | None = None
    """Where the run's SAE is now, if it has moved (default: that of a card given as the model, else the run's)"""
