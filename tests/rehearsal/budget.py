"""Kernels and memory of a step at the papers' sizes, compared with recorded ones: has a change made a step slower?

    python -m tests.rehearsal.budget [--update]

The steps are those of the benchmarks, on a GPU that is not there: with the published network, crop and images per
process, forward, backward and optimizer. Recorded are the launches of the networks alone, those that the method adds,
and the memory that either needs at its peak beyond what lies there between two steps. They are counted alike on every
machine, but are no times: a launch of a sort weighs as much as one of a sum, cuDNN's workspaces and the allocator's
rounding are left out, attention is counted as its plain formula. `--update` records anew; say why in the commit.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from common.data.dataset_yaml import load_spec
from common.errors import run_main
from tests import regression
from tests.rehearsal.gpu import GPU, rehearsal
from tests.rehearsal.runs import Case, config_of, place_of

Costs = dict[str, dict[str, float]]  # by step: launches of the networks, those added, MiB of both

TOLERANCE = 0.02
RECORD = Path(__file__).parent / "budget.txt"
NETWORKS = "networks alone"
CASES = [
    Case("u2pl", "voc_classic_366_r101"),
    Case("u2pl", "cityscapes_744_r101"),
    # with fewer processes than published, as a process's own BatchNorm of one pooled image cannot be worked out
    Case("u2pl", "cityscapes_744_r101_ael", ("optim.paper_processes=4", "optim.device_batch=4")),
    Case("brpg", "voc_classic_366_r101"),
    Case("brpg", "cityscapes_744_r101"),
    Case("brpg", "coco_1_32_x65"),
    Case("cps", "voc_662_r50_cps"),
    Case("cps", "cityscapes_744_r50_cps", ("optim.paper_processes=4",)),
    Case("cps", "voc_662_r50_cps_cutmix"),
    Case("cps", "voc_662_r50_mean_teacher"),
    Case("cps", "voc_662_r50_cct"),
    Case("cps", "voc_662_r50_gct"),
    Case("s4gan_mlmt", "voc_529_r101"),
    Case("s4gan_mlmt", "cityscapes_297_wrn38"),
    Case("s4gan_mlmt", "voc_529_r101_mlmt", phase="mlmt"),
    Case("proto_consistency", "voc_classic_366_r101", ("method.proto.source=random",)),
    Case("unimatch", "voc_classic_366_r101"),
    Case("unimatch", "voc_classic_366_dinov2_small"),
    Case("unimatch", "voc_classic_366_r101", ("method.strong_views=1", "method.fp_share=0")),
]


def parts_of(case: Case) -> dict[str, Callable[[], object]]:
    """The parts of the benchmark of a case, on one of as many processes as the authors had."""
    bench = importlib.import_module(f"projects.{case.project}.bench")
    cfg = config_of(case, case.changes)
    dist = place_of(getattr(cfg.optim, "paper_processes", None) or 1)
    with torch.device(GPU):  # also what a network is built of: numbers for it would only cost time
        if case.project == "cps":
            return bench.step_functions(cfg, cfg.method.name, dist)
        if case.project == "s4gan_mlmt":
            classes = load_spec(cfg.data.dataset, cfg.data.root).num_classes
            return (bench.branch_parts if case.phase == "mlmt" else bench.segmentation_parts)(
                cfg, classes, dist
            )
        return bench.step_functions(cfg, dist)


class Cost(NamedTuple):
    """Launches of one call, and MiB that it needs at its peak beyond what was there; `parts` are all there are."""

    launches: int
    mib: float
    parts: list[str]


def cost_of(case: Case, part: str) -> Cost:
    """What one call of a part of the benchmark costs, on networks of its own."""
    with rehearsal() as watch:
        parts = parts_of(case)
        gc.collect()
        before = watch.peak = watch.live
        watch.launches = 0
        parts[part]()
        return Cost(watch.launches, round((watch.peak - before) / 2**20, 1), list(parts))


def costs(case: Case) -> Costs:
    """What every step of a case costs, by its name."""
    networks, found = cost_of(case, NETWORKS), {}
    for name in networks.parts:
        if name.endswith(" step"):
            whole = cost_of(case, name)
            found[f"{case} {name}"] = {
                "networks": networks.launches,
                "added": whole.launches - networks.launches,
                "networks_mib": networks.mib,
                "mib": whole.mib,
            }
    return found


def write(path: Path, found: Costs) -> None:
    """One line a step."""
    lines = [f"{name}: " + " ".join(f"{k}={v:g}" for k, v in own.items()) for name, own in found.items()]
    path.write_text("\n".join(lines) + "\n")


def read(path: Path) -> Costs:
    """What `write` wrote."""
    found: Costs = {}
    for line in path.read_text().splitlines():
        name, _, values = line.rpartition(": ")
        found[name] = {
            key: float(value) for key, _, value in (word.partition("=") for word in values.split())
        }
    return found


def differences(ours: Costs, recorded: Costs) -> list[str]:
    """A line for every figure that has moved by more than the tolerance, and for steps that only one side has."""
    lines = [f"{name}: not in both" for name in sorted(ours.keys() ^ recorded.keys())]
    for name in sorted(ours.keys() & recorded.keys()):
        for key, value in ours[name].items():
            if abs(value - recorded[name][key]) > TOLERANCE * abs(recorded[name][key]):
                lines.append(f"{name}: {key} is {value:g}, recorded {recorded[name][key]:g}")
    return lines


def main(argv: Sequence[str]) -> int:
    """Compare or record; 1 if a figure has moved."""
    args = regression.arguments(argv, __doc__)
    found = {name: own for case in CASES for name, own in costs(case).items()}
    if args.update:
        write(RECORD, found)
        sys.stdout.write(f"{RECORD.name}: {len(found)} steps recorded\n")
        return 0
    lines = differences(found, read(RECORD))
    for line in lines:
        sys.stdout.write(f"{line}; if that is meant, record anew with --update and say why\n")
    sys.stdout.write(f"launches and memory: {len(found)} steps, {len(lines)} figures have moved\n")
    return 1 if lines else 0


if __name__ == "__main__":
    run_main(main)
