"""Pickles of plain numbers and arrays, read by an interpreter of the few instructions they need; nothing is run."""

from __future__ import annotations

import io
import math
import pickle
import re
from typing import Any

import numpy as np

from common.errors import UserError


class _Refused(pickle.UnpicklingError):
    """The pickle asks for something other than numbers, text, plain containers and arrays of numbers."""


class _Dtype:
    """Stands for `numpy.dtype`: remembers the code of a number type and a byte order, calls nothing."""

    def __init__(self, code: object = "", *_: object) -> None:
        text = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(text, str) or not re.fullmatch(r"[<>|=]?([iu][1248]|f[248])", text):
            raise _Refused(f"array of type {text!r}")
        self.code = text

    def __setstate__(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if order not in ("<", ">", "|", "="):
            raise _Refused("array type with an unknown byte order")
        self.code = str(order) + self.code.lstrip("<>|=")


class _Array:
    """Stands for `numpy.ndarray` and the functions that build one: keeps type, shape and raw bytes."""

    def __init__(self, *arguments: object) -> None:
        self.values: np.ndarray[Any, Any] | None = None
        if len(arguments) == 4:  # protocol 5: (buffer, dtype, shape, order)
            self._set(arguments[0], arguments[1], arguments[2], arguments[3] == "F")

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _Refused("array in an unknown form")
        self._set(state[4], state[2], state[1], bool(state[3]))

    def _set(self, raw: object, dtype: object, shape: object, fortran: bool) -> None:
        if isinstance(raw, str):  # written by Python 2
            raw = raw.encode("latin1")
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray):
            raise _Refused("array without plain numbers")
        values = np.frombuffer(bytes(raw), dtype=np.dtype(dtype.code))
        if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
            raise _Refused(f"array of shape {shape}")
        if math.prod(shape) != len(values):
            raise _Refused(f"array of shape {shape} with {len(values)} numbers")
        self.values = values.reshape(shape, order="F" if fortran else "C")


class _Bytes:
    """Stands for `_codecs.encode`, by which Python 3 writes raw bytes at protocol 2."""

    def __new__(cls, text: object = "", encoding: object = "") -> Any:
        if not isinstance(text, str) or encoding != "latin1":
            raise _Refused("text in an unknown encoding")
        return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], type] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Bytes,
    **{
        (f"numpy.{core}.{module}", name): _Array
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
    },
}


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler whose only reachable names are the stand-ins above; real classes and functions never are."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise _Refused(f"{module}.{name}")
        stand_in = _STAND_INS[module, name]
        return type(stand_in.__name__, (stand_in,), {})  # fresh, so a pickle cannot alter the next one's

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused(f"a reference to the outside object {pid!r}")


def load_plain_pickle(data: bytes, where: str, accepted: str) -> Any:
    """What is pickled in `data`: numbers, text, lists, tuples, dictionaries, and NumPy arrays of integers or floats.

    Nothing in the pickle is executed: array constructors are replaced by stand-ins that only take raw numbers, and
    every other name is refused. Messages begin with `where` and say what is `accepted`, such as "a list of integers".

    Raises:
        UserError: The pickle is damaged or holds anything else.
    """
    try:
        return _plain(_PlainUnpickler(io.BytesIO(data), encoding="latin1").load())
    except _Refused as error:
        raise UserError(f"{where}: refused, the pickle holds {error}; only {accepted} is accepted") from None
    except Exception as error:  # hostile bytes can raise anything; none of it is worth more than this line
        raise UserError(
            f"{where}: not a readable pickle ({type(error).__name__}); get the file again"
        ) from None


def load_permutation(data: bytes, where: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The permutation of 0..N-1 pickled in `data` as an array or a list of integers, int64 (N,).

    Raises:
        UserError: The pickle is unsafe, damaged or not a permutation.
    """
    value = load_plain_pickle(data, where, "an array or a list of integers")
    array = isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.ndim == 1
    if not array and not (isinstance(value, list | tuple) and all(type(item) is int for item in value)):
        raise UserError(
            f"{where}: refused, the pickle does not hold integers; only an array or a list of integers is accepted"
        )
    if not np.array_equal(sorted(value), np.arange(len(value))):
        raise UserError(f"{where}: not a permutation of 0..{len(value) - 1}; get the file again")
    return np.array(value, dtype=np.int64)


def _plain(value: Any) -> Any:
    """The value with arrays in place of their stand-ins."""
    if isinstance(value, _Array):
        if value.values is None:
            raise _Refused("an array without content")
        return value.values
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    if type(value) is dict:
        return {_plain(key): _plain(item) for key, item in value.items()}
    if value is None or type(value) in (bool, int, float, str, bytes, bytearray):
        return value
    raise _Refused(f"a {type(value).__name__}")
