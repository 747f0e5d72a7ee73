"""What a check is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmfilter.core.pipeline.pass_settings import PassSettings
from mmfilter.core.typed import setting

FEWEST_PAIRS = 20


@dataclass(frozen=True)
class CheckSettings(PassSettings):
    """What to check the scores on."""

    GROUP: ClassVar[str] = "Comparison"

    sample: int = setting(1000, least=FEWEST_PAIRS)
    """Pairs to compare, from the first samples of up to 10 shards"""
    seed: int = 0
    """Seed of the shuffling, the bootstrap and the random SAE"""
    bootstrap: int = setting(1000, least=100)
    """Resamples of pairs behind each interval"""
