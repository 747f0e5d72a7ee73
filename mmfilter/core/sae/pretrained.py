"""Find an SAE by what people call it, and open it: the one door to SAE files.

path/to/folder-or-file         in any layout of `core/sae/layouts`
hf:OWNER/REPO[@REVISION]/path  in the hub's cache, or downloaded into it
saelens:RELEASE/ID             what SAELens' registry knows, opened by SAELens (extra `sae-lens`)
tiny                           the SAE of the card of that name
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mmfilter.core.cards import cards
from mmfilter.core.cards.sae_options import NO_OPTIONS, SAEOptions
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.sae.checkpoints import FETCH, SUFFIXES, check_whole, open_checkpoint
from mmfilter.core.sae.layouts import interpret
from mmfilter.errors import SAEError

HUB, SAELENS = "hf:", "saelens:"
WEIGHTS = (
    "sae_weights.safetensors",
    "sae.safetensors",
    "params.safetensors",
    "params.npz",
    "checkpoints/final.safetensors",
    "ae.pt",
    "sae.pt",
)
"""Names that publishers give the weights, the surest first."""
NOT_WEIGHTS = ("sparsity.", "optim", "trainer_state", "activations_store", "activation_whitening")


def load_sae(source: str | Path, options: SAEOptions = NO_OPTIONS, *, convert: bool = False) -> SAE:
    """Open the SAE that `source` names.

    Its metadata say the layout, the source and what was folded beside what the publisher states. A
    pickle that holds more than tensors opens only to `convert` it. Raises `SAEError` where nothing is
    there, something is damaged, or the files leave a doubt that `options` do not settle.
    """
    source = str(source)
    if options.allow_pickle and not convert:
        raise SAEError(
            "SAE option allow_pickle is for conversion only: mmfilter sae convert SRC DST --sae-option "
            "allow_pickle=true, then use DST"
        )
    if source in cards.card_names():
        card = cards.load_card(source)
        return load_sae(card.sae, replace(card.sae_options, **options.stated()), convert=convert)
    if source.startswith(SAELENS):
        from mmfilter.core.sae.saelens_registry import load_registered

        return load_registered(source)
    path, origin = _located(source)
    file = find_weights(path, source, options)
    trail = origin if file == path else f"{origin}/{file.relative_to(path)}"
    layout, sae = interpret(open_checkpoint(file, source, trail, options), options)
    opened = {"layout": layout.name, "source": origin} | ({"options": options.stated()} if options.stated() else {})
    return replace(sae, metadata=sae.metadata | opened)


def _located(source: str) -> tuple[Path, str]:
    """The file or folder on this machine, and where it is from: the hub's commit, or its last folders here."""
    if not source.startswith(HUB):
        path = Path(source).expanduser()
        return path, "/".join(path.absolute().parts[-4:])
    place = parse_hub(source)
    folder = hub_snapshot(place)
    return folder / place.path, str(replace(place, revision=folder.name))


def find_weights(path: Path, source: str, options: SAEOptions = NO_OPTIONS) -> Path:
    """The file with the weights, where `path` is it or the folder around it; raises `SAEError`."""
    if not path.is_dir():
        if not path.exists() and not (path.suffix in SUFFIXES and path.parent.is_dir()):
            raise SAEError(
                f"SAE {source!r} is not there; expected a folder, a file, hf:OWNER/REPO/FOLDER, saelens:RELEASE/ID or "
                "a card's name"
            )
        check_whole(path)
        return path
    files = [path / name for name in WEIGHTS if (path / name).exists()][:1] or list(_other_weights(path))
    if options.layer is not None:
        files = [file for file in _all_weights(path) if _layer(file.relative_to(path)) == options.layer]
        if not files:
            raise SAEError(
                f"SAE {source!r} has no file of layer {options.layer}; it has {_some(path, list(_all_weights(path)))}"
            )
    if len(files) == 1:
        return files[0]
    if not files:
        raise SAEError(f"SAE {source!r} {_why_none(path)}")
    several = f"holds several SAEs: {_some(path, files)}"
    raise SAEError(f"SAE {source!r} {several}; name one, or its layer with --sae-option layer=N")


def _other_weights(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        if file.suffix in SUFFIXES and not any(word in file.name for word in NOT_WEIGHTS):
            yield file


def _all_weights(folder: Path) -> Iterator[Path]:
    """Weights in the folder and below."""
    for where, _, _ in sorted(os.walk(folder)):
        yield from _other_weights(Path(where))


def _layer(path: Path) -> int | None:
    numbers = re.findall(
        r"(?:layers?|blocks?|trainer)[._-]?(\d+)|(?:^|[/_-])L(\d+)(?=[RAM_/-])", str(path), re.IGNORECASE
    )
    return int(next(filter(None, numbers[-1]))) if numbers else None


def _some(folder: Path, files: list[Path]) -> str:
    names = [str(file.relative_to(folder)) for file in files]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"


def _why_none(folder: Path) -> str:
    stopped = sorted(file.name for file in folder.rglob("*.incomplete"))
    below = list(_all_weights(folder))
    if stopped:
        return f"has no weights, but {stopped[0]!r}, a download that stopped: {FETCH}"
    if below:
        return (
            f"is not an SAE itself but holds some below: {_some(folder, below)}; name one of these folders, or "
            "--sae-option layer=N"
        )
    if any((folder / name).exists() for name in ("cfg.json", "config.json", "hyperparams.json")):
        return f"has a configuration but no weights, a download that stopped: {FETCH}"
    return (
        f"has no weights: a folder of an SAE holds one of {', '.join(WEIGHTS)}, or one other "
        f"{', '.join(SUFFIXES[:-1])} file"
    )


# --- the hub -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubPlace:
    """A folder or file of a hub repository."""

    repo: str
    revision: str | None
    path: str
    """Inside the repository; "" is its top"""

    def __str__(self) -> str:
        return f"{HUB}{self.repo}{f'@{self.revision}' if self.revision else ''}{f'/{self.path}' if self.path else ''}"


def parse_hub(source: str) -> HubPlace:
    """`hf:OWNER/REPO[@REVISION][/path]`; raises `SAEError` when it is not that."""
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.*))?", source)
    if not match or ".." in (match[3] or "").split("/"):
        raise SAEError(f"SAE {source!r} is not hf:OWNER/REPO[@REVISION]/folder-or-file")
    return HubPlace(match[1], match[2], (match[3] or "").strip("/"))


def hub_snapshot(place: HubPlace) -> Path:
    """The local copy of the repository in which `place` is; downloads what is missing unless HF_HUB_OFFLINE is set."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    allowed, ignored = hub_patterns(place.path)
    try:
        folder = Path(
            snapshot_download(place.repo, revision=place.revision, allow_patterns=allowed, ignore_patterns=ignored)
        )
    except LocalEntryNotFoundError as error:
        raise SAEError(
            f"SAE '{place}' is not in the hub's cache and cannot be downloaded now: mmfilter sae fetch {place} where "
            "there is a network"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise SAEError(
            f"SAE '{place}' cannot be downloaded: {' '.join(str(error).split())[:200]}; check the name, and `hf auth "
            "login` if it is gated"
        ) from error
    if not (folder / place.path).exists():
        raise SAEError(
            f"SAE '{place}' is not in the hub's cache, which has other parts of {place.repo}: mmfilter sae fetch "
            f"{place}"
        )
    return folder


def hub_patterns(path: str) -> tuple[list[str] | None, list[str] | None]:
    """What to download for a place: its folder or file with the configurations beside and above it."""
    if not path:
        return None, ["*/*"]  # the top alone: a repository can hold terabytes below it
    above, _, name = path.rpartition("/")
    folders = [above, above.rpartition("/")[0]] if Path(name).suffix in SUFFIXES else [path, above]
    beside = [
        f"{folder}/{config}".lstrip("/")
        for folder in folders
        for config in ("cfg.json", "config.json", "hyperparams.json", "activation_scaler.json")
    ]
    return [path, *([] if Path(name).suffix in SUFFIXES else [f"{path}/*"]), *beside], None
