"""Which photos to annotate next, by a simple rule.

What the annotation of a photo would teach is taken as (1 - mean confidence) times the distance to the nearest photo
that is labeled or stands before it in the list: the network is unsure of it, and nothing like it is known. The distance
is between descriptions of photos: square roots of the shares of the classes (predicted, or those of the mask), and the
colours of 4 x 4 fields. The first photo is that of the largest product, then the distances are taken anew, and so on.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from common.data.files import write_bytes
from common.data.spec import IGNORE
from studies.style import ASSETS, style_sheet
from studies.tiles import data_uri, shrink

FIELDS = 4  # of the description, along each side
GREEDY = 500  # photos that are ranked one after the other; the rest by the distances that are left then
SHOWN = 60  # on the page
SIDE = 240  # of its pictures, in pixels

Uint8 = NDArray[np.uint8]
Floats = NDArray[np.float64]
Load = Callable[[], tuple[Uint8, Uint8]]


@dataclass(frozen=True)
class Candidate:
    """A photo that is not labeled.

    Attributes:
        name: below the folder of photos.
        confidence: mean probability of the predicted classes, 0 to 1.
        description: see `describe`.
        load: gives the photo (H, W, 3) and the predicted classes (H, W).
        sure: file of the confidence of every pixel.
    """

    name: str
    confidence: float
    description: Floats
    load: Load
    sure: Path


@dataclass(frozen=True)
class Ranked:
    """A photo with its place in the list: the distance to what was known before it, and the product."""

    candidate: Candidate
    distance: float
    worth: float


def describe(photo: Uint8, ids: Uint8, num_classes: int) -> Floats:
    """What a photo (H, W, 3) with the classes (H, W) is like: K + 48 numbers, each part of which moves by 0 to 1.7."""
    counts = np.bincount(ids[ids != IGNORE].ravel(), minlength=num_classes)[:num_classes]
    shares = np.sqrt(counts / max(1, counts.sum()))
    fields = cv2.resize(photo, (FIELDS, FIELDS), interpolation=cv2.INTER_AREA)
    return np.concatenate([shares, fields.ravel() / (255 * FIELDS)])


def rank(candidates: Sequence[Candidate], known: Sequence[Floats]) -> list[Ranked]:
    """The photos in the order in which their annotation would teach most; `known` describes the labeled ones."""
    if not candidates:
        return []
    points = np.stack([one.description for one in candidates])
    unsure = 1 - np.array([one.confidence for one in candidates])
    nearest = np.full(len(candidates), np.sqrt(2.0))  # of no labeled photo at all: all are equally new
    for other in known:
        nearest = np.minimum(nearest, np.linalg.norm(points - other, axis=1))
    found: list[Ranked] = []
    left = np.ones(len(candidates), dtype=bool)
    for _ in range(min(GREEDY, len(candidates))):
        i = int(np.argmax(np.where(left, unsure * nearest, -1.0)))
        found.append(Ranked(candidates[i], float(nearest[i]), float(unsure[i] * nearest[i])))
        left[i] = False
        nearest = np.minimum(nearest, np.linalg.norm(points - points[i], axis=1))
    rest = sorted(np.flatnonzero(left).tolist(), key=lambda i: -float(unsure[i] * nearest[i]))
    return found + [Ranked(candidates[i], float(nearest[i]), float(unsure[i] * nearest[i])) for i in rest]


def write_next(found: Sequence[Ranked], out: Path, palette: Uint8) -> None:
    """Write `next.csv` and, with pictures of the first photos, `next.html`.

    Raises:
        UserError: the folder cannot be written.
    """
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(("rank", "photo", "uncertainty", "distance", "worth"))
    for number, one in enumerate(found, start=1):
        figures = (1 - one.candidate.confidence, one.distance, one.worth)
        table.writerow((number, one.candidate.name, *(f"{value:.4f}" for value in figures)))
    write_bytes(out / "next.csv", file.getvalue().encode())
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((ASSETS / "next.html").read_text(encoding="utf-8"))
    text = template.render(
        css=Markup(style_sheet()),
        total=len(found),
        photos=[
            {
                "number": number,
                "name": one.candidate.name,
                "uncertainty": f"{100 * (1 - one.candidate.confidence):.1f} %",
                "distance": f"{one.distance:.2f}",
                "pictures": _pictures(one.candidate, palette),
            }
            for number, one in enumerate(found[:SHOWN], start=1)
        ],
    )
    write_bytes(out / "next.html", text.encode())


def _pictures(one: Candidate, palette: Uint8) -> list[tuple[str, Markup]]:
    """Title and data URI of the photo, of its classes in their colours, and of the confidence."""
    photo, ids = one.load()
    photo, ids = shrink(photo, SIDE, smooth=True), shrink(ids, SIDE, smooth=False)
    colors = palette[ids.clip(max=len(palette) - 1)]
    with Image.open(one.sure) as file:
        sure = shrink(np.asarray(file.convert("L"), dtype=np.uint8), SIDE, smooth=True)
    grey = np.repeat(sure[..., None], 3, axis=2)
    pictures = {"photo": photo, "classes": colors, "confidence": grey}
    return [(name, Markup(data_uri(one, lossless=name == "classes"))) for name, one in pictures.items()]
