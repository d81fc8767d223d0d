"""Flags of the original's `eval.py`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from common.errors import UserError
from common.run.checkpoint import kept_weights
from projects.cps.state import KEPT_BY


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`-e` with the words that it takes, and the flags without an effect here."""
    words = (
        "which of a run's weights: last, N, A-B, A-, or a file (default: best, last and all that were kept)"
    )
    parser.add_argument("-e", "--epochs", metavar="EPOCHS", help=words)
    parser.add_argument("-d", "--devices", help="accepted, without effect")
    parser.add_argument("-v", "--verbose", action="store_true", help="accepted, without effect")
    parser.add_argument("-s", "--show_image", action="store_true", help="accepted, without effect")


def notes(args: argparse.Namespace) -> list[str]:
    """What becomes of flags of the original that have no effect."""
    reasons = {
        "devices": "the processes that are started share the images, see eval.sh",
        "verbose": "every class is always printed",
        "show_image": "no window is opened; --save writes the predictions",
    }
    return [
        f"--{key}: accepted, without effect: {reason}"
        for key, reason in reasons.items()
        if getattr(args, key)
    ]


def weights_of_epochs(run_dir: Path, cfg: object, chosen: str) -> dict[str, Path]:
    """Weights of a run that `--epochs` chooses: `last`, `N`, `A-B` (inclusive) or `A-`.

    Raises:
        UserError: no such words, or none of these were kept.
    """
    del cfg
    if chosen == "last":
        return {"last": run_dir / "last.pt"}
    found = re.fullmatch(r"(\d+)(-?)(\d*)", chosen)
    if not found or (found[3] and not found[2]):
        raise UserError(f"--epochs {chosen}: give last, N, A-B, A-, or a file .pt")
    first = int(found[1])
    last = int(found[3]) if found[3] else (None if found[2] else first)
    kept = {
        int(label.removeprefix(f"{KEPT_BY}_")): path for label, path in kept_weights(run_dir, KEPT_BY).items()
    }
    wanted = {n: path for n, path in kept.items() if n >= first and (last is None or n <= last)}
    if not wanted:
        has = f"those of {', '.join(map(str, kept))}" if kept else "none"
        raise UserError(
            f"--epochs {chosen}: {run_dir} has kept {has}; choose among them, use --epochs last, or train with "
            "keep.every_epochs=1"
        )
    return {f"{KEPT_BY}_{n}": path for n, path in wanted.items()}
