"""Mistakes that only U2PL can be given; what all projects refuse is tested by `tests/test_bad_input.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.data.loaders import Key, Sample, SegmentationDataset
from projects.u2pl import train
from tests.mistakes import Fails, expect
from tests.tiny import write_config, write_dataset


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fails:
    return Fails(train.main, write_config, tmp_path, monkeypatch, capfd)


def test_rank_window_without_a_rank(fails: Fails) -> None:
    expect(fails("method.low_rank=3", "method.high_rank=20"), "low_rank", "3 classes")


AEL = {"sup_only_epochs": 0, "average_from_start": True, "ael": {"common_classes": [0], "start_epoch": 1}}


def fails_with_ael(fails: Fails, *overrides: str, **method: object) -> str:
    quirks = {"shared_first_epoch": False}
    return fails("optim.batch_size=4", *overrides, method={**AEL, **method}, quirks=quirks)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.crop_size=[32,40]", ("data.crop_size", "(32, 40)", "a square")),
        ("optim.batch_size=5", ("optim.batch_size=5", "5 unlabeled images", "even number")),
        ("optim.batch_size=2", ("optim.batch_size=2", "one mixed image", "optim.device_batch", "sync_bn")),
        ("optim.device_batch=2", ("optim.device_batch=2", "one mixed image")),
        ("method.mode=sup_only", ("method.ael", "method.ael=null")),
        ("method.average_from_start=false", ("method.ael", "method.average_from_start=true")),
        ("method.ael.momentun=0.9", ("method.ael.momentun", "did you mean 'method.ael.momentum'")),
        ("method.ael.paste_prob=2", ("method.ael", "'paste_prob' is 2.0")),
        ("method.ael.common_classes=[0,1,2]", ("method.ael.common_classes", "none of the 3 classes")),
        ("optim.batch_size=12", ("10 unlabeled images", "12")),
    ],
)  # fmt: skip
def test_ael_where_it_cannot_work(fails: Fails, override: str, parts: tuple[str, ...]) -> None:
    expect(fails_with_ael(fails, override), *parts)


def test_ael_with_one_labeled_image(fails: Fails, tmp_path: Path) -> None:
    single = write_dataset(tmp_path / "single", labeled=1)
    expect(fails_with_ael(fails, f"data.dataset={single}"), "1 labeled images", "less than two")


@pytest.mark.parametrize("kind", ["labeled", "unlabeled"])
def test_ael_names_a_broken_photo_that_it_reads_on_the_way(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Only partners to paste from, and only images chosen for a pair, meet the file."""
    path = fails.farm.parent / "img" / ("p001.jpg" if kind == "labeled" else "p008.jpg")
    path.write_bytes(path.read_bytes()[:300])
    readable = SegmentationDataset.__getitem__
    other = {"labeled": "unlabeled", "unlabeled": "labeled"}[kind]

    def without_it(self: SegmentationDataset, key: Key) -> Sample:
        safe = 5 if self.role in ("labeled", "unlabeled") else key.position
        return readable(self, key._replace(position=safe) if self.role != other else key)

    monkeypatch.setattr(SegmentationDataset, "__getitem__", without_it)
    expect(fails_with_ael(fails), path.name, "data.on_error=skip")
