"""Files in MindSpore's checkpoint format, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

KINDS = {"?": "Bool", "i": "Int", "u": "UInt", "f": "Float"}


def varint(value: int) -> bytes:
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def message(number: int, content: bytes) -> bytes:
    """A field with a length."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor_value(
    name: str, array: np.ndarray, kind: str | None = None, shape: tuple[int, ...] | None = None
) -> bytes:
    """One named tensor; `kind` and `shape` tell something else than the array is."""
    code = array.dtype.kind
    kind = kind or ("Bool" if code == "b" else f"{KINDS[code]}{8 * array.itemsize}")
    body = b"".join(b"\x08" + varint(side) for side in (shape or array.shape))
    body += message(2, kind.encode()) + message(3, np.ascontiguousarray(array).tobytes())
    return message(1, message(1, name.encode()) + message(2, body))


def write_mindspore(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    with path.open("wb") as file:
        for name, array in arrays.items():
            file.write(tensor_value(name, np.asarray(array)))
    return path
