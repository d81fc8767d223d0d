"""The `predict.py` of every project: a palette mask and an overlay for each file of a folder.

Classes, colours and normalization come from the checkpoint; no dataset is needed. `photos/a/b.jpg` becomes
`masks/a/b.png` (class ids with a palette) and `masks/a/b_overlay.jpg`, with `--confidence` also
`masks/a/b_confidence.png` and a line of `masks/photos.csv`. Where two photos would get the same name (`b.jpg`,
`b.png`), their endings join it: `b_jpg.png`, `b_png.png`. `masks/classes.csv` is the legend. A model that tools.export
has made needs no project: `python -m tools.predict_script --model model.onnx --input photos --out masks`.
A command that was stopped goes on where it was when it is given again.

Photos are shown, and predicted, upright as their EXIF orientation says; those of more than 8 bits take the range of
values of the training.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import io
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.config import ProjectConfig
from common.data.dataset_yaml import load_spec
from common.data.files import Range, read_rgb, remarks, write_bytes
from common.data.lists import Entry, read_entries
from common.data.spec import Finder, names_in
from common.data.transforms import EvalTransform
from common.distributed import Dist, gather_objects
from common.errors import UserError, run_main
from common.measure.evaluation import Protocol
from common.measure.inference import Forward
from common.models.deeplab import upsample
from common.numerics.losses import best_class
from common.numerics.precision import autocast
from common.run.checkpoint import find_newest, require_own
from splits.init.found import masks_among
from splits.pictures import save_picture
from tools.eval_script import (
    Flags,
    Legend,
    ScriptProject,
    config_with_flags,
    network_name,
    no_flags,
    none_of,
    read_checkpoint,
)
from tools.exported import read_exported
from tools.pictures import overlay, save_palette_png
from tools.processes import start, stop
from tools.unfinished import Unfinished, stamp

NOT_DECODED = {
    "BUFR",
    "EPS",
    "GRIB",
    "HDF5",
    "MPEG",
    "WMF",
}  # the library knows them, but cannot read them alone
LISTS = (".txt", ".lst")
TABLE = "photos.csv"
THREADS = 4
AHEAD = 8  # photos in memory before and after the network
REPORT_EVERY = 100

S = TypeVar("S")
T = TypeVar("T")
Palette = NDArray[np.uint8]
Score = Callable[[NDArray[np.uint8]], Tensor]  # RGB photo (H, W, 3) -> class scores (1, K, H, W)


@dataclass(frozen=True)
class Photo:
    """One file to predict and the path of its results below the output folder, without ending."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Done:
    """What became of a photo: its decoded pixels and class ids while it is under way, or why it was skipped.

    `confidence` is the probability of those classes, (H, W) from 0 to 255; `sure` its mean, from 0 to 1.
    """

    photo: Photo
    image: NDArray[np.uint8] | None = None
    pred: NDArray[np.uint8] | None = None
    confidence: NDArray[np.uint8] | None = None
    sure: float | None = None
    error: str = ""
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Outcome:
    """What a rank has to tell after its photos.

    Attributes:
        skipped: A line for each one skipped.
        remarks: How often each remark was due.
        table: Lines of `photos.csv`.
    """

    skipped: list[str] = field(default_factory=list)
    remarks: Counter[str] = field(default_factory=Counter)
    table: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """What predicts.

    Attributes:
        classes: their names.
        palette: their colours (K, 3).
        value_range: of photos of more than 8 bits, see `read_rgb`.
        build: (process) -> the function that scores a photo.
        weights: their file.
        cfg: configuration of a run; None of an exported model.
    """

    classes: Sequence[str]
    palette: Palette
    value_range: Range | None
    build: Callable[[Dist], Score]
    weights: Path
    cfg: ProjectConfig | None = None


Write = Callable[[Done], Done]
Writer = Callable[[argparse.Namespace, Palette], tuple[Palette, Write]]


def own_files(args: argparse.Namespace, palette: Palette) -> tuple[Palette, Write]:
    """The colours, and a function that writes the mask and the overlay of a photo; see `write_photo`."""
    return palette, lambda done: write_photo(done, args.out, palette, args.alpha)


def main(
    project: ScriptProject | None,
    argv: Sequence[str],
    arguments: argparse.ArgumentParser | None = None,
    flags: Flags = no_flags,
    writer: Writer = own_files,
) -> int:
    """Predict what the command line names.

    Args:
        project: The project; None predicts with an exported model alone.
        argv: The command line.
        arguments: `parser(project)` with the project's own flags added; None for the plain one.
        flags: (parsed arguments, cfg) -> overrides `section.key=value` that the own flags stand for. Those of the
            command line come after them.
        writer: (parsed arguments, palette of the checkpoint) -> the palette in use, and a function that writes what
            was predicted for a photo and passes skipped ones through; threads call it.

    Returns:
        1 if any photo was skipped, else 0.
    """
    args = (arguments or parser(project)).parse_intermixed_args(argv)
    source = source_of_model(args) if args.model is not None else source_of_run(project, args, flags)
    photos, left_out = find_photos(args.input, args.out, source.cfg)
    dist = start("cpu" if source.cfg is None else source.cfg.run.device)
    try:
        own = photos[dist.rank :: dist.world_size]
        palette, write = writer(args, source.palette)
        legend, score = Legend(source.classes, palette), source.build(dist)
        depends = {"arguments": vars(args), "weights": stamp(source.weights), "ranks": dist.world_size}
        former = Unfinished(args.out / f".unfinished{dist.rank}.jsonl", depends)
        outcome = predict_photos(own, score, dist, write, legend, source.value_range, args.confidence, former)
        found = gather_objects(outcome, dist)
        lost = sorted(line for part in found for line in part.skipped)
        legend.write(args.out, dist)
        if dist.is_main:
            if args.confidence:
                write_table(args.out / TABLE, sorted(line for part in found for line in part.table))
            report = [f"{args.out}: {len(photos) - len(lost)} of {len(photos)} photos predicted"]
            report += [f"skipped: {line}" for line in lost]
            report += [f"left out: {count} {why}" for why, count in left_out.most_common()]
            noted = sum((part.remarks for part in found), Counter[str]())
            report += [f"note: {count} photos: {remark}" for remark, count in noted.most_common()]
            sys.stdout.write("\n".join(report) + "\n")
        former.finish()
    finally:
        stop()
    return 1 if lost else 0


def source_of_run(project: ScriptProject | None, args: argparse.Namespace, flags: Flags) -> Source:
    """The network of a run or a checkpoint, with the protocol that it is measured by; raises as `read_source`."""
    assert project is not None, "without a project the parser asks for a model"
    saved, where = read_source(project, args.run, args.checkpoint)
    cfg = config_with_flags(project.config, saved["config"], args, flags, where)

    def build(dist: Dist) -> Score:
        forward = project.predictor(cfg, saved, network_name(project, cfg, args.network), dist.device, where)
        how = project.protocol(cfg, "script")
        return lambda image: score_photo(image, forward, how, cfg, dist.device)

    palette = np.array(saved["palette"], dtype=np.uint8)
    return Source(saved["classes"], palette, value_range_of(saved), build, Path(where), cfg)


def value_range_of(saved: Mapping[str, Any]) -> Range | None:
    """How photos of more than 8 bits were read in the training of a checkpoint."""
    found: Range | None = saved.get("truth", {}).get("reading", (True, None))[1]
    return found


def source_of_model(args: argparse.Namespace) -> Source:
    """The exported model that `--model` names.

    Raises:
        UserError: no such model, or settings beside it, which it cannot follow.
    """
    given = [*([f"--network {args.network}"] if args.network else []), *args.overrides]
    if given:
        raise UserError(
            f"--model {args.model} {given[0]}: a model is as it was exported; export it anew with that"
        )
    model = read_exported(args.model)
    facts, palette = model.facts, np.array(model.facts["palette"], dtype=np.uint8)
    return Source(facts["classes"], palette, facts["value_range"], lambda _: model.score, args.model)


def parser(
    project: ScriptProject | None, also: Mapping[str, Sequence[str]] | None = None
) -> argparse.ArgumentParser:
    """The command line; `also` gives flags second names, such as `{"--input": ["--image_path"]}`."""
    names = also or {}
    result = argparse.ArgumentParser(prog="predict.py", description="Predict photos with trained weights.")
    source = result.add_mutually_exclusive_group(required=True)
    if project is not None:
        source.add_argument(
            "--run", "--run-dir", *names.get("--run", ()), type=Path,
            help="run directory; its best.pt, without one its last.pt, is used",
        )  # fmt: skip
        source.add_argument(
            "--checkpoint",
            *names.get("--checkpoint", ()),
            type=Path,
            help="checkpoint of this project, also a converted one",
        )
    source.add_argument("--model", type=Path, help="model that tools.export has made, of any project")
    result.add_argument(
        "--input",
        *names.get("--input", ()),
        type=Path,
        required=True,
        help="folder (with its sub-folders), image, or list of images (.txt)",
    )
    result.add_argument(
        "--out", *names.get("--out", ()), type=Path, required=True, help="folder of the results"
    )
    result.add_argument(
        "--network",
        choices=project.networks if project else (),
        help="default: the one that results are reported for",
    )
    result.add_argument(
        "--alpha", type=float, default=0.5, help="share of the colours in an overlay, 0 to 1 (default 0.5)"
    )
    result.add_argument(
        "--confidence", action="store_true",
        help="also write how sure the network is: grey PNG, 255 times the probability of the class",
    )  # fmt: skip
    result.add_argument(
        "overrides", nargs="*", metavar="section.key=value",
        help="changes to the checkpoint's configuration, such as eval.protocol=sliding_window or run.device=cpu",
    )  # fmt: skip
    return result


def read_source(
    project: ScriptProject, run: Path | None, checkpoint: Path | None
) -> tuple[dict[str, Any], str]:
    """Contents and place of the checkpoint: the one named, or the first of those that a run would be measured by.

    Raises:
        UserError: there is none, or it is damaged or not of this project.
    """
    if checkpoint is not None:
        return read_checkpoint(project, checkpoint), str(checkpoint)
    assert run is not None
    places = project.checkpoints(run, None)
    for place in places.values():
        found = find_newest(place.parent, place.stem)
        if found is not None:
            require_own(found[0], project.name, str(place))
            return found[0], str(place)
    raise UserError(f"--run {run}: holds {none_of(places)}; give the folder of a run")


def find_photos(source: Path, out: Path, cfg: ProjectConfig | None) -> tuple[list[Photo], Counter[str]]:
    """The photos of a folder (sub-folders and their structure kept, links followed), a list, or one image.

    Returns:
        The photos, and how many files of the folder are left out for which reason.

    Raises:
        UserError: nothing to predict, or the output folder would overwrite the input.
    """
    left_out = Counter[str]()
    if source.is_dir():
        if out.resolve() == source.resolve():
            raise UserError(
                f"--out {out}: is the input folder, whose files would be overwritten; choose another"
            )
        found = images_below(source, out, left_out)
        relative = [path.relative_to(source) for path in found]
    elif source.suffix.lower() in LISTS:
        found, relative = read_photo_list(source, cfg)
    elif source.is_file():
        found, relative = [source], [Path(source.name)]
    else:
        raise UserError(f"--input {source}: no such file or folder; give a folder, an image or a list")
    if not found:
        others = ", ".join(f"{count} {why}" for why, count in (+left_out).most_common())
        raise UserError(
            f"--input {source}: holds no image{f' ({others})' * bool(others)}; give a folder that does, or a list of "
            "files"
        )
    targets = distinct_targets(relative)
    return [Photo(path, target) for path, target in zip(found, targets, strict=True)], +left_out


@functools.cache
def endings() -> frozenset[str]:
    """Endings, such as `.jpg`, of the files that the image library reads."""
    formats = Image.registered_extensions().items()
    return frozenset(ending for ending, kind in formats if kind in Image.OPEN and kind not in NOT_DECODED)


def images_below(folder: Path, out: Path, left_out: Counter[str]) -> list[Path]:
    """Image files of a folder in order of their paths, each folder once whatever links lead to it.

    Args:
        folder: Where to look.
        out: Its earlier results are no photos.
        left_out: Receives the number of files that are left out, by the reason.
    """
    results, seen, found = out.resolve(), set[Path](), []
    for place, folders, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        if real == results or real in seen:
            left_out[
                "folders of earlier results" if real == results else "links to a folder that is read anyway"
            ] += 1
            folders.clear()
            continue
        seen.add(real)
        left_out["hidden files or folders"] += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(place, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() not in endings():
                left_out[f"files ending in '{path.suffix}', which are no images that can be read here"] += 1
            elif not path.is_file():
                left_out["links that lead nowhere"] += 1
            else:
                found.append(path)
    masks = masks_among(found)
    left_out["masks of other images"] += len(masks)
    return sorted(set(found) - masks)


def read_photo_list(source: Path, cfg: ProjectConfig | None) -> tuple[list[Path], list[Path]]:
    """Files named by a list, one a line, and their paths below the output folder.

    A relative path counts from the list's folder, else from the working directory; what is found in neither may be an
    id or a file of the dataset of the training, where that is at hand. Only relative paths without `..` keep their
    folders. Lists for evaluation name the label behind the image; it is not read.

    Raises:
        UserError: the list cannot be read.
    """
    finder = None
    if cfg is not None:
        with contextlib.suppress(UserError):  # a generated dataset, or none here
            finder = Finder(load_spec(cfg.data.dataset, cfg.data.root))
    found, relative = [], []
    for entry in read_entries(source):
        path, name = photo_of_line(entry, source.parent, finder)
        found.append(path)
        relative.append(name if not name.is_absolute() and ".." not in name.parts else Path(name.name))
    return found, relative


def photo_of_line(entry: Entry, folder: Path, finder: Finder | None) -> tuple[Path, Path]:
    """The file that a line of a list names, and its name there."""
    for image, _ in entry.readings:
        for place in (folder / image, Path(image)):
            name = names_in(str(place.parent)).get(place.name)
            if name is not None and (place.parent / name).is_file():
                return place.parent / name, Path(image)
    if finder is not None:
        with contextlib.suppress(UserError):
            return finder.item(entry, "").image, Path(entry.image)
    return Path(entry.image), Path(entry.image)


def distinct_targets(relative: Sequence[Path]) -> list[Path]:
    """Paths without ending, all different, also on file systems that ignore case.

    Names that only one photo would get are its own; the others are joined by the photo's ending, and by a number
    where that is not enough.
    """
    bare = [path.with_suffix("") if path.suffix.lower() in endings() else path for path in relative]
    wanted = Counter(str(path).casefold() for path in bare)
    taken = {name for name, count in wanted.items() if count == 1}
    targets = []
    for path, plain in zip(relative, bare, strict=True):
        target = plain
        if wanted[str(target).casefold()] > 1:
            base = target.with_name(f"{target.name}_{path.suffix.lstrip('.')}")
            target, number = base, 2
            while str(target).casefold() in taken:
                target, number = base.with_name(f"{base.name}_{number}"), number + 1
            taken.add(str(target).casefold())
        targets.append(target)
    return targets


def predict_photos(
    photos: Sequence[Photo],
    score: Score,
    dist: Dist,
    write: Write,
    legend: Legend,
    value_range: Range | None,
    confidence: bool,
    former: Unfinished,
) -> Outcome:
    """Predict and write all photos that `former` does not know, and count the pixels in `legend`.

    Files are read and written by threads while the network works.

    Raises:
        UserError: the output folder cannot be written.
    """
    outcome = Outcome()
    known = {photo: former.done[str(photo.target)] for photo in photos if str(photo.target) in former.done}
    known = {photo: fact for photo, fact in known.items() if fact["file"] == stamp(photo.source)}
    left = [photo for photo in photos if photo not in known]
    under_way: dict[Photo, dict[str, Any]] = {}

    def note(fact: Mapping[str, Any]) -> None:
        legend.pixels += np.array(fact["pixels"], np.int64)
        outcome.remarks.update(fact["remarks"])
        outcome.table.extend(map(tuple, fact["table"]))

    def predicted(loaded: Iterable[Done]) -> Iterator[Done]:
        for done in loaded:
            result = predict_photo(done, score, confidence)
            if result.pred is not None:
                pixels = np.bincount(result.pred.ravel(), minlength=len(legend.pixels)).tolist()
                under_way[done.photo] = {"pixels": pixels, "remarks": list(done.remarks), "table": []}
            yield result

    for fact in known.values():
        note(fact)
    with ThreadPoolExecutor(THREADS) as pool:
        loaded = ahead(pool, lambda photo: read_photo(photo, value_range), left)
        written = ahead(pool, write, predicted(loaded))
        bar = tqdm(
            written, initial=len(photos) - len(left), total=len(photos), unit="photo",
            disable=None if dist.is_main else True,
        )  # fmt: skip
        for number, done in enumerate(bar, start=1 + len(photos) - len(left)):
            fact = under_way.pop(done.photo, None)
            if done.error:
                outcome.skipped.append(done.error)
            elif fact is not None:
                if done.sure is not None:
                    mask = f"{done.photo.target.as_posix()}.png"
                    fact["table"] = [(str(done.photo.source), mask, f"{done.sure:.6f}")]
                note(fact)
                former.add(str(done.photo.target), fact | {"file": stamp(done.photo.source)})
            if bar.disable and dist.is_main and number % REPORT_EVERY == 0:
                sys.stdout.write(f"{number} of {len(photos)} photos\n")
                sys.stdout.flush()
    return outcome


def ahead(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """`function` of each item, in order, computed by the pool up to `AHEAD` items in advance."""
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def read_photo(photo: Photo, value_range: Range | None) -> Done:
    """The decoded photo, or why it cannot be read."""
    try:
        image = read_rgb(photo.source, value_range=value_range)
        return Done(photo, image=image, remarks=remarks(photo.source, value_range=value_range))
    except UserError as error:
        return Done(photo, error=str(error).split(";", maxsplit=1)[0])
    except OSError as error:
        return Done(photo, error=f"{photo.source}: cannot be read ({error.strerror or error})")


def predict_photo(done: Done, score: Score, confidence: bool) -> Done:
    """The class ids (H, W) of a decoded photo, and if asked its confidence; skipped ones pass through."""
    if done.image is None:
        return done
    try:
        scores = score(done.image)[0]
    except torch.OutOfMemoryError:
        height, width = done.image.shape[:2]
        return Done(
            done.photo,
            error=f"{done.photo.source}: {width}x{height} pixels do not fit into the device's memory at once "
            "(eval.protocol=sliding_window needs less)",
        )
    pred = best_class(scores, dim=0).to(torch.uint8).cpu().numpy()
    if not confidence:
        return Done(done.photo, image=done.image, pred=pred)
    probs = scores.softmax(dim=0).amax(dim=0)
    grey = (probs * 255).round().to(torch.uint8).cpu().numpy()
    return Done(done.photo, done.image, pred, grey, float(probs.mean()))


@torch.inference_mode()
def score_photo(
    image: NDArray[np.uint8], forward: Forward, how: Protocol, cfg: ProjectConfig, device: torch.device
) -> Tensor:
    """Class scores (1, K, H, W) of an RGB photo (H, W, 3) by the protocol, at the photo's size."""
    transform = EvalTransform(mean=cfg.data.mean, std=cfg.data.std, resize=cfg.data.resize)
    x = transform(image, None)[0][None].to(device)
    with autocast(device, cfg.run.precision):
        scores = how.scores(forward, x)
    return upsample(scores.float(), image.shape[:2])


def write_photo(done: Done, out: Path, palette: Palette, alpha: float) -> Done:
    """Write the mask, the overlay and the confidence of a predicted photo; skipped ones pass through."""
    if done.image is None or done.pred is None:
        return done
    target = out / done.photo.target
    save_palette_png(target.with_name(f"{target.name}.png"), done.pred, palette)
    save_picture(
        target.with_name(f"{target.name}_overlay.jpg"), overlay(done.image, done.pred, palette, alpha)
    )
    if done.confidence is not None:
        save_picture(target.with_name(f"{target.name}_confidence.png"), done.confidence)
    return Done(done.photo, sure=done.sure)


def write_table(path: Path, lines: Sequence[Sequence[str]]) -> None:
    """Write `photos.csv`: a photo, its mask below the output folder and its mean confidence per line; `UserError`."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(("photo", "mask", "confidence"))
    table.writerows(lines)
    write_bytes(path, file.getvalue().encode())


if __name__ == "__main__":
    run_main(functools.partial(main, None))
