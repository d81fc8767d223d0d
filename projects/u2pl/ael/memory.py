"""What AEL remembers between steps, and what the host chooses from it.

K classes, N unlabeled images in the list. The functions on tensors wait for nothing; those on arrays are the choices
that the host makes between two steps.

Source: branch `with_AEL` of U2PL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.distributed import Dist, all_gather_padded, sum_over_ranks
from common.errors import UserError
from projects.u2pl.ael.draws import AelDraws, Floats
from projects.u2pl.config import Config, require_ael
from projects.u2pl.memory import Memory

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


# --- the memory ------------------------------------------------------------------------------------------------


class HostCopy:
    """Tensors on their way to the host; the first `read` waits for no more than what was enqueued before the copy."""

    def __init__(self, *tensors: Tensor) -> None:
        # from a GPU into pinned memory
        self._host = [tensor.to("cpu", non_blocking=True, copy=True) for tensor in tensors]
        self._arrived = torch.cuda.Event() if tensors[0].is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[NDArray[Any]]:
        """The values as arrays."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return [tensor.numpy() for tensor in self._host]


class AelMemory(Memory):
    """The contrastive memory, the class confidence (K,) and the CutMix bank (K, N) bool.

    The host chooses the images of a step from the state after the step before. That state is complete early in a
    step, so its copy (K numbers and K * N bytes) arrives with the class maps that the step needs on the host, and the
    next choice can be made while the GPU still works on the rest of that step.

    Args:
        cfg: settings, of which `method.ael` is given.
        num_classes: K.
        num_images: N, unlabeled images.
        dim: length of the representation.
        seed: of the random start.

    Raises:
        UserError: no class is left to paste.
    """

    class_confidence: Tensor
    cutmix_bank: Tensor

    def __init__(self, cfg: Config, num_classes: int, num_images: int, dim: int, seed: int) -> None:
        super().__init__(cfg, num_classes, dim)
        self.ael = ael = require_ael(cfg)
        self.targets = [k for k in range(num_classes) if k not in ael.common_classes]
        if not self.targets:
            raise UserError(
                f"method.ael.common_classes={list(ael.common_classes)}: leaves none of the {num_classes} classes "
                "to paste; shorten the list"
            )
        start = torch.zeros(num_classes)
        if ael.conf_init == "rand":  # QUIRK method.ael.conf_init
            start = torch.rand(num_classes, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("class_confidence", start)
        self.register_buffer("cutmix_bank", torch.zeros(num_classes, num_images, dtype=torch.bool))
        self._copy: HostCopy | None = None
        self._ahead: Choice | None = None
        self.register_load_state_dict_post_hook(_forget_copy)

    @torch.no_grad()
    def learn(
        self, logits_l: Tensor, y_l: Tensor, found: Tensor, known: Tensor, ids: Sequence[int], dist: Dist
    ) -> HostCopy:
        """Take in one step, and send class confidence, bank and `found` (uint8) to the host, which is returned.

        What is not finite leaves no trace.

        Args:
            logits_l: (B, K, H, W) of the student for labeled images.
            y_l: (B, H, W), 255 = ignore.
            found: (n, H, H) classes that the teacher sees in unlabeled images.
            known: (n,) bool, whether its logits there are finite.
            ids: their positions in the unlabeled list.
            dist: with shared banks every rank learns from all.
        """
        totals = class_totals(logits_l, y_l)
        columns = covered_classes(found, len(self.class_confidence), self.ael.area_thresh2)
        places = torch.cat([torch.full((1,), i, device=found.device) for i in ids])
        if self.ael.banks == "shared":  # QUIRK method.ael.banks: otherwise those of this process's images
            totals = sum_over_ranks(totals, dist)
            columns, known, places = (
                all_gather_padded(x, dist).flatten(0, 1) for x in (columns, known, places)
            )
        state = moved_confidence(self.class_confidence, batch_confidence(totals), self.ael.momentum)
        self.class_confidence.copy_(state)
        write_columns(self.cutmix_bank, columns, places, known)
        self._copy = HostCopy(self.class_confidence, self.cutmix_bank, found.to(torch.uint8))
        return self._copy

    def of_this_process(self) -> dict[str, Tensor]:
        """Also class confidence and bank, which differ between processes unless they are shared."""
        banks = {"class_confidence": self.class_confidence, "cutmix_bank": self.cutmix_bank}
        return super().of_this_process() | banks

    def choose(self, draws: AelDraws, pairs: int = 1) -> Choice:
        """What the next step shall paste and mix; to be called once before each step."""
        if self._ahead is not None:
            choice, self._ahead = self._ahead, None
            draws.catch_up()
            return choice
        self._copy = self._copy or HostCopy(self.class_confidence, self.cutmix_bank)
        confidence, bank = self._copy.read()[:2]
        return choose(confidence, bank, self.targets, self.ael.paste_number, draws, pairs)

    def choose_ahead(self, draws: AelDraws, pairs: int = 1) -> Choice:
        """What `choose` will return next; to be called within a step, once it draws no more numbers of the host."""
        draws.look_ahead()
        self._ahead = self.choose(draws, pairs)
        return self._ahead


def _forget_copy(memory: Any, _: object) -> None:
    memory._copy = memory._ahead = None
