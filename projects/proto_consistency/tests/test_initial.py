"""Collecting, clustering, saving and reading the first prototypes."""

from __future__ import annotations

import collections
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import load_config
from common.data.dataset_yaml import load_spec
from common.distributed import Dist
from common.errors import UserError
from common.measure.evaluation import Protocol
from common.run.checkpoint import save
from projects.proto_consistency import cluster as command
from projects.proto_consistency import initial
from projects.proto_consistency.config import Config, ProtoConfig
from projects.proto_consistency.initial import (
    Reservoir,
    cluster_classes,
    collect_features,
    initial_prototypes,
    read_prototypes,
    require_path,
    save_prototypes,
)
from projects.proto_consistency.network import ProtoNetwork, build_network
from projects.proto_consistency.tests.mindspore_writer import write_mindspore
from tests.runs import launch_script
from tests.tiny import write_dataset

K, P, D = 3, 2, 4
ALL = ProtoConfig(per_class=P, pixels_per_image=10**6, pixels_per_class=10**6)
GENERATED = Path(__file__).resolve().parents[1] / "configs" / "smoke.yaml"


# --- reservoir -------------------------------------------------------------------------------------------------


def test_reservoir_keeps_everything_up_to_its_limit() -> None:
    kept = Reservoir(10, np.random.RandomState(0))
    assert kept.rows.shape == (0, 0)
    rows = torch.arange(8.0)[:, None]
    for part in rows.split(3):
        kept.add(part)
    assert torch.equal(kept.rows, rows)
    assert kept.offered == 8


def test_reservoir_is_a_uniform_subset() -> None:
    """Each of 20 rows is kept in half of the runs; 4 standard deviations of 1500 runs are 0.052."""
    counts, runs = torch.zeros(20), 1500
    rng = np.random.RandomState(0)
    for _ in range(runs):
        kept = Reservoir(10, rng)
        for part in torch.arange(20.0)[:, None].split([3, 9, 1, 7]):
            kept.add(part)
        assert len(kept.rows.unique()) == 10
        counts += torch.bincount(kept.rows.flatten().long(), minlength=20)
    assert (counts / runs - 0.5).abs().max() < 0.052


# --- collecting ------------------------------------------------------------------------------------------------


def maps_of(x: Tensor) -> Tensor:
    """A feature map of a quarter of the image's size that depends on what the window holds."""
    small = F.avg_pool2d(x, 4, ceil_mode=True)
    return torch.cat((small, small.mean(dim=(2, 3), keepdim=True).expand_as(small)[:, :1]), dim=1)


def sample(seed: int, height: int = 12, width: int = 15, classes: int = K) -> tuple[Tensor, Tensor, str]:
    draw = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (1, height, width), generator=draw)
    label[:, 0] = 255
    return torch.randn(1, 3, height, width, generator=draw), label, str(seed)


def sorted_rows(rows: Tensor) -> Tensor:
    return torch.from_numpy(np.array(sorted(map(tuple, rows.tolist())), dtype=np.float32))


def test_all_pixels_of_whole_images_in_dense_terms() -> None:
    samples = [sample(0), sample(1, 9, 20)]
    found = collect_features(maps_of, samples, K, ALL)
    for k in range(K):
        expected = []
        for image, label, _ in samples:
            full = F.interpolate(maps_of(image), label.shape[-2:], mode="bilinear", align_corners=True)
            expected.append(full[0].permute(1, 2, 0)[label[0] == k])
        assert torch.allclose(sorted_rows(found[k]), sorted_rows(torch.cat(expected)), atol=1e-5)


@pytest.mark.parametrize("size", [(12, 15), (6, 20), (5, 6)])  # larger, partly and all smaller than a window
def test_windows_give_a_pixel_by_the_first_that_holds_it(size: tuple[int, int]) -> None:
    image, label, name = sample(2, *size)
    crop, stride = (8, 8), (5, 5)
    found = collect_features(maps_of, [(image, label, name)], K, ALL, crop_size=crop, stride=stride)
    rows, cols = max(8 - size[0], 0), max(8 - size[1], 0)
    top, left = rows // 2, cols // 2
    padded = F.pad(image, (left, cols - left, top, rows - top))
    full, done = torch.zeros(4, *padded.shape[-2:]), torch.zeros(padded.shape[-2:], dtype=torch.bool)

    def starts(side: int) -> list[int]:
        count = -(-(side - 8) // 5) + 1
        return [min(5 * i, side - 8) for i in range(count)]

    for y in starts(padded.shape[2]):
        for x in starts(padded.shape[3]):
            window = maps_of(padded[..., y : y + 8, x : x + 8])
            dense = F.interpolate(window, crop, mode="bilinear", align_corners=True)[0]
            new = ~done[y : y + 8, x : x + 8]
            full[:, y : y + 8, x : x + 8][:, new] = dense[:, new]
            done[y : y + 8, x : x + 8] = True
    full = full[:, top : top + size[0], left : left + size[1]].permute(1, 2, 0)
    for k in range(K):
        expected = full[label[0] == k]
        assert len(found[k]) == len(expected)
        if len(expected):
            assert torch.allclose(sorted_rows(found[k]), sorted_rows(expected), atol=1e-5)


def test_caps_per_image_and_per_class() -> None:
    samples = [sample(i) for i in range(6)]
    per_image = dataclasses.replace(ALL, pixels_per_image=7)
    assert [len(rows) for rows in collect_features(maps_of, samples, K, per_image)] == [42] * K
    both = dataclasses.replace(per_image, pixels_per_class=20)
    capped = collect_features(maps_of, samples, K, both)
    assert [len(rows) for rows in capped] == [20] * K
    everything = collect_features(maps_of, samples, K, ALL)
    for part, whole in zip(capped, everything, strict=True):
        assert torch.cdist(part.double(), whole.double()).amin(dim=1).max() < 1e-4
        assert len(part.unique(dim=0)) == 20


def test_the_seed_decides_which_pixels() -> None:
    samples = [sample(i) for i in range(3)]
    few = dataclasses.replace(ALL, pixels_per_image=5)
    first, again = (collect_features(maps_of, samples, K, few)[0] for _ in range(2))
    other = collect_features(maps_of, samples, K, dataclasses.replace(few, seed=1))[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_absent_classes_ignored_and_foreign_labels_give_nothing() -> None:
    image, label, name = sample(0)
    label[label == 1] = 255
    label[0, 3, 3] = 200
    found = collect_features(
        maps_of, [(image, label, name), (image, torch.full_like(label, 255), "x")], K, ALL
    )
    assert len(found[1]) == 0
    assert sum(map(len, found)) == int((label < K).sum())


# --- clustering ------------------------------------------------------------------------------------------------


def test_prototypes_are_the_centres_of_each_class_in_turn() -> None:
    a, b = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 30.0, 0, 0])
    features = [torch.stack([a, a, b]), torch.stack([3 * a, 3 * b, 3 * b]), torch.stack([5 * b, 5 * a])]
    made = cluster_classes(features, ALL, "xyz")
    assert made.shape == (K * P, D)
    assert torch.allclose(made[:4], torch.stack([a, b, 3 * b, 3 * a]), atol=1e-5)


def test_absent_class_gets_random_vectors_of_the_mean_length_and_a_line() -> None:
    features = [torch.randn(30, D) * 5, torch.zeros(0, 0), torch.randn(30, D)]
    said: list[str] = []
    made = cluster_classes(features, ALL, ["sky", "sea", "sand"], say=said.append)
    length = torch.cat((features[0], features[2])).norm(dim=1).mean()
    assert torch.allclose(made[P : 2 * P].norm(dim=1), length.expand(P), rtol=1e-5)
    assert not torch.allclose(made[P], made[P + 1])
    assert said == [
        f"prototypes: class 1 (sea) is on no labeled pixel; it gets 2 random vectors of length {float(length):.3g}"
    ]
    assert made.isfinite().all()
    assert torch.equal(made, cluster_classes(features, ALL, ["sky", "sea", "sand"]))


def test_fewer_features_than_prototypes_are_repeated_and_said() -> None:
    said: list[str] = []
    features = [torch.ones(1, D), torch.randn(9, D), torch.randn(9, D)]
    made = cluster_classes(features, ALL, "xyz", say=said.append)
    assert torch.equal(made[0], made[1])
    assert said == ["prototypes: class 0 (x) has 1 different features for 2 prototypes; they are repeated"]


def test_normalized_features_are_clustered_by_direction() -> None:
    a, b = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0])
    features = [torch.stack([a, 100 * a, 7 * b])] * K
    made = cluster_classes(features, dataclasses.replace(ALL, normalize=True), "xyz")
    assert torch.allclose(made[:2], torch.stack([a, b]), atol=1e-5)


def test_nothing_labeled_is_refused() -> None:
    with pytest.raises(UserError, match="no labeled pixel in the labeled images"):
        cluster_classes([torch.zeros(0, 0)] * K, ALL, "xyz")


# --- files -----------------------------------------------------------------------------------------------------


def numbers(seed: int = 0) -> Tensor:
    return torch.randn(K * P, D, generator=torch.Generator().manual_seed(seed))


def as_lists(value: Tensor) -> list[list[np.ndarray]]:
    return [list(own) for own in value.view(K, P, D).numpy()]


def write_kind(folder: Path, kind: str, value: Tensor) -> Path:
    state, path = {"module.proto_net.proto_list": value}, folder / kind
    if kind == "ours.npz":
        save_prototypes(path, value, "xyz", {"seed": 0})
    elif kind.endswith(".pickle"):
        content: Any = {
            "list.pickle": as_lists(value),
            "dict.pickle": dict(enumerate(as_lists(value))),
            "array.pickle": value.view(K, P, D).numpy(),
            "double.pickle": [[p.astype(np.float64) for p in own] for own in as_lists(value)],
            "fortran.pickle": np.asfortranarray(value.view(K, P, D).numpy()),
            "old.pickle": as_lists(value),
        }[kind]
        path.write_bytes(pickle.dumps(content, protocol=0 if kind == "old.pickle" else 4))
    elif kind == "run.pt":
        save(path, {"project": "x", "networks": {"student": {"proto_net.proto_list": value},
                                                 "teacher": {"proto_net.proto_list": value + 1}}})  # fmt: skip
    elif kind == "u2pl.pth":
        torch.save({"model_state": state, "teacher_state": {k: v + 1 for k, v in state.items()}}, path)
    elif kind == "old.pth":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "released.ckpt":
        write_mindspore(path, {"module.w": np.ones(2, np.float32)} | {k: v.numpy() for k, v in state.items()})
    else:
        np.savez(path, **{k: v.numpy() for k, v in state.items()})
    return path


KINDS = [
    "ours.npz", "list.pickle", "dict.pickle", "array.pickle", "double.pickle", "fortran.pickle", "old.pickle",
    "run.pt", "u2pl.pth", "old.pth", "released.ckpt", "export.npz",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_prototypes_of_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    found = read_prototypes(write_kind(tmp_path, kind, numbers()), K, P, D)
    assert torch.equal(found, numbers())
    assert found.dtype == torch.float32


def test_our_file_says_where_it_comes_from(tmp_path: Path) -> None:
    path = write_kind(tmp_path, "ours.npz", numbers())
    with np.load(path) as data:
        assert data["prototypes"].shape == (K, P, D)
        assert data["classes"].tolist() == ["x", "y", "z"]
        assert '"seed": 0' in str(data["about"])


@pytest.mark.parametrize("kind", ["ours.npz", "list.pickle", "run.pt", "released.ckpt"])
@pytest.mark.parametrize("sizes", [(K + 1, P, D), (K, P + 1, D), (K, P, D + 1)])
def test_prototypes_of_another_configuration_are_refused(
    tmp_path: Path, kind: str, sizes: tuple[int, int, int]
) -> None:
    path = write_kind(tmp_path, kind, numbers())
    with pytest.raises(
        UserError, match=rf"prototypes of shape .* has {sizes[0]} classes.*per_class={sizes[1]}"
    ):
        read_prototypes(path, *sizes)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_hostile_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "bad.pickle"
    path.write_bytes(pickle.dumps([Hostile(marker), *as_lists(numbers())]))
    with pytest.raises(UserError, match="refused, the pickle holds"):
        read_prototypes(path, K, P, D)
    assert not marker.exists()


def bad_files(folder: Path) -> dict[Path, str]:
    nan = numbers()
    nan[0, 0] = np.nan
    files = {
        "nan.npz": ("not finite", None),
        "uneven.pickle": ("as many and as long", [[np.ones(D)] * P, [np.ones(D)]]),
        "text.pickle": ("as many and as long", [["a", "b"]]),
        "keys.pickle": ("expected the class numbers 0..1", {1: [], 2: []}),
        "ordered.pickle": ("refused", collections.OrderedDict()),
        "objects.npz": ("no archive of plain arrays", None),
        "cut.pickle": ("not a readable pickle", None),
        "other.pt": (r"no proto_net\.proto_list", None),
        "garbage.pt": ("damaged or not a file of tensors", None),
    }
    for name, (_, content) in files.items():
        if content is not None:
            (folder / name).write_bytes(pickle.dumps(content))
    save_prototypes(folder / "nan.npz", nan, "xyz", {})
    np.savez(folder / "objects.npz", prototypes=np.array([{}], dtype=object))
    (folder / "cut.pickle").write_bytes(pickle.dumps(as_lists(numbers()))[:-30])
    torch.save({"model_state": {"a": torch.ones(2)}}, folder / "other.pt")
    (folder / "garbage.pt").write_bytes(b"garbage" * 20)
    return {folder / name: reason for name, (reason, _) in files.items()}


def test_bad_files_say_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    for path, reason in bad_files(tmp_path).items():
        with pytest.raises(UserError, match=reason) as caught:
            read_prototypes(path, K, P, D)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_commands_that_make_it(tmp_path: Path) -> None:
    for path in (None, str(tmp_path / "none.npz")):
        with pytest.raises(UserError, match=r"init_path.*_sup.*proto_consistency\.cluster --config"):
            require_path(path)
    with pytest.raises(UserError, match="no such file of prototypes"):
        read_prototypes(tmp_path / "none.npz", K, P, D)


# --- a run's first prototypes ----------------------------------------------------------------------------------


def setting(**proto: Any) -> tuple[Config, ProtoNetwork, Any, list]:
    cfg = load_config(Config, GENERATED)
    assert cfg.method.proto is not None
    changed = dataclasses.replace(cfg.method.proto, **proto)
    cfg = dataclasses.replace(cfg, method=dataclasses.replace(cfg.method, proto=changed))
    spec = load_spec(cfg.data.dataset)
    torch.manual_seed(0)
    network = build_network(cfg.model, spec.num_classes, changed.per_class)
    return cfg, network, spec, spec.read_list("train")[:3]


WHOLE = Protocol(kind="whole_image")


def test_warmup_end_clusters_and_leaves_the_network_as_it_was() -> None:
    cfg, network, spec, items = setting(source="warmup_end")
    network.train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    said: list[str] = []
    made = initial_prototypes(cfg, network, spec, items, WHOLE, Dist(), said.append)
    assert network.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert made.shape == network.require_prototypes().proto_list.shape
    assert made.isfinite().all()
    assert said[0].startswith("prototypes: clustering features of 3 images (")
    assert torch.equal(made, initial_prototypes(cfg, network, spec, items, WHOLE, Dist(), said.append))
    tiles = Protocol(kind="sliding_window", crop_size=(32, 32), stride=(20, 20))
    assert not torch.allclose(made, initial_prototypes(cfg, network, spec, items, tiles, Dist(), said.append))


def test_random_prototypes_come_from_the_seed() -> None:
    made = []
    for seed in (0, 0, 1):
        cfg, network, spec, items = setting(source="random", seed=seed)
        torch.manual_seed(len(made))
        made.append(initial_prototypes(cfg, network, spec, items, WHOLE, Dist(), lambda _: None))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert abs(float(made[0].std()) - 1) < 0.2


def test_two_processes_share_what_the_first_one_makes_and_its_error(tmp_path: Path) -> None:
    script = """
        import sys
        import torch
        from common.distributed import all_gather_padded
        from tools.processes import start, stop
        from common.errors import UserError, run_main
        from projects.proto_consistency.initial import initial_prototypes
        from projects.proto_consistency.tests.test_initial import WHOLE, setting

        def main(argv):
            dist = start("cpu")
            cfg, network, spec, items = setting(source="warmup_end")
            said = []
            made = initial_prototypes(cfg, network, spec, items, WHOLE, dist, said.append)
            both = all_gather_padded(made, dist)
            assert torch.equal(both[0], both[1])
            assert bool(said) == dist.is_main
            cfg, *_ = setting(source="file", init_path="none.npz")
            try:
                initial_prototypes(cfg, network, spec, items, WHOLE, dist, said.append)
            except UserError as error:
                assert "no such file" in str(error)
                sys.stdout.write(f"done on rank {dist.rank}" + chr(10))
            stop()

        if __name__ == "__main__":
            run_main(main)
    """
    found = launch_script(tmp_path, script)
    assert "done on rank 0" in found
    assert "done on rank 1" in found


# --- the command -----------------------------------------------------------------------------------------------


def overrides(folder: Path) -> list[str]:
    return [f"data.dataset={write_dataset(folder)}", "data.split=few", "run.device=cpu"]


def pre_stage(folder: Path, words: list[str]) -> Path:
    cfg = load_config(Config, GENERATED, words)
    torch.manual_seed(1)
    weights = build_network(cfg.model, 3, None).state_dict()
    save(folder / "best.pt", {"project": "proto_consistency", "networks": {"student": weights}})
    return folder / "best.pt"


def test_command_writes_a_file_that_a_run_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = overrides(tmp_path / "farm")
    best, out = pre_stage(tmp_path, words), tmp_path / "protos.npz"
    argv = ["--config", str(GENERATED), "--checkpoint", str(best), "--out", str(out), *words]
    assert command.main(argv) == 0
    text = capsys.readouterr().out
    assert "clustering features of 6 images (meadow" in text
    assert f"set method.proto.init_path={out}" in text
    first = out.read_bytes()
    cfg = load_config(
        Config, GENERATED, [*words, "method.proto.source=file", f"method.proto.init_path={out}"]
    )
    network, spec = build_network(cfg.model, 3, 2), load_spec(cfg.data.dataset)
    made = initial_prototypes(cfg, network, spec, [], WHOLE, Dist(), lambda _: None)
    with np.load(out) as data:
        assert torch.equal(made, torch.from_numpy(data["prototypes"]).flatten(0, 1))
    assert command.main(argv) == 0
    with np.load(out) as data:
        assert torch.equal(made, torch.from_numpy(data["prototypes"]).flatten(0, 1))
    assert len(out.read_bytes()) == len(first)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["method.proto=null", "eval.head=linear"], "method.proto is null"),
        (["--out", "protos.pt"], r"choose a name that ends in \.npz"),
        (["--checkpoint", "absent.pt"], "no such weight file"),
        (["model.inner_planes=8"], "do not fit"),
        (["data.split=unknown"], "unknown"),
    ],
)
def test_command_refuses_what_does_not_fit(tmp_path: Path, extra: list[str], message: str) -> None:
    words = overrides(tmp_path / "farm")
    best, out = pre_stage(tmp_path, words), tmp_path / "protos.npz"
    argv = ["--config", str(GENERATED), "--checkpoint", str(best), "--out", str(out), *words, *extra]
    with pytest.raises(UserError, match=message):
        command.main(argv)
    assert not out.exists()


def test_entries_name_the_student_first() -> None:
    assert initial.ENTRIES[0] == "networks.student"
