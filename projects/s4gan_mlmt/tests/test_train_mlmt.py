"""The original's command line for the image-level branch, on a generated Pascal VOC and on bad input."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from projects.s4gan_mlmt.compat import train_mlmt
from projects.s4gan_mlmt.config import Config
from projects.s4gan_mlmt.mlmt.fusion import read_scores
from projects.s4gan_mlmt.tests.mlmt_toys import flags, write_config, write_voc
from projects.s4gan_mlmt.training_split import write_permutation
from tests.runs import ROOT, saved

SMALL = (
    "mlmt.backbone=resnet_tiny",
    "mlmt.weights=none",
    "mlmt.size=33",
    "run.device=cpu",
    "run.channels_last=false",
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SSS_DATA", raising=False)


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("data") / "voc")


def parsed(*words: str) -> Config:
    return train_mlmt.branch_config(train_mlmt.parser().parse_intermixed_args(words))


def command(folder: Path, *more: str) -> list[str]:
    return [
        "--data-dir", str(folder), "--pkl-file", str(folder / "train_voc_split.pkl"), "--labeled-ratio", "0.5",
        "--num-epochs", "2", "--batch-size-lab", "2", "--batch-size-unlab", "3", "--batch-size-val", "2",
        "--evaluation-epochs", "1", "--workers", "0", *more, *SMALL,
    ]  # fmt: skip


# --- flags -----------------------------------------------------------------------------------------------------


def test_without_flags_the_settings_are_the_originals() -> None:
    cfg = parsed()
    mlmt = cfg.mlmt
    assert (mlmt.lr, mlmt.eta_min, mlmt.weight_decay, mlmt.momentum, mlmt.nesterov) == (
        3e-2,
        1e-4,
        1e-5,
        0.9,
        True,
    )
    assert (mlmt.labeled_batch, mlmt.unlabeled_batch, mlmt.val_batch, mlmt.workers) == (16, 80, 32, 4)
    assert (mlmt.epochs, mlmt.burn_in_epochs, mlmt.evaluation_epochs) == (100, 10, 5)
    assert (mlmt.w_cons, mlmt.ema_decay, mlmt.size, mlmt.backbone) == (1.0, 0.999, 320, "resnet101")
    assert mlmt.weights == "resnet101-5d3b4d8f.pth"
    assert (mlmt.flat_roll, mlmt.copy_teacher, mlmt.labels) == (True, False, "masks")
    assert (cfg.data.dataset, cfg.data.labeled_ratio) == ("voc", 0.125)
    assert cfg.data.split_file == "./checkpoints/voc_semi_0_125/train_voc_split.pkl"


def test_the_originals_places_are_taken_where_they_exist(tmp_path: Path) -> None:
    (tmp_path / "data" / "voc_dataset").mkdir(parents=True)
    (tmp_path / "pretrained_models").mkdir()
    (tmp_path / "pretrained_models" / "resnet101-5d3b4d8f.pth").touch()
    cfg = parsed()
    assert cfg.data.root == "./data/voc_dataset/"
    assert cfg.mlmt.weights == "pretrained_models/resnet101-5d3b4d8f.pth"


@pytest.mark.parametrize(
    ("flag", "value", "key"),
    [
        ("--lr", 0.5, "lr"), ("--eta-min", 0.25, "eta_min"), ("--weight-decay", 0.125, "weight_decay"),
        ("--workers", 3, "workers"), ("--batch-size-lab", 5, "labeled_batch"),
        ("--batch-size-unlab", 6, "unlabeled_batch"), ("--batch-size-val", 7, "val_batch"),
        ("--num-epochs", 8, "epochs"),
        ("--burn-in-epochs", 9, "burn_in_epochs"), ("--evaluation-epochs", 11, "evaluation_epochs"),
        ("--w-cons", 0.75, "w_cons"), ("--ema-decay", 0.5, "ema_decay"),
    ],
)  # fmt: skip
def test_every_flag_reaches_its_setting(flag: str, value: float, key: str) -> None:
    assert getattr(parsed(flag, str(value)).mlmt, key) == value


def test_other_flags(voc: Path, tmp_path: Path) -> None:
    cfg = parsed("--data-dir", str(voc), "--pkl-file", "a 1.pkl", "--labeled-ratio", "0.02", "--verbose",
                 "--cons-loss", "cosine", "--num-classes", "21", "run.seed=5")  # fmt: skip
    assert (cfg.data.root, cfg.data.split_file, cfg.data.labeled_ratio) == (str(voc), "a 1.pkl", 0.02)
    assert (cfg.run.log_interval, cfg.run.seed) == (1, 5)
    config = write_config(tmp_path / "c.yaml", voc)
    assert parsed("--config", str(config)).mlmt.lr == 0.02
    assert parsed("--config", str(config), "--lr", "0.5").mlmt.lr == 0.5
    assert parsed("--config", str(config), "--lr", "0.5", "mlmt.lr=0.75").mlmt.lr == 0.75


def test_everything_labeled_needs_no_permutation() -> None:
    cfg = parsed("--labeled-ratio", "1", "--pkl-file", "absent.pkl")
    assert (cfg.data.split, cfg.data.labeled_ratio, cfg.data.split_file) == ("full", None, None)


def test_label_files_replace_the_masks_where_both_are_there(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", label_files=True)
    assert parsed("--data-dir", str(folder)).mlmt.labels == "files"
    assert parsed("--data-dir", str(folder), "mlmt.labels=masks").mlmt.labels == "masks"
    (folder / "val_label.txt").unlink()
    assert parsed("--data-dir", str(folder)).mlmt.labels == "masks"


# --- runs ------------------------------------------------------------------------------------------------------


def test_the_command_trains_and_writes_the_scores(voc: Path, tmp_path: Path) -> None:
    assert train_mlmt.main(command(voc, "--exp-name", "voc_5")) == 0
    folder = tmp_path / "mlmt_output" / "voc_5"
    for epochs in (1, 2):
        for name in ("val", "ema"):
            raw = read_scores(folder / f"output_{name}_raw_{epochs}.txt", 5, 21)
            binary = np.loadtxt(folder / f"output_{name}_bin_{epochs}.txt")
            assert np.array_equal(raw > 0.5, binary.astype(bool))
    result = json.loads((folder / "result.json").read_text())
    assert (result["branch"], result["steps"], result["scores"]) == ("mlmt", 6, "output_ema_raw_2.txt")
    assert saved(folder)["branch"] == "mlmt"
    assert "5 labeled + 5 unlabeled images" in (folder / "train.log").read_text()


def test_both_branches_share_the_labeled_images(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images by position in the training list, the first `int(ratio * N)` of the permutation."""
    write_permutation(tmp_path / "p.pkl", [7, 3, 9, 0, 1, 2, 4, 5, 6, 8])
    seen = []

    def look(cfg: Config, *_: object) -> None:
        from projects.s4gan_mlmt.training_split import training_split

        seen.append([item.id for item in training_split(cfg).split.labeled])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_mlmt, "train", look)
        train_mlmt.main(command(voc, "--pkl-file", str(tmp_path / "p.pkl"), "--labeled-ratio", "0.39"))
    assert seen == [["p007", "p003", "p009"]]


def test_the_folder_of_the_original_is_enough(tmp_path: Path) -> None:
    """Its four text files and the photos: no masks, none of the lists with bare ids."""
    folder = write_voc(tmp_path / "voc", label_files=True)
    for path in (*(folder / "SegmentationClassAug").iterdir(), folder / "train_aug.txt", folder / "val.txt"):
        path.unlink()
    assert train_mlmt.main(command(folder)) == 0
    found = json.loads((tmp_path / "mlmt_output" / "default" / "result.json").read_text())
    assert 0 < found["ema_loss_class"] < 3


def test_a_dry_run_leaves_nothing(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_mlmt.main(command(voc, "run.dry_run=true")) == 0
    assert re.search(r"dry run of mlmt: peak memory .* for 6 steps", capsys.readouterr().out)
    assert not (tmp_path / "mlmt_output").exists()


def test_as_a_program_from_anywhere(voc: Path, tmp_path: Path) -> None:
    path = ROOT / "projects" / "s4gan_mlmt" / "train_mlmt.py"
    words = [*command(voc, "--labeled-ratio", "0.01")]
    done = subprocess.run(
        [sys.executable, str(path), *words], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "gives 0 of 10 images" in done.stderr


# --- bad input -------------------------------------------------------------------------------------------------


class Hostile:
    """Makes a file when it is unpickled the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def refused(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        train_mlmt.main(list(words))
    message = str(caught.value)
    assert "\n" not in message
    assert not Path("mlmt_output").exists()
    return message


def test_a_hostile_pickle_runs_nothing(voc: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    data = pickle.dumps(Hostile(made))
    (tmp_path / "bad.pkl").write_bytes(data)
    assert "refused" in refused(*command(voc, "--pkl-file", str(tmp_path / "bad.pkl")))
    assert not made.exists()
    pickle.loads(data).close()  # so the payload does work
    assert made.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (list(range(11)), r"11 images.*training list of 'voc' has 10"),
        (list(range(9)), r"9 images.*training list of 'voc' has 10"),
        ([0] * 10, r"not a permutation of 0..9"),
        ("text", r"refused"),
    ],
)
def test_splits_that_do_not_fit(voc: Path, tmp_path: Path, values: object, message: str) -> None:
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(values))
    assert re.search(message, refused(*command(voc, "--pkl-file", str(tmp_path / "p.pkl"))))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--pkl-file", "absent.pkl"), r"absent.pkl: no such file"),
        (("--labeled-ratio", "0"), r"'labeled_ratio' is 0.0; expected more than 0"),
        (("--labeled-ratio", "1.5"), r"'labeled_ratio' is 1.5"),
        (("--labeled-ratio", "0.05"), r"gives 0 of 10 images"),
        (("--num-classes", "20"), r"--num-classes 20: dataset 'voc' has 21"),
        (("--cons-loss", "mse"), r"--cons-loss mse: unknown; cosine"),
        (("--data-dir", "absent"), r"absent: no such folder"),
        (("--num-epochs", "0"), r"'epochs' is 0; expected 1 or more"),
        (
            ("mlmt.labels=files",),
            r"mlmt.train_labels=train_label.txt: no such file.*mlmt.val_labels=val_label.txt: no such file",
        ),
        (("mlmt.weight=none",), r"unknown key 'mlmt.weight'.*'mlmt.weights'"),
    ],
)
def test_flags_that_make_no_sense(voc: Path, words: tuple[str, ...], message: str) -> None:
    assert re.search(message, refused(*command(voc, *words)))


def test_weights_that_are_missing_are_named(voc: Path) -> None:
    message = refused(*[word for word in command(voc) if word != "mlmt.weights=none"])
    assert message.startswith("mlmt.weights=resnet101-5d3b4d8f.pth: no such file")


def test_label_files_of_another_class_count(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", label_files=True)
    for name, count in (("train", 10), ("val", 5)):
        rows = "".join(" ".join(map(str, flags(i)[:20])) + " \n" for i in range(count))
        (folder / f"{name}_label.txt").write_text(rows)
    assert re.search(r"label.txt:\d+: 20 flags instead of 21", refused(*command(folder)))


def test_a_broken_photo_stops_or_is_skipped(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc")
    (folder / "JPEGImages" / "p002.jpg").write_bytes(b"no photo")
    with pytest.raises(UserError, match=r"p002.jpg: image cannot be read.*data.on_error=skip"):
        train_mlmt.main(command(folder))
    assert train_mlmt.main(command(folder, "--exp-name", "on", "data.on_error=skip")) == 0
    result = json.loads(Path("mlmt_output/on/result.json").read_text())
    assert result["skipped_files"] == 2  # once per epoch
