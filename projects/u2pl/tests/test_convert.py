"""Conversion of the authors' checkpoints, made here by the rule of the golden network cases.

What BRPG's files share with these is tested by `tests/test_convert_scripts.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from common.config import IMAGENET_MEAN, IMAGENET_STD, load_config
from common.data.dataset_yaml import load_spec
from common.models.deeplab import SegmentationNetwork
from common.run.checkpoint import describe
from projects.u2pl import convert
from projects.u2pl import eval as script
from projects.u2pl.config import Config
from projects.u2pl.model import build_student
from tests.conversions import Converter, authors_file, in_few_bytes, parallel
from tests.rules import rule_value

PROJECT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"


@lru_cache(maxsize=1)  # the cases of one network stand together
def by_the_golden_rule(case: str) -> dict[str, Tensor]:
    """Values that depend on the key alone, so that a tensor under a wrong name is noticed."""
    keys = json.loads((GOLDEN / f"{case}.keys.json").read_text())
    return {key: torch.from_numpy(np.asarray(rule_value(key, shape))) for key, shape, _ in keys}


# what files of the AEL branch hold besides
BANKS = {"class_criterion": torch.full((3, 19), 0.5), "cutmix_bank": torch.ones(19, 2231)}


def teacher_of_a_file(
    folder: Path, weights: dict[str, Tensor], config: str, *overrides: str
) -> SegmentationNetwork:
    """The teacher as evaluation builds it after the conversion; its student is zero."""
    cfg = load_config(Config, PROJECT / "configs" / f"{config}.yaml", overrides)
    banks = {} if cfg.method.ael is None else BANKS
    source = authors_file(
        folder / "ckpt_best.pth", model_state=in_few_bytes(weights), teacher_state=weights, **banks
    )
    spec = load_spec(cfg.data.dataset)
    networks, reports = convert.convert(source, cfg, spec, config)
    source.unlink()
    assert [len(report.used) for report in reports.values()] == [len(weights)] * 2
    saved = describe(convert.PROJECT, cfg, spec, 0, networks)
    assert saved["networks"]["student"]["decoder.classifier.8.bias"].eq(0).all()
    return script.load_network(cfg, saved, "teacher", torch.device("cpu"), "converted")


CONFIGS = ("voc_classic_1464_r101", "cityscapes_744_r101", "cityscapes_744_r101_ael")
NARROW = ("model.width=4", "model.inner_planes=8")


@pytest.mark.parametrize("config", CONFIGS)
def test_a_converted_narrow_network_scores_as_before(tmp_path: Path, config: str) -> None:
    cfg = load_config(Config, PROJECT / "configs" / f"{config}.yaml", NARROW)
    before = build_student(cfg, load_spec(cfg.data.dataset).num_classes).eval()
    for key, value in before.state_dict().items():
        value.copy_(torch.from_numpy(np.asarray(rule_value(key, list(value.shape)))))
    network = teacher_of_a_file(tmp_path, parallel(before.state_dict()), config, *NARROW)
    image = torch.rand(2, 3, 65, 65)
    with torch.inference_mode():
        torch.testing.assert_close(network.predict(image), before.predict(image))


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "config"), list(zip(("net_resnet101", *["net_resnet101_aux"] * 2), CONFIGS, strict=True))
)
def test_converted_network_scores_as_the_authors(tmp_path: Path, case: str, config: str) -> None:
    network = teacher_of_a_file(tmp_path, by_the_golden_rule(case), config)
    with np.load(GOLDEN / f"{case}.npz") as recorded, torch.inference_mode():
        image, expected = torch.from_numpy(recorded["in_image"]), torch.from_numpy(recorded["out_pred"])
        out = network(image)
        limit = 1e-4 * expected.abs().max()
        assert (out.logits - expected).abs().max() <= limit
        whole = torch.nn.functional.interpolate(
            expected, image.shape[-2:], mode="bilinear", align_corners=True
        )
        assert (network.predict(image) - whole).abs().max() <= limit


def nineteen_classes(folder: Path) -> Path:
    """A dataset of one photo (97 x 129) with the classes of Cityscapes; returns its yaml."""
    rng, spec = np.random.RandomState(0), load_spec("cityscapes")
    folder.mkdir()
    Image.fromarray(rng.randint(0, 256, (97, 129, 3)).astype(np.uint8)).save(folder / "photo.png")
    Image.fromarray(rng.randint(0, 19, (97, 129)).astype(np.uint8)).save(folder / "photo_mask.png")
    (folder / "val.txt").write_text("photo\n")
    about = {
        "name": "street",
        "root": ".",
        "images": "{id}.png",
        "labels": "{id}_mask.png",
        "classes": list(spec.classes),
    }
    (folder / "dataset.yaml").write_text(yaml.safe_dump(about | {"lists": {"val": "val.txt"}}))
    return folder / "dataset.yaml"


@pytest.mark.smoke
@pytest.mark.slow
def test_eval_sh_measures_a_converted_ael_file_by_windows(tmp_path: Path) -> None:
    """The predictions that the script writes are those of the golden weights, averaged over windows by hand."""
    weights = by_the_golden_rule("net_resnet101_aux")
    source = authors_file(
        tmp_path / "ckpt.pth", model_state=in_few_bytes(weights), teacher_state=weights, **BANKS
    )
    config = PROJECT / "configs" / "cityscapes_744_r101_ael.yaml"
    dataset = nineteen_classes(tmp_path / "street")
    Converter(convert.main, config)(source, f"data.dataset={dataset}")
    source.unlink()
    command = ["sh", str(PROJECT / "eval.sh"), str(config), str(tmp_path / "converted.pt"), f"data.dataset={dataset}",
               "eval.crop_size=[65,65]", "data.workers=0", "--save", str(tmp_path / "out")]  # fmt: skip
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "SSS_DEVICE": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    network = build_student(load_config(Config, config), 19)
    network.load_state_dict({key.removeprefix("module."): value for key, value in weights.items()})
    network.eval()
    photo = torch.from_numpy(np.array(Image.open(tmp_path / "street" / "photo.png"))).permute(2, 0, 1).float()
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    total, count = torch.zeros(19, 97, 129), torch.zeros(97, 129)
    for row in (0, 32):  # steps of 44 = ceil(65 * 2 / 3), the last window at the border
        for col in (0, 44, 64):
            window = ((photo - mean) / std)[None, :, row : row + 65, col : col + 65]
            with torch.inference_mode():
                total[:, row : row + 65, col : col + 65] += network.predict(window)[0]
            count[row : row + 65, col : col + 65] += 1
    expected = (total / count).argmax(dim=0).numpy()
    assert len(np.unique(expected)) > 1
    written = np.asarray(Image.open(next((tmp_path / "out" / "gray").rglob("*.png"))))
    assert (written == expected).mean() > 0.999  # rounding may decide a tie
