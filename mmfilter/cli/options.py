"""Options that commands share, and how their words become settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from mmfilter.core.cards.card_choice import card_for
from mmfilter.errors import ModelError, SAEError

if TYPE_CHECKING:
    from mmfilter.core.cards.cards import Card
    from mmfilter.core.pipeline.engine import DeviceSettings

DEFAULT_RUN = Path("mmfilter-run")

Shards = Annotated[
    list[str],
    typer.Argument(
        help="WebDataset tars, parquet files with images, LLaVA JSON, folders of images: paths, globs, brace patterns, URLs, or - for a tar on stdin.",
        metavar="SHARDS",
    ),
]
Images = Annotated[
    Optional[str],
    typer.Option("--images", help="Folder of the images of LLaVA JSON (default: the JSON's own).", metavar="DIR"),
]
ALLOW_PIPE = typer.Option("--allow-pipe", help="Run pipe:COMMAND inputs in a shell and read the tars that they print.")
AllowPipe = Annotated[bool, ALLOW_PIPE]
ModelName = Annotated[str, typer.Option("--model", help="Card name, local folder or hub id.")]
Layer = Annotated[
    Optional[int],
    typer.Option(
        "--layer",
        help="Layer whose output the SAE reads, from 0; -1 for the shared space of CLIP and its kin (default: the card's).",
    ),
]
SAESource = Annotated[
    Optional[str],
    typer.Option(
        "--sae", help="SAE: folder, hf:OWNER/REPO/folder, saelens:RELEASE/ID, or a card (default: the card's own)."
    ),
]
SAEName = Annotated[
    str,
    typer.Argument(
        help="Folder or file, hf:OWNER/REPO[@REVISION]/FOLDER, saelens:RELEASE/ID, or a card's name.", metavar="SAE"
    ),
]
SAEOption = Annotated[
    Optional[list[str]],
    typer.Option(
        "--sae-option", help="What the SAE's files leave open, as KEY=VALUE; repeatable.", metavar="KEY=VALUE"
    ),
]
Prompt = Annotated[
    Optional[str],
    typer.Option("--prompt", help="Prompt with {caption} in it (default: the card's, or the model's chat template)."),
]
TextContext = Annotated[
    Optional[str],
    typer.Option("--text-context", help="Text states with the 'image' in context, or 'none' (default: the card's)."),
]
Threshold = Annotated[
    Optional[float],
    typer.Option("--threshold", help="A feature is present on a side above this activation (default: the card's)."),
]
Caption = Annotated[
    str,
    typer.Option("--caption", help="Where captions are: txt, conversations, a JSON field or parquet column, or auto."),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, or auto.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto: bfloat16 on a GPU.")]
DeviceMap = Annotated[
    Optional[str],
    typer.Option("--device-map", help="'auto' spreads a model that is larger than one GPU over all of them."),
]
Attention = Annotated[
    str, typer.Option("--attn", help="Attention implementation: sdpa, eager, flash_attention_2 or flex_attention.")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the model's blocks: slow to start, faster after that.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that the checkpoint brings along.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Pairs that go through the model together.")]
Workers = Annotated[int, typer.Option("--workers", help="Threads that decode and pre-process.")]

FORMATS = ("shards", "tar", "keys", "datacomp", "parquet", "llava-json", "hf")
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flex_attention")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def device_settings(
    device: str, dtype: str, device_map: str | None, attn: str, compile_blocks: bool, trust_remote_code: bool
) -> DeviceSettings:
    """The options that say where and how a model runs."""
    from mmfilter.core.pipeline.engine import DeviceSettings

    one_of("--dtype", dtype, DTYPES)
    one_of("--attn", attn, ATTENTION)
    one_of("--device-map", device_map, ("auto",))
    return DeviceSettings(device, dtype, device_map, attn, compile_blocks, trust_remote_code)


def model_card(model: str, layer: int | None, prompt: str | None, text_context: str | None) -> Card:
    """The model to train on: a card's, or a folder or hub id with --layer; no SAE is needed."""
    from mmfilter.core.cards.cards import Card, card_names, load_card

    if model in card_names():
        card = replace(load_card(model), cannot_score="")
    elif layer is None:
        raise ModelError(
            f"no card {model!r} (there is {', '.join(card_names())}); for a folder or hub id give --layer as well"
        )
    else:
        card = Card(name=model, model=model, layer=layer, sae="")
    changes = {
        name: value
        for name, value in (("layer", layer), ("prompt", prompt), ("text_context", text_context))
        if value is not None
    }
    one_of("--text-context", text_context, ("image", "none"))
    return replace(card, **changes)


def card_of_sae(
    sae: str,
    needed_by: str,
    model: str | None,
    layer: int | None,
    prompt: str | None,
    text_context: str | None,
    sae_option: Sequence[str] = (),
) -> Card:
    """The model to measure an SAE with: the one named, else the card called like the SAE."""
    from mmfilter.core.cards.cards import card_names

    if model is None and sae not in card_names():
        raise SAEError(
            f"{needed_by} needs the model that SAE {sae!r} belongs to: --model CARD-OR-FOLDER, and --layer where the SAE does not state it"
        )
    if model is None or model == sae:
        return card_for(sae, None, None, prompt, text_context, None, sae_option)
    return card_for(model, layer, sae, prompt, text_context, None, sae_option)


def destination(output: str | None, form: str | None, stdout_is_terminal: bool) -> tuple[str, Path | None]:
    """The format to write and where to (None: stdout); nothing binary is poured into a terminal."""
    one_of("--format", form, FORMATS)
    path = None if output in (None, "-") else Path(output)
    form = form or ("shards" if path else "tar")
    if form not in ("tar", "keys", "datacomp") and path is None:
        raise typer.BadParameter(f"{form} needs a directory: -o DIR", param_hint="--format")
    if form == "tar" and path is None and stdout_is_terminal:
        raise typer.BadParameter(
            "say where to: -o DIR for shards, or pipe the tar stream into a consumer", param_hint="-o"
        )
    if form == "datacomp" and path is None and stdout_is_terminal:
        raise typer.BadParameter(
            "say where to: -o subset.npy, or -o DIR for the subset file with a table of all decisions", param_hint="-o"
        )
    return form, path


def share(text: str) -> float:
    """`10%` or `0.1` as a fraction."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"{text!r} is no share; expected something like 10% or 0.1", param_hint="--max-bad")
    return value


def one_of(option: str, value: str | None, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices (exit 2)."""
    if value is not None and value not in choices:
        raise typer.BadParameter(f"{value!r}; expected one of {', '.join(choices)}", param_hint=option)
