"""How cards look in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmfilter.cli.columns import show_columns
from mmfilter.core.cards.cards import Card


def show_cards(cards: Sequence[Card]) -> None:
    """One line a card, on stdout."""
    rows = []
    for card in cards:
        published = card.sae.startswith("hf:")
        model, sae = (card.model, card.sae.removeprefix("hf:")) if published else ("embedded", "embedded")
        rows.append((card.name, model, str(card.layer), sae))
    show_columns(("card", "model", "layer", "SAE"), rows, right=("layer",))
    one_sided = [card.name for card in cards if card.cannot_score]
    if one_sided and sys.stdout.isatty():
        print(f"\n{', '.join(one_sided)}: no scores, see mmfilter models show {one_sided[0]}")


def show_card(card: Card) -> None:
    """Everything that a card says, on stdout."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in asdict(card).items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {item}" for key, item in value.items() if item not in (None, False))
        if value not in (None, ""):
            table.add_row(name.replace("_", " "), Text(repr(value) if name == "prompt" else str(value)))
    Console(highlight=False).print(table)
