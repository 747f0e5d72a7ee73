"""Does a change of the code change what the commands write? Hashes every file that they leave, and compares two such
records.

    python benchmarks/same_bytes.py record before.json            # at one commit
    python benchmarks/same_bytes.py record after.json             # at another
    python benchmarks/same_bytes.py compare before.json after.json

`--root DIR` takes another checkout's package with this interpreter, `--also DIR` scores every tar, parquet file, JSON
file and folder in DIR as well. Everything, the package and the models too, is laid out in one folder with fixed names
and times. What says when it was made, by which version or in how many seconds is left out. What commands print is
recorded and compared with `--words` only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent.parent
WORK = Path(os.environ.get("SAME_BYTES_WORK", Path(tempfile.gettempdir()) / "mmfilter-same-bytes"))
A_TIME = 1_700_000_000
TIMED = (
    "created",
    "version",
    "seconds",
    "samples_per_second",
    "tokens_per_second",
    "pairs_per_second",
    "started",
    "finished",
    "date",
    "peak_memory",
    "mmfilter",
)
TIMES = re.compile(rf'"({"|".join(TIMED)})": ?("[^"]*"|[\d.e+-]+)'.encode())
LATER = re.compile(rb"\b1[89]\d{17}\b")
"""Times of the last change of files that the commands made, in nanoseconds"""
STAMP = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(\+00:00|Z)?")

SHARDS = "'in/shards/*.tar'"
COMMANDS = f"""
models list --json
models show tiny
sae list --json
sae show tiny --json
sae show tiny --on {SHARDS} --sample 100 --json
sae convert tiny out/converted
score {SHARDS} --run r --json
score {SHARDS} --run r --json
score {SHARDS} --run r --seed 1
score {SHARDS} --run r-none --text-context none --threshold 1 --limit 300 --caption txt --batch-size 7 --workers 2
score in/shards/00000.tar --run r-prompt --prompt '<s><image>{{caption}}' --caption caption --seed 5
score 'in/shards/{{00000..00001}}.tar' --run r-sae --sae out/converted --layer 1 --max-bad 50%
score - --run r-stdin --limit 200 < in/shards/00000.tar
score 'pipe:cat in/shards/00001.tar' --run r-pipe --limit 100 --allow-pipe
score 'pipe:cat in/shards/00001.tar' --run r-refused
score in/none.tar --run r-nothing
score in/shards/00000.tar --run r-dtype --dtype bfloat16 --limit 64
select r --top 20% -o out/shards --shard-size 64
select r --top 20% -o out/tar.tar
select r --top 20% -o - > out/stream.tar
select r --top 50 --by '0.7 * similarity + 0.3 * rank(saev)' -o out/keys.txt --format keys
select r --top 30% --where 'width >= 10 and n_text_tokens < 20' -o out/parquet --format parquet
select r --min 0.2 -o out/llava --format llava-json
select r --top 10% --shuffle 3 -o out/hf --format hf
select r --top 10% -o out/subset.npy --format datacomp
select r --top 10% -o out/datacomp --format datacomp
select r --top 20% --per n_text_tokens -o out/per --format keys --json
select r --top 20% --diverse -o out/diverse --format keys
select r --top 20% --match r-none -o out/match --format keys
select r --top 20% --repeat 'CASE WHEN similarity > 0.4 THEN 2 ELSE 1 END' -o out/repeat
select r --top 20% --metadata in/more.csv --where 'odd = 1' -o out/metadata
select r --top 20% --dedup 0.9 -o out/deduped
select r --top 20% --dry-run --json
select r --top 5% --by nothing --dry-run
dedup r --threshold 0.9 --json
dedup r --threshold 0.8 --on image --json
dedup r --threshold 0.95 --json
dedup r --threshold 0.9 --borderline 5 --json
search r --key 000000012 --json
search r --text 'a red apple' --json
search r --feature 812 --json
search r --key 000000012 --page out/page.html
score out/parquet --run r-from-parquet
score out/llava/data.json --images out/llava --run r-from-llava
score out/hf --run r-from-hf
score 'out/parquet/*.parquet' --run r-parquet-files
score 'out/shards/*.tar' --run r-from-shards
select r-from-parquet --top 50% -o out/again
select r-from-llava --top 50% -o out/again-llava --format parquet
select r-from-hf --top 50% -o out/again-hf --format hf
check {SHARDS} --sample 120 --json
check {SHARDS} --sample 60 --text-context none
sae eval tiny {SHARDS} --sample 60 --text-only --json
sae train {SHARDS} -o out/sae --tokens 30000 --widths 256,512 --k 8 --batch-size 1024 --capacity 8192
sae train {SHARDS} -o out/sae-jump --architecture jumprelu --tokens 20000 --widths 256 --batch-size 1024 \
 --cache out/states
sae train {SHARDS} -o out/sae-groups --tokens 20000 --widths 256 --k 8 --batch-size 1024 --groups 0.25,1 --no-weights
sae train {SHARDS} -o out/sae-relu --architecture relu --tokens 20000 --widths 256 --batch-size 1024 --cache out/states
score in/shards/00000.tar --run r-own --sae out/sae --limit 100
run in/web-pairs.yaml
run in/instruction-data.yaml --set select.top=30%
run in/dedup-only.yaml
run in/datacomp.yaml --dry-run
init {SHARDS} -o out/recipe.yaml
score in/broken.tar --run r-broken
score in/broken.tar in/shards/00001.tar --run r-partly
"""


def prepare(root: Path, also: Path | None) -> list[str]:
    """Lay package and inputs out afresh, with fixed times; returns the commands to run."""
    shutil.rmtree(WORK, ignore_errors=True)
    (WORK / "out").mkdir(parents=True)
    without_caches = shutil.ignore_patterns("__pycache__")
    for name in ("mmfilter", "models"):
        shutil.copytree(root / name, WORK / "in/package" / name, ignore=without_caches)
    package = WORK / "in/package/mmfilter/__init__.py"
    package.write_text(re.sub(r'(__version__ = )".*"', r'\1"0"', package.read_text("utf-8")), "utf-8")
    shutil.copytree(HERE / "examples/shards", WORK / "in/shards")
    for recipe in (HERE / "examples/recipes").glob("*.yaml"):
        text = recipe.read_text("utf-8").replace("examples/shards", "in/shards")
        (WORK / "in" / recipe.name).write_text(text, "utf-8")
    content = (WORK / "in/shards/00000.tar").read_bytes()
    (WORK / "in/broken.tar").write_bytes(content[: len(content) // 2 + 100])
    keys = pq.read_table(WORK / "in/shards/00000.parquet").column("key").to_pylist()
    (WORK / "in/more.csv").write_text("key,odd\n" + "".join(f"{key},{i % 2}\n" for i, key in enumerate(keys)), "utf-8")
    commands = [line for line in COMMANDS.strip().splitlines() if line]
    if also is not None:
        shutil.copytree(also, WORK / "in/also", symlinks=True)
        commands += [f"score {shlex.quote(path)} --run runs-also/{i}" for i, path in enumerate(also_inputs())]
        commands += [
            f"sae show {shlex.quote(str(p.relative_to(WORK)))} --json"
            for p in sorted((WORK / "in/also/sae").glob("*/*"))
        ]
    for path in sorted(WORK.rglob("*"), key=lambda p: -len(p.parts)):
        os.utime(path, (A_TIME, A_TIME), follow_symlinks=False)
    return commands


def also_inputs() -> list[str]:
    """Everything in the further folder that may be an input, two folders deep."""
    inputs = [path for depth in ("*/*", "*/*/*") for path in (WORK / "in/also").glob(depth) if "sae" not in path.parts]
    return [
        str(path.relative_to(WORK))
        for path in sorted(inputs)
        if path.is_dir() or path.suffix in (".tar", ".parquet", ".json", ".jsonl", ".csv")
    ]


def record(root: Path, also: Path | None) -> dict[str, dict[str, str]]:
    """Run every command; what it printed and its exit code by command, the hash of every file by name."""
    words: dict[str, str] = {}
    environment = os.environ | {
        "PYTHONPATH": str(WORK / "in/package"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "80",
        "PYTHONHASHSEED": "0",
    }
    for number, command in enumerate(prepare(root, also)):
        print(f"{number:3} mmfilter {command}", file=sys.stderr)
        line = f"{shlex.quote(sys.executable)} -m mmfilter {command}"
        done = subprocess.run(
            line, shell=True, cwd=WORK, env=environment, capture_output=True, text=True, errors="replace"
        )
        words[f"{number:03} {command}"] = plain(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    files = {str(path.relative_to(WORK)): digest(path) for path in written()}
    return {"words": words, "files": files}


def written() -> Iterator[Path]:
    """Every file that the commands left."""
    for path in sorted(WORK.rglob("*")):
        if path.is_file() and path.relative_to(WORK).parts[0] != "in":
            yield path


def digest(path: Path) -> str:
    """The hash of a file without times and versions."""
    content = path.read_bytes()
    if path.suffix == ".parquet":
        content = parquet_content(path)
    if path.suffix == ".safetensors":
        content = safetensors_content(content)
    if path.suffix in (".json", ".yaml", ".jsonl", ".parquet", ".html", ".safetensors"):
        content = LATER.sub(b"0", STAMP.sub(b"TIME", TIMES.sub(rb'"\1": 0', content)))
    return hashlib.sha256(content).hexdigest()[:16]


def parquet_content(path: Path) -> bytes:
    """Schema, the table's own metadata and every value of a parquet file."""
    table = pq.read_table(path)
    metadata = {key.decode(): value.decode("utf-8", "replace") for key, value in (table.schema.metadata or {}).items()}
    schema = table.schema.remove_metadata().to_string()
    return "\n".join(
        [schema, *(f"{key}={value}" for key, value in sorted(metadata.items())), repr(table.to_pydict())]
    ).encode("utf-8", "surrogatepass")


def safetensors_content(content: bytes) -> bytes:
    """The header of a safetensors file with its keys sorted, which come in any order, and the tensors."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]


def plain(text: str) -> str:
    """What was printed, without rates."""
    text = STAMP.sub(b"TIME", TIMES.sub(rb'"\1": 0', text.encode("utf-8", "replace"))).decode()
    return re.sub(r"in \d+\.\d+ s \([\d,]+/s\)|\d+\.\d+ s\b|[\d,]+(/s| tokens/s)", "RATE", text)


def compare(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]], kinds: list[str]) -> int:
    """Print what differs; 0 when nothing does."""
    differences = 0
    for kind in kinds:
        a, b = before[kind], after[kind]
        for name in sorted(a.keys() | b.keys()):
            if a.get(name) == b.get(name):
                continue
            differences += 1
            state = "gone" if name not in b else "new" if name not in a else "differs"
            print(f"{state:8} {name}")
            if kind == "words" and state == "differs":
                print(
                    *(f"    - {line}" for line in a[name].splitlines()),
                    *(f"    + {line}" for line in b[name].splitlines()),
                    sep="\n",
                )
        print(f"{kind}: {len(a)} before, {len(b)} after")
    print("the same" if not differences else f"{differences} differ")
    return int(bool(differences))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record")
    recording.add_argument("file", type=Path)
    recording.add_argument("--root", type=Path, default=HERE)
    recording.add_argument("--also", type=Path)
    comparing = verbs.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--words", action="store_true", help="compare what was printed too")
    options = parser.parse_args()
    if options.verb == "record":
        options.file.write_text(json.dumps(record(options.root.resolve(), options.also), indent=1), "utf-8")
        return 0
    before, after = (json.loads(path.read_text("utf-8")) for path in (options.before, options.after))
    return compare(before, after, ["files", "words"] if options.words else ["files"])


if __name__ == "__main__":
    sys.exit(main())
