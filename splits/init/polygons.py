"""Annotations drawn in labelme (JSON), CVAT (XML for images) and Label Studio (JSON)."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw

from common.errors import UserError
from splits.init.annotation import (
    Annotation,
    Note,
    Points,
    Region,
    Shape,
    ellipse,
    noting,
    paint_shapes,
    rectangle,
    rotated,
)  # fmt: skip
from splits.prepare.masks import Bool, decode_runs

NO_AREA = "has no area"


def _outline(pairs: Any) -> Points:
    points: Points = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return points


def _part(region: Any, left: int, top: int) -> Region:
    """A region (h, w) placed at a corner of the photo; what is beyond the photo is cut."""

    def place(height: int, width: int) -> Bool:
        whole = np.zeros((height, width), dtype=np.bool_)
        rows, columns = max(0, height - top), max(0, width - left)
        cut = region[max(0, -top) : rows, max(0, -left) : columns]
        whole[max(0, top) : max(0, top) + cut.shape[0], max(0, left) : max(0, left) + cut.shape[1]] = cut
        return whole

    return place


# labelme


def read_labelme(content: Mapping[str, Any], source: str, note: Note) -> Iterator[Annotation]:
    """The annotation of a labelme file; its outlines are filled as labelme does, the pixels on them included."""
    shapes = []
    for number, entry in enumerate(content["shapes"], start=1):
        kind = entry.get("shape_type") or "polygon"
        shape = _labelme_shape(str(entry["label"]), kind, entry)
        if shape is None:
            note(f"{source}: shape {number} ('{entry['label']}') is a {kind}, which {NO_AREA}; left out")
        else:
            shapes.append(shape)
    if not content["shapes"]:
        note(f"{source}: no shape is drawn; the whole photo is background")
    size = (content.get("imageHeight"), content.get("imageWidth"))
    known = (int(size[0]), int(size[1])) if size[0] and size[1] else None
    name = str(content.get("imagePath") or "").replace("\\", "/")
    yield Annotation(name or source, source, paint_shapes(shapes, known, fill_as_labelme))


def _labelme_shape(label: str, kind: str, entry: Mapping[str, Any]) -> Shape | None:
    points = _outline(entry["points"])
    if kind == "polygon":
        return Shape(label, (points,))
    if kind == "rectangle":
        return Shape(label, (rectangle(*points.min(axis=0), *points.max(axis=0)),))
    if kind == "circle":
        radius = float(np.hypot(*(points[1] - points[0])))
        return Shape(label, (ellipse(points[0], (radius, radius)),))
    if kind == "mask":
        with Image.open(io.BytesIO(base64.b64decode(entry["mask"]))) as file:
            region = np.array(file.convert("L")) > 0 if file.mode != "1" else np.array(file)
        left, top = np.rint(points.min(axis=0)).astype(int)
        return Shape(label, region=_part(region, int(left), int(top)))
    return None


def fill_as_labelme(points: Points, height: int, width: int) -> Bool:
    """The pixels of an outline (N, 2), bool (H, W), those that it runs through included."""
    image = Image.new("1", (width, height))
    ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in points], outline=1, fill=1)
    return np.array(image, dtype=np.bool_)


# CVAT


def read_cvat(text: str, source: str, note: Note) -> tuple[list[Annotation], dict[str, str]]:
    """The annotations of a file "CVAT for images", and the colours of its labels as `#rrggbb`.

    Raises:
        UserError: Other XML, or a damaged file.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UserError("declares entities, which no export of CVAT does; export it again")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(f"is damaged ({error}); export it again") from None
    if root.tag != "annotations":
        raise UserError(f"is no file of CVAT (<{root.tag}>); only 'CVAT for images' is read of XML")
    if root.find("track") is not None:
        raise UserError("holds tracks of a video; export it as 'CVAT for images'")
    colors = {
        label.findtext("name", ""): label.findtext("color", "") for label in root.iterfind(".//labels/label")
    }
    found = []
    for image in root.iterfind("image"):
        where, shapes = f"{source}: '{image.get('name')}'", []
        with noting(note, where):
            for element in sorted(
                image, key=lambda one: int(one.get("z_order", 0))
            ):  # equal ones in file order
                shape = _cvat_shape(element)
                if shape is not None:
                    shapes.append(shape)
                elif element.tag != "tag":
                    note(f"{where}: a {element.tag} ('{element.get('label')}') {NO_AREA}; left out")
            size = (int(image.get("height", 0)), int(image.get("width", 0)))
            paint = paint_shapes(shapes, size if all(size) else None)
            if shapes:
                found.append(Annotation(image.get("name", ""), where, paint))
    return found, colors


def _cvat_shape(element: ElementTree.Element) -> Shape | None:
    label, get = element.get("label", ""), element.attrib
    turn = float(get.get("rotation", 0))
    if element.tag == "polygon":
        return Shape(label, (_outline([pair.split(",") for pair in get["points"].split(";")]),))
    if element.tag == "box":
        left, top, right, bottom = (float(get[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
        middle = ((left + right) / 2, (top + bottom) / 2)
        return Shape(label, (rotated(rectangle(left, top, right, bottom), middle, turn),))
    if element.tag == "ellipse":
        middle, radii = (float(get["cx"]), float(get["cy"])), (float(get["rx"]), float(get["ry"]))
        return Shape(label, (ellipse(middle, radii, turn),))
    if element.tag == "mask":
        left, top, width, height = (int(float(get[key])) for key in ("left", "top", "width", "height"))
        runs = np.array([int(run) for run in get["rle"].split(",")], dtype=np.int64)
        region = decode_runs(runs, width, height, f"mask '{label}'").T  # row by row
        return Shape(label, region=_part(region, left, top))
    return None


# Label Studio


def read_label_studio(tasks: Sequence[Mapping[str, Any]], source: str, note: Note) -> Iterator[Annotation]:
    """The annotations of an export of Label Studio (JSON or JSON-MIN): brushes, polygons, rectangles and ellipses."""
    for number, task in enumerate(tasks, start=1):
        data = task.get("data", task)
        name = next((str(data[key]) for key in ("image", "img", "photo", "url") if key in data), "")
        where = f"{source}: task {task.get('id', number)} ('{name.rsplit('/', 1)[-1]}')"
        with noting(note, where):
            shapes, size = [], None
            for value in _studio_regions(task, where, note):
                if "original_width" in value:
                    size = (int(value["original_height"]), int(value["original_width"]))
                shape = _studio_shape(value)
                if shape is not None:
                    shapes.append(shape)
                elif str(value.get("type", "labels")).endswith("labels"):
                    note(f"{where}: a region of kind '{value.get('type')}' {NO_AREA} or no class; left out")
            if shapes:
                photo = re.sub(r"^.*[?&]d=", "", name).split("?")[0]
                yield Annotation(photo, where, paint_shapes(shapes, size))


def _studio_regions(task: Mapping[str, Any], where: str, note: Note) -> list[dict[str, Any]]:
    """The regions of a task, each with its size and its value on one level."""
    if "data" not in task:  # JSON-MIN: they lie beside the photo, by the name of their tool
        lists = [value for value in task.values() if isinstance(value, list)]
        return [{"type": "labels", **one} for value in lists for one in value if isinstance(one, dict)]
    done = [one for one in task.get("annotations", ()) if not one.get("was_cancelled")]
    if len(done) > 1:
        note(f"{where}: {len(done)} annotations of one photo; the last one is used")
    return [{**one, **one.get("value", {})} for one in (done[-1]["result"] if done else ())]


def _studio_shape(value: Mapping[str, Any]) -> Shape | None:
    """One region; lengths are percent of the photo's."""
    label = next((str(names[0]) for key, names in value.items() if key.endswith("labels") and names), None)
    if label is None or "original_width" not in value:
        return None
    width, height = int(value["original_width"]), int(value["original_height"])

    def pixels(x: str, y: str) -> Points:
        return np.array([value[x] * width, value[y] * height], dtype=np.float64) / 100

    turn = float(value.get("rotation", 0))
    if "rle" in value:
        return Shape(label, region=lambda h, w: unpack_brush(value["rle"], h, w))
    if "points" in value:
        return Shape(label, (_outline(value["points"]) * [width / 100, height / 100],))
    if "radiusX" in value:
        return Shape(label, (ellipse(pixels("x", "y"), pixels("radiusX", "radiusY"), turn),))
    if {"x", "y", "width", "height"} <= value.keys():
        corner, size = pixels("x", "y"), pixels("width", "height")
        return Shape(label, (rotated(rectangle(*corner, *(corner + size)), corner, turn),))
    return None


def unpack_brush(packed: Sequence[int], height: int, width: int) -> Bool:
    """The region of a brush of Label Studio, bool (H, W): where its picture of four channels is not transparent.

    Bytes packed as thi.ng's rle-pack does: the count of values (32 bits), bits of a value less one (5), bits of four
    kinds of run lengths less one (4 each); then runs: a bit for repeated or single values, two bits for the kind of
    length, the length less one, and one value or as many values.

    Raises:
        UserError: The bytes end too early or hold another size.
    """
    bits = np.unpackbits(np.asarray(packed, dtype=np.uint8)).tolist()
    place = 0

    def take(count: int) -> int:
        nonlocal place
        value = 0
        for bit in bits[place : place + count]:
            value = value << 1 | bit
        place += count
        return value

    total = take(32)
    if total != 4 * height * width:
        raise UserError(f"brush of {total} values for a photo of {width}x{height}; export it again")
    word = take(5) + 1
    lengths = [take(4) + 1 for _ in range(4)]
    values = np.zeros(total, dtype=np.uint8)
    done = 0
    while done < total and place < len(bits):
        repeated = take(1)
        end = done + 1 + take(lengths[take(2)])
        if repeated:
            values[done:end] = take(word)
        else:
            values[done:end] = [take(word) for _ in range(min(end, total) - done)]
        done = end
    if done != total:
        raise UserError("brush that ends too early; export it again")
    return values.reshape(height, width, 4)[..., 3] > 0
