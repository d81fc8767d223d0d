"""Reading MindSpore's files: three that MindSpore 2.10 wrote, others built here byte by byte, and damaged ones.

The recordings are of `mindspore.save_checkpoint([{"name": ..., "data": Tensor(array)}, ...], path)` with the arrays of
the `.npz` beside them; `kinds_crc` with `crc_check=True`, `sliced` with slices of 1 KB instead of 512 MB.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from projects.proto_consistency.compat.mindspore_file import is_mindspore, read_mindspore
from projects.proto_consistency.tests.mindspore_writer import message, tensor_value, varint, write_mindspore

RECORDED = Path(__file__).resolve().parent / "mindspore"


@pytest.mark.parametrize(
    ("name", "arrays"), [("kinds", "kinds"), ("kinds_crc", "kinds"), ("sliced", "sliced")]
)
def test_what_mindspore_wrote(name: str, arrays: str) -> None:
    path = RECORDED / f"{name}.ckpt"
    assert is_mindspore(path)
    found = read_mindspore(path)
    with np.load(RECORDED / f"{arrays}.npz") as expected:
        assert list(found) == expected.files
        for key in expected.files:
            assert found[key].numpy().dtype == expected[key].dtype
            assert np.array_equal(found[key].numpy(), expected[key])
            assert found[key].shape == expected[key].shape


def test_our_writer_writes_the_same_bytes(tmp_path: Path) -> None:
    with np.load(RECORDED / "kinds.npz") as arrays:
        write_mindspore(tmp_path / "mine.ckpt", {key: arrays[key] for key in arrays.files})
    assert (tmp_path / "mine.ckpt").read_bytes() == (RECORDED / "kinds.ckpt").read_bytes()


def test_large_dimensions_and_packed_ones(tmp_path: Path) -> None:
    array = np.arange(300 * 2, dtype=np.float32).reshape(300, 2)
    packed = message(1, varint(300) + varint(2)) + message(2, b"Float32") + message(3, array.tobytes())
    path = tmp_path / "packed.ckpt"
    path.write_bytes(message(1, message(1, b"a") + message(2, packed)))
    write_mindspore(tmp_path / "plain.ckpt", {"a": array})
    for file in ("packed.ckpt", "plain.ckpt"):
        assert np.array_equal(read_mindspore(tmp_path / file)["a"].numpy(), array)


def test_scalars_of_older_versions_have_the_dimension_zero(tmp_path: Path) -> None:
    path = write(tmp_path / "old.ckpt", tensor_value("s", np.array(2.5, np.float32), shape=(0,)))
    assert read_mindspore(path)["s"].shape == ()
    assert read_mindspore(path)["s"] == 2.5


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


GOOD = tensor_value("w", np.ones((2, 3), np.float32))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (GOOD[:-3], "bytes"),
        (GOOD + b"\x0a", "no number"),
        (GOOD + message(9, b"x"), "unknown field 9"),
        (message(1, message(1, b"w") + message(3, b"")), "map tensor"),
        (message(1, message(1, b"w")), "without name or tensor"),
        (message(1, message(1, b"\xff\xfe") + message(2, b"")), "no text"),
        (GOOD + tensor_value("w", np.ones((3, 2), np.float32)), "twice with another"),
        (GOOD + GOOD, "has 48 bytes"),
        (tensor_value("w", np.ones(2, np.float32), kind="Complex64"), "type 'Complex64'"),
        (tensor_value("w", np.ones(2, np.float32), shape=(2**40, 2**40)), "has 8 bytes"),
        (b"\x0b\x00", "kind 3"),
        (b"\x0a" + b"\xff" * 11, "no number"),
        (GOOD + b"crc_num" + bytes(10), "checksum"),
        (np.random.default_rng(0).bytes(500), ""),
    ],
)
def test_damaged_files_say_so_in_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=r"broken\.ckpt: damaged, encrypted or no MindSpore") as caught:
        read_mindspore(write(tmp_path / "broken.ckpt", content))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.ckpt: cannot be read"):
        read_mindspore(tmp_path / "none.ckpt")


def test_other_files_are_not_taken_for_it(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "zip.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    write(tmp_path / "text.txt", b"\nnot a checkpoint")
    write(tmp_path / "nothing", b"")
    write(tmp_path / "binary", b"\x0a\x05\x0a\x03\x00\x01\x02")
    assert [path.name for path in tmp_path.iterdir() if is_mindspore(path)] == []
