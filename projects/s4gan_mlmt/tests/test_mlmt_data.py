"""Views, label vectors and streams of the image-level branch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from common.config import IMAGENET_MEAN, IMAGENET_STD
from common.distributed import Dist
from common.errors import UserError
from common.run.progress import Progress
from projects.s4gan_mlmt.mlmt.data import (
    BatchShards,
    CleanAndAugmented,
    MlmtData,
    OneView,
    augmented_view,
    branch_spec,
    build_mlmt_data,
    build_score_data,
    draw_jitter,
    label_rows,
    mirrored,
    presence,
    split_views,
    square,
)
from projects.s4gan_mlmt.tests.mlmt_toys import CLASSES, StepBatches, config, flags, photo, write_voc
from projects.s4gan_mlmt.training_split import training_split


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("data") / "voc", label_files=True)


def built(folder: Path, dist: Dist | None = None, **sections: dict) -> MlmtData:
    cfg = config(folder, **sections)
    spec = branch_spec(cfg)
    masks = cfg.mlmt.labels == "masks"
    return build_mlmt_data(cfg, spec, training_split(cfg, spec, masks=masks).split, dist or Dist())


def epoch(data: MlmtData, number: int, start: int = 0, dist: Dist | None = None) -> list[StepBatches]:
    """The batches of an epoch's steps with this process's shares of them."""
    length = data.steps_per_epoch
    groups = enumerate(
        data.epoch(number, start, dist or Dist(), channels_last=False), number * length + start
    )
    return [
        StepBatches(*batches, *data.shares(Progress(step, length, number + 1))) for step, (batches,) in groups
    ]


# --- views -----------------------------------------------------------------------------------------------------


class Fixed(random.Random):
    """Draws that are given."""

    def __init__(self, value: float) -> None:
        super().__init__(0)
        self.value = value

    def random(self) -> float:
        return self.value


def test_a_photo_becomes_a_square_with_pils_filter() -> None:
    image = photo(3)[0]
    found = np.asarray(square(image, 33))
    assert found.shape == (33, 33, 3)
    assert np.array_equal(
        found, np.asarray(Image.fromarray(image).resize((33, 33), Image.Resampling.BILINEAR))
    )


def test_the_clean_view_is_mirrored_by_a_draw() -> None:
    picture = square(photo(1)[0], 33)
    for value, turned in ((0.49, True), (0.5, False)):
        found = np.asarray(mirrored(picture, Fixed(value)))
        expected = np.asarray(picture)[:, ::-1] if turned else np.asarray(picture)
        assert np.array_equal(found, expected)


def test_the_jitter_has_the_documented_ranges() -> None:
    draws = [draw_jitter(random.Random(i)) for i in range(300)]
    assert len({draw.order for draw in draws}) == 24
    for factor in range(3):
        values = [draw.factors[factor] for draw in draws]
        assert 0.6 <= min(values) < 0.62
        assert 1.38 < max(values) <= 1.4
    hues = [draw.factors[3] for draw in draws]
    assert -0.1 <= min(hues) < -0.095
    assert 0.095 < max(hues) <= 0.1


def test_the_augmented_view_is_always_blurred(monkeypatch: pytest.MonkeyPatch) -> None:
    radii = []
    monkeypatch.setattr(
        ImageFilter, "GaussianBlur", lambda radius: radii.append(radius) or ImageFilter.SMOOTH()
    )
    for i in range(50):
        augmented_view(square(photo(1)[0], 33), random.Random(i))
    assert len(radii) == 50
    assert 0.1 <= min(radii) < 0.2
    assert 1.8 < max(radii) <= 2.0


def test_both_views_are_of_one_photo_with_flips_of_their_own() -> None:
    image = photo(2)[0]
    two = CleanAndAugmented(IMAGENET_MEAN, IMAGENET_STD, 33)
    one = OneView(IMAGENET_MEAN, IMAGENET_STD, 33, CLASSES, random=False)(image, None, random.Random(0))[0]
    turned, agree = set(), set()
    for i in range(40):
        views, nothing = two(image, None, random.Random(i))
        assert views.shape == (6, 33, 33)
        assert nothing is None
        clean, augmented = views.split(3)
        flips = [bool((v - one.flip(-1)).abs().mean() < (v - one).abs().mean()) for v in (clean, augmented)]
        assert torch.equal(clean, one.flip(-1) if flips[0] else one)
        assert not torch.equal(augmented, one)
        turned.add(flips[0])
        agree.add(flips[0] == flips[1])
    assert turned == agree == {True, False}


def test_the_test_view_draws_nothing_and_is_normalized() -> None:
    image, mask = photo(4)
    rng = random.Random(0)
    before = rng.getstate()
    x, y = OneView(IMAGENET_MEAN, IMAGENET_STD, 40, CLASSES, random=False)(image, mask, rng)
    assert rng.getstate() == before
    expected = (np.asarray(square(image, 40)) - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(x.permute(1, 2, 0).numpy(), expected, atol=1e-5)
    assert y.tolist() == flags(4)


def test_views_are_split_in_their_memory_layout() -> None:
    x = torch.randn(2, 6, 4, 4)
    for layout in (torch.contiguous_format, torch.channels_last):
        clean, augmented = split_views(x.contiguous(memory_format=layout))
        assert torch.equal(torch.cat((clean, augmented), dim=1), x)
        assert clean.is_contiguous(memory_format=layout)


# --- label vectors ---------------------------------------------------------------------------------------------


def test_presence_has_the_background_last_and_no_void() -> None:
    mask = np.array([[0, 0, 2], [255, 2, 4]], np.uint8)
    assert presence(mask, 5).tolist() == [0, 1, 0, 1, 1]
    assert presence(np.full((2, 2), 255, np.uint8), 3).tolist() == [0, 0, 0]
    assert presence(np.full((2, 2), 1, np.uint8), 3).tolist() == [1, 0, 0]


def test_vectors_of_masks_are_the_lines_of_the_label_file(voc: Path) -> None:
    for labels in ("masks", "files"):
        data = built(voc, mlmt={**MLMT, "labels": labels})
        seen = {}
        for batches in epoch(data, 0):
            for position, vector in zip(batches.labeled.index.tolist(), batches.labeled.label, strict=True):
                seen[data.split.labeled[position].id] = vector.tolist()
        assert seen == {item.id: flags(int(item.id[1:])) for item in data.split.labeled}


MLMT = {
    "backbone": "resnet_tiny", "size": 33, "workers": 0, "labeled_batch": 2, "unlabeled_batch": 3, "val_batch": 2,
    "epochs": 3,
}  # fmt: skip


def test_rows_of_unlabeled_images_are_never_read(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", label_files=True)
    data = built(folder, mlmt={**MLMT, "labels": "files"})
    labeled = {int(item.id[1:]) for item in data.split.labeled}
    path = folder / "train_label.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line if i in labeled else "unread" for i, line in enumerate(lines)))
    again = built(folder, mlmt={**MLMT, "labels": "files"})
    assert torch.equal(again.vectors, data.vectors)
    some = min(labeled)
    lines[some] = "unread"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"train_label.txt:{some + 1}: 1 flags instead of 21"):
        built(folder, mlmt={**MLMT, "labels": "files"})


def test_masks_of_unlabeled_images_are_never_opened(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc")
    data = built(folder)
    labeled = {item.id for item in data.split.labeled}
    for path in (folder / "SegmentationClassAug").iterdir():
        if path.stem not in labeled:
            path.write_bytes(b"no mask")
    assert len(epoch(built(folder), 0)) == 3


def test_files_need_no_masks(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", label_files=True)
    for path in (folder / "SegmentationClassAug").iterdir():
        path.unlink()
    cfg = config(folder, mlmt={**MLMT, "labels": "files"})
    assert len(epoch(built(folder, mlmt={**MLMT, "labels": "files"}), 0)) == 3
    scored = build_score_data(cfg, branch_spec(cfg), "val", Dist())
    found = torch.cat([batch.label for batch in scored.batches(Dist(), channels_last=False)])
    assert found.tolist() == [flags(i) for i in range(10, 15)]


def test_rows_follow_the_list_beside_the_file(tmp_path: Path) -> None:
    """Other order than the dataset's own list."""
    folder = write_voc(tmp_path / "voc", label_files=True)
    order = [3, 1, 2, 0, *range(4, 10)]
    (folder / "train_img.txt").write_text("".join(f"p{i:03d}.jpg\n" for i in order))
    (folder / "train_label.txt").write_text("".join(" ".join(map(str, flags(i))) + " \n" for i in order))
    cfg = config(folder)
    spec = branch_spec(cfg)
    items = spec.read_list("train")[:3]
    assert label_rows(spec, items, "train_label.txt", "train").tolist() == [flags(i) for i in range(3)]


def test_lists_of_the_original_stand_in_for_missing_ones(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", label_files=True)
    expected = [item.id for item in branch_spec(config(folder)).read_list("train")]
    (folder / "train_aug.txt").unlink()
    (folder / "val.txt").unlink()
    spec = branch_spec(config(folder))
    assert [item.id for item in spec.read_list("train")] == expected
    assert len(spec.read_list("val")) == 5


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train_label.txt", None, r"train_label.txt: no such label file; give mlmt.train_labels"),
        ("train_label.txt", "1 0\n" * 10, r"train_label.txt:\d+: 2 flags instead of 21"),
        ("train_label.txt", ("1 " * 21 + "\n") * 9, r"9 rows for a list of 10 images"),
        ("train_label.txt", ("2 " * 21 + "\n") * 10, r"'2' is not a flag"),
        ("train_img.txt", "".join(f"q{i}.jpg\n" for i in range(10)), r"has no row for 'p\d+'"),
    ],
)
def test_label_files_that_do_not_fit(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    folder = write_voc(tmp_path / "voc", label_files=True)
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        built(folder, mlmt={**MLMT, "labels": "files"})


# --- streams ---------------------------------------------------------------------------------------------------


def ids(data: MlmtData, found: list[StepBatches]) -> tuple[list[list[str]], list[list[str]]]:
    labeled = [[data.loaders["labeled"].dataset.items[i].id for i in b.labeled.index.tolist()] for b in found]
    unlabeled = [
        [data.loaders["unlabeled"].dataset.items[i].id for i in b.unlabeled.index.tolist()] for b in found
    ]
    return labeled, unlabeled


def test_an_epoch_is_a_pass_over_the_labeled_images(voc: Path) -> None:
    data = built(voc)
    labeled, _ = ids(data, epoch(data, 0))
    assert [len(b) for b in labeled] == [2, 2, 1]
    assert sorted(name for batch in labeled for name in batch) == sorted(
        item.id for item in data.split.labeled
    )
    assert ids(data, epoch(data, 1))[0] != labeled


def test_the_unlabeled_stream_begins_anew_inside_an_epoch(voc: Path) -> None:
    """Five images in batches of 3: passes of 3 + 2, in orders of their own; every epoch begins a pass."""
    data = built(voc, mlmt={**MLMT, "labeled_batch": 1})
    _, unlabeled = ids(data, epoch(data, 0))
    assert [len(b) for b in unlabeled] == [3, 2, 3, 2, 3]
    every = sorted(item.id for item in data.split.unlabeled)
    passes = [unlabeled[0] + unlabeled[1], unlabeled[2] + unlabeled[3]]
    assert [sorted(one) for one in passes] == [every, every]
    _, later = ids(data, epoch(data, 1))
    assert len({tuple(one) for one in (*passes, later[0] + later[1], later[2] + later[3])}) > 1
    assert sorted(later[0] + later[1]) == every


def test_an_unlabeled_stream_that_is_longer_is_cut(voc: Path) -> None:
    data = built(voc, mlmt={**MLMT, "unlabeled_batch": 1})
    assert len(epoch(data, 0)) == 3
    assert [len(b) for b in ids(data, epoch(data, 1))[1]] == [1, 1, 1]


@pytest.mark.parametrize("unlabeled_batch", [1, 3, 5])
def test_an_epoch_continues_anywhere(voc: Path, unlabeled_batch: int) -> None:
    settings = {**MLMT, "labeled_batch": 1, "unlabeled_batch": unlabeled_batch}
    whole = epoch(built(voc, mlmt=settings), 2)
    for start in range(1, 5):
        parts = epoch(built(voc, mlmt=settings), 2, start)
        assert len(parts) == 5 - start
        for one, two in zip(whole[start:], parts, strict=True):
            torch.testing.assert_close(one[:2], two[:2], rtol=0, atol=0)
            assert one[2:] == two[2:]


def test_an_epoch_may_be_left_and_begun_again(voc: Path) -> None:
    data = built(voc, mlmt={**MLMT, "labeled_batch": 1, "workers": 1})
    stream = data.epoch(0, 0, Dist(), False)
    next(stream)
    stream.close()
    again = epoch(data, 0)
    data.close()
    for one, two in zip(again, epoch(built(voc, mlmt={**MLMT, "labeled_batch": 1}), 0), strict=True):
        assert torch.equal(one.unlabeled.image, two.unlabeled.image)


def counted(found: list[StepBatches]) -> Iterator[tuple[Tensor, Tensor]]:
    for b in found:
        yield b.labeled.image[: b.labeled_share.own], b.unlabeled.image[: b.unlabeled_share.own]


@pytest.mark.parametrize("labeled_batch", [2, 4])
def test_two_processes_see_what_one_does(voc: Path, labeled_batch: int) -> None:
    """Down to the pixels; of a short last batch a process may have only what fills it up."""
    settings = {**MLMT, "labeled_batch": labeled_batch, "unlabeled_batch": 4}
    one = epoch(built(voc, mlmt=settings), 1)
    ranks = [epoch(built(voc, Dist(rank=r, world_size=2), mlmt=settings), 1) for r in (0, 1)]
    assert len({len(one), *map(len, ranks)}) == 1
    for whole, parts in zip(counted(one), zip(*map(counted, ranks), strict=True), strict=True):
        for kind in (0, 1):
            mixed = torch.cat([part[kind] for part in parts])
            assert mixed.shape == whole[kind].shape
            assert sorted(x.sum().item() for x in mixed) == sorted(x.sum().item() for x in whole[kind])
    for b in (*ranks[0], *ranks[1]):
        assert len(b.labeled.image) > 0
        assert len(b.unlabeled.image) > 0
    for step, (first, second) in enumerate(zip(*ranks, strict=True)):
        for name in ("labeled_share", "unlabeled_share"):
            a, b, whole = getattr(first, name), getattr(second, name), getattr(one[step], name)
            assert a.own + b.own == a.total == b.total == whole.total == whole.own
            assert a.processes == 2


def test_batches_that_cannot_be_shared(voc: Path) -> None:
    for key in ("labeled_batch", "unlabeled_batch"):
        settings = {**MLMT, "labeled_batch": 2, "unlabeled_batch": 2, key: 3}
        with pytest.raises(UserError, match=rf"mlmt.{key}=3: cannot be shared by 2 processes"):
            built(voc, Dist(world_size=2), mlmt=settings)


def test_everything_labeled_is_shown_in_both_roles(voc: Path) -> None:
    cfg = config(
        voc,
        data={"dataset": "voc", "root": str(voc), "split": "full", "labeled_ratio": None, "split_file": None},
    )
    spec = branch_spec(cfg)
    data = build_mlmt_data(cfg, spec, training_split(cfg, spec).split, Dist())
    assert [len(data.loaders["labeled"].dataset), len(data.loaders["unlabeled"].dataset)] == [10, 10]
    bare = build_mlmt_data(cfg, spec, replace(data.split, unlabeled=[]), Dist())
    assert [item.label for item in bare.loaders["unlabeled"].dataset.items] == [None] * 10


def test_names_for_messages(voc: Path) -> None:
    data = built(voc)
    batches = epoch(data, 0)[0]
    named = data.names([batches[:2]])().split(", ")
    assert len(named) == 5
    assert set(named[:2]) <= {item.id for item in data.split.labeled}


# --- validation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_whole_batches(processes: int) -> None:
    shards = [BatchShards(11, 4, Dist(rank=r, world_size=processes)) for r in range(processes)]
    found = [[[key.position for key in keys] for keys in shard] for shard in shards]
    assert [len(shard) for shard in shards] == [len(batches) for batches in found]
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [found[i % processes][i // processes] for i in range(3)] == expected


def test_validation_images_without_masks_are_scored_all_the_same(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc")
    (folder / "SegmentationClassAug" / "p011.png").unlink()
    (folder / "extra.txt").write_text("p010\np011\n")
    cfg = config(folder)
    scored = build_score_data(cfg, branch_spec(cfg), "extra.txt", Dist())
    (batch,) = scored.batches(Dist(), channels_last=False)
    assert batch.label[0].tolist() == flags(10)
    assert batch.label[1].tolist() == [-1] * CLASSES
    with pytest.raises(UserError, match="no mask for 'p011'"):
        build_score_data(cfg, branch_spec(cfg), "val", Dist())


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc")
    (folder / "none.txt").write_text("\n")
    cfg = config(folder)
    with pytest.raises(UserError, match="the list is empty"):
        build_score_data(cfg, branch_spec(cfg), "none.txt", Dist())
