"""Datasets and loaders of CPS and of its baselines.

CutMix masks are not drawn here, see `masks.MaskDraws`.
"""

from __future__ import annotations

from common.config import BatchPlan
from common.data.dataset_yaml import load_spec
from common.data.loaders import Loader, make_train_loader
from common.data.spec import Item
from common.data.split import Split, resolve_split
from common.data.streams import TrainingData
from common.distributed import Dist
from common.errors import UserError
from common.numerics.precision import synchronized
from projects.cps.config import Config
from projects.cps.stretched import StretchedDataset
from projects.cps.transforms import CpsTransform

INDEPENDENT = 1_000_000  # apart from the sampler seed 0 by more than any number of epochs


def train_transform(cfg: Config) -> CpsTransform:
    """Mirror, scale and crop of both labeled and unlabeled images.

    Raises:
        UserError: the configuration asks for an augmentation that CPS does not have.
    """
    data = cfg.data
    if data.rotation is not None or data.blur:
        raise UserError("data.rotation, data.blur: CPS has neither; set them to null and false")
    return CpsTransform(
        mean=data.mean,
        std=data.std,
        crop_size=data.crop_size,
        scales=data.scales,
        scale_range=data.scale_range,
        flip=data.flip,
        inclusive_crop=cfg.quirks.inclusive_crop,
        resize=data.resize,
    )


def epoch_images(cfg: Config, split: Split) -> int:
    """Length of an epoch in images, to which both lists are brought: as configured, or that of the longer one.

    Supervised-only runs take it too, so that they are as long as the semi-supervised ones they are compared with.
    """
    return cfg.data.epoch_images or max(len(split.labeled), len(split.unlabeled))


def never_used(data: TrainingData) -> list[str]:
    """A line for each role of which an epoch is too short to hold all images."""
    sets = {role: loader.dataset for role, loader in data.loaders.items()}
    return [
        f"data.epoch_images={len(images)}: the other {len(images.items) - len(images)} {role} images are never used"
        for role, images in sets.items()
        if len(images) < len(images.items)
    ]


def build_training_data(cfg: Config, dist: Dist, plan: BatchPlan) -> TrainingData:
    """Read the split and make the loaders: `labeled` and, but for supervised-only runs, the unlabeled ones.

    CutMix has two unlabeled loaders, `unlabeled_0` and `unlabeled_1`, the other methods one, `unlabeled`. All are
    equally long (`epoch_images`) and give `epoch_images // batch_size` steps, whatever the number of processes.
    The order of the unlabeled images is the same in every epoch (QUIRK quirks.fixed_unlabeled_order), and the two
    loaders of CutMix show the same images, each with draws of its own (QUIRK quirks.unlabeled_pairing), unless
    switched off.

    Raises:
        UserError: missing files or lists, empty lists, a batch larger than an epoch, a batch of one image without
            synchronized BatchNorm.
    """
    data, quirks, method = cfg.data, cfg.quirks, cfg.method.name
    transform = train_transform(cfg)
    if plan.per_forward == 1 and not synchronized(cfg.model.sync_bn, dist):
        raise UserError(
            f"optim.batch_size={cfg.optim.batch_size}: one image per process and forward, on which BatchNorm cannot "
            "train; raise it or optim.device_batch, use fewer processes, or several GPUs with model.sync_bn=true"
        )
    spec = load_spec(data.dataset, data.root)
    if not spec.generator:
        spec.require_root()  # before the lists, so that a missing folder is named first
    split = resolve_split(spec, data.split)
    if method != "sup_only" and not split.unlabeled:
        raise UserError(
            f"data.split={data.split}: has no unlabeled images, which method.name={method} needs; add "
            "unlabeled.txt, name another split, or set method.name=sup_only"
        )
    length = epoch_images(cfg, split)

    def loader(items: list[Item], role: str, *, sampler_seed: int = 0, reshuffle: bool = True) -> Loader:
        dataset = StretchedDataset(
            spec, items, transform, cfg.run.seed, role, data.on_error, cache=data.cache, length=length
        )
        return make_train_loader(
            dataset,
            plan.per_forward,
            dist,
            workers=data.workers,
            sampler_seed=sampler_seed,
            reshuffle=reshuffle,
            steps=length // (plan.per_forward * dist.world_size),  # the sampler's padding would give one more
        )

    seeds = {} if method == "sup_only" else {"unlabeled": 0}
    if method == "cps_cutmix":
        independent = quirks.unlabeled_pairing == "independent"
        seeds = {"unlabeled_0": 0, "unlabeled_1": INDEPENDENT if independent else 0}
    loaders = {"labeled": loader(split.labeled, "labeled")}
    for role, seed in seeds.items():
        loaders[role] = loader(
            split.unlabeled, role, sampler_seed=seed, reshuffle=not quirks.fixed_unlabeled_order
        )
    training = TrainingData(spec, split, loaders, plan.accumulate)
    if training.steps_per_epoch < 1:
        raise UserError(
            f"optim.batch_size={cfg.optim.batch_size}: larger than an epoch of {length} images; lower it, or set "
            "data.epoch_images"
        )
    return training
