"""Cluster features of the labeled images into the first prototypes, by the network of the supervised pre-stage.

    python -m projects.proto_consistency.cluster --config CONFIG --checkpoint BEST --out FILE

CONFIG is that of the semi-supervised run: its split, network, `method.proto` and evaluation windows are used. BEST is
the pre-stage's `best.pt`, or any file of weights for that network. FILE (`.npz`) then goes to
`method.proto.init_path`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.config import load_config
from common.errors import UserError, run_main
from common.mean_teacher.data import read_split
from common.mean_teacher.evaluation import protocol
from common.models.pretrained import load_state, read_weights
from projects.proto_consistency.config import Config
from projects.proto_consistency.initial import ENTRIES, cluster_labeled, save_prototypes
from projects.proto_consistency.network import build_network
from tools.processes import start, stop


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="cluster.py", description="Make the first prototypes from the features of a trained network."
    )
    result.add_argument("--config", type=Path, required=True, help="configuration of the semi-supervised run")
    result.add_argument("--checkpoint", type=Path, required=True, help="weights of the pre-stage (best.pt)")
    result.add_argument("--out", type=Path, required=True, help="file of prototypes to write (.npz)")
    result.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration"
    )
    return result


def main(argv: Sequence[str]) -> int:
    """Cluster what the command line names and write the file."""
    args = parser().parse_intermixed_args(argv)
    cfg = load_config(Config, args.config, args.overrides)
    proto = cfg.method.proto
    if proto is None:
        raise UserError(
            f"{args.config}: method.proto is null, so it has no prototypes; give another configuration"
        )
    if args.out.suffix != ".npz":
        raise UserError(f"--out {args.out}: is written as a NumPy archive; choose a name that ends in .npz")
    spec, split = read_split(cfg)
    network = build_network(cfg.model, spec.num_classes, None)
    state, place = read_weights(args.checkpoint, ENTRIES)
    report = load_state(network, state, source=place)
    dist = start(cfg.run.device)
    try:
        if dist.world_size > 1:
            raise UserError(f"cluster.py: started as {dist.world_size} processes; start it as one")
        how, say = protocol(cfg, "script"), partial(print, flush=True)
        made = cluster_labeled(cfg, network.to(dist.device), spec, split.labeled, how, say)
    finally:
        stop()
    about = {
        "checkpoint": report.source,
        "split": cfg.data.split,
        "images": len(split.labeled),
        "normalize": proto.normalize,
        "seed": proto.seed,
    }
    save_prototypes(args.out, made, spec.classes, about)
    sys.stdout.write(
        f"{args.out}: written ({len(made)} prototypes of {made.shape[1]} channels, {proto.per_class} per class); "
        f"set method.proto.init_path={args.out}\n"
    )
    return 0


if __name__ == "__main__":
    run_main(main)
