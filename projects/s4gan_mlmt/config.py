"""Configuration of s4GAN and of its image-level branch MLMT; the defaults are those of s4GAN on Pascal VOC."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from annotated_types import Interval

from common.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Count,
    DataConfig,
    Decay,
    EvalConfig,
    ExpectConfig,
    Natural,
    NonNegative,
    OptimConfig,
    Positive,
    RunConfig,
    Seed,
    Share,
    Side,
    Size,
)
from common.models.encoders import (
    RESNETS,
    GenericConfig,
    facts_of,
    fit_to_encoder,
    require_backbone,
    require_multiples,
)
from projects.s4gan_mlmt.mlmt.config import MlmtConfig

Pipeline = Literal["voc", "pascal_context", "cityscapes", "house"]
Method = Literal["sup_only", "s4gan", "s4gan_mlmt"]
Network = Literal["deeplabv2", "deeplabv3p_wrn38", "deeplabv3plus", "generic"]
Visits = Literal["repeated_0_4", "repeated_1_5", "once"]


class Statistics(NamedTuple):
    """Mean and standard deviation of the R, G and B channel on the scale 0..255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# Caffe's means, no standard deviation: the network sees values of about +-128
VOC = Statistics((122.67891434, 116.66876762, 104.00698793), (1.0, 1.0, 1.0))
CONTEXT = Statistics(IMAGENET_MEAN, IMAGENET_STD)
# QUIRK city_channels: the means of R, G and B are taken from B, G and R, and the network sees B, G, R
CITYSCAPES = Statistics((72.39239876, 82.90891754, 73.15835921), (255.0, 255.0, 255.0))
STATISTICS = {"voc": VOC, "pascal_context": CONTEXT, "cityscapes": CITYSCAPES}


@dataclass(frozen=True, kw_only=True, slots=True)
class S4GanDataConfig(DataConfig):
    """Which images, which of them are labeled, and how a training sample is cut out of them.

    Attributes:
        pipeline: loading and augmentation of the authors for `voc`, `pascal_context` or `cityscapes`, whose constants
            are fixed (they become `mean` and `std`); `house` is the one every project here shares (`mean`, `std`,
            `scale_range`, `flip` ...), for other data.
        random_scale: VOC pipeline: resize by one of 0.5, 0.6 ... 1.6; the documented commands do not.
        random_mirror: VOC pipeline: mirror half of the samples; the documented commands do not.
        labeled_ratio: share of the training images that is labeled, `int(ratio * N)` of them: the first entries of
            the permutation of `split_file`, or of one that is drawn and saved in the run directory. None takes the
            lists of `split`.
        split_file: `.pkl` file with a permutation of the training images' positions; only with `labeled_ratio`.
        split_seed: of a permutation that is drawn; None for `run.seed`.
        train_list: file with the ids of all training images, in place of the dataset's own list.
        drop_last: leave out the short last batch of a loader's pass; the authors do with WRN-38 only.
    """

    crop_size: tuple[Side, Side] = (321, 321)
    pipeline: Pipeline = "voc"
    random_scale: bool = False
    random_mirror: bool = False
    labeled_ratio: Annotated[float, Interval(gt=0, le=1)] | None = None
    split_file: str | None = None
    split_seed: Seed | None = None
    train_list: str | None = None
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.pipeline != "house":
            own = STATISTICS[self.pipeline]
            if (self.mean, self.std) not in (own, (IMAGENET_MEAN, IMAGENET_STD)):
                raise ValueError(
                    f"'mean' is {self.mean!r}; pipeline={self.pipeline} has its own and takes none, expected "
                    "'pipeline: house' with it"
                )
            # evaluation and prediction, which all projects share, read them here
            object.__setattr__(self, "mean", own.mean)
            object.__setattr__(self, "std", own.std)
        if self.split_file is not None and self.labeled_ratio is None:
            raise ValueError(f"'split_file' is {self.split_file!r}; expected 'labeled_ratio' with it")


@dataclass(frozen=True, kw_only=True, slots=True)
class S4GanOptimConfig(OptimConfig):
    """Optimizers, schedules and batches; a run counts steps, for its loaders have no common epoch.

    Attributes:
        lr: rate of the segmentation network's backbone.
        head_lr_factor: its head learns with `lr * head_lr_factor`.
        weight_decay: of the segmentation network; the discriminator has none.
        steps: optimizer steps of the whole schedule.
        epochs: rounds of equally many steps; after each one the run is saved and, every `eval.every_epochs`
            rounds, measured. `steps` must be a multiple.
        batch_size: labeled images per step over all processes, and as many for the discriminator's real input.
        unlabeled_batch_size: unlabeled images per step over all processes; None for `batch_size`.
        lr_d: rate of the discriminator (Adam).
        betas_d: its two decays.
    """

    lr: Positive = 2.5e-4
    head_lr_factor: NonNegative = 10.0
    weight_decay: NonNegative = 5e-4
    steps: Count = 40000
    epochs: Count = 8
    batch_size: Count = 8
    unlabeled_batch_size: Count | None = None
    lr_d: Positive = 1e-4
    betas_d: tuple[Decay, Decay] = (0.9, 0.99)
    paper_processes: Count | None = 1

    def __post_init__(self) -> None:
        if self.steps % self.epochs:
            raise ValueError(f"'steps' is {self.steps!r}; expected a multiple of 'epochs', {self.epochs}")

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps between two saves."""
        return self.steps // self.epochs

    @property
    def unlabeled(self) -> int:
        """Unlabeled images per step over all processes."""
        return self.unlabeled_batch_size or self.batch_size


@dataclass(frozen=True, kw_only=True, slots=True)
class S4GanEvalConfig(EvalConfig):
    """How mIoU is measured.

    Attributes:
        protocol: `original` is the authors' of `data.pipeline`: VOC padded to 505, the centre 512 of PASCAL-Context,
            Cityscapes at half size; for the `house` pipeline the whole image. The others are those every project
            shares, at full resolution.
        during_training: the protocol after every `every_epochs` rounds.
        every_epochs: rounds between two evaluations; 0 as the authors: nothing is measured before the end.
        after_steps: measure, as the main figure, the weights after so many steps (the authors evaluate file 30000 of
            40000, which has seen 30001); None measures the best of training, or the last where nothing was measured.
    """

    protocol: Literal["original", "center_crop", "whole_image", "sliding_window", "multi_scale_flip"] = (
        "original"  # type: ignore[assignment]  # the shared section's values and one more
    )
    during_training: Literal["original", "center_crop", "whole_image", "sliding_window"] = "original"  # type: ignore[assignment]
    every_epochs: Natural = 0
    after_steps: Count | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(GenericConfig):
    """Segmentation network and discriminator; the defaults are the published DeepLabV2 with ResNet-101.

    Attributes:
        network: `deeplabv2` (ResNet-101 with the stride on the first 1x1 convolution, BatchNorm weights frozen) or
            `deeplabv3p_wrn38` (DeepLabV3+ with Wide-ResNet-38), both the authors'; `deeplabv3plus` is this
            repository's DeepLabV3+ with a ResNet of any depth, for small data and for comparisons; `generic` is that
            of `GenericConfig`.
        weights: file to start from (searched in the working directory, in `SSS_WEIGHTS` and among the bundled
            files), or `none` for random numbers. `deeplabv2` takes every tensor whose name and shape match, so an
            ImageNet file (without its classifier) as well as a file of a whole network; `deeplabv3p_wrn38` the
            authors' trunk file; `deeplabv3plus` a file of its backbone.
        weights_d: file of a discriminator to start from, or `none`; every tensor must fit.
        layers: blocks per stage; None for the published ones. Four for `deeplabv2` (3, 4, 23, 3), six for
            `deeplabv3p_wrn38` (3, 3, 6, 3, 1, 1).
        width: channels of the first stage; None for the network's own (64, `resnet_tiny` 16).
        backbone: of `deeplabv3plus` and `generic` alone, as are the next four.
        stem: `plain` (7x7, takes torchvision weights) or `deep` (three 3x3 convolutions).
        output_stride: 8, 16 or 32.
        multi_grid: dilation factors of the blocks of the last stage; () for none.
        sync_bn: synchronize BatchNorm over processes (GPUs only). The authors' networks never do.
        inner_planes: channels inside the head of either DeepLabV3+.
        low_planes: channels of its low-level branch.
        dilations: of its three atrous branches.
        d_width: channels of the discriminator's first layer; the other three double them.
        d_pool: window (h, w) of the discriminator's average pool, as the authors fix it per dataset: (20, 20) at crop
            321x321, (16, 32) at 256x512. None averages the whole map, which is the same at those crops and works at
            any other.
    """

    network: Network = "deeplabv2"  # type: ignore[assignment]  # the shared section's second value, and its own
    weights: str = "none"
    weights_d: str = "none"
    layers: tuple[Count, ...] | None = None
    width: Count | None = None
    backbone: str = "resnet101"
    stem: Literal["plain", "deep"] = "plain"
    output_stride: Literal[8, 16, 32] = 16
    multi_grid: tuple[Count, ...] = ()
    sync_bn: bool = True
    inner_planes: Count = 256
    low_planes: Count = 48
    dilations: tuple[Count, Count, Count] = (12, 24, 36)
    d_width: Count = 64
    d_pool: Size | None = None

    def __post_init__(self) -> None:
        require_backbone(self, RESNETS)
        blocks = {"deeplabv2": 4, "deeplabv3p_wrn38": 6, "deeplabv3plus": 0, "generic": 0}[self.network]
        if self.layers is not None and len(self.layers) != blocks:
            expected = f"{blocks} positive numbers" if blocks else "null"
            raise ValueError(f"'layers' is {self.layers!r}; expected {expected} for network={self.network}")
        if 0 < len(self.multi_grid) < 3:
            raise ValueError(f"'multi_grid' is {self.multi_grid!r}; expected three factors, or none")


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodConfig:
    """The method's own numbers.

    Attributes:
        name: `s4gan`; `s4gan_mlmt`, which trains the image-level branch on the same split after it and fuses both;
            `sup_only`, the segmentation network on labeled images alone.
        fm_weight: weight of the feature matching loss.
        st_weight: weight of the self-training loss; the losses are logged with their weights.
        st_threshold: an unlabeled image teaches itself where the discriminator's score is above this.
        st_start: iterations (from 0) without self-training; the authors leave it out of the very first.
        dropout: share of the discriminator's channels that are dropped.
    """

    name: Method = "s4gan"
    fm_weight: NonNegative = 0.1
    st_weight: NonNegative = 1.0
    st_threshold: Share = 0.6
    st_start: Natural = 1
    dropout: Decay = 0.5

    @property
    def adversarial(self) -> bool:
        """Whether a discriminator and unlabeled images take part."""
        return self.name != "sup_only"


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepConfig:
    """Which rounds' weights stay in the run directory, to be measured afterwards.

    Attributes:
        every_epochs: keep the weights after every so many rounds; 0 keeps none. The authors keep all.
        original_every: also write the authors' files `VOC_{t}.pth` and `VOC_{t}_D.pth`, for every t that is a
            multiple of this, after t + 1 steps, and for t = `optim.steps` at the end; 0 writes none.
    """

    every_epochs: Natural = 0
    original_every: Natural = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class QuirkConfig:
    """Oddities of the authors' code that move numbers; the first value is the original.

    Attributes:
        visits: a backbone parameter is listed as often as it is deep in the network and each step updates it
            that many times: with PyTorch 0.4's weight decay, which adds up in the gradient (`repeated_0_4`), with
            that of later versions (`repeated_1_5`), or `once`.
        aspp_branches: DeepLabV2 adds 2 of its 4 branches.
        real_range: real images are scaled to 0..1 with the range of the `labeled` batch, or with their `own`.
        context_mean: PASCAL-Context's mean is `reversed` in s4GAN's training, though not in evaluation.
        context_padding: padding of PASCAL-Context is class 0 (`background`) and counts, or is `ignored`.
        fusion: a class that the image-level branch switches off gets `zero_logits`, or is left out (`mask`).
        frozen_affine: BatchNorm's weight and bias are frozen in DeepLabV2, while its statistics are live.
        separate_statistics: labeled and unlabeled images go through the network one after the other, each
            with its own BatchNorm statistics; false joins both into one forward.
        gate_dropout: an image is selected by a score under dropout; false scores it without.
    """

    visits: Visits = "repeated_0_4"
    aspp_branches: Literal[2, 4] = 2
    real_range: Literal["labeled", "own"] = "labeled"
    context_mean: Literal["reversed", "plain"] = "reversed"
    context_padding: Literal["background", "ignored"] = "background"
    fusion: Literal["zero_logits", "mask"] = "zero_logits"
    frozen_affine: bool = True
    separate_statistics: bool = True
    gate_dropout: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run of s4GAN, of s4GAN with MLMT or of the supervised baseline."""

    data: S4GanDataConfig
    optim: S4GanOptimConfig = field(default_factory=S4GanOptimConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    mlmt: MlmtConfig = field(default_factory=MlmtConfig)
    eval: S4GanEvalConfig = field(default_factory=S4GanEvalConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    run: RunConfig = field(default_factory=RunConfig)
    quirks: QuirkConfig = field(default_factory=QuirkConfig)
    expect: ExpectConfig = field(default_factory=ExpectConfig)

    def __post_init__(self) -> None:
        generic = self.model.network == "generic"
        if generic and self.data.pipeline != "house":
            raise ValueError(
                f"'data.pipeline' is {self.data.pipeline!r}, which normalizes in its own way; expected house with "
                "model.network=generic"
            )
        if self.optim.optimizer != "sgd" and not generic:
            raise ValueError(
                f"'optim.optimizer' is {self.optim.optimizer!r}; expected sgd unless model.network=generic; the "
                "discriminator's is Adam"
            )
        object.__setattr__(self, "data", fit_to_encoder(self.model, self.optim, self.data))
        if generic:
            facts = facts_of(
                self.model.backbone, self.model.decoder, self.model.output_stride, self.model.weights
            )
            require_multiples("mlmt.size", (self.mlmt.size,), facts.multiple)
        after, steps = self.eval.after_steps, self.optim.steps
        if after is not None and after > steps:
            raise ValueError(f"'eval.after_steps' is {after}; expected 1 to optim.steps={steps}, or null")


def start_files(cfg: Config) -> dict[str, tuple[str | None, str]]:
    """Files besides the data that a run starts from, by their key, and what replaces them if they are no weights."""
    model, mlmt, masks = (
        cfg.model,
        cfg.mlmt,
        "correct the path, or take the vectors from the masks: mlmt.labels=masks",
    )
    files: dict[str, tuple[str | None, str]] = {"model.weights": (model.weights, "")}
    if cfg.method.adversarial:
        files["model.weights_d"] = model.weights_d, ""
    if cfg.method.name == "s4gan_mlmt":
        files["mlmt.weights"] = mlmt.weights, ""
        if mlmt.labels == "files":
            files |= {
                "mlmt.train_labels": (mlmt.train_labels, masks),
                "mlmt.val_labels": (mlmt.val_labels, masks),
            }
    return files


def further_quirks(cfg: Config) -> dict[str, bool]:
    """Quirks among the numbers of the branch in use."""
    return {"mlmt.flat_roll": cfg.method.name == "s4gan_mlmt" and cfg.mlmt.flat_roll}
