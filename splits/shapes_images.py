"""The embedded dataset `shapes`: generated photos of textured solids with exact label maps, no download.

Each class comes in several appearances (pattern and hue), and every instance varies in place, size, rotation,
hue, contrast, texture period and phase, under uneven light, noise, occlusion and clutter. A handful of labeled
images shows few of these variations; the 400 training images cover them. That is the regime of the papers:
a first teacher that is mostly right, and unlabeled images that hold what the labeled ones lack.

All arithmetic is on integers (a splitmix64 stream, fixed-point coordinates, table sines), so that an index and
a seed give the same bytes on every platform and with every library version.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from splits.draw import draw

__all__ = ["draw", "render"]  # what a generated dataset offers

Ints = NDArray[np.int32]
Bytes = NDArray[np.uint8]
Silhouette = Callable[[Ints, Ints], NDArray[np.bool_]]
Pattern = Callable[[Ints, Ints, int], Ints]

ONE = 1024  # fixed-point unit of directions and of an object's own coordinates
SUBPIXEL = 16
HUES = 1536  # steps of the colour circle
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MASK64 = (1 << 64) - 1


# What decides how hard the dataset is; ranges are inclusive.
APPEARANCES = 1  # patterns, each with a hue of its own, per class
HUE_JITTER = 195  # largest deviation from an appearance's hue, in 1/1536 of the colour circle
NOISE = 20  # amplitude of the pixel noise in grey levels
LIGHT = 35  # largest darkening across the image in percent
OBJECTS = (4, 6)  # in an image, before some hide others
RADIUS = (20, 32)  # of an object in percent of the image's side
CLUTTER = 2  # largest number of background strips across the image
CONTRAST = (75, 150)  # difference between the two tones of a pattern in grey levels


class _Stream:
    """A splitmix64 sequence of integers."""

    def __init__(self, *key: int) -> None:
        self.state = 0
        for part in key:
            self.state = self.next() ^ (part & MASK64)

    def next(self) -> int:
        """The next integer of 64 bits."""
        self.state = (self.state + GOLDEN_GAMMA) & MASK64
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        return z ^ (z >> 31)

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.next() % (high - low + 1)

    def bytes(self, count: int) -> Bytes:
        """`count` bytes, those that `next` would give, lowest first."""
        steps = np.arange(1, (count + 7) // 8 + 1, dtype=np.uint64)
        z = steps * np.uint64(GOLDEN_GAMMA) + np.uint64(self.state)
        self.state = (self.state + GOLDEN_GAMMA * len(steps)) & MASK64
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        drawn: Bytes = (z ^ (z >> np.uint64(31))).astype("<u8").view(np.uint8)
        return drawn[:count]


# Silhouettes: inside or not, for own coordinates u (right), v (down) with the radius at ONE.


def _disc(u: Ints, v: Ints) -> NDArray[np.bool_]:
    return u * u + v * v <= ONE * ONE


def _square(u: Ints, v: Ints) -> NDArray[np.bool_]:
    return np.maximum(np.abs(u), np.abs(v)) <= 840


def _triangle(u: Ints, v: Ints) -> NDArray[np.bool_]:
    return (v <= 600) & (2 * np.abs(u) <= v + 1100)


def _cross(u: Ints, v: Ints) -> NDArray[np.bool_]:
    wide, narrow = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return (wide <= ONE) & (narrow <= 340)


# Patterns: the share of the second tone (0..256) at p, q in 1/16 pixel along the object's axes, for a period.


def _stripes(p: Ints, q: Ints, period: int) -> Ints:
    del q
    return two_tones(p // period & 1)


def _checker(p: Ints, q: Ints, period: int) -> Ints:
    return two_tones((p // period + q // period) & 1)


def _dots(p: Ints, q: Ints, period: int) -> Ints:
    x, y = p % (2 * period) - period, q % (2 * period) - period
    return two_tones(9 * (x * x + y * y) <= 4 * period * period)


def _shade(p: Ints, q: Ints, period: int) -> Ints:
    del q
    return np.abs(p % (8 * period) - 4 * period) * 64 // period


def two_tones(second: NDArray[np.bool_] | Ints) -> Ints:
    """The share 256 where `second`, else 0."""
    return second.astype(np.int32) * 256


@dataclass(frozen=True)
class Family:
    """A set of classes: a name and a silhouette each, and the patterns that their appearances take in turn."""

    silhouettes: tuple[tuple[str, Silhouette], ...]
    patterns: tuple[Pattern, ...]
    domain: int  # first part of the random key: families never share an image


SHAPES = Family(
    (("disc", _disc), ("square", _square), ("triangle", _triangle), ("cross", _cross)),
    (_stripes, _dots, _checker, _shade),
    domain=1,
)
CLASSES = ("background", *(name for name, _ in SHAPES.silhouettes))
PALETTE: Bytes = np.array(
    [(0, 0, 0), (230, 75, 53), (77, 187, 213), (0, 160, 135), (243, 155, 46)], dtype=np.uint8
)
SIZE = 64
SEED = 0
RANGES = {"train": range(400), "val": range(400, 500), "test": range(500, 700)}


def render(index: int, seed: int = SEED, size: int = SIZE) -> tuple[Bytes, Bytes]:
    """Image uint8 (size, size, 3) RGB and label map uint8 (size, size) of `CLASSES`, for any index >= 0."""
    image, label = _cached(index, seed, size)
    return image.copy(), label.copy()


@lru_cache(maxsize=1024)
def _cached(index: int, seed: int, size: int) -> tuple[Bytes, Bytes]:
    return render_family(SHAPES, index, seed, size)


def render_family(family: Family, index: int, seed: int = SEED, size: int = SIZE) -> tuple[Bytes, Bytes]:
    """Image and label map as `render`, of the classes of a family."""
    draws = _Stream(family.domain, seed, index)
    image = _background(draws, size)
    label = np.zeros((size, size), np.uint8)
    for _ in range(draws.between(*OBJECTS)):
        _add_object(image, label, family, draws)
    for _ in range(draws.between(0, CLUTTER)):
        _add_strip(image, label, draws)
    return _photographed(image, draws), label


def _background(draws: _Stream, size: int) -> Ints:
    """A soft two-tone field, int32 (size, size, 3), values 0..255."""
    cells = draws.between(2, 7)
    knots: Ints = draws.bytes((cells + 1) ** 2).astype(np.int32).reshape(cells + 1, cells + 1)
    cell, share = _knot_positions(size, cells)
    across: Ints = knots[:, cell] * (256 - share) + knots[:, cell + 1] * share
    mixed: Ints = (across[cell] * (256 - share[:, None]) + across[cell + 1] * share[:, None]) >> 16
    first, second = _muted(draws), _muted(draws)
    field: Ints = first + ((second - first) * mixed[..., None] >> 8)
    return field


def _add_object(image: Ints, label: Bytes, family: Family, draws: _Stream) -> None:
    size = len(label)
    kind = draws.between(0, len(family.silhouettes) - 1)
    appearance = draws.between(0, APPEARANCES - 1)
    radius = max(size * SUBPIXEL * draws.between(*RADIUS) // 100, SUBPIXEL)
    row, col = (draws.between(size * SUBPIXEL // 8, size * SUBPIXEL * 7 // 8) for _ in range(2))
    turn = draws.between(0, 255)
    x, y = _sine((turn + 64) % 256), _sine(turn)
    down, right = np.ogrid[0:size, 0:size]
    dy, dx = (axis.astype(np.int32) * SUBPIXEL - start for axis, start in ((down, row), (right, col)))
    p, q = dx * x + dy * y, dy * x - dx * y  # in 1/16 pixel times ONE
    inside = family.silhouettes[kind][1](p // radius, q // radius)

    slot = kind + appearance * len(family.silhouettes)
    pattern = family.patterns[slot % len(family.patterns)]
    period = SUBPIXEL * size * draws.between(32, 64) // 1024  # 2 to 4 pixels at size 64
    shifted = [(axis[inside] >> 10) + draws.between(0, 64 * SUBPIXEL) for axis in (p, q)]
    share = pattern(shifted[0], shifted[1], period)
    hues = HUES * slot // (len(family.silhouettes) * APPEARANCES)
    hue = hues + draws.between(-HUE_JITTER, HUE_JITTER)
    light = draws.between(150, 235)
    first = _color(hue, draws.between(110, 230), light)
    second = _color(hue + draws.between(-64, 64), draws.between(60, 200), light - draws.between(*CONTRAST))
    image[inside] = first + ((second - first) * share[:, None] >> 8)
    label[inside] = kind + 1


def _add_strip(image: Ints, label: Bytes, draws: _Stream) -> None:
    """A straight strip of one colour across the image, labelled background: it hides what lies below."""
    size = len(label)
    turn = draws.between(0, 255)
    x, y = _sine((turn + 64) % 256), _sine(turn)
    row, col = draws.between(0, size - 1), draws.between(0, size - 1)
    down, right = np.ogrid[0:size, 0:size]
    distance = np.abs((right - col) * x + (down - row) * y)
    hidden = distance <= ONE * size * draws.between(1, 4) // 64
    image[hidden] = _muted(draws)
    label[hidden] = 0


def _photographed(image: Ints, draws: _Stream) -> Bytes:
    """The image under uneven light, with noise, clipped to uint8."""
    size = len(image)
    turn = draws.between(0, 255)
    down, right = np.ogrid[0:size, 0:size]
    slope = (right * _sine((turn + 64) % 256) + down * _sine(turn)) // size  # within +-1.42 * ONE
    darkening = draws.between(0, LIGHT)
    gain = (200 - darkening) * 5 + slope * darkening // 200  # 1000 where nothing is darkened
    grain = draws.bytes(2 * image.size).astype(np.int32).reshape(2, *image.shape)
    noise = (grain[0] + grain[1] - 255) * NOISE >> 8
    photo: Bytes = np.clip(image * gain[..., None] // 1000 + noise, 0, 255).astype(np.uint8)
    return photo


def _muted(draws: _Stream) -> Ints:
    return _color(draws.between(0, HUES - 1), draws.between(0, 120), draws.between(60, 220))


def _color(hue: int, saturation: int, value: int) -> Ints:
    """RGB int32 (3,) of a hue (modulo 1536), saturation and value 0..255."""
    sector, rest = divmod(hue % HUES, 256)
    low = value * (255 - saturation) // 255
    rising, falling = low + (value - low) * rest // 256, value - (value - low) * rest // 256
    table = (
        (value, rising, low),
        (falling, value, low),
        (low, value, rising),
        (low, falling, value),
        (rising, low, value),
        (value, low, falling),
    )
    return np.array(table[sector], dtype=np.int32)


@lru_cache(maxsize=256)
def _sine(turn: int) -> int:
    """ONE times the sine of `turn` in 1/256 of a full turn."""
    return round(ONE * math.sin(2 * math.pi * turn / 256))


@lru_cache(maxsize=64)
def _knot_positions(size: int, cells: int) -> tuple[Ints, Ints]:
    """Cell number and share of the next knot (0..255) of each pixel."""
    position = np.arange(size, dtype=np.int32) * cells * 256 // size
    return position >> 8, position & 255
