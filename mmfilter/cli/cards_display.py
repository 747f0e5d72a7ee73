"""How cards look in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmfilter.core.cards.cards import Card


def show_cards(cards: Sequence[Card]) -> None:
    """One line a card, on stdout."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("card", "model", "layer", "SAE"):
        table.add_column(heading, justify="right" if heading == "layer" else "left", overflow="fold")
    for card in cards:
        sae = card.sae.removeprefix("hf:") if card.sae.startswith("hf:") else "embedded"
        table.add_row(
            Text(card.name), Text(card.model if card.sae.startswith("hf:") else "embedded"), str(card.layer), Text(sae)
        )
    console = Console(highlight=False)
    console.print(table)
    one_sided = [card.name for card in cards if card.cannot_score]
    if one_sided:
        console.print(Text(f"\n{', '.join(one_sided)}: no scores, see mmfilter models show {one_sided[0]}"))


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
