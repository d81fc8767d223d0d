"""Strict YAML -> frozen dataclasses, and the sections that every project shares."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import operator
import re
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Interval

from common.errors import UserError

T = TypeVar("T")
ReadConfig = Callable[[Path], dict[str, Any]]

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
BAD_YAML = (
    yaml.YAMLError,
    ValueError,
    TypeError,
    RecursionError,
)  # the last three: of impossible dates, sets, depths


@dataclass(frozen=True)
class Entries:
    """What the entries of a list must be together, and the words for it; `at_least` is for the schema."""

    words: str
    holds: Callable[[tuple[Any, ...]], bool]
    at_least: int | None = None


# The ranges of settings. `build` refuses a value outside, or one that is not finite; `tools.schema` tells editors.
RISING = Entries("low <= high", lambda pair: pair[0] <= pair[1])
NOT_EMPTY = Entries("at least one entry", bool, at_least=1)
Positive = Annotated[float, Interval(gt=0)]
NonNegative = Annotated[float, Interval(ge=0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]
Percent = Annotated[float, Interval(ge=0, le=100)]
Temperature = Annotated[float, Interval(gt=0), Interval(ge=1e-4)]
Angle = Annotated[float, Interval(ge=-360, le=360)]
Colour = Annotated[float, Interval(ge=0, le=255)]
Natural = Annotated[int, Interval(ge=0), Interval(le=10**9)]
Count = Annotated[int, Interval(ge=1), Interval(le=10**9)]
ClassNumber = Annotated[int, Interval(ge=0, le=253)]
Seed = Annotated[int, Interval(ge=0, lt=2**31)]
Workers = Annotated[int, Interval(ge=0), Interval(le=1024)]
Side = Annotated[int, Interval(ge=8, le=65536)]
Size = tuple[Count, Count]
Range = Annotated[tuple[Positive, Positive], RISING]
Scales = Annotated[tuple[Positive, ...], NOT_EMPTY]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which images, which of them are labeled, and how a training sample is cut out of them.

    Attributes:
        dataset: built-in name (`voc`, `cityscapes`, `coco`, `pascal_context`, `camvid`, `shapes`) or the
            path of a `dataset.yaml`.
        split: folder below `splits/<dataset>/` (or a path) with `labeled.txt` and `unlabeled.txt`.
        root: folder of the files; default: the environment variable `SSS_DATA`, then the dataset's own root.
        val: name of the evaluation list while training, or a path.
        resize: fixed size (height, width) given to every training image first; None keeps its own.
        crop_size: height and width of a training sample.
        scale_range: range of the random resize.
        flip: mirror half of the samples.
        rotation: range of a random rotation in degrees; None for none.
        blur: blur half of the samples with the fixed 5x5 kernel.
        mean, std: channel statistics on the scale 0..255, RGB.
        workers: decoding processes per loader and rank; 0 decodes in the training process.
        cache: keep decoded images in memory (small datasets).
        on_error: what a broken file does: `stop` the run, or `skip` (logged and counted).
    """

    dataset: str
    split: str
    root: str | None = None
    val: str = "val"
    resize: tuple[Side, Side] | None = None
    crop_size: tuple[Side, Side] = (513, 513)
    scale_range: Range = (0.5, 2.0)
    flip: bool = True
    rotation: Annotated[tuple[Angle, Angle], RISING] | None = None
    blur: bool = False
    mean: tuple[Colour, Colour, Colour] = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD
    workers: Workers = 2
    cache: bool = False
    on_error: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimizer, schedule and batch.

    Attributes:
        optimizer: `sgd`, `adam` or `adamw`.
        lr: learning rate of the encoder at `batch_size`.
        head_lr_factor: heads learn with `lr * head_lr_factor`.
        layer_decay: a layer of the generic network's encoder learns that many times as fast as the next one; None
            gives all of them one rate.
        momentum: of SGD.
        weight_decay: of all parameters.
        warmup_steps: optimizer steps over which the rate rises to that of the schedule.
        schedule: `poly` or `cosine`, stepped once per optimizer step.
        power: exponent of `poly`.
        target_lr: end value of `cosine`.
        epochs: passes over the unlabeled images (supervised-only: over the labeled ones).
        batch_size: labeled images per optimizer step over all processes (the same number of unlabeled ones).
        device_batch: most labeled images one process takes at once; smaller than its share means accumulation.
        paper_processes: number of processes the authors used; deviations from it are printed.
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Positive
    head_lr_factor: NonNegative = 1.0
    layer_decay: Annotated[float, Interval(gt=0, le=1)] | None = None
    momentum: Decay = 0.9
    weight_decay: NonNegative = 1e-4
    warmup_steps: Natural = 0
    schedule: Literal["poly", "cosine"] = "poly"
    power: NonNegative = 0.9
    target_lr: NonNegative = 0.0
    epochs: Count
    batch_size: Count
    device_batch: Count | None = None
    paper_processes: Count | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """How mIoU is measured.

    Attributes:
        protocol: `center_crop`, `whole_image`, `sliding_window` or `multi_scale_flip`, for the evaluation script.
        during_training: the protocol after every `every_epochs` epochs.
        list: list evaluated by the script (`val`, `test` or a path).
        crop_size: window of `sliding_window`, crop of `center_crop`; None takes `data.crop_size`.
        stride: step of the window; None takes two thirds of the window, rounded up.
        scales: image scales whose logits are summed.
        flip: add the mirrored image (only `multi_scale_flip`).
        base_size: long side of the image at scale 1; None keeps the image's own size.
        every_epochs: 0 evaluates only at the end.
    """

    protocol: Literal["center_crop", "whole_image", "sliding_window", "multi_scale_flip"] = "whole_image"
    during_training: Literal["center_crop", "whole_image", "sliding_window"] = "center_crop"
    list: str = "val"
    crop_size: Size | None = None
    stride: Size | None = None
    scales: Scales = (1.0,)
    flip: bool = False
    base_size: Count | None = None
    every_epochs: Natural = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that does not change what is learned: place, device, precision, logging, resuming.

    Attributes:
        dir: run directory; None takes `runs/<config>/seed<seed>` below the project.
        seed: of initialization, data order and draws.
        device: `auto`, `cpu` or `cuda`.
        precision: `fp32`, `bf16` or `fp16` of the networks; losses stay in fp32.
        channels_last: memory layout of images and convolutions.
        compile: compile the student, and the losses that gain by it, with torch.compile.
        deterministic: identical losses from run to run on the same device.
        log_interval: steps between log lines; the only place where the host waits for the device.
        save_interval: steps between checkpoints besides the one after every epoch; 0 for none.
        panels: write image panels to TensorBoard at every evaluation.
        pseudo_images: unlabeled images that have masks all the same, on which the pseudo-labels are measured at every
            evaluation while training; 0 measures none.
        resume: run directory or checkpoint to continue from (everything).
        init: checkpoint whose weights only are taken.
        on_nonfinite: `stop` before the optimizer step, or `skip` that step and count it.
        dry_run: two steps of the heaviest phase, a forecast, nothing left behind.
        max_steps: end (saved, resumable) after this many steps; None runs to the end.
    """

    dir: str | None = None
    seed: Seed = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    compile: bool = False
    deterministic: bool = False
    log_interval: Count = 10
    save_interval: Natural = 0
    panels: bool = True
    pseudo_images: Natural = 0
    resume: str | None = None
    init: str | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    dry_run: bool = False
    max_steps: Count | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectConfig:
    """The published figure of a setting, with its source; the only home of the claim.

    Attributes:
        miou: mean IoU in percent; None where none was published.
        tolerance: band in points for a full training run.
        source: where the figure stands.
    """

    miou: Percent | None = None
    tolerance: NonNegative = 1.0
    source: str = "none published"


class ProjectConfig(Protocol):
    """What the code that all projects share reads of their configurations."""

    @property
    def data(self) -> DataConfig:
        """Images and their cutting."""

    @property
    def optim(self) -> OptimConfig:
        """Schedule and batch."""

    @property
    def eval(self) -> EvalConfig:
        """Protocols and list."""

    @property
    def run(self) -> RunConfig:
        """Place, device, precision, logging."""

    @property
    def expect(self) -> ExpectConfig:
        """The published figure."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Labeled images per process and forward, and forwards per optimizer step."""

    per_forward: int
    accumulate: int


def plan_batch(optim: OptimConfig, world_size: int) -> BatchPlan:
    """Divide the global batch over processes and accumulation steps.

    Raises:
        UserError: if the global batch cannot be divided evenly.
    """
    if optim.batch_size % world_size:
        raise UserError(
            f"optim.batch_size={optim.batch_size}: cannot be shared by {world_size} processes; "
            f"use a multiple of {world_size} or another number of processes"
        )
    share = optim.batch_size // world_size
    per_forward = min(optim.device_batch or share, share)
    if share % per_forward:
        raise UserError(
            f"optim.device_batch={per_forward}: does not divide the {share} labeled images of each process; "
            f"use a divisor of {share}"
        )
    return BatchPlan(per_forward, share // per_forward)


def read_config(path: Path) -> dict[str, Any]:
    """The sections of a YAML file, over those of its optional one-level `base:`; `UserError` if unreadable."""
    tree = _read_yaml(path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    parent = _read_yaml(path.parent / str(base))
    if "base" in parent:
        raise UserError(
            f"{path.parent / str(base)}: a base file cannot have a base itself; put the values here"
        )
    return _merge(parent, tree)


def load_config(
    cls: type[T], path: str | Path, overrides: Sequence[str] = (), read: ReadConfig = read_config
) -> T:
    """Read a YAML file and `section.key=value` overrides into `cls`; `read` may refuse files of other programs.

    Raises:
        UserError: unreadable file, unknown or missing key, wrong type, value out of range; one line that names
            the file or the override, the dotted key and the accepted values.
    """
    return from_tree(cls, read(Path(path)), overrides, str(path))


def from_tree(
    cls: type[T], tree: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "settings"
) -> T:
    """As `load_config`, with the content of the file as a nested mapping; `where` begins the messages.

    Raises:
        UserError: as for `load_config`.
    """
    for override in overrides:
        tree = _merge(tree, _parse_override(cls, override))
    try:
        return build(cls, tree)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def build(cls: type[T], tree: object, where: str = "") -> T:
    """Turn a plain nested mapping into the dataclass `cls`; `where` it stands begins its keys, such as `data.`.

    Raises:
        ValueError: with the dotted key, the value and what is accepted.
    """
    if not isinstance(tree, Mapping):
        raise ValueError(f"'{where.rstrip('.')}' is {tree!r}; expected a section with keys")
    hints = get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in tree:
        if key not in fields:
            raise ValueError(f"unknown key '{where}{key}'{_suggest(str(key), fields, where)}")
    values = {}
    for name, spec in fields.items():
        if name in tree:
            values[name] = _convert(hints[name], tree[name], f"{where}{name}")
            if wanted := _wanted(hints[name], values[name]):
                wrong = f"'{name}' is {values[name]!r}; expected {wanted}"
                raise ValueError(f"{where.rstrip('.')}: {wrong}" if where else wrong)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ValueError(f"missing key '{where}{name}'; add it")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where.rstrip('.')}: {error}" if where else str(error)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries and lists of a configuration, ready for YAML or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved tree as YAML; the file is itself a valid configuration."""
    Path(path).write_text(dump(config), encoding="utf-8")


def dump(config: Any) -> str:
    """YAML text of the resolved tree."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=110)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (plain YAML lets the last one win silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below, with its place
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such configuration file; the project's are in its folder 'configs'"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a YAML file") from None
    except BAD_YAML as error:
        raise UserError(
            f"{path}: not valid YAML ({' '.join(str(error).split())}); correct that line"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found {type(tree).__name__}")
    return tree


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _parse_override(cls: type[Any], override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or "." not in key:
        sections = ", ".join(f.name for f in dataclasses.fields(cls))
        raise UserError(
            f"'{override}': not an override; write section.key=value with a section of {sections}"
        )
    try:
        value = yaml.safe_load(text) if text else None
    except BAD_YAML:
        raise UserError(
            f"'{override}': the value is not valid YAML; quote it or use [a, b] for lists"
        ) from None
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return dict(tree)


def _suggest(key: str, fields: Mapping[str, object], where: str) -> str:
    close = difflib.get_close_matches(key, fields, n=1)
    if close:
        return f"; did you mean '{where}{close[0]}'?"
    return f"; known keys: {', '.join(fields)}"


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin = get_origin(hint)
    if origin is Annotated:
        return _convert(get_args(hint)[0], value, key)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{key}.")  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        if value is None:
            return None
        return _convert(options[0], value, key)
    if origin is Literal:
        if not any(type(value) is type(option) and value == option for option in get_args(hint)):
            raise ValueError(f"'{key}' is {value!r}; expected one of {', '.join(map(str, get_args(hint)))}")
        return value
    if hint is Any:
        return value
    if origin is tuple:
        return _convert_tuple(get_args(hint), value, key)
    return _convert_scalar(hint, value, key)


def _convert_tuple(kinds: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"'{key}' is {value!r}; expected a list")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"'{key}' has {len(value)} entries; expected {len(kinds)}")
    return tuple(
        _convert(kind, entry, f"{key}[{i}]") for i, (kind, entry) in enumerate(zip(kinds, value, strict=True))
    )


def _convert_scalar(kind: type, value: Any, key: str) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        with contextlib.suppress(ValueError, OverflowError):  # text: YAML 1.1 reads 1e-3 so
            return float(value)
    names = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}
    raise ValueError(f"'{key}' is {value!r}; expected {names[kind]}")


def _wanted(hint: Any, value: Any) -> str:
    """What `value`, of the type `hint`, should have been by its declaration; empty if it is that."""
    kind, *limits = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if get_origin(kind) in (Union, types.UnionType):
        words = "" if value is None else _wanted(get_args(kind)[0], value)
        return words and f"{words}, or null"
    if isinstance(value, tuple):
        kinds = [one for one in get_args(kind) if one is not Ellipsis]
        entries = map(_wanted, kinds * (len(value) // len(kinds)), value)
        wrong = next(filter(None, entries), "")
        if wrong or all(limit.holds(value) for limit in limits):
            return re.sub(r"^a (.*?(number|percentage))", r"\1s", wrong)
        return " and ".join(limit.words for limit in limits)
    for limit in limits:
        bounds = {name: bound for name, bound in dataclasses.asdict(limit).items() if bound is not None}
        if not all(getattr(operator, name)(value, bound) for name, bound in bounds.items()):
            return _words(bounds)
    return "a finite number" if isinstance(value, float) and not math.isfinite(value) else ""


def _words(bounds: Mapping[str, float]) -> str:
    if set(bounds) == {"ge", "le"}:
        return f"a {'percentage' if bounds['le'] == 100 else 'number'} from {bounds['ge']} to {bounds['le']}"
    if bounds == {"gt": 0}:
        return "a positive number"
    words = {"gt": "more than {}", "ge": "{} or more", "lt": "less than {}", "le": "at most {}"}
    return " and ".join(words[name].format(bound) for name, bound in bounds.items())
