"""Figures of an evaluation for files, and pictures of predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.data.dataset_yaml import load_spec
from common.data.spec import IGNORE
from common.distributed import Dist
from common.measure.evaluation import Evaluation, Protocol
from splits.pictures import colorize
from tests.fake_project import FakeConfig, fake_config
from tests.tiny import CLASSES, write_dataset
from tools import training as reporting
from tools.training import log_panels, summary


class Log:
    """Keeps what a run would write."""

    def __init__(self) -> None:
        self.images: list[tuple[str, int, np.ndarray[Any, Any]]] = []

    def add_image(self, tag: str, step: int, image: np.ndarray[Any, Any]) -> None:
        self.images.append((tag, step, image))


@pytest.fixture
def cfg(tmp_path: Path) -> FakeConfig:
    return fake_config(write_dataset(tmp_path / "farm"))


def evaluation(miou: float) -> Evaluation:
    return Evaluation(miou, miou + 0.1, (0.1, 0.2, 0.3), 0.9, (1, 2, 3), (10, 10, 10), 4, 0, Protocol())


def test_summary_names_the_classes() -> None:
    found = summary(evaluation(0.5), CLASSES)
    assert found["iou"] == dict(zip(CLASSES, (0.1, 0.2, 0.3), strict=True))
    assert (found["miou"], found["miou_present"], found["images"]) == (0.5, 0.6, 4)
    with pytest.raises(ValueError, match="zip"):
        summary(evaluation(0.5), CLASSES[:2])


def test_panels_show_prediction_and_pseudo_labels(cfg: FakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, log = load_spec(cfg.data.dataset), Log()
    shown: list[list[np.ndarray[Any, Any]]] = []

    def panel(tiles: Any, titles: Any) -> np.ndarray[Any, Any]:
        assert len(tiles) == len(titles) == 5
        shown.append(list(tiles))
        return np.zeros((1, 1, 3), np.uint8)

    def pseudo(probs: torch.Tensor) -> torch.Tensor:
        torch.testing.assert_close(probs.sum(dim=1), torch.ones(1, 40, 48))
        return probs.argmax(dim=1).where(probs.amax(dim=1) > 0.6, IGNORE)

    monkeypatch.setattr(reporting, "panel", panel)
    log_panels(lambda x: 2 * x, cfg.data, spec, "val", log, 7, Dist(), pseudo)
    assert [(tag, step) for tag, step, _ in log.images] == [(f"val/{i}", 7) for i in range(4)]
    for item, (image, truth, prediction, kept, _) in zip(spec.read_list("val"), shown, strict=True):
        photo = spec.load_image(item)
        np.testing.assert_array_equal(image, photo)
        np.testing.assert_array_equal(truth, colorize(spec.load_label(item), spec.palette))
        scores = 2 * (photo - np.array(cfg.data.mean)) / np.array(cfg.data.std)
        probs = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
        ids = probs.argmax(axis=-1)
        assert (prediction == colorize(ids, spec.palette)).mean() > 0.999
        sure = np.where(probs.max(axis=-1) > 0.6, ids, IGNORE)
        assert 0.01 < (sure == IGNORE).mean() < 0.99
        assert (kept == colorize(sure, spec.palette)).mean() > 0.99
