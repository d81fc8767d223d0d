"""`python -m splits make`: a random split, nested, covering the classes, from a seed."""

from __future__ import annotations

from pathlib import Path

from common.data.files import write_bytes
from common.data.lists import read_entries
from common.data.spec import DatasetSpec
from common.data.split import evaluation_photos, refuse_evaluation_images
from common.errors import UserError
from splits.draw import draw
from splits.published import (
    say,
)


def make(spec: DatasetSpec, fraction: str, seed: int, out: Path | None, *, force: bool) -> Path:
    """Write a random split and return its folder: `random/<fraction>`, with a seed other than 0 `random_seed<s>/...`.

    Args:
        spec: The dataset.
        fraction: "1/8" or "46".
        seed: 0 or more.
        out: Folder to make it in; None takes that of the dataset.yaml.
        force: Replace a split that differs.

    Raises:
        UserError: See `draw`; or another split is there and `force` is not set.
    """
    if seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")
    lines = training_lines(spec)
    drawn = draw(spec, fraction, seed)
    family = "random" if seed == 0 else f"random_seed{seed}"
    folder = (out or spec.splits_dir) / family / fraction.replace("/", "_")
    contents = {
        folder / f"{role}.txt": ("\n".join(lines.get(item.id, item.id) for item in items) + "\n").encode()
        for role, items in (("labeled", drawn.labeled), ("unlabeled", drawn.unlabeled))
    }
    for path, data in contents.items():
        if path.is_file() and path.read_bytes() != data and not force:
            raise UserError(f"{path}: holds another split; move it away or use --force")
    for path, data in contents.items():
        write_bytes(path, data)
    say(f"{folder}: {len(drawn.labeled)} labeled, {len(drawn.unlabeled)} unlabeled")
    if drawn.missing:
        say(f"note: no labeled photo shows {', '.join(drawn.missing)}; a larger fraction or another seed may")
    return folder


def training_lines(spec: DatasetSpec) -> dict[str, str]:
    """The training list's lines by id, so that paths named there stay named; evaluation images are refused."""
    if "train" not in spec.lists or not spec.lists["train"].is_file():
        return {}  # a generated dataset, or `draw` says what is missing
    path = spec.lists["train"]
    entries = read_entries(path)
    items = spec.find_items(entries, path, labels=False)
    refuse_evaluation_images(entries, items, path, evaluation_photos(spec))
    return {item.id: entry.text for entry, item in zip(entries, items, strict=True)}
