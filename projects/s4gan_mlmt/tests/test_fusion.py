"""Fusion of both branches, and the scores file that connects them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from projects.s4gan_mlmt.mlmt.fusion import KEEP, Fusion, fuse, kept_classes, read_scores, write_scores


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (1, 3, 1, 3) and the classes that stay on: 0 and 2."""
    logits = torch.tensor([[[-1.0, 2.0, -3.0], [5.0, 3.0, 1.0], [-2.0, 1.0, -4.0]]])[:, :, None]
    return logits, torch.tensor([[True, False, True]])


def test_a_switched_off_class_gets_zero_and_may_win() -> None:
    logits, keep = example()
    fused = fuse(logits, keep)
    assert fused[0, 1].abs().sum() == 0
    assert torch.equal(fused[0, [0, 2]], logits[0, [0, 2]])
    # where every kept logit is negative, the class that is off wins (quirks.fusion)
    assert fused.argmax(dim=1).flatten().tolist() == [1, 0, 1]


def test_a_masked_class_never_wins() -> None:
    logits, keep = example()
    fused = fuse(logits, keep, "mask")
    assert fused.argmax(dim=1).flatten().tolist() == [0, 0, 0]
    assert torch.equal(fused[0, [0, 2]], logits[0, [0, 2]])
    assert bool(fused.isfinite().all())
    large = fuse(logits * 1e30, keep, "mask")
    assert large.argmax(dim=1).flatten().tolist() == [0, 0, 0]


@pytest.mark.parametrize(("mode", "classes"), [("zero_logits", [0, 0, 0]), ("mask", [1, 1, 1])])
def test_an_image_that_keeps_no_class(mode: str, classes: list[int]) -> None:
    logits, keep = example()
    fused = fuse(logits, torch.zeros_like(keep), mode)  # type: ignore[arg-type]
    assert fused.argmax(dim=1).flatten().tolist() == classes  # all zero; or as without fusion
    assert bool(fused.isfinite().all())


def test_images_of_a_batch_keep_their_own_classes() -> None:
    logits, keep = example()
    both = fuse(logits.expand(2, -1, -1, -1), torch.cat((keep, ~keep)))
    assert torch.equal(both[:1], fuse(logits, keep))
    assert torch.equal(both[1:], fuse(logits, ~keep))


def test_the_threshold_belongs_to_what_is_kept() -> None:
    below = np.nextafter(KEEP, 0)
    assert kept_classes(np.array([[KEEP, below, 1.0, 0.0]])).tolist() == [[True, False, True, False]]
    assert kept_classes(np.array([[0.4, 0.5]]), threshold=0.5).tolist() == [[False, True]]


def test_rows_belong_to_images() -> None:
    logits, keep = example()
    scores = np.array([[1.0, 1.0, 1.0], [0.9, 0.1, 0.3]])
    fusion = Fusion(["a", "b"], scores)
    fused = fusion(["b", "a"], logits.expand(2, -1, -1, -1))
    assert torch.equal(fused[:1], fuse(logits, keep))
    assert torch.equal(fused[1:], logits)
    masked = Fusion(["a", "b"], scores, "mask")(["b"], logits)
    assert torch.equal(masked, fuse(logits, keep, "mask"))
    assert torch.equal(Fusion(["a", "b"], scores, threshold=0.05)(["b"], logits), logits)


def test_scores_of_something_else_are_refused() -> None:
    logits, _ = example()
    with pytest.raises(UserError, match="2 rows of scores for 1 images"):
        Fusion(["a"], np.ones((2, 3)))
    with pytest.raises(UserError, match="no scores for image 'c'"):
        Fusion(["a"], np.ones((1, 3)))(["c"], logits)
    with pytest.raises(UserError, match="scores of 4 classes, the segmentation network has 3"):
        Fusion(["a"], np.ones((1, 4)))(["a"], logits)


# --- the file --------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).random((7, 5))
    path = tmp_path / "new/output_ema_raw_5.txt"
    write_scores(path, scores)
    assert np.array_equal(read_scores(path, 7, 5), np.round(scores, 6))
    write_scores(path, scores[:3])  # replaced, where the authors append
    assert len(read_scores(path, 3, 5)) == 3


def test_the_format_is_the_authors(tmp_path: Path) -> None:
    scores = np.linspace(0, 1, 42).reshape(2, 21)
    path, theirs = tmp_path / "ours.txt", tmp_path / "theirs.txt"
    write_scores(path, scores)
    with theirs.open("ab") as file:  # as `train_mlmt.py` does
        np.savetxt(file, scores, fmt="%f")
    assert path.read_bytes() == theirs.read_bytes()
    assert path.stat().st_size == 2 * 189
    assert np.array_equal(read_scores(path, 2, 21), np.loadtxt(path))  # as `evaluate.py` does


GOOD = "0.100000 0.900000\n0.200000 0.300000\n1.000000 0.000000\n"


@pytest.mark.parametrize(
    "text", [GOOD, GOOD.replace("\n", "\r\n"), GOOD.rstrip(), f"\n{GOOD}\n\n", "1e-1 .9\n.2 .3\n1 0\n"]
)
def test_ways_to_write_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "scores.txt"
    path.write_bytes(text.encode())
    assert read_scores(path, 3, 2).tolist() == [[0.1, 0.9], [0.2, 0.3], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GOOD[:36],
            r"scores\.txt: 2 rows for 3 images; the file is of another list or its writing was cut off",
        ),
        ("", r"scores\.txt: 0 rows for 3 images"),
        (GOOD + "0.5 0.5\n", r"scores\.txt: 4 rows for 3 images; the file is of another list"),
        (GOOD * 2, r"6 rows for 3 images; it seems to hold 2 runs, .*appends"),
        (GOOD.replace("0.300000", "0.3000x0"), r"scores\.txt:2: '0\.3000x0' is no probability"),
        (GOOD.replace("0.300000", "nan"), r"scores\.txt:2: 'nan' is no probability"),
        (GOOD.replace("0.300000", "inf"), r"scores\.txt:2: 'inf' is no probability"),
        (GOOD.replace("0.300000", "-0.1"), r"scores\.txt:2: '-0\.1' is no probability"),
        (GOOD.replace("0.300000", "1.3"), r"scores\.txt:2: '1\.3' is no probability"),
        (GOOD.replace(" 0.300000", ""), r"scores\.txt:2: 1 scores instead of 2"),
        (GOOD.replace("0.300000", "0.3 0.4"), r"scores\.txt:2: 3 scores instead of 2"),
        (GOOD.replace(" ", ","), r"scores\.txt:1: 1 scores instead of 2"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "scores.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_scores(path, 3, 2)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.txt: scores file cannot be read"):
        read_scores(tmp_path / "gone.txt", 3, 2)
    (tmp_path / "weights.pt").write_bytes(bytes(range(200, 256)))
    with pytest.raises(UserError, match=r"weights\.pt: no text of numbers"):
        read_scores(tmp_path / "weights.pt", 3, 2)
