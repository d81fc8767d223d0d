"""The flags of the port and of the original in train.py: what they mean in the configuration."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import load_config, to_dict
from common.errors import UserError
from projects.cps import predict, train, val
from projects.cps.compat import flags
from projects.cps.config import Config, loss_divisor, loss_groups
from projects.cps.tests.checkpoints import CONFIGS, SMOKE, few_images

CITY = "cityscapes_744_r50_cps_cutmix.yaml"
VOC = "voc_1323_r50_cps.yaml"


def parsed(name: str, *arguments: str) -> Config:
    command = ["--config", str(CONFIGS / name), *arguments]
    return flags.train_config(flags.train_parser().parse_intermixed_args(command))


def changes(name: str, *arguments: str) -> dict[str, Any]:
    """What the flags change in the YAML file's values."""
    before = to_dict(load_config(Config, CONFIGS / name))
    after = to_dict(parsed(name, *arguments))
    return {
        f"{section}.{key}": value
        for section, values in after.items()
        for key, value in values.items()
        if value != before[section][key]
    }


def test_without_flags_the_file_counts() -> None:
    assert changes(VOC) == {}
    assert changes(VOC, "optim.epochs=3", "--opts", "run.seed=5", "data.workers=0") == {
        "optim.epochs": 3,
        "run.seed": 5,
        "data.workers": 0,
    }


def test_documented_command_on_one_card(capsys: pytest.CaptureFixture[str]) -> None:
    command = ("--log_iters", "10", "--save_dir", "./output/", "--batch_size", "2")
    assert changes(CITY, *command) == {
        "run.dir": "./output/",
        "optim.batch_size": 2,
        "optim.paper_processes": None,
        "quirks.loss_world_size": 8,
    }
    cfg, published = parsed(CITY, *command), load_config(Config, CONFIGS / CITY)
    assert loss_divisor(cfg) == loss_divisor(published) == 8
    assert loss_groups(cfg, 2) == 1
    notes = capsys.readouterr().err.splitlines()
    assert notes[0].startswith("note: --batch_size 2: not a multiple of the authors' 8 processes")
    assert "divided by 8" in notes[0]


def test_documented_command_on_four_cards(capsys: pytest.CaptureFixture[str]) -> None:
    assert changes(CITY, "--batch_size", "8") == {}
    assert changes(CITY, "--batch_size", "16") == {"optim.batch_size": 16}
    assert capsys.readouterr().err == ""


def test_a_chosen_divisor_of_the_loss_is_kept() -> None:
    found = changes(CITY, "--batch_size", "2", "quirks.loss_world_size=1")
    assert found["quirks.loss_world_size"] == 1


def test_every_flag() -> None:
    assert changes(
        VOC,
        *("--device", "cpu", "--save_dir", "ä: [x]", "--num_workers", "7", "--resume_model", "a b/last.pt"),
        *("--learning_rate", "1e-3", "--save_epoch", "4", "--log_iters", "3", "--keep_checkpoint_max", "6"),
        *("--seed", "11", "--do_eval"),
    ) == {
        "run.device": "cpu",
        "run.dir": "ä: [x]",
        "data.workers": 7,
        "run.resume": "a b/last.pt",
        "optim.lr": 0.001,
        "keep.every_epochs": 4,
        "keep.newest": 6,
        "run.log_interval": 3,
        "run.seed": 11,
        "eval.every_epochs": 4,
    }
    assert parsed(VOC, "--device", "gpu").run.device == "cuda"
    assert parsed(VOC, "--keep_checkpoint_max", "0", "keep.newest=3").keep.newest == 3
    assert parsed(VOC, "-c", "last.pt").run.resume == "last.pt"


def test_validation_while_training_comes_whenever_weights_are_kept() -> None:
    assert parsed(CITY, "--do_eval").eval.every_epochs == 5
    assert parsed("shapes.yaml", "--do_eval").eval.every_epochs == 2
    assert parsed("shapes.yaml", "--do_eval", "eval.every_epochs=0").eval.every_epochs == 0
    assert parsed(VOC).eval.every_epochs == 0


def test_nepochs_moves_the_first_kept_weights() -> None:
    assert changes(VOC, "--nepochs", "68") == {"optim.epochs": 68, "keep.after_epoch": 36}
    assert changes(VOC, "--nepochs", "1") == {"optim.epochs": 1, "keep.after_epoch": 0}
    assert parsed(VOC, "--nepochs", "68", "keep.after_epoch=60").keep.after_epoch == 60


@pytest.mark.parametrize(
    ("dataset", "ratio", "split"),
    [
        *(("voc", r, s) for r, s in ((16, 662), (8, 1323), (4, 2646), (2, 5291))),
        *(("cityscapes", r, s) for r, s in ((16, 186), (8, 372), (4, 744), (2, 1488))),
    ],
)
def test_ratio_is_the_configuration_of_that_ratio(dataset: str, ratio: int, split: int) -> None:
    start = {"voc": VOC, "cityscapes": CITY}[dataset]
    found = parsed(start, "--labeled_ratio", str(ratio))
    there = CONFIGS / start.replace("1323", str(split)).replace("744", str(split))
    wanted = load_config(Config, there)
    assert found.data == wanted.data
    assert found.optim == wanted.optim
    assert abs(found.keep.after_epoch - wanted.keep.after_epoch) <= 1
    assert found.keep.every_epochs == wanted.keep.every_epochs
    assert found.expect.miou in (None, wanted.expect.miou)
    assert dataclasses.replace(found, keep=wanted.keep, expect=wanted.expect) == wanted


def test_ratio_of_few_supervision_keeps_its_budget() -> None:
    few = "voc_few_183_r101_cps_cutmix.yaml"
    assert changes(few, "--labeled_ratio", "16") == {"data.split": "cps_few/92"}
    assert changes(few, "--labeled_ratio", "8") == {}


def test_a_published_figure_belongs_to_its_ratio() -> None:
    assert parsed(VOC, "--labeled_ratio", "8").expect.miou == 73.2
    assert parsed(VOC, "--labeled_ratio", "4").expect.miou is None
    assert parsed(VOC, "--labeled_ratio", "4").expect.source == "none published"


def test_flags_without_effect_are_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    command = ("--use_vdl", "--data_format", "NCHW", "--profiler_options", "batch_range=[1,2]", "-d", "0-3")
    assert changes(VOC, *command, "--local_rank", "0") == {}
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [
        "--use_vdl", "--profiler_options", "--data_format", "--devices"
    ]  # fmt: skip
    assert all("accepted, without effect" in line for line in lines)


def test_only_the_first_process_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    parsed(VOC, "--use_vdl")
    assert capsys.readouterr().err == ""


def port_yaml(folder: Path, name: str, **sections: Any) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(sections))
    return path


def test_files_of_the_port_are_refused(tmp_path: Path) -> None:
    files = [
        port_yaml(tmp_path, "a.yaml", batch_size=8, model={"type": "CPSDeeplabV3P"}),
        port_yaml(tmp_path, "b.yaml", _base_="c.yml"),
        tmp_path / "deeplabv3p_resnet50_0.5cityscapes_800x800_240e.yml",  # as in the port's README
    ]
    for path in files:
        with pytest.raises(UserError) as error:
            train.main(["--config", str(path), "--log_iters", "10"])
        assert f"{path}: is written for the PaddleSeg port" in str(error.value)
        assert "configs/cityscapes_1488_r50_cps_cutmix.yaml" in str(error.value)
    assert load_config(Config, CONFIGS / "cityscapes_1488_r50_cps_cutmix.yaml").optim.epochs == 240


def test_the_commands_of_the_port_work_to_the_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file stands for the setting of this project; what is missing then are the data."""
    monkeypatch.chdir(CONFIGS.parent)
    monkeypatch.setenv("SSS_DATA", "/nowhere")
    port = "./configs/deeplabv3p/deeplabv3p_resnet50_0.5cityscapes_800x800_240e.yml"
    own = load_config(Config, CONFIGS / "cityscapes_1488_r50_cps_cutmix.yaml")
    assert load_config(Config, port) == own
    words = ["--config", port, "--log_iters", "10", "--save_dir", "./output/", "--batch_size", "2"]
    cfg, run_dir = flags.read_train(words, CONFIGS.parent)
    assert (cfg.run.log_interval, cfg.optim.batch_size, run_dir) == (10, 2, Path("output"))
    assert (cfg.method, cfg.model, cfg.data) == (own.method, own.model, own.data)
    with pytest.raises(UserError, match="splits prepare cityscapes"):
        train.main(words)
    for name in (port, port.removeprefix("./"), str(CONFIGS.parent / port)):
        for program, words in (
            (val, ["--config", name, "--model_path", "gone.pt", "--is_slide", "--crop_size", "800", "800"]),
            (predict, ["--config", name, "--model_path", "gone.pt", "--image_path", "photos"]),
        ):
            with pytest.raises(UserError, match=r"gone\.pt: no such checkpoint"):
                program.main(words)


def test_weights_of_the_port_are_refused(tmp_path: Path) -> None:
    (tmp_path / "epoch_240").mkdir()
    (tmp_path / "epoch_240" / "model.pdparams").touch()
    for path in (tmp_path / "epoch_240", tmp_path / "epoch_240" / "model.pdparams"):
        with pytest.raises(UserError, match="PaddlePaddle weights of the port"):
            parsed(VOC, "--resume_model", str(path))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (VOC, ["--labeled_ratio", "3"], "--labeled_ratio 3: no published lists; use 16, 8, 4, 2"),
        (
            "smoke.yaml",
            ["--labeled_ratio", "2"],
            "data.dataset=shapes with data.split=few has no lists",
        ),
        ("voc_full_r50_sup.yaml", ["--labeled_ratio", "2"], "data.split=full has no lists by ratio"),
        (VOC, ["--device", "npu"], "--device npu: not supported; use gpu, cpu or auto"),
        (VOC, ["--nepochs", "0"], "'epochs' is 0; expected 1 or more"),
        (VOC, ["--batch_size", "0"], "'batch_size' is 0; expected 1 or more"),
        (VOC, ["--keep_checkpoint_max", "-1"], "'newest' is -1; expected 1 or more, or null"),
        (VOC, ["--log_iters", "0"], "'log_interval' is 0; expected 1 or more"),
        (VOC, ["--num_workers", "-1"], "'workers' is -1; expected 0 or more"),
        (VOC, ["--opts", "optim.learning_rate=1"], "unknown key 'optim.learning_rate'"),
        (VOC, ["--opts", "nepochs=1"], "'nepochs=1': not an override; write section.key=value"),
    ],
)
def test_mistakes_are_named(name: str, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parsed(name, *arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [["--logiters", "1"], ["--log", "1"], ["--seed", "x"], ["--seed"]])
def test_unknown_and_shortened_flags_end_the_program(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parsed(VOC, *arguments)
    assert end.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.smoke
def test_training_by_the_flags_of_the_port(tmp_path: Path) -> None:
    run = tmp_path / "output"
    paper = tmp_path / "paper.yaml"
    paper.write_text(f"base: {SMOKE.with_name('_smoke.yaml')}\noptim:\n  paper_processes: 4\n")
    command = ["--config", str(paper), "--save_dir", str(run), "--batch_size", "6", "--nepochs", "2"]
    command += ["--log_iters", "1", "--save_epoch", "1", "--keep_checkpoint_max", "1", "--device", "cpu"]
    few = ["data.epoch_images=12", "run.panels=false", few_images(tmp_path)]
    assert train.main([*command, *few, "--do_eval"]) == 0
    assert [path.name for path in (run / "weights").iterdir()] == ["epoch_2.pt"]
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["optim"]["batch_size"], saved["optim"]["paper_processes"]) == (6, None)
    assert saved["quirks"]["loss_world_size"] == 4
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 4
    assert result["in_training"]["best_epoch"] in (1, 2)
    log = (run / "train.log").read_text()
    assert "the authors' by" not in log
