"""List files of all originals, their hashes, and pickles that must not be trusted."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data import lists
from common.data.safe_pickle import load_permutation
from common.errors import UserError
from splits.published import Content, load_published


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("2007_000032", "2007_000032"),
        ("2007_000032.jpg\r", "2007_000032"),
        ("JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png", "2007_000032"),
        ("leftImg8bit/train/ulm/ulm_000079_000019_leftImg8bit.png", "ulm_000079_000019"),
        (
            "/images/train/jena_000078_000019.png\t/segmentation/train/jena_000078_000019_gtFine.png",
            "jena_000078_000019",
        ),
        ("train2017/000000283213.jpg masks/000000283213.png", "000000283213"),
        ("scan.v2.PNG", "scan.v2"),
        ("my photo 1.jpg\tmy photo 1.png", "my photo 1"),
        ("   ", ""),
    ],
)
def test_one_id_for_every_way_of_writing_it(line: str, name: str) -> None:
    assert [entry.id for entry in lists.parse_entries(line)] == [name] * bool(name)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("final", [True, False])
def test_line_ends_do_not_matter(tmp_path: Path, ending: str, final: bool) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes((ending.join(["a", "", "b.jpg b.png"]) + (ending if final else "")).encode("utf-8-sig"))
    entries = lists.read_entries(path)
    assert entries == [lists.Entry(1, "a", None), lists.Entry(3, "b.jpg", "b.png")]
    assert [entry.id for entry in entries] == ["a", "b"]


def test_bad_list_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    with pytest.raises(UserError, match=r"list\.txt: list file cannot be read \(No such file"):
        lists.read_entries(path)
    path.write_text("a\nb\tc\td\n")
    with pytest.raises(UserError, match=r"list\.txt:2: 3 fields"):
        lists.read_entries(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        lists.read_entries(path)


def test_hash_of_ids_is_that_of_the_sorted_set() -> None:
    expected = hashlib.sha256(b"a\nb\nc").hexdigest()
    assert lists.sha256_ids(["c", "a", "b", "a"]) == expected
    assert lists.sha256_order(["a", "b", "c"]) == expected
    assert lists.sha256_order(["c", "a", "b"]) != expected


def test_git_blob_id() -> None:
    assert Content(b"hello\n", "list").git_blob == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_every_published_list_at_hand_has_the_recorded_hashes(published_lists: Path) -> None:
    folders = {
        "Haochen-Wang409/U2PL@main": "U2PL",
        "Haochen-Wang409/U2PL@with_AEL": "U2PL_with_AEL",
        "djh-dzxw/BRPG@main": "BRPG",
        "HeimingX/semi_seg_proto@main": "semi_seg_proto",
        "charlesCXK/TorchSemiSeg@main": "TorchSemiSeg",
        "sud0301/semisup-semseg@master": "semisup-semseg",
        "LiheYoung/UniMatch@main": "UniMatch",
        "LiheYoung/UniMatch-V2@main": "UniMatch-V2",
    }
    read = 0
    for record in load_published():
        for source in record.sources:
            path = published_lists / folders[f"{source.repository}@{source.branch}"] / source.path
            if not path.is_file():
                continue
            read += 1
            assert Content(path.read_bytes(), str(path)).sha256 == source.sha256_file
            if record.role == "permutation":
                indices = load_permutation(path.read_bytes(), str(path))
                assert lists.sha256_order(indices) == record.sha256_indices
                assert len(indices) == record.count
            elif record.role == "flags":
                rows = lists.read_text(path).splitlines()
                assert (len(rows), {len(row.split()) for row in rows}) == (record.count, {21})
            else:
                ids = lists.read_ids(path)
                assert lists.sha256_ids(ids) == record.sha256_ids
                assert len(ids) == len(set(ids)) == record.count
    assert read > 120


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["int64", "int32", ">i4", "uint8", "list"])
def test_integer_pickles_of_every_protocol(protocol: int, dtype: str) -> None:
    order = np.random.default_rng(0).permutation(50)
    value = order.tolist() if dtype == "list" else order.astype(dtype)
    read = load_permutation(pickle.dumps(value, protocol=protocol), "split.pkl")
    assert read.dtype == np.int64
    assert np.array_equal(read, order)


class _Payload:
    """Runs a command when a careless reader loads its pickle."""

    def __init__(self, command: Any, *arguments: Any) -> None:
        self.call = command, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_hostile_pickle_is_refused_and_not_executed(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "executed"
    hostile = pickle.dumps([1, _Payload(Path.touch, marker)], protocol=protocol)
    eval_pickle = pickle.dumps(_Payload(eval, f"open({str(marker)!r}, 'w')"), protocol=protocol)
    pickle.loads(eval_pickle)  # the payload does work where pickles are trusted
    assert marker.is_file()
    marker.unlink()
    for data in (hostile, eval_pickle):
        with pytest.raises(UserError, match=r"split\.pkl: refused, the pickle holds"):
            load_permutation(data, "split.pkl")
        assert not marker.exists()


@pytest.mark.parametrize(
    "value",
    [
        np.array([0.0, 1.0]),
        np.array([1, 0], dtype=object),
        np.array([[0, 1], [1, 0]]),
        np.array([True, False]),
        [0, True],
        [0, 1.5],
        {"a": 1},
        "text",
        np.array([(0, 1)], dtype=[("a", "i4"), ("b", "i4")]),
    ],
    ids=str,
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_of_anything_but_integers_are_refused(value: Any, protocol: int) -> None:
    with pytest.raises(UserError, match="refused"):
        load_permutation(pickle.dumps(value, protocol=protocol), "split.pkl")


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x80\x05K\x01", pickle.dumps(np.arange(9))[:-20]])
def test_damaged_pickles_say_so(data: bytes) -> None:
    with pytest.raises(UserError, match=r"^split\.pkl: "):
        load_permutation(data, "split.pkl")


def test_array_state_cannot_lie_about_its_size() -> None:
    data = pickle.dumps(np.arange(4), protocol=2)
    assert data.count(b"K\x04") == 1  # the shape
    with pytest.raises(UserError, match="refused"):
        load_permutation(data.replace(b"K\x04", b"K\x05"), "split.pkl")


def test_not_a_permutation() -> None:
    with pytest.raises(UserError, match=r"not a permutation of 0\.\.2"):
        load_permutation(pickle.dumps([0, 1, 1]), "split.pkl")
