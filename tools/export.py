"""The network of a run as one file that needs no code of this repository, for onnxruntime or for torch alone.

    python -m tools.export --run RUN --out model.onnx
    python -m tools.export --run RUN --out model.pt2 --format torch --network student --photos FOLDER

Resizing and normalization are inside, batch and size are free, and the file names its classes, their colours and its
preprocessing. It is compared with the network on real photos before it gets its name; see docs/export.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from common.data.dataset_yaml import load_spec
from common.data.files import read_rgb, replacing
from common.distributed import Dist
from common.errors import UserError, run_main
from common.measure.evaluation import Protocol
from common.measure.inference import Forward
from common.models.deeplab import upsample
from common.numerics.losses import best_class
from common.run.checkpoint import load
from tools.bench import measure
from tools.eval_script import ScriptProject, config_with_flags, network_name, no_flags
from tools.exported import INPUT, OUTPUT, Scores, read_exported, require_library
from tools.predict_script import find_photos, read_source, value_range_of

PROJECTS = Path(__file__).resolve().parents[1] / "projects"
FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
PHOTOS = 4  # that are compared
SIZE = (2, 3, 128, 160)  # of the images that the network is traced with; no size of it stays in the model
TOLERANCE = 1e-4  # of the largest score: what the order of float32 sums may change
TIES = 1e-4  # of all pixels: so many may have two best classes that are equal within the tolerance
ROUNDS = 5  # that are timed

Uint8 = NDArray[np.uint8]
Triple = tuple[float, float, float]


class Whole(nn.Module):
    """A network for photos as they are decoded: float32 (B, 3, H, W), RGB, 0..255, to scores (B, K, H, W).

    Args:
        forward: `predict` of a network in evaluation mode: normalized images to scores of their size.
        mean: of the channels, on the scale 0..255.
        std: their standard deviation.
        size: fixed rows and columns that the network sees; None for those of the photo.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, forward: Forward, mean: Triple, std: Triple, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.network: nn.Module = forward.__self__  # type: ignore[attr-defined]  # its weights become ours
        self.scores, self.size = forward, size
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        """Scores (B, K, H, W) of photos (B, 3, H, W)."""
        x = image
        if self.size is not None:  # as `EvalTransform` does
            x = nn.functional.interpolate(x, size=self.size, mode="bilinear", align_corners=False)
        return upsample(self.scores((x - self.mean) / self.std), image.shape[-2:])


@dataclass
class Difference:
    """How a model differs from the network that it was made of.

    Attributes:
        largest: of all scores.
        scale: largest score of the network.
        pixels: compared.
        other: pixels of another class, in all of which the network's two best scores are equal within the tolerance
            as long as `largest` is within it.
    """

    largest: float = 0.0
    scale: float = 0.0
    pixels: int = 0
    other: int = 0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Count the scores (B, K, H, W) of the network and of the model."""
        self.largest = float(np.maximum(self.largest, float((ours - theirs).abs().max())))  # NaN stays NaN
        self.scale = max(self.scale, float(ours.abs().max()))
        self.pixels += ours[:, 0].numel()
        self.other += int((best_class(ours) != best_class(theirs)).sum())

    @property
    def text(self) -> str:
        """In words."""
        masks = "identical masks"
        if self.other:
            masks = f"{self.other} of {self.pixels} pixels differ in class, where two classes score the same"
        return f"largest difference of scores {self.largest:.1e} (of up to {self.scale:.3g}), {masks}"

    def require_small(self, where: Path) -> None:
        """Refuse a model that does not do what the network does; `UserError`."""
        close = self.largest <= TOLERANCE * self.scale  # False also for NaN
        if not close or self.other > TIES * self.pixels:
            raise UserError(
                f"{where}: not written, for the model differs from the network: scores by {self.largest:.2e} of "
                f"{self.scale:.3g}, the class of {self.other} of {self.pixels} pixels; try --format "
                f"{'onnx' if where.suffix == FORMATS['torch'] else 'torch'}, or another version of torch"
            )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m tools.export", description="Write the network of a run for other programs."
    )
    source = result.add_mutually_exclusive_group(required=True)
    words = "run directory; its best.pt, without one its last.pt, is taken"
    source.add_argument("--run", type=Path, help=words)
    source.add_argument("--checkpoint", type=Path, help="checkpoint, also a converted one")
    result.add_argument("--out", type=Path, required=True, help="file to write")
    result.add_argument("--format", choices=tuple(FORMATS), help="default: by the ending of --out")
    result.add_argument("--network", help="default: the one that results are reported for")
    words = "folder, image or list to compare on; default: the evaluation list of the run's dataset"
    result.add_argument("--photos", type=Path, help=words)
    result.add_argument("--bench", action="store_true", help="also time both on one CPU thread")
    words = "changes to the checkpoint's configuration, such as eval.protocol=whole_image"
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help=words)
    return result


def main(argv: Sequence[str]) -> int:
    """Export what the command line names."""
    args = parser().parse_intermixed_args(argv)
    kind = kind_of(args.out, args.format)
    project = project_of(args.run, args.checkpoint)
    saved, where = read_source(project, args.run, args.checkpoint)
    cfg = config_with_flags(project.config, saved["config"], args, no_flags, where)
    role = network_name(project, cfg, args.network)
    if role not in project.networks:
        raise UserError(f"--network {role}: unknown; use one of {', '.join(project.networks)}")
    network = Whole(
        project.predictor(cfg, saved, role, torch.device("cpu"), where),
        cfg.data.mean, cfg.data.std, cfg.data.resize,
    )  # fmt: skip
    photos = photos_to_compare(cfg, args.photos, args.out)
    facts = describe(project, cfg, saved, role)
    with replacing(args.out) as partial:
        draft = partial.with_suffix(FORMATS[kind])  # by which it is read
        try:
            write(network, facts, draft, kind)
            found = difference(network, written(draft), photos)
            found.require_small(args.out)
            draft.replace(partial)
        finally:
            draft.unlink(missing_ok=True)
    sys.stdout.write(
        f"{args.out}: {project.name}, {role}, {args.out.stat().st_size / 2**20:.1f} MiB; on {len(photos)} photos "
        f"{found.text}\n"
    )
    if args.bench:
        bench(network, args.out, photos[0])
    return 0


def kind_of(out: Path, asked: str | None) -> str:
    """The format: the one asked for, which must fit the file's ending.

    Raises:
        UserError: it does not, or the folder is not there.
    """
    kinds = {ending: kind for kind, ending in FORMATS.items()}
    if out.suffix not in kinds or asked not in (None, kinds[out.suffix]):
        wanted = FORMATS[asked] if asked else " or ".join(kinds)
        raise UserError(f"--out {out}: give a name that ends in {wanted}")
    if not out.resolve().parent.is_dir():
        raise UserError(f"--out {out}: no folder {out.parent}; make it first")
    if kinds[out.suffix] == "onnx":
        for library in ("onnx", "onnxscript", "onnxruntime"):
            require_library(library)
    return kinds[out.suffix]


def project_of(run: Path | None, checkpoint: Path | None) -> ScriptProject:
    """The project that wrote a run or a checkpoint.

    Raises:
        UserError: no checkpoint there, or one of no project of this repository.
    """
    files = [checkpoint] if run is None else sorted(run.glob("*.pt"))
    if not files or files[0] is None:
        raise UserError(f"--run {run}: holds no checkpoint; give the folder of a run")
    name = load(files[0]).get("project")
    known = sorted(path.parent.name for path in PROJECTS.glob("*/predict.py"))
    if name not in known:
        raise UserError(
            f"{files[0]}: made by project '{name or 'unknown'}'; expected one of {', '.join(known)}; convert a file "
            "of the authors first: python convert.py FILE --config CONFIG --out FILE"
        )
    project: ScriptProject = importlib.import_module(f"projects.{name}.predict").PROJECT
    return project


def photos_to_compare(cfg: Any, source: Path | None, out: Path) -> list[Uint8]:
    """Up to `PHOTOS` photos, evenly spread over what is named or the evaluation list.

    Raises:
        UserError: there are none.
    """
    if source is not None:
        files = [photo.source for photo in find_photos(source, out, cfg)[0]]
        return [read_rgb(files[i * len(files) // PHOTOS]) for i in range(min(PHOTOS, len(files)))]
    try:
        spec = load_spec(cfg.data.dataset, cfg.data.root)
        items = spec.read_list(cfg.eval.list, labels=False)
        chosen = [items[i * len(items) // PHOTOS] for i in range(min(PHOTOS, len(items)))]
        return [spec.load_image(item) for item in chosen]
    except UserError as error:
        what = str(error).split(";", maxsplit=1)[0]
        raise UserError(
            f"the photos to compare on are not there ({what}); give some with --photos FOLDER"
        ) from None


def describe(project: ScriptProject, cfg: Any, saved: Mapping[str, Any], role: str) -> dict[str, str]:
    """What the model says about itself, JSON by name; see `tools.exported.FACTS`.

    A paper's own protocol, and windows of photos that are resized first, are left to its `predict.py`: the model then
    takes whole photos.
    """
    how = project.protocol(cfg, "script")
    if type(how) is not Protocol or cfg.data.resize is not None:
        how = Protocol()
    facts = {
        "project": project.name,
        "network": role,
        "step": saved["step"],
        "input": f"{INPUT}: float32 (batch, 3, height, width), RGB, 0 to 255; resizing and normalization are inside",
        "output": f"{OUTPUT}: float32 (batch, class, height, width); a pixel is of the class with the highest score",
        "classes": saved["classes"],
        "palette": saved["palette"],
        "mean": cfg.data.mean,
        "std": cfg.data.std,
        "resize": cfg.data.resize,
        "value_range": value_range_of(saved),
        "protocol": {field.name: asdict(how)[field.name] for field in fields(Protocol)},
    }
    return {name: json.dumps(value) for name, value in facts.items()}


def write(network: Whole, facts: Mapping[str, str], path: Path, kind: str) -> None:
    """Trace the network with free batch and size, and write it with its facts.

    Raises:
        UserError: torch cannot express the network in this format, or the file cannot be written.
    """
    free = torch.export.Dim.DYNAMIC
    try:
        with quiet(), short_paddings():
            program = torch.export.export(
                network, (torch.zeros(SIZE),), dynamic_shapes=({0: free, 2: free, 3: free},)
            )
            if kind == "torch":
                torch.export.save(program, path, extra_files=dict(facts))
                return
            model = torch.onnx.export(program, input_names=[INPUT], output_names=[OUTPUT], dynamo=True)
            assert model is not None
            model.model.metadata_props.update(facts)
            model.save(path)
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot be written ({error.strerror}); check space and permissions"
        ) from None
    except Exception as error:  # torch's exporters have no common error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{path.name}: this network cannot be exported as {kind} ({lines[0][:200]}); try --format "
            f"{'torch' if kind == 'onnx' else 'onnx'}"
        ) from error


def written(path: Path) -> Scores:
    """Scores (B, K, H, W) of photos by a model that was just written, an ONNX one on as many threads as torch."""
    if path.suffix == FORMATS["onnx"]:
        return read_exported(path, torch.get_num_threads()).scores
    scores: Scores = torch.export.load(path).module()  # not for files of others: they may hold code
    return scores


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Torch's exporters talk much of their own progress."""
    former = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(former)


@contextlib.contextmanager
def short_paddings() -> Iterator[None]:
    """The paddings of timm's `same` convolutions at stride 2, in terms that torch simplifies in seconds."""
    convolutions = sys.modules.get("timm.layers.conv2d_same")
    if convolutions is None:
        yield
        return

    def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
        spans = [(size - 1) * step + 1 for size, step in zip(kernel, dilation, strict=True)]
        if tuple(stride) != (2, 2) or any(span < 3 or span % 2 == 0 for span in spans):
            return theirs(x, kernel, stride, dilation)
        (above, left), (height, width) = ((span - 3) // 2 for span in spans), x.shape[-2:]
        return F.pad(x, (left + width % 2, left + 1, above + height % 2, above + 1))

    theirs = convolutions.pad_same
    with mock.patch.object(convolutions, "pad_same", pad_same):
        yield


def as_input(photos: Sequence[Uint8]) -> Tensor:
    """Photos (H, W, 3) of one size as the model takes them, (B, 3, H, W)."""
    return torch.from_numpy(np.stack(photos).transpose(0, 3, 1, 2).copy()).float()


@torch.inference_mode()
def difference(network: Whole, scores: Scores, photos: Sequence[Uint8]) -> Difference:
    """How the model differs on the photos, on an odd part of each, and on all of them in a batch."""
    found = Difference()
    height, width = (min(photo.shape[side] for photo in photos) for side in (0, 1))
    inputs = [as_input([photo]) for photo in photos]
    inputs += [x[..., : 2 * x.shape[-2] // 3 | 1, : x.shape[-1] // 2 | 1].contiguous() for x in inputs]
    inputs.append(as_input([photo[:height, :width] for photo in photos]))
    for x in inputs:
        found.add(network(x), scores(x))
    return found


def bench(network: Whole, path: Path, photo: Uint8) -> None:
    """Print the time of one photo on one CPU thread, of the network and of the model in turns."""
    torch.set_num_threads(1)
    scores, x = written(path), as_input([photo])
    with torch.inference_mode():
        seconds = measure({"PyTorch": lambda: network(x), path.suffix: lambda: scores(x)}, ROUNDS, Dist())
    height, width = photo.shape[:2]
    sys.stdout.write(f"one photo of {width}x{height} on one CPU thread:\n")
    for name, value in seconds.items():
        sys.stdout.write(f"  {name}: {1000 * value:.0f} ms, {1 / value:.2f} images/s\n")


if __name__ == "__main__":
    run_main(main)
