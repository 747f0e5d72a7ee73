"""`mmfilter search`: parse, look for samples, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mmfilter.cli import options
from mmfilter.cli.options import DEFAULT_RUN, one_of

if TYPE_CHECKING:
    from mmfilter.core.pipeline.engine import DeviceSettings
    from mmfilter.ops.search import Encoder, Hit

CAPTION_CHARS = 48
"""Of a caption in the table"""


def search(
    run: Annotated[Path, typer.Argument(help="Run directory that score wrote.", metavar="RUN")] = DEFAULT_RUN,
    key: Annotated[Optional[str], typer.Option(help="Find the samples most like the one with this key.")] = None,
    shard: Annotated[
        Optional[str], typer.Option(help="End of the path of the shard that the key is in, where keys repeat.")
    ] = None,
    image: Annotated[
        Optional[Path], typer.Option(help="Find the samples most like this image (JPEG, PNG or WebP).", metavar="FILE")
    ] = None,
    text: Annotated[
        Optional[str],
        typer.Option(help="Find the samples most like these words; with --image, like the pair.", metavar="WORDS"),
    ] = None,
    feature: Annotated[
        Optional[int], typer.Option(help="Find the samples in which this SAE feature is strongest.")
    ] = None,
    on: Annotated[
        str, typer.Option(help="Sides to compare, or to look for the feature on: both, image, or text.")
    ] = "both",
    n: Annotated[int, typer.Option("-n", "--number", help="Samples to list.")] = 20,
    model: Annotated[
        Optional[str], typer.Option(help="Where the run's model is now, if it has moved: card, folder or hub id.")
    ] = None,
    sae: Annotated[Optional[str], typer.Option(help="Where the run's SAE is now, if it has moved.")] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    trust_remote_code: options.TrustRemoteCode = False,
    page: Annotated[
        Optional[Path], typer.Option(help="Also write an HTML page with pictures and captions.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Find samples by their codes.

    Like a sample: by the exact cosine of their codes, through the index of the run, which is made if
    there is none. Like an image or words: the same, with the codes that the run's model and SAE make of
    them; where the run read captions with the image in context, words alone are read after a grey image.
    With a feature: by its maximum over the tokens of a side, in a pass over all codes. Captions, and the
    pictures of --page, are read from the shards.

    Example: mmfilter search runs/icons --key 000000012 -n 5
    """
    from mmfilter.cli import display
    from mmfilter.ops import search as operation

    one_of("--on", on, ("both", "image", "text"))
    settings = operation.SearchSettings(
        key=key, shard=shard, image=image, text=text, feature=feature, on=on, n=n, page=page
    )
    encode = (
        _encoder(model, sae, options.device_settings(device, dtype, device_map, "sdpa", False, trust_remote_code))
        if settings.by_query
        else None
    )
    with display.TerminalProgress() as progress:
        hits = operation.search(run, settings, progress, encode)
    if as_json:
        print(json.dumps([_report(hit) for hit in hits], indent=2))
    elif hits:
        print("\n".join(display.aligned(_rows(hits))))
    else:
        display.note(
            "nothing found"
            if feature is None
            else f"no sample has feature {feature} among the strongest that are stored"
        )


def _encoder(model: str | None, sae: str | None, device: DeviceSettings) -> Encoder:
    """What makes codes of a query; the model is loaded when it is called."""
    from mmfilter.core.pipeline.query import EncodeSettings, encode_query

    settings = EncodeSettings(device, model, sae)
    return lambda run, image, text: encode_query(run, image, text, settings)


def _report(hit: Hit) -> dict[str, Any]:
    return (
        {"key": hit.key, "shard": hit.shard, "row": hit.row, "caption": hit.caption}
        | hit.found
        | {"scores": hit.scores}
    )


def _rows(hits: list[Hit]) -> list[tuple[str, ...]]:
    """The table, headings first: why it was found, then some scores, then where it is."""
    from mmfilter.core.run.previews import one_line
    from mmfilter.core.scores.registry import HEADLINES, shown

    headlines = shown(HEADLINES)
    rows = [(*hits[0].found, *headlines, "key", "caption", "shard")]
    for hit in hits:
        scores = ("" if hit.scores.get(name) is None else f"{hit.scores[name]:.3f}" for name in headlines)
        rows.append(
            (
                *(f"{value:.4f}" for value in hit.found.values()),
                *scores,
                hit.key,
                one_line(hit.caption or "", CAPTION_CHARS),
                Path(hit.shard).name,
            )
        )
    return rows
