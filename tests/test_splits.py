"""The commands on split lists; downloads come from a server on this machine."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from common.data.dataset_yaml import load_spec
from common.data.lists import sha256_ids, sha256_order
from common.data.spec import SPLITS
from common.data.split import resolve_split
from common.errors import UserError
from splits import __main__ as splits
from splits import check, published
from splits.published import Content, load_published
from splits.verify import verify

UPSTREAM = {
    "Haochen-Wang409/U2PL/main": "U2PL",
    "Haochen-Wang409/U2PL/with_AEL": "U2PL_with_AEL",
    "djh-dzxw/BRPG/main": "BRPG",
    "HeimingX/semi_seg_proto/main": "semi_seg_proto",
    "charlesCXK/TorchSemiSeg/main": "TorchSemiSeg",
    "sud0301/semisup-semseg/master": "semisup-semseg",
    "LiheYoung/UniMatch/main": "UniMatch",
}


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        return None


def _serve(folder: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def github(published_lists: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base address of a server that holds the genuine lists where GitHub would."""
    folder = tmp_path_factory.mktemp("github")
    for place, name in UPSTREAM.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).symlink_to((published_lists / name).resolve(), target_is_directory=True)
    yield from _serve(folder)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path, Path]]:
    """A published.yaml of three lists, a server for them: base address, served folder, output folder."""
    served, out = tmp_path / "served", tmp_path / "out"
    texts = {"labeled": b"a\r\nb", "unlabeled": b"c\nd\ne\n"}
    records = []
    for role, data in texts.items():
        for owner in ("paper", "mirror"):
            path = served / owner / "code" / "main" / f"lists/{role}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data if owner == "paper" else data.replace(b"\r\n", b"\n"))
        mirrored = texts[role].replace(b"\r\n", b"\n")
        record: dict[str, Any] = {
            "name": "toys/paper/2",
            "role": role,
            "dataset": "toys",
            "protocol": "paper",
            "fraction": "2",
            "count": len(data.split()),
            "repository": "paper/code",
            "branch": "main",
            "path": f"lists/{role}.txt",
            "sha256_file": hashlib.sha256(data).hexdigest(),
            "sha256_ids": sha256_ids(data.decode().split()),
            "mirrors": [
                {
                    "repository": "mirror/code",
                    "branch": "main",
                    "path": f"lists/{role}.txt",
                    "sha256_file": hashlib.sha256(mirrored).hexdigest(),
                }
            ],
        }
        records.append(record)
    big = b"x\ny\n"
    (served / "paper/code/main/big.txt").write_bytes(big)
    records.append(
        {
            "name": "toys/train",
            "role": "train",
            "dataset": "toys",
            "protocol": "official",
            "count": 99,
            "repository": "paper/code",
            "branch": "main",
            "path": "big.txt",
            "git_blob": Content(big, "big").git_blob,
        }
    )
    order = np.array([3, 1, 0, 2])
    (served / "paper/code/main/split.pkl").write_bytes(pickle.dumps(order))
    records.append(
        {
            "name": "toys/s4gan",
            "role": "permutation",
            "dataset": "toys",
            "protocol": "s4gan",
            "count": 4,
            "repository": "paper/code",
            "branch": "main",
            "path": "split.pkl",
            "sha256_file": hashlib.sha256(pickle.dumps(order)).hexdigest(),
            "sha256_indices": sha256_order(order),
            "order": "toys/letters",
            "file": "toys/s4gan/split_0.pkl",
        }
    )
    letters = b"p\nq\nr\ns\n"
    (served / "paper/code/main/letters.txt").write_bytes(letters)
    records.append(
        {
            "name": "toys/letters",
            "role": "test",
            "dataset": "toys",
            "protocol": "official",
            "count": 4,
            "repository": "paper/code",
            "branch": "main",
            "path": "letters.txt",
            "sha256_file": hashlib.sha256(letters).hexdigest(),
            "sha256_ids": sha256_ids("pqrs"),
        }
    )
    home = tmp_path / "splits"
    home.mkdir()
    (home / "published.yaml").write_text(yaml.safe_dump({"lists": records}))
    monkeypatch.setattr(published, "SPLITS", home)
    for base in _serve(served):
        yield base, served, out


def get(base: str, out: Path, *names: str) -> None:
    assert not splits.main(["get", *names, "--out", str(out), "--base-url", base])


# what is on record


def test_published_yaml_names_every_record_of_the_specification(published_lists: Path) -> None:
    spec_file = published_lists.parents[1] / "specs" / "published_splits.yaml"
    if not spec_file.is_file():
        pytest.skip(f"not there: {spec_file}")
    branch = {"U2PL (branch with_AEL)": "with_AEL", "semisup-semseg": "master"}
    known: dict[tuple[str, str, str], published.Source] = {}
    records = load_published()
    ids = {record.sha256_ids for record in records}
    derived = {(record.sha256_ids, record.count) for record in records if record.permutation}
    for record in records:
        for source in record.sources:
            known[source.repository.split("/")[1], source.branch, source.path] = source
    for entry in yaml.safe_load(spec_file.read_text())["splits"]:
        if entry["setting"] == "permutation-derived":
            assert (entry["sha256_ids"], entry["count"]) in derived
            continue
        repository = entry["repository"].split(" ")[0]
        source = known[repository, branch.get(entry["repository"], "main"), entry["path"]]
        assert (source.sha256_file, source.git_blob) == (entry["sha256_file"], entry.get("git_blob"))
        if entry["sha256_ids"]:
            assert entry["sha256_ids"] in ids


def test_published_yaml_is_consistent() -> None:
    records = load_published()
    targets = [record.target for record in records]
    assert len(set(targets)) == len(targets)
    names = {record.name for record in records}
    for n in (92, 183, 366, 732, 1464):
        assert f"voc/classic/{n}" in names
    for family in ("u2pl", "cps"):
        assert {f"voc/{family}/{n}" for n in (662, 1323, 2646, 5291)} <= names
        assert {f"cityscapes/{family}/{n}" for n in (186, 372, 744, 1488)} <= names
    assert {f"coco/unimatch/1_{n}" for n in (512, 256, 128, 64, 32, 16)} <= names
    assert {f"ade20k/unimatch/1_{n}" for n in (64, 32, 16, 8, 4, 2)} <= names
    total = {"voc": 10582, "cityscapes": 2975, "coco": 118287, "pascal_context": 4996, "ade20k": 20210}
    for name in names:
        roles = {record.role: record for record in records if record.name == name}
        if {"labeled", "unlabeled"} <= set(roles):
            family = roles["labeled"].protocol
            if family not in {"classic_pseudoseg", "cps_few", "cps_coarse"}:
                both = roles["labeled"].count + roles["unlabeled"].count
                assert both == total[roles["labeled"].dataset], name
    for record in records:
        assert record.dataset == record.name.split("/")[0]
        assert bool(record.sources) != bool(record.permutation), record.name
        for source in record.sources:
            assert source.sha256_file or source.git_blob
            assert source.repository.count("/") == 1


# get


def test_get_writes_verified_lists_and_leaves_them_alone_the_second_time(
    tiny: tuple[str, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, _, out = tiny
    get(base, out, "toys/paper/2")
    folder = out / "toys/paper/2"
    assert (folder / "labeled.txt").read_bytes() == b"a\r\nb"
    assert (folder / "unlabeled.txt").read_bytes() == b"c\nd\ne\n"
    assert (out / "toys/train.txt").read_bytes() == b"x\ny\n"  # comes along, verified by its blob id
    assert "verified, written" in capsys.readouterr().out
    (folder / "labeled.txt").write_text("b\na")  # the same ids
    get(base, out, "toys/paper")
    assert "already there" in capsys.readouterr().out
    assert (folder / "labeled.txt").read_text() == "b\na"
    (folder / "labeled.txt").write_text("mine\n")
    with pytest.raises(UserError, match=r"labeled\.txt: holds another list than toys/paper/2; .*--force"):
        get(base, out, "toys/paper/2")
    assert (folder / "labeled.txt").read_text() == "mine\n"
    get(base, out, "toys/paper/2", "--force")
    assert (folder / "labeled.txt").read_bytes() == b"a\r\nb"
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


def test_mirrors_are_tried_in_turn(tiny: tuple[str, Path, Path]) -> None:
    base, served, out = tiny
    (served / "paper/code/main/lists/labeled.txt").unlink()
    get(base, out, "toys/paper/2")
    assert (out / "toys/paper/2/labeled.txt").read_bytes() == b"a\nb"


def test_altered_downloads_are_refused(tiny: tuple[str, Path, Path]) -> None:
    base, served, out = tiny
    for owner in ("paper", "mirror"):
        (served / owner / "code/main/lists/labeled.txt").write_text("a\nz\n")
    with pytest.raises(
        UserError, match=r"toys/paper/2 labeled: cannot be downloaded: .*sha256 .* \(and 1 mirrors failed\)"
    ):
        get(base, out, "toys/paper/2")
    assert not list(out.rglob("*.txt"))
    (served / "paper/code/main/big.txt").write_text("x\nz\n")
    with pytest.raises(UserError, match="git blob"):
        get(base, out, "toys/train")


def test_official_lists_that_cannot_be_had_do_not_stop_a_setting(
    tiny: tuple[str, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, served, out = tiny
    (served / "paper/code/main/big.txt").unlink()
    get(base, out, "toys/paper/2")
    assert (out / "toys/paper/2/labeled.txt").is_file()
    assert "note: toys/train train: cannot be downloaded" in capsys.readouterr().out


def test_permutations_become_text_lists_for_any_ratio(tiny: tuple[str, Path, Path]) -> None:
    base, _, out = tiny
    get(base, out, "toys/s4gan/0.7")  # int(0.7 * 4) = 2
    assert (out / "toys/s4gan/0.7/labeled.txt").read_text() == "s\nq\n"
    assert (out / "toys/s4gan/0.7/unlabeled.txt").read_text() == "p\nr\n"
    assert (out / "toys/s4gan/split_0.pkl").is_file()
    other = out / "order.txt"
    other.write_text("1\n2\n3\n4\n")
    get(base, out, "toys/s4gan/0.5", "--order", str(other))
    assert (out / "toys/s4gan/0.5/labeled.txt").read_text() == "4\n2\n"
    other.write_text("1\n2\n")
    with pytest.raises(UserError, match="4 entries for a list of 2 images"):
        get(base, out, "toys/s4gan/0.25", "--order", str(other))


def test_unreachable_servers_and_wrong_names(tiny: tuple[str, Path, Path]) -> None:
    _, _, out = tiny
    with pytest.raises(UserError, match=r"download failed .* check the network"):
        get("http://127.0.0.1:9", out, "toys/paper/2")
    with pytest.raises(UserError, match="only http and https"):
        published.download("file:///etc/hostname")
    with pytest.raises(UserError, match=r"'toys/papr/2': not a published list; did you mean 'toys/paper/2'"):
        get("http://127.0.0.1:9", out, "toys/papr/2")
    with pytest.raises(UserError, match="not a published list"):
        get("http://127.0.0.1:9", out, "toys/s4gan/7")


def test_genuine_lists_from_every_upstream(github: str, tmp_path: Path) -> None:
    names = [
        "voc/classic/366",
        "voc/cps/662",
        "cityscapes/u2pl_ael/372",
        "cityscapes/unimatch/100",
        "voc/mlmt",
    ]
    get(github, tmp_path, *names)
    spec = load_spec("voc")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert {"voc/val.txt", "voc/train_aug.txt", "cityscapes/val.txt", "voc/mlmt/train_label.txt"} <= found
    labeled = {entry.id for _, entry in check._lines_of(tmp_path / "voc/classic/366/labeled.txt")}
    assert (len(labeled), spec.name) == (366, "voc")
    assert splits.main(["verify", str(tmp_path)]) == 0


def test_genuine_permutations(github: str, tmp_path: Path, published_lists: Path) -> None:
    get(github, tmp_path, "voc/s4gan/0.125", "cityscapes/s4gan/0.1")
    labeled = (tmp_path / "voc/s4gan/0.125/labeled.txt").read_text().split()
    order = (published_lists / "semisup-semseg/data/voc_list/train_aug.txt").read_text().split()
    assert len(labeled) == 1322
    assert labeled[:3] == [order[3458], order[9682], order[992]]
    city = (tmp_path / "cityscapes/s4gan/0.1/labeled.txt").read_text().split()
    assert len(city) == len(set(city)) == 297
    assert splits.main(["verify", str(tmp_path)]) == 0


# list, verify


def test_list_prints_names_and_what_is_here(
    tiny: tuple[str, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, _, out = tiny
    get(base, out, "toys/paper/2")
    capsys.readouterr()
    splits.main(["list", "--out", str(out)])
    lines = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert lines == {
        "toys/paper/2": "here",
        "toys/train": "here",
        "toys/s4gan": "-",
        "toys/letters": "-",
    }


@pytest.mark.parametrize(
    ("file", "text", "verdict", "code"),
    [
        ("labeled.txt", "a\r\nb", "toys/paper/2 labeled: 2 entries, identical to an upstream file", 0),
        (
            "mine.txt",
            "x/b.jpg x/b.png\nx/a.jpg x/a.png\n",
            "toys/paper/2 labeled: 2 entries, the ids on record",
            0,
        ),
        ("toys/paper/2/labeled.txt", "a\nb\nc\n", "CONTRADICTS toys/paper/2 labeled: 3 ids instead of 2", 1),
        (
            "toys/paper/2/unlabeled.txt",
            "c\nd\nz\n",
            "CONTRADICTS toys/paper/2 unlabeled: 3 ids as expected, but not",
            1,
        ),
        ("unlabeled.txt", "k\nl\nm\n", "CONTRADICTS toys/paper/2 unlabeled, which has as many entries", 1),
        ("other.txt", "k\nl\nm\nn\no\n", "no published list has these entries", 1),
        ("random/1_8/labeled.txt", "k\n", "drawn by 'make'", 0),
        ("x.pkl", "boom", "unreadable", 1),
    ],
)
def test_verify(
    tiny: tuple[str, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    text: str,
    verdict: str,
    code: int,
) -> None:
    path = tmp_path / "mine" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode())
    assert splits.main(["verify", str(tmp_path / "mine")]) == code
    assert verdict in capsys.readouterr().out


def test_verify_sees_roles_of_different_settings(
    published_lists: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = published_lists / "U2PL/data/splits/pascal"
    for role, n in (("labeled", 366), ("unlabeled", 183)):
        (tmp_path / f"{role}.txt").write_bytes((source / f"{n}/{role}.txt").read_bytes())
    assert splits.main(["verify", str(tmp_path)]) == 1
    assert "belong to different settings" in capsys.readouterr().out
    with pytest.raises(UserError, match="no list"):
        splits.main(["verify", str(tmp_path / "nowhere")])


def test_verify_recognizes_all_genuine_lists(published_lists: Path) -> None:
    assert verify(published_lists) == 0


# make, check


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    """40 photos with masks of 3 classes (class 2 in two of them only), 5 without; 4 for evaluation."""
    rng = np.random.default_rng(0)
    for folder in ("img", "mask"):
        (tmp_path / folder).mkdir()
    names = [f"t{i:02d}" for i in range(45)] + [f"v{i}" for i in range(4)]
    for i, name in enumerate(names):
        Image.fromarray(rng.integers(0, 255, (6, 8, 3)).astype(np.uint8)).save(tmp_path / f"img/{name}.jpg")
        if 40 <= i < 45:
            continue
        label = np.zeros((6, 8), np.uint8)
        label[:, 4:] = 1
        label[0, 0] = 255
        if i in {7, 31}:
            label[2:4] = 2
        Image.fromarray(label).save(tmp_path / f"mask/{name}.png")
    (tmp_path / "train.txt").write_text("\n".join(names[:45]))
    (tmp_path / "val.txt").write_text("\n".join(names[45:]))
    path = tmp_path / "dataset.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "toys",
                "images": "img/{id}.jpg",
                "labels": "mask/{id}.png",
                "classes": ["ground", "sky", "bird"],
                "lists": {"train": "train.txt", "val": "val.txt"},
            }
        )
    )
    return path


def ids(folder: Path, role: str = "labeled") -> list[str]:
    return (folder / f"{role}.txt").read_text().split()


def test_make_is_nested_covers_the_classes_and_keeps_photos_without_masks_unlabeled(toys: Path) -> None:
    folder = toys.parent
    for fraction in ("1/16", "1/8", "1/4", "5"):
        assert not splits.main(["make", str(toys), "--fraction", fraction])
    sixteenth, eighth, quarter, five = (ids(folder / "random" / n) for n in ("1_16", "1_8", "1_4", "5"))
    assert [len(x) for x in (sixteenth, eighth, quarter, five)] == [3, 5, 10, 5]  # of 40, rounded up
    assert quarter[:5] == eighth == five
    assert eighth[:3] == sixteenth
    assert {"t07", "t31"} & set(sixteenth)  # the rare class
    rest = ids(folder / "random/1_8", "unlabeled")
    assert set(rest) | set(eighth) == {f"t{i:02d}" for i in range(45)}
    assert not set(rest) & set(eighth)
    assert {f"t{i}" for i in range(40, 45)} <= set(rest)
    split = resolve_split(load_spec(toys), "random/1_8")
    assert (len(split.labeled), len(split.unlabeled)) == (5, 40)


def test_make_depends_on_the_seed_alone(toys: Path) -> None:
    folder = toys.parent
    splits.main(["make", str(toys), "--fraction", "1/4", "--seed", "1"])
    first = ids(folder / "random_seed1/1_4")
    lines = (folder / "train.txt").read_text().split()
    (folder / "train.txt").write_text("\n".join(reversed(lines)))
    splits.main(["make", str(toys), "--fraction", "1/4", "--seed", "1"])
    assert ids(folder / "random_seed1/1_4") == first
    splits.main(["make", str(toys), "--fraction", "1/4", "--seed", "2"])
    assert ids(folder / "random_seed2/1_4") != first


def test_make_does_not_overwrite_another_split(toys: Path) -> None:
    splits.main(["make", str(toys), "--fraction", "4"])
    path = toys.parent / "random/4/labeled.txt"
    path.write_text("t01\n")
    with pytest.raises(UserError, match="holds another split; move it away or use --force"):
        splits.main(["make", str(toys), "--fraction", "4"])
    splits.main(["make", str(toys), "--fraction", "4", "--force"])
    assert len(path.read_text().split()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fraction", "41"], "41 of 40 photos with masks"),
        (["--fraction", "0"], "0 of 40 photos"),
        (["--fraction", "0.125"], r"--fraction 0\.125: not a share such as 1/8"),
        (["--fraction", "1/0"], "not a share"),
        (["--fraction", "4", "--seed", "-1"], "--seed -1: must be 0 or more"),
    ],
)
def test_make_refuses(toys: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        splits.main(["make", str(toys), *arguments])


def test_make_refuses_evaluation_images_and_says_which_classes_are_missing(
    toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits.main(["make", str(toys), "--fraction", "1"])
    assert "no labeled photo shows" in capsys.readouterr().out
    (toys.parent / "train.txt").write_text("t00\nv1\n")
    with pytest.raises(UserError, match=r"train\.txt:2: 'v1' is also in val\.txt"):
        splits.main(["make", str(toys), "--fraction", "1"])


def test_make_for_shapes_is_what_resolve_split_draws(tmp_path: Path) -> None:
    splits.main(["make", "shapes", "--fraction", "1/16", "--seed", "4", "--out", str(tmp_path)])
    split = resolve_split(load_spec("shapes"), "random_seed4/1_16")
    assert ids(tmp_path / "random_seed4/1_16") == [item.id for item in split.labeled]
    assert resolve_split(load_spec("shapes"), str(tmp_path / "random_seed4/1_16")).hash == split.hash


def test_check_reports_sizes_and_frequencies(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert splits.main(["check", str(toys)]) == 0
    out = capsys.readouterr().out
    assert "train: 45 photos, 40 masks read; 8x6 (45)" in out
    assert "bird" in out
    assert "in 2 photos" in out
    assert "2.083 % of all pixels" in out  # one pixel of 48 is ignored
    assert "toys: all is well" in out
    splits.main(["make", str(toys), "--fraction", "1/8"])
    assert splits.main(["check", str(toys), "random/1_8"]) == 0
    assert "labeled: 5 photos, 5 masks read" in capsys.readouterr().out


def test_check_collects_every_problem(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = toys.parent
    splits.main(["make", str(toys), "--fraction", "1/8"])
    Image.fromarray(np.full((6, 8), 9, np.uint8)).save(folder / "mask/v0.png")
    Image.fromarray(np.zeros((5, 8), np.uint8)).save(folder / "mask/v1.png")
    (folder / "img/v2.jpg").write_bytes(b"no image")
    (folder / "val.txt").write_text("v0\nv1\nv2\nv3\nv9\nv3\n")
    chosen = ids(folder / "random/1_8")
    with (folder / "random/1_8/unlabeled.txt").open("a") as file:
        file.write(f"{chosen[0]}\nv3\n")
    assert splits.main(["check", str(toys), "random/1_8"]) == 1
    out = capsys.readouterr().out
    for text in (
        "val.txt:1: ",
        "label value 9 (48 pixels) belongs to none of the 3 classes",
        "v1.png: mask is 8x5 pixels but",
        "v2.jpg: image cannot be read",
        "val.txt:5: no image for 'v9'",
        "val: 'v3' is listed 2 times",
        f"labeled and unlabeled: 1 photos are in both ({chosen[0]})",
        "unlabeled and val: 1 photos are in both (v3)",
        "toys: 7 problem(s)",
    ):
        assert text in out, text


def test_check_says_what_reading_changes(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    names = (toys.parent / "train.txt").read_text().split()
    photos = [toys.parent / "img" / f"{name}.jpg" for name in names]
    for photo in photos[:2]:
        with Image.open(photo) as file:
            file.save(photo, exif=exif)
    with Image.open(photos[2]) as file:
        Image.fromarray(np.asarray(file.convert("L")).astype(np.uint16)).save(photos[2], format="png")
        file.convert("RGBA").save(photos[3], format="png")
    assert splits.main(["check", str(toys)]) == 0
    out = capsys.readouterr().out
    for text in (
        "  2 photos: turned upright (EXIF orientation 3)",
        "  1 photos: alpha channel dropped",
        "  1 photos: 16 bits per channel, of which 0..65535 become 0..255",
        "WARNING photos with an EXIF orientation: their masks must be drawn on the upright view; otherwise set "
        f"'orientation: stored' in {toys}",
        "WARNING photos that are dark in the range of their type",
        "toys: no problem, 2 warning(s)",
    ):
        assert text in out, text
    toys.write_text(f"{toys.read_text()}\norientation: stored\nvalue_range: [0, 255]\n")
    assert splits.main(["check", str(toys)]) == 0
    out = capsys.readouterr().out
    assert "EXIF orientation 3 not applied" in out
    assert "drawn on the unturned view; otherwise set 'orientation: upright'" in out
    assert "dark" not in out


def test_check_of_genuine_data(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert splits.main(["check", "voc", "--root", str(shared_data / "voc_slice")]) in {0, 1}
    out = capsys.readouterr().out
    assert "val: 12 photos, 12 masks read" in out
    if not (SPLITS / "voc/train_aug.txt").is_file():
        assert "train: 24 photos, 24 masks read" in out
        assert "voc: all is well" in out


def test_check_of_camvid_split(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec_root = shared_data / "camvid"
    assert splits.main(["check", "camvid", "seed0/12", "--root", str(spec_root)]) == 0
    out = capsys.readouterr().out
    assert "labeled: 12 photos, 12 masks read; 480x360 (12)" in out
    assert "unlabeled: 355 photos, 0 masks read" in out


def test_command_line_errors_are_one_line(tmp_path: Path) -> None:
    import subprocess
    import sys

    run = subprocess.run(
        [sys.executable, "-m", "splits", "get", "voc/clasic/366"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: split 'voc/clasic/366': not a published list; did you mean")
    assert run.stderr.count("\n") == 1
