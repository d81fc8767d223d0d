"""U2PL on adaptive equalisation learning: the losses, the memory of class confidence and the draws of the variant.

Legend as in `losses.py`; N unlabeled images in the list, P pairs of them in a step. The functions on tensors wait
for nothing; those on arrays are the choices that the host makes between two steps.

Source: branch `with_AEL` of U2PL; AEL is Hu et al., NeurIPS 2021.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from common.numerics.losses import IGNORE, entropy, masked_percentiles
from projects.u2pl.ael_masks import BoxUniforms
from projects.u2pl.augment import Draws
from projects.u2pl.losses import EntropySplit

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class AelConfig:
    """What the AEL variant adds to `MethodConfig`; the defaults are the published setting.

    Attributes:
        start_epoch: first epoch of the contrastive loss.
        consist_weight: weight of the consistency loss.
        cons: weight pixels by the teacher's confidence; otherwise plain cross entropy.
        cons_sample: drop pixels of classes that the student already knows.
        cons_gamma: exponent of the confidence; `cons_gamma2` of the sampling rates.
        threshold: labeled pixels with less teacher probability (0..1) than this are left out of the consistency.
        sym_ce_l, sym_ce_u: add 0.1 times the reverse cross entropy to the supervised or the consistency loss.
        high_entropy_threshold: percentile of the entropy from which on a pixel is unreliable; below
            `method.low_entropy_threshold` it is reliable (both constant over the epochs).
        conf_weight: class centres are weighted by the teacher's confidence (not together with `anchor_ema`).
        momentum: of the class confidence.
        area_thresh: fraction of the image that a component must exceed to be cut out.
        area_thresh2: fraction of the image that a class must cover to enter the CutMix bank.
        no_pad, no_slim: take a component's box as it is, instead of bringing it to half the image.
        paste_number: draws of classes to paste in a step.
        paste_prob: a labeled image comes without a partner to paste from with this probability.
        paste_resize: range of the random resize of that partner.
        common_classes: classes that are never pasted; the default is that of Cityscapes.
        conf_init: u2pl-ael, the class confidence starts as random numbers, or as zeros.
        drop_low_entropy: u2pl-ael, the pseudo-labels with the lowest entropy are dropped, also from the contrast;
            otherwise those with the highest are, as the paper says, and the contrast sees all.
        banks: u2pl-ael, each process keeps class confidence and bank of its own images (`local`), or of all.
        divide_by_ranks: u2pl-ael, every loss is divided by the number of processes although gradients are
            averaged over them, so the learning rate is effectively divided by it.
    """

    start_epoch: int = 20
    consist_weight: float = 1.0
    cons: bool = True
    cons_sample: bool = True
    cons_gamma: float = 2.0
    cons_gamma2: float = 1.0
    threshold: float = 0.0
    sym_ce_l: bool = False
    sym_ce_u: bool = False
    high_entropy_threshold: float = 80.0
    conf_weight: bool = False
    momentum: float = 0.999
    area_thresh: float = 0.005
    area_thresh2: float = 0.01
    no_pad: bool = True
    no_slim: bool = True
    paste_number: int = 3
    paste_prob: float = 0.5
    paste_resize: tuple[float, float] = (0.1, 2.0)
    common_classes: tuple[int, ...] = (0, 1, 2, 8, 10)
    conf_init: Literal["rand", "zeros"] = "rand"
    drop_low_entropy: bool = True
    banks: Literal["local", "shared"] = "local"
    divide_by_ranks: bool = True

    def __post_init__(self) -> None:
        for key in ("momentum", "paste_prob", "threshold", "area_thresh", "area_thresh2"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"'{key}' is {getattr(self, key)!r}; expected a number from 0 to 1")
        if not 0 <= self.high_entropy_threshold <= 100:
            raise ValueError(
                f"'high_entropy_threshold' is {self.high_entropy_threshold!r}; expected a percentage from 0 to 100"
            )
        low, high = self.paste_resize
        if not 0 < low <= high:
            raise ValueError(f"'paste_resize' is {self.paste_resize!r}; expected 0 < low <= high")


# --- losses ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def sampled_pixels(logits: Tensor, class_confidence: Tensor, uniform: Tensor, gamma2: float = 1.0) -> Tensor:
    """Pixels (B, H, W) bool that the consistency keeps: the less confident their predicted class, the more likely.

    Args:
        logits: (B, K, H, W) of the student.
        class_confidence: (K,) in 0..1.
        uniform: (K, H, W) numbers in [0, 1), one map per class for the whole batch.
        gamma2: exponent of the rates.
    """
    rate = 1.0 - class_confidence
    rate = (rate / (rate.max() + 1e-12)).pow(gamma2)
    predicted = logits.argmax(dim=1)
    return uniform.gather(0, predicted) > (1.0 - rate)[predicted]


def consistency_loss(
    logits: Tensor, confidence: Tensor, target: Tensor, gamma: float, keep: Tensor | None = None
) -> Tensor:
    """Cross entropy with the teacher's labels, each pixel weighted by `confidence^gamma` over the sum of weights.

    Ignored pixels add no loss but count among the weights; no pixel kept gives zero.

    Args:
        logits: (B, K, H, W) of the student.
        confidence: (B, H, W), largest probability of the teacher, without gradient.
        target: (B, H, W) int64, 255 = ignore.
        gamma: exponent.
        keep: (B, H, W) bool, see `sampled_pixels`; None keeps all.

    Source: `Criterion_cons` in `u2pl/utils/loss_helper.py`, branch `with_AEL`.
    """
    loss = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    weight = confidence.pow(gamma)
    if keep is not None:
        weight = weight * keep
    return (weight / (weight.sum() + 1e-12) * loss).sum()


class TeacherTargets(NamedTuple):
    """What the student shall reproduce on the mixed images, each (P, H, W)."""

    pseudo: Tensor  # int64, 255 = dropped
    confidence: Tensor  # largest probability
    split: EntropySplit  # for the contrast; its labels may hold the dropped ones too


@torch.no_grad()
def unlabeled_targets(
    logits: Tensor,
    drop_percent: float,
    low_percent: float,
    high_percent: float,
    drop_low_entropy: bool = True,
) -> TeacherTargets:
    """Pseudo-labels of the mixed teacher logits (P, K, H, W) without the `drop_percent` that are to be ignored.

    Percentiles are over all pixels of this process. The original drops the pixels with the LOWEST entropy, and
    takes them out of the contrast too, whose reliable pixels thus shrink to a band; `drop_low_entropy` false drops
    the highest ones, from the consistency only.

    Args:
        logits: mixed logits of the eval-mode teacher.
        drop_percent: share of the pixels to drop.
        low_percent: percentile up to which a pixel is reliable.
        high_percent: percentile from which on a pixel is unreliable.
        drop_low_entropy: which end is dropped.
    """
    probs = logits.softmax(dim=1)
    values = entropy(probs)
    everywhere = torch.ones_like(values, dtype=torch.bool)
    bottom, top, low, high = masked_percentiles(
        values, everywhere, (drop_percent, 100.0 - drop_percent, low_percent, high_percent)
    )
    labels = logits.argmax(dim=1)
    pseudo = labels.where(~(values < bottom if drop_low_entropy else values >= top), IGNORE)
    seen = pseudo if drop_low_entropy else labels
    valid = seen != IGNORE
    split = EntropySplit(seen, valid & (values <= low), valid & (values >= high))
    return TeacherTargets(pseudo, probs.amax(dim=1), split)


# --- images ----------------------------------------------------------------------------------------------------


def copy_paste(
    images: Tensor, labels: Tensor, other: Tensor, other_labels: Tensor, classes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) and labels (B, H, W) with the objects of `classes` of their partners on top.

    A partner whose labels are all 0 stands for "none" and pastes nothing, whatever the classes.

    Source: `dynamic_copy_paste` in `u2pl/utils/utils.py`, branch `with_AEL`.
    """
    pasted = torch.zeros_like(labels, dtype=torch.bool)
    for k in classes:  # a handful of host numbers: comparing with each copies nothing
        pasted |= other_labels == k
    pasted &= (other_labels != 0).flatten(1).any(dim=1).view(-1, 1, 1)
    return torch.where(pasted.unsqueeze(1), other, images), torch.where(pasted, other_labels, labels)


# --- class confidence and bank ---------------------------------------------------------------------------------


@torch.no_grad()
def class_totals(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed probability of its true class over the pixels of every class, and their number: (2, K).

    Args:
        logits: (B, K, H, W) of the student.
        labels: (B, H, W), 255 = ignore.
    """
    classes = torch.arange(logits.shape[1], device=labels.device).view(-1, 1, 1)
    member = labels.unsqueeze(1) == classes
    probs = logits.softmax(dim=1)
    return torch.stack(((probs * member).sum(dim=(0, 2, 3)), member.sum(dim=(0, 2, 3)).to(probs.dtype)))


@torch.no_grad()
def batch_confidence(totals: Tensor) -> Tensor:
    """Mean probability of the true class per class (K,) of `class_totals`; 0 for a class that is absent."""
    return totals[0] / (totals[1] + 1e-12)


@torch.no_grad()
def moved_confidence(state: Tensor, confidence: Tensor, momentum: float) -> Tensor:
    """The average (..., K) moved towards the confidence (K,) of a batch; what is not finite leaves no trace.

    Source: `cal_category_confidence` in `u2pl/utils/utils.py` and its use in `train.py`, branch `with_AEL`.
    """
    moved = state * momentum + confidence * (1.0 - momentum)
    return moved.where(moved.isfinite(), state)


@torch.no_grad()
def covered_classes(labels: Tensor, num_classes: int, area_thresh: float) -> Tensor:
    """Whether each class covers at least `area_thresh` of each of the square class maps (n, H, H): (n, K) bool."""
    classes = torch.arange(num_classes, device=labels.device).view(-1, 1, 1)
    pixels = (labels.unsqueeze(1) == classes).sum(dim=(2, 3))
    return (pixels > 0) & (pixels >= area_thresh * labels.shape[-1] ** 2)


@torch.no_grad()
def write_columns(bank: Tensor, columns: Tensor, ids: Tensor, known: Tensor | None = None) -> None:
    """Set the columns `ids` (n,) of the bank (K, N) to `columns` (n, K), one after the other: the last one wins.

    Where `known` (n,) is false (logits that are not finite, in a step that will be cancelled) a column stays.

    Source: `update_cutmix_bank` in `u2pl/utils/utils.py`, branch `with_AEL`.
    """
    for i in range(len(columns)):
        place, column = ids[i : i + 1], columns[i].unsqueeze(1).to(bank.dtype)
        if known is not None:
            column = torch.where(known[i], column, bank.index_select(1, place))
        bank.index_copy_(1, place, column)


# --- choices of the host ---------------------------------------------------------------------------------------


class AelDraws(Draws):
    """The random numbers of AEL steps in the order of the original; saved with a checkpoint.

    Classes and random boxes come from the NumPy generator, images and shuffles from one of Python, the maps of the
    consistency from the device's. The first two are seeded alike on every rank, as in the original, unless the
    ranks shall draw `apart`: with shared banks equal numbers would choose the same image everywhere.
    """

    def __init__(self, seed: int, rank: int, device: torch.device, apart: bool = False) -> None:
        super().__init__(seed, rank, device)
        own = seed + rank if apart else seed
        self.rng = np.random.RandomState(own)
        self.python = random.Random(own)

    def coin(self) -> float:
        """Uniform number in [0, 1) that decides which of two unlabeled images stays."""
        return self.python.random()

    def classes(self, candidates: Sequence[int], probs: Floats, count: int) -> list[int]:
        """`count` independent draws among `candidates`."""
        return [int(self.rng.choice(candidates, p=probs)) for _ in range(count)]

    def image(self, candidates: Sequence[int], count: int) -> int:
        """One of the candidates, or any of `count` images if there are none."""
        return self.python.choice(candidates) if candidates else self.python.randint(0, count - 1)

    def component_order(self, count: int) -> list[int]:
        """The numbers 1..count, shuffled."""
        order = list(range(1, count + 1))
        self.python.shuffle(order)
        return order

    def box_uniforms(self) -> BoxUniforms:
        """The numbers of a random box."""
        self.rng.uniform()  # the original also draws the area, from a range of one value
        aspect, row, col = (float(self.rng.uniform()) for _ in range(3))
        return BoxUniforms(aspect, row, col)

    def growth(self) -> float:
        """Uniform number that decides on the height of a grown box."""
        return float(self.rng.uniform())

    def class_maps(self, num_classes: int, height: int, width: int) -> Tensor:
        """Uniform numbers (K, H, W) on the device."""
        return torch.rand(num_classes, height, width, generator=self.generator, device=self.generator.device)

    def state_dict(self) -> dict[str, Any]:
        """All three generators as plain tensors and numbers."""
        return super().state_dict() | {"python": torch.tensor(self.python.getstate()[1])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        super().load_state_dict(state)
        words = tuple(torch.as_tensor(state["python"]).tolist())
        self.python.setstate((self.python.VERSION, words, None))


class Pair(NamedTuple):
    """Two unlabeled images to be mixed: `first` of the batch, and one from the list with an object of class `k`."""

    first: int
    k: int
    second: int


class Choice(NamedTuple):
    """What the host decides before a step."""

    paste_classes: list[int]
    pairs: list[Pair]


def class_probabilities(confidence: Floats) -> Floats:
    """Probabilities (K,) of the class whose object is cut out next: softmax of 1 - confidence."""
    return _softmax(np.maximum(1.0 - confidence, 0.0))


def paste_probabilities(confidence: Floats, targets: Sequence[int]) -> Floats:
    """Probabilities of the classes `targets` to be pasted: softmax of the root of 1 - confidence."""
    return _softmax(np.maximum(1.0 - confidence[list(targets)], 0.0) ** 0.5)


def _softmax(values: Floats) -> Floats:
    mass = np.exp(values)
    return mass / mass.sum()


def choose(
    confidence: Floats,
    bank: NDArray[np.bool_],
    targets: Sequence[int],
    number: int,
    draws: AelDraws,
    pairs: int = 1,
) -> Choice:
    """Classes to paste, and the pairs of unlabeled images of a step.

    Of every two images of the unlabeled batch one stays. Its partner is an image that holds an object of a class
    drawn for it. The original has one pair per process; several let one process stand for as many.

    Args:
        confidence: (K,) after the last step.
        bank: (K, N) after the last step; a class without an image takes any.
        targets: classes that may be pasted.
        number: draws of them; equal ones count once.
        draws: in this order: the classes to paste, then for every pair the coin, the class, the image.
        pairs: half the unlabeled batch of this process.

    Source: `sample_from_bank` in `u2pl/utils/utils.py` and `train.py`, branch `with_AEL`.
    """
    pasted = draws.classes(targets, paste_probabilities(confidence, targets), number)
    probs = class_probabilities(confidence)
    chosen = []
    for i in range(pairs):
        first = 2 * i + (0 if draws.coin() > 0.5 else 1)
        (k,) = draws.classes(range(len(bank)), probs, 1)
        second = draws.image(np.flatnonzero(bank[k]).tolist(), bank.shape[1])
        chosen.append(Pair(first, k, second))
    return Choice(sorted(set(pasted)), chosen)


def labeled_pass(epoch: int, step: int, steps_per_epoch: int, batches: int) -> tuple[int, int]:
    """Which pass over the labeled list, and which of its `batches`, serves a step of an epoch (all from 0).

    An epoch has as many steps as the unlabeled loader. It starts the labeled list anew, with the order of the last
    pass of the epoch before; every exhaustion within an epoch gives a new order.
    """
    restarts = -(-steps_per_epoch // batches) - 1
    return epoch * restarts + step // batches, step % batches
