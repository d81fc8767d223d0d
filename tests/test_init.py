"""`python -m splits init`: every annotation format, made as its program writes it, against the mask it stands for."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.data.dataset_yaml import load_spec
from common.data.files import voc_colormap
from common.data.lists import read_ids
from common.data.split import resolve_split
from common.errors import UserError
from splits.__main__ import main
from splits.init.lists import choose
from tests.each import for_each

HEIGHT, WIDTH = 180, 240
NAMES = ("background", "leaf", "stem")
COLORS = ((0, 0, 0), (60, 180, 75), (230, 25, 75))
PHOTOS = 6


def truth(i: int) -> np.ndarray:
    """A mask (180, 240) of background, a large leaf and a stem upon it."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.ellipse(mask, (115 + 3 * i, 92 - i), (88, 66 + i), 10.0 * i, 0, 360, 1, -1)
    cv2.ellipse(mask, (110 + 3 * i, 95 - i), (46, 40 - i), 25.0 * i, 0, 360, 2, -1)
    return mask


def photo(i: int) -> np.ndarray:
    rng = np.random.default_rng(i)
    blobs = cv2.resize(rng.normal(0, 60, (6, 8, 3)), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    pixels = np.array(COLORS)[truth(i)] * 0.5 + 60 + blobs + rng.normal(0, 8, (HEIGHT, WIDTH, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, palette: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette.astype(np.uint8).tobytes())
    image.save(path)


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def outlines(mask: np.ndarray, k: int) -> list[list[list[int]]]:
    found, _ = cv2.findContours((mask == k).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [contour[:, 0].tolist() for contour in found]


def painted(i: int) -> list[tuple[str, list[list[int]]]]:
    """Outlines in the order in which they are painted one over the other; the leaf's is that without the stem."""
    mask = truth(i)
    return [(NAMES[1], line) for line in outlines((mask > 0).astype(np.uint8), 1)] + [
        (NAMES[2], line) for line in outlines(mask, 2)
    ]


# The formats: each writes the annotations of all photos into a folder


def index_masks(folder: Path, masks: list[np.ndarray]) -> None:
    for i, mask in enumerate(masks):
        save(folder / "masks" / f"p{i}.png", mask)
    dump(folder / "classes.txt", "\n".join(NAMES))


def sixteen_bits(folder: Path, masks: list[np.ndarray]) -> None:
    for i, mask in enumerate(masks):
        save(folder / f"p{i}_mask.png", mask.astype(np.uint16))
    dump(folder / "classes.txt", "\n".join(NAMES))


def palette_masks(folder: Path, masks: list[np.ndarray]) -> None:
    """As labelme2voc writes them."""
    for i, mask in enumerate(masks):
        save(folder / "SegmentationClass" / f"p{i}.png", mask, voc_colormap())
    dump(folder / "labels.txt", "__ignore__\n_background_\nleaf\nstem\n")


def rgb_with_table(folder: Path, masks: list[np.ndarray]) -> None:
    for i, mask in enumerate(masks):
        save(folder / "labels" / f"p{i}_L.png", np.array(COLORS, np.uint8)[mask])
    dump(
        folder / "label_colors.txt",
        "".join(f"{r} {g} {b}\t{n}\n" for n, (r, g, b) in zip(NAMES, COLORS, strict=True)),
    )


def rgb_with_csv(folder: Path, masks: list[np.ndarray]) -> None:
    for i, mask in enumerate(masks):
        save(folder / "masks" / f"p{i}.bmp", np.array(COLORS, np.uint8)[mask])
    rows = "".join(f"{n}, {r}, {g}, {b}\n" for n, (r, g, b) in zip(NAMES, COLORS, strict=True))
    dump(folder / "class_dict.csv", f"name,r,g,b\n{rows}")


def rgb_with_json(folder: Path, masks: list[np.ndarray]) -> None:
    for i, mask in enumerate(masks):
        save(folder / "gt" / f"p{i}.tif", np.array(COLORS, np.uint8)[mask])
    names = [
        {"name": n, "color": "#{:02x}{:02x}{:02x}".format(*c)} for n, c in zip(NAMES, COLORS, strict=True)
    ]
    dump(folder / "colors.json", {"classes": names})


def cvat_archive(folder: Path, masks: list[np.ndarray]) -> None:
    """CVAT's 'Segmentation mask 1.1': a zip with masks in colours, numbers of objects beside them, and a labelmap."""
    rows = "".join(f"{n}:{r},{g},{b}::\n" for n, (r, g, b) in zip(NAMES, COLORS, strict=True))
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "task_1.zip", "w") as archive:
        archive.writestr("labelmap.txt", f"# label:color_rgb:parts:actions\n{rows}")
        archive.writestr("ImageSets/Segmentation/default.txt", "".join(f"p{i}\n" for i in range(len(masks))))
        for i, mask in enumerate(masks):
            for part, colors in (("Class", np.array(COLORS)), ("Object", voc_colormap(3))):
                buffer = io.BytesIO()
                Image.fromarray(colors.astype(np.uint8)[mask]).save(buffer, "PNG")
                archive.writestr(f"Segmentation{part}/p{i}.png", buffer.getvalue())


def labelme(folder: Path, masks: list[np.ndarray], **changes: Any) -> None:
    for i in range(len(masks)):
        shapes = [
            {"label": name, "points": line, "group_id": None, "shape_type": "polygon", "flags": {}}
            for name, line in painted(i)
        ]
        content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"..\\photos\\p{i}.jpg",
                   "imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH}  # fmt: skip
        dump(folder / f"p{i}.json", content | changes)


def labelme_masks(folder: Path, masks: list[np.ndarray]) -> None:
    """As labelme stores what its AI tool draws: a picture of a part, with its corners."""
    for i, mask in enumerate(masks):
        shapes = []
        for k in (1, 2):
            rows, columns = np.nonzero(mask == k)
            top, left, bottom, right = rows.min(), columns.min(), rows.max(), columns.max()
            buffer = io.BytesIO()
            Image.fromarray(mask[top : bottom + 1, left : right + 1] == k).save(buffer, "PNG")
            shapes.append({"label": NAMES[k], "points": [[int(left), int(top)], [int(right), int(bottom)]],
                           "shape_type": "mask", "mask": base64.b64encode(buffer.getvalue()).decode()})  # fmt: skip
        dump(
            folder / f"p{i}.json",
            {"shapes": shapes, "imagePath": f"p{i}.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH},
        )


def coco_file(segmentations: Callable[[int], list[tuple[int, Any]]], photos: int) -> dict[str, Any]:
    annotations = [
        {
            "id": 10 * i + k,
            "image_id": i,
            "category_id": 7 * k,
            "iscrowd": 0,
            "area": 100 / k,
            "segmentation": one,
        }
        for i in range(photos)
        for k, one in segmentations(i)
    ]
    return {
        "images": [
            {"id": i, "file_name": f"p{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(PHOTOS)
        ],
        "categories": [{"id": 7 * k, "name": NAMES[k]} for k in (1, 2)],
        "annotations": annotations,
    }


def coco_polygons(folder: Path, masks: list[np.ndarray]) -> None:
    def lines(i: int) -> list[tuple[int, Any]]:
        return [(NAMES.index(name), [np.ravel(line).tolist()]) for name, line in painted(i)]

    dump(folder / "annotations" / "instances_default.json", coco_file(lines, len(masks)))


def runs(region: np.ndarray) -> list[int]:
    flat = np.concatenate([[0], region.astype(np.int8).ravel(), [-1]])
    changes = np.flatnonzero(np.diff(flat))
    return np.diff(changes, prepend=0).tolist()


def coco_runs(folder: Path, masks: list[np.ndarray]) -> None:
    def regions(i: int) -> list[tuple[int, Any]]:
        return [(k, {"size": [HEIGHT, WIDTH], "counts": runs((masks[i] == k).T)}) for k in (1, 2)]

    dump(folder / "coco.json", coco_file(regions, len(masks)))


def coco_packed(folder: Path, masks: list[np.ndarray]) -> None:
    tools = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")

    def regions(i: int) -> list[tuple[int, Any]]:
        packed = [tools.encode(np.asfortranarray(masks[i] == k, dtype=np.uint8)) for k in (1, 2)]
        return [
            (k, {"size": one["size"], "counts": one["counts"].decode()}) for k, one in enumerate(packed, 1)
        ]

    dump(folder / "coco.json", coco_file(regions, len(masks)))


def coco_panoptic(folder: Path, masks: list[np.ndarray]) -> None:
    entries = []
    for i, mask in enumerate(masks):
        numbers = np.array([500, 70000, 3])[mask]
        rgb = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], axis=2)
        save(folder / "panoptic_val" / f"p{i}.png", rgb.astype(np.uint8))
        segments = [{"id": number, "category_id": k} for k, number in enumerate((500, 70000, 3))]
        entries.append({"image_id": i, "file_name": f"p{i}.png", "segments_info": segments})
    content = coco_file(lambda _: [], 0)
    categories = [{"id": k, "name": name, "isthing": k, "supercategory": "x"} for k, name in enumerate(NAMES)]
    dump(folder / "panoptic_val.json", content | {"annotations": entries, "categories": categories})


def cvat_xml(body: Callable[[int], str], photos: int) -> str:
    labels = "".join(f"<label><name>{n}</name><color>#3cb44b</color></label>" for n in NAMES[1:])
    images = "".join(
        f'<image id="{i}" name="photos/p{i}.jpg" width="{WIDTH}" height="{HEIGHT}">{body(i)}</image>'
        for i in range(photos)
    )
    meta = f"<meta><task><labels>{labels}</labels></task></meta>"
    return f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>{meta}{images}</annotations>'


def cvat_polygons(folder: Path, masks: list[np.ndarray]) -> None:
    def body(i: int) -> str:  # the upper one first: z_order says what is above
        return "".join(
            f'<polygon label="{name}" source="manual" occluded="0" z_order="{NAMES.index(name)}" '
            f'points="{";".join(f"{x:.2f},{y:.2f}" for x, y in line)}"></polygon>'
            for name, line in reversed(painted(i))
        )

    dump(folder / "annotations.xml", cvat_xml(body, len(masks)))


def cvat_masks(folder: Path, masks: list[np.ndarray]) -> None:
    def body(i: int) -> str:
        text = ""
        for k in (1, 2):
            rows, columns = np.nonzero(masks[i] == k)
            top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
            part = ", ".join(map(str, runs(masks[i][top:bottom, left:right] == k)))
            text += (f'<mask label="{NAMES[k]}" rle="{part}" left="{left}" top="{top}" width="{right - left}" '
                     f'height="{bottom - top}" z_order="0"></mask>')  # fmt: skip
        return text

    dump(folder / "annotations.xml", cvat_xml(body, len(masks)))


def studio_task(i: int, result: list[dict[str, Any]]) -> dict[str, Any]:
    size = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    return {"id": i, "data": {"image": f"/data/upload/1/0a1b2c3{i}-p{i}.jpg"},
            "annotations": [{"id": 1, "was_cancelled": False, "result": [size | one for one in result]}]}  # fmt: skip


def pack_brush(region: np.ndarray) -> list[int]:
    """What Label Studio's brush stores of a region, by the rules of thi.ng's rle-pack."""
    values = np.repeat(region.astype(np.uint8).ravel() * 255, 4)
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    starts = np.flatnonzero(np.diff(values, prepend=values[0] + 1))
    for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
        while start < end:
            length = min(int(end - start), 65536)
            kind = next(n for n, size in enumerate((3, 4, 8, 16)) if length <= 1 << size)
            bits += f"1{kind:02b}{length - 1:0{(3, 4, 8, 16)[kind]}b}{values[start]:08b}"
            start += length
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def studio_brush(folder: Path, masks: list[np.ndarray]) -> None:
    tasks = []
    for i, mask in enumerate(masks):
        values = [{"format": "rle", "rle": pack_brush(mask == k), "brushlabels": [NAMES[k]]} for k in (1, 2)]
        tasks.append(studio_task(i, [{"type": "brushlabels", "value": value} for value in values]))
    dump(folder / "project-1-at-2026.json", tasks)


def studio_polygons(folder: Path, masks: list[np.ndarray]) -> None:
    tasks = []
    for i in range(len(masks)):
        result = []
        for name, line in painted(i):
            points = (np.array(line) * [100 / WIDTH, 100 / HEIGHT]).tolist()
            value = {"points": points, "closed": True, "polygonlabels": [name]}
            result.append({"type": "polygonlabels", "value": value})
        tasks.append(studio_task(i, result))
    dump(folder / "project-1-at-2026.json", tasks)


def studio_min(folder: Path, masks: list[np.ndarray]) -> None:
    """The export JSON-MIN."""
    tasks = []
    for i, mask in enumerate(masks):
        brushes = [{"format": "rle", "rle": pack_brush(mask == k), "brushlabels": [NAMES[k]], "original_width": WIDTH,
                    "original_height": HEIGHT} for k in (1, 2)]  # fmt: skip
        tasks.append(
            {"id": i, "image": f"/data/local-files/?d=photos/p{i}.jpg", "tag": brushes, "annotator": 1}
        )
    dump(folder / "min.json", tasks)


EXACT = (
    index_masks, sixteen_bits, palette_masks, rgb_with_table, rgb_with_csv, rgb_with_json, cvat_archive, labelme,
    labelme_masks, coco_runs, coco_packed, coco_panoptic, cvat_masks, studio_brush, studio_min,
)  # fmt: skip
OUTLINES = (coco_polygons, cvat_polygons, studio_polygons)


def project(folder: Path, write: Callable[..., None], annotated: int = 4, beside: str = "photos") -> Path:
    """Six photos of which some are annotated; returns their folder."""
    for i in range(PHOTOS):
        save(folder / "photos" / f"p{i}.jpg", photo(i))
    write(folder / beside, [truth(i) for i in range(annotated)])
    return folder / "photos"


def init(folder: Path, out: Path, *more: str) -> None:
    main(["init", str(folder), "--out", str(out), "--hours", "0", *more])


def masks_of(out: Path) -> dict[str, np.ndarray]:
    """The masks by photo, with the numbers that `NAMES` have here."""
    spec = load_spec(out / "dataset.yaml")
    assert set(spec.classes) == set(NAMES)
    table = np.full(256, 255, np.uint8)
    table[: len(NAMES)] = [NAMES.index(name) for name in spec.classes]
    items = [item for name in ("train", "val") for item in spec.read_list(name) if item.label]
    return {item.id: table[spec.load_label(item)] for item in items}


@for_each("write", EXACT + OUTLINES)
def test_formats(write: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp(write.__name__)
    init(project(folder, write), folder / "mydata")
    found = masks_of(folder / "mydata")
    assert set(found) == {f"p{i}" for i in range(4)}
    for i in range(4):
        for k in range(3):
            a, b = found[f"p{i}"] == k, truth(i) == k
            iou = (a & b).sum() / (a | b).sum()
            assert iou == 1 or (write in OUTLINES and iou > 0.99), f"{NAMES[k]} of photo {i}: IoU {iou:.4f}"
    spec = load_spec(folder / "mydata" / "dataset.yaml")
    split = resolve_split(
        spec, next((folder / "mydata" / "own").iterdir()).relative_to(folder / "mydata").as_posix()
    )
    everything = {item.id for item in (*split.labeled, *split.unlabeled)} | set(
        read_ids(folder / "mydata" / "val.txt")
    )
    assert everything == {f"p{i}" for i in range(PHOTOS)}


# What is wrong is said in one line each, and nothing else is lost


def remarks(out: Path) -> list[str]:
    path = out / "remarks.txt"
    return path.read_text().splitlines() if path.is_file() else []


def change(file: Path, edit: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    dump(file, content)


def spoil_unknown_class(folder: Path) -> None:
    change(folder / "p0.json", lambda c: c["shapes"][1].update(label="flower"))


def spoil_outside(folder: Path) -> None:
    line = [[400, 10], [420, 10], [420, 30]]
    change(
        folder / "p0.json",
        lambda c: c["shapes"].append({"label": "leaf", "points": line, "shape_type": "polygon"}),
    )


def spoil_partly_outside(folder: Path) -> None:
    line = [[230, -5], [250, -5], [250, 12], [230, 12]]
    change(
        folder / "p0.json",
        lambda c: c["shapes"].append({"label": "leaf", "points": line, "shape_type": "polygon"}),
    )


def spoil_far_outside(folder: Path) -> None:
    line = [[1e12, 10], [1e12, 20], [0, 30]]
    change(
        folder / "p0.json",
        lambda c: c["shapes"].append({"label": "leaf", "points": line, "shape_type": "polygon"}),
    )


def spoil_line(folder: Path) -> None:
    change(
        folder / "p0.json",
        lambda c: c["shapes"].append({"label": "leaf", "points": [[1, 1], [9, 9]], "shape_type": "line"}),
    )


def spoil_photo(folder: Path) -> None:
    change(folder / "p0.json", lambda c: c.update(imagePath="gone.jpg"))
    (folder / "p0.json").rename(folder / "gone.json")


def spoil_empty(folder: Path) -> None:
    (folder / "p0.json").write_text("")


def spoil_half(folder: Path) -> None:
    text = (folder / "p0.json").read_text()
    (folder / "p0.json").write_text(text[: len(text) // 2])


def spoil_points(folder: Path) -> None:
    change(folder / "p0.json", lambda c: c["shapes"][0].pop("points"))


def spoil_size(folder: Path) -> None:
    change(folder / "p0.json", lambda c: c.update(imageWidth=480, imageHeight=360))


def spoil_twice(folder: Path) -> None:
    save(folder / "masks" / "p0.png", truth(0))


def spoil_no_shapes(folder: Path) -> None:
    change(folder / "p0.json", lambda c: c.update(shapes=[]))


def spoil_damaged_photo(folder: Path) -> None:
    data = (folder / "p0.jpg").read_bytes()
    (folder / "p0.jpg").write_bytes(data[: len(data) // 2])


@for_each(
    ("spoil", "left", "parts"),
    [
        (spoil_unknown_class, 4, ("p0.json", "'flower' is none of the classes", "count nowhere")),
        (spoil_outside, 4, ("p0.json", "shape 3 ('leaf')", "covers no pixel", "240x180")),
        (spoil_partly_outside, 4, ("p0.json", "shape 3 ('leaf')", "reaches beyond", "cut")),
        (spoil_far_outside, 4, ("p0.json", "shape 3 ('leaf')", "left out")),
        (spoil_line, 4, ("p0.json", "shape 3 ('leaf')", "line", "no area")),
        (spoil_no_shapes, 4, ("p0.json", "no shape is drawn", "background")),
        (spoil_photo, 3, ("gone.json", "gone.jpg", "not there")),
        (spoil_empty, 3, ("p0.json", "empty")),
        (spoil_half, 3, ("p0.json", "damaged")),
        (spoil_points, 3, ("p0.json", "damaged", "points")),
        (spoil_size, 3, ("p0.json", "480x360", "240x180")),
        (spoil_twice, 4, ("p0.png", "p0.json", "two annotations")),
        (spoil_damaged_photo, 3, ("p0.jpg", "cannot be read")),
    ],
)
def test_one_line_for_what_is_wrong(
    spoil: Callable[[Path], None],
    left: int,
    parts: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp(spoil.__name__)
    photos = project(folder, labelme, beside="photos")
    spoil(photos)
    init(photos, folder / "mydata", "--classes", ",".join(NAMES))
    found, said = masks_of(folder / "mydata"), remarks(folder / "mydata")
    assert len(said) == 1, said
    assert [part for part in parts if part not in said[0]] == []
    assert len(found) == left
    for i in range(1, 4):  # the others are as they were
        assert np.array_equal(found[f"p{i}"], truth(i))
    if spoil in (spoil_outside, spoil_far_outside, spoil_line, spoil_twice):
        assert np.array_equal(found["p0"], truth(0))
    if spoil is spoil_unknown_class:
        assert np.array_equal(found["p0"], np.where(truth(0) == 2, 255, truth(0)))


def coco_category(folder: Path) -> None:
    coco_runs(folder, [truth(i) for i in range(4)])
    change(folder / "coco.json", lambda c: c["annotations"][1].update(category_id=99))


def coco_image(folder: Path) -> None:
    coco_runs(folder, [truth(i) for i in range(4)])
    change(
        folder / "coco.json", lambda c: c["annotations"].append({"id": 77, "image_id": 50, "category_id": 7})
    )


def coco_box(folder: Path) -> None:
    coco_runs(folder, [truth(i) for i in range(4)])
    box = {"id": 77, "image_id": 0, "category_id": 7, "segmentation": [], "bbox": [1, 2, 3, 4]}
    change(folder / "coco.json", lambda c: c["annotations"].append(box))


def coco_short_runs(folder: Path) -> None:
    coco_runs(folder, [truth(i) for i in range(4)])
    change(folder / "coco.json", lambda c: c["annotations"][0]["segmentation"]["counts"].pop())


def coco_panoptic_picture(folder: Path) -> None:
    coco_panoptic(folder, [truth(i) for i in range(4)])
    (folder / "panoptic_val" / "p0.png").unlink()


def rgb_unknown(folder: Path) -> None:
    rgb_with_table(folder, [truth(i) for i in range(4)])
    save(folder / "labels" / "p0_L.png", np.array([*COLORS[:2], (1, 2, 3)], np.uint8)[truth(0)])


def rgb_lossy(folder: Path) -> None:
    rgb_with_table(folder, [truth(i) for i in range(4)])
    (folder / "labels" / "p0_L.png").unlink()
    save(folder / "labels" / "p0.jpg", np.array(COLORS, np.uint8)[truth(0)])


def index_unknown(folder: Path) -> None:
    index_masks(folder, [truth(i) for i in range(4)])
    save(folder / "masks" / "p0.png", np.where(truth(0) == 2, 9, truth(0)).astype(np.uint8))


def mask_of_nothing(folder: Path) -> None:
    index_masks(folder, [truth(i) for i in range(4)])
    save(folder / "masks" / "other.png", truth(0))


def mask_size(folder: Path) -> None:
    index_masks(folder, [truth(i) for i in range(4)])
    save(folder / "masks" / "p0.png", truth(0)[:90])


def mask_empty(folder: Path) -> None:
    index_masks(folder, [truth(i) for i in range(4)])
    (folder / "masks" / "p0.png").write_bytes(b"")


def cvat_entity(folder: Path) -> None:
    cvat_masks(folder, [truth(i) for i in range(4)])
    dump(folder / "bomb.xml", '<!DOCTYPE a [<!ENTITY b "c">]><annotations>&b;</annotations>')


def cvat_tracks(folder: Path) -> None:
    cvat_masks(folder, [truth(i) for i in range(4)])
    dump(folder / "video.xml", "<annotations><track id='0' label='leaf'></track></annotations>")


def cvat_gone(folder: Path) -> None:
    cvat_masks(folder, [truth(i) for i in range(4)])
    file = folder / "annotations.xml"
    file.write_text(file.read_text().replace("photos/p0.jpg", "photos/gone.jpg"))


def cvat_empty(folder: Path) -> None:
    cvat_masks(folder, [truth(i) for i in range(4)])
    dump(folder / "more.xml", " \n")


def coco_outside(folder: Path) -> None:
    coco_runs(folder, [truth(i) for i in range(4)])
    entry = {"id": 77, "image_id": 0, "category_id": 7, "segmentation": [[400, 10, 420, 10, 420, 30]]}
    change(folder / "coco.json", lambda c: c["annotations"].append(entry))


def coco_twice(folder: Path) -> None:
    coco_runs(folder, [truth(i) for i in range(4)])
    change(
        folder / "coco.json", lambda c: dump(folder / "more.json", c | {"annotations": c["annotations"][:2]})
    )


def damaged_archive(folder: Path) -> None:
    cvat_masks(folder, [truth(i) for i in range(4)])
    (folder / "task.zip").write_bytes(b"PK\x03\x04 no zip")


def studio_twice(folder: Path) -> None:
    studio_brush(folder, [truth(i) for i in range(4)])
    file = folder / "project-1-at-2026.json"
    change(file, lambda c: c[0]["annotations"].insert(0, c[1]["annotations"][0]))


def studio_cut(folder: Path) -> None:
    studio_brush(folder, [truth(i) for i in range(4)])
    file = folder / "project-1-at-2026.json"
    change(file, lambda c: c[0]["annotations"][0]["result"][0]["value"].update(rle=[0, 2, 163, 0, 57]))


@for_each(
    ("write", "left", "parts"),
    [
        (coco_category, 4, ("coco.json: 'p0.jpg'", "category 99", "count nowhere")),
        (coco_image, 4, ("coco.json", "image 50", "left out")),
        (coco_box, 4, ("coco.json: 'p0.jpg'", "'leaf'", "covers no pixel")),
        (coco_short_runs, 3, ("coco.json: 'p0.jpg'", "run lengths add up")),
        (coco_panoptic_picture, 3, ("panoptic_val.json: 'p0.jpg'", "p0.png", "not there")),
        (rgb_unknown, 4, ("p0_L.png", "(1, 2, 3)", "count nowhere")),
        (index_unknown, 4, ("p0.png", "9", "count nowhere")),
        (mask_of_nothing, 4, ("other.png", "not there")),
        (mask_size, 3, ("p0.png", "240x90", "240x180")),
        (cvat_entity, 4, ("bomb.xml", "entities")),
        (cvat_tracks, 4, ("video.xml", "tracks", "CVAT for images")),
        (cvat_gone, 3, ("annotations.xml: 'photos/gone.jpg'", "gone.jpg", "not there")),
        (cvat_empty, 4, ("more.xml", "empty")),
        (coco_outside, 4, ("coco.json: 'p0.jpg'", "'leaf'", "covers no pixel")),
        (coco_twice, 4, ("more.json: 'p0.jpg'", "two annotations", "coco.json")),
        (damaged_archive, 4, ("task.zip", "damaged archive")),
        (studio_twice, 4, ("task 0", "2 annotations", "the last one")),
        (studio_cut, 3, ("task 0", "brush")),
    ],
)  # fmt: skip
def test_one_line_in_every_format(
    write: Callable[[Path], None], left: int, parts: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp(write.__name__)
    init(project(folder, lambda where, _: write(where)), folder / "mydata")
    found, said = masks_of(folder / "mydata"), remarks(folder / "mydata")
    assert len(said) == 1, said
    assert [part for part in parts if part not in said[0]] == []
    assert len(found) == left
    for i in range(1, 4):
        assert np.array_equal(found[f"p{i}"], truth(i))


@for_each(
    ("write", "what"),
    [(rgb_lossy, "labels/p0.jpg: a mask saved with loss"), (mask_empty, "masks/p0.png: empty")],
)
def test_files_that_are_left_out_are_named(
    write: Callable[[Path], None],
    what: str,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path_factory.mktemp(write.__name__)
    init(project(folder, lambda where, _: write(where)), folder / "mydata")
    assert f"left out: {what}" in capsys.readouterr().out
    assert len(masks_of(folder / "mydata")) == 3


def refusal(*arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        init(*arguments)
    line = str(error.value)
    assert "\n" not in line
    return line


def test_folders_that_give_no_dataset_are_refused_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "mydata"
    assert "no such folder" in refusal(tmp_path / "gone", out)
    (tmp_path / "empty").mkdir()
    assert "no photo that can be read" in refusal(tmp_path / "empty", out)
    bare = project(tmp_path / "a", lambda *_: None)
    assert "no annotation of its 6 photos" in refusal(bare, out)
    one = project(tmp_path / "b", labelme, annotated=1, beside="photos")
    assert "one annotated photo" in refusal(one, out)
    same = project(tmp_path / "c", lambda f, m: index_masks(f, [0 * one for one in m]), beside="photos")
    assert "1 classes found (background)" in refusal(same, tmp_path / "other")
    assert "--group" in refusal(project(tmp_path / "d", labelme), tmp_path / "third", "--group", "p")
    assert "no regular expression" in refusal(tmp_path / "d" / "photos", tmp_path / "third", "--group", "(")
    assert "different names" in refusal(tmp_path / "d" / "photos", tmp_path / "third", "--classes", "a,a")


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_second_run_extends_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mydata"
    photos = project(tmp_path, labelme, annotated=4, beside="photos")
    init(photos, out)
    before = tree(out)
    init(photos, out)
    assert tree(out) == before
    yaml_file = out / "dataset.yaml"
    yaml_file.write_text(yaml_file.read_text().replace("stem", "stalk"))  # a user's own name

    labelme(photos, [truth(i) for i in range(6)])
    line = [[3, 3], [30, 3], [30, 20], [3, 20]]
    change(
        photos / "p5.json",
        lambda c: c["shapes"].append({"label": "fruit", "points": line, "shape_type": "polygon"}),
    )
    change(photos / "p0.json", lambda c: c["shapes"].pop())  # corrected since
    save(photos / "p6.png", photo(6))
    init(photos, out)
    after = tree(out)
    kept = set(before) - {"dataset.yaml", "init.json", "train.txt"}
    assert {name for name in kept if after[name] != before[name]} == set()
    assert after["train.txt"].startswith(before["train.txt"])
    spec = load_spec(yaml_file)
    assert spec.classes == ("background", "leaf", "stalk", "fruit")
    assert {item.id for item in spec.read_list("train")} == {f"p{i}" for i in range(7)} - set(
        read_ids(out / "val.txt")
    )
    (two,) = {path.name for path in (out / "own").iterdir()} - {
        name.split("/")[1] for name in before if "own/" in name
    }
    assert two == "5"
    assert {"p4", "p5"} <= {item.id for item in resolve_split(spec, f"own/{two}").labeled}
    fruit = next(item for item in spec.read_list("train") if item.id == "p5")
    assert (spec.load_label(fruit) == 3).sum() == 28 * 18
    said = capsys.readouterr().out
    assert "fruit" in said
    assert f"p0.json: differs from {out / 'mask' / 'p0.png'}, which is kept" in said


def test_a_folder_of_annotations_alone_extends_too(tmp_path: Path) -> None:
    out, photos = tmp_path / "mydata", project(tmp_path, labelme)
    init(photos, out, "--annotations", str(photos))
    for file in photos.iterdir():
        file.unlink()
    coco_runs(tmp_path / "more", [truth(i) for i in range(6)])
    change(tmp_path / "more" / "coco.json", lambda c: c.update(annotations=c["annotations"][8:]))
    init(tmp_path / "more", out)
    found = masks_of(out)
    assert {number for number in found if np.array_equal(found[number], truth(int(number[1:])))} == {
        f"p{i}" for i in range(6)
    }
    labeled = resolve_split(load_spec(out / "dataset.yaml"), "own/5").labeled
    assert {"p4", "p5"} < {item.id for item in labeled}


def test_a_dataset_of_ones_own_hand_is_left_alone(tmp_path: Path) -> None:
    out, photos = tmp_path / "mydata", project(tmp_path, labelme, beside="photos")
    dump(out / "dataset.yaml", "name: mine\n")
    assert "was not made by init" in refusal(photos, out)
    assert tree(out) == {"dataset.yaml": b"name: mine\n"}


def test_an_interrupted_run_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = project(tmp_path, cvat_archive)
    whole, broken = tmp_path / "whole" / "mydata", tmp_path / "broken" / "mydata"
    init(photos, whole, "--annotations", str(photos))
    writes = stop = 0

    def interrupted(path: Path, data: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == stop:
            raise KeyboardInterrupt
        original(path, data)

    from splits.init import command, write

    original = write.write_bytes
    for module in (write, command):
        monkeypatch.setattr(module, "write_bytes", interrupted)
    while stop < 40:
        writes, stop = 0, stop + 1
        try:
            init(photos, broken, "--annotations", str(photos))
            break
        except KeyboardInterrupt:
            for path in broken.rglob("*"):
                if path.is_file():
                    assert tree(whole)[path.relative_to(broken).as_posix()] == path.read_bytes()
    assert stop > 5
    assert tree(broken) == tree(whole)


def test_names_of_all_kinds(tmp_path: Path) -> None:
    """Sub-folders with the same names, other endings, blanks, an upper-case ending, a loop of links."""
    out, photos = tmp_path / "mydata", tmp_path / "photos"
    names = [
        "a/001.jpg",
        "b/001.jpg",
        "b/IMG 07.JPG",
        "leaf (1).png",
        "leaf (2).tif",
        "x.y.bmp",
        "z.jpg",
        "z.png",
    ]
    for i, name in enumerate(names):
        save(photos / name, photo(i))
        if i < 6:
            save(tmp_path / "labels" / Path(name).with_suffix(".png"), truth(i))
    (photos / "notes.docx").write_bytes(b"words")
    (photos / "b" / "loop").symlink_to(photos, target_is_directory=True)
    init(photos, out, "--annotations", str(tmp_path / "labels"), "--classes", ",".join(NAMES))
    found = masks_of(out)
    assert set(found) == {"a/001", "b/001", "b/IMG 07", "leaf (1)", "leaf (2)", "x.y"}
    for i, name in enumerate(names[:6]):
        assert np.array_equal(found[name.rpartition(".")[0]], truth(i))
    assert {"z", "z_png"} <= set((out / "train.txt").read_text().splitlines())


def classes_of(folder: Path, write: Callable[..., None], *more: str) -> tuple[str, ...]:
    init(project(folder, write), folder / "mydata", *more)
    return load_spec(folder / "mydata" / "dataset.yaml").classes


def plain(edit: Callable[[np.ndarray], np.ndarray]) -> Callable[..., None]:
    def write(folder: Path, masks: list[np.ndarray]) -> None:
        for i, mask in enumerate(masks):
            save(folder / "masks" / f"p{i}.png", edit(mask))

    return write


NUMBERS = np.array([3, 40, 255], np.uint8)
PAINTS = np.array([(0, 0, 0), (9, 8, 7), (200, 0, 0)], np.uint8)


@for_each(
    ("edit", "names"),
    [
        (lambda m: ((m > 0) * 255).astype(np.uint8), ("background", "foreground")),
        (lambda m: m > 0, ("class_0", "class_1")),  # of one bit
        (lambda m: m, ("class_0", "class_1", "class_2")),
        (lambda m: NUMBERS[m], ("class_3", "class_40")),  # 255 counts nowhere
        (lambda m: PAINTS[m], ("background", "color_090807", "color_c80000")),
        (lambda m: np.repeat(m[..., None], 3, axis=2), ("class_0", "class_1", "class_2")),
    ],
)
def test_names_of_unexplained_masks(
    edit: Callable[[np.ndarray], np.ndarray], names: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("plain")
    assert classes_of(folder, plain(edit)) == names
    spec = load_spec(folder / "mydata" / "dataset.yaml")
    item = next(item for item in spec.read_list("train") if item.label)
    stored, expected = spec.load_label(item), truth(int(item.id[1:]))
    table = (
        np.array([*range(len(names)), 255, 255], np.uint8)[:3] if len(names) > 2 else np.array([0, 1, 255])
    )
    if names[1] == "foreground" or edit(expected).dtype == bool:
        expected = (expected > 0).astype(np.uint8)
    assert np.array_equal(stored, table[expected])


def test_what_the_user_says_goes_first(tmp_path: Path) -> None:
    assert classes_of(tmp_path / "a", plain(lambda m: m), "--classes", "soil,plant,root") == (
        "soil",
        "plant",
        "root",
    )
    assert classes_of(tmp_path / "b", labelme, "--classes", "stem,leaf") == ("stem", "leaf", "background")
    assert classes_of(tmp_path / "c", labelme, "--unpainted", "ignore") == ("leaf", "stem")
    table = tmp_path / "table.txt"
    table.write_text("1 soil 0 0 0\n2 plant 9 8 7\n3 void 200 0 0\n")
    assert classes_of(tmp_path / "d", plain(lambda m: PAINTS[m]), "--colors", str(table)) == ("soil", "plant")
    assert load_spec(tmp_path / "d" / "mydata" / "dataset.yaml").palette.tolist() == [[0, 0, 0], [9, 8, 7]]
    assert "names no colours" in refusal(
        tmp_path / "d" / "photos", tmp_path / "e", "--colors", str(tmp_path / "d" / "mydata" / "val.txt")
    )


def test_turned_and_deep_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Photos of a phone that lie on their side as stored, and grey photos of twelve bits."""
    photos, out = project(tmp_path, labelme, beside="photos"), tmp_path / "mydata"
    exif = Image.Exif()
    exif[0x112] = 6
    for i in range(3):
        Image.fromarray(np.rot90(photo(i))).save(photos / f"p{i}.jpg", exif=exif)
        grey = photo(i).mean(axis=2) * 16
        Image.fromarray(grey.astype(np.uint16)).save(photos / f"deep{i}.png")
    init(photos, out)
    assert remarks(out) == []
    assert np.array_equal(masks_of(out)["p0"], truth(0))
    spec = load_spec(out / "dataset.yaml")
    assert spec.value_range == (0, 4095)
    said = capsys.readouterr().out
    assert "3 photos: turned upright" in said
    assert "3 photos: 16 bits per channel, of which 0..4095 become 0..255" in said
    assert "no value in the upper" not in said
    assert "one annotated photo" in refusal(photos, tmp_path / "stored", "--orientation", "stored")
    assert len(remarks(tmp_path / "stored")) == 3
    assert "180x240" in remarks(tmp_path / "stored")[0]


def test_near_duplicates_stay_together_and_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = project(tmp_path, labelme, annotated=6, beside="photos"), tmp_path / "mydata"
    shown = np.random.default_rng(0)
    for i in (0, 2):  # the same scene once more, lighter and noisier
        noisy = photo(i) * 0.9 + 25 + shown.normal(0, 6, (HEIGHT, WIDTH, 3))
        save(photos / f"p{i + 1}.jpg", noisy.clip(0, 255).astype(np.uint8))
    for i in range(6):  # and as photos without masks
        save(photos / f"again{i}.jpg", np.roll(photo(i), 1, axis=1))
    init(photos, out)
    val = set(read_ids(out / "val.txt"))
    assert {"p0", "p1"} <= val or not {"p0", "p1"} & val
    assert {"p2", "p3"} <= val or not {"p2", "p3"} & val
    said = capsys.readouterr().out
    assert "near-duplicates on both sides: again" in said
    assert {
        number
        for line in said.splitlines()
        if "both sides" in line
        for number in line.split()
        if number in val
    }


def test_scenes_stay_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, out = tmp_path / "photos", tmp_path / "mydata"
    for i in range(9):
        save(photos / f"scene{i // 3}_{i % 3}.jpg", photo(i))
        save(tmp_path / "masks" / f"scene{i // 3}_{i % 3}.png", truth(i))
    init(photos, out, "--annotations", str(tmp_path / "masks"), "--group", "scene([0-9])_")
    val = read_ids(out / "val.txt")
    assert len(val) == 3
    assert len({number[:6] for number in val}) == 1
    (measured,) = {number[:6] for number in val}
    train = set(read_ids(out / "train.txt"))
    for i in range(3):  # more frames of each, without masks
        save(photos / f"scene{i}_9.jpg", photo(10 + i))
    init(photos, out)  # the pattern is remembered
    assert set(read_ids(out / "train.txt")) == train | {f"scene{i}_9" for i in range(3)} - {f"{measured}_9"}
    assert read_ids(out / "val.txt") == val
    said = capsys.readouterr().out
    assert f"1 photos of scenes that are measured on are not trained on, such as {measured}_9" in said


SHOWN = st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.lists(SHOWN, min_size=2, max_size=12), st.integers(0, 9))
def test_both_lists_show_every_class_that_two_groups_can(groups: list[list[set[int]]], seed: int) -> None:
    ids = [[f"{g}.{i}" for i in range(len(group))] for g, group in enumerate(groups)]
    shows = {f"{g}.{i}": shown for g, group in enumerate(groups) for i, shown in enumerate(group)}
    val = set(choose(ids, shows, seed))
    assert 0 < len(val) < len(shows)
    assert all(set(group) <= val or not set(group) & val for group in ids)
    assert sorted(val) == choose(ids, shows, seed)
    often = Counter(k for group in groups for k in set().union(*group))
    if all(count > 2 for count in often.values()) and len(groups) > 2 * len(often):
        for side in (val, shows.keys() - val):
            assert set().union(*(shows[number] for number in side)) == set(often)
    elif min(often.values()) > 1 or any(
        all(often[k] > 1 for k in set().union(*group)) for group in groups
    ):  # nothing that one group alone shows is taken from training
        rest = set().union(*(shows[number] for number in shows.keys() - val))
        assert rest == set(often)


def test_the_study_is_made_as_a_process_that_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, calls, codes = tmp_path / "my data", [], [0, 2]

    def run(command: list[str], *, env: dict[str, str], check: bool) -> subprocess.CompletedProcess[bytes]:
        calls.append(command[1:])
        assert not check
        assert (out / "dataset.yaml").is_file()
        assert Path(env["PYTHONPATH"].split(os.pathsep)[0], "studies", "begin.py").is_file()
        return subprocess.CompletedProcess(command, codes.pop(0))

    monkeypatch.setattr("splits.init.command.subprocess.run", run)
    command = [
        "init",
        str(project(tmp_path, labelme)),
        "--annotations",
        str(tmp_path / "photos"),
        "--out",
        str(out),
    ]
    assert main([*command, "--hours", "0.5"]) == 0
    assert f"next: python -m studies run '{out}/study.yaml' --report" in capsys.readouterr().out
    assert main(command) == 2
    assert "next:" not in capsys.readouterr().out
    begin = ["-m", "studies", "begin", str(out / "dataset.yaml"), "--hours"]
    assert calls == [[*begin, "0.5"], [*begin, "2"]]
