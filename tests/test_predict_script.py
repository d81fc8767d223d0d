"""Prediction of photos: what is found, what is written under which name, what is skipped."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.dataset_yaml import load_spec
from common.errors import UserError
from common.run.checkpoint import save
from tests.fake_project import ROLES, epochs, fake_checkpoint, fake_config, fake_network, fake_project
from tests.predictions import mask, written
from tests.tiny import write_dataset
from tools import predict_script
from tools.eval_script import ScriptProject


@pytest.fixture
def contents(tmp_path: Path) -> dict[str, Any]:
    """A checkpoint whose dataset is nowhere."""
    dataset = write_dataset(tmp_path / "farm")
    saved = fake_checkpoint(fake_config(dataset), load_spec(str(dataset)))
    saved["config"]["data"]["dataset"] = "/nowhere/dataset.yaml"
    return saved


@pytest.fixture
def checkpoint(contents: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "run" / "best.pt"
    save(path, contents)
    return path


@pytest.fixture
def project(tmp_path: Path) -> ScriptProject:
    return fake_project(tmp_path)


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (37, 50), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size[::-1]).convert(mode).save(path)
    return path


@pytest.fixture
def predicted(project: ScriptProject, checkpoint: Path, tmp_path: Path) -> Callable[..., int]:
    def run(source: Path, *arguments: str, out: Path = tmp_path / "out") -> int:
        command = ["--checkpoint", str(checkpoint), "--input", str(source), "--out", str(out), *arguments]
        return predict_script.main(project, command)

    return run


def expected(contents: dict[str, Any], path: Path, *roles: str) -> np.ndarray[Any, Any]:
    """Class ids by the definition: normalized photo in, highest mean score out."""
    data = contents["config"]["data"]
    with Image.open(path) as file:
        pixels = torch.from_numpy(np.array(file.convert("RGB"))).float()
    x = ((pixels - torch.tensor(data["mean"])) / torch.tensor(data["std"])).permute(2, 0, 1)[None]
    scores = []
    for role in roles:
        network = fake_network(0, len(contents["classes"]))
        network.load_state_dict(contents["networks"][role])
        scores.append(network(x).detach())
    return torch.stack(scores).mean(dim=0)[0].argmax(dim=0).numpy()


@pytest.mark.parametrize(
    ("arguments", "roles"),
    [((), ROLES[:1]), (("--network", "branch2"), ROLES[1:]), (("--network", "both"), ROLES)],
)
def test_mask_holds_the_best_class_of_the_predictor(
    predicted: Callable[..., int], contents: dict[str, Any], tmp_path: Path, arguments: tuple[str, ...],
    roles: tuple[str, ...],
) -> None:  # fmt: skip
    source = photo(tmp_path / "photo.png", seed=3)
    assert predicted(source, *arguments) == 0
    assert written(tmp_path / "out") == ["photo.png", "photo_overlay.jpg"]
    ids = mask(tmp_path / "out" / "photo.png")
    assert len(np.unique(ids)) > 1
    assert (ids == expected(contents, source, *roles)).mean() > 0.999
    with Image.open(tmp_path / "out" / "photo.png") as file:
        np.testing.assert_array_equal(np.array(file.convert("RGB")), np.array(contents["palette"])[ids])


def test_folder_keeps_its_structure_and_ignores_other_files(
    predicted: Callable[..., int], tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    for i, name in enumerate(("a.jpg", "day/a.JPG", "day/noon/b.c.jpeg", ".hidden.png", ".cache/d.png")):
        photo(folder / name, seed=i, size=(20 + i, 24))
    photo(folder / "grey.png", mode="L")
    photo(folder / "clear.png", mode="RGBA")
    (folder / "notes.txt").write_text("no photo")
    assert predicted(folder) == 0
    names = ("a", "clear", "day/a", "day/noon/b.c", "grey")
    assert written(tmp_path / "out") == sorted(
        f"{name}{end}" for name in names for end in (".png", "_overlay.jpg")
    )
    assert mask(tmp_path / "out" / "day" / "a.png").shape == (21, 24)


def test_unreadable_photos_are_skipped_and_listed(
    predicted: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    for name in ("a.jpg", "z.jpg"):
        photo(folder / name)
    cut = photo(folder / "cut.jpg", size=(200, 200))
    cut.write_bytes(cut.read_bytes()[:700])
    (folder / "empty.png").touch()
    assert predicted(folder) == 1
    assert written(tmp_path / "out") == ["a.png", "a_overlay.jpg", "z.png", "z_overlay.jpg"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'out'}: 2 of 4 photos predicted"
    assert [line.split(":")[:2] for line in lines[1:]] == [
        ["skipped", f" {folder / name}"] for name in ("cut.jpg", "empty.png")
    ]


def test_clashing_names_get_their_ending(predicted: Callable[..., int], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name in ("a.jpg", "a.png", "a_png.jpg", "b.jpg"):
        photo(folder / name)
    assert predicted(folder) == 0
    masks = [name for name in written(tmp_path / "out") if name.endswith(".png")]
    assert masks == ["a_jpg.png", "a_png.png", "a_png_2.png", "b.png"]


def test_targets_are_distinct_whatever_the_names() -> None:
    names = ["a.jpg", "A.jpg", "a.png", "a_jpg.jpg", "a_jpg.png", "a_jpg_2.jpg", "sub/a.jpg", "a_png.tif"]
    targets = predict_script.distinct_targets([Path(name) for name in names])
    folded = [str(target).casefold() for target in targets]
    assert len(set(folded)) == len(names)
    assert targets[-3:] == [Path("a_jpg_2"), Path("sub/a"), Path("a_png")]
    assert [target.parent for target in targets] == [Path(name).parent for name in names]


def test_earlier_results_inside_the_folder_are_no_photos(
    predicted: Callable[..., int], tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    photo(folder / "a.jpg")
    for _ in range(2):
        assert predicted(folder, out=folder / "masks") == 0
        assert written(folder / "masks") == ["a.png", "a_overlay.jpg"]


def test_list_of_photos(
    predicted: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo(tmp_path / "lists" / "sub" / "beside.jpg")
    photo(tmp_path / "work" / "here.jpg")
    photo(tmp_path / "outside.jpg")
    absolute = photo(tmp_path / "far" / "away.png")
    names = tmp_path / "lists" / "photos.txt"
    names.write_text(f"sub/beside.jpg\n\nhere.jpg\n../outside.jpg\n{absolute}\ngone.jpg\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "work")
    assert predicted(names) == 1  # gone.jpg
    masks = [name for name in written(tmp_path / "out") if name.endswith(".png")]
    assert masks == ["away.png", "here.png", "outside.png", "sub/beside.png"]


@pytest.mark.parametrize("at_hand", [True, False])
def test_a_list_as_training_reads_it(
    predicted: Callable[..., int], contents: dict[str, Any], checkpoint: Path, tmp_path: Path, at_hand: bool
) -> None:
    farm, folder = tmp_path / "farm", tmp_path / "photos"
    for name in ("leaf (1).jpg", "IMG 007.jpg", "cafe\u0301.png", "sub/a.jpg"):
        photo(folder / name)
    (folder / "mask.png").write_bytes(b"")
    lines = [
        "leaf (1).jpg",
        "IMG 007.jpg\t",
        "caf\u00e9.png",
        "sub\\a.jpg mask.png",
        "img/p003.jpg mask/p003.png",
        "p004",
    ]
    (folder / "list.txt").write_bytes("\ufeff".encode() + "\r\n".join([*lines, ""]).encode())
    if at_hand:
        contents["config"]["data"]["dataset"] = str(farm / "dataset.yaml")
        save(checkpoint, contents)
    masks = ["IMG 007.png", "caf\u00e9.png", "leaf (1).png", "sub/a.png"]
    assert predicted(folder / "list.txt") == (0 if at_hand else 1)  # the dataset's own ids, where it is there
    found = [name for name in written(tmp_path / "out") if name.endswith(".png")]
    assert sorted(found) == sorted([*masks, "img/p003.png", "p004.png"] if at_hand else masks)


def test_what_a_folder_holds_is_predicted_or_said_to_be_left_out(
    predicted: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    for name in (
        "a.jpg",
        "day/b.png",
        "phone.jfif",
        "scan.gif",
        "IMG.JPG",
        "deep.jp2",
        "elsewhere/../.hidden.png",
    ):
        photo(folder / name.replace("elsewhere/../", ""))
    photo(tmp_path / "elsewhere/linked.jpg")
    (folder / "album").symlink_to(tmp_path / "elsewhere")
    (folder / "one.jpg").symlink_to(tmp_path / "elsewhere/linked.jpg")
    (folder / "day/round").symlink_to(folder)
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for name in ("x.heic", "y.heic", "notes.txt", "README"):
        (folder / name).write_bytes(b"x")
    (folder / "masks").mkdir()
    for name in ("a_mask.png", "masks/b.png", "drawing.png"):  # the last one is of no other image
        Image.new("L", (40, 30), 1).save(folder / name)
    assert predicted(folder) == 0
    names = ("IMG", "a", "album/linked", "day/b", "deep", "drawing", "one", "phone", "scan")
    assert [name for name in written(tmp_path / "out") if name.endswith(".png")] == [
        f"{n}.png" for n in names
    ]
    said = capsys.readouterr().out
    for line in (
        "9 of 9 photos predicted",
        "left out: 2 masks of other images",
        "left out: 2 files ending in '.heic', which are no images that can be read here",
        "left out: 1 files ending in '.txt', which are no images that can be read here",
        "left out: 1 files ending in '', which are no images that can be read here",
        "left out: 1 links to a folder that is read anyway",
        "left out: 1 links that lead nowhere",
        "left out: 1 hidden files or folders",
    ):
        assert line in said
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x.heic").touch()
    with pytest.raises(UserError, match=r"holds no image \(1 files ending in '.heic'"):
        predicted(tmp_path / "other")


def test_masks_are_upright_as_viewers_show_the_photo(
    predicted: Callable[..., int],
    contents: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, exif = photo(tmp_path / "photos/a.png", size=(37, 50)), Image.Exif()
    for tag, turns in ((6, -1), (3, 2), (8, 1)):
        exif[0x0112] = tag
        with Image.open(source) as file:
            file.save(tmp_path / "photos" / f"tag{tag}.png", exif=exif)
            Image.fromarray(np.rot90(np.array(file), turns)).save(tmp_path / f"upright{tag}.png")
    assert predicted(tmp_path / "photos") == 0
    said = capsys.readouterr().out
    for tag in (3, 6, 8):
        truth = expected(contents, tmp_path / f"upright{tag}.png", ROLES[0])
        assert mask(tmp_path / f"out/tag{tag}.png").shape == truth.shape
        assert (mask(tmp_path / f"out/tag{tag}.png") == truth).mean() > 0.999
        assert f"note: 1 photos: turned upright (EXIF orientation {tag})" in said


def test_photos_of_many_bits_have_the_range_of_the_training(
    predicted: Callable[..., int], contents: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    grey = np.random.default_rng(1).integers(0, 256, (37, 50), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "plain.png")
    for low, high in ((0, 65535), (0, 4095), (1000, 3000)):
        deep = np.rint(low + grey / 255 * (high - low)).astype(np.uint16)
        Image.fromarray(deep).save(tmp_path / "deep.png")
        own = None if high == 65535 else [low, high]
        save(checkpoint, contents | {"truth": {"reading": [True, own]}})
        assert predicted(tmp_path / "deep.png") == 0
        truth = expected(contents, tmp_path / "plain.png", ROLES[0])
        assert (mask(tmp_path / "out/deep.png") == truth).mean() > 0.99


def test_a_legend_lies_beside_the_predictions(
    predicted: Callable[..., int], contents: dict[str, Any], tmp_path: Path
) -> None:
    contents["classes"][0] = 'wide, "green" meadow'
    save(tmp_path / "run/best.pt", contents)
    for i in range(5):
        photo(tmp_path / "photos" / f"{i}.png", seed=i)
    assert predicted(tmp_path / "photos") == 0
    with (tmp_path / "out/classes.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ids = np.concatenate([mask(path).ravel() for path in (tmp_path / "out").glob("*.png")])
    shares = np.bincount(ids, minlength=3) / len(ids)
    for k, row in enumerate(rows):
        assert (row["number"], row["name"]) == (str(k), contents["classes"][k])
        assert row["colour"] == "#{:02x}{:02x}{:02x}".format(*contents["palette"][k])
        assert float(row["share"]) == pytest.approx(shares[k], abs=1e-6)


def test_photos_are_resized_as_in_training_and_masks_keep_the_photos_size(
    predicted: Callable[..., int], tmp_path: Path
) -> None:
    source = photo(tmp_path / "photo.png", size=(90, 41))
    assert predicted(source, "data.resize=[32, 48]") == 0
    assert mask(tmp_path / "out" / "photo.png").shape == (90, 41)


def test_photos_too_large_for_the_device_are_skipped(
    predicted: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    original = predict_script.score_photo

    def limited(image: Any, *others: Any) -> torch.Tensor:
        if image.shape[0] > 50:
            raise torch.OutOfMemoryError("too large")
        return original(image, *others)

    monkeypatch.setattr(predict_script, "score_photo", limited)
    photo(tmp_path / "photos" / "large.png", size=(60, 60))
    photo(tmp_path / "photos" / "small.png", size=(40, 40))
    assert predicted(tmp_path / "photos") == 1
    assert "large.png: 60x60 pixels do not fit" in capsys.readouterr().out
    assert written(tmp_path / "out") == ["small.png", "small_overlay.jpg"]


def test_progress_is_reported_where_there_is_no_terminal(
    predicted: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setattr(predict_script, "REPORT_EVERY", 5)
    for i in range(12):
        photo(tmp_path / "photos" / f"{i}.png", size=(8, 8))
    assert predicted(tmp_path / "photos") == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["5 of 12 photos", "10 of 12 photos"]


def test_a_stopped_prediction_goes_on(
    predicted: Callable[..., int], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    for i in range(30):
        photo(folder / f"p{i:02d}.png", i)
    (folder / "damaged.png").write_bytes(b"\x89PNG no picture")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert predicted(folder, "--confidence", out=whole) == 1
    assert not list(whole.glob(".*"))
    original, scored = predict_script.predict_photo, list[str]()

    def stop_at(number: int) -> Callable[..., Any]:
        def predict(done: Any, *arguments: Any) -> Any:
            if len(scored) == number:
                raise KeyboardInterrupt
            scored.append(done.photo.source.name)
            return original(done, *arguments)

        return predict

    monkeypatch.setattr(predict_script, "predict_photo", stop_at(20))
    with pytest.raises(KeyboardInterrupt):
        predicted(folder, "--confidence", out=stopped)
    for path in stopped.glob("p*"):  # nothing half
        assert path.read_bytes() == (whole / path.name).read_bytes()
    assert not (stopped / "photos.csv").exists()
    first = {path.stem for path in stopped.glob("p??.png")}
    assert 5 < len(first) < 21
    with (stopped / ".unfinished0.jsonl").open("a") as file:
        file.write('{"p29": {"pix')  # killed while it wrote
    photo(folder / "p00.png", 0)  # written anew since

    scored.clear()
    monkeypatch.setattr(predict_script, "predict_photo", stop_at(-1))
    assert predicted(folder, "--confidence", out=stopped) == 1
    assert "p00.png" in scored
    assert 10 < len(scored) < 31
    assert {path.name for path in stopped.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        assert path.read_bytes() == (stopped / path.name).read_bytes(), path.name

    scored.clear()
    monkeypatch.setattr(predict_script, "predict_photo", stop_at(20))
    with pytest.raises(KeyboardInterrupt):
        predicted(folder, "--confidence", out=stopped)
    scored.clear()
    monkeypatch.setattr(predict_script, "predict_photo", stop_at(-1))
    predicted(folder, out=stopped)  # another command begins anew
    assert len(scored) == 31


def test_a_run_gives_its_first_checkpoint_that_exists(
    contents: dict[str, Any], checkpoint: Path, project: ScriptProject, tmp_path: Path
) -> None:
    source = photo(tmp_path / "photo.png", seed=6)
    swapped = contents | {
        "networks": dict(zip(ROLES, map(contents["networks"].get, ROLES[::-1]), strict=True))
    }
    run = checkpoint.parent

    def predicted(project: ScriptProject) -> np.ndarray[Any, Any]:
        command = ["--run", str(run), "--input", str(source), "--out", str(tmp_path / "out")]
        assert predict_script.main(project, command) == 0
        return mask(tmp_path / "out" / "photo.png")

    first, second = (expected(contents, source, role) for role in ROLES)
    assert (first != second).any()
    save(run / "last.pt", swapped)
    np.testing.assert_array_equal(predicted(project), first)
    checkpoint.unlink()
    np.testing.assert_array_equal(predicted(project), second)
    save(run / "epoch-3.pt", contents)
    save(run / "epoch-4.pt", swapped)
    every = fake_project(tmp_path, checkpoints=epochs)
    np.testing.assert_array_equal(predicted(every), second)
    (run / "epoch-4.pt").unlink()
    np.testing.assert_array_equal(predicted(every), first)
    (run / "epoch-3.pt").unlink()
    with pytest.raises(UserError, match=r"run: holds no checkpoint; give the folder of a run"):
        predicted(every)


def test_flags_and_second_names_of_a_project(
    checkpoint: Path, project: ScriptProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = photo(tmp_path / "photo.png", size=(48, 64))
    seen = []
    monkeypatch.setattr(
        predict_script,
        "score_photo",
        lambda image, forward, how, *rest: seen.append(how) or torch.zeros(1, 3, 48, 64),
    )
    arguments = predict_script.parser(project, {"--input": ["--image_path"], "--out": ["--save_dir"]})
    arguments.add_argument("--is_slide", action="store_true")

    def flags(args: Any, cfg: Any) -> list[str]:
        side = cfg.data.crop_size[0] // 2
        return ["eval.protocol=sliding_window", f"eval.crop_size=[{side}, {side}]"] if args.is_slide else []

    command = [
        "--checkpoint",
        str(checkpoint),
        "--image_path",
        str(source),
        "--save_dir",
        str(tmp_path / "out"),
    ]
    assert predict_script.main(project, command, arguments, flags) == 0
    assert predict_script.main(project, [*command, "--is_slide"], arguments, flags) == 0
    last = [*command, "--is_slide", "eval.crop_size=[8, 8]"]
    assert predict_script.main(project, last, arguments, flags) == 0
    found = [(how.kind, how.crop_size) for how in seen]
    assert found == [("whole_image", None), ("sliding_window", (16, 16)), ("sliding_window", (8, 8))]


def test_mistakes_are_named(
    predicted: Callable[..., int], contents: dict[str, Any], checkpoint: Path, project: ScriptProject, tmp_path: Path
) -> None:  # fmt: skip
    source = photo(tmp_path / "photos" / "a.jpg")
    (tmp_path / "none").mkdir()
    (tmp_path / "blocked").touch()
    out = tmp_path / "out"
    mistakes: list[tuple[Path, list[str], Path, str]] = [
        (tmp_path / "gone", [], out, "gone: no such file or folder; give a folder, an image or a list"),
        (tmp_path / "none", [], out, "none: holds no image; give a folder that does"),
        (source.parent, [], source.parent, "is the input folder, whose files would be overwritten"),
        (source, ["eval.protocol=best"], out, "'eval.protocol' is 'best'; expected one of"),
        (source, ["model.kernel=3"], out, "do not fit"),
        (source, [], tmp_path / "blocked", "cannot be written"),
    ]
    for where, arguments, target, message in mistakes:
        with pytest.raises(UserError) as error:
            predicted(where, *arguments, out=target)
        assert message in str(error.value)
    assert source.is_file()
    with pytest.raises(UserError, match=r"none: holds neither best\.pt nor last\.pt"):
        predict_script.main(
            project, ["--run", str(tmp_path / "none"), "--input", str(source), "--out", str(out)]
        )
    save(checkpoint, contents | {"project": "other"})
    with pytest.raises(UserError, match=r"best\.pt: made by project 'other'; give a checkpoint of fake"):
        predicted(source)
