"""Windows and scales of the evaluation, and the scripts that measure and predict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common.config import load_config
from common.measure.inference import sliding_window
from projects.unimatch import eval as evaluation
from projects.unimatch import train
from projects.unimatch.config import Config
from projects.unimatch.evaluate import original_windows, protocol, summed_probabilities
from projects.unimatch.tests import toys
from tests.each import for_each
from tests.runs import result

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@for_each("cut", [True, False])
def test_every_pixel_is_seen_in_photos_of_any_size(cut: bool) -> None:
    for size in ((40, 52), (24, 24), (9, 70), (25, 24), (5, 3)):
        starts, inside = original_windows(size, (24, 24), cut=cut)
        seen = torch.zeros(size)
        for row, col in starts:
            window = seen[row : row + inside[0], col : col + inside[1]]
            assert cut or tuple(window.shape) == inside
            window += 1
        assert seen.min() >= 1


def test_moved_windows_have_the_best_class_of_averaged_ones() -> None:
    image, net = torch.randn(1, 3, 40, 52), torch.nn.Conv2d(3, 4, 3, padding=1)
    with torch.no_grad():
        ours = summed_probabilities(net, image, (24, 24), cut=False)
        theirs = sliding_window(lambda x: net(x).softmax(1), image, (24, 24), (16, 16))
    assert torch.equal(ours.argmax(1), theirs.argmax(1))


def test_protocols_of_the_settings() -> None:
    for name, kind, crop in (
        ("cityscapes_186_r50", "cut_windows", (801, 801)),
        ("cityscapes_186_dinov2_base", "moved_windows", (798, 798)),
        ("voc_classic_92_r101", "whole_image", None),
    ):
        cfg = load_config(Config, CONFIGS / f"{name}.yaml")
        for when in ("training", "script"):
            how = protocol(cfg, when)  # type: ignore[arg-type]
            assert (how.kind, how.crop_size) == (kind, crop)


def test_dpt_predicts_photos_of_any_size() -> None:
    network = toys.tiny_dpt(3).eval()
    with torch.no_grad():
        for size in ((28, 28), (33, 47), (5, 90)):
            assert network.predict(torch.randn(1, 3, *size)).shape == (1, 3, *size)


@pytest.mark.smoke
def test_the_script_measures_what_training_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Best and last weights, the teacher's; the student's where it is asked for."""
    run, words = tmp_path / "run", ["run.panels=false", "run.device=cpu", "eval.protocol=moved_windows"]
    assert train.main(["--config", str(CONFIGS / "smoke_v2.yaml"), f"run.dir={run}", *words]) == 0
    assert evaluation.main(["--run", str(run)]) == 0
    found = json.loads((run / "eval_moved_windows_few.json").read_text())
    trained = result(run)
    assert (found["network"], found["method"]) == ("teacher", "unimatch_v2")
    assert (found["miou_best"], found["miou_last"]) == (trained["miou_best"], trained["miou_last"])
    assert evaluation.main(["--run", str(run), "--network", "student"]) == 0
    other = json.loads((run / "eval_moved_windows_few_student.json").read_text())
    assert other["network"] == "student"
    assert "student" in capsys.readouterr().out
