"""`check`: its options and what it prints."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mmfilter.cli import options


def check(
    shards: options.Shards,
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
    sample: Annotated[int, typer.Option(help="Pairs to compare, from the heads of up to 10 shards.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the shuffling, the bootstrap and the random SAE.")] = 0,
    bootstrap: Annotated[int, typer.Option(help="Resamples of pairs behind each interval.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check whether the scores mean anything on your pairs.

    Shuffles captions among a sample of pairs and reports how well each score tells true pairs from
    shuffled ones (ROC AUC: 0.5 is chance), beside an SAE of random directions and the states without
    an SAE. Ends with a verdict, and with exit code 0 whatever it says.

    Example: mmfilter check 'examples/shards/*.tar'
    """
    from mmfilter.cli import check_display, display
    from mmfilter.ops import check as operation

    options.one_of("--text-context", text_context, ("image", "none"))
    settings = operation.CheckSettings(
        card=options.card_for(model, layer, sae, prompt, text_context, threshold, sae_option or ()),
        device=options.device_settings(device, dtype, device_map, attn, compile_blocks, trust_remote_code),
        sample=sample, seed=seed, bootstrap=bootstrap, batch_size=batch_size, workers=workers, caption=caption,
        images=images, allow_pipe=allow_pipe,
    )  # fmt: skip
    with display.TerminalProgress() as progress:
        report = operation.check(shards, settings, progress)
    for note in report.notes:
        display.note(note)
    if as_json:
        print(json.dumps(check_display.check_json(report), indent=2))
    else:
        check_display.show_check(report)
