"""The real shell scripts: train, stop, resume, evaluate; one process, two, torchrun, Slurm's environment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from projects.s4gan_mlmt import eval as evaluation
from projects.s4gan_mlmt import train
from projects.s4gan_mlmt.tests.checkpoints import METHODS
from projects.s4gan_mlmt.tests.mlmt_toys import write_voc
from tests import smoke
from tests.runs import Commands, losses, result, saved

run = Commands("s4gan_mlmt", 400, SSS_DEVICE="cpu")
PROJECT = run.folder
CONFIG = "configs/smoke.yaml"  # both branches

pytestmark = pytest.mark.smoke


def test_train_stop_resume_evaluate(tmp_path: Path) -> None:
    """The documented way, from another working directory; once stopped in each branch."""
    folder = tmp_path / "run"
    assert "stopped after step 4" in smoke.train(run, folder, "run.max_steps=4")
    assert not (folder / "result.json").exists()
    out = smoke.train(run, folder, "run.max_steps=8")
    assert "own last checkpoint" in out
    assert "mlmt: stopped after step 2" in out
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4, 5, 6]
    assert not (folder / "result.json").exists()
    smoke.train(run, folder)
    found = result(folder)
    assert found["fusion"] == {
        "scores": "mlmt/output_ema_raw_2.txt", "mode": "zero_logits", "threshold": 0.2
    }  # fmt: skip
    assert found["network"] == "segmentation and mlmt"

    out = smoke.evaluate(run, folder)
    tables = [line.split("\t") for line in out.splitlines() if "\t" in line]
    assert [cells[1] for cells in tables] == ["fused", "segmentation"]
    for cells, figures in zip(tables, (found, found["unfused"]), strict=True):
        for cell, key in ((cells[5], "miou"), (cells[8], "miou_last")):
            assert cell == f"{100 * figures[key]:.2f}"


@pytest.mark.slow
def test_other_ways_to_launch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain python and the variables that srun sets; torchrun and the launcher with two processes."""
    arguments = ["--config", CONFIG, "run.max_steps=2"]
    run(sys.executable, "train.py", *arguments, f"run.dir={tmp_path / 'plain'}")
    run(sys.executable, "train.py", *arguments, f"run.dir={tmp_path / 'slurm'}", **smoke.SLURM)
    assert losses(tmp_path / "slurm") == losses(tmp_path / "plain")

    two = tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--master-port", "0", "--nproc-per-node", "2"]
    run(*torchrun, "-m", "projects.s4gan_mlmt.train", *arguments, f"run.dir={two}")
    # the same command in another form goes on with the run, to its end
    assert "own last checkpoint" in smoke.train(run, two, processes="2")
    assert losses(two)[:2] != losses(tmp_path / "plain")
    assert len(losses(two)) == 6
    # both processes have measured the weights that the first one saved
    assert evaluation.main(["--run", str(two)]) == 0
    assert f"{100 * result(two)['miou_last']:.2f}" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_by_the_originals_command(tmp_path: Path) -> None:
    write_voc(tmp_path / "voc", train=12, val=4)
    words = ["--data-dir", "voc", "--labeled-ratio", "0.5", "--checkpoint-dir", "semi", "--num-steps", "4",
             "--save-pred-every", "2", "--num-workers", "0", "--batch-size", "4", "--input-size", "33,33",
             "model.layers=[1,1,1,1]", "model.width=4", "model.d_width=4", "model.weights=none"]  # fmt: skip
    launcher = [sys.executable, "-m", "tools.launch", "--processes", "2", "--port", "0"]
    run(*launcher, "projects.s4gan_mlmt.train_s4GAN", "--", *words, "run.max_steps=3", cwd=tmp_path)
    assert saved(tmp_path / "semi")["step"] == 3
    out = run(*launcher, "projects.s4gan_mlmt.train_s4GAN", "--", *words, cwd=tmp_path)
    assert "own last checkpoint" in out
    files = {path.name for path in (tmp_path / "semi").glob("*.p[tk][hl]")}
    assert files == {
        "VOC_2.pth", "VOC_2_D.pth", "VOC_4.pth", "VOC_4_D.pth", "train_voc_split.pkl"
    }  # fmt: skip
    run(sys.executable, str(PROJECT / "evaluate.py"), "--restore-from", "semi/VOC_4.pth", cwd=tmp_path)
    mean = float((tmp_path / "results" / "result.txt").read_text().split()[-1])
    assert mean == pytest.approx(result(tmp_path / "semi")["miou_last"], abs=1e-6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of every method."""

    def make(folder: Path) -> None:
        for method in METHODS:
            words = ["--config", str(PROJECT / CONFIG), f"run.dir={folder / method}", f"method.name={method}"]
            assert train.main([*words, "run.device=cpu", "optim.steps=4"]) == 0

    folder = smoke.once(tmp_path_factory, "runs_of_s4gan_mlmt", make)
    return {method: folder / method for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_measured(
    runs: dict[str, Path], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = result(runs[method])
    assert found["method"] == method
    assert len(losses(runs[method])) == found["steps"] == 4
    assert ("unfused" in found) is (method == "s4gan_mlmt")
    assert evaluation.main(["--run", str(runs[method])]) == 0
    out = capsys.readouterr().out
    for name in ("best", "last", "step_2", "step_4"):
        assert name in out
    assert f"{100 * found['miou_last']:.2f}" in out


def test_logged_keys_are_those_of_the_readme(runs: dict[str, Path]) -> None:
    explained = smoke.explained(PROJECT)
    folders = {**runs, "mlmt": runs["s4gan_mlmt"] / "mlmt"}
    for name, folder in folders.items():
        kind = "s4gan" if name == "s4gan_mlmt" else name
        of_method = {key for key, methods in explained.items() if not methods or kind in methods}
        assert smoke.logged(folder) == of_method, name
