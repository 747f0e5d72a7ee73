"""`mmfilter models`: the cards of known models and SAEs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from mmfilter.cli.options import AsJson

models_app = typer.Typer(
    help="Known models with their SAEs: the cards that --model takes.",
    rich_markup_mode=None,
    invoke_without_command=True,
)


@models_app.callback()
def _models(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_cards()


@models_app.command("list")
def list_cards(as_json: AsJson = False) -> None:
    """List the cards; so does `mmfilter models` alone.

    Example: mmfilter models list
    """
    from mmfilter.cli import cards_display
    from mmfilter.core.cards.cards import card_names, load_card

    cards = [load_card(name) for name in card_names()]
    if as_json:
        print(json.dumps([asdict(card) for card in cards], indent=2, ensure_ascii=False))
    else:
        cards_display.show_cards(cards)


@models_app.command()
def show(name: Annotated[str, typer.Argument(help="Name of a card.", metavar="NAME")], as_json: AsJson = False) -> None:
    """Print one card: model, layer, SAE, prompt, licences, and what was verified.

    Example: mmfilter models show tiny
    """
    from mmfilter.cli import cards_display
    from mmfilter.core.cards.cards import load_card

    card = load_card(name)
    if as_json:
        print(json.dumps(asdict(card), indent=2, ensure_ascii=False))
    else:
        cards_display.show_card(card)
