"""What a step of the AEL variant costs; run by `projects/u2pl/bench.py`.

Besides networks and full step the part "banks and masks" is timed: class confidence, CutMix bank, the choice of classes
and images, the boxes. It works on labels of 8 x 8 blocks, and on a bank of `IMAGES` images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common.data.dataset_yaml import load_spec
from common.data.loaders import Batch
from common.distributed import Dist
from common.numerics.precision import grad_scaler
from common.run.progress import Progress
from projects.u2pl.ael.boxes import adaptive_boxes
from projects.u2pl.ael.draws import AelDraws
from projects.u2pl.ael.memory import AelMemory
from projects.u2pl.ael.step import AelBatch, ael_step
from projects.u2pl.config import Config, require_ael
from projects.u2pl.model import Networks
from projects.u2pl.state import Run
from projects.u2pl.train import after_step
from tools.bench import random_batch

BANKS = "banks and masks"
NO_DATA: Any = None  # the steps read no loader
IMAGES = 2231  # unlabeled ones of Cityscapes with 744 labels


def ael_functions(
    cfg: Config, nets: Networks, optimizer: torch.optim.Optimizer, labeled: Batch, x_u: Tensor, dist: Dist
) -> dict[str, Callable[[], object]]:
    """One iteration of the networks alone, one of the whole variant, and what it does on the host and in the bank.

    Args:
        cfg: of the variant.
        nets: on their device.
        optimizer: of the student.
        labeled: images and labels of a forward.
        x_u: as many unlabeled images, of which one half is mixed with the other.
        dist: this process.
    """
    ael, x_l, y_l = require_ael(cfg), labeled.image, labeled.label
    classes = load_spec(cfg.data.dataset, cfg.data.root).num_classes
    pairs, epoch = len(x_u) // 2, min(ael.start_epoch, cfg.optim.epochs - 1)
    memory = AelMemory(cfg, classes, IMAGES, cfg.model.inner_planes, 0).to(dist.device)
    draws = AelDraws(0, 0, dist.device)
    places = list(range(pairs))
    batch = AelBatch(x_l, y_l, x_l.flip(0), y_l.flip(0), x_u[:pairs], x_u[pairs:], places)
    _, seen = random_batch(2 * pairs, cfg.data.crop_size, classes, dist, cfg.run.channels_last)
    run = Run(cfg, dist, NO_DATA, nets, draws, optimizer, grad_scaler(cfg.run.precision, dist), memory)
    at = Progress(epoch * 1000 + 500, 1000, cfg.optim.epochs)
    known = torch.ones(len(seen), dtype=torch.bool, device=dist.device)
    logits = torch.nn.functional.one_hot(y_l, classes).movedim(-1, 1).float().contiguous()

    def networks() -> None:
        nets.student.train()
        optimizer.zero_grad(set_to_none=True)
        outs = [nets.forward(x_l)]
        nets.teach(x_l, train=True)
        nets.teach(x_u, train=False)
        nets.teach(batch.x_u, train=True)
        outs.append(nets.forward(batch.x_u))
        terms = [out.logits.mean() + (0.0 if out.feats is None else out.feats.mean()) for out in outs]
        torch.stack(terms).sum().backward()
        optimizer.step()
        after_step(at, run)

    def full() -> None:
        nets.student.train()
        optimizer.zero_grad(set_to_none=True)
        choice = memory.choose(draws, pairs)
        ael_step(batch, choice, at, run).total.backward()
        optimizer.step()
        after_step(at, run)

    def banks() -> None:
        choice = memory.choose(draws, pairs)
        ids = [*places, *(pair.second for pair in choice.pairs)]
        maps = memory.learn(logits, y_l, seen, known, ids, dist).read()[-1][pairs:]
        adaptive_boxes(maps, [pair.k for pair in choice.pairs], ael, draws)

    return {"networks alone": networks, "full step": full, BANKS: banks}
