"""The evaluator: protocols, sharding, failures."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import DataConfig, EvalConfig
from common.data.dataset_yaml import load_spec
from common.distributed import Dist
from common.errors import UserError
from common.measure.evaluation import (
    Protocol,
    evaluate,
    evaluate_list,
    evaluation_samples,
    protocol_of,
)
from common.measure.metrics import ConfusionMatrix, mean_iou
from tests.tiny import write_dataset

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 3


def forward(x: torch.Tensor) -> torch.Tensor:
    """Scores (B, 3, h, w) that favour the largest channel, with a pull to class 1 near the upper left corner."""
    scores = x.clone()
    scores[:, 1, :2, :2] += 1
    return scores


def samples(sizes=((8, 9), (12, 7), (5, 5), (9, 9), (6, 14))):
    rng = np.random.default_rng(0)
    result = []
    for i, size in enumerate(sizes):
        label = rng.integers(0, CLASSES, size)
        image = np.eye(CLASSES)[label].transpose(2, 0, 1) + rng.normal(0, 0.7, (CLASSES, *size))
        label[rng.random(size) < 0.1] = 255
        result.append((torch.from_numpy(image).float()[None], torch.from_numpy(label)[None], f"id{i}"))
    return result


def expected_miou(pairs) -> float:
    matrix = ConfusionMatrix(CLASSES)
    for pred, label in pairs:
        matrix.update(pred, label)
    return mean_iou(*matrix.intersection_union())


def test_whole_images():
    data = samples()
    seen = {}

    def keep(name, scores, pred):
        seen[name] = pred
        assert torch.equal(scores.argmax(0), pred)
        assert scores.shape[1:] == pred.shape

    result = evaluate(forward, data, CLASSES, Protocol(), on_image=keep)
    pairs = [(forward(image).argmax(1), label) for image, label, _ in data]
    assert result.miou == expected_miou(pairs)
    assert list(seen) == [name for _, _, name in data]
    assert all(torch.equal(seen[name], pred[0]) for (pred, _), (_, _, name) in zip(pairs, data, strict=True))
    assert result.num_images == 5
    assert result.num_nonfinite == 0
    right = sum(int((pred == label).sum()) for pred, label in pairs)
    labeled = sum(int((label != 255).sum()) for _, label in pairs)
    assert result.pixel_accuracy == right / labeled
    assert result.iou == tuple(
        i / (u + 1e-10) for i, u in zip(result.intersection, result.union, strict=True)
    )


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_center_crop_pads_with_class_zero_or_ignore(batch_size):
    data = samples()
    for pad_label in (0, 255):
        protocol = Protocol(kind="center_crop", crop_size=(8, 8), pad_label=pad_label, batch_size=batch_size)
        pairs = []
        for image, label, _ in data:
            h, w = label.shape[-2:]
            x, y = torch.zeros(1, 3, max(h, 8), max(w, 8)), torch.full((1, max(h, 8), max(w, 8)), pad_label)
            top, left = max(8 - h, 0) // 2, max(8 - w, 0) // 2
            x[..., top : top + h, left : left + w], y[..., top : top + h, left : left + w] = image, label
            r, c = max(h - 8, 0) // 2, max(w - 8, 0) // 2
            x, y = x[..., r : r + 8, c : c + 8], y[..., r : r + 8, c : c + 8]
            pairs.append((forward(x).argmax(1), y))
        result = evaluate(forward, data, CLASSES, protocol)
        assert result.miou == expected_miou(pairs)
        assert result.num_images == 5


def test_protocols_differ_where_they_should():
    data = samples()
    whole = evaluate(forward, data, CLASSES, Protocol()).miou
    window = evaluate(forward, data, CLASSES, Protocol(kind="sliding_window", crop_size=(6, 6))).miou
    flipped = evaluate(forward, data, CLASSES, Protocol(kind="multi_scale_flip", flip=True)).miou
    assert len({whole, window, flipped}) == 3
    plain = Protocol(kind="multi_scale_flip", crop_size=(6, 6))
    assert evaluate(forward, data, CLASSES, plain).miou == window
    large = Protocol(kind="sliding_window", crop_size=(6, 6), batch_size=3)
    assert evaluate(forward, data, CLASSES, large).miou == window


def test_absent_class_in_both_figures():
    label = torch.tensor([[[0, 0], [1, 255]]])
    image = torch.nn.functional.one_hot(label.clamp(max=2), 3).permute(0, 3, 1, 2).float()
    result = evaluate(lambda x: x, [(image, label, "a")], 3, Protocol())
    assert result.miou == pytest.approx(2 / 3)
    assert result.miou_present == pytest.approx(1.0)
    assert result.iou == pytest.approx((1.0, 1.0, 0.0))
    assert result.union == (2, 1, 0)


def test_autocast_reaches_the_forward_and_no_graph_is_kept():
    weight = torch.eye(3)[:, :, None, None].requires_grad_()
    seen = []

    def convolution(x):
        y = torch.nn.functional.conv2d(x, weight)
        seen.append((y.dtype, y.requires_grad))
        return y

    evaluate(convolution, samples(), CLASSES, Protocol(), precision="bf16")
    assert set(seen) == {(torch.bfloat16, False)}
    seen.clear()
    evaluate(convolution, samples(), CLASSES, Protocol())
    assert set(seen) == {(torch.float32, False)}


def test_images_with_broken_scores_are_counted():
    data = samples()
    data[1][0][0, 0, 0, 0] = math.nan
    data[2][0][0, 1, 3, 3] = math.inf
    assert evaluate(forward, data, CLASSES, Protocol()).num_nonfinite == 2
    cropped = Protocol(kind="center_crop", crop_size=(12, 14), batch_size=5)
    assert evaluate(forward, data, CLASSES, cropped).num_nonfinite == 2


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            (torch.zeros(1, 3, 4, 5), torch.zeros(1, 5, 4, dtype=torch.long), "im7"),
            "im7: image .4, 5. and label .5, 4.",
        ),
        (
            (torch.zeros(1, 4, 4, 5), torch.zeros(1, 4, 5, dtype=torch.long), "im7"),
            "scores 4 classes, the dataset has 3",
        ),
        (
            (torch.zeros(1, 3, 4, 5), torch.full((1, 4, 5), 3), "im7"),
            r"20 pixels have a label .* outside 0\.\.2",
        ),
    ],
)
def test_images_that_do_not_fit(sample, message):
    with pytest.raises(UserError, match=message):
        evaluate(lambda x: x, [sample], CLASSES, Protocol())


def test_no_images():
    with pytest.raises(UserError, match="no image to evaluate"):
        evaluate(forward, [], CLASSES, Protocol())


def test_a_step_beyond_the_window_is_refused():
    with pytest.raises(UserError, match="leave pixels out"):
        Protocol(kind="sliding_window", crop_size=(8, 8), stride=(9, 4))


WORKER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from tools.processes import start, stop
from common.measure.evaluation import Protocol, evaluate
from test_evaluation import CLASSES, forward, samples
dist = start("cpu")
result = evaluate(forward, samples()[dist.rank :: dist.world_size], CLASSES, Protocol(), dist=dist)
print(result.miou.hex(), result.num_images, result.intersection)
stop()
"""


def test_two_ranks_give_the_result_of_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = WORKER.format(root=str(ROOT), tests=str(ROOT / "tests"))
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    alone = evaluate(forward, samples(), CLASSES, Protocol())
    assert outputs == [f"{alone.miou.hex()} 5 {alone.intersection}"] * 2


# what a configuration says


def data_config(**values) -> DataConfig:
    return DataConfig(dataset="any", split="any", crop_size=(32, 48), workers=0, **values)


def test_each_occasion_has_its_protocol():
    settings = EvalConfig(
        protocol="multi_scale_flip",
        during_training="sliding_window",
        scales=(0.5, 1.0),
        flip=True,
        base_size=100,
    )
    script = protocol_of(settings, data_config(), "script")
    assert (script.kind, script.scales, script.flip, script.base_size) == (
        "multi_scale_flip",
        (0.5, 1.0),
        True,
        100,
    )
    assert script.crop_size is None
    training = protocol_of(settings, data_config(), "training")
    assert (training.kind, training.scales) == ("sliding_window", (1.0,))
    assert (training.flip, training.base_size) == (False, None)
    assert training.crop_size == (32, 48)


def test_centre_crops_have_one_scale_and_the_border_asked_for():
    settings = EvalConfig(protocol="center_crop", scales=(0.5, 1.0), base_size=100, crop_size=(8, 8))
    for when in ("training", "script"):
        how = protocol_of(settings, data_config(), when, 0)
        assert (how.kind, how.crop_size, how.scales, how.pad_label) == ("center_crop", (8, 8), (1.0,), 0)
        assert protocol_of(settings, data_config(), when).pad_label == 255


# a list of a dataset


def test_a_list_is_measured_as_its_images(tmp_path):
    spec = load_spec(str(write_dataset(tmp_path / "farm")))
    items = spec.read_list("val")
    data = data_config(mean=(10.0, 20.0, 30.0), std=(50.0, 60.0, 70.0))
    taken = list(evaluation_samples(data, spec, items, Dist()))
    assert [name for _, _, name in taken] == [item.id for item in items]
    pairs, seen = [], []
    for item, (image, label, _) in zip(items, taken, strict=True):
        x = (spec.load_image(item) - np.array(data.mean)) / np.array(data.std)
        np.testing.assert_allclose(image[0].permute(1, 2, 0).numpy(), x, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(label[0].numpy(), spec.load_label(item))
        pairs.append((forward(image).argmax(1), label))
    found = evaluate_list(
        forward,
        data,
        spec,
        "val",
        Protocol(),
        Dist(),
        precision="fp32",
        on_image=lambda *one: seen.append(one[0]),
    )
    assert found.num_images == 4
    assert found.miou == pytest.approx(expected_miou(pairs), abs=1e-12)
    assert seen == [item.id for item in items]


def test_every_process_takes_its_share(tmp_path):
    spec = load_spec(str(write_dataset(tmp_path / "farm")))
    items = spec.read_list("val")
    shares = [
        [name for *_, name in evaluation_samples(data_config(), spec, items, Dist(rank=rank, world_size=3))]
        for rank in range(3)
    ]
    assert sorted(name for share in shares for name in share) == sorted(item.id for item in items)


def test_an_evaluation_shows_how_far_it_is_on_a_terminal_alone(tmp_path, monkeypatch, capsys):
    spec = load_spec(str(write_dataset(tmp_path / "farm")))
    items = spec.read_list("val")
    list(evaluation_samples(data_config(), spec, items, Dist()))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    list(evaluation_samples(data_config(), spec, items, Dist()))
    assert f"evaluation:   0%|          | 0/{len(items)} [00:00<?" in capsys.readouterr().err


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_list_is_measured_in_the_named_precision(tmp_path, precision, dtype):
    spec, seen = load_spec(str(write_dataset(tmp_path / "farm"))), set()
    layer = torch.nn.Conv2d(3, 3, 1)

    def noted(x):
        out = layer(x)
        seen.add(out.dtype)
        return out

    evaluate_list(noted, data_config(), spec, "val", Protocol(), Dist(), precision=precision)
    assert seen == {dtype}


def test_a_broken_file_ends_the_evaluation_even_where_training_skips_it(tmp_path):
    spec = load_spec(str(write_dataset(tmp_path / "farm")))
    spec.read_list("val")[1].image.write_bytes(b"")
    with pytest.raises(UserError, match=r"p017\.jpg"):
        evaluate_list(
            forward, data_config(on_error="skip"), spec, "val", Protocol(), Dist(), precision="fp32"
        )


def test_a_protocol_may_prepare_images_its_own_way(tmp_path: Path) -> None:
    class Half(Protocol):
        def transform(self, data):
            plain = super().transform(data)

            def halved(image, label, rng):
                return plain(
                    np.ascontiguousarray(image[::2, ::2]), np.ascontiguousarray(label[::2, ::2]), rng
                )

            return halved

    spec = load_spec(str(write_dataset(tmp_path / "farm")))
    data = DataConfig(dataset="farm", split="few", workers=0)
    items = spec.read_list("val")
    taken = list(evaluation_samples(data, spec, items, Dist(), Half()))
    whole = list(evaluation_samples(data, spec, items, Dist()))
    for (x, y, name), (x_whole, y_whole, same_name) in zip(taken, whole, strict=True):
        assert name == same_name
        assert torch.equal(x, x_whole[..., ::2, ::2])
        assert torch.equal(y, y_whole[..., ::2, ::2])
    found = evaluate_list(forward, data, spec, "val", Half(), Dist(), precision="fp32")
    expected = evaluate(forward, taken, CLASSES, Protocol())
    assert (found.intersection, found.union) == (expected.intersection, expected.union)


def test_scores_can_be_refined_before_the_best_class_is_taken() -> None:
    data = samples()
    seen = []

    def refine(ids, scores):
        seen.extend(ids)
        return scores.roll(1, dims=1)

    found = evaluate(forward, data, CLASSES, Protocol(), refine=refine)
    assert seen == [name for *_, name in data]
    shifted = [((forward(x).argmax(dim=1) + 1) % CLASSES, y) for x, y, _ in data]
    assert found.miou == expected_miou(shifted)
    crops = Protocol(kind="center_crop", crop_size=(4, 4), batch_size=3)
    both = evaluate(forward, data, CLASSES, crops, refine=refine)
    assert both.num_images == len(data)
    assert seen[len(data) :] == seen[: len(data)]
