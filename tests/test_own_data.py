"""The settings for own photos train on any data; no quirk is on, and what reading photos changes is said."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.config import load_config
from common.data.dataset_yaml import load_spec
from common.data.split import Split, resolve_split
from tools.training import own_data_notes, quirks_of

ROOT = Path(__file__).resolve().parents[1]
OWN = [path.relative_to(ROOT / "projects") for path in sorted(ROOT.glob("projects/*/configs/own*.yaml"))]
SMALL = {  # what makes a run of each setting a matter of a second
    "": ("optim.epochs=2", "model.network=paper", "model.backbone=resnet_tiny", "model.weights=none"),
    "brpg": ("optim.epochs=3", "method.sup_only_epochs=1", "method.collect_start=1"),
    "cps": ("model.width=4", "model.low_planes=4"),
    "proto_consistency": ("method.sup_only_epochs=1", "method.proto.granularity=4"),
    "u2pl": ("method.sup_only_epochs=1", "method.queue_size=50", "method.queue_size_first=50"),
    "s4gan_mlmt": ("optim.steps=4", "optim.optimizer=sgd", "model.network=deeplabv3plus", "model.d_width=4",
                   "mlmt.backbone=resnet_tiny", "mlmt.size=64", "mlmt.epochs=2", "mlmt.labeled_batch=2",
                   "mlmt.unlabeled_batch=2", "mlmt.workers=0"),
    "own_gct": ("method.gct.detector_planes=4", "method.gct.detector_strides=[2, 1, 2, 1, 2, 1, 1, 1]"),
}  # fmt: skip


def configuration(path: Path, *overrides: str) -> Any:
    module = importlib.import_module(f"projects.{path.parts[0]}.config")
    return load_config(module.Config, ROOT / "projects" / path, overrides)


def test_every_project_has_a_setting_for_own_photos_without_any_quirk() -> None:
    projects = {path.parent.name for path in ROOT.glob("projects/*/train.py")}
    assert {path.parts[0] for path in OWN if path.name == "own.yaml"} == projects
    for path in OWN:
        on = [name for name, value in quirks_of(configuration(path)).items() if value]
        assert not on, f"{path}: {on}"


def test_quirks_are_known_by_their_first_choice() -> None:
    """Those of the papers' own settings, which have them all on; CPS' undefined loss is one of old versions."""
    for path in OWN:
        section = type(configuration(path)).__dataclass_fields__["quirks"].default_factory()
        off = {name for name, value in quirks_of(FakeConfig(section)).items() if not value}
        assert off <= {"nan_without_labels", "nan_without_pixels", "loss_world_size"}, path


def many_classes(folder: Path, classes: int) -> Path:
    """Five photos with masks to train on, five without, four to evaluate, each with some of the classes."""
    rng, names = np.random.default_rng(0), [f"p{i:02d}" for i in range(14)]
    for part in ("img", "mask", "splits/few"):
        (folder / part).mkdir(parents=True)
    for i, name in enumerate(names):
        label = np.kron(rng.integers(0, classes, (4, 4)), np.ones((16, 16))).astype(np.uint8)
        image = np.stack([label * 37, label * 91, label * 53], axis=-1)
        Image.fromarray(image).save(folder / "img" / f"{name}.png")
        if not 5 <= i < 10:
            Image.fromarray(label).save(folder / "mask" / f"{name}.png")
    for path, chosen in (
        ("train", names[:10]), ("val", names[10:]),
        ("splits/few/labeled", names[:5]), ("splits/few/unlabeled", names[5:10]),
    ):  # fmt: skip
        (folder / f"{path}.txt").write_text("\n".join(chosen))
    (folder / "dataset.yaml").write_text(
        "name: own\nroot: .\nimages: img/{id}.png\nlabels: mask/{id}.png\n"
        f"classes: [{', '.join(f'c{k}' for k in range(classes))}]\nlists: {{train: train.txt, val: val.txt}}\n"
    )
    return folder / "dataset.yaml"


@pytest.mark.parametrize("path", [pytest.param(path, id=f"{path.parts[0]}-{path.stem}") for path in OWN])
def test_the_setting_trains_on_any_number_of_classes(path: Path, tmp_path: Path) -> None:
    project = path.parts[0]
    words = [*SMALL[""], *SMALL.get(project, ()), *SMALL.get(path.stem, ()), "data.split=few", "data.workers=0",
             "data.crop_size=[64, 64]", "model.inner_planes=8", "optim.batch_size=2", "run.panels=false",
             "run.device=cpu"]  # fmt: skip
    main = importlib.import_module(f"projects.{project}.train").main
    for classes in (2, 254) if path.name == "own.yaml" else (254,):
        data, run = many_classes(tmp_path / str(classes), classes), tmp_path / f"run{classes}"
        command = [
            "--config",
            str(ROOT / "projects" / path),
            f"data.dataset={data}",
            f"run.dir={run}",
            *words,
        ]
        assert main(command) == 0
        result = json.loads((run / "result.json").read_text())
        assert len(result["truth"]["classes"]) == classes
        assert "note: " not in (run / "train.log").read_text()


@pytest.mark.parametrize(
    "path", [path for path in OWN if path.name == "own.yaml"], ids=lambda path: path.parts[0]
)
def test_a_quirk_on_own_photos_is_said(path: Path, tmp_path: Path) -> None:
    section = configuration(path).quirks
    split = Split([], [], "few", "")
    assert own_data_notes(configuration(path), load_spec(many_classes(tmp_path, 2)), split) == []
    for field in dataclasses.fields(section):
        if not field.default:  # the original's behaviour is no choice, or not that of today
            continue
        quirk = dataclasses.replace(section, **{field.name: field.default})
        (note,) = own_data_notes(FakeConfig(quirk), load_spec(tmp_path / "dataset.yaml"), split)
        assert f"which own data should not have ({field.name})" in note
        assert "configs/own.yaml has none" in note
        assert own_data_notes(FakeConfig(quirk), load_spec("voc"), split) == []


@dataclasses.dataclass
class FakeConfig:
    """Of a run, what is asked for quirks."""

    quirks: Any


def test_what_reading_photos_changes_is_said_before_the_training(tmp_path: Path) -> None:
    spec = load_spec(many_classes(tmp_path, 3))
    exif = Image.Exif()
    exif[0x0112] = 3
    for name in ("p00", "p06"):
        with Image.open(tmp_path / f"img/{name}.png") as photo:
            photo.save(tmp_path / f"img/{name}.png", exif=exif)
    Image.fromarray(np.full((64, 64), 900, np.uint16)).save(tmp_path / "img/p01.png")
    notes = "\n".join(own_data_notes(FakeConfig(None), spec, resolve_split(spec, "few")))
    for part in (
        "2 of 10 photos looked at: turned upright (EXIF orientation 3); masks must be drawn on that view",
        "1 of 10 photos looked at: 16 bits per channel, of which 0..65535 become 0..255",
        "so it is dark; see 'value_range'",
    ):
        assert part in notes
