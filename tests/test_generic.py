"""The network that all papers share: encoders of timm, their weights, decoders, and every method with it."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common.config import OptimConfig, load_config
from common.data.files import read_rgb
from common.distributed import Dist
from common.errors import UserError
from common.models.deeplab import SegmentationNetwork, pad_to_multiple, upsample
from common.models.encoders import LITE0, facts_of
from common.models.generic import build_generic
from common.models.placing import with_sync_bn
from common.models.pretrained import read_weights
from common.numerics.optim import build_optimizer, encoder_and_heads
from tests.each import for_each
from tests.predictions import mask
from tests.runs import Runs, assert_same_run, give_settings_back, result
from tools.weights import by_order, load_encoders, pretrained_state

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = {  # every kind: dilated, staged, a plain transformer
    "lite0": {"backbone": LITE0, "output_stride": 16, "weights": "imagenet"},
    "convnext": {"backbone": "test_convnext", "decoder": "fpn"},
    "vit": {"backbone": "test_vit", "decoder": "dpt"},
}
settings_back = pytest.fixture(autouse=True)(give_settings_back)


def model(**values: Any) -> SimpleNamespace:
    defaults = {
        "network": "generic", "backbone": "test_efficientnet", "decoder": "deeplabv3plus", "weights": "none",
        "output_stride": 16, "inner_planes": 32, "dilations": (1, 2, 3), "freeze_encoder": False,
    }  # fmt: skip
    return SimpleNamespace(**defaults | values)


class Lines(list[str]):
    """What a log would say."""

    info = list.append


def loaded(network: SegmentationNetwork, backbone: str, weights: str) -> str:
    """The line about weights that the encoder has taken."""
    log = Lines()
    load_encoders(model(backbone=backbone, weights=weights), [network.encoder], log)
    return log[0]


def built(seed: int = 0, **values: Any) -> SegmentationNetwork:
    torch.manual_seed(seed)
    return build_generic(model(**values), 5, return_feats=True)


def config(project: str, *overrides: str, name: str = "smoke") -> Any:
    module = importlib.import_module(f"projects.{project}.config")
    return load_config(module.Config, ROOT / "projects" / project / "configs" / f"{name}.yaml", overrides)


def generic(**values: Any) -> list[str]:
    return [
        f"model.{key}={value}" for key, value in {"network": "generic", "inner_planes": 32, **values}.items()
    ]


# --- encoders --------------------------------------------------------------------------------------------------

PHOTOS = {
    "2007_005331": {339},  # a horse: sorrel
    "2010_005160": {665, 670},  # moped, motor scooter
    "2011_000025": {779},  # school bus
    "2010_004493": {207},  # golden retriever
    "2011_000210": {820},  # steam locomotive
}


def test_the_wheel_knows_what_photos_show(shared_data: Path) -> None:
    """Weights that were mapped to wrong layers, or images of another scale, would not."""
    import timm

    network, log = timm.create_model(LITE0).eval(), Lines()
    load_encoders(model(backbone=LITE0, weights="imagenet"), [network], log, whole=True)
    assert "296 tensors used, 0 unused, 0 kept" in log[0]
    facts = facts_of(LITE0, "fpn", 32, "imagenet")
    for name, classes in PHOTOS.items():
        photo = read_rgb(next(shared_data.joinpath("voc_slice").rglob(f"{name}.jpg")))
        height, width = (round(side * 256 / min(photo.shape[:2])) for side in photo.shape[:2])
        photo = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA)
        top, left = (height - 224) // 2, (width - 224) // 2
        x = (photo[top : top + 224, left : left + 224].astype(np.float32) - facts.mean) / facts.std
        with torch.no_grad():
            scores = network(torch.from_numpy(x).float().permute(2, 0, 1)[None]).softmax(dim=1)
        assert int(scores.argmax()) in classes, name
        assert float(scores.max()) > 0.4, name


@for_each(
    ("backbone", "decoder", "weights", "expected"),
    [
        (LITE0, "deeplabv3plus", "imagenet", (16, 127.0, 128.0)),
        (LITE0, "fpn", "in1k", (32, 127.5, 127.5)),
        ("resnet50", "upernet", "imagenet", (32, 123.675, 58.395)),
        ("convnext_tiny", "segformer", "none", (32, 123.675, 58.395)),
        ("mobilenetv4_conv_small_050", "fpn", "none", (32, 127.5, 127.5)),
        ("vit_small_patch14_dinov2", "dpt", "imagenet", (14, 123.675, 58.395)),
        ("vit_small_patch16_dinov3", "dpt", "imagenet", (16, 123.675, 58.395)),
    ],
)
def test_sizes_and_statistics_follow_from_the_encoder(
    backbone: str, decoder: str, weights: str, expected: tuple[int, float, float]
) -> None:
    facts = facts_of(backbone, decoder, 16, weights)
    assert (facts.multiple, facts.mean[0], facts.std[0]) == pytest.approx(expected)


@for_each(
    ("values", "message"),
    [
        ({"backbone": "resnt50"}, "'model.backbone' is 'resnt50'; expected a name of timm's, such as resnet50"),
        ({"backbone": "mobilenetv4_conv_small"}, "which mobilenetv4_conv_small cannot feed (output_stride 16)"),
        ({"backbone": "mobilenetv4_conv_small"}, "expected fpn, upernet or segformer"),
        ({"backbone": "test_vit"}, "'model.decoder' is 'deeplabv3plus', which test_vit cannot feed"),
        ({"backbone": "test_vit"}, "; expected dpt"),
        ({"backbone": "resnet18", "decoder": "dpt"}, "; expected fpn, upernet or segformer"),
        ({"backbone": "levit_128", "decoder": "fpn"}, "; expected another backbone"),
        ({"backbone": "resnet18", "output_stride": 32}, "resnet18 cannot feed (output_stride 32); expected fpn"),
        ({"data.crop_size": "[32,40]"}, "'data.crop_size' is [32, 40]; expected multiples of 16, such as [32, 32]"),
        ({"decoder": "fpn", "inner_planes": 40}, "expected a multiple of 32 for decoder=fpn"),
        ({"freeze_encoder": "true"}, "expected pretrained weights with it"),
        ({"network": "paper", "backbone": "resnet_tiny", "freeze_encoder": "true"}, "expected model.network=generic"),
        ({"network": "paper", "backbone": "resnet_tiny", "optim.layer_decay": 0.5}, "expected model.network=generic"),
        ({"network": "paper"}, "'backbone' is 'test_efficientnet'; expected one of resnet18, "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_else(values: dict[str, Any], message: str) -> None:
    own = {key: value for key, value in values.items() if "." in key}
    network = {"backbone": "test_efficientnet", "output_stride": 16} | values
    overrides = generic(**{key: value for key, value in network.items() if key not in own})
    overrides += [f"{key}={value}" for key, value in own.items()]
    for project in ("u2pl", "cps"):
        with pytest.raises(UserError) as caught:
            config(project, *overrides)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_statistics_that_are_configured_stay(tmp_path: Path) -> None:
    """Even those that are the default of the other networks; what a run has written is configured."""
    overrides = generic(backbone=LITE0, output_stride=16, weights="imagenet")
    for project in (project for project, *_ in ONE_EACH):
        cfg = config(project, *overrides)
        assert (cfg.data.mean, cfg.data.std) == ((127.0,) * 3, (128.0,) * 3)
        own = config(project, *overrides, "data.mean=[123.675,116.28,103.53]", "data.std=[1,2,3]")
        assert (own.data.mean, own.data.std) == ((123.675, 116.28, 103.53), (1, 2, 3))
        assert config(project).data.mean == (123.675, 116.28, 103.53)


def test_s4gan_refuses_pipelines_that_normalize_in_their_own_way() -> None:
    with pytest.raises(UserError, match=r"'data.pipeline' is 'voc'.*expected house"):
        config("s4gan_mlmt", *generic(backbone=LITE0), "data.pipeline=voc")
    with pytest.raises(UserError, match=r"'mlmt.size' is \[70\]; expected multiples of 16, such as \[64\]"):
        config("s4gan_mlmt", *generic(backbone=LITE0), "mlmt.size=70")


def test_a_paper_of_its_own_does_not_wait_for_the_libraries() -> None:
    """Importing every command and reading a configuration loads none of them."""
    lines = ["import importlib, sys", "from common.config import load_config"]
    for project in ("u2pl", "brpg", "cps", "proto_consistency", "s4gan_mlmt"):
        parts = ("train", "eval", "predict")
        lines += [f"importlib.import_module('projects.{project}.{part}')" for part in parts]
        path = ROOT / "projects" / project / "configs" / "smoke.yaml"
        lines.append(
            f"load_config(importlib.import_module('projects.{project}.config').Config, {str(path)!r})"
        )
    lines += ["import tools.doctor; tools.doctor.package_lines()"]
    lines += ["print(sorted({'timm', 'segmentation_models_pytorch', 'huggingface_hub'} & set(sys.modules)))"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- weights ---------------------------------------------------------------------------------------------------


def test_tensors_by_order_must_have_the_shapes() -> None:
    mapped, source = pretrained_state(LITE0, "imagenet")
    state, _ = read_weights(source)
    assert torch.equal(mapped["conv_stem.weight"], next(iter(state.values())))
    swapped = dict(reversed(state.items()))
    for wrong in (swapped, dict(itertools.islice(state.items(), 200))):
        with pytest.raises(UserError, match="its tensors are not those of tf_efficientnet_lite0"):
            by_order(wrong, LITE0, source)


def test_without_a_network_the_message_says_what_to_bring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is then found in SSS_WEIGHTS; nothing is fetched twice."""
    import safetensors.torch

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    network = built(backbone="test_convnext", decoder="fpn")
    with pytest.raises(UserError) as caught:
        loaded(network, "test_convnext", "imagenet")
    name = "test_convnext.r160_in1k.safetensors"
    message = str(caught.value)
    assert "https://huggingface.co/timm/test_convnext.r160_in1k/resolve/main/model.safetensors" in message
    assert f"'{name}' into the folder SSS_WEIGHTS" in message
    assert "no route to host" in message
    with pytest.raises(UserError, match=r"'resnet50.tv_in1k.safetensors' into the folder SSS_WEIGHTS"):
        pretrained_state("resnet50", "imagenet")
    other = built(seed=1, backbone="test_convnext", decoder="fpn")
    safetensors.torch.save_file(other.encoder.model.state_dict(), tmp_path / name)
    monkeypatch.setenv("SSS_WEIGHTS", str(tmp_path))
    assert str(tmp_path / name) in loaded(network, "test_convnext", "imagenet")
    assert all(map(torch.equal, network.encoder.parameters(), other.encoder.parameters()))


def test_files_and_checkpoints_of_runs(tmp_path: Path) -> None:
    source, target = built(seed=1), built()
    states = {
        "timm": source.encoder.model.state_dict() | {"classifier.weight": torch.zeros(2, 2)},
        "run": {"networks": {"student": source.state_dict()}},
    }
    for name, state in states.items():
        torch.save(state, tmp_path / f"{name}.pth")
        target = built()
        loaded(target, "test_efficientnet", str(tmp_path / f"{name}.pth"))
        assert all(map(torch.equal, target.encoder.parameters(), source.encoder.parameters()))
    torch.save(built(backbone="test_convnext").encoder.model.state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="are not in the file"):
        loaded(target, "test_efficientnet", str(tmp_path / "other.pth"))
    (tmp_path / "broken.safetensors").write_bytes(b"no such thing")
    with pytest.raises(UserError, match="is damaged or not a file of tensors"):
        loaded(target, "test_efficientnet", str(tmp_path / "broken.safetensors"))


# --- the network -----------------------------------------------------------------------------------------------


@for_each(
    ("backbone", "decoder", "size", "stride"),
    [
        ("test_efficientnet", "deeplabv3plus", 32, 4),
        ("test_convnext", "fpn", 64, 4),
        ("test_convnext", "upernet", 64, 4),
        ("test_efficientnet", "segformer", 64, 4),
        ("test_vit", "dpt", 48, 2),  # an odd number of patches
        ("test_vit", "dpt", 64, 2),
    ],
)
def test_logits_and_features(backbone: str, decoder: str, size: int, stride: int) -> None:
    """All at the decoder's size and of the stated width; every parameter learns."""
    network = build_generic(model(backbone=backbone, decoder=decoder, aux_weight=0.4), 5, rep_head=True)
    x = torch.randn(2, 3, size, size + network.multiple)
    out = network(x)
    small = (size // stride, (size + network.multiple) // stride)
    assert out.logits.shape == (2, 5, *small)
    assert out.feats is not None
    assert out.feats.shape == (2, 32, *small)
    assert network.decoder.feats_planes == 32
    assert out.aux is not None
    (out.logits.mean() + out.feats.square().mean() + out.aux.mean()).backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None]


@for_each("name", NETWORKS)
def test_any_size_is_predicted_and_a_fitting_one_as_it_is(name: str) -> None:
    network = built(**NETWORKS[name] | {"weights": "none"}).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        assert torch.equal(network.predict(x), upsample(network(x).logits, (64, 96)))
        odd = network.predict(x[..., :51, :77])
        whole = network.predict(pad_to_multiple(x[..., :51, :77], network.multiple))
    assert odd.shape == (1, 5, 51, 77)
    assert torch.equal(odd, whole[..., :51, :77])


def test_one_image_cannot_be_normalized_where_images_are_pooled() -> None:
    with pytest.raises(UserError, match="one image per process"):
        built()(torch.randn(1, 3, 32, 32))
    built(decoder="fpn")(torch.randn(1, 3, 64, 64))


def test_a_frozen_encoder_keeps_weights_and_statistics() -> None:
    network = built(freeze_encoder=True).train()
    before = {name: value.clone() for name, value in network.encoder.state_dict().items()}
    optim = OptimConfig(lr=0.1, epochs=1, batch_size=1, optimizer="adamw")
    optimizer = build_optimizer(optim, encoder_and_heads(network.encoder, [network.decoder], optim))
    network(torch.randn(2, 3, 32, 32)).logits.square().mean().backward()
    optimizer.step()
    assert not any(module.training for module in network.encoder.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.encoder.state_dict().items())
    assert network.decoder.training


def test_layers_learn_the_slower_the_deeper_they_lie() -> None:
    network = built(backbone="test_vit", decoder="dpt")
    optim = OptimConfig(
        lr=1.0, head_lr_factor=40.0, layer_decay=0.5, epochs=1, batch_size=1, optimizer="adamw"
    )
    groups = build_optimizer(optim, encoder_and_heads(network.encoder, [network.decoder], optim)).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert set(rates) == {id(p) for p in network.parameters()}
    blocks = [rates[id(next(block.parameters()))] for block in network.encoder.model.blocks]
    assert blocks == [blocks[-1] * 0.5**depth for depth in reversed(range(len(blocks)))]
    assert groups[0]["lr"] == 1.0 >= blocks[-1]
    assert rates[id(network.encoder.model.pos_embed)] == blocks[0] / 2
    assert rates[id(network.decoder.classifier.weight)] == 40.0
    assert {group["weight_decay"] for group in groups} == {1e-4}


def test_synchronized_batch_norm_keeps_the_activation_in_it() -> None:
    network = built().encoder
    kept = [
        type(module.act) for module in network.modules() if hasattr(module, "act") and hasattr(module, "eps")
    ]
    network = with_sync_bn(network)
    norms = [module for module in network.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert [type(norm.act) for norm in norms if hasattr(norm, "act")] == kept
    assert len(kept) > 10
    assert not [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def test_all_papers_begin_with_the_same_network() -> None:
    """What supervised-only runs train, from the first random number on."""
    states = {}
    for project in ("u2pl", "brpg", "cps", "proto_consistency", "s4gan_mlmt"):
        overrides = generic(backbone="test_efficientnet", output_stride=16)
        cfg = config(project, *overrides, name="smoke_sup")
        run = importlib.import_module(f"projects.{project}.train").set_up(cfg, Dist())
        networks = run.weights()
        tensors = next(iter(networks.values()))
        states[project] = list(tensors.values())
        run.data.close()
    first = states.pop("u2pl")
    for project, tensors in states.items():
        assert len(tensors) == len(first), project
        assert all(map(torch.equal, tensors, first)), project


# --- every method with it --------------------------------------------------------------------------------------

METHODS = [
    ("u2pl", "smoke"), ("u2pl", "smoke_ael"), ("u2pl", "smoke_sup"),
    ("brpg", "smoke"), ("brpg", "smoke_sup"),
    ("proto_consistency", "smoke"), ("proto_consistency", "smoke_sup"),
    ("cps", "smoke"), ("cps", "smoke_cps_cutmix"), ("cps", "smoke_mean_teacher"), ("cps", "smoke_cct"),
    ("cps", "smoke_gct"), ("cps", "smoke_sup"),
    ("s4gan_mlmt", "smoke"), ("s4gan_mlmt", "smoke_sup"),
    ("unimatch", "smoke"), ("unimatch", "smoke_fixmatch"), ("unimatch", "smoke_fixmatch_v2"), ("unimatch", "smoke_sup"),
]  # fmt: skip
ONE_EACH = [  # for every change: each project, each kind of network
    ("u2pl", "smoke", "lite0"), ("brpg", "smoke", "vit"), ("proto_consistency", "smoke", "convnext"),
    ("cps", "smoke_cct", "vit"), ("s4gan_mlmt", "smoke", "vit"), ("unimatch", "smoke", "convnext"),
]  # fmt: skip
REST = [(*method, name) for method in METHODS for name in NETWORKS if (*method, name) not in ONE_EACH]


def train_and_use(project: str, name: str, network: str, folder: Path) -> None:
    """A whole run equals one that stopped after two steps; its weights are measured, and label an odd-sized photo."""
    train, evaluate, predict = (
        importlib.import_module(f"projects.{project}.{part}") for part in ("train", "eval", "predict")
    )
    path = ROOT / "projects" / project / "configs" / f"{name}.yaml"
    overrides = [
        *generic(**NETWORKS[network]),
        "optim.optimizer=adamw",
        "optim.lr=0.001",
        "optim.warmup_steps=2",
    ]
    runs = Runs(train.main)
    runs(path, folder / "whole", None, *overrides)
    runs(path, folder / "parts", 2, *overrides)
    runs(path, folder / "parts", None, *overrides)
    assert_same_run(folder / "whole", folder / "parts")
    measured = result(folder / "whole")
    assert evaluate.main(["--run", str(folder / "whole")]) == 0
    assert result(folder / "whole")["miou"] == measured["miou"]
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (45, 71, 3), np.uint8)).save(
        folder / "photo.jpg"
    )
    words = ["--run", str(folder / "whole"), "--input", str(folder / "photo.jpg"), "--out", str(folder)]
    assert predict.main(words) == 0
    assert mask(folder / "photo.png").shape == (45, 71)


def test_every_paper_is_here() -> None:
    assert sorted({project for project, *_ in ONE_EACH}) == sorted(
        path.parent.name for path in ROOT.glob("projects/*/train.py")
    )


@pytest.mark.parametrize(("project", "name", "network"), ONE_EACH)
def test_every_paper_trains_it(project: str, name: str, network: str, tmp_path: Path) -> None:
    train_and_use(project, name, network, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("project", "name", "network"), REST)
def test_every_method_trains_it(project: str, name: str, network: str, tmp_path: Path) -> None:
    train_and_use(project, name, network, tmp_path)
