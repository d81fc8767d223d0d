"""The recorded cases of data and evaluation: their inputs to our public functions, our outputs under their names."""

from __future__ import annotations

import hashlib
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.config import build
from common.data.dataset_yaml import load_spec
from common.data.files import voc_colormap
from common.data.lists import parse_entries
from common.data.safe_pickle import load_permutation
from common.measure.evaluation import Evaluation, Refine, evaluate
from common.measure.metrics import ConfusionMatrix
from common.models.deeplab import upsample
from projects.s4gan_mlmt.class_flags import read_flags
from projects.s4gan_mlmt.compat.metrics import (
    original_iou,
    original_miou,
    printed_text,
    progress_line,
    result_text,
)
from projects.s4gan_mlmt.compat.pictures import original_palette, prediction_writer
from projects.s4gan_mlmt.config import Config, Pipeline
from projects.s4gan_mlmt.data import train_transform
from projects.s4gan_mlmt.evaluation import original_protocol
from projects.s4gan_mlmt.mlmt.fusion import Fusion, fuse, kept_classes
from projects.s4gan_mlmt.training_split import split_by_permutation
from projects.s4gan_mlmt.transforms import (
    CityscapesEvaluation,
    CityscapesTransform,
    ContextEvaluation,
    ContextTransform,
)
from splits.pictures import colorize
from splits.prepare.pascal_context import to_classes
from tests.golden_runner import Adapter


class Replay:
    """Recorded draws in the place of a generator; asking for more, or of another kind, fails."""

    def __init__(self, draws: Iterable[float]) -> None:
        self.draws = [float(draw) for draw in draws]

    def random(self) -> float:
        draw = self.draws.pop(0)
        assert 0 <= draw < 1
        return draw

    def randint(self, a: int, b: int, /) -> int:
        draw = self.draws.pop(0)
        assert draw == int(draw)
        assert a <= draw <= b
        return int(draw)


def settings(pipeline: Pipeline, crop: np.ndarray | None = None, **data: Any) -> Config:
    size = {} if crop is None else {"crop_size": crop.tolist()}
    return build(Config, {"data": {"dataset": "voc", "split": "full", "pipeline": pipeline, **size, **data}})


def rgb(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[..., ::-1])


# --- samples ---------------------------------------------------------------------------------------------------


def voc_sample(case: Any) -> dict[str, Any]:
    flags = {"random_scale": bool(case["in_scale"]), "random_mirror": bool(case["in_mirror"])}
    draws = Replay(case["in_draws"])
    transform = train_transform(settings("voc", case["in_crop"], **flags))
    image, label = transform(rgb(case["in_image"]), case["in_label"], draws)  # type: ignore[arg-type]
    assert not draws.draws
    return {
        "out_image": image.numpy(),
        "out_label": label.numpy().astype(np.float32),
        "out_size": np.array(case["in_image"].shape),
    }


def context_train(case: Any) -> dict[str, Any]:
    crop = int(case["in_crop"])
    published = train_transform(settings("pascal_context"))
    assert isinstance(published, ContextTransform)
    transform = ContextTransform(
        (crop, crop), int(case["in_base"]), published.statistics, published.pad_label
    )
    draws = Replay(case["in_draws"])
    picture, _ = transform.picture(case["in_rgb"], case["in_mask"], draws)
    assert not draws.draws
    image, label = transform(case["in_rgb"], case["in_mask"], Replay(case["in_draws"]))
    return {"out_rgb": np.asarray(picture), "out_mask": label.numpy(), "out_image": image.numpy()}


def context_val(case: Any) -> dict[str, Any]:
    transform = ContextEvaluation(int(case["in_crop"]))
    image, label = transform(case["in_rgb"], case["in_mask"])
    picture, _ = transform.picture(case["in_rgb"], case["in_mask"])
    return {"out_rgb": np.asarray(picture), "out_mask": label.numpy(), "out_image": image.numpy()}


def context_label_map(case: Any) -> dict[str, Any]:
    found = to_classes(case["in_ids"], rest_is_background=False, where="the recording")
    assert np.array_equal(
        to_classes(case["in_table"], rest_is_background=False, where="the table"), np.arange(60)
    )
    return {"out_labels": found}


def train_ids(ids: np.ndarray) -> np.ndarray:
    """Stored label ids decoded as the dataset does, void written as the original's 250."""
    table = next(label.lut for label in load_spec("cityscapes").labels if "_labelIds" in label.pattern)
    decoded = table[ids]
    return np.where(decoded == 255, np.uint8(250), decoded)


def city_pair(case: Any) -> tuple[np.ndarray, np.ndarray]:
    height, width = case["in_size"].tolist()
    grown = [
        case[key].repeat(16, axis=0).repeat(16, axis=1)[:height, :width]
        for key in ("in_grid", "in_label_grid")
    ]
    return np.ascontiguousarray(grown[0]), train_ids(grown[1])


def city_outputs(image: Tensor, label: Tensor) -> dict[str, Any]:
    return {
        "out_image": image[:, ::8, ::8].numpy(),
        "out_label": label[::8, ::8].numpy(),
        "out_mean": image.double().mean(dim=(1, 2)).numpy(),
        "out_hist": np.bincount(label.flatten().numpy(), minlength=256),
        "out_shape": np.array(image.shape),
    }


def city_train(case: Any) -> dict[str, Any]:
    transform = train_transform(settings("cityscapes", case["out_shape"][1:]))
    assert isinstance(transform, CityscapesTransform)
    draws = Replay(case["in_draws"])
    outputs = city_outputs(*transform(*city_pair(case), draws))
    assert not draws.draws
    return outputs


def city_val(case: Any) -> dict[str, Any]:
    rows, cols = case["out_shape"][1:].tolist()
    return city_outputs(*CityscapesEvaluation((rows, cols))(*city_pair(case)))


def city_label_map(case: Any) -> dict[str, Any]:
    return {"out_labels": train_ids(case["in_ids"])}


# --- splits and lists ------------------------------------------------------------------------------------------


def split_indices(case: Any) -> dict[str, Any]:
    permutation = load_permutation(case["in_pickle"].tobytes(), "the recording")
    places = [str(i) for i in range(len(permutation))]
    labeled, unlabeled = split_by_permutation(places, permutation, float(case["in_ratio"]))
    rows = zip(case["in_len"].tolist(), case["in_ratios"].tolist(), strict=True)
    counts = [len(split_by_permutation(range(n), range(n), ratio)[0]) for n, ratio in rows]  # type: ignore[arg-type]
    return {
        "out_labelled": np.array([int(name) for name in labeled]),
        "out_unlabelled": np.array([int(name) for name in unlabeled]),
        "out_count": np.array(counts),
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def list_facts(case: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    ids: dict[str, list[str]] = {}
    for name in ("train_aug", "val", "train_img", "val_img"):
        entries = parse_entries(case[f"in_{name}"].tobytes().decode(), name)
        # the recording keeps the lines of the image lists as they are, with their endings
        lines = [entry.image for entry in entries]
        ids[name] = [entry.id for entry in entries]
        out |= {f"out_{name}_count": len(lines), f"out_{name}_sha256": sha256("\n".join(lines).encode())}
    flags: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train", "val"):
            path = Path(folder) / f"{name}_label.txt"
            path.write_bytes(case[f"in_{name}_label"].tobytes())
            flags[name] = read_flags(path).astype("<i8")
            out |= {
                f"out_{name}_label_colsum": flags[name].sum(axis=0),
                f"out_{name}_label_sha256": sha256(flags[name].tobytes()),
            }
    splits = {}
    for name in ("voc", "pc", "city"):
        splits[name] = load_permutation(case[f"in_split_{name}"].tobytes(), name)
        out |= {
            f"out_split_{name}_len": len(splits[name]),
            f"out_split_{name}_first": splits[name][:10],
            f"out_split_{name}_sha256": sha256(splits[name].astype("<i8").tobytes()),
        }
    labeled, _ = split_by_permutation(ids["train_aug"], splits["voc"], float(case["in_ratio"]))
    positions = case["in_positions"]
    assert ids["train_img"] == ids["train_aug"]
    return out | {
        "out_ids": np.array([ids["train_aug"][i] for i in positions]),
        "out_labels": flags["train"][positions],
        "out_labelled_count": len(labeled),
        "out_labelled_sha256": sha256("\n".join(labeled).encode()),
        "out_labelled_first": np.array(labeled[: len(case["out_labelled_first"])]),
    }


# --- evaluation ------------------------------------------------------------------------------------------------


def count_pixels(pred: Tensor, label: Tensor, classes: int) -> ConfusionMatrix:
    """Counts with all labels beyond the classes ignored, as the datasets here decode them."""
    matrix = ConfusionMatrix(classes)
    matrix.update(pred, label.where(label < classes, 255))
    return matrix


def miou(case: Any) -> dict[str, Any]:
    pred, label = torch.from_numpy(case["in_pred"]), torch.from_numpy(case["in_gt"])
    matrix = count_pixels(pred, label, int(case["in_num_classes"]))
    counts = matrix.intersection_union()
    iou = original_iou(*counts).numpy()
    return {
        "out_matrix": matrix.counts.numpy().astype(np.float64),
        "out_iou": np.nan_to_num(iou, nan=0.0),
        "out_undefined": np.isnan(iou),
        "out_mean": original_miou(*counts),
    }


def colour_map(case: Any) -> dict[str, Any]:
    palette = original_palette()
    assert np.array_equal(palette[:22], voc_colormap(22))
    colors = colorize(case["in_map"], palette)
    return {"out_map": palette[: int(case["in_n"])], "out_rgb": colors.transpose(2, 0, 1)}


def fusion(case: Any) -> dict[str, Any]:
    logits = torch.from_numpy(case["in_logits"])[None]
    fused = fuse(logits, kept_classes(case["in_row"][None]))
    return {"out_logits": fused[0].numpy(), "out_pred": fused[0].argmax(dim=0).numpy()}


def rule_tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    """What the recordings give a parameter: a convolution's weight or a bias."""
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    values = rng.randn(*shape)
    values = 0.1 * values if len(shape) == 1 else values * np.sqrt(2 / np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))


class Recorder:
    """Predictions of an evaluation: the printed progress, and the saved picture of the first image."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines, self.write = folder, list[str](), prediction_writer(folder)
        self.seen = 0

    def __call__(self, name: str, scores: Tensor, pred: Tensor) -> None:
        line = progress_line(self.seen)
        self.lines += [] if line is None else [line]
        self.write(name, scores, pred)
        self.seen += 1


def evaluate_voc(case: Any) -> dict[str, Any]:
    spec = load_spec("voc")
    classes = spec.num_classes
    weight, bias = rule_tensor("head.weight", (classes, 3, 9, 9)), rule_tensor("head.bias", (classes,))

    def forward(image: Tensor) -> Tensor:
        return upsample(F.conv2d(image, weight, bias, stride=8, padding=4), image.shape[-2:])

    cfg = settings("voc")
    how = original_protocol(cfg)
    transform = how.transform(cfg.data)
    numbers = range(sum(key.startswith("in_image") for key in case.arrays))
    ids = [f"image{i}" for i in numbers]
    samples = []
    for i, name in enumerate(ids):
        x, y = transform(rgb(case[f"in_image{i}"]), case[f"in_label{i}"], None)  # type: ignore[arg-type]
        samples.append((x[None], y[None], name))
    out: dict[str, Any] = {}
    refines: dict[str, Refine | None] = {"plain": None, "fused": Fusion(ids, case["in_mlmt"])}
    for kind, refine in refines.items():
        with tempfile.TemporaryDirectory() as folder:
            recorder = Recorder(Path(folder))
            found = evaluate(forward, samples, classes, how, on_image=recorder, refine=refine)
            with Image.open(Path(folder) / f"{ids[0]}.png") as picture:
                saved = np.asarray(picture.convert("RGB"))
        printed = "\n".join([*recorder.lines, printed_text(found, spec.classes)])
        out |= {
            f"out_{kind}_matrix": matrix_of(forward, samples, how, refine, classes),
            f"out_{kind}_mean": mean_of(found),
            f"out_{kind}_result_txt": np.array(result_text(found, spec.classes).split("\n")),
            f"out_{kind}_stdout": np.array(printed.split("\n")),
            f"out_{kind}_rgb0": saved,
        }
    return out


def matrix_of(
    forward: Any, samples: list[tuple[Tensor, Tensor, str]], how: Any, refine: Refine | None, classes: int
) -> np.ndarray:
    """Pixel counts over the predictions of an evaluation, which itself hands out intersections and unions."""
    labels = {name: y[0] for _, y, name in samples}
    total = np.zeros((classes, classes))

    def add(name: str, scores: Tensor, pred: Tensor) -> None:
        total[...] += count_pixels(pred, labels[name], classes).counts.numpy()

    evaluate(forward, samples, classes, how, on_image=add, refine=refine)
    return total


def mean_of(found: Evaluation) -> float:
    mean = original_miou(torch.tensor(found.intersection), torch.tensor(found.union))
    assert abs(mean - found.miou) < 1e-12
    return mean


ADAPTERS: dict[str, Adapter] = {
    **{f"voc_sample_{kind}_{i}": voc_sample for kind in ("crop", "pad", "scale") for i in (0, 1)},
    **{f"context_train_{i}": context_train for i in (0, 1, 2)},
    **{f"context_val_{i}": context_val for i in (0, 1, 2)},
    "context_label_map": context_label_map,
    "city_train_0": city_train,
    "city_train_1": city_train,
    "city_val": city_val,
    "city_label_map": city_label_map,
    "split_indices": split_indices,
    "list_facts": list_facts,
    "miou": miou,
    "miou_absent": miou,
    "miou_all_ignored": miou,
    "colour_map": colour_map,
    "fusion": fusion,
    "evaluate_voc": evaluate_voc,
}
