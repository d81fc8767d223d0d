"""Reader of MindSpore's checkpoint files (`.ckpt`), in which the authors released their weights.

The format is public (`checkpoint.proto` of MindSpore): a protocol-buffer message of named tensors,

    Checkpoint   1: repeated Value
    Value        1: name (text)          2: TensorProto
    TensorProto  1: repeated dimension   2: number type (text, "Float32")   3: content (bytes, little endian)

A scalar has no dimension, in older versions the single dimension 0. A large tensor is cut into several consecutive
values of the same name. Newer versions may append a checksum. Encrypted files and map tensors are not read. MindSpore
itself is not needed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

TYPES = {
    "Bool": "?",
    "Int8": "<i1",
    "Int16": "<i2",
    "Int32": "<i4",
    "Int64": "<i8",
    "UInt8": "<u1",
    "Float16": "<f2",
    "Float32": "<f4",
    "Float64": "<f8",
}
CHECKSUM_MARK = b"crc_num"
CHECKSUM_BYTES = 10
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
LONGEST_NAME = 512


class _DamagedError(Exception):
    """The bytes are not of this format; the message says where."""


def is_mindspore(path: Path) -> bool:
    """Whether the file begins as such a file does: a value that begins with a name of readable characters."""
    with path.open("rb") as file:
        start = memoryview(file.read(LONGEST_NAME + 32))
    try:
        if start[0] != _key(1, BYTES):
            return False
        _, at = _varint(start, 1)  # length of the value
        if start[at] != _key(1, BYTES):
            return False
        length, at = _varint(start, at + 1)
        return 0 < length <= LONGEST_NAME and bytes(start[at : at + length]).decode().isprintable()
    except (_DamagedError, IndexError, UnicodeDecodeError):
        return False


def read_mindspore(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, with MindSpore's names, in the order of the file.

    Raises:
        UserError: the file is absent, damaged, encrypted, or holds a kind of value that is not supported.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    try:
        return _tensors(memoryview(_without_checksum(content)))
    except _DamagedError as error:
        raise UserError(
            f"{path}: damaged, encrypted or no MindSpore checkpoint ({error}); fetch it again, or export it where "
            "MindSpore is installed: numpy.savez(FILE, **{k: v.asnumpy() for k, v in load_checkpoint(CKPT).items()})"
        ) from None


def _without_checksum(content: bytes) -> bytes:
    tail = len(CHECKSUM_MARK) + CHECKSUM_BYTES
    if content[-tail:-CHECKSUM_BYTES] != CHECKSUM_MARK:
        return content
    if zlib.crc32(content[:-tail]) != int.from_bytes(content[-CHECKSUM_BYTES:], "big"):
        raise _DamagedError("its checksum differs")
    return content[:-tail]


def _key(number: int, kind: int) -> int:
    return number << 3 | kind


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A whole number in groups of seven bits, the lowest first, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _DamagedError(f"no number at byte {at}")


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Number, value (of whole numbers) and content (of everything with a length) of the fields of a message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        value, size = 0, {FIXED64: 8, FIXED32: 4}.get(kind, 0)
        if kind == VARINT:
            value, at = _varint(data, at)
        elif kind == BYTES:
            size, at = _varint(data, at)
        elif size == 0:
            raise _DamagedError(f"field {number} of kind {kind}")
        if size > len(data) - at:
            raise _DamagedError(f"field {number} has {size} bytes, {len(data) - at} are left")
        yield number, value, data[at : at + size]
        at += size


class _Part:
    """One TensorProto."""

    def __init__(self, data: memoryview) -> None:
        self.shape: list[int] = []
        self.type, self.content = "", memoryview(b"")
        for number, value, content in _fields(data):
            if number == 1 and len(content):  # several dimensions together
                at = 0
                while at < len(content):
                    value, at = _varint(content, at)  # noqa: PLW2901
                    self.shape.append(value)
            elif number == 1:
                self.shape.append(value)
            elif number == 2:
                self.type = _text(content)
            elif number == 3:
                self.content = content


def _text(content: memoryview) -> str:
    try:
        return bytes(content).decode("utf-8")
    except UnicodeDecodeError:
        raise _DamagedError("a name is no text") from None


def _tensors(data: memoryview) -> dict[str, Tensor]:
    parts: dict[str, list[_Part]] = {}
    for number, _, content in _fields(data):
        if number != 1:
            raise _DamagedError(f"unknown field {number}")
        name, part = "", None
        for inner, _, value in _fields(content):
            if inner == 1:
                name = _text(value)
            elif inner == 2:
                part = _Part(value)
            else:
                raise _DamagedError(f"'{name}' is of a kind that is not supported (map tensor)")
        if not name or part is None:
            raise _DamagedError("a value without name or tensor")
        parts.setdefault(name, []).append(part)
    if not parts:
        raise _DamagedError("it is empty")
    return {name: _joined(name, own) for name, own in parts.items()}


def _joined(name: str, parts: list[_Part]) -> Tensor:
    kinds, shapes = {part.type for part in parts}, {tuple(part.shape) for part in parts}
    if len(kinds) > 1 or len(shapes) > 1:
        raise _DamagedError(f"'{name}' occurs twice with another type or shape")
    kind, (shape,) = kinds.pop(), shapes
    if kind not in TYPES:
        raise _DamagedError(f"'{name}' has numbers of type '{kind}'")
    raw, dtype = b"".join(part.content for part in parts), np.dtype(TYPES[kind])
    shape = () if shape == (0,) else shape
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise _DamagedError(f"'{name}' of shape {shape} has {len(raw)} bytes")
    return torch.from_numpy(np.frombuffer(raw, dtype=dtype).reshape(shape).astype(dtype.newbyteorder("=")))
