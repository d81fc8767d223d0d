"""Turn an experiment configuration of the original into one of this project.

    python compat/original.py experiments/pascal/366/ours/config.yaml --out configs/mine.yaml

Every key is translated, known to have no effect, or refused with its name; what the original does not say stays at the
default of the published settings. Both spellings of `proto_unpdate_momentum` and the older name of the block,
`relation_net_head`, are understood.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import yaml

from common.config import build
from common.errors import UserError, run_main, writing
from projects.proto_consistency.config import Config
from tools import mode_scripts

PROCESSES = 8  # the batch size of the original is that of one of them
_UNUSED = """
dataset.noise_std dataset.ignore_label dataset.n_sup dataset.train.crop.type dataset.val.crop.type
dataset.train.data_root dataset.val.data_root dataset.val.data_list dataset.val.crop.size
trainer.eval_on trainer.unsupervised.TTA trainer.optimizer.type trainer.lr_scheduler.mode
saver.main_dir saver.snapshot_dir saver.auto_resume saver.ignore_keys criterion.threshold
net.num_classes net.encoder.kwargs.fpn net.encoder.kwargs.multi_grid net.aux_loss.aux_plane
net.decoder.type net.decoder.kwargs.rep_head net.decoder.kwargs.rep_clf
net.encoder.kwargs.replace_stride_with_dilation net.proto_head.in_planes
"""
UNUSED = set(_UNUSED.split())
# from their place to ours; a number is copied as it is
COPIED = {
    "dataset.train.flip": "data.flip",
    "dataset.train.GaussianBlur": "data.blur",
    "dataset.train.rand_resize": "data.scale_range",
    "dataset.train.rand_rotation": "data.rotation",
    "dataset.train.crop.size": "data.crop_size",
    "dataset.workers": "data.workers",
    "dataset.mean": "data.mean",
    "dataset.std": "data.std",
    "trainer.epochs": "optim.epochs",
    "trainer.optimizer.kwargs.lr": "optim.lr",
    "trainer.optimizer.kwargs.momentum": "optim.momentum",
    "trainer.optimizer.kwargs.weight_decay": "optim.weight_decay",
    "trainer.lr_scheduler.kwargs.power": "optim.power",
    "trainer.sup_only_epoch": "method.sup_only_epochs",
    "trainer.unsupervised.drop_percent": "method.drop_percent",
    "trainer.unsupervised.confid_thresh": "method.confid_thresh",
    "trainer.unsupervised.apply_aug": "method.strong_augmentation",
    "trainer.unsupervised.loss_weight": "method.unsup_weight",
    "criterion.kwargs.thresh": "method.ohem_thresh",
    "criterion.kwargs.min_kept": "method.ohem_min_kept",
    "net.sync_bn": "model.sync_bn",
    "net.ema_decay": "method.ema_decay",
    "net.aux_loss.loss_weight": "model.aux_weight",
    "net.encoder.kwargs.zero_init_residual": "model.zero_init_residual",
    "net.decoder.kwargs.inner_planes": "model.inner_planes",
    "net.decoder.kwargs.dilations": "model.dilations",
    "net.proto_head.loss_weight": "method.proto.weight",
    "net.proto_head.num_micro_proto": "method.proto.per_class",
    "net.proto_head.dynamic_update_proto": "method.proto.update",
    "net.proto_head.proto_unpdate_momentum": "method.proto.momentum",
    "net.proto_head.init_proto_path": "method.proto.init_path",
    "net.proto_head.select_granularity": "method.proto.granularity",
}


def main(argv: Sequence[str]) -> int:
    """Translate the file that the command line names."""
    parser = argparse.ArgumentParser(prog="original.py", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="configuration of the original (config.yaml)")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)
    tree = read(args.source)
    if not mode_scripts.is_original(tree):
        raise UserError(f"{args.source}: is not written for the original code; use it as it is")
    if args.out.resolve() == args.source.resolve():
        raise UserError(f"--out {args.out}: is the source; choose another file")
    text = yaml.safe_dump(
        translate(tree, str(args.source)), sort_keys=False, default_flow_style=None, width=110
    )
    with writing(f"--out {args.out}", "choose another place"):
        args.out.write_text(f"# translated from {args.source}\n{text}", encoding="utf-8")
    sys.stdout.write(f"{args.out}: written\n")
    return 0


def read_own(config: Path) -> dict[str, Any]:
    """The sections of a configuration; says what to do with one that is written for the original code.

    Raises:
        UserError: it is one, or cannot be read.
    """
    return mode_scripts.read_own(config, f", or translate it: python compat/original.py {config} --out FILE")


def read(path: Path) -> Any:
    """Contents of a YAML file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())[:160]})") from None


def translate(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The sections of this project that say the same, checked; `where` names the file in messages.

    Raises:
        UserError: a key is not known, has no counterpart here, or has an impossible value.
    """
    flat = leaves(tree)
    for old, new in (
        ("net.relation_net_head.", "net.proto_head."),
        ("proto_update_momentum", "proto_unpdate_momentum"),
    ):
        flat = {key.replace(old, new): value for key, value in flat.items()}
    kind = str(flat.pop("dataset.type", ""))
    family = "cityscapes" if "cityscapes" in kind else "voc" if "pascal" in kind else None
    if family is None:
        raise UserError(f"{where}: dataset.type '{kind}'; known are those with 'pascal' or 'cityscapes'")
    backbone = str(flat.pop("net.encoder.type", "resnet101")).rpartition(".")[2]
    per_process = int(flat.pop("dataset.batch_size", 2))
    semi = kind.endswith("_semi")
    ours: dict[str, Any] = {
        "data.dataset": family,
        "data.split": split_of(str(flat.pop("dataset.train.data_list", "")), family, where),
        "model.backbone": backbone,
        "model.weights": f"{backbone}_deep_imagenet.pth",
        "optim.head_lr_factor": 1.0 if family == "cityscapes" else 10.0,
        "optim.batch_size": PROCESSES * per_process,
        "optim.device_batch": per_process,
        "optim.paper_processes": PROCESSES,
        "method.mode": "semi" if semi else "sup_only",
        "method.criterion": "ohem" if str(flat.pop("criterion.type", "ohem")).lower() == "ohem" else "ce",
        "run.init": flat.pop("saver.pretrain", None) or None,
        "eval.protocol": "sliding_window" if family == "cityscapes" else "whole_image",
    }
    if family == "cityscapes":
        ours["method.sup_only_order"] = "sampled"
    if not flat.pop("net.proto_head.patch_select", True):
        raise UserError(
            f"{where}: net.proto_head.patch_select is false, with which the original's own call fails; set it to true"
        )
    has_prototypes = semi and any(key.startswith("net.proto_head.") for key in flat)
    if has_prototypes:
        ours["eval.head"] = "linear" if family == "cityscapes" else "both"
    else:
        ours["method.proto"] = None
    for key, value in flat.items():
        if key not in COPIED and key not in UNUSED:
            raise UserError(
                f"{where}: '{key}' is not known; remove it, or set what it means in our configuration"
            )
        place = COPIED.get(key, "")
        if place and (has_prototypes or not place.startswith("method.proto.")):
            ours[place] = value
    result = nested(ours)
    try:
        build(Config, result)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return result


def split_of(listed: str, family: str, where: str) -> str:
    """Our name of the split whose labeled list the original names, such as `../pascal/366/labeled.txt`.

    Raises:
        UserError: the list is none of the published ones.
    """
    found = re.search(r"(\d+)(_cps)?/labeled\.txt$", listed)
    if found is None:
        raise UserError(f"{where}: dataset.train.data_list '{listed}' is none of the published lists")
    count = int(found[1])
    if found[2]:
        return f"cps/{count}"
    return f"classic/{count}" if family == "voc" and count in (92, 183, 366, 732, 1464) else f"u2pl/{count}"


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= leaves(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of values by dotted key."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return tree


if __name__ == "__main__":
    run_main(main)
