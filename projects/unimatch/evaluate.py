"""Measure the networks of a run; the same code while training and in the scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from common.mean_teacher.evaluation import evaluate_network, load_best
from common.measure.evaluation import Protocol, When, protocol_of
from common.measure.inference import Forward, Size, sum_windows, windows
from common.numerics.precision import widened
from common.run.session import Session
from projects.unimatch.config import Config, method_name
from projects.unimatch.state import Run
from tools.training import report


def original_windows(
    size: Sequence[int], crop: Size, stride: Size | None = None, *, cut: bool
) -> tuple[list[Size], Size]:
    """Starts (row, column) of the authors' windows, row by row, and their size, at most that of the image.

    Args:
        size: height and width of the image.
        crop: height and width of the windows.
        stride: steps down and across; None for two thirds of the window, rounded down.
        cut: V1: a window reaches over the border, where it is cut, perhaps to a few pixels; V2 moves it inside.
    """
    height, width = size
    rows, cols = min(crop[0], height), min(crop[1], width)
    down, right = stride or (int(crop[0] * 2 / 3), int(crop[1] * 2 / 3))
    if cut:
        return [(row, col) for row in range(0, height, down) for col in range(0, width, right)], (rows, cols)
    return windows((height, width), (rows, cols), (min(down, rows), min(right, cols))), (rows, cols)


def summed_probabilities(
    forward: Forward, image: Tensor, crop: Size, stride: Size | None = None, *, cut: bool
) -> Tensor:
    """Class probabilities (B, K, H, W) of normalized images (B, 3, H, W), added up over the windows of a pixel.

    `forward` gives logits; see `original_windows` for the rest.

    Source: `evaluate` in `supervised.py`.
    """
    starts, inside = original_windows(image.shape[-2:], crop, stride, cut=cut)
    return sum_windows(lambda x: widened(forward(x)).softmax(dim=1), image, starts, inside)


@dataclass(frozen=True, kw_only=True)
class WindowProtocol(Protocol):
    """The authors' windows on Cityscapes; see `summed_probabilities`.

    Attributes:
        kind: `cut_windows` or `moved_windows`.
    """

    kind: str = "cut_windows"  # type: ignore[assignment]

    def __post_init__(self) -> None:
        Protocol(kind="sliding_window", crop_size=self.crop_size, stride=self.stride)  # its checks

    def scores(self, forward: Forward, image: Tensor) -> Tensor:
        """Summed probabilities (B, K, H, W) of normalized images (B, 3, H, W)."""
        assert self.crop_size is not None
        return summed_probabilities(
            forward, image, self.crop_size, self.stride, cut=self.kind == "cut_windows"
        )


def protocol(cfg: Config, when: When) -> Protocol:
    """The protocol that the configuration names for this occasion."""
    settings = cfg.eval
    kind = settings.during_training if when == "training" else settings.protocol
    if kind in ("cut_windows", "moved_windows"):
        return WindowProtocol(
            kind=kind, crop_size=settings.crop_size or cfg.data.crop_size, stride=settings.stride
        )
    return protocol_of(settings, cfg.data, when)


def finish(run: Run, session: Session) -> None:
    """Measure the last and the best weights with the configured protocol and write `result.json`."""
    cfg, name = run.cfg, run.reported
    network, how = getattr(run.nets, name), protocol(cfg, "script")
    run.nets.share_statistics(run.dist)
    last = best = evaluate_network(cfg, network, run.data.spec, cfg.eval.list, how, run.dist)
    if load_best(network, name, session):
        best = evaluate_network(cfg, network, run.data.spec, cfg.eval.list, how, run.dist)
    report(session, method=method_name(cfg), network=name, best=best, last=last)
