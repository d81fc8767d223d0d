"""The README's walk-through for own photos, executed as it stands: 36 photos, two classes, 16 without masks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny import photo

ROOT = Path(__file__).resolve().parents[1]
FASTER = {
    "crop_size: [256, 256]": "crop_size: [48, 48]",
    "seeds: [0, 1, 2]": "seeds: [0]",
    "budget_steps: 2200": "budget_steps: 10",
    "slots: 1 ": "slots: 2 ",
    "sup_only_epochs: 10": "sup_only_epochs: 1",
    ", epochs: 40": ", epochs: 3",
    "resnet18": "resnet_tiny",
    'overrides: ["data': 'overrides: ["model.inner_planes=16", "data',
}

pytestmark = pytest.mark.smoke


def blocks(language: str) -> list[str]:
    """Code blocks of the section, with their indentation removed."""
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own photos")[1].split("\n## ")[0]
    )
    found = re.findall(rf"^   ```{language}\n(.*?)^   ```", section, flags=re.M | re.S)
    return ["\n".join(line.removeprefix("   ") for line in block.splitlines()) for block in found]


def test_walk_through(tmp_path: Path) -> None:
    data = tmp_path / "mydata"
    for part in ("img", "mask"):
        (data / part).mkdir(parents=True)
    for i in range(36):  # 12 to train with masks, 16 without, 8 to evaluate
        image, label = photo(i, 72, 80, classes=2)
        Image.fromarray(image).save(data / "img" / f"leaf{i:02d}.jpg")
        if i < 12 or i >= 28:
            Image.fromarray(label).save(data / "mask" / f"leaf{i:02d}.png")
    (data / "train.txt").write_text("".join(f"leaf{i:02d}\n" for i in range(28)))
    (data / "val.txt").write_text("".join(f"leaf{i:02d}\n" for i in range(28, 36)))

    for block in blocks("yaml"):
        name, text = re.match(r"# (\S+)\n(.*)", block, flags=re.S).groups()
        for slow, fast in FASTER.items():
            text = text.replace(slow, fast)
        text = text.replace("{root}", str(tmp_path)).replace("out: runs/", f"out: {tmp_path}/runs/")
        (tmp_path / name).write_text(text)
    (script,) = blocks("sh")
    assert "studies run" in script
    script = script.replace("projects/u2pl/", f"{ROOT}/projects/u2pl/").replace(
        "python ", f"{sys.executable} "
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    env.pop("SSS_DATA", None)
    done = subprocess.run(
        ["sh", "-eu", "-c", script],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    assert "8 labeled, 20 unlabeled" in done.stdout
    out = tmp_path / "runs" / "leaves"
    names = ("supervised_only", "u2pl", "cps_cutmix")
    results = {name: json.loads((out / name / "seed0" / "result.json").read_text()) for name in names}
    assert len({result["split_hash"] for result in results.values()}) == 1
    assert {result["steps"] for result in results.values()} == {10}
    assert 0.3 < results["u2pl"]["miou"] <= 1
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(label in page for label in ("supervised only", "U2PL", "CPS + CutMix"))
    masks = sorted((tmp_path / "masks").glob("*.png"))
    assert len(masks) == 36
    with Image.open(masks[0]) as mask:
        assert mask.size == (80, 72)
        assert set(np.unique(np.asarray(mask))) <= {0, 1}
