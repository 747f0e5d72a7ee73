"""What an evaluation of an SAE is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from mmfilter.core.cards.card_choice import other_checkpoint
from mmfilter.core.cards.cards import Card
from mmfilter.core.pipeline.pass_settings import SAEPassSettings
from mmfilter.core.typed import setting


@dataclass(frozen=True)
class EvaluateSettings(SAEPassSettings):
    """What to evaluate an SAE on."""

    GROUP: ClassVar[str] = "Evaluation"

    also: tuple[str | Card, ...] = setting((), metavar="MODEL")
    """Evaluate on another checkpoint of the same architecture too; repeatable"""
    text_only: bool = False
    """Evaluate on captions without an image too, through the language model alone"""
    sample: int = setting(200, least=1)
    """Pairs to evaluate on, from the first samples of up to 10 shards"""
    seed: int = 0
    """Seed of the random SAE"""

    @cached_property
    def others(self) -> tuple[Card, ...]:
        """The other checkpoints, whose states at the same layer the same SAE reconstructs."""
        return tuple(
            other if isinstance(other, Card) else other_checkpoint(other, self.card, self.prompt) for other in self.also
        )
