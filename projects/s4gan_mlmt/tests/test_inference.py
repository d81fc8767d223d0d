"""The authors' evaluations through the shared evaluator, alone and fused, and the pictures they save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.config import build
from common.data.dataset_yaml import load_spec
from common.data.files import voc_colormap
from common.distributed import Dist
from common.errors import UserError
from common.measure.evaluation import (
    Evaluation,
    Protocol,
    Refine,
    evaluate,
    evaluate_list,
    evaluation_samples,
)
from projects.s4gan_mlmt.compat.pictures import original_palette, prediction_writer
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.evaluation import OriginalProtocol, network_input, original_protocol
from projects.s4gan_mlmt.mlmt.fusion import Fusion, fuse, kept_classes
from tests.tiny import write_dataset

PALETTE = torch.tensor([[90, 140, 90], [60, 90, 200], [190, 60, 50]]).float()


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "farm")


def config(dataset: Path | str, **data: Any) -> Config:
    return build(Config, {"data": {"dataset": str(dataset), "split": "few", "workers": 0, **data}})


class Nearest:
    """Scores of a pixel by the distance of its colour to the class colours, on normalized images of a pipeline."""

    def __init__(self, cfg: Config) -> None:
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (cfg.data.mean, cfg.data.std))
        self.sizes: list[tuple[int, ...]] = []

    def __call__(self, image: Tensor) -> Tensor:
        self.sizes.append(tuple(image.shape))
        color = image * self.std + self.mean
        return -torch.stack([(color - one.view(1, 3, 1, 1)).norm(dim=1) for one in PALETTE], dim=1)


def measured(cfg: Config, forward: Any, how: Protocol, refine: Refine | None = None) -> Evaluation:
    spec = load_spec(cfg.data.dataset)
    return evaluate_list(forward, cfg.data, spec, "val", how, Dist(), precision="fp32", refine=refine)


def test_which_protocol(farm: Path) -> None:
    for pipeline in ("voc", "pascal_context", "cityscapes"):
        how = original_protocol(config(farm, pipeline=pipeline))
        assert isinstance(how, OriginalProtocol)
        assert (how.kind, how.pipeline, how.epsilon) == ("original", pipeline, 0.0)
        assert how.crop_size is None
    assert original_protocol(config(farm, pipeline="house")) == Protocol(kind="whole_image")


def test_voc_images_are_padded_to_505_and_cut_again(farm: Path) -> None:
    cfg = config(farm)
    forward = Nearest(cfg)
    found = measured(cfg, forward, original_protocol(cfg))
    assert set(forward.sizes) == {(1, 3, 505, 505)}
    whole = measured(cfg, Nearest(cfg), Protocol(kind="whole_image", epsilon=0.0))
    assert found.intersection == whole.intersection  # a network that sees single pixels cannot tell
    assert found.union == whole.union
    assert found.miou > 0.5


def test_voc_padding_lies_below_and_right_and_is_the_mean() -> None:
    image = torch.rand(1, 3, 40, 600) + 1
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    scores = OriginalProtocol().scores(forward, image)
    assert torch.equal(scores, image)
    assert seen[0].shape == (1, 3, 505, 600)  # longer images stay as long
    assert torch.equal(seen[0][..., :40, :], image)
    assert bool((seen[0][..., 40:, :] == 0).all())


def test_context_is_measured_on_the_centre_512(farm: Path) -> None:
    cfg = config(farm, pipeline="pascal_context")
    forward = Nearest(cfg)
    found = measured(cfg, forward, original_protocol(cfg))
    assert set(forward.sizes) == {(1, 3, 512, 512)}
    assert found.num_images == 4
    confusion = sum(found.union) - (4 * 512 * 512 - sum(found.intersection))
    assert confusion == 4 * 512 * 512  # every pixel counts
    assert found.miou > 0.5


def test_cityscapes_is_measured_at_half_size_in_blue_green_red(farm: Path) -> None:
    cfg = config(farm, pipeline="cityscapes")
    rgb = Nearest(cfg)
    bgr_seen: list[Tensor] = []

    def network(x: Tensor) -> Tensor:
        """Trained on blue, green, red."""
        bgr_seen.append(x)
        return rgb(x.flip(1))

    forward = network_input(network, "cityscapes")
    found = measured(cfg, forward, original_protocol(cfg))
    assert set(rgb.sizes) == {(1, 3, 512, 1024)}
    assert found.miou > 0.5
    spec = load_spec(str(farm))
    how = original_protocol(cfg)
    samples = list(evaluation_samples(cfg.data, spec, spec.read_list("val"), Dist(), how))
    assert torch.equal(bgr_seen[0], samples[0][0].flip(1))
    shared = measured(cfg, forward, Protocol(kind="whole_image"))  # the channels are right there, too
    assert shared.miou > 0.5
    assert network_input(network, "voc") is network


def test_fusion_in_the_evaluator(farm: Path) -> None:
    cfg = config(farm)
    spec = load_spec(str(farm))
    ids = [item.id for item in spec.read_list("val")]
    scores = np.tile([0.9, 0.1, 0.9], (len(ids), 1))
    scores[1] = 0.9
    for mode in ("zero_logits", "mask"):
        seen: dict[str, Tensor] = {}

        def keep(name: str, _scores: Tensor, pred: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen[name] = pred

        fusion = Fusion(ids, scores, mode)  # type: ignore[arg-type]
        how = original_protocol(cfg)
        evaluate_list(
            Nearest(cfg), cfg.data, spec, "val", how, Dist(), precision="fp32", refine=fusion, on_image=keep
        )
        for x, _, name in evaluation_samples(cfg.data, spec, spec.read_list("val"), Dist(), how):
            row = kept_classes(scores[ids.index(name)][None])
            expected = fuse(how.scores(Nearest(cfg), x), row, mode)  # type: ignore[arg-type]
            assert torch.equal(seen[name], expected.argmax(dim=1)[0])
        if mode == "mask":
            assert all(not bool((seen[name] == 1).any()) for name in ids if name != ids[1])
    # a distance is never positive, so a class at 0 wins everywhere: the quirk at its worst
    zeroed = measured(cfg, Nearest(cfg), original_protocol(cfg), Fusion(ids, scores))
    masked = measured(cfg, Nearest(cfg), original_protocol(cfg), Fusion(ids, scores, "mask"))
    plain = measured(cfg, Nearest(cfg), original_protocol(cfg))
    assert zeroed.miou < masked.miou < plain.miou


def test_refined_scores_are_those_handed_out() -> None:
    image, label = torch.rand(1, 3, 4, 5), torch.zeros(1, 4, 5, dtype=torch.int64)
    kept: list[Tensor] = []

    def refine(ids: Any, scores: Tensor) -> Tensor:
        assert list(ids) == ["a"]
        return -scores

    found = evaluate(
        lambda x: x, [(image, label, "a")], 3, Protocol(), refine=refine,
        on_image=lambda name, scores, pred: kept.append(scores),
    )  # fmt: skip
    assert torch.equal(kept[0], -image[0])
    assert found.num_images == 1
    with pytest.raises(UserError, match="no scores for image 'a'"):
        evaluate(lambda x: x, [(image, label, "a")], 3, Protocol(), refine=Fusion(["b"], np.ones((1, 3))))


# --- pictures --------------------------------------------------------------------------------------------------


def test_colours() -> None:
    palette = original_palette()
    assert np.array_equal(palette[:22], voc_colormap(22))
    assert palette[21].tolist() == [128, 64, 128]
    assert not palette[22:255].any()
    assert palette[255].tolist() == [255, 255, 255]


def test_predictions_are_class_ids_in_colours(tmp_path: Path) -> None:
    pred = torch.tensor([[0, 1], [20, 15]])
    prediction_writer(tmp_path / "new")("2007_000033", torch.zeros(21, 2, 2), pred)
    with Image.open(tmp_path / "new/2007_000033.png") as file:
        assert np.array_equal(np.asarray(file), pred.numpy())
        assert np.array_equal(np.asarray(file.convert("RGB")), voc_colormap(22)[pred.numpy()])
    prediction_writer(tmp_path, [[1, 2, 3], [4, 5, 6]])("other", torch.zeros(2, 1, 2), torch.tensor([[1, 0]]))
    with Image.open(tmp_path / "other.png") as file:
        assert np.asarray(file.convert("RGB")).tolist() == [[[4, 5, 6], [1, 2, 3]]]
