"""`check`: parse, compare, print."""

from __future__ import annotations

import json

from mmfilter.cli.options import AsJson, Shards
from mmfilter.ops.check_settings import CheckSettings


def check(shards: Shards, settings: CheckSettings, as_json: AsJson = False) -> None:
    """Check whether the scores mean anything on your pairs.

    Shuffles captions among a sample of pairs and reports how well each score tells true pairs from
    shuffled ones (ROC AUC: 0.5 is chance), beside an SAE of random directions and the states without
    an SAE. Ends with a verdict, and with exit code 0 whatever the verdict is.

    Example: mmfilter check 'examples/shards/*.tar'
    """
    from mmfilter.cli import check_display, display
    from mmfilter.ops import check as operation

    with display.TerminalProgress() as progress:
        report = operation.check(shards, settings, progress)
    for note in report.notes:
        display.note(note)
    if as_json:
        print(json.dumps(check_display.check_json(report), indent=2))
    else:
        check_display.show_check(report)
