"""The original's flags of the three training scripts: what they mean in the configuration, and which have no effect."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from common.config import load_config, to_dict
from common.errors import UserError
from projects.s4gan_mlmt import train, train_full, train_s4GAN, train_s4GAN_wrn38
from projects.s4gan_mlmt.compat import flags, training
from projects.s4gan_mlmt.compat.training import FULL, S4GAN, WRN38, Script
from projects.s4gan_mlmt.config import Config
from tools import ready

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# the commands of the original's README, their folders aside
VOC = ("--dataset", "pascal_voc", "--ignore-label", "255", "--num-classes", "21")
CONTEXT = ("--dataset", "pascal_context", "--ignore-label", "-1", "--num-classes", "60")
CITY = ("--dataset", "cityscapes", "--ignore-label", "250", "--num-classes", "19", "--input-size", "256,512")
EIGHTH = ("--labeled-ratio", "0.125")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The defaults look for the original's folders below the working directory."""
    monkeypatch.chdir(tmp_path)


def parsed(script: Script, *words: str) -> Config:
    return training.training_config(script, words)


def changes(script: Script, *words: str) -> dict[str, Any]:
    """What the flags change in the configuration without any."""
    before, after = to_dict(parsed(script)), to_dict(parsed(script, *words))
    return {
        f"{section}.{key}": value
        for section, values in after.items()
        for key, value in values.items()
        if value != before[section][key]
    }


# --- the documented commands are the published settings -------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "words", "name", "besides"),
    [
        (FULL, VOC, "voc_full_r101_sup", set()),
        (FULL, (*VOC, *EIGHTH), "voc_1322_r101_sup", {"data.split_file"}),
        (S4GAN, (*VOC, *EIGHTH, "--split-id", "s4gan/split_0.pkl"), "voc_1322_r101", set()),
        (S4GAN, VOC, "voc_full_r101", set()),
        (FULL, CONTEXT, "pascal_context_full_r101_sup", set()),
        (S4GAN, (*CONTEXT, *EIGHTH, "--split-id", "s4gan/split_0.pkl"), "pascal_context_624_r101", set()),
        (FULL, CITY, "cityscapes_full_r101_sup", set()),
        (S4GAN, (*CITY, *EIGHTH, "--split-id", "s4gan/split_0.pkl", "--threshold-st", "0.7",
                 "--learning-rate-D", "1e-5"), "cityscapes_371_r101", set()),
        (WRN38, (*CITY, "--labeled-ratio", "0.1", "--split-id", "s4gan/split_0.pkl", "--threshold-st", "0.55",
                 "--learning-rate", "1e-3", "--learning-rate-D", "1e-5"),
         "cityscapes_297_wrn38", {"data.workers", "optim.unlabeled_batch_size", "eval.every_epochs"}),
    ],
)  # fmt: skip
def test_documented_commands(
    script: Script, words: tuple[str, ...], name: str, besides: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ours, published = to_dict(parsed(script, *words)), to_dict(load_config(Config, CONFIGS / f"{name}.yaml"))
    places = {"eval.after_steps", *besides}
    if script is FULL:  # there is no discriminator
        places |= {"optim.lr_d", "method.st_threshold"}
    different = {
        f"{section}.{key}"
        for section in ("data", "model", "optim", "method", "eval", "quirks")
        for key in ours[section]
        if ours[section][key] != published[section][key]
    }
    assert different <= places, {key: ours[key.split(".")[0]][key.split(".")[1]] for key in different}
    assert capsys.readouterr().err == ""


def test_without_flags_the_settings_are_the_originals() -> None:
    full, semi, wide = (parsed(script) for script in (FULL, S4GAN, WRN38))
    assert [cfg.optim.batch_size for cfg in (full, semi, wide)] == [10, 8, 8]
    assert [cfg.method.name for cfg in (full, semi, wide)] == ["sup_only", "s4gan", "s4gan"]
    assert [cfg.keep.original_every for cfg in (full, semi, wide)] == [5000, 5000, 1000]
    assert [cfg.run.dir for cfg in (full, semi, wide)] == [
        "./checkpoints/voc_full/",
        "./checkpoints/voc_semi_0_125/",
        "./checkpoints/voc_semi_0_125/",
    ]
    assert {cfg.run.seed for cfg in (full, semi, wide)} == {1234}
    assert {cfg.model.network for cfg in (full, semi)} == {"deeplabv2"}
    assert wide.model.network == "deeplabv3p_wrn38"
    assert [cfg.data.drop_last for cfg in (full, semi, wide)] == [False, False, True]
    assert all(cfg.data.labeled_ratio is None and cfg.data.split_file is None for cfg in (full, semi, wide))


def test_a_blank_behind_a_backslash_is_no_override() -> None:
    """context_steps: the README's command for Pascal VOC holds one, which cuts it into two words."""
    assert changes(S4GAN, *EIGHTH, " ", "run.seed=3") == {"data.labeled_ratio": 0.125, "run.seed": 3}


# --- every flag ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--batch-size", "4", {"optim.batch_size": 4}),
        ("--num-workers", "0", {"data.workers": 0}),
        ("--labeled-ratio", "0.5", {"data.labeled_ratio": 0.5}),
        ("--learning-rate", "1e-3", {"optim.lr": 0.001}),
        ("--learning-rate-D", "3e-5", {"optim.lr_d": 3e-5}),
        ("--lambda-fm", "0.2", {"method.fm_weight": 0.2}),
        ("--lambda-st", "0.5", {"method.st_weight": 0.5}),
        ("--threshold-st", "0.7", {"method.st_threshold": 0.7}),
        ("--momentum", "0.8", {"optim.momentum": 0.8}),
        ("--power", "0.5", {"optim.power": 0.5}),
        ("--weight-decay", "1e-4", {"optim.weight_decay": 0.0001}),
        ("--input-size", "256, 256", {"data.crop_size": [256, 256]}),
        ("--restore-from", "coco.pth", {"model.weights": "coco.pth"}),
        ("--restore-from-D", "VOC_5_D.pth", {"model.weights_d": "VOC_5_D.pth"}),
        ("--random-seed", "3", {"run.seed": 3}),
        ("--checkpoint-dir", "there", {"run.dir": "there"}),
        ("--data-dir", "photos", {"data.root": "photos"}),
        ("--num-steps", "60000", {"optim.steps": 60000, "optim.epochs": 12}),
        ("--save-pred-every", "7", {"keep.original_every": 7, "run.save_interval": 7, "optim.epochs": 1}),
    ],
)
def test_flags_of_s4gan(flag: str, value: str, expected: dict[str, Any]) -> None:
    assert changes(S4GAN, flag, value) == expected


def test_switches_and_the_flags_of_wide_resnet38() -> None:
    assert changes(S4GAN, "--random-mirror", "--random-scale") == {
        "data.random_mirror": True,
        "data.random_scale": True,
    }
    assert changes(WRN38, "--batch-size-unlab", "4") == {"optim.unlabeled_batch_size": 4}


def test_the_supervised_script_takes_the_datasets_own_permutation() -> None:
    """one_permutation: the original takes Pascal VOC's for every dataset."""
    found = {name: parsed(FULL, "--dataset", name, *EIGHTH).data.split_file for name in flags.DATASETS}
    assert found == {
        "pascal_voc": "./splits/voc/split_0.pkl",
        "pascal_context": "./splits/pc/split_0.pkl",
        "cityscapes": "./splits/city/split_0.pkl",
    }
    assert parsed(FULL, *EIGHTH, "--split-id", "own.pkl").data.split_file == "own.pkl"
    assert parsed(S4GAN, *EIGHTH).data.split_file is None  # drawn, and saved in the run directory
    assert parsed(FULL, "--split-id", "own.pkl").data.split_file is None  # without a ratio it is not read


def test_the_originals_places_are_taken_where_they_exist(tmp_path: Path) -> None:
    lists = tmp_path / "data" / "voc_list"
    for folder in (lists, tmp_path / "data" / "voc_dataset", tmp_path / "pretrained_models"):
        folder.mkdir(parents=True)
    for name in ("train_aug.txt", "val.txt"):
        (lists / name).touch()
    for name in (training.RESNET101, training.WIDE_RESNET38):
        (tmp_path / "pretrained_models" / name).touch()
    cfg = parsed(S4GAN)
    assert (cfg.data.root, cfg.data.train_list) == ("./data/voc_dataset/", "./data/voc_list/train_aug.txt")
    assert cfg.eval.list == cfg.data.val == "./data/voc_list/val.txt"
    assert cfg.model.weights == "pretrained_models/resnet101-5d3b4d8f.pth"
    assert parsed(WRN38).model.weights == "pretrained_models/wider_resnet38.pth.tar"
    assert parsed(S4GAN, "--data-list", "data/voc_list/val.txt").data.train_list == "data/voc_list/val.txt"
    assert parsed(S4GAN, "--dataset", "cityscapes").data.train_list is None


def test_flags_without_effect_are_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "DeepLab", "--ignore-label", "0", "--eta-min-factor", "10", "--out", "result")
    assert changes(WRN38, *words, "--restore-from", "resnet.pth") == {}
    said = [line.split(":")[1].split()[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["--model", "--ignore-label", "--restore-from", "--eta-min-factor", "--out"]
    parsed(S4GAN, *CONTEXT, "--random-mirror", "--random-scale", "--data-list", "x.txt")
    said = [line.split(":")[1].split()[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["--random-mirror", "--random-scale", "--data-list"]


def test_gpu_is_the_visible_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    parsed(S4GAN, "--gpu", "3")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"  # the caller has chosen
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    parsed(S4GAN)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    parsed(S4GAN, "--gpu", "3")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


# --- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dataset", "ade20k"), "--dataset ade20k: its loader is not part of the original"),
        (("--dataset", "coco"), "--dataset coco: unknown; use pascal_voc, pascal_context, cityscapes"),
        (("--num-classes", "19"), "--num-classes 19: dataset 'voc' has 21"),
        (("--input-size", "321"), "--input-size '321': give height and width"),
        (("--input-size", "0, 5"), "--input-size '0, 5': give height and width"),
        (("--save-pred-every", "0"), "--save-pred-every 0: give 1 or more"),
        (("--labeled-ratio", "1.5"), "'labeled_ratio' is 1.5; expected more than 0 and at most 1"),
        (("--data-list", "gone.txt"), "--data-list gone.txt: no such file"),
        (("--learning-rate", "0"), "'lr' is 0.0; expected a positive number"),
        (("optim.lrr=3",), "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        (("voc",), "'voc': not an override"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(S4GAN, *words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "folder", "name"),
    [(train_full, "voc_full", "sup_only"), (train_s4GAN, "voc_semi_0_125", "s4gan"),
     (train_s4GAN_wrn38, "voc_semi_0_125", "s4gan")],
)  # fmt: skip
def test_the_scripts_train_their_configuration(
    module: Any, folder: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Config, Path]] = []
    monkeypatch.setattr(train, "train", lambda cfg, run_dir, _: seen.append((cfg, run_dir)))
    monkeypatch.setattr(ready, "require", lambda cfg, run_dir: None)  # nothing of the dataset is at hand
    assert module.main(["optim.lr=0.5"]) == 0
    ((cfg, run_dir),) = seen
    assert run_dir == Path("checkpoints") / folder
    assert (cfg.method.name, cfg.optim.lr) == (name, 0.5)
