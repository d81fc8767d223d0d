"""Measure trained weights: mIoU by the configured protocol, per class, with pictures of the predictions if asked.

    python eval.py --run runs/voc_classic_366_r101/seed2              best.pt and last.pt of a run
    python eval.py --config configs/voc_classic_366_r101.yaml         the same: the run of that configuration
    python eval.py --config configs/... --checkpoint FILE             one file, also one that convert.py made

The code is that of training, so the same weights, list and protocol give the same number to the last digit. Behind
torchrun, which takes `--run` for an option of its own, write `--run-dir`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: the repository must be importable, and not this folder's modules
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import yaml
from torch import Tensor

from common.backend import configure
from common.checkpoint import load, load_newest, load_weights
from common.config import build, config_hash, load_config
from common.data.datasets import DatasetSpec, load_spec
from common.distributed import Dist, start, stop
from common.errors import UserError, run_main
from common.evaluation import Evaluation, OnImage, Protocol
from common.models.deeplab import SegmentationNetwork
from common.runlog import environment, setup_console, write_json
from common.visualize import colorize, save_palette_png, save_picture
from projects.u2pl.config import Config
from projects.u2pl.evaluate import evaluate_network, protocol
from projects.u2pl.model import build_student
from projects.u2pl.reporting import summary

HERE = Path(__file__).resolve().parent
EXAMPLE = "configs/voc_classic_366_r101.yaml"


@dataclass(frozen=True)
class Target:
    """What to measure.

    Attributes:
        name: of the run or the file, for the report.
        cfg: configuration, overrides included.
        checkpoints: contents of the checkpoints by role: `best` and `last` of a run, or `checkpoint`.
        places: where they were read.
        run_dir: folder that receives the report; None for a file without a run.
    """

    name: str
    cfg: Config
    checkpoints: Mapping[str, Mapping[str, Any]]
    places: Mapping[str, str]
    run_dir: Path | None


def main(argv: Sequence[str]) -> int:
    """Measure what the command line names; 1 if `--check` finds the figure outside the expected band."""
    args = parser().parse_intermixed_args(argv)
    target = find_target(args)
    cfg = target.cfg
    if args.check and cfg.expect.miou is None:
        raise UserError("--check: the configuration has no expect.miou; set it, or leave --check out")
    dist = start(cfg.run.device)
    try:
        setup_console(dist)
        configure(cfg.run)
        spec = load_spec(cfg.data.dataset, cfg.data.root)
        how = protocol(cfg, "script")
        role = network_name(cfg, args.network)
        found = {
            label: measure(
                cfg, spec, how, role, saved, target.places[label], dist, args.save if i == 0 else None
            )
            for i, (label, saved) in enumerate(target.checkpoints.items())
        }
        if dist.is_main:
            sys.stdout.write(report_text(target, spec, role, found))
            save_report(target, spec, role, found, args.save, dist)
    finally:
        stop()
    return 1 if args.check and not within_expectation(cfg, found) else 0


def parser() -> argparse.ArgumentParser:
    """The command line, with the flags of the original's `eval.py` as second names."""
    result = argparse.ArgumentParser(
        prog="eval.py", description="Measure the weights of a run or of a checkpoint."
    )
    result.add_argument(
        "--run",
        "--run-dir",
        type=Path,
        help="run directory: best.pt and last.pt with their own configuration",
    )
    result.add_argument("--config", type=Path, help="YAML file; alone it stands for its run directory")
    result.add_argument(
        "--checkpoint", "--model_path", type=Path, help="file to measure instead of a run's own"
    )
    result.add_argument(
        "--network",
        choices=("teacher", "student"),
        help="default: teacher, student where there is no teacher",
    )
    result.add_argument(
        "--save", "--save_folder", type=Path, metavar="DIR",
        help="write predictions: class ids to DIR/gray, colours to DIR/color (of best.pt for a run)",
    )  # fmt: skip
    result.add_argument(
        "--check", action="store_true", help="exit with 1 if mIoU is outside expect.miou +- expect.tolerance"
    )
    result.add_argument("--base_size", type=int, help="long side at scale 1 (as eval.base_size)")
    result.add_argument(
        "--scales", type=float, nargs="+", help="scales whose scores are summed (as eval.scales)"
    )
    result.add_argument("--names_path", help="accepted and not used, as in the original")
    result.add_argument("--crop", action="store_true", help="accepted and not used, as in the original")
    result.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration"
    )
    return result


def find_target(args: argparse.Namespace) -> Target:
    """Resolve `--run`, `--config` and `--checkpoint` and read the checkpoints.

    Raises:
        UserError: nothing named, or a file missing or unreadable.
    """
    if args.run is not None and args.config is not None:
        raise UserError(
            f"--run {args.run} --config {args.config}: name one of them; a run has its own config"
        )
    if args.run is None and args.config is None and args.checkpoint is None:
        raise UserError(
            f"eval.py: nothing to measure; give --run RUN_DIR, --config {EXAMPLE} or --checkpoint FILE"
        )
    if args.run is None and args.config is None:
        saved = read_checkpoint(args.checkpoint)
        cfg = config_of(saved, args.overrides, str(args.checkpoint))
        cfg = config_of(saved, [*original_flags(args, cfg), *args.overrides], str(args.checkpoint))
        return Target(
            str(args.checkpoint), cfg, {"checkpoint": saved}, {"checkpoint": str(args.checkpoint)}, None
        )
    if args.run is not None and not (args.run / "config.yaml").is_file():
        raise UserError(
            f"--run {args.run}: no config.yaml there; give the folder of a run, such as runs/smoke/seed2"
        )
    source = args.config or args.run / "config.yaml"
    cfg = load_config(Config, source, args.overrides)
    cfg = load_config(Config, source, [*original_flags(args, cfg), *args.overrides])
    run_dir = args.run
    if args.checkpoint is not None:
        saved = read_checkpoint(args.checkpoint)
        return Target(
            str(args.checkpoint), cfg, {"checkpoint": saved}, {"checkpoint": str(args.checkpoint)}, run_dir
        )
    if run_dir is None:
        run_dir = run_of(cfg, source)
    checkpoints: dict[str, Mapping[str, Any]] = {}
    for label in ("best", "last"):
        newest = load_newest(run_dir, label)
        if newest is not None:
            checkpoints[label] = require_own(newest, run_dir / f"{label}.pt")
    if not checkpoints:
        raise UserError(
            f"{run_dir}: holds neither best.pt nor last.pt; train first, or give --checkpoint FILE"
        )
    places = {label: str(run_dir / f"{label}.pt") for label in checkpoints}
    return Target(str(run_dir), cfg, checkpoints, places, run_dir)


def original_flags(args: argparse.Namespace, cfg: Config) -> list[str]:
    """Overrides for the original's `--base_size` and `--scales`.

    Where training measures centre crops (Pascal), the original's script takes whole images at these scales and
    has no base size.
    """
    overrides = []
    if args.scales is not None:
        overrides.append(f"eval.scales={args.scales}")
        if cfg.eval.protocol == "center_crop":
            overrides.append("eval.protocol=whole_image")
    if args.base_size is not None and cfg.eval.protocol != "center_crop":
        overrides.append(f"eval.base_size={args.base_size}")
    return overrides


def run_of(cfg: Config, config: Path) -> Path:
    """Run directory of a configuration file, from the working directory or below this project.

    Raises:
        UserError: there is none.
    """
    own = Path("runs") / config.stem / f"seed{cfg.run.seed}"
    places = [Path(cfg.run.dir)] if cfg.run.dir else [own, HERE / own]
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        f"{config}: no run of it in {' or '.join(map(str, places))}; train it first, or give --checkpoint FILE"
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Contents of a checkpoint of this project, also a converted one.

    Raises:
        UserError: missing, damaged, or another project's or the authors' file.
    """
    try:
        saved = load(path)
    except UserError as error:
        if "other than tensors" in str(error):  # the authors' files hold a NumPy number
            require_own({}, path)
        raise
    return require_own(saved, path)


def require_own(saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """The contents of a checkpoint, if this project has made it; `UserError` otherwise."""
    if saved.get("project") != "u2pl":
        raise UserError(
            f"{path}: made by {saved.get('project', 'unknown')}, not by this project; convert a file of the authors "
            f"first: python convert.py {path} --config CONFIG --out FILE"
        )
    return saved


def config_of(saved: Mapping[str, Any], overrides: Sequence[str], where: str) -> Config:
    """The configuration that a checkpoint carries, changed by `section.key=value` overrides.

    Raises:
        UserError: an override is none, or names an unknown key or an impossible value.
    """
    tree = {section: dict(values) for section, values in saved["config"].items()}
    for override in overrides:
        key, separator, text = override.partition("=")
        section, dot, name = key.partition(".")
        if not separator or not dot or section not in tree:
            raise UserError(
                f"'{override}': not an override; write section.key=value with a section of {', '.join(tree)}"
            )
        try:
            tree[section][name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(
                f"'{override}': the value is not valid YAML; quote it or use [a, b] for lists"
            ) from None
    try:
        return build(Config, tree)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def network_name(cfg: Config, asked: str | None) -> str:
    """The network to use: the one asked for, else the teacher, else the student of a supervised-only run."""
    return asked or ("teacher" if cfg.method.mode == "semi" else "student")


def load_network(
    cfg: Config, saved: Mapping[str, Any], role: str, device: torch.device, where: str
) -> SegmentationNetwork:
    """One network of a checkpoint in evaluation mode on `device`.

    Raises:
        UserError: the checkpoint has no such network, or it is of another architecture.
    """
    networks = saved["networks"]
    if role not in networks:
        raise UserError(f"{where}: holds no {role}; use --network {' or '.join(networks)}")
    network = build_student(cfg, len(saved["classes"]))
    load_weights(network, networks[role], where)
    layout = torch.channels_last if cfg.run.channels_last else torch.contiguous_format
    return network.to(device, memory_format=layout).eval()  # type: ignore[call-overload]


def require_classes(spec: DatasetSpec, saved: Mapping[str, Any], where: str) -> None:
    """Refuse weights that were trained on other classes than those of the dataset; `UserError`."""
    if list(spec.classes) != list(saved["classes"]):
        given = len(saved["classes"])
        names = f"{given} classes" if given != spec.num_classes else "other class names"
        raise UserError(
            f"{where}: was trained on {names} ({', '.join(saved['classes'][:4])}, ...), not on the "
            f"{spec.num_classes} of dataset '{spec.name}'; set data.dataset to the one it was trained on"
        )


def measure(
    cfg: Config,
    spec: DatasetSpec,
    how: Protocol,
    role: str,
    saved: Mapping[str, Any],
    where: str,
    dist: Dist,
    save: Path | None,
) -> Evaluation:
    """Figures of one checkpoint on the list `eval.list`; a collective.

    Args:
        cfg: Configuration.
        spec: The dataset.
        how: Protocol.
        role: Network of the checkpoint.
        saved: Its contents.
        where: Its place, for messages.
        dist: This process.
        save: Folder for pictures of the predictions, or None.

    Raises:
        UserError: the weights do not fit the configuration or the dataset.
    """
    require_classes(spec, saved, where)
    network = load_network(cfg, saved, role, dist.device, where)
    on_image = None if save is None else picture_writer(save, spec)
    return evaluate_network(cfg, network, spec, cfg.eval.list, how, dist, on_image)


def picture_writer(folder: Path, spec: DatasetSpec) -> OnImage:
    """A function that writes a prediction as a palette PNG below `gray` and as colours below `color`."""

    def write(name: str, scores: Tensor, pred: Tensor) -> None:
        del scores
        ids = pred.to(torch.uint8)
        save_palette_png(folder / "gray" / f"{name}.png", ids, spec.palette)
        save_picture(folder / "color" / f"{name}.png", colorize(ids, spec.palette))

    return write


def report_text(target: Target, spec: DatasetSpec, role: str, found: Mapping[str, Evaluation]) -> str:
    """What is printed: a table per class, the summary, and last one tab-separated line for a spreadsheet.

    Its columns: name, network, protocol, list, images, then mIoU, mIoU of the present classes and pixel accuracy in
    percent for each checkpoint.
    """
    first = next(iter(found.values()))
    expect, listed = target.cfg.expect, target.cfg.eval.list
    width = max(map(len, (*spec.classes, "mIoU, classes present")))
    rows = [("IoU in percent", *found)]
    rows += [
        (name, *(f"{100 * e.iou[k]:.2f}" for e in found.values())) for k, name in enumerate(spec.classes)
    ]
    rows.append(("mIoU", *(f"{100 * e.miou:.2f}" for e in found.values())))
    rows.append(("mIoU, classes present", *(f"{100 * e.miou_present:.2f}" for e in found.values())))
    rows.append(("pixel accuracy", *(f"{100 * e.pixel_accuracy:.2f}" for e in found.values())))
    lines = [
        f"{target.name}: {role}, {first.protocol.kind}, list '{listed}' of {spec.name}, {first.num_images} images"
    ]
    lines += [name.ljust(width) + "".join(cell.rjust(12) for cell in cells) for name, *cells in rows]
    broken = sum(e.num_nonfinite for e in found.values())
    if broken:
        lines.append(f"warning: {broken} images with scores that are not finite; the figures mean nothing")
    if expect.miou is not None:
        lines.append(f"published: {expect.miou:.2f} ({expect.source})")
    figures = [f"{100 * v:.2f}" for e in found.values() for v in (e.miou, e.miou_present, e.pixel_accuracy)]
    lines.append("\t".join([target.name, role, first.protocol.kind, listed, str(first.num_images), *figures]))
    return "\n".join(lines) + "\n"


def save_report(
    target: Target,
    spec: DatasetSpec,
    role: str,
    found: Mapping[str, Evaluation],
    save: Path | None,
    dist: Dist,
) -> None:
    """Write `eval_<protocol>_<list>.json` into the run directory, or beside the pictures of a single file.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = target.run_dir or save
    if folder is None:
        return
    cfg = target.cfg
    first = next(iter(found.values()))
    content = {
        "project": "u2pl",
        "method": "u2pl" if cfg.method.mode == "semi" else "sup_only",
        "network": role,
        "list": cfg.eval.list,
        "protocol": first.as_dict()["protocol"],
        "split": cfg.data.split,
        "config_hash": config_hash(cfg),
        "seed": cfg.run.seed,
        "commit": environment(dist)["commit"],
        "checkpoints": {label: target.places[label] for label in found},
        **{f"miou_{label}": e.miou for label, e in found.items()},
        **{label: summary(e, spec.classes) for label, e in found.items()},
    }
    other = "" if role == network_name(cfg, None) else f"_{role}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"eval_{first.protocol.kind}_{Path(cfg.eval.list).stem}{other}.json"
    write_json(path, content)
    sys.stderr.write(f"report: {path}\n")


def within_expectation(cfg: Config, found: Mapping[str, Evaluation]) -> bool:
    """Whether the first mIoU (that of best.pt for a run) lies within the published figure and its tolerance."""
    expected = cfg.expect.miou
    first = next(iter(found.values()))
    return expected is not None and abs(100 * first.miou - expected) <= cfg.expect.tolerance


if __name__ == "__main__":
    run_main(main)
