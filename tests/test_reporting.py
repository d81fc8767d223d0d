"""What every run says: the start, the pictures, the result, the forecast."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.config import config_hash
from common.data.dataset_yaml import load_spec
from common.data.loaders import SegmentationDataset, make_train_loader
from common.data.split import resolve_split
from common.data.streams import TrainingData
from common.data.transforms import IGNORE, EvalTransform
from common.distributed import Dist
from common.errors import UserError
from common.measure.evaluation import Evaluation, Protocol
from common.measure.pictures import colorize
from common.run import reporting
from common.run.reporting import announce, log_panels, print_forecast, report_result, summary
from common.run.session import Run
from tests.fake_project import FakeConfig, fake_config
from tests.tiny import CLASSES, write_dataset


class Log:
    """Keeps what a run would write."""

    elapsed_s = 12.5

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.images: list[tuple[str, int, np.ndarray[Any, Any]]] = []

    def info(self, message: str) -> None:
        self.lines.append(message)

    def add_image(self, tag: str, step: int, image: np.ndarray[Any, Any]) -> None:
        self.images.append((tag, step, image))


@pytest.fixture
def cfg(tmp_path: Path) -> FakeConfig:
    return fake_config(write_dataset(tmp_path / "farm"), expect={"miou": 70.0, "source": "Table 1"})


def stream(cfg: FakeConfig, *roles: str) -> TrainingData:
    spec = load_spec(cfg.data.dataset)
    split = resolve_split(spec, cfg.data.split)
    transform = EvalTransform(mean=cfg.data.mean, std=cfg.data.std)
    loaders = {
        role: make_train_loader(SegmentationDataset(spec, split.labeled, transform, 0, role), 2, Dist(), workers=0)
        for role in roles
    }  # fmt: skip
    return TrainingData(spec, split, loaders, 1)


def evaluation(miou: float) -> Evaluation:
    return Evaluation(miou, miou + 0.1, (0.1, 0.2, 0.3), 0.9, (1, 2, 3), (10, 10, 10), 4, 0, Protocol())


@pytest.mark.parametrize("roles", [("labeled",), ("labeled", "unlabeled"), ("labeled", "u0", "u1")])
def test_start_names_places_arithmetic_and_deviations(cfg: FakeConfig, roles: tuple[str, ...]) -> None:
    log, data = Log(), stream(cfg, *roles)
    announce(cfg, data, log, Path("some/run"), Dist(), 9, ["one", "two"], own_statistics=True)
    counts = "6 labeled images" if len(roles) == 1 else "6 labeled + 10 unlabeled images"
    assert "dataset: " in log.lines[0]
    assert log.lines[1:] == [
        "run directory: some/run",
        f"1 process(es) on cpu; batch 2 = 1 x 1 x 2; {counts} (few, {data.split.hash[:12]}); "
        "3 steps x 3 epochs = 9 steps",
        "BatchNorm statistics are those of each process (SyncBatchNorm needs GPUs)",
        "deviation from the paper: one",
        "deviation from the paper: two",
    ]
    plain = Log()
    announce(cfg, data, plain, Path("some/run"), Dist(), 9)
    assert plain.lines == log.lines[:3]


def test_summary_names_the_classes() -> None:
    found = summary(evaluation(0.5), CLASSES)
    assert found["iou"] == dict(zip(CLASSES, (0.1, 0.2, 0.3), strict=True))
    assert (found["miou"], found["miou_present"], found["images"]) == (0.5, 0.6, 4)
    with pytest.raises(ValueError, match="zip"):
        summary(evaluation(0.5), CLASSES[:2])


def test_result_holds_the_common_fields_and_the_extra_ones(cfg: FakeConfig, tmp_path: Path) -> None:
    log, data = Log(), stream(cfg, "labeled", "unlabeled")
    report_result(
        cfg, data, log, tmp_path, Dist(), project="fake", method="m", network="branch1", best=evaluation(0.5),
        last=evaluation(0.25), in_training={"best": 0.6}, steps=9, skipped_steps=1.0, extra={"epochs": {"3": 0.4}},
    )  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["miou"], result["miou_best"], result["miou_last"]) == (0.5, 0.5, 0.25)
    assert result["best"] == summary(evaluation(0.5), CLASSES)
    assert result["last"] == summary(evaluation(0.25), CLASSES)
    assert (result["project"], result["method"], result["network"]) == ("fake", "m", "branch1")
    assert (result["split"], result["split_hash"]) == ("few", data.split.hash)
    assert (result["labeled"], result["unlabeled"]) == (len(data.split.labeled), len(data.split.unlabeled))
    assert (result["steps"], result["skipped_steps"], result["skipped_files"]) == (9, 1.0, 0)
    assert (result["seed"], result["config_hash"]) == (2, config_hash(cfg))
    assert (result["seconds"], result["protocol"]["kind"]) == (12.5, "whole_image")
    assert list(result)[-1] == "epochs"
    assert result["epochs"] == {"3": 0.4}
    assert log.lines == [
        "val: mIoU best 50.00 last 25.00 (branch1, whole_image)",
        "published: 70.00 (Table 1)",
        f"result: {tmp_path / 'result.json'}",
    ]


def test_only_the_first_process_writes(
    cfg: FakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "max_over_ranks", lambda value, dist: value)
    report_result(
        cfg, stream(cfg, "labeled"), Log(), tmp_path, Dist(rank=1, world_size=2), project="fake", method="m",
        network="n", best=evaluation(0.5), last=evaluation(0.5), in_training={}, steps=1, skipped_steps=0.0,
    )  # fmt: skip
    assert not (tmp_path / "result.json").exists()


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


def test_forecast_counts_the_images_of_all_loaders(
    cfg: FakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter((0.0, 9.0, 10.0, 12.0, 20.0, 23.0))  # the first step does not count; then 2 and 3 seconds
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: next(times))
    called: list[int] = []
    run = SimpleNamespace(cfg=cfg, data=stream(cfg, "labeled", "u0", "u1"))
    images = Run.images_per_step.fget(run)
    print_forecast(cfg, images, Dist(), [lambda: called.append(1)] * 3, 100, "toys")
    line = capsys.readouterr().out
    assert len(called) == 3
    assert re.match(
        r"dry run of toys: peak memory \d+\.\d\d GiB per process, 3\.0 images/s, about 3m20 for 100 steps",
        line,
    ), line


def test_forecast_without_enough_memory_is_one_line(cfg: FakeConfig) -> None:
    def too_much() -> None:
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(UserError, match=r"optim\.device_batch=2: the device's memory is too small"):
        print_forecast(cfg, 2, Dist(), [too_much], 1)
