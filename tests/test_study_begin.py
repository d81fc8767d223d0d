"""A study of own photos that fits into some hours: what is measured, decided, written, and added later."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.data.lists import read_ids
from common.errors import UserError
from studies import begin as beginning
from studies.__main__ import main
from studies.begin import CANDIDATES, begin, budget, shape_for
from studies.plan import fits, make_plan
from studies.study import Study, jobs, load_study, output_folder, resolve
from tests import tiny
from tools.training import quirks_of

SUP_MS, SEMI_MS = 500, 1500


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """20 photos with masks, 30 without, 4 to measure on."""
    return tiny.write_dataset(tmp_path / "farm", labeled=20, unlabeled=30, masks=False)


class DryRuns:
    """Stands for `sh train.sh`: a forecast by the method, and what was asked for."""

    def __init__(self, memory: Callable[[str], float] = lambda _: 0.001, error: str = "") -> None:
        self.memory, self.error, self.asked = memory, error, list[tuple[str, str]]()

    def __call__(self, command: list[str], *, cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == ["sh", "train.sh", "1", "0"]
        assert command[-1] == "run.dry_run=true"
        text = Path(command[4]).read_text()
        crop = text.split("crop_size: ")[1].splitlines()[0]
        self.asked.append((cwd.name, crop))
        if self.error:
            return subprocess.CompletedProcess(command, 2, "", f"warning: slow\nerror: {self.error}\n")
        step = SUP_MS if "sup_only" in text else SEMI_MS
        line = f"dry run: peak memory {self.memory(crop):.2f} GiB per process, {step} ms per step, 9.9 images/s, ..."
        return subprocess.CompletedProcess(command, 0, f"{line}\n", "")


@pytest.fixture
def dry_runs(monkeypatch: pytest.MonkeyPatch) -> DryRuns:
    found = DryRuns()
    monkeypatch.setattr(beginning.subprocess, "run", found)
    monkeypatch.setattr(beginning, "count_gpus", lambda: 0)
    return found


def seconds(study: Study) -> float:
    """Of the steps alone."""
    steps = [SUP_MS, *[SEMI_MS] * (len(study.runs) - 1)]
    return study.budget_steps * sum(steps) / 1000 * len(study.seeds) * len(study.splits)


def test_what_is_written_can_be_run_as_it_is(dataset: Path, dry_runs: DryRuns) -> None:
    lines: list[str] = []
    path = begin(dataset, 0.4, lines.append)
    assert path == dataset.parent / "study.yaml"
    study = load_study(path)
    assert (study.baseline, len(study.runs), study.seeds, study.splits) == (
        "supervised only",
        2,
        (0,),
        ("study/20",),
    )
    assert 0.5 < seconds(study) / (0.4 * 3600) < 0.9
    assert [name for name, _ in dry_runs.asked] == ["u2pl", "proto_consistency"]  # no time for a third one
    out = output_folder(study)
    assert out == dataset.parent / "runs"
    plan = make_plan(study, out)  # it is a matched comparison
    assert not [entry for entry in plan.differences if entry["matters"]]
    for run in plan.runs:
        assert not [name for name, on in quirks_of(run.cfg).items() if on]
        assert run.cfg.data.crop_size == (32, 32)  # photos of 48x40
    folder = dataset.parent / "study" / "20"
    assert len(read_ids(folder / "labeled.txt")) == 20
    assert len(read_ids(folder / "unlabeled.txt")) == 30
    said = "\n".join(lines)
    for words in (
        "measured supervised only: 0.50 s per step",
        "crops of 32x32, batches of 4",
        "1 seed(s), 20 masks",
    ):
        assert words in said


def test_more_hours_bring_seeds_then_methods_then_numbers_of_masks(dataset: Path, dry_runs: DryRuns) -> None:
    found = []
    for hours in (0.05, 1, 2, 5, 24):
        study = load_study(begin(dataset, hours, lambda _: None))
        found.append((len(study.runs), len(study.seeds), len(study.splits)))
        assert seconds(study) < hours * 3600
        assert study.budget_steps <= beginning.MOST
        (dataset.parent / "study.yaml").unlink()
    assert found == [(2, 1, 1), (2, 3, 1), (3, 3, 1), (3, 3, 2), (5, 3, 2)]


def test_fewer_masks_are_parts_of_more(dataset: Path, dry_runs: DryRuns) -> None:
    study = load_study(begin(dataset, 5, lambda _: None))
    assert study.splits == ("study/8", "study/20")
    few, many = (set(read_ids(dataset.parent / split / "labeled.txt")) for split in study.splits)
    assert len(few) == 8
    assert few < many
    assert {job.config for job in jobs(study, output_folder(study), {})} == {
        str(dataset.parent / "configs" / f"{name}.yaml")
        for name in ("supervised_only", "mean_teacher_cutmix", "cps_cutmix")
    }


def test_photos_without_masks_are_as_many_as_the_time_allows(tmp_path: Path, dry_runs: DryRuns) -> None:
    dataset = tiny.write_dataset(tmp_path / "farm", labeled=8, unlabeled=100, masks=False)
    study = load_study(begin(dataset, 0.03, lambda _: None))
    without = read_ids(tmp_path / "farm" / "study" / "8" / "unlabeled.txt")
    assert 8 < len(without) < 60
    for job in jobs(study, output_folder(study)):
        assert (
            make_plan(study, output_folder(study)).steps["study/8"][job.method.label]
            <= study.budget_steps * 1.2
        )


def test_too_little_time_or_memory_takes_smaller_photos(
    tmp_path: Path, dry_runs: DryRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = tiny.write_dataset(tmp_path / "farm", masks=False)
    for path in (tmp_path / "farm" / "img").iterdir():
        Image.fromarray(np.zeros((600, 800, 3), np.uint8)).save(path)
    lines: list[str] = []
    study = load_study(begin(dataset, 0.05, lines.append))
    crops = [crop for _, crop in dry_runs.asked]
    assert crops == ["[256, 256]", "[128, 128]", "[128, 128]"]
    assert any("too slow for so little time" in line for line in lines)
    cfg = resolve(jobs(study, output_folder(study))[0])
    assert cfg.data.resize == (192, 256)
    (dataset.parent / "study.yaml").unlink()
    monkeypatch.setattr(
        beginning.subprocess, "run", DryRuns(lambda crop: 1e6 if crop == "[256, 256]" else 0.1)
    )
    begin(dataset, 2, lines.append)
    assert any("1000000.0 GiB of memory, of" in line for line in lines)
    assert "photos shrunk to 256x192" in (lines[-2] if "photos shrunk" in lines[-2] else lines[-3])
    (dataset.parent / "study.yaml").unlink()
    monkeypatch.setattr(beginning.subprocess, "run", DryRuns(lambda _: 1e6))
    with pytest.raises(UserError, match="the memory is too small for any method"):
        begin(dataset, 2, lines.append)
    assert not (dataset.parent / "study.yaml").exists()


def test_more_masks_extend_the_study(dataset: Path, dry_runs: DryRuns) -> None:
    path, lines = begin(dataset, 0.4, lambda _: None), list[str]()
    text = path.read_text().replace("seeds: [0]", "seeds: [0, 1]  # my own")
    path.write_text(text)
    begin(dataset, 0.4, lines.append)
    assert path.read_text() == text
    assert lines == [f"{path}: kept as it is, for no masks are new"]
    before = {
        file: file.read_bytes()
        for name in ("configs", "study")
        for file in (dataset.parent / name).rglob("*.*")
    }
    for i in range(20, 24):  # annotated since
        Image.fromarray(tiny.photo(i)[1]).save(dataset.parent / "mask" / f"p{i:03d}.png")
    dry_runs.asked.clear()
    begin(dataset, 0.4, lines.append)
    assert dry_runs.asked == []
    assert (dataset.parent / "study.yaml.before").read_text() == text
    new = load_study(path)
    assert new.splits == ("study/20", "study/24")
    assert new.seeds == (0, 1)
    assert new.budget_steps == load_study(dataset.parent / "study.yaml.before").budget_steps
    assert make_plan(new, output_folder(new))
    assert set(read_ids(dataset.parent / "study/20/labeled.txt")) < set(
        read_ids(dataset.parent / "study/24/labeled.txt")
    )
    assert {file: file.read_bytes() for file in before} == before
    path.write_text(path.read_text().replace("splits:", "splits:\n "))
    Image.fromarray(tiny.photo(24)[1]).save(dataset.parent / "mask" / "p024.png")
    begin(dataset, 0.4, lines.append)
    assert lines[-1] == f"{path}: kept as it is"


def test_a_budget_too_short_for_the_new_masks_grows(tmp_path: Path, dry_runs: DryRuns) -> None:
    dataset, lines = tiny.write_dataset(tmp_path / "farm", labeled=8, unlabeled=60, masks=False), list[str]()
    path = begin(dataset, 0.001, lines.append)
    assert load_study(path).budget_steps == 4  # two epochs of eight photos
    for i in range(8, 28):
        Image.fromarray(tiny.photo(i)[1]).save(dataset.parent / "mask" / f"p{i:03d}.png")
    begin(dataset, 0.001, lines.append)
    study = load_study(path)
    assert (study.splits, study.budget_steps) == (("study/8", "study/28"), 14)
    assert "which needs 14 steps, so all runs are trained anew" in lines[-1]
    assert make_plan(study, output_folder(study)).steps["study/28"] == {
        "supervised only": 14, "mean teacher + CutMix": 14
    }  # fmt: skip


def test_where_all_photos_have_masks_half_of_them_are_hidden(tmp_path: Path, dry_runs: DryRuns) -> None:
    dataset, lines = tiny.write_dataset(tmp_path / "farm", labeled=14, unlabeled=0), list[str]()
    study = load_study(begin(dataset, 0.4, lines.append))
    assert study.splits == ("study/7",)
    assert "of 14 masks 7 are used" in lines[0]
    assert len(read_ids(tmp_path / "farm" / "study" / "7" / "unlabeled.txt")) == 7


def test_what_cannot_be_begun_is_one_line(
    tmp_path: Path, dataset: Path, dry_runs: DryRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--hours 0: expected a positive number"):
        begin(dataset, 0)
    one = tiny.write_dataset(tmp_path / "one", labeled=1, masks=False)
    with pytest.raises(
        UserError, match="of 11 photos to train on 1 have masks; a study needs two with and two"
    ):
        begin(one, 2)
    monkeypatch.setattr(beginning.subprocess, "run", DryRuns(error="a mask is damaged"))
    with pytest.raises(UserError, match="dry run of supervised only: a mask is damaged"):
        main(["begin", str(dataset), "--hours", "2"])
    assert {path.name for path in dataset.parent.iterdir()} == {
        "dataset.yaml", "img", "mask", "splits", "train.txt", "val.txt"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("photo", "side", "resize", "crop"),
    [
        ((360, 480), 256, None, (256, 256)),
        ((3000, 4000), 256, (384, 512), (256, 256)),
        ((4000, 3000), 128, (256, 192), (128, 128)),
        ((100, 4000), 256, (32, 512), (32, 256)),
        ((70, 90), 256, None, (64, 64)),
        ((20, 30), 256, None, (32, 32)),
    ],
)
def test_photos_are_at_most_twice_as_long_as_a_crop(
    photo: tuple[int, int], side: int, resize: tuple[int, int] | None, crop: tuple[int, int]
) -> None:
    found = shape_for(photo, side, 4)
    assert (found.resize, found.crop) == (resize, crop)


def test_turned_photos_count_as_they_are_seen(dataset: Path) -> None:
    from common.data.dataset_yaml import load_spec

    exif = Image.Exif()
    exif[0x112] = 6
    for path in (dataset.parent / "img").iterdir():
        Image.fromarray(np.zeros((60, 90, 3), np.uint8)).save(path, exif=exif)
    assert beginning._usual_size(load_spec(str(dataset))) == (90, 60)


def test_the_budget_is_whole_epochs_of_all_methods() -> None:
    assert budget(1000, [8, 38]) == (988, True)
    assert budget(500, [10]) == (500, True)
    steps, exact = budget(90, [8, 41])
    assert (steps, exact) == (82, False)
    assert budget(5, [8, 41]) == (82, False)  # a teacher needs two epochs
    for limit in range(100, 2000, 37):
        steps, exact = budget(limit, [7, 19, 50])
        assert limit / 2 - 50 <= steps <= limit
        assert exact == all(fits(steps, length) for length in (7, 19, 50))


def test_the_methods_are_those_of_the_projects() -> None:
    assert len({one.label for one in CANDIDATES}) == len(CANDIDATES)
    assert CANDIDATES[0].changes == {"method": {"mode": "sup_only"}}
