"""`python -m splits init FOLDER --out mydata`: looks, decides, writes, and says what comes next."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.data.files import read_rgb, stored_limits, write_bytes
from common.data.files import remarks as remarks_on
from common.data.spec import SPLITS
from common.errors import UserError
from splits.init.annotation import Note, noting
from splits.init.found import Found, look
from splits.init.lists import Small, choose, joined, look_at, near_duplicates
from splits.init.masks import read_names
from splits.init.write import (
    Classes,
    Painted,
    extend_list,
    paint_all,
    unused,
    write_masks,
    write_photos,
)  # fmt: skip
from splits.prepare.archives import WORKERS, for_each, progress
from splits.published import say

SHOWN = 20  # remarks; all of them stand in remarks.txt
SHOWN_NAMES = 3
GROUP = "group.txt"  # the pattern of scenes, for later runs
DEEP = (".png", ".tif", ".tiff")  # files that may hold more than 8 bits per channel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser what `init` needs."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of photos, with or without annotations")
    parser.add_argument("--out", type=Path, required=True, help="folder to make, or to extend")
    parser.add_argument(
        "--annotations",
        type=Path,
        action="append",
        default=[],
        help="another folder or file with annotations",
    )
    parser.add_argument("--colors", type=Path, help="file that names the colours of masks")
    parser.add_argument(
        "--classes", help="names of the classes in their order: a,b,c or a file with one per line"
    )
    parser.add_argument(
        "--unpainted", choices=("background", "ignore"), default="background",
        help="what pixels without an outline are: the class 'background', or nothing that counts",
    )  # fmt: skip
    parser.add_argument(
        "--group", help="regular expression for the part of a photo's name that photos of one scene share"
    )
    parser.add_argument(
        "--orientation", choices=("upright", "stored"), default="upright",
        help="how the photos were drawn on: turned as their EXIF tag says, as every viewer shows them, or not",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the choice of photos to measure on")
    parser.add_argument(
        "--hours", type=float, default=2.0,
        help="how long the study should take on this machine, which is measured; 0 makes none (default: 2)",
    )  # fmt: skip


def init(options: argparse.Namespace) -> int:
    """Make or extend a dataset and its study from what a folder holds.

    Args:
        options: What `add_arguments` describes.

    Returns:
        0, or the exit code of what makes the study, which has said why.

    Raises:
        UserError: Nothing to train on or to measure with.
    """
    remarks: list[str] = []
    try:
        then = _make(options, remarks.append)
    finally:
        _say_remarks(remarks, options.out)
    if options.hours:
        code = _make_study(options.out, options.hours)
        if code:
            return code
        then = f"python -m studies run {shlex.quote(str(options.out / 'study.yaml'))} --report"
    say(f"next: {then}")
    return 0


def _make_study(out: Path, hours: float) -> int:
    """Have the study made or extended, as a process: it trains for a moment, which nothing here knows of."""
    path = os.pathsep.join(filter(None, [str(SPLITS.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "studies", "begin", str(out / "dataset.yaml"), "--hours", f"{hours:g}"]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode


def _make(options: argparse.Namespace, note: Note) -> str:
    """Do what `init` does; the command that comes next."""
    out, names = options.out, _names_of(options.classes)
    classes = Classes(out)
    found = look(options.folder, options.annotations, out, options.colors, note)
    _add_former_photos(found, out, note)
    reading = classes.old or _reading(found, options.orientation)
    sizes, small = _look_at_photos(found, reading, note)
    if not sizes:
        raise UserError(
            f"{options.folder}: holds no photo that can be read; give a folder of JPEG or PNG files"
        )
    painted = paint_all(found, sizes, note)
    if not painted and not classes.old:
        raise UserError(
            f"{options.folder}: no annotation of its {len(sizes)} photos was found; put masks or the files of labelme, "
            "CVAT, Label Studio or COCO there, or name their folder with --annotations"
        )
    fresh = classes.learn(painted, found, names, options.unpainted, note)
    pairs = near_duplicates(small)
    scenes = scenes_of(options.group, sizes, out)
    val = _val(
        options, pairs, scenes, {number: set(classes.shows(one)) for number, one in painted.items()}, classes
    )
    places = write_photos({number: found.photos[number] for number in sizes}, out)
    classes.save(dict.fromkeys(f"img/{{id}}{path.suffix}" for path in places.values()), reading)
    write_masks(painted, classes, out, note)
    if options.group:
        write_bytes(out / GROUP, options.group.encode())
    _say_found(found, sizes, painted, classes, fresh)
    _say_reading(places.values(), reading)
    split = _write_lists(out, sizes, val, scenes, pairs)
    return f"python -m splits check {shlex.quote(f'{out}/dataset.yaml')} {split}"


def _say_remarks(remarks: Sequence[str], out: Path) -> None:
    """Show the first remarks and keep all."""
    lines = sorted({" ".join(line.split()) for line in remarks})
    for line in lines[:SHOWN]:
        say(f"note: {line}")
    if lines:
        write_bytes(out / "remarks.txt", ("\n".join(lines) + "\n").encode())
    if len(lines) > SHOWN:
        say(f"... and {len(lines) - SHOWN} more in {out / 'remarks.txt'}")


def _names_of(text: str | None) -> Sequence[str]:
    if text is None:
        return []
    names = read_names(Path(text)) if Path(text).is_file() else [part.strip() for part in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"--classes {text}: give different names, such as background,leaf")
    return names


def _add_former_photos(found: Found, out: Path, note: Note) -> None:
    """Photos of an earlier run count on, whether the folder still holds them or not."""
    folder = out / "img"
    for path in sorted(folder.rglob("*")):
        number = path.relative_to(folder).with_suffix("").as_posix()
        if path.is_file() and not path.name.startswith("."):
            other = found.photos.get(number)
            if other is not None and other.stat().st_size != path.stat().st_size:
                note(f"{other}: differs from {path}, which is kept; give the new photo another name")
            found.photos[number] = path


def _reading(found: Found, orientation: str) -> dict[str, Any]:
    """How photos are read, as `dataset.yaml` says it: files of 10 to 14 bits are stored with 16, which is too dark."""
    reading: dict[str, Any] = {} if orientation == "upright" else {"orientation": orientation}
    paths = [path for path in found.photos.values() if path.suffix.lower() in DEEP]
    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        limits = [one for one in progress(pool.map(stored_limits, paths), "bit depth", len(paths)) if one]
    if limits:
        low, high = min(one[0] for one in limits), max(one[1] for one in limits)
        bits = math.ceil(math.log2(high + 1)) if high > 1 else 0
        if low >= 0 and 8 <= bits < 16:
            reading["value_range"] = [0, 2**bits - 1]
        elif low < 0 or high > 65535:
            reading["value_range"] = [low, high]
    return reading


def _look_at_photos(
    found: Found, reading: Mapping[str, Any], note: Note
) -> tuple[dict[str, tuple[int, int]], dict[str, Small]]:
    """Sizes of the photos that can be read, and small pictures of them."""
    sizes, small = {}, {}
    upright, limits = reading.get("orientation") != "stored", reading.get("value_range")

    def look_at_one(number: str) -> None:
        with noting(note, number):
            sizes[number], small[number] = look_at(
                read_rgb(found.photos[number], upright=upright, value_range=limits)
            )

    for_each(look_at_one, list(found.photos), "photos")
    return {number: sizes[number] for number in found.photos if number in sizes}, small


def _say_reading(photos: Iterable[Path], reading: Mapping[str, Any]) -> None:
    """What reading the photos changes in them."""
    counts = Counter[str]()
    for path in photos:
        counts.update(
            remarks_on(
                path, upright=reading.get("orientation") != "stored", value_range=reading.get("value_range")
            )
        )
    for remark, count in counts.most_common():
        say(f"{count} photos: {remark}")


def _say_found(
    found: Found,
    sizes: Mapping[str, tuple[int, int]],
    painted: Mapping[str, Painted],
    classes: Classes,
    fresh: Sequence[str],
) -> None:
    """What there is: photos, annotations, classes with their shares, what was left out."""
    shapes = sorted({(w, h) for h, w in sizes.values()})
    span = " to ".join(f"{w}x{h}" for w, h in dict.fromkeys((shapes[0], shapes[-1])))
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.kinds.items() if count)
    say(f"found {len(sizes)} photos ({span}), {len(painted)} of them annotated ({kinds})")
    shows = [classes.shows(one) for one in painted.values()]
    total = sum(sum(one.values()) for one in shows)
    for k, name in enumerate(classes.names):
        pixels, photos = sum(one.get(k, 0) for one in shows), sum(k in one for one in shows)
        new = "  (new)" if name in fresh and len(fresh) < len(classes.names) else ""
        say(
            f"  {k:3} {name:20} {100 * pixels / max(1, total):7.3f} % of labeled pixels, in {photos} photos{new}"
        )
    everything = sum(sum(one.pixels) for one in painted.values())
    say(f"      {'counts nowhere':20} {100 * (1 - total / max(1, everything)):7.3f} % of all pixels")
    for reason, names in found.left.items():
        more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
        say(f"left out: {', '.join(names[:SHOWN_NAMES])}{more}: {reason}")


def scenes_of(pattern: str | None, photos: Iterable[str], out: Path) -> dict[str, str]:
    """The scene of each photo whose name a pattern finds: that of `--group`, or of an earlier run."""
    former = out / GROUP
    if pattern is None:
        pattern = former.read_text(encoding="utf-8") if former.is_file() else "$^"
    try:
        named = {number: re.search(pattern, number) for number in photos}
    except re.error as error:
        raise UserError(f"--group {pattern}: no regular expression ({error}); correct it") from None
    return {number: match.group(match.lastindex or 0) for number, match in named.items() if match}


def _write_lists(
    out: Path,
    photos: Iterable[str],
    val: Sequence[str],
    scenes: Mapping[str, str],
    pairs: Sequence[tuple[str, str]],
) -> str:
    """Write or extend `train.txt`, `val.txt` and the split of all masks; its name."""
    both = [(a, b) for a, b in pairs if (a in val) != (b in val)]
    for a, b in both[:SHOWN_NAMES]:
        say(f"near-duplicates on both sides: {a} and {b}")
    if both:
        say(f"{len(both)} pairs of photos to train and to measure on hardly differ, so figures may flatter; where they "
            "are scenes, remove val.txt and give --group")  # fmt: skip
    rest = [number for number in sorted(photos) if number not in set(val)]
    measured = {scenes[number] for number in val if number in scenes}
    beside = [number for number in rest if scenes.get(number) in measured]
    if beside:
        say(f"{len(beside)} photos of scenes that are measured on are not trained on, such as {beside[0]}")
        rest = [number for number in rest if number not in set(beside)]
    extend_list(out / "val.txt", val)
    extend_list(out / "train.txt", rest)
    labeled = [number for number in rest if (out / "mask" / f"{number}.png").is_file()]
    lists = {"labeled.txt": labeled, "unlabeled.txt": sorted({*rest} - {*labeled})}
    texts = {name: "".join(f"{number}\n" for number in ids).encode() for name, ids in lists.items() if ids}
    folder = unused(out / "own" / str(len(labeled)), texts)
    for name, text in texts.items():
        write_bytes(folder / name, text)
    split = folder.relative_to(out).as_posix()
    say(f"split {split}: {len(labeled)} photos with masks, {len(rest) - len(labeled)} without")
    return split


def _val(
    options: argparse.Namespace,
    pairs: Sequence[tuple[str, str]],
    scenes: Mapping[str, str],
    shows: Mapping[str, set[int]],
    classes: Classes,
) -> list[str]:
    """The photos that are measured on: those of an earlier run, or about a third of the annotated ones."""
    former = options.out / "val.txt"
    if former.is_file():
        val = former.read_text(encoding="utf-8").splitlines()
        say(f"measured on the {len(val)} photos of {former}, as before; new masks are trained on")
        return val
    if len(shows) < 2:
        raise UserError(f"{options.folder}: one annotated photo; annotate a second one, to measure on")
    groups = joined(shows, pairs, scenes)
    if max(map(len, groups)) > len(shows) / 2:
        say(
            "more than half of the annotated photos hardly differ, as frames of a film do; they are not kept together"
        )
        groups = joined(shows, (), scenes)
    if len(groups) < 2:
        raise UserError(
            f"--group {options.group}: all annotated photos are in one group; change it, or leave it out"
        )
    val = choose(groups, shows, options.seed)
    rest = set(shows) - set(val)
    for side, ids in (("measured", val), ("trained", rest)):
        seen = set().union(*(shows[number] for number in ids))
        lacking = [name for k, name in enumerate(classes.names) if k not in seen]
        if lacking:
            say(f"no photo that is {side} on shows {', '.join(lacking)}; annotate more photos with it")
    say(f"{len(val)} annotated photos are measured on (val.txt), {len(rest)} trained on")
    return val
