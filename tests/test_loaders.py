from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from common.data import loaders as L
from common.data.transforms import EvalTransform, TrainTransform
from common.distributed import Dist
from common.errors import UserError
from common.run.log import RunLog

GOLDEN = (
    Path(os.environ.get("SSS_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "golden" / "u2pl"
)
MEAN, STD = (120.0, 115.0, 100.0), (58.0, 57.0, 56.0)


@dataclass(frozen=True)
class FakeItem:
    id: str
    image: Path
    label: Path | None


class FakeSpec:
    """Decodes nothing: an item's number decides its content; names in `broken` fail like a truncated JPEG."""

    def __init__(self, broken: tuple[str, ...] = (), wide: tuple[str, ...] = (), delay: float = 0) -> None:
        self.broken, self.wide, self.delay = broken, wide, delay
        self.reads = 0

    def load_image(self, item: FakeItem) -> np.ndarray:
        self.reads += 1
        time.sleep(self.delay)
        if item.id in self.broken:
            raise UserError(f"{item.image}: truncated; copy the file again")
        width = 24 if item.id in self.wide else 20
        return np.random.default_rng(int(item.id)).integers(0, 256, (16, width, 3), np.uint8)

    def load_label(self, item: FakeItem) -> np.ndarray:
        return np.full((16, 20), int(item.id) % 5, np.uint8)


def items(count: int, masks: bool = True) -> list[FakeItem]:
    return [
        FakeItem(str(i), Path(f"img/{i}.jpg"), Path(f"mask/{i}.png") if masks else None) for i in range(count)
    ]


def dataset(
    count: int = 10, spec: FakeSpec | None = None, role: str = "labeled", **options
) -> L.SegmentationDataset:
    transform = options.pop("transform", TrainTransform(MEAN, STD, (12, 12)))
    return L.SegmentationDataset(spec or FakeSpec(), items(count), transform, 3, role, **options)


def collected(loader: L.Loader, epoch: int, start: int = 0) -> list[L.Batch]:
    loader.set_epoch(epoch, start)
    return list(loader)


def assert_same(left: list[L.Batch], right: list[L.Batch]) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


# oversampling


@pytest.mark.golden
def test_epoch_lists_equal_the_originals() -> None:
    file = GOLDEN / "epoch_lists.npz"
    if not file.is_file():
        pytest.skip(f"{file} is not there (set SSS_SHARED)")
    data = np.load(file, allow_pickle=False)
    for case in range(len(data["in_length"])):
        ours = L.oversample(
            range(data["in_length"][case]), int(data["in_n"][case]), int(data["in_seed"][case])
        )
        digest = hashlib.sha256("\n".join(map(str, ours)).encode()).hexdigest()
        assert len(ours) == data["out_count"][case]
        assert digest == data["out_sha256"][case], data["in_name"][case]
        assert ours[:3] == data["out_first"][case].tolist()
        assert ours[-3:] == data["out_last"][case].tolist()


@pytest.mark.golden
def test_list_building_equals_the_originals() -> None:
    file = GOLDEN / "list_building.npz"
    if not file.is_file():
        pytest.skip(f"{file} is not there (set SSS_SHARED)")
    data = np.load(file, allow_pickle=False)
    assert (
        L.oversample(data["in_ids"].tolist(), int(data["in_n"]), int(data["in_seed"]))
        == data["out_items"].tolist()
    )


def test_match_lengths_names_both_counts_and_accepts_the_published_half() -> None:
    labeled, unlabeled = L.match_lengths(range(1488), range(1487), 2)
    assert (len(labeled), len(unlabeled)) == (1487, 1487)
    labeled, unlabeled = L.match_lengths(range(6), range(394), 0)
    assert len(labeled) == len(unlabeled) == 394
    assert set(labeled) == set(range(6))
    for counts, lists in {
        "6 labeled and 0 unlabeled": (range(6), []),
        "0 labeled and 6 unlabeled": ([], range(6)),
        "9 labeled and 4 unlabeled": (range(9), range(4)),
    }.items():
        with pytest.raises(UserError, match=counts):
            L.match_lengths(*lists, 0)
    with pytest.raises(UserError, match="empty"):
        L.oversample([], 3, 0)


# order


@pytest.mark.parametrize(("length", "world"), [(10, 1), (10, 3), (11, 2), (2, 5)])
def test_order_is_that_of_the_distributed_sampler(length: int, world: int) -> None:
    for rank in range(world):
        reference = DistributedSampler(range(length), world, rank, shuffle=True, seed=4)
        sampler = L.EpochSampler(length, 2, rank, world, seed=4, drop_last=False)
        for epoch in (0, 3):
            reference.set_epoch(epoch)
            sampler.set_epoch(epoch)
            keys = [key for batch in sampler for key in batch]
            assert [key.position for key in keys] == list(reference)
            assert [key.slot for key in keys] == list(range(rank, len(keys) * world, world))
            assert {key.epoch for key in keys} == {epoch}


@pytest.mark.parametrize(("drop_last", "steps"), [(True, 2), (False, 3)])
def test_steps_per_epoch_and_start_step(drop_last: bool, steps: int) -> None:
    sampler = L.EpochSampler(10, 2, 0, 2, drop_last=drop_last)  # 5 on each rank
    whole = list(sampler)
    assert len(whole) == len(sampler) == sampler.steps_per_epoch == steps
    sampler.set_epoch(0, 1)
    assert list(sampler) == whole[1:]
    assert len(sampler) == steps - 1
    sampler.set_epoch(0, steps + 4)
    assert list(sampler) == []
    assert len(sampler) == 0


def test_steps_end_an_epoch_early_and_never_lengthen_it() -> None:
    for rank in range(4):
        whole = list(L.EpochSampler(13, 1, rank, 4))
        assert len(whole) == 4  # the order is padded to 16
        assert list(L.EpochSampler(13, 1, rank, 4, steps=3)) == whole[:3]
        assert len(L.EpochSampler(13, 1, rank, 4, steps=9)) == 4
    assert L.make_train_loader(dataset(13), 1, Dist(1, 4), workers=0, steps=3).steps_per_epoch == 3


def test_one_and_two_processes_see_the_same_samples_in_a_step() -> None:
    whole = list(L.EpochSampler(13, 4, seed=1))
    halves = [list(L.EpochSampler(13, 2, rank, 2, seed=1)) for rank in range(2)]
    for step in range(3):
        assert sorted(whole[step]) == sorted(halves[0][step] + halves[1][step])


def test_without_reshuffling_only_the_draws_change_with_the_epoch() -> None:
    loader = L.make_train_loader(dataset(), 2, Dist(), workers=0, sampler_seed=4, reshuffle=False)
    first, later = collected(loader, 0), collected(loader, 5)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(4)).tolist()
    for epoch in (first, later):
        assert [int(i) for batch in epoch for i in batch.index] == order
    assert not any(torch.equal(a.image, b.image) for a, b in zip(first, later, strict=True))
    fresh = L.make_train_loader(dataset(), 2, Dist(), workers=0, sampler_seed=4)
    assert_same(first, collected(fresh, 0))
    assert [int(i) for batch in collected(fresh, 5) for i in batch.index] != order


def test_evaluation_shards_cover_every_image_once() -> None:
    seen = []
    for rank in range(3):
        loader = L.make_eval_loader(
            dataset(10, transform=EvalTransform(MEAN, STD), role="val"), 2, Dist(rank, 3), workers=0
        )
        seen += [int(i) for batch in loader for i in batch.index]
    assert sorted(seen) == list(range(10))


# samples


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 2}], ids=str)
def test_samples_depend_on_neither_workers_nor_resume(options: dict) -> None:
    reference = L.make_train_loader(dataset(), 3, Dist(), workers=1)
    loader = L.make_train_loader(dataset(), 3, Dist(), **options)
    for epoch in (0, 1):
        assert_same(collected(reference, epoch), collected(loader, epoch))
    assert_same(collected(reference, 1)[2:], collected(loader, 1, start=2))
    loader.set_epoch(0)
    next(iter(loader))  # leaving an epoch half-way must not disturb the next one
    assert_same(collected(reference, 1), collected(loader, 1))


def test_samples_change_with_epoch_seed_and_role() -> None:
    whole = {"transform": TrainTransform(MEAN, STD, (32, 40))}
    first = L.Key(0, 5, 2)
    base = dataset(**whole)[first].image
    assert torch.equal(base, dataset(**whole)[first].image)
    assert not torch.equal(base, dataset(**whole)[L.Key(1, 5, 2)].image)
    assert not torch.equal(base, dataset(**whole)[L.Key(0, 7, 2)].image)
    assert not torch.equal(base, dataset(**whole, role="unlabeled")[first].image)


def test_iterating_leaves_the_global_generators_alone() -> None:
    loader = L.make_train_loader(dataset(), 2, Dist(), workers=1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    collected(loader, 0)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()  # noqa: NPY002


def test_batch_types_and_index() -> None:
    batch = next(iter(L.make_train_loader(dataset(), 4, Dist(), workers=0)))
    assert (batch.image.shape, batch.image.dtype) == ((4, 3, 12, 12), torch.float32)
    assert (batch.label.shape, batch.label.dtype) == ((4, 12, 12), torch.int64)
    for label, index in zip(batch.label, batch.index, strict=True):
        assert set(label.unique().tolist()) <= {int(index) % 5, 255}


def test_batches_without_masks_have_the_same_images_and_no_label() -> None:
    bare = dataset(10)
    bare.items = items(10, masks=False)
    for workers in (0, 1):
        loader = L.make_train_loader(bare, 2, Dist(), workers=workers)
        batches = list(L.prefetch(collected(loader, 0), torch.device("cpu")))
        whole = collected(L.make_train_loader(dataset(10), 2, Dist(), workers=0), 0)
        assert all(batch.label is None for batch in batches)
        assert_same(batches, [batch._replace(label=None) for batch in whole])


def test_cache_reads_each_item_once() -> None:
    spec = FakeSpec()
    loader = L.make_train_loader(dataset(6, spec, cache=True), 2, Dist(), workers=0)
    cached = collected(loader, 0) + collected(loader, 1)
    assert spec.reads == 6
    plain = L.make_train_loader(dataset(6), 2, Dist(), workers=0)
    assert_same(cached, collected(plain, 0) + collected(plain, 1))


# trouble


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_file_stops_with_its_one_line(workers: int) -> None:
    loader = L.make_train_loader(dataset(spec=FakeSpec(broken=("7",))), 2, Dist(), workers=workers)
    with pytest.raises(UserError) as caught:
        collected(loader, 0)
    assert (
        str(caught.value)
        == "img/7.jpg: truncated; copy the file again, or set data.on_error=skip to go on without it"
    )


def test_label_of_another_size_is_named() -> None:
    with pytest.raises(UserError, match=r"mask/4\.png: mask is 20x16 pixels but img/4\.jpg is 24x16"):
        collected(L.make_train_loader(dataset(spec=FakeSpec(wide=("4",))), 2, Dist(), workers=0), 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_replaces_counts_and_reports_once_in_the_log(workers: int, tmp_path: Path) -> None:
    loader = L.make_train_loader(
        dataset(spec=FakeSpec(broken=("7", "8")), on_error="skip"), 2, Dist(), workers=workers
    )
    with RunLog(tmp_path, Dist(), total_steps=10, images_per_step=2):
        seen = [int(i) for epoch in (0, 1) for batch in collected(loader, epoch) for i in batch.index]
    assert len(seen) == 20
    assert not {7, 8} & set(seen)
    assert loader.skipped == 6  # 7 -> 8 -> 9 and 8 -> 9, in two epochs
    written = (tmp_path / "train.log").read_text().splitlines()
    assert sorted(line.partition(" WARNING ")[2] for line in written) == [
        f"skipped: img/{name}.jpg: truncated; copy the file again" for name in (7, 8)
    ]


def test_skip_gives_up_when_nothing_is_readable() -> None:
    data = dataset(3, FakeSpec(broken=("0", "1", "2")), on_error="skip")
    with pytest.raises(UserError, match="none of the 3 labeled items"):
        data[L.Key(0, 0, 0)]


def test_close_ends_the_workers_in_the_middle_of_an_epoch_and_allows_another() -> None:
    loader = L.make_train_loader(dataset(), 2, Dist(), workers=2)
    whole = collected(loader, 0)
    next(iter(loader))
    workers = loader._loader._iterator._workers
    loader.close()
    assert not any(worker.is_alive() for worker in workers)
    assert_same(collected(loader, 0), whole)
    L.make_train_loader(dataset(), 2, Dist(), workers=0).close()


def test_too_few_images() -> None:
    with pytest.raises(UserError, match="3 labeled images on 2 processes"):
        L.make_train_loader(dataset(3), 4, Dist(0, 2))


def test_images_of_different_sizes_cannot_share_a_batch() -> None:
    class Mixed(FakeSpec):
        def load_label(self, item: FakeItem) -> np.ndarray:
            return np.zeros((16, 24 if item.id in self.wide else 20), np.uint8)

    data = dataset(4, Mixed(wide=("3",)), role="val", transform=EvalTransform(MEAN, STD))
    assert len(list(L.make_eval_loader(data, 1, Dist(), workers=0))) == 4
    with pytest.raises(UserError, match="'2' 20x16, '3' 24x16"):
        list(L.make_eval_loader(data, 2, Dist(), workers=0))


def test_workers_outlive_stop_signals_from_others_but_not_their_parents(tmp_path: Path) -> None:
    loader = L.make_train_loader(dataset(spec=FakeSpec(delay=0.02)), 2, Dist(), workers=2)
    stream = iter(loader)
    next(stream)
    workers = loader._loader._iterator._workers
    sender = os.fork()
    if sender == 0:
        for worker in workers:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(worker.pid, number)
        os._exit(0)
    os.waitpid(sender, 0)
    assert len(list(stream)) == 4
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()
        worker.join(5)
        assert worker.exitcode == 0


def test_killed_worker_ends_with_one_line() -> None:
    loader = L.make_train_loader(dataset(40, FakeSpec(delay=0.05)), 2, Dist(), workers=1)
    stream = iter(loader)
    next(stream)
    os.kill(loader._loader._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"data\.workers=1: a loader process died"):
        list(stream)


# prefetching


def test_prefetch_keeps_order_and_values() -> None:
    loader = L.make_train_loader(dataset(), 2, Dist(), workers=0)
    expected = collected(loader, 0)
    assert_same(expected, list(L.prefetch(loader, torch.device("cpu"))))
    for batch in L.prefetch(loader, torch.device("cpu"), channels_last=True):
        assert batch.image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masks", [True, False])
def test_prefetch_on_a_gpu_keeps_order_and_values(masks: bool) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    data = dataset(64)
    data.items = items(64, masks)
    loader = L.make_train_loader(data, 4, Dist(device=device), workers=2)
    expected = collected(loader, 0)
    seen = []
    for batch in L.prefetch(loader, device):
        assert (batch.image.device, batch.index.device.type) == (device, "cpu")
        assert batch.label.device == device if masks else batch.label is None
        busy = torch.ones(2000, 2000, device=device)
        for _ in range(20):
            busy = busy @ busy * 1e-4  # the queue is long: the copy of the next batch overtakes it
        label = batch.label.clone() if masks else None
        seen.append(L.Batch((batch.image + 0 * busy[0, 0]).cpu(), label, batch.index))
    on_host = [batch._replace(label=batch.label.cpu() if masks else None) for batch in seen]
    assert_same(on_host, expected)
