"""A folder that `datasets.load_dataset` opens: parquet tables and a dataset card.

Not the WebDataset layout: there the library takes the columns from the first five samples; an image of
another extension in a later one leaves None, and a member more is left out, both without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mmfilter.core.files import read_json
from mmfilter.core.output.writers.kept import Kept, Written
from mmfilter.core.output.writers.parquet import features, write_tables

SPLIT = "train"

_CARD = """---
{front}---

# Selected image-text pairs

{n:,} pairs that mmfilter {version} selected by `{by}` and copied; images are the bytes of the source's files.

    from datasets import load_dataset
    pairs = load_dataset("FOLDER", split="{split}")

| column | is |
|---|---|
| `key` | name of the sample in its shard |
| `image` | the image |
| `caption` | the text it was scored with |
| `json` | the sample's JSON as it was, if it had one |
| `others` | files of the sample that have no column of their own: extension and bytes |
| `shard`, `row` | where the sample comes from |
| the rest | of mmfilter's score table; definitions in mmfilter's docs/scores.md |

`selection.parquet` says of every input sample whether and why it was kept. Licence and terms are those of the source.

## Selection

```json
{about}
```

## Scores

```json
{run}
```
"""


def write_hf(folder: Path, kept: Kept) -> Written:
    """Write `data/train-00000-of-00003.parquet` … and `README.md`."""
    written = write_tables(folder, kept, f"data/{SPLIT}-%05d-of-{max(1, kept.n_shards):05d}.parquet")
    card = _card(kept, written.nbytes).encode()
    (folder / "README.md").write_bytes(card)
    return Written(written.nbytes + len(card), written.number, written.name, written.n_shards)


def _card(kept: Kept, nbytes: int) -> str:
    front = {
        "configs": [{"config_name": "default", "data_files": [{"split": SPLIT, "path": f"data/{SPLIT}-*.parquet"}]}],
        "dataset_info": {
            "features": [_for_card(name, kind) for name, kind in features(kept.tables).items()],
            "splits": [{"name": SPLIT, "num_bytes": nbytes, "num_examples": len(kept)}],
        },
        "tags": ["mmfilter"],
    }
    about = kept.about
    run = read_json(kept.tables.run.manifest)
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        n=len(kept),
        version=about["version"],
        by=about["settings"]["by"],
        split=SPLIT,
        about=json.dumps(dict(about), indent=2, ensure_ascii=False),
        run=json.dumps(
            {name: run[name] for name in ("version", "created", "versions", "settings", "weights") if name in run},
            indent=2,
            ensure_ascii=False,
        ),
    )


def _for_card(name: str, kind: Any) -> dict[str, Any]:
    if isinstance(kind, list):
        return {"name": name, "list": [_for_card(part, value) for part, value in kind[0].items()]}
    return {"name": name, "dtype": "image" if kind["_type"] == "Image" else kind["dtype"]}
