"""The body of `predict.py`: the names of the PaddleSeg port choose the form in which it writes results."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from common.config import load_config, to_dict
from projects.cps.compat import flags
from projects.cps.compat.pictures import LEGACY_VOC_PALETTE, port_overlay, port_palette
from projects.cps.config import Config
from projects.cps.eval import PROJECT
from tools import predict_script
from tools.pictures import save_palette_png, save_picture
from tools.predict_script import Done, Palette, Photo, Write

PORT_NAMES = {"--config", "--model_path", "--image_path", "--save_dir", "--custom_color"}
OUT_NAMES = {"--out", "--save_dir"}
PORT_OUT = "output/result"


def main(argv: Sequence[str]) -> int:
    """Predict what the command line names; 1 if any photo was skipped."""
    names = {word.partition("=")[0] for word in argv}
    port = bool(names & PORT_NAMES)
    if port and not names & OUT_NAMES:
        argv = [*argv, "--save_dir", PORT_OUT]
    args = parser().parse_intermixed_args(argv)
    flags.refuse_port_weights(args.checkpoint)
    colors = port_palette(args.custom_color)  # before anything is read
    writer = partial(port_files, colors=colors) if port else own_files
    return predict_script.main(PROJECT, argv, parser(), chosen_flags, writer)


def parser() -> argparse.ArgumentParser:
    """The command line of this project and of the port."""
    also = {"--checkpoint": ("--model_path",), "--input": ("--image_path",), "--out": ("--save_dir",)}
    result = predict_script.parser(PROJECT, also)
    result.allow_abbrev = False  # the names decide on the form of the results
    result.add_argument("--config", type=Path, help="YAML file to use instead of the checkpoint's own values")
    flags.add_device(result)
    flags.add_protocol(result, "--aug_pred")
    words = "red, green and blue of the first classes, one after the other (results in the port's form)"
    result.add_argument("--custom_color", type=int, nargs="+", default=[], metavar="RGB", help=words)
    words = "Pascal VOC in the colours of the original's eval.py, one class too far"
    result.add_argument("--legacy_palette", action="store_true", help=words)
    flags.add_opts(result)
    return result


def chosen_flags(args: argparse.Namespace, cfg: Config) -> list[str]:
    """Overrides for `--config` (all of its values), the port's flags, and `--opts` last."""
    values: dict[str, object] = {}
    if args.config is not None:
        cfg = load_config(Config, args.config, [*args.overrides, *args.opts], flags.read_own)
        for section, entries in to_dict(cfg).items():
            values |= {f"{section}.{key}": value for key, value in entries.items()}
    return [*flags.overrides_of(values), *flags.protocol_overrides(args, cfg), *args.opts]


def own_files(args: argparse.Namespace, palette: Palette) -> tuple[Palette, Write]:
    """Writes results in this project's form."""
    return predict_script.own_files(args, LEGACY_VOC_PALETTE if args.legacy_palette else palette)


def port_files(args: argparse.Namespace, palette: Palette, colors: Palette) -> tuple[Palette, Write]:
    """Writes results in the port's form, in `colors`."""
    del palette
    out: Path = args.out

    def write(done: Done) -> Done:
        if done.image is None or done.pred is None:
            return done
        target = done.photo.target
        added = target.with_name(added_name(done.photo))
        save_picture(out / "added_prediction" / added, port_overlay(done.image, done.pred, colors))
        pseudo = target.with_name(f"{target.name}.png")
        save_palette_png(out / "pseudo_color_prediction" / pseudo, done.pred, colors)
        return Done(done.photo)

    return colors, write


def added_name(photo: Photo) -> str:
    """The photo's own file name, unless photos of different folders would get it.

    Photos that differ in their endings only have results of different names already.
    """
    source, chosen = photo.source, photo.target.name
    if chosen in (source.stem, f"{source.stem}_{source.suffix.lstrip('.')}"):
        return source.name
    return chosen + source.suffix
