"""The authors' mean and their texts."""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch

from common.measure.evaluation import Evaluation, Protocol, evaluate
from common.measure.metrics import ConfusionMatrix
from projects.s4gan_mlmt.compat.metrics import (
    class_line,
    original_iou,
    original_miou,
    printed_text,
    progress_line,
    result_text,
    write_result,
)

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("road", "traffic light", "sky", "train")


def found() -> Evaluation:
    """Class 0 is half right, 1 never hit, 2 right, 3 nowhere."""
    scores = torch.tensor([[0, 1, 2, 0]])
    label = torch.tensor([[[0, 0, 2, 255]]])

    def forward(image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(scores, 4).permute(2, 0, 1)[None].float() + 0 * image.sum()

    return evaluate(forward, [(torch.zeros(1, 3, 1, 4), label, "a")], 4, Protocol(epsilon=0.0))


def test_the_mean_is_over_all_classes() -> None:
    counts = torch.tensor([1, 0, 1, 0]), torch.tensor([2, 1, 1, 0])
    iou = original_iou(*counts)
    assert iou[:3].tolist() == [0.5, 0.0, 1.0]
    assert bool(iou[3].isnan())
    assert original_miou(*counts) == 1.5 / 4
    assert original_miou(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)) == 0.0
    assert found().miou == pytest.approx(1.5 / 4, abs=1e-15)  # the shared evaluator's is the same


def test_the_mean_is_the_authors_to_the_last_digit() -> None:
    intersection, union = [1, 2, 1, 0, 4, 1, 5, 2, 7, 3], [7, 11, 9, 13, 15, 6, 17, 10, 21, 23]
    *_, one_by_one = accumulate(i / u for i, u in zip(intersection, union, strict=True))
    mean = original_miou(torch.tensor(intersection), torch.tensor(union))
    assert (str(mean), str(one_by_one / 10)) == ("0.18270055321206216", "0.18270055321206213")
    with np.load(GOLDEN / "miou_absent.npz") as recorded:
        counts = ConfusionMatrix(19)
        label = torch.from_numpy(recorded["in_gt"]).long()
        counts.update(torch.from_numpy(recorded["in_pred"]).long(), label.where(label < 19, 255))
        assert original_miou(*counts.intersection_union()) == recorded["out_mean"]


def test_texts() -> None:
    lines = result_text(found(), NAMES).split("\n")
    assert lines == [
        "class  0 road         IU 0.50",
        "class  1 traffic_light IU 0.00",
        "class  2 sky          IU 1.00",
        "class  3 train        IU nan",
        "meanIOU: 0.375",
        "",
    ]
    printed = printed_text(found(), NAMES).split("\n")
    assert printed == [lines[0], lines[2], "meanIOU: 0.375", "", ""]
    assert class_line(20, "tvmonitor", math.nan) == "class 20 tvmonitor    IU nan"


def test_result_file(tmp_path: Path) -> None:
    path = write_result(tmp_path / "results", found(), NAMES)
    assert path == tmp_path / "results/result.txt"
    assert path.read_text() == result_text(found(), NAMES)


def test_progress() -> None:
    shown = {i: progress_line(i) for i in range(250)}
    assert {i: line for i, line in shown.items() if line} == {
        0: "0 processd",
        100: "100 processd",
        200: "200 processd",
    }
