"""Validation of the image-level branch: the scores of every image, the authors' text files, and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.files import write_bytes
from common.distributed import Dist, gather_objects
from common.errors import UserError
from common.numerics.precision import autocast, widened
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.mlmt.data import ScoreData
from projects.s4gan_mlmt.mlmt.fusion import write_scores
from projects.s4gan_mlmt.mlmt.losses import accuracies, count_correct, roll_scores

NAMES = {"student": "val", "teacher": "ema"}


class Scored(NamedTuple):
    """What a classifier says of the images of a list, in list order, on the host.

    Attributes:
        sigmoids: (N, K) in the network's columns, the background last.
        rows: the same as the files hold them, see `roll_scores`.
        vectors: (N, K) of 0 and 1; -1 where nothing is known.
    """

    sigmoids: Tensor
    rows: Tensor
    vectors: Tensor


def score_files(run_dir: Path, epochs: int) -> dict[str, Path]:
    """The four files after so many epochs: `val_raw`, `val_bin` of the student, `ema_raw`, `ema_bin` of the teacher."""
    return {
        f"{name}_{kind}": run_dir / f"output_{name}_{kind}_{epochs}.txt"
        for name in NAMES.values()
        for kind in ("raw", "bin")
    }


@torch.no_grad()
def score(cfg: Config, network: nn.Module, scored: ScoreData, dist: Dist) -> Scored:
    """Scores of every image of a list by a classifier, which is in evaluation mode meanwhile; a collective.

    The processes share the batches of `mlmt.val_batch` images, so the result does not depend on their number.
    """
    training = network.training
    network.eval()
    parts = []
    for batch in scored.batches(dist, cfg.run.channels_last):
        with autocast(dist.device, cfg.run.precision):
            logits = network(batch.image)
        sigmoids = widened(logits).sigmoid()
        parts.append((sigmoids, roll_scores(sigmoids, cfg.mlmt.flat_roll), batch.label))
    network.train(training)
    # to the host only now: the device has been busy with all batches in the meantime
    own = [tuple(t.cpu() for t in part) for part in parts]
    shards = gather_objects(own, dist)
    ordered = [shards[i % len(shards)][i // len(shards)] for i in range(sum(map(len, shards)))]
    sigmoids, rows, vectors = (torch.cat(column) for column in zip(*ordered, strict=True))
    return Scored(sigmoids, rows, vectors)


def figures(found: Scored, threshold: float) -> dict[str, float]:
    """Loss and accuracies in percent on the images whose vectors are known; empty if there are none."""
    known = found.vectors[:, 0] >= 0
    if not known.any():
        return {}
    sigmoids, vectors = found.sigmoids[known], found.vectors[known]
    accuracy = accuracies(count_correct(sigmoids, vectors, threshold))
    return {
        "loss_class": float(F.binary_cross_entropy(sigmoids, vectors.to(sigmoids.dtype))),
        **{f"accuracy_{name}": float(value) for name, value in accuracy._asdict().items()},
    }


def binary_text(rows: Tensor, threshold: float) -> str:
    """Rows (N, K) as lines of 0 and 1: 1 for what is above the threshold."""
    flags = (rows > threshold).to(torch.uint8).numpy()
    return "".join(" ".join(map(str, row)) + "\n" for row in np.asarray(flags).tolist())


def validate(
    cfg: Config, networks: Mapping[str, nn.Module], scored: ScoreData, run_dir: Path, epochs: int, dist: Dist
) -> dict[str, float]:
    """Write the scores of `student` and `teacher` after so many epochs, and return their figures by name; a collective.

    The authors append to a file of the same name; here it is replaced (`append_scores` of the README), so that its
    first rows are never those of an earlier run.

    Raises:
        UserError: a score is not finite, or the folder cannot be written.
    """
    result: dict[str, float] = {}
    files = score_files(run_dir, epochs)
    for role, network in networks.items():
        found = score(cfg, network, scored, dist)
        if not found.rows.isfinite().all():
            raise UserError(
                f"mlmt: the {role}'s scores after epoch {epochs} are not finite; lower mlmt.lr, or set "
                "run.precision=fp32"
            )
        name = NAMES[role]
        if dist.is_main:
            write_scores(files[f"{name}_raw"], found.rows.double().numpy())
            write_bytes(files[f"{name}_bin"], binary_text(found.rows, cfg.mlmt.threshold).encode())
        result |= {f"{name}_{key}": value for key, value in figures(found, cfg.mlmt.threshold).items()}
    return result
