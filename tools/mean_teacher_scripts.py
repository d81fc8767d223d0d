"""What code that descends from U2PL's shares: the end of `train.py`, `eval.py`, `convert.py`, its checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.data.spec import DatasetSpec
from common.errors import UserError
from common.mean_teacher.evaluation import evaluate_network, load_best, protocol, reported_network
from common.mean_teacher.networks import Network
from common.mean_teacher.run import MeanTeacherRun
from common.measure.inference import Forward
from common.models.deeplab import SegmentationNetwork
from common.models.pretrained import LoadReport, load_state, read_weights
from common.run.checkpoint import load_weights
from common.run.session import Session
from tools import eval_script, training
from tools.eval_script import Saved, ScriptProject
from tools.infer_script import LoadNetwork

# where the originals keep their networks, the wanted one first
ENTRIES = {"student": ("model_state", "teacher_state"), "teacher": ("teacher_state", "model_state")}
OUTPUT_LAYER = "decoder.classifier.8.weight"

BuildStudent = Callable[[Any, int], SegmentationNetwork]
State = Mapping[str, Tensor]
RequireFit = Callable[[State, str, Any, DatasetSpec, str], None]


# --- train.py --------------------------------------------------------------------------------------------------


def finish(run: MeanTeacherRun, session: Session, method: str) -> None:
    """Measure the last and the best weights with the configured protocol and write `result.json`."""
    cfg, name = run.cfg, reported_network(run.cfg)
    network, how = getattr(run.nets, name), protocol(run.cfg, "script")
    last = best = evaluate_network(cfg, network, run.data.spec, cfg.eval.list, how, run.dist)
    if load_best(network, name, session):
        best = evaluate_network(cfg, network, run.data.spec, cfg.eval.list, how, run.dist)
    training.report(session, method=method, network=name, best=best, last=last)


# --- eval.py ---------------------------------------------------------------------------------------------------


def network_loader(
    build_student: Callable[[Any, int], Network],
) -> Callable[[Any, Saved, str, torch.device, str], Network]:
    """A function that gives one network of a checkpoint; `build_student` (cfg, class count) makes an empty one."""

    def load_network(cfg: Any, saved: Saved, role: str, device: torch.device, where: str) -> Network:
        """One network of a checkpoint in evaluation mode on `device`.

        Raises:
            UserError: the checkpoint has no such network, or it is of another architecture.
        """
        weights = eval_script.network_of(saved, role, where)
        network = build_student(cfg, len(saved["classes"]))
        load_weights(network, weights, where)
        layout = torch.channels_last if cfg.run.channels_last else torch.contiguous_format
        return network.to(device, memory_format=layout).eval()  # type: ignore[call-overload]

    return load_network


def script_project(
    name: str, script: str, config: type, load_network: LoadNetwork, method: Callable[[Any], str]
) -> ScriptProject:
    """What `eval.py` and `predict.py` of a paper with student and teacher know of it, see `ScriptProject`.

    `script` is a file of the paper's folder.
    """

    def predictor(cfg: Any, saved: Saved, role: str, device: torch.device, where: str) -> Forward:
        return load_network(cfg, saved, role, device, where).predict

    return ScriptProject(
        name=name,
        folder=Path(script).resolve().parent,
        config=config,
        example="configs/voc_classic_366_r101.yaml",
        networks=("teacher", "student"),
        default_network=reported_network,
        predictor=predictor,
        protocol=protocol,
        method=method,
    )


def evaluate(project: ScriptProject, argv: Sequence[str]) -> int:
    """Measure what the command line names; 1 if `--check` finds the figure outside the expected band."""
    return eval_script.main(project, argv, parser(project), original_flags)


def parser(project: ScriptProject) -> argparse.ArgumentParser:
    """The command line, with the flags of the original's `eval.py` as second names."""
    result = eval_script.parser(project, {"--checkpoint": ("--model_path",), "--save": ("--save_folder",)})
    result.add_argument("--base_size", type=int, help="long side at scale 1 (as eval.base_size)")
    result.add_argument(
        "--scales", type=float, nargs="+", help="scales whose scores are summed (as eval.scales)"
    )
    result.add_argument("--names_path", help="accepted and not used, as in the original")
    result.add_argument("--crop", action="store_true", help="accepted and not used, as in the original")
    return result


def original_flags(
    args: argparse.Namespace, cfg: Any, no_base_size: Sequence[str] = ("center_crop",)
) -> list[str]:
    """Overrides for the original's `--base_size` and `--scales`.

    Where training measures centre crops (Pascal, COCO), the original's script takes whole images at these scales
    and has no base size.

    Args:
        args: of `parser`.
        cfg: the configuration.
        no_base_size: protocols of the configuration that go without one.
    """
    overrides = []
    if args.scales is not None:
        overrides.append(f"eval.scales={args.scales}")
        if cfg.eval.protocol == "center_crop":
            overrides.append("eval.protocol=whole_image")
    if args.base_size is not None and cfg.eval.protocol not in no_base_size:
        overrides.append(f"eval.base_size={args.base_size}")
    return overrides


# --- convert.py ------------------------------------------------------------------------------------------------


def convert_networks(
    source: Path,
    cfg: Any,
    spec: DatasetSpec,
    config: str,
    build_student: BuildStudent,
    require_fit: RequireFit,
    read: Callable[[Path, Sequence[str]], tuple[State, str]] = read_weights,
    optional: Sequence[str] = (),
) -> tuple[dict[str, State], dict[str, LoadReport]]:
    """State dicts of the networks in the authors' file with our keys, and what became of every key.

    A file without a teacher (supervised-only training, bare weights) gives a student; a configuration with a
    teacher then gets it as both.

    Args:
        source: the file; read as data, without executing code.
        cfg: describes the network.
        spec: the dataset, for the class count.
        config: name of the configuration, for messages.
        build_student: (cfg, class count) -> an empty network.
        require_fit: (weights, where they are from, cfg, spec, config) refuses those of another network.
        read: (file, where a network may be in it) -> its weights, and where they are from.
        optional: tensors that the file may lack; they keep their values.

    Raises:
        UserError: unreadable or unsafe file, another class count, or any tensor missing or of another shape.
    """
    networks: dict[str, State] = {}
    reports: dict[str, LoadReport] = {}
    for role in ("student", "teacher") if cfg.method.mode == "semi" else ("student",):
        state, place = read(source, ENTRIES[role])
        require_fit(state, place, cfg, spec, config)
        network = build_student(cfg, spec.num_classes)
        reports[role] = load_state(network, state, source=place, allow_missing=optional)
        networks[role] = network.state_dict()
    return networks, reports


def require_classes(state: State, place: str, spec: DatasetSpec, config: str) -> None:
    """Refuse weights that score another number of classes.

    Raises:
        UserError: they do. A file without this output layer passes: `load_state` says what it is.
    """
    if OUTPUT_LAYER in state and len(state[OUTPUT_LAYER]) != spec.num_classes:
        raise UserError(
            f"{place}: scores {len(state[OUTPUT_LAYER])} classes, dataset '{spec.name}' of {config} has "
            f"{spec.num_classes}; give a configuration of the dataset it was trained on"
        )


class Head(NamedTuple):
    """A part that not all networks have: how its tensors begin, its name, and the key that decides on it."""

    prefix: str
    name: str
    key: str
    on: str
    off: str


REPRESENTATION = Head("decoder.representation.", "representation", "method.mode", "semi", "sup_only")
AUXILIARY = Head("auxor.", "auxiliary", "model.aux_weight", "0.4", "0")


def require_head(state: State, place: str, head: Head, wanted: bool, config: str) -> None:
    """Refuse weights with a head that the configuration has not, or without one that it has.

    Raises:
        UserError: names the setting that would fit.
    """
    held = any(tensor.startswith(head.prefix) for tensor in state)
    if OUTPUT_LAYER not in state or held == wanted:
        return
    if held:
        raise UserError(f"{place}: has the {head.name} head, {config} has not; set {head.key}={head.on}")
    raise UserError(f"{place}: lacks the {head.name} head that {config} has; set {head.key}={head.off}")
