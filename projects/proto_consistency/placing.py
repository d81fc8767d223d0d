"""When the first prototypes of a run are made; `initial.py` makes them."""

from __future__ import annotations

from common.data.streams import TrainingData
from common.distributed import Dist
from common.run.log import RunLog
from projects.proto_consistency.config import Config
from projects.proto_consistency.evaluate import protocol
from projects.proto_consistency.initial import initial_prototypes
from projects.proto_consistency.state import State


def place_prototypes(
    epoch: int, cfg: Config, data: TrainingData, state: State, log: RunLog, dist: Dist
) -> None:
    """Give student and teacher their first prototypes, once, if `epoch` (from 0) is the time; a collective.

    `file` and `random` before the first step; `warmup_end` by the student's features of the labeled images before
    the first step of epoch `method.sup_only_epochs`.

    Raises:
        UserError: the file is missing or does not fit, or nothing is labeled; on every process.
    """
    proto = cfg.prototypes
    if proto is None or state.placed:
        return
    if proto.source == "warmup_end" and epoch < cfg.method.sup_only_epochs:
        return
    student, labeled = state.nets.student, data.split.labeled
    with log.paused():
        made = initial_prototypes(
            cfg, student, data.spec, labeled, protocol(cfg, "script"), dist, log.info
        ).to(dist.device)
    for network in (student, state.nets.require_teacher()):
        network.require_prototypes().set(made)
    state.placed = True
