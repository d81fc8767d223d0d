"""Configuration of BRPG; the defaults are what all published settings share."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.config import DataConfig, EvalConfig, ExpectConfig, Natural, OptimConfig, RunConfig
from common.errors import UserError
from common.mean_teacher.config import DeepLabConfig
from common.models.encoders import RESNETS, fit_to_encoder, require_backbone
from projects.brpg.settings import MethodConfig, QuirkConfig

NETWORK = "DeepLabV3+ with a representation head"  # studies: one name, one network
PHASES = (  # in epochs: move with a change of optim.epochs
    "method.sup_only_epochs",
    "method.collect_start",
    "method.collect_epochs",
    "method.paste_delay",
    "method.paste_promote",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(DeepLabConfig):
    """ResNet or Xception-65 + DeepLabV3+ with a representation head, whose length is `inner_planes`.

    Of the settings `stem`, `multi_grid` and `zero_init_residual` concern ResNets only.

    Attributes:
        backbone: also `xception65` (published for COCO), with `output_stride` 8 or 16.
    """

    def __post_init__(self) -> None:
        require_backbone(self, (*RESNETS, "xception65"))


@dataclass(frozen=True, kw_only=True, slots=True)
class BrpgEvalConfig(EvalConfig):
    """How mIoU is measured.

    Attributes:
        every_steps: evaluate within the epochs too, after every so many steps (authors: 150, COCO 1500); the best
            weights are chosen at that granularity. 0 evaluates between epochs only.
    """

    every_steps: Natural = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run of BRPG or of its supervised-only baseline."""

    data: DataConfig
    optim: OptimConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    eval: BrpgEvalConfig = field(default_factory=BrpgEvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    quirks: QuirkConfig = field(default_factory=QuirkConfig)
    expect: ExpectConfig = field(default_factory=ExpectConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", fit_to_encoder(self.model, self.optim, self.data))
        method, epochs = self.method, self.optim.epochs
        if method.mode == "sup_only":
            return
        if method.sup_only_epochs >= epochs:
            raise ValueError(
                f"'method.sup_only_epochs' is {method.sup_only_epochs}; expected less than optim.epochs={epochs}, or "
                "method.mode=sup_only"
            )
        if method.prototypes and method.prototype_start >= epochs:
            raise ValueError(
                f"'method.collect_start' + 'method.collect_epochs' is {method.prototype_start}; expected less than "
                f"optim.epochs={epochs}, so that the prototypes are used, or method.prototypes=false"
            )


def method_name(cfg: Config) -> str:
    """The name of the method or of one of its baselines in reports."""
    if cfg.method.mode == "sup_only":
        return "sup_only"
    return "brpg" if cfg.method.prototypes else "mean_teacher"


def require_classes(method: MethodConfig, num_classes: int) -> None:
    """Refuse class numbers and ranks that the dataset does not have.

    Raises:
        UserError: names the setting.
    """
    for key in ("fix_classes", "paste_ignore"):
        unknown = [k for k in getattr(method, key) if not 0 <= k < num_classes]
        if unknown:
            raise UserError(
                f"method.{key}: class {unknown[0]} does not exist; the dataset has 0 to {num_classes - 1}"
            )
    if method.contra_weight > 0 and not 0 <= method.low_rank < min(method.high_rank, num_classes):
        raise UserError(
            f"method.low_rank={method.low_rank}, method.high_rank={method.high_rank}: no rank of {num_classes} classes "
            f"(0..{num_classes - 1}) lies in between, so the contrast would always be 0; lower method.low_rank"
        )
