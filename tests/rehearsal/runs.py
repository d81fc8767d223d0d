"""One log interval of a project's own `train_epoch` on a GPU that is not there: small networks, published settings.

Only the photos are made up: lists, samplers, transforms, prefetching, networks, losses, guard, log and optimizers are
those of a training.
"""

from __future__ import annotations

import contextlib
import importlib
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import yaml
from torch import Tensor

from common.config import load_config
from common.data.loaders import Batch, Loader
from common.data.spec import DatasetSpec
from common.distributed import Dist
from common.measure.metrics import ConfusionMatrix
from common.run.session import Session
from common.run.signals import StopRequest
from tests.rehearsal.gpu import GPU, Watch, rehearsal

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2  # of an interval, and of an epoch
VAL = 5  # photos of the evaluation list: one more than are scored at once
PHOTO = (64, 80)
FORWARD = 4  # labeled images of a forward
ACCUMULATE = 2

RESNET = ("model.backbone=resnet_tiny", "model.width=8", "model.inner_planes=16", "model.dilations=[1,2,3]")
FAMILY = ("data.crop_size=[33,33]", *RESNET)


class Case(NamedTuple):
    """A published configuration with changes, and what of its training is rehearsed.

    Attributes:
        project: folder.
        config: name of the file.
        changes: overrides besides those that make it small.
        phase: which steps, where a method has several kinds.
        classes: of the made-up photos.
    """

    project: str
    config: str
    changes: tuple[str, ...] = ()
    phase: str = ""
    classes: int = 5

    def __str__(self) -> str:
        return " ".join((self.project, self.config, *self.changes, self.phase)).strip()


SMALL = {  # networks, crops and queues
    "u2pl": (*FAMILY, "method.queue_size=60", "method.queue_size_first=80"),
    "brpg": (*FAMILY, "method.queue_size=60"),
    "cps": (
        *FAMILY, "data.crop_size=[64,64]", "data.epoch_images=null", "model.low_planes=8",
        "method.gct.detector_planes=4",
    ),
    "proto_consistency": (*FAMILY, "method.proto.source=random"),
    "unimatch": (*FAMILY, "model.low_planes=8"),
    "s4gan_mlmt": (
        "data.crop_size=[32,32]", "data.labeled_ratio=null", "data.split_file=null", "model.width=4", "model.d_width=4",
        "optim.epochs=2", "optim.epochs=2", "method.st_start=0", "eval.after_steps=null",
        "mlmt.size=40", "mlmt.backbone=resnet_tiny", "mlmt.weights=none",
    ),
}  # fmt: skip
DEEPLABV2, WRN38 = "model.layers=[1,1,1,1]", "model.layers=[1,1,1,1,1,1]"
XCEPTION = ("model.backbone=xception65",)  # as the configuration says: instead of the small ResNet
VIT = ("model.backbone=dinov2_tiny", "data.crop_size=[28,28]")
AEL = "method.ael.start_epoch=0"

MATRIX = [
    Case("u2pl", "voc_classic_366_r101"),
    Case("u2pl", "voc_classic_366_r101", ("method.strong_augmentation=cutout",)),
    Case("u2pl", "voc_classic_366_r101", ("method.strong_augmentation=classmix",)),
    Case("u2pl", "voc_classic_366_r101", ("run.on_nonfinite=skip",)),
    Case("u2pl", "cityscapes_744_r101"),
    Case("u2pl", "cityscapes_744_r101", ("method.class_weights=true",), classes=19),
    Case("u2pl", "cityscapes_744_r101_ael"),
    Case("u2pl", "voc_classic_366_r101_sup"),
    Case("brpg", "voc_classic_366_r101", phase="collect"),
    Case("brpg", "voc_classic_366_r101", phase="prototypes"),
    Case("brpg", "cityscapes_744_r101", phase="collect"),
    Case("brpg", "cityscapes_744_r101", phase="prototypes"),
    Case("brpg", "coco_1_32_x65", XCEPTION, phase="collect", classes=21),
    Case("brpg", "coco_1_32_x65", XCEPTION, phase="prototypes", classes=21),
    Case("cps", "voc_662_r50_cps"),
    Case("cps", "cityscapes_744_r50_cps", ("run.precision=fp16",)),
    Case("cps", "voc_662_r50_cps_cutmix"),
    Case("cps", "voc_662_r50_mean_teacher"),
    Case("cps", "voc_662_r50_cct"),
    Case("cps", "voc_662_r50_gct"),
    Case("cps", "voc_662_r50_sup"),
    Case("s4gan_mlmt", "voc_529_r101", (DEEPLABV2,)),
    Case("s4gan_mlmt", "pascal_context_624_r101", (DEEPLABV2,)),
    Case("s4gan_mlmt", "cityscapes_297_wrn38", (WRN38,)),
    Case("s4gan_mlmt", "voc_529_r101_mlmt", (DEEPLABV2,), phase="mlmt"),
    Case("proto_consistency", "voc_classic_366_r101", phase="first"),
    Case("proto_consistency", "voc_classic_366_r101"),
    Case("unimatch", "voc_classic_366_r101"),
    Case("unimatch", "voc_classic_366_dinov2_small", VIT),
    Case("unimatch", "voc_classic_366_r101", ("method.strong_views=1", "method.fp_share=0")),
]


class Report(NamedTuple):
    """What a rehearsal of an interval has shown.

    Attributes:
        watch: findings, launches, bytes.
        outlived: images and labels that were still there after the step after theirs.
    """

    watch: Watch
    outlived: int


PROTOCOL = {  # where `evaluate` of a project takes its protocol from
    "u2pl": "common.mean_teacher.evaluation",
    "brpg": "common.mean_teacher.evaluation",
    "cps": "projects.cps.train",
    "s4gan_mlmt": "projects.s4gan_mlmt.train",
    "proto_consistency": "projects.proto_consistency.evaluate",
    "unimatch": "projects.unimatch.train",
}


def write_lists(folder: Path, classes: int, images: int) -> Path:
    """A `dataset.yaml` with `images` labeled and as many unlabeled photos that nobody has taken."""
    names = [f"{i:03d}" for i in range(2 * images + VAL)]
    train, val = names[:-VAL], names[-VAL:]
    few = {"splits/few/labeled": train[:images], "splits/few/unlabeled": train[images:]}
    lists = {"train": train, "val": val, "one": val[:1], **few}
    for name in names:
        (folder / f"{name}.png").touch()
        (folder / f"{name}_mask.png").touch()
    for name, ids in lists.items():
        path = folder / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{one}\n" for one in ids))
    spec = {
        "name": "rehearsal", "root": ".", "images": "{id}.png", "labels": "{id}_mask.png", "ignore": 255,
        "classes": [f"class {k}" for k in range(classes)],
        "palette": [[k, k, k] for k in range(classes)],
        "lists": {"train": "train.txt", "val": "val.txt", "one": "one.txt"},
    }  # fmt: skip
    path = folder / "dataset.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@contextlib.contextmanager
def made_up_photos(watch: Watch) -> Iterator[None]:
    """Black photos without a file; what loaders give lies in pinned memory if they are asked for that."""

    def batches(loader: Loader) -> Iterator[Batch]:
        for keys in loader.sampler:
            loaded = loader._loader.dataset[keys]
            assert loaded.batch is not None, loaded.error
            if loader._loader.pin_memory:
                for part in loaded.batch:
                    if isinstance(part, Tensor):
                        watch.pin(part)
            yield loaded.batch

    with (
        mock.patch.object(DatasetSpec, "load_image", return_value=np.zeros((*PHOTO, 3), np.uint8)),
        mock.patch.object(DatasetSpec, "load_label", return_value=np.zeros(PHOTO, np.uint8)),
        mock.patch.object(Loader, "__iter__", batches),
    ):
        yield


def config_of(case: Case, changes: Sequence[str]) -> Any:
    """The published configuration of a case with changes."""
    config = importlib.import_module(f"projects.{case.project}.config").Config
    return load_config(config, ROOT / "projects" / case.project / "configs" / f"{case.config}.yaml", changes)


def settings(case: Case, folder: Path, processes: int, steps: int = STEPS) -> Any:
    """The configuration of a case on photos of `folder`, small, with the interval as long as an epoch."""
    size = FORWARD * ACCUMULATE * processes
    changes = [
        f"data.dataset={write_lists(folder, case.classes, steps * size)}", "data.split=few", "data.workers=0",
        "data.on_error=stop", f"run.log_interval={steps}", "run.panels=false", f"optim.batch_size={size}",
        f"optim.device_batch={FORWARD}",
    ]  # fmt: skip
    if case.project == "s4gan_mlmt":
        changes.append(f"optim.steps={2 * steps}")  # of two rounds
    if case.phase == "mlmt":
        changes += [f"mlmt.labeled_batch={size}", f"mlmt.unlabeled_batch={size}"]
    return config_of(case, [*changes, *SMALL[case.project], *case.changes])


def place_of(processes: int) -> Dist:
    """The first of so many processes, on the GPU that is not there."""
    return Dist(world_size=processes, device=GPU, backend="nccl" if processes > 1 else "none")


def begin(case: Case, run: Any) -> int:
    """Bring a run to the steps that are rehearsed; returns their epoch."""
    cfg = run.cfg
    method = cfg.method
    if hasattr(getattr(run, "draws", None), "coin"):
        run.draws.coin = lambda: 0.0  # always the strong augmentation
    if case.phase == "first":
        return 0
    if case.project == "u2pl":
        return max(method.sup_only_epochs, method.ael.start_epoch if method.ael else 0)
    if case.project == "brpg":
        if case.phase == "prototypes":
            run.state.memory = None
            run.state.prototypes.set(torch.randn_like(run.state.prototypes.centres).unbind())
            return method.prototype_start
        return method.collect_start
    if case.project == "proto_consistency":
        return max(method.sup_only_epochs, cfg.prototypes.start_epoch or 0)
    return 1


def rehearse_evaluation(case: Case, folder: Path, when: str) -> Counter[tuple[str, str]]:
    """What further images cost in a project's own `evaluate`: the findings by kind and place.

    Args:
        case: phases do not matter.
        folder: empty.
        when: protocol `training` or `script`.
    """
    train = importlib.import_module(f"projects.{case.project}.train")
    home = importlib.import_module(PROTOCOL[case.project])
    found = []
    with rehearsal(value=1) as watch, made_up_photos(watch):
        run = train.set_up(settings(case, folder, 1), place_of(1))
        run.best = 1.0  # nothing is saved
        with (
            Session(run, case.project, folder / "run", request=StopRequest()) as session,
            mock.patch.object(home, "protocol", partial(_protocol, home.protocol, when)),
            mock.patch.object(
                ConfusionMatrix, "counts", torch.ones(case.classes, case.classes, device="cpu").long()
            ),
        ):
            session.log.begin(run.step)
            cfg = run.cfg
            for images, count in (("one", 1), ("val", VAL)):
                data, how = replace(cfg.data, val=images), replace(cfg.run, pseudo_images=count)
                run.cfg = replace(cfg, data=data, run=how)
                watch.findings.clear()
                train.evaluate(cfg.optim.epochs - 1, run, session)
                found.append(Counter((one.kind, one.where) for one in watch.findings))
    return found[1] - found[0]


def _protocol(original: Any, when: str, cfg: Any, _: str) -> Any:
    return original(cfg, when)


def counted(steps: Iterator[Any], outlived: list[int]) -> Iterator[Any]:
    """The same steps; at the end of each, the images and labels of the step before that are still there."""
    before: list[weakref.ref[Tensor]] = []
    for at, group in steps:
        batches = (part for batch in group for one in batch for part in one[:2])
        own = [weakref.ref(part) for part in batches if isinstance(part, Tensor)]
        yield at, group
        outlived.append(sum(one() is not None for one in before))
        before = own


def rehearse(case: Case, folder: Path, processes: int) -> Report:
    """Run one interval of a case: `STEPS` of one process, one of each of several."""
    steps = STEPS if processes == 1 else 1
    branch = ".mlmt" if case.phase == "mlmt" else ""
    train = importlib.import_module(f"projects.{case.project}{branch}.train")
    outlived: list[int] = []
    shallow = mock.patch("common.models.xception.MIDDLE", (4,))  # one of its sixteen equal blocks
    with rehearsal() as watch, made_up_photos(watch), shallow:
        run = train.set_up(settings(case, folder, processes, steps), place_of(processes))
        assert run.data.steps_per_epoch == steps
        epoch = begin(case, run)
        run.step = epoch * steps
        with Session(run, case.project, folder / "run", losses_per_step=2, request=StopRequest()) as session:
            session.log.begin(run.step)
            original = session.steps
            session.steps = lambda of: counted(original(of), outlived)  # type: ignore[method-assign]
            watch.findings.clear()
            watch.launches = 0
            assert not train.train_epoch(epoch, run, session)
            assert len(outlived) == steps
    return Report(watch, sum(outlived))
