"""`score`: its options and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from mmfilter.cli import options
from mmfilter.cli.options import DEFAULT_RUN, card_for, one_of, share
from mmfilter.errors import MMFilterError


def score(
    shards: options.Shards,
    run: Annotated[Path, typer.Option("--run", help="Run directory to write, or to go on with.")] = DEFAULT_RUN,
    model: options.ModelName = "tiny",
    layer: options.Layer = None,
    sae: options.SAESource = None,
    sae_option: options.SAEOption = None,
    prompt: options.Prompt = None,
    text_context: options.TextContext = None,
    threshold: options.Threshold = None,
    caption: options.Caption = "auto",
    images: options.Images = None,
    allow_pipe: options.AllowPipe = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    attn: options.Attention = "sdpa",
    compile_blocks: options.Compile = False,
    trust_remote_code: options.TrustRemoteCode = False,
    batch_size: options.BatchSize = 32,
    workers: options.Workers = 4,
    limit: Annotated[Optional[int], typer.Option(help="Score only the first so many samples.")] = None,
    max_bad: Annotated[str, typer.Option(help="Share of samples without a score that still exits 0.")] = "10%",
    seed: Annotated[int, typer.Option(help="Seed of the random score.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")] = False,
) -> None:
    """Score image-text pairs inside a multimodal model.

    Writes a run directory with a row for every sample, bad ones too. Run it again to go on: finished
    shards are skipped.

    Example: mmfilter score 'examples/shards/*.tar' --run runs/icons
    """
    from mmfilter.cli import display
    from mmfilter.core.run.directory import RunDirectory
    from mmfilter.core.run.tables import read_column
    from mmfilter.core.scores.registry import SCORES
    from mmfilter.ops import score as operation

    allowed = share(max_bad)
    one_of("--text-context", text_context, ("image", "none"))
    settings = operation.ScoreSettings(
        card=card_for(model, layer, sae, prompt, text_context, threshold, sae_option or ()),
        run=run,
        device=options.device_settings(device, dtype, device_map, attn, compile_blocks, trust_remote_code),
        batch_size=batch_size, workers=workers, limit=limit, caption=caption, images=images, allow_pipe=allow_pipe, seed=seed,
    )  # fmt: skip
    with display.TerminalProgress() as progress:
        summary = operation.score(shards, settings, progress)
    tables = RunDirectory(run).score_tables() if summary.n_shards or summary.n_skipped else []
    columns = {name: read_column(tables, name) for name in SCORES}
    if as_json:
        print(json.dumps(display.score_report(summary, columns), indent=2))
    else:
        display.show_score(summary, columns, "similarity")
    if summary.failures:
        said = f"{len(summary.failures)} of {len(summary.failures) + summary.n_shards + summary.n_skipped} shards could not be read to their end"
        raise MMFilterError(f"{said}, first: {summary.failures[0]}. The others are finished; repair and run again")
    if not summary.n_samples:
        raise MMFilterError("the shards hold no samples: nothing to score")
    if summary.fraction_bad > allowed:
        raise MMFilterError(
            f"{summary.fraction_bad:.1%} of the samples have no score, more than --max-bad {max_bad} allows; "
            f"the column 'reason' of {run}/scores/*.parquet says why for each"
        )
