"""Images of the AEL variant: passes over the labeled list, partners, second images; what a run says and costs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from common.config import load_config, plan_batch
from common.data.loaders import Key, oversample
from common.distributed import Dist
from common.errors import UserError
from common.run.log import RunLog
from projects.u2pl import bench
from projects.u2pl.ael.data import AelData, PassSampler, labeled_pass
from projects.u2pl.ael.step import as_batch
from projects.u2pl.config import Config
from projects.u2pl.data import build_training_data
from projects.u2pl.reporting import deviations
from tests.tiny import write_config, write_dataset

METHOD = {"sup_only_epochs": 0, "average_from_start": True, "ael": {"common_classes": [0], "start_epoch": 1}}


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "farm", labeled=7, unlabeled=16)


def config(tmp_path: Path, farm: Path, *overrides: str) -> Config:
    path = write_config(
        tmp_path / "c.yaml", farm, "few", method=METHOD, quirks={"shared_first_epoch": False},
        optim={"lr": 0.01, "epochs": 3, "batch_size": 4},
    )  # fmt: skip
    return load_config(Config, path, overrides)


def loaders(cfg: Config, dist: Dist | None = None) -> AelData:
    dist = dist or Dist()
    data = build_training_data(cfg, dist, plan_batch(cfg.optim, dist.world_size))
    assert isinstance(data, AelData)
    return data


# --- passes over the labeled list ------------------------------------------------------------------------------


def keys_of(sampler: PassSampler, epoch: int, start: int = 0) -> list[list[Key]]:
    sampler.set_epoch(epoch, start)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


@pytest.mark.parametrize(("world", "drop_last"), [(1, False), (1, True), (2, False), (3, True)])
def test_batches_are_those_of_the_originals_loader(world: int, drop_last: bool) -> None:
    """A distributed sampler that is told the number of the pass, cut into batches; the last one may be short."""
    length, size, steps = 23, 3, 11
    for rank in range(world):
        ours = PassSampler(length, size, rank, world, epoch_steps=steps, drop_last=drop_last)
        theirs = DistributedSampler(range(length), world, rank, shuffle=True, seed=0)
        for epoch in range(3):
            for step, keys in enumerate(keys_of(ours, epoch)):
                number, batch = labeled_pass(epoch, step, steps, ours.batches)
                theirs.set_epoch(number)
                expected = list(theirs)[batch * size : (batch + 1) * size]
                assert [key.position for key in keys] == expected
                assert len(expected) == size or (batch + 1 == ours.batches and not drop_last)


def test_every_sample_of_an_epoch_has_draws_of_its_own() -> None:
    seen = Counter(
        (key.epoch, key.slot)
        for rank in range(2)
        for epoch in range(3)
        for key in chain(*keys_of(PassSampler(7, 2, rank, 2, epoch_steps=9), epoch))
    )
    assert set(seen.values()) == {1}


def test_a_pass_is_resumed_in_its_middle() -> None:
    sampler = PassSampler(7, 2, epoch_steps=9)
    whole = keys_of(sampler, 1)
    assert [keys_of(sampler, 1, start) for start in range(10)] == [whole[start:] for start in range(10)]


# --- loaders ---------------------------------------------------------------------------------------------------


def test_lists_keep_their_lengths_and_an_epoch_is_that_of_the_unlabeled_one(
    tmp_path: Path, farm: Path
) -> None:
    cfg = config(tmp_path, farm, "run.seed=1")
    data = loaders(cfg)
    assert list(data.loaders) == ["labeled", "unlabeled", "partner"]
    assert data.steps_per_epoch == 16 // 4
    for role in ("labeled", "unlabeled"):
        given = getattr(data.split, role)
        assert data.loaders[role].dataset.items == oversample(given, len(given), 1)
    groups = list(data.epoch(0, 0, Dist(), True))
    assert [len(batch.image) for ((batch, _, _),) in groups] == [4, 3, 4, 3]
    assert all(len(partner.image) == len(batch.image) for ((batch, _, partner),) in groups)
    later = list(data.epoch(0, 2, Dist(), True))
    for ours, theirs in zip(later, groups[2:], strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)


def test_a_last_batch_of_one_photo_is_left_out_where_batchnorm_sees_nothing_else(tmp_path: Path) -> None:
    farm = write_dataset(tmp_path / "five", labeled=5, unlabeled=16)
    data = loaders(config(tmp_path, farm))
    assert [len(batch.image) for ((batch, _, _),) in data.epoch(0, 0, Dist(), False)] == [4] * 4


def test_partners_are_other_photos_cut_in_a_range_of_their_own(tmp_path: Path, farm: Path) -> None:
    cfg = config(tmp_path, farm, "method.ael.paste_prob=0.25", "method.ael.paste_resize=[0.1,1.5]")
    data = loaders(cfg)
    dataset = data.loaders["partner"].dataset
    samples = [dataset[Key(0, slot, 2)] for slot in range(400)]
    empty = [not sample.label.any() and not sample.image.any() for sample in samples]
    assert 0.15 < np.mean(empty) < 0.35
    chosen = Counter(sample.position for sample, none in zip(samples, empty, strict=True) if not none)
    assert set(chosen) == set(range(7))
    assert max(chosen.values()) < 2 * min(chosen.values())
    usual = data.loaders["labeled"].dataset.transform
    assert dataset.transform == dataclasses.replace(usual, scale_range=(0.1, 1.5))
    again = [dataset[Key(0, slot, 2)] for slot in range(20)]
    assert all(torch.equal(a.image, b.image) for a, b in zip(samples, again, strict=False))


def test_a_labeled_photo_is_cut_as_without_a_partner(tmp_path: Path, farm: Path) -> None:
    ours, other = (loaders(config(tmp_path, farm, f"method.ael.paste_prob={p}")) for p in (0.0, 1.0))
    for slot in range(5):
        one, two = (data.loaders["labeled"].dataset[Key(1, slot, slot)] for data in (ours, other))
        assert torch.equal(one.image, two.image)
        assert torch.equal(one.label, two.label)


# --- second images ---------------------------------------------------------------------------------------------


def test_second_images_are_cut_differently_everywhere_and_equally_again(tmp_path: Path, farm: Path) -> None:
    data = loaders(config(tmp_path, farm))
    cuts = {}
    for epoch in range(2):
        for forward in range(3):
            for rank in range(2):
                images, found = data.second_images([5, 5], epoch, forward, Dist(rank=rank, world_size=2))
                again, _ = data.second_images([5, 5], epoch, forward, Dist(rank=rank, world_size=2))
                assert images.shape == (2, 3, 32, 32)
                assert found == [5, 5]
                assert torch.equal(images, again)
                cuts |= {(epoch, forward, rank, i): image for i, image in enumerate(images)}
    values = list(cuts.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_a_broken_second_image_is_replaced_counted_and_logged(tmp_path: Path, farm: Path) -> None:
    data = loaders(config(tmp_path, farm, "data.on_error=skip"))
    broken = Path(data.second.items[5].image)
    broken = broken if broken.is_absolute() else farm.parent / broken
    broken.write_bytes(broken.read_bytes()[:300])
    with RunLog(tmp_path / "run", Dist(), total_steps=1, images_per_step=2):
        images, found = data.second_images([5, 3], 0, 0, Dist())
    assert found == [6, 3]
    assert images.isfinite().all()
    assert (data.skipped, data.replaced) == (1, 1)
    (written,) = (tmp_path / "run/train.log").read_text().splitlines()
    assert f" WARNING skipped: {data.second.items[5].image}: " in written


def test_second_images_are_the_same_when_threads_have_decoded_them(tmp_path: Path, farm: Path) -> None:
    data, ahead = (loaders(config(tmp_path, farm, f"data.workers={n}")) for n in (0, 2))
    for forward in range(3):
        ahead.decode_ahead([5, 5, 3], 1, forward, Dist())
        (ours, found), (theirs, _) = (x.second_images([5, 5, 3], 1, forward, Dist()) for x in (ahead, data))
        assert torch.equal(ours, theirs)
        assert found == [5, 5, 3]
    ahead.decode_ahead([5], 1, 3, Dist())
    ahead.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("second")]
    again, _ = ahead.second_images([5], 1, 3, Dist())
    assert torch.equal(again, data.second_images([5], 1, 3, Dist())[0])


def test_a_broken_second_image_in_a_thread_stops_the_step_that_needs_it(tmp_path: Path, farm: Path) -> None:
    data = loaders(config(tmp_path, farm, "data.workers=1"))
    broken = Path(data.second.items[5].image)
    (broken if broken.is_absolute() else farm.parent / broken).write_bytes(b"")
    with contextlib.closing(data):
        data.decode_ahead([5], 0, 0, Dist())
        with pytest.raises(UserError, match=r"data\.on_error=skip"):
            data.second_images([5], 0, 0, Dist())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_of_the_host_take_the_form_of_the_batch(layout: torch.memory_format) -> None:
    like = torch.zeros(4, 3, 8, 8, dtype=torch.float64).contiguous(memory_format=layout)
    images = torch.rand(2, 3, 8, 8)
    found = as_batch(images, like)
    assert found.dtype == torch.float64
    assert found.is_contiguous(memory_format=layout)
    assert torch.equal(found, images.double())


# --- what a run says -------------------------------------------------------------------------------------------


def test_deviations_of_one_process() -> None:
    cfg = load_config(
        Config, Path(bench.HERE) / "configs" / "cityscapes_744_r101_ael.yaml", ["optim.device_batch=4"]
    )
    text = "\n".join(deviations(cfg, 1))
    assert "every loss is divided by 1 processes, the authors' by 8; optim.lr=0.00125 would restore" in text
    assert "per forward of 2 images, the authors' per process of 1" in text
    assert "every loss" not in "\n".join(deviations(cfg, 8))


@pytest.mark.smoke
def test_bench_tells_the_cost_of_the_banks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr("tools.bench.loader_speed", lambda *_: 1.0)
    path = str(Path(bench.HERE) / "configs" / "smoke_ael.yaml")
    assert (
        bench.main(
            ["--config", path, "--steps", "1", "--json", str(tmp_path / "b.json"), "optim.batch_size=4"]
        )
        == 0
    )
    figures = json.loads((tmp_path / "b.json").read_text())["figures"]
    assert 0 < figures["banks and masks, % of the full step"] < 100
    assert figures["ratio full / networks"] > 0
    assert "banks and masks, ms" in capsys.readouterr().out
