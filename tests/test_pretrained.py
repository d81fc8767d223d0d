"""Weight files: every layout that users have, and every way in which one does not fit."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common.data import files
from common.data.files import find_weights
from common.errors import UserError
from common.mean_teacher.config import DeepLabConfig
from common.models.deeplab import build_network
from common.models.pretrained import (
    LoadReport,
    bare_keys,
    load_pretrained,
    load_state,
    read_weights,
)
from common.models.resnet import BACKBONES
from common.run.checkpoint import load


def encoder(stem="deep", **options):
    return BACKBONES["resnet_tiny"](stem=stem, width=2, **options)


def network(**options):
    heads = {name: options.pop(name) for name in ("rep_head", "aux_head") if name in options}
    classes = options.pop("num_classes", 3)
    return build_network(
        DeepLabConfig(backbone="resnet_tiny", width=2, inner_planes=4, **options), classes, **heads
    )


def same(module: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    own = module.state_dict()
    return all(torch.equal(own[key], state[key]) for key in own if not key.endswith("num_batches_tracked"))


def test_torchvision_layout(tmp_path):
    source = encoder("plain").state_dict()
    state = {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}  # as in files of 2017
    state |= {"fc.weight": torch.zeros(10, 16), "fc.bias": torch.zeros(10)}
    path = tmp_path / "resnet.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    target = encoder("plain")
    report = load_pretrained(target, path)
    assert same(target, source)
    assert report.unused == ("fc.weight", "fc.bias")
    assert report.missing == report.mismatched == ()
    assert len(report.used) == len(state) - 2
    assert (
        report.summary()
        == f"{path}: {len(state) - 2} tensors used, 2 unused (fc.weight, fc.bias), 0 kept their initial values"
    )


def test_backbone_file_into_a_network(tmp_path):
    source = encoder().state_dict()
    torch.save(source, tmp_path / "backbone.pth")
    target = network(aux_head=True)
    before = target.decoder.classifier[0].weight.clone()
    report = load_pretrained(target, tmp_path / "backbone.pth", allow_missing=("decoder.", "auxor."))
    assert same(target.encoder, source)
    assert torch.equal(target.decoder.classifier[0].weight, before)
    assert {name.split(".")[0] for name in report.missing} == {"decoder", "auxor"}
    assert all(name.startswith("encoder.") for name in report.used)
    assert "kept their initial values (decoder.low_conv.0.weight, " in report.summary()


def test_backbone_file_into_a_network_needs_permission(tmp_path):
    torch.save(encoder().state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(UserError, match="backbone only: load it into the encoder"):
        load_pretrained(network(), tmp_path / "backbone.pth")


def with_prefix(module: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in module.state_dict().items()}


def save_as_numpy_1(content: object, path: Path) -> None:
    """Write like the authors did: NumPy scalars named by the module path of NumPy 1."""
    modern = path.with_suffix(".modern")
    torch.save(content, modern)
    with zipfile.ZipFile(modern) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(
                name, source.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            )


def test_authors_checkpoint_prefers_the_teacher(tmp_path):
    student, teacher = network(rep_head=True), network(rep_head=True)
    content = {
        "epoch": 3,
        "model_state": with_prefix(student, "module."),
        "teacher_state": with_prefix(teacher, "module."),
        "optimizer_state": torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9).state_dict(),
        "best_miou": np.float64(0.71),
    }
    path = tmp_path / "ckpt.pth"
    save_as_numpy_1(content, path)
    assert b"numpy.core" in path.read_bytes()
    target = network(rep_head=True)
    report = load_pretrained(target, path)
    assert same(target, teacher.state_dict())
    assert report.source == f"{path}[teacher_state]"
    state, source = read_weights(path, ("model_state",))
    load_state(target, state, source=source)
    assert same(target, student.state_dict())
    with pytest.raises(UserError, match=r"holds epoch, model_state, .* but no network under net"):
        read_weights(path, ("net",))


def test_own_checkpoint_and_compiled_prefixes(tmp_path):
    source = network()
    nested = {"format": 1, "networks": {"student": with_prefix(source, "module._orig_mod.")}}
    torch.save(nested, tmp_path / "last.pt")
    target = network()
    report = load_pretrained(target, tmp_path / "last.pt")
    assert same(target, source.state_dict())
    assert report.source.endswith("[networks.student]")
    assert report.unused == ()


def test_network_file_into_an_encoder(tmp_path):
    source = network()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "net.pth")
    target = encoder()
    report = load_pretrained(target, tmp_path / "net.pth")
    assert same(target, source.encoder.state_dict())
    assert all(key.startswith("decoder.") for key in report.unused)


@pytest.mark.parametrize(
    ("there", "here", "remedy"), [("plain", "deep", "stem=plain"), ("deep", "plain", "stem=deep")]
)
def test_the_other_stem_is_recognized(tmp_path, there, here, remedy):
    torch.save(encoder(there).state_dict(), tmp_path / "weights.pth")
    target = encoder(here)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(UserError, match=f"tensors are not in the file.*set model.{remedy}"):
        load_pretrained(target, tmp_path / "weights.pth")
    assert same(target, before)


def test_other_class_count(tmp_path):
    source = network(num_classes=7)
    torch.save(source.state_dict(), tmp_path / "net.pth")
    target = network(num_classes=3)
    with pytest.raises(
        UserError, match=r"classifier.8.weight \(7, 4, 1, 1\) vs \(3, 4, 1, 1\).*it has 7 classes"
    ):
        load_pretrained(target, tmp_path / "net.pth")
    report = load_pretrained(target, tmp_path / "net.pth", allow_missing=("decoder.classifier.8.",))
    assert len(report.mismatched) == len(report.missing) == 2
    assert (
        "2 of another shape (decoder.classifier.8.weight (7, 4, 1, 1) vs (3, 4, 1, 1), " in report.summary()
    )
    assert torch.equal(target.decoder.classifier[4].weight, source.decoder.classifier[4].weight)


@pytest.mark.parametrize("option", ["rep_head", "aux_head"])
def test_file_without_a_head(option):
    with pytest.raises(UserError, match="written without this head"):
        load_state(network(**{option: True}), network().state_dict(), source="ckpt.pth")


def test_unrelated_weights_are_refused_even_if_all_may_be_missing():
    with pytest.raises(UserError, match="tensors are not in the file"):
        load_state(
            network(),
            {"something.weight": torch.zeros(2)},
            source="x.pth",
            allow_missing=("encoder.", "decoder."),
        )


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(UserError, match="no such weight file"):
        read_weights(tmp_path / "absent.pth")
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not a file of tensors")
    with pytest.raises(UserError, match=r"broken.pth: damaged or not a file of tensors"):
        read_weights(broken)
    torch.save(encoder().state_dict(), broken)
    broken.write_bytes(broken.read_bytes()[:2000])
    with pytest.raises(UserError, match="damaged"):
        read_weights(broken)
    torch.save([1, 2], broken)
    with pytest.raises(UserError, match="holds a list"):
        read_weights(broken)
    torch.save({"epoch": 1}, broken)
    with pytest.raises(UserError, match="holds epoch, but no network"):
        read_weights(broken)


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "module"])
@pytest.mark.parametrize("read", [read_weights, load])
def test_code_in_a_file_is_not_run(tmp_path, form, read):
    path, content = tmp_path / "evil.pth", {"state_dict": Harmful(tmp_path / "ran")}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(
            nn.Linear(2, 2) if form == "module" else content,
            path,
            _use_new_zipfile_serialization=form != "legacy",
        )
    said = "damaged or not a file" if form == "plain pickle" else "holds objects .* never loaded"
    with pytest.raises(UserError, match=rf"evil\.pth: {said}") as error:
        read(path)
    assert not (tmp_path / "ran").exists()
    assert not {"weights_only", "torch.load", "likely succeed"} & set(str(error.value).split())


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a" * 99, b"<html>404</html>", b"ustar" * 300, bytes(range(256)) * 9]
)
@pytest.mark.parametrize("read", [read_weights, load])
def test_files_that_hold_something_else_are_refused_in_our_words(tmp_path, content, read):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pth: damaged or not a file of tensors \(.*\); use another"):
        read(tmp_path / "a.pth")


def test_prefixes_of_wrapped_networks_are_taken_off():
    a = torch.zeros(1)
    state = {"module.a": a, "module.module.b": a, "_orig_mod.c": a, "encoder._orig_mod.module": a}
    assert list(bare_keys(state)) == ["a", "b", "c", "encoder.module"]
    with pytest.raises(UserError, match="with and without"):
        bare_keys({"a": a, "module.a": a})


def test_summary_of_an_empty_report():
    assert (
        LoadReport("f", (), (), (), ()).summary()
        == "f: 0 tensors used, 0 unused, 0 kept their initial values"
    )


def test_weights_are_looked_for_here_then_in_the_users_folder_then_among_the_bundled(tmp_path, monkeypatch):
    places = [tmp_path / name for name in ("here", "mine", "bundled")]
    for place in places:
        place.mkdir()
        (place / "a.pth").touch()
    monkeypatch.chdir(places[0])
    monkeypatch.setenv("SSS_WEIGHTS", str(places[1]))
    files.published_weights()  # is read once
    monkeypatch.setattr(files, "BUNDLED", places[2])
    for place in places:
        assert find_weights("a.pth").resolve() == place / "a.pth"
        (place / "a.pth").unlink()
    with pytest.raises(UserError) as error:
        find_weights("a.pth")
    assert "\n" not in str(error.value)
    for part in (
        "model.weights=a.pth: no such file (a.pth, ",
        *map(str, places[1:]),
        "set SSS_WEIGHTS",
        "=none",
    ):
        assert part in str(error.value)


def test_bundled_weights_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SSS_WEIGHTS", raising=False)
    bundled = sorted(path.name for path in files.BUNDLED.glob("*.p*"))
    assert bundled
    assert all(find_weights(name).is_file() for name in bundled)
