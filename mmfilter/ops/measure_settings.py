"""What a measurement of an SAE is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmfilter.core.pipeline.pass_settings import SAEPassSettings
from mmfilter.core.typed import setting


@dataclass(frozen=True)
class MeasureSettings(SAEPassSettings):
    """What to measure an SAE on."""

    GROUP: ClassVar[str] = "Measurement"

    sample: int = setting(200, least=1)
    """Pairs to measure on, from the first samples of up to 10 shards"""
