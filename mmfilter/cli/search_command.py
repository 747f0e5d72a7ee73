"""`mmfilter search`: parse, look for samples, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfilter.cli.options import AsJson, RunArgument
from mmfilter.ops.score_settings import DEFAULT_RUN
from mmfilter.ops.search_settings import FindSettings

if TYPE_CHECKING:
    from mmfilter.ops.search import Hit

CAPTION_CHARS = 48
"""Of a caption in the table"""


def search(settings: FindSettings, run: RunArgument = DEFAULT_RUN, as_json: AsJson = False) -> None:
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

    encode = None
    if settings.by_query:
        from mmfilter.core.pipeline.query import encoder

        encode = encoder(settings)
    with display.TerminalProgress() as progress:
        hits = operation.search(run, settings, progress, encode)
    if as_json:
        print(json.dumps([_report(hit) for hit in hits], indent=2))
    elif hits:
        print("\n".join(display.aligned(_rows(hits))))
    else:
        feature = settings.feature
        display.note(
            "nothing found"
            if feature is None
            else f"no sample has feature {feature} among the strongest that are stored"
        )


def _report(hit: Hit) -> dict[str, Any]:
    return (
        {"key": hit.key, "shard": hit.shard, "row": hit.row, "caption": hit.caption}
        | hit.measures
        | {"scores": hit.scores}
    )


def _rows(hits: list[Hit]) -> list[tuple[str, ...]]:
    """The table, headings first: why it was found, then some scores, then where it is."""
    from mmfilter.core.run.previews import one_line
    from mmfilter.core.scores.registry import HEADLINES, shown

    headlines = shown(HEADLINES)
    rows = [(*hits[0].measures, *headlines, "key", "caption", "shard")]
    for hit in hits:
        scores = ("" if hit.scores.get(name) is None else f"{hit.scores[name]:.3f}" for name in headlines)
        rows.append(
            (
                *(f"{value:.4f}" for value in hit.measures.values()),
                *scores,
                hit.key,
                one_line(hit.caption or "", CAPTION_CHARS),
                Path(hit.shard).name,
            )
        )
    return rows
