"""`python -m splits init FOLDER --out mydata`: looks, decides, writes, and says what comes next."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.data.files import write_bytes
from common.errors import UserError
from splits.init.found import Found, look
from splits.init.lists import Small, choose, joined, look_at, near_duplicates
from splits.init.masks import read_names
from splits.init.write import (
    Classes,
    Painted,
    extend_list,
    paint_all,
    write_masks,
    write_photos,
)  # fmt: skip
from splits.prepare.archives import WORKERS, progress
from splits.published import say

SHOWN = 20  # remarks; all of them stand in remarks.txt
SHOWN_NAMES = 3


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
    parser.add_argument("--seed", type=int, default=0, help="of the choice of photos to measure on")


def init(options: argparse.Namespace) -> None:
    """Make or extend a dataset and its study from what a folder holds.

    Args:
        options: What `add_arguments` describes.

    Raises:
        UserError: Nothing to train on or to measure with.
    """
    out, remarks = options.out, list[str]()
    found = look(options.folder, options.annotations, out, options.colors, remarks.append)
    _add_former_photos(found, out, remarks)
    sizes, small = _look_at_photos(found, remarks)
    if not sizes:
        raise UserError(
            f"{options.folder}: holds no photo that can be read; give a folder of JPEG or PNG files"
        )
    painted = paint_all(found, sizes, remarks.append)
    if not painted:
        _say_remarks(remarks, out)
        raise UserError(
            f"{options.folder}: no annotation of its {len(sizes)} photos was found; put masks or the files of labelme, "
            "CVAT, Label Studio or COCO there, or name their folder with --annotations"
        )
    classes = Classes(out, found, _names_of(options.classes), options.unpainted)
    fresh = classes.learn(painted)
    for key, photos in classes.unknown.items():
        remarks.append(f"{painted[photos[0]].source}: {key!r} is none of the classes; its pixels count nowhere "
                       f"({len(photos)} photos)")  # fmt: skip
    places = write_photos({number: found.photos[number] for number in sizes}, out)
    classes.save(f"img/{{id}}{ending}" for ending in sorted({path.suffix for path in places.values()}))
    write_masks(painted, classes, out, remarks.append)
    _say_found(found, sizes, painted, classes, fresh)
    labeled = _write_lists(options, sizes, small, painted, classes)
    _say_remarks(remarks, out)
    say(f"next: python -m splits check {out}/dataset.yaml own/{labeled}")


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


def _add_former_photos(found: Found, out: Path, remarks: list[str]) -> None:
    """Photos of an earlier run count on, whether the folder still holds them or not."""
    folder = out / "img"
    for path in sorted(folder.rglob("*")):
        number = path.relative_to(folder).with_suffix("").as_posix()
        if path.is_file() and not path.name.startswith("."):
            other = found.photos.get(number)
            if other is not None and other.stat().st_size != path.stat().st_size:
                remarks.append(
                    f"{other}: differs from {path}, which is kept; give the new photo another name"
                )
            found.photos[number] = path


def _look_at_photos(found: Found, remarks: list[str]) -> tuple[dict[str, tuple[int, int]], dict[str, Small]]:
    """Sizes of the photos that can be read, and small pictures of them."""
    sizes, small = {}, {}

    def look_at_one(number: str) -> None:
        try:
            sizes[number], small[number] = look_at(found.photos[number])
        except UserError as error:
            remarks.append(str(error))

    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        list(progress(pool.map(look_at_one, found.photos), "photos", len(found.photos)))
    return {number: sizes[number] for number in found.photos if number in sizes}, small


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
        say(f"  {k:3} {name:20} {100 * pixels / total:7.3f} % of labeled pixels, in {photos} photos{new}")
    everything = sum(sum(one.pixels) for one in painted.values())
    say(f"      {'counts nowhere':20} {100 * (1 - total / everything):7.3f} % of all pixels")
    for reason, names in found.left.items():
        more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
        say(f"left out: {', '.join(names[:SHOWN_NAMES])}{more}: {reason}")


def _write_lists(
    options: argparse.Namespace,
    sizes: Mapping[str, tuple[int, int]],
    small: Mapping[str, Small],
    painted: Mapping[str, Painted],
    classes: Classes,
) -> str:
    """Write or extend `train.txt`, `val.txt` and the split; the split's name."""
    out, pairs = options.out, near_duplicates(small)
    val_file = out / "val.txt"
    if val_file.is_file():
        val = set(val_file.read_text(encoding="utf-8").splitlines())
        say(f"measured on the {len(val)} photos of {val_file}, as before; new masks are trained on")
    else:
        val = _choose_val(options, pairs, painted, classes)
        extend_list(val_file, sorted(val))
    both = [(a, b) for a, b in pairs if (a in val) != (b in val)]
    for a, b in both[:SHOWN_NAMES]:
        say(f"near-duplicates on both sides: {a} and {b}")
    if both:
        say(f"{len(both)} pairs of photos to train and to measure on hardly differ, so figures may flatter; --group "
            "keeps scenes on one side, if val.txt is removed first")  # fmt: skip
    extend_list(out / "train.txt", sorted(number for number in sizes if number not in val))
    labeled = [number for number in painted if number not in val]
    unlabeled = [number for number in sizes if number not in val and number not in painted]
    name, copy = str(len(labeled)), 1
    contents = {
        role: ("\n".join(sorted(ids)) + "\n").encode()
        for role, ids in (("labeled", labeled), ("unlabeled", unlabeled)) if ids
    }  # fmt: skip
    while any(
        (path := out / "own" / name / f"{role}.txt").is_file() and path.read_bytes() != content
        for role, content in contents.items()
    ):
        copy += 1
        name = f"{len(labeled)}_{copy}"
    for role, content in contents.items():
        write_bytes(out / "own" / name / f"{role}.txt", content)
    say(f"split own/{name}: {len(labeled)} photos with masks, {len(unlabeled)} without")
    return name


def _choose_val(
    options: argparse.Namespace,
    pairs: Sequence[tuple[str, str]],
    painted: Mapping[str, Painted],
    classes: Classes,
) -> set[str]:
    if len(painted) < 2:
        raise UserError(f"{options.folder}: one annotated photo; annotate a second one, to measure on")
    group = {}
    for number in painted if options.group else ():
        try:
            match = re.search(options.group, number)
        except re.error as error:
            raise UserError(
                f"--group {options.group}: not a regular expression ({error}); correct it"
            ) from None
        if match:
            group[number] = match.group(match.lastindex or 0)
    groups = joined(painted, pairs, group)
    if max(map(len, groups)) > len(painted) / 2:
        say(
            "more than half of the annotated photos hardly differ, as frames of a film do; they are not kept together"
        )
        groups = joined(painted, (), group)
    if len(groups) < 2:
        raise UserError(
            f"--group {options.group}: puts all annotated photos into one group; change it, or leave it out"
        )
    shows = {number: set(classes.shows(one)) for number, one in painted.items()}
    val = choose(groups, shows, options.seed)
    rest = set(painted) - set(val)
    for side, ids in (("measured", val), ("trained", rest)):
        lacking = [
            name for k, name in enumerate(classes.names) if not any(k in shows[number] for number in ids)
        ]
        if lacking:
            say(f"note: no photo that is {side} on shows {', '.join(lacking)}; annotate more photos with it")
    say(f"{len(val)} annotated photos are measured on (val.txt), {len(rest)} trained on")
    return set(val)
