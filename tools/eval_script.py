"""The `eval.py` of every project: measure the weights of a run, of a configuration's run, or of a file.

A project describes itself by a `ScriptProject` and hands its command line to `main`. The code is that of training,
so the same weights, list and protocol give the same number to the last digit. Behind torchrun, which takes `--run`
for an option of its own, write `--run-dir`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.config import ProjectConfig, ReadConfig, from_tree, read_config
from common.data.dataset_yaml import load_spec
from common.data.files import write_bytes
from common.data.spec import DatasetSpec
from common.data.split import changed, list_hash, look_at, truth
from common.distributed import Dist, gather_objects
from common.errors import UserError
from common.measure.evaluation import Evaluation, OnImage, Protocol, Refine, When, evaluate_list
from common.measure.inference import Forward
from common.run.checkpoint import find_newest, load, require_own
from common.run.log import setup_console, write_json
from common.run.rng import configure
from splits.pictures import colorize, full_palette, save_picture
from tools.environment import config_hash, environment
from tools.pictures import save_palette_png
from tools.processes import start, stop
from tools.training import summary

T = TypeVar("T")

Flags = Callable[[argparse.Namespace, Any], Sequence[str]]
Saved = Mapping[str, Any]


def best_and_last(run_dir: Path, cfg: object = None) -> dict[str, Path]:
    """Where a run keeps its best and its last weights, by label."""
    del cfg
    return {label: run_dir / f"{label}.pt" for label in ("best", "last")}


def no_further(cfg: object) -> tuple[str, ...]:
    """Of most projects one network is measured."""
    del cfg
    return ()


def no_refine(cfg: object, spec: DatasetSpec, role: str, run_dir: Path | None, dist: Dist) -> None:
    """Of most projects the scores of one network decide alone."""
    del cfg, spec, role, run_dir, dist


@dataclass(frozen=True)
class ScriptProject:
    """What `eval.py` and `predict.py` of a project have to know of it; `cfg` is an instance of `config`.

    Attributes:
        name: of the project, as its checkpoints carry it.
        folder: of the project, below which its runs lie.
        config: dataclass of its configurations.
        read: (path) -> the sections of a configuration file; it may refuse files of other programs.
        example: a configuration, for messages.
        networks: choices of `--network`.
        default_network: (cfg) -> the one that results are reported for.
        predictor: (cfg, contents of a checkpoint, network, device, place of the checkpoint) -> a function from
            normalized images (B, 3, H, W) to scores (B, K, H, W), of a network in evaluation mode. It raises
            `UserError` if the checkpoint lacks the network or holds another architecture; see `network_of`.
        protocol: (cfg, "training" or "script") -> how to measure.
        method: (cfg) -> name of the method or baseline, for reports.
        checkpoints: (run directory, cfg or None for the run's own) -> files `*.pt` to measure by label, the one that
            counts first (for `--check`, `--save` and predict.py). Those that do not exist are left out.
        further_networks: (cfg) -> what is measured after the default network where none is asked for, each with a
            table and a report of its own.
        refine: (cfg, dataset, network, run directory or None, process) -> what changes the scores of the list
            `eval.list` before the best class is taken, see `common.measure.evaluation.evaluate`, or None; once per
            checkpoint.
    """

    name: str
    folder: Path
    config: type[Any]
    example: str
    networks: tuple[str, ...]
    default_network: Callable[[Any], str]
    predictor: Callable[[Any, Saved, str, torch.device, str], Forward]
    protocol: Callable[[Any, When], Protocol]
    method: Callable[[Any], str]
    checkpoints: Callable[[Path, Any], Mapping[str, Path]] = best_and_last
    further_networks: Callable[[Any], tuple[str, ...]] = no_further
    refine: Callable[[Any, DatasetSpec, str, Path | None, Dist], Refine | None] = no_refine
    read: ReadConfig = read_config


@dataclass(frozen=True)
class Target:
    """What to measure.

    Attributes:
        name: of the run or the file, for the report.
        cfg: configuration, overrides included.
        places: of the checkpoints by label: `best`, `last` ... of a run, or `checkpoint`.
        files: what is read for each: the one before, where the newest is damaged.
        run_dir: folder that receives the report; None for a file without a run.
        trained: the split of the first checkpoint's training, and what gives its figures their meaning.
    """

    name: str
    cfg: ProjectConfig
    places: Mapping[str, str]
    files: Mapping[str, Path]
    run_dir: Path | None
    trained: Mapping[str, Any] = field(default_factory=dict)


def no_flags(args: argparse.Namespace, cfg: object) -> list[str]:
    """Overrides of a project without flags of its own."""
    del args, cfg
    return []


def main(
    project: ScriptProject,
    argv: Sequence[str],
    arguments: argparse.ArgumentParser | None = None,
    flags: Flags = no_flags,
) -> int:
    """Measure what the command line names.

    Args:
        project: The project.
        argv: The command line.
        arguments: `parser(project)` with the project's own flags added; None for the plain one.
        flags: (parsed arguments, cfg) -> overrides `section.key=value` that the own flags stand for. Those of the
            command line come after them.

    Returns:
        1 if `--check` finds the figure outside the expected band, else 0.
    """
    args = (arguments or parser(project)).parse_intermixed_args(argv)
    target = find_target(project, args, flags)
    cfg = target.cfg
    if args.check and cfg.expect.miou is None:
        raise UserError("--check: the configuration has no expect.miou; set it, or leave --check out")
    dist = start(cfg.run.device)
    try:
        setup_console(dist)
        configure(cfg.run)
        spec = load_spec(cfg.data.dataset, cfg.data.root)
        if dist.is_main:
            say_data(target, spec)
        first = network_name(project, cfg, args.network)
        others = () if args.network else project.further_networks(cfg)
        results = []
        for role in (first, *others):
            found = {}
            for i, label in enumerate(target.files):
                save = args.save if i == 0 and role == first else None
                found[label] = measure(project, target, label, spec, role, dist, save)
            results.append(found)
            if dist.is_main:
                sys.stdout.write(report_text(target, spec, role, found))
                save_report(project, target, spec, role, found, args.save, dist)
    finally:
        stop()
    return 1 if args.check and not within_expectation(cfg, results[0]) else 0


def parser(
    project: ScriptProject, also: Mapping[str, Sequence[str]] | None = None
) -> argparse.ArgumentParser:
    """The command line; `also` gives flags second names, such as `{"--checkpoint": ["--model_path"]}`."""
    names = also or {}
    result = argparse.ArgumentParser(
        prog="eval.py", description="Measure the weights of a run or of a checkpoint."
    )
    result.add_argument(
        "--run", "--run-dir", *names.get("--run", ()), type=Path,
        help="run directory: its checkpoints (best.pt and last.pt) with their own configuration",
    )  # fmt: skip
    result.add_argument(
        "--config",
        *names.get("--config", ()),
        type=Path,
        help="YAML file; alone it stands for its run directory",
    )
    result.add_argument(
        "--checkpoint",
        *names.get("--checkpoint", ()),
        type=Path,
        help="file to measure instead of a run's own",
    )
    result.add_argument(
        "--network",
        choices=project.networks,
        help="default: the one that results are reported for",
    )
    result.add_argument(
        "--save", *names.get("--save", ()), type=Path, metavar="DIR",
        help="write predictions: class ids to DIR/gray, colours to DIR/color (of the first checkpoint of a run)",
    )  # fmt: skip
    result.add_argument(
        "--check", action="store_true", help="exit with 1 if mIoU is outside expect.miou +- expect.tolerance"
    )
    result.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration"
    )
    return result


def find_target(project: ScriptProject, args: argparse.Namespace, flags: Flags = no_flags) -> Target:
    """Resolve `--run`, `--config` and `--checkpoint`, and check that every checkpoint can be read.

    The contents are read again when their turn comes: a run may have more of them than fit into memory.

    Raises:
        UserError: nothing named, or a file missing or unreadable.
    """
    if args.run is not None and args.config is not None:
        raise UserError(
            f"--run {args.run} --config {args.config}: name one of them; a run has its own config"
        )
    if args.run is None and args.config is None:
        if args.checkpoint is None:
            raise UserError(
                f"eval.py: nothing to measure; give --run RUN_DIR, --config {project.example} or --checkpoint FILE"
            )
        saved, where = read_checkpoint(project, args.checkpoint), str(args.checkpoint)
        cfg = config_with_flags(project.config, saved["config"], args, flags, where)
        return one_file(args.checkpoint, cfg, None, saved)
    if args.run is not None and not (args.run / "config.yaml").is_file():
        raise UserError(
            f"--run {args.run}: no config.yaml there; give the folder of a run, such as runs/smoke/seed2"
        )
    source = args.config or args.run / "config.yaml"
    cfg = config_with_flags(project.config, project.read(source), args, flags, str(source))
    if args.run is not None and not any(override.startswith("data.root=") for override in args.overrides):
        cfg = without_lost_root(cfg)
    if args.checkpoint is not None:
        return one_file(args.checkpoint, cfg, args.run, read_checkpoint(project, args.checkpoint))
    run_dir = args.run or run_of(project, cfg, source)
    places = project.checkpoints(run_dir, cfg)
    files, trained = {}, dict[str, Any]()
    for label, place in places.items():
        newest = find_newest(place.parent, place.stem)
        if newest is not None:
            require_own(newest[0], project.name, str(place))
            files[label], trained = newest[1], trained or training_of(newest[0])
    if not files:
        raise UserError(f"{run_dir}: holds {none_of(places)}; train first, or give --checkpoint FILE")
    return Target(str(run_dir), cfg, {label: str(places[label]) for label in files}, files, run_dir, trained)


def one_file(path: Path, cfg: ProjectConfig, run_dir: Path | None, saved: Saved) -> Target:
    """A target of one file, with the run it belongs to, if any."""
    places = {"checkpoint": str(path)}
    return Target(str(path), cfg, places, {"checkpoint": path}, run_dir, training_of(saved))


def training_of(saved: Saved) -> dict[str, Any]:
    """What a checkpoint says of the data it was trained on."""
    return {"split": saved["config"]["data"]["split"], "truth": saved.get("truth", {})}


def without_lost_root(cfg: Any) -> Any:
    """The configuration of a run, whose data folder is looked for anew where it is no longer at its place."""
    if cfg.data.root is None or Path(cfg.data.root).is_dir():
        return cfg
    return replace(cfg, data=replace(cfg.data, root=None))


def say_data(target: Target, spec: DatasetSpec) -> None:
    """Say which files are read, and where they are not those of the training."""
    sys.stderr.write(f"data: {spec.root or 'generated'}\n")
    known = target.trained.get("truth", {})
    now: dict[str, Any] = {"files": look_at(spec, known.get("files", {}))}
    images = target.cfg.eval.list
    result = target.run_dir and target.run_dir / "result.json"
    if result and result.is_file():
        with contextlib.suppress(ValueError):
            before = json.loads(result.read_bytes())
            if before.get("list") == images and "truth" in before:
                known = known | before["truth"]
                now["list"] = list_hash(spec, spec.read_list(images))
    for words in changed(known, now):
        sys.stderr.write(f"note: {words} changed since the training\n")
    if not known:
        sys.stderr.write(
            "note: the weights are older than the record of lists, label map and files: not compared\n"
        )


def none_of(places: Mapping[str, Path]) -> str:
    """What a run directory holds that has none of these files."""
    return f"neither {' nor '.join(place.name for place in places.values())}" if places else "no checkpoint"


def run_of(project: ScriptProject, cfg: ProjectConfig, config: Path) -> Path:
    """Run directory of a configuration file, from the working directory or below the project.

    Raises:
        UserError: there is none.
    """
    own = Path("runs") / config.stem / f"seed{cfg.run.seed}"
    places = [Path(cfg.run.dir)] if cfg.run.dir else [own, project.folder / own]
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        f"{config}: no run of it in {' or '.join(map(str, places))}; train it first, or give --checkpoint FILE"
    )


def read_checkpoint(project: ScriptProject, path: Path) -> dict[str, Any]:
    """Contents of a checkpoint of the project, also a converted one.

    Raises:
        UserError: missing, damaged, or another project's or the authors' file.
    """
    try:
        saved = load(path)
    except UserError as error:
        if "other than tensors" in str(error):  # the authors' files hold a NumPy number
            require_own({}, project.name, str(path))
        raise
    require_own(saved, project.name, str(path))
    return saved


def config_of(config: type[T], saved: Saved, overrides: Sequence[str], where: str) -> T:
    """The configuration that a checkpoint carries, changed by `section.key=value` overrides.

    Raises:
        UserError: an override is none, or names an unknown key or an impossible value.
    """
    return from_tree(config, saved["config"], overrides, where)


def config_with_flags(
    config: type[T], tree: Mapping[str, Any], args: argparse.Namespace, flags: Flags, where: str
) -> T:
    """The configuration of `tree` with the overrides of a project's own flags and then those of the command line.

    The flags are asked for theirs once the others are known.
    """
    cfg = from_tree(config, tree, args.overrides, where)
    own = flags(args, cfg)
    return from_tree(config, tree, [*own, *args.overrides], where) if own else cfg


def network_name(project: ScriptProject, cfg: object, asked: str | None) -> str:
    """The network to use: the one asked for, else the project's own choice."""
    return asked or project.default_network(cfg)


def network_of(saved: Saved, role: str, where: str) -> Mapping[str, Tensor]:
    """State dict of one network of a checkpoint.

    Raises:
        UserError: the checkpoint has no such network.
    """
    networks: Mapping[str, Mapping[str, Tensor]] = saved["networks"]
    if role not in networks:
        raise UserError(f"{where}: holds no {role}; use --network {' or '.join(networks)}")
    return networks[role]


def require_classes(spec: DatasetSpec, saved: Saved, where: str) -> None:
    """Refuse weights that were trained on other classes than those of the dataset; `UserError`."""
    if list(spec.classes) != list(saved["classes"]):
        given = len(saved["classes"])
        names = f"{given} classes" if given != spec.num_classes else "other class names"
        raise UserError(
            f"{where}: was trained on {names} ({', '.join(saved['classes'][:4])}, ...), not on the "
            f"{spec.num_classes} of dataset '{spec.name}'; set data.dataset to the one it was trained on"
        )
    known = saved.get("truth", {})
    other = changed(known, truth(spec)) if known.get("dataset") == spec.name else []
    if other:
        raise UserError(
            f"{where}: {' and '.join(other)} changed since it was trained; put back what it was in {spec.source}, or "
            "train anew"
        )


def measure(
    project: ScriptProject,
    target: Target,
    label: str,
    spec: DatasetSpec,
    role: str,
    dist: Dist,
    save: Path | None,
) -> Evaluation:
    """Figures of one checkpoint of the target on the list `eval.list`; a collective.

    Args:
        project: The project.
        target: What to measure.
        label: Its checkpoint.
        spec: The dataset.
        role: Network of the checkpoint.
        dist: This process.
        save: Folder for pictures of the predictions, or None.

    Raises:
        UserError: the weights do not fit the configuration or the dataset.
    """
    cfg, where = target.cfg, target.places[label]
    how = project.protocol(cfg, "script")
    saved = load(target.files[label])
    require_classes(spec, saved, where)
    forward = project.predictor(cfg, saved, role, dist.device, where)
    legend = Legend(spec.classes, spec.palette)
    on_image = None if save is None else picture_writer(save, spec, legend)
    refine = project.refine(cfg, spec, role, target.run_dir, dist)
    found = evaluate_list(
        forward, cfg.data, spec, cfg.eval.list, how, dist,
        precision=cfg.run.precision, on_image=on_image, refine=refine,
    )  # fmt: skip
    if save is not None:
        legend.write(save, dist)
    return found


class Legend:
    """How often each class was predicted; written beside the predictions as `classes.csv`.

    Args:
        classes: Names in the order of their numbers.
        palette: Colours (P, 3) of the predictions.
    """

    def __init__(self, classes: Sequence[str], palette: NDArray[np.uint8]) -> None:
        self.classes, self.palette = classes, full_palette(palette)
        self.pixels = np.zeros(256, np.int64)

    def add(self, pred: NDArray[np.uint8]) -> None:
        """Count the pixels of class ids (H, W)."""
        self.pixels += np.bincount(pred.ravel(), minlength=256)

    def write(self, folder: Path, dist: Dist) -> None:
        """Number, name, colour and share of the pixels (0 to 1) of every class; a collective.

        Raises:
            UserError: the folder cannot be written.
        """
        pixels = np.sum(gather_objects(self.pixels, dist), axis=0)
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("number", "name", "colour", "share"))
        for k, name in enumerate(self.classes):
            colour = "#{:02x}{:02x}{:02x}".format(*self.palette[k])
            rows.writerow((k, name, colour, f"{pixels[k] / max(1, pixels.sum()):.6f}"))
        if dist.is_main:
            write_bytes(folder / "classes.csv", text.getvalue().encode())


def picture_writer(folder: Path, spec: DatasetSpec, legend: Legend) -> OnImage:
    """A function that writes a prediction as a palette PNG below `gray` and as colours below `color`."""

    def write(name: str, scores: Tensor, pred: Tensor) -> None:
        del scores
        ids = pred.to(torch.uint8).cpu()
        legend.add(ids.numpy())
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
    project: ScriptProject,
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
        "project": project.name,
        "method": project.method(cfg),
        "network": role,
        "list": cfg.eval.list,
        "protocol": asdict(first.protocol),
        "split": target.trained["split"],
        "truth": {key: value for key, value in target.trained["truth"].items() if key != "files"},
        "config_hash": config_hash(cfg),
        "seed": cfg.run.seed,
        "commit": environment(dist)["commit"],
        "checkpoints": {label: target.places[label] for label in found},
        **{f"miou_{label}": e.miou for label, e in found.items()},
        **{label: summary(e, spec.classes) for label, e in found.items()},
    }
    other = "" if role == project.default_network(cfg) else f"_{role}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"eval_{first.protocol.kind}_{Path(cfg.eval.list).stem}{other}.json"
    write_json(path, content)
    sys.stderr.write(f"report: {path}\n")


def within_expectation(cfg: ProjectConfig, found: Mapping[str, Evaluation]) -> bool:
    """Whether the first mIoU (that of best.pt for most runs) lies within the published figure and its tolerance."""
    expected = cfg.expect.miou
    first = next(iter(found.values()))
    return expected is not None and abs(100 * first.miou - expected) <= cfg.expect.tolerance
