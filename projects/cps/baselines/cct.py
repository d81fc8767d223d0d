"""Cross-consistency training as it is shipped beside CPS: one encoder, a main decoder and twelve perturbed ones.

The auxiliary decoders see the unlabeled features after a perturbation each and learn the main decoder's
probabilities. Labeled pixels teach the main decoder; those that it knows well already are left out, fewer and fewer
of them as training goes on.

Guided cut-out needs contours, which OpenCV finds on the host: `object_maps` is the one place where a step waits for the
device. Everything else stays there.

Legend: B images, D channels of the features, (h, w) their size, K classes, (H, W) image size = 4 h and 4 w.

Source: `network.py` and `train.py` of `voc8.res50v3+.CCT` and `unsupervised_head.py` in TorchSemiSeg.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.data.spec import IGNORE
from common.data.streams import Batches
from common.distributed import to_device
from common.errors import UserError
from common.models.deeplab import upsample
from common.numerics.losses import Losses, best_class
from common.numerics.precision import autocast, widened
from common.run.progress import Progress
from projects.cps.baselines.config import CctSettings, Consistency
from projects.cps.baselines.draws import CctDraws
from projects.cps.config import loss_groups
from projects.cps.losses import compiled
from projects.cps.network import CpsNetwork
from projects.cps.state import Run

Map = NDArray[np.uint8]
UPSCALE = 4  # features to images; QUIRK cct_upscale: a constant, whatever the image's size
MIN_CONTOUR = 50  # stored points that a contour must exceed


# --- losses ----------------------------------------------------------------------------------------------------


def annealing_steps(epochs: int, steps_per_epoch: int, share: float = 0.4) -> float:
    """Steps over which the threshold rises: `share` of the run, not necessarily a whole number."""
    return (epochs - (1 - share) * epochs) * steps_per_epoch


def annealed_threshold(step: int, total: float, num_classes: int, end: float = 0.99) -> float:
    """Probability of the label from which on a labeled pixel is left out.

    It rises from 1 / K to `end` as `1 - exp(-5 t)`, t = (step + 1) / total and at most 1; the original counts the
    iterations of an epoch from 1.

    Args:
        step: optimizer step, from 0.
        total: steps over which it rises, see `annealing_steps`.
        num_classes: K.
        end: what it would reach after an endless rise.

    Source: `abCE_loss.threshold`.
    """
    start = 1 / num_classes
    share = 1.0 - math.exp(-5.0 * min(step + 1.0, total) / total) if total else 1.0
    return share * (end - start) + start


def bootstrapped_cross_entropy(
    logits: Tensor, target: Tensor, threshold: float, *, groups: int = 1
) -> Tensor:
    """Mean cross entropy over the labeled pixels whose label has a low probability: a scalar.

    Pixels count whose probability is below `threshold`, or below the one at place b (from 0) of the ascending order
    of a group's b images if that is larger. A group of which nothing counts gives 0.

    Args:
        logits: (B, K, H, W).
        target: (B, H, W) int64, 255 = ignore.
        threshold: probability, see `annealed_threshold`.
        groups: number of runs of consecutive images that stand for the authors' processes; divides B.

    Source: `abCE_loss`.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    images = len(target) // groups
    valid = (target != IGNORE).reshape(groups, -1)
    with torch.no_grad():
        index = target.where(target != IGNORE, 0).unsqueeze(1)
        probs = logits.softmax(dim=1).gather(1, index).reshape(groups, -1).masked_fill(~valid, torch.inf)
        lowest = probs.topk(min(images + 1, probs.shape[1]), dim=1, largest=False, sorted=True).values
        place = (valid.sum(dim=1, keepdim=True) - 1).clamp(min=0, max=images)
        hard = probs < lowest.gather(1, place).clamp(min=threshold)
    pixels = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none").reshape(groups, -1)
    hard = hard & valid
    return ((pixels * hard).sum(dim=1) / hard.sum(dim=1).clamp(min=1)).mean()


def kl_divergence(log_probs: Tensor, target: Tensor) -> Tensor:
    """`t (log t - log q)` of every element, 0 where t is 0."""
    return F.kl_div(log_probs, target, reduction="none")


def consistency_loss(
    logits: Tensor, target: Tensor, kind: Consistency = "mse", min_confidence: float | None = None
) -> Tensor:
    """Distance of softmaxed logits q to probabilities t, averaged over all elements: a scalar.

    `mse`: (q - t)^2. `kl`: t (log t - log q). `js`: the mean of M (log M - log q) and M (log M - log(t + 1e-5)) with
    M = (q + t) / 2.

    Args:
        logits: (B, K, H, W).
        target: probabilities (B, K, H, W); gets no gradient.
        kind: which distance.
        min_confidence: count pixels only whose largest t exceeds it; None counts all. `mse` is then the mean over the
            elements of those pixels, `kl` their sum over the number of all pixels, and `js` takes no notice.

    Source: `softmax_mse_loss`, `softmax_kl_loss` and `softmax_js_loss`.
    """
    target = target.detach()
    if kind == "js":
        log_probs = F.log_softmax(logits, dim=1)
        # an element that both give up as 0 has no finite gradient
        middle = ((logits.softmax(dim=1) + target) * 0.5).clamp(min=torch.finfo(logits.dtype).tiny)
        return 0.5 * (kl_divergence(log_probs, middle) + kl_divergence((target + 1e-5).log(), middle)).mean()
    if kind == "mse":
        distance = F.mse_loss(logits.softmax(dim=1), target, reduction="none")
    else:
        distance = kl_divergence(F.log_softmax(logits, dim=1), target)
    if min_confidence is None:
        return distance.mean()
    sure = target.amax(dim=1, keepdim=True) > min_confidence
    count = sure.sum().clamp(min=1) * logits.shape[1] if kind == "mse" else sure.numel()
    return (distance * sure).sum() / count


# --- perturbations of features (B, D, h, w) --------------------------------------------------------------------


def spatial_dropout(feature: Tensor, uniform: Tensor, rate: float) -> Tensor:
    """Whole channels set to zero where `uniform` (B, D, 1, 1) is below `rate`, the others scaled up."""
    return feature * (uniform >= rate).to(feature.dtype) / (1 - rate)


def context_masking(feature: Tensor, objects: Tensor) -> Tensor:
    """The objects alone: features times their map (B, 1, H, W), 1 = object, taken at the nearest pixel."""
    return nearest(objects, feature) * feature


def object_masking(feature: Tensor, objects: Tensor) -> Tensor:
    """The background alone, see `context_masking`."""
    return (1 - nearest(objects, feature)) * feature


def feature_drop(feature: Tensor, share: float) -> Tensor:
    """Features without the places whose channel mean reaches `share` of the image's largest one."""
    attention = feature.mean(dim=1, keepdim=True)
    return feature * (attention < attention.amax(dim=(1, 2, 3), keepdim=True) * share).to(feature.dtype)


def feature_noise(feature: Tensor, noise: Tensor) -> Tensor:
    """Features changed by relative `noise` (D, h, w), the same for all images."""
    return feature * noise + feature


def nearest(maps: Tensor, like: Tensor) -> Tensor:
    """Maps (B, 1, H, W) resized to the size of features by the nearest pixel, in their type."""
    return F.interpolate(maps.to(like.dtype), size=like.shape[-2:], mode="nearest")


def contour_boxes(objects: Map) -> list[tuple[int, int, int, int]]:
    """First and last column, first and last row of every large object in a map (H, W), in OpenCV's order.

    An object is large if its outer contour, of which straight runs keep their ends only, has more than 50 points.
    """
    contours, _ = cv2.findContours(objects, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    boxes = []
    for contour in contours:
        if len(contour) > MIN_CONTOUR:
            (left, top), (right, bottom) = contour.min(axis=(0, 1)), contour.max(axis=(0, 1))
            boxes.append((int(left), int(right), int(top), int(bottom)))
    return boxes


def cutout_mask(
    boxes: Sequence[Sequence[tuple[int, int, int, int]]],
    height: int,
    width: int,
    erase: float,
    place: Callable[[int, int], int],
) -> Tensor:
    """Masks (B, 1, H, W) on the host, 0 in a rectangle inside the box of every object and 1 elsewhere.

    Args:
        boxes: of the objects of each image, see `contour_boxes`.
        height: H.
        width: W.
        erase: share of the box's height and width that is blanked.
        place: draws an offset, both ends included; asked for the column, then for the row.

    Source: `guided_cutout`.
    """
    mask = torch.ones(len(boxes), 1, height, width)
    for i, found in enumerate(boxes):
        for left, right, top, bottom in found:
            box_width, box_height = right - left, bottom - top
            col = left + place(0, int(box_width * (1 - erase)))
            row = top + place(0, int(box_height * (1 - erase)))
            mask[i, 0, row : row + int(box_height * erase), col : col + int(box_width * erase)] = 0
    return mask


def object_maps(objects: Tensor) -> list[Map]:
    """A batch's maps (B, 1, H, W) on the host, for OpenCV; waits for the device, once a step."""
    return list(objects.squeeze(1).to(torch.uint8).cpu().numpy())


def perturbed(feature: Tensor, logits: Tensor, settings: CctSettings, draws: CctDraws) -> list[Tensor]:
    """The features (B, D, h, w) as each auxiliary decoder sees them.

    Args:
        feature: of the unlabeled images.
        logits: main scores (B, K, H, W) on them; whatever is not of class 0 counts as an object.
        settings: which perturbations, in which order.
        draws: random numbers, drawn in that order.
    """
    objects = (best_class(logits).unsqueeze(1) > 0).to(feature.dtype)
    boxes = [contour_boxes(one) for one in object_maps(objects)] if "cutout" in settings.decoders else []

    def cutout(x: Tensor) -> Tensor:
        mask = cutout_mask(boxes, objects.shape[-2], objects.shape[-1], settings.erase, draws.place)
        return x * to_device(nearest(mask, x).to(x.dtype), x.device)

    def noise(x: Tensor) -> Tensor:
        return feature_noise(x, (2 * draws.uniform(*x.shape[1:], like=x) - 1) * settings.noise)

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "spatial_dropout": lambda x: spatial_dropout(
            x, draws.uniform(*x.shape[:2], 1, 1, like=x), settings.drop_rate
        ),
        "cutout": cutout,
        "context_masking": lambda x: context_masking(x, objects),
        "object_masking": lambda x: object_masking(x, objects),
        "feature_drop": lambda x: feature_drop(x, draws.share(*settings.drop_range)),
        "feature_noise": noise,
    }
    return [ways[name](feature) for name in settings.decoders]


# --- the network -----------------------------------------------------------------------------------------------


class AuxDecoders(nn.Module):
    """One 1x1 convolution with bias per auxiliary decoder, drawn as the main one.

    Args:
        planes: channels of the features.
        num_classes: K.
        count: number of decoders.
    """

    def __init__(self, planes: int, num_classes: int, count: int) -> None:
        super().__init__()
        self.decoders = nn.ModuleList([nn.Conv2d(planes, num_classes, 1) for _ in range(count)])
        for decoder in self.decoders:
            nn.init.kaiming_normal_(cast(Tensor, decoder.weight), mode="fan_in", nonlinearity="relu")

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One batch of features (B, D, h, w) per decoder -> scores (B, K, h, w)."""
        return [decoder(x) for decoder, x in zip(self.decoders, features, strict=True)]


def times_four(logits: Tensor) -> Tensor:
    """Scores (B, K, h, w) in float32 at four times their size, by bilinear interpolation with aligned corners."""
    return upsample(widened(logits), [UPSCALE * side for side in logits.shape[-2:]])


class CctOutputs(NamedTuple):
    """Scores of one forward in float32.

    Attributes:
        labeled: of the main decoder (B, K, H, W) on labeled images.
        unlabeled: of the main decoder (B', K, H, W) on unlabeled images.
        auxiliary: of each auxiliary decoder on unlabeled images, at the size of the features (B', K, h, w).
    """

    labeled: Tensor
    unlabeled: Tensor
    auxiliary: list[Tensor]


class CctModel(nn.Module):
    """What learns in cross-consistency training, as one module, so that gradients are reduced at once.

    Args:
        network: encoder and main decoder (its classifier); becomes `branch1`, the network that is evaluated.
        auxiliary: the decoders that are needed in training alone.
        settings: the perturbations.
        separate: labeled and unlabeled images have BatchNorm statistics of their own.
        precision: of the forward passes.
    """

    def __init__(
        self,
        network: CpsNetwork,
        auxiliary: AuxDecoders,
        settings: CctSettings,
        separate: bool = True,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.branch1, self.auxiliary = network, auxiliary
        self.settings, self.separate, self.precision = settings, separate, precision

    def forward(self, x_l: Tensor, x_u: Tensor, draws: CctDraws) -> CctOutputs:
        """Scores on labeled (B, 3, H, W) and unlabeled images (B', 3, H, W).

        Raises:
            UserError: the sides of the images are not multiples of 4, with the authors' network.
        """
        size, generic = x_u.shape[-2:], self.branch1.multiple > 1
        for side in size:
            if side % UPSCALE and not generic:
                raise UserError(
                    f"cct: images of {x_u.shape[-2]}x{x_u.shape[-1]} are not {UPSCALE} times the size of their "
                    f"features; use a data.crop_size of multiples of {UPSCALE}"
                )
        with autocast(x_u.device, self.precision):
            if self.separate:
                _, labeled = self.branch1(x_l)
                feature, unlabeled = self.branch1(x_u)
            else:
                features, scores = self.branch1(torch.cat((x_l, x_u)))
                feature, labeled, unlabeled = features[len(x_l) :], scores[: len(x_l)], scores[len(x_l) :]

        def enlarged(logits: Tensor) -> Tensor:  # the generic network's features may have another stride
            return upsample(widened(logits), size) if generic else times_four(logits)

        labeled, unlabeled = enlarged(labeled), enlarged(unlabeled)
        with autocast(x_u.device, self.precision):
            scores = self.auxiliary(perturbed(feature, unlabeled.detach(), self.settings, draws))
        return CctOutputs(labeled, unlabeled, [widened(one) for one in scores])


def distance(scores: Tensor, target: Tensor, kind: Consistency, min_confidence: float | None) -> Tensor:
    """`consistency_loss` of scores (B, K, h, w), brought to the size of the target (B, K, H, W): a scalar."""
    return consistency_loss(upsample(scores, target.shape[-2:]), target, kind, min_confidence)


def cct_step(batch: Batches, at: Progress, run: Run) -> Losses:
    """Losses of one forward."""
    settings = run.cfg.method.cct
    (x_l, y_l), x_u = batch[0][:2], batch[1].image
    out: CctOutputs = run.nets.forward(x_l, x_u, run.draws)
    ramp = annealing_steps(at.epochs, at.length, settings.ramp_share)
    threshold = annealed_threshold(at.step, ramp, out.labeled.shape[1], settings.ramp_end)
    groups = loss_groups(run.cfg, len(x_l))
    sup = bootstrapped_cross_entropy(out.labeled, y_l, threshold, groups=groups)
    target = out.unlabeled.detach().softmax(dim=1)
    sure = settings.confidence_thresh if settings.confidence_masking else None
    far = partial(
        compiled(distance, run.cfg.run.compile), target=target, kind=settings.consistency, min_confidence=sure
    )
    # the backward pass makes the maps of the full size again: three for each of twelve decoders need not be kept
    each = [checkpoint(far, x, use_reentrant=False, preserve_rng_state=False) for x in out.auxiliary]
    unsup = settings.weight * torch.stack(each).mean()  # QUIRK method.cct.weight: constant, without a ramp
    return Losses(sup + unsup, {"loss_sup": sup, "loss_unsup": unsup})
