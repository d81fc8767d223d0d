from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from common.config import IMAGENET_MEAN, IMAGENET_STD, load_config, plan_batch
from common.data.dataset_yaml import load_spec
from common.data.split import resolve_split, unlabeled_truth
from common.distributed import Dist
from common.measure.pseudo_quality import (
    CONFIDENT,
    count_pseudo_labels,
    evaluating,
    evenly,
    log_pseudo_quality,
    measure_pseudo_labels,
)
from common.run.log import RunLog
from projects.u2pl.config import Config
from projects.u2pl.data import build_training_data
from tests.runs import launch_script
from tests.tiny import write_config, write_dataset


def logits_of(pred: list[list[int]], confidence: list[list[float]], classes: int = 3) -> Tensor:
    """Logits (1, K, H, W) whose softmax gives the predicted class the confidence."""
    probs = torch.zeros(1, classes, len(pred), len(pred[0]), dtype=torch.float64)
    for r, row in enumerate(pred):
        for c, k in enumerate(row):
            sure = confidence[r][c]
            probs[0, :, r, c] = (1 - sure) / (classes - 1)
            probs[0, k, r, c] = sure
    return probs.log()


def test_the_counts_are_those_of_the_definition() -> None:
    logits = logits_of([[0, 1, 2, 1]], [[0.95, 0.95, 0.6, 0.99]])
    label = torch.tensor([[[0, 2, 2, 255]]])
    assert count_pseudo_labels(logits, label).tolist() == [3, 2, 1, 2]


def test_the_threshold_itself_counts_as_kept() -> None:
    two = torch.zeros(1, 2, 1, 1)
    two[0, 0] = torch.tensor(np.float32(np.log(CONFIDENT / (1 - CONFIDENT))) + 1e-6)
    below = two.clone()
    below[0, 0] -= 1e-3
    label = torch.zeros(1, 1, 1, dtype=torch.int64)
    assert count_pseudo_labels(two, label)[1] == 1
    assert count_pseudo_labels(below, label)[1] == 0


def test_pixels_of_all_images_and_networks_are_taken_together() -> None:
    right = logits_of([[0, 1]], [[0.95, 0.95]])
    wrong = logits_of([[1, 1]], [[0.95, 0.5]])
    samples = [
        (torch.zeros(3, 1, 2), torch.tensor([[0, 1]])),
        (torch.zeros(3, 1, 2), torch.tensor([[0, 255]])),
    ]
    found = measure_pseudo_labels([lambda _: right, lambda _: wrong], samples, Dist())
    # pixels with a truth: 3 per network; kept: 3 + 2; right and kept: 3 + 0; right: 3 + 1
    expected = {"pseudo_kept": 5 / 6, "pseudo_accuracy": 3 / 5, "pseudo_accuracy_all": 4 / 6}
    assert found == pytest.approx(expected)


def test_nothing_kept_and_nothing_known() -> None:
    unsure = logits_of([[0, 1]], [[0.5, 0.5]])
    samples = [(torch.zeros(3, 1, 2), torch.tensor([[0, 0]]))]
    found = measure_pseudo_labels([lambda _: unsure], samples, Dist())
    assert found == {"pseudo_kept": 0.0, "pseudo_accuracy_all": 0.5}
    unknown = [(torch.zeros(3, 1, 2), torch.full((1, 2), 255))]
    assert measure_pseudo_labels([lambda _: unsure], unknown, Dist()) == {}
    assert measure_pseudo_labels([lambda _: unsure], [], Dist()) == {}


def test_images_are_chosen_evenly_and_always_the_same() -> None:
    assert evenly(range(10), 4) == [0, 2, 5, 7]
    assert evenly(range(3), 8) == [0, 1, 2]
    assert evenly([], 8) == []


def test_modes_are_given_back_module_by_module() -> None:
    network = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(), nn.Sequential(nn.BatchNorm2d(2)))
    network.train()
    network[0].eval()  # frozen
    with evaluating([network]):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == [True, False, True, True, True]


def test_the_truth_of_unlabeled_images_is_found_but_not_given_to_training(tmp_path: Path) -> None:
    spec = load_spec(write_dataset(tmp_path))
    (tmp_path / "mask" / "p009.png").unlink()
    assert [item.id for item in unlabeled_truth(spec, "few")] == [f"p{i:03d}" for i in range(6, 16) if i != 9]
    assert all(item.label is None for item in resolve_split(spec, "few").unlabeled)
    shapes = load_spec("shapes")
    assert len(unlabeled_truth(shapes, "random/6")) == 394
    assert unlabeled_truth(shapes, "full") == []


class Colours(nn.Module):
    """A network that is certain of the class whose colour is nearest, with dropout and statistics to disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, affine=False)
        self.drop = nn.Dropout(0.5)

    def predict(self, x: Tensor) -> Tensor:
        tones = torch.tensor([[90.0, 140, 90], [60, 90, 200], [190, 60, 50]])
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        tones = ((tones - mean) / std)[None, :, :, None, None]
        self.drop(self.norm(x))
        return -20 * (x[:, None] - tones).square().sum(dim=2)


def run_with(tmp_path: Path, dataset: Path, **changes: int) -> list[dict[str, float]]:
    cfg = load_config(
        Config, write_config(tmp_path / "c.yaml", dataset, "few", run={"pseudo_images": 4} | changes)
    )
    data = build_training_data(cfg, Dist(), plan_batch(cfg.optim, 1))
    network = Colours().train()
    before = network.state_dict()["norm.running_mean"].clone()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    with RunLog(tmp_path / "run", Dist(), total_steps=1, images_per_step=1) as log:
        log.begin(0)
        log_pseudo_quality(cfg, [network], data, log, 7, 2, Dist())
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert network.training
    assert torch.equal(network.norm.running_mean, before)
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def test_the_figures_are_logged_and_nothing_else_changes(tmp_path: Path) -> None:
    (line,) = run_with(tmp_path, write_dataset(tmp_path))
    assert (line["step"], line["epoch"]) == (7, 2)
    assert line["pseudo_accuracy_all"] > 0.95  # the classes are their colours
    assert line["pseudo_kept"] > 0.9
    assert line["pseudo_accuracy"] >= line["pseudo_accuracy_all"]


def test_nothing_is_logged_without_masks_or_without_the_wish(tmp_path: Path) -> None:
    assert run_with(tmp_path, write_dataset(tmp_path / "bare", masks=False)) == []
    assert run_with(tmp_path, write_dataset(tmp_path / "masked"), pseudo_images=0) == []


def test_a_broken_mask_of_an_unlabeled_image_does_not_stop_the_run(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    (tmp_path / "mask" / "p006.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "mask" / "p008.png")  # another size
    (line,) = run_with(tmp_path, dataset)
    assert line["pseudo_accuracy_all"] > 0.95


SHARED = """
    import torch
    from tools.processes import start, stop
    from common.errors import run_main
    from common.measure.pseudo_quality import measure_pseudo_labels

    def main(argv):
        dist = start("cpu")
        logits = torch.zeros(1, 2, 1, 4)
        logits[0, 0] = 9.0
        truths = [torch.tensor([row]) for row in ([0, 0, 1, 255], [0, 1, 1, 1], [0, 0, 0, 0])]
        samples = [(torch.zeros(3, 1, 4), truth) for truth in truths][dist.rank :: dist.world_size]
        print(f"rank {dist.rank}: {measure_pseudo_labels([lambda _: logits], samples, dist)}", flush=True)
        stop()
        return 0

    if __name__ == "__main__":
        run_main(main)
"""


def test_ranks_share_the_images(tmp_path: Path) -> None:
    out = launch_script(tmp_path, SHARED)
    expected = str({"pseudo_kept": 1.0, "pseudo_accuracy_all": 7 / 11, "pseudo_accuracy": 7 / 11})
    assert f"rank 0: {expected}" in out
    assert f"rank 1: {expected}" in out
