"""Recognises texts and token ids that were given from Python, by their types.

    texts       a list of them, or a datasets.Dataset with a column of them
    token ids   a stream (an array or a list of integers), sequences (a 2-D array, a row each), or
                documents (a list of streams)
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from fedrun.common.errors import InputError, one_line
from fedrun.data.hub import dataset_table
from fedrun.data.table_files import Table

IDS_AT_ONCE = 1 << 22
LARGEST = 2**31 - 1  # the token files are int32 at most
ACCEPTED = ("token ids (an array or a list of integers, 1-D or 2-D), a list of texts, or a "
            "datasets.Dataset")


@dataclass(frozen=True, eq=False)
class Ids:
    """Token ids of one argument, as they were given."""

    name: str
    """The argument, for messages: data, clients[2]."""
    pieces: list[np.ndarray]
    """Integers, each (n,), n > 0."""
    width: int | None = None
    """The length of a row, if they were given as a 2-D array."""

    @property
    def size(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    @functools.cached_property
    def largest(self) -> int:
        return max(int(piece.max()) for piece in self.pieces)

    def between(self, start: int, stop: int) -> list[np.ndarray]:
        """Views of the tokens [start, stop) of the concatenated pieces."""
        begins = np.cumsum([0, *map(len, self.pieces)]).tolist()
        cuts = (piece[max(start - begin, 0):max(stop - begin, 0)]
                for piece, begin in zip(self.pieces, begins, strict=False))
        return [cut for cut in cuts if len(cut)]


class Texts(Table):
    """A list of texts: a table of one column, which nobody has to choose."""

    __slots__ = ()


def in_chunks(array: np.ndarray, dtype: np.dtype) -> Iterator[bytes]:
    """The values as bytes of a type that holds them, a few megabytes at a time."""
    for start in range(0, len(array), IDS_AT_ONCE):
        yield array[start:start + IDS_AT_ONCE].astype(dtype).tobytes()


def given_part(value: Any, where: str) -> Ids | Table:
    """Texts or token ids, recognised by their types. Nothing is copied that is an array.

    where: the argument, for messages.

    Raises:
        InputError: neither texts nor token ids.
    """
    if _is(value, "datasets", "Dataset"):
        return dataset_table(where, value)
    if _is(value, "datasets", "DatasetDict"):
        raise InputError(f"{where}: is a DatasetDict; give its splits: data=it['train'], "
                         "validation=it['validation']")
    if isinstance(value, str):
        raise InputError(f"{where}: is one string; must be {ACCEPTED} (the name of a dataset or a "
                         "file goes into dataset=, one text into a list)")
    if hasattr(value, "__array__"):  # of torch too
        try:
            array = np.asarray(value)
        except (TypeError, RuntimeError, ValueError) as error:  # a tensor on a GPU
            raise InputError(f"{where}: cannot be read as an array: {one_line(error)}") from None
        if array.dtype.kind not in "OUT" or array.ndim != 1:
            return _ids([array], where)
        value = array.tolist()
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray):
        raise InputError(f"{where}: is of type {type(value).__name__}; must be {ACCEPTED}")
    found = list(value)
    if not found:
        raise InputError(f"{where}: is empty; must be {ACCEPTED}")
    if isinstance(found[0], str):
        for n, text in enumerate(found):
            if not isinstance(text, str):
                raise InputError(f"{where}[{n}]: is of type {type(text).__name__}; must be a text, "
                                 f"as {where}[0] is")
        return Texts(where, {"text": True}, lambda names: zip(found, strict=True))
    if isinstance(found[0], Integral | float):
        return _ids([_array(found, where)], where)
    return _ids([_array(each, f"{where}[{n}]") for n, each in enumerate(found)], where)


def _is(value: Any, module: str, name: str) -> bool:
    """Whether a value is of a class of a library, which is not imported for that."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _array(value: Any, where: str) -> np.ndarray:
    if isinstance(value, str) or not (hasattr(value, "__array__") or isinstance(value, Sequence)):
        raise InputError(f"{where}: is of type {type(value).__name__}; must be token ids or texts, "
                         "all of one kind")
    try:
        return np.asarray(value)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise InputError(f"{where}: cannot be read as an array: {one_line(error)}") from None


def _ids(arrays: list[np.ndarray], where: str) -> Ids:
    """Checked: integers of one stream, of the rows of one 2-D array, or of streams."""
    named = [where] if len(arrays) == 1 else [f"{where}[{n}]" for n in range(len(arrays))]
    for name, array in zip(named, arrays, strict=True):
        if array.dtype.kind not in "iu" and array.size:
            raise InputError(f"{name}: has values of type {array.dtype}; token ids must be "
                             "integers")
        if array.ndim != 1 and (array.ndim != 2 or len(arrays) > 1):
            raise InputError(f"{name}: has {array.ndim} dimensions; token ids must be a stream "
                             "(1-D) or sequences (2-D)")
        if array.size and (lowest := int(array.min())) < 0:
            raise InputError(f"{name}: has the token id {lowest}; must be >= 0")
        if array.size and (largest := int(array.max())) > LARGEST:
            raise InputError(f"{name}: has the token id {largest}; must be below 2^31")
    width = arrays[0].shape[1] if arrays[0].ndim == 2 else None
    pieces = [array.reshape(-1) for array in arrays if array.size]
    if not pieces:
        raise InputError(f"{where}: is empty; must be {ACCEPTED}")
    return Ids(where, pieces, width)
