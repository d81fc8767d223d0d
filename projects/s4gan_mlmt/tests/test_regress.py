"""The recorded losses, and that a moved number is found."""

from __future__ import annotations

import pytest
import torch

from common.numerics.losses import Losses
from projects.s4gan_mlmt import train
from projects.s4gan_mlmt.losses import feature_matching
from projects.s4gan_mlmt.mlmt import train as branch
from projects.s4gan_mlmt.mlmt.losses import mlmt_losses
from projects.s4gan_mlmt.tests import regress
from tests.regression import read


def test_the_losses_are_those_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    code = regress.main([])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("s4gan_mlmt: ")]
    assert code == 0, said
    assert said == [
        f"s4gan_mlmt: {method}: 20 steps as recorded in losses_{method}_cpu.txt (rtol 1e-05)"
        for method in regress.METHODS
    ]


def test_the_recording_covers_what_it_is_for() -> None:
    """All terms alive, some images above the threshold and some not, the consistency's ramp."""
    found = {method: read(regress.FOLDER / f"losses_{method}_cpu.txt") for method in regress.METHODS}
    assert all(len(steps) == len({s["loss"] for s in steps}) == 20 for steps in found.values())
    semi = found["s4gan"]
    kept = {step["kept"] for step in semi}
    assert min(kept) == 0
    assert len(kept) > 3
    for key in ("loss_sup", "loss_fm", "loss_d"):
        assert all(step[key] > 0 for step in semi)
    assert semi[0]["loss_st"] == 0  # not in the very first iteration
    assert all((step["loss_st"] > 0) == (step["kept"] > 0) for step in semi[1:])
    weighted = [s["loss"] - s["loss_class"] > 1e-6 for s in found["mlmt"]]
    assert not any(weighted[:6])
    assert all(weighted[6:])
    assert len({step["lr"] for step in found["mlmt"]}) == 10  # two steps an epoch


def test_a_moved_number_is_found_where_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    def moved(*args: object) -> Losses:
        total, terms = mlmt_losses(*args)  # type: ignore[arg-type]
        return Losses(1.0001 * total, terms)

    monkeypatch.setattr(train, "feature_matching", lambda *args: 1.01 * feature_matching(*args))
    monkeypatch.setattr(branch, "mlmt_losses", moved)
    assert regress.main([]) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("s4gan_mlmt: ")]
    assert "as recorded" in said[0]
    assert said[1].startswith("s4gan_mlmt: s4gan: step 1: loss_fm")
    assert said[2].startswith("s4gan_mlmt: mlmt: step 1: loss is")
    assert "--update" in said[1]
    assert before == (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )
