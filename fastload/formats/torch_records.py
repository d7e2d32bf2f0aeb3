"""Tensors of a torch pickle, each taken in one step.

Nearly all of a pickled state dict is one form over and over: a name, and some twenty-five opcodes that fetch the
rebuild function, describe a storage, a shape and strides, and call the function. One regular expression takes such a
record as a whole; parts of it that recur (shapes, the function, the storage class) are decoded once. Step by step the
same takes ten times as long. A record that is not exactly of this form is left to the machine in torch_pickle, which
is the definition of what the opcodes mean.

The form is that of ``torch.save`` with its default pickle protocol, 2, in a zip archive.
"""

from __future__ import annotations

import re
from struct import Struct
from typing import Any, Final

from fastload.formats.torch_stubs import ORDERED_DICT, REBUILD_TENSOR_V2, StorageType, TensorStub

__all__ = ["Records", "RestartError"]

_PUT, _GET, _INT = rb"(?:q.|r.{4})", rb"(?:h.|j.{4})", rb"(?:K.|M..|J.{4})"
_INTS = rb"(?:\)|I\x85|II\x86|III\x87|\(I{4,8}t)".replace(b"I", _INT)
# The groups: what the fetches fetch (1), the key of the storage (2, 3) and the memo entry for it (4), its size (5),
# offset and shape (6), strides (7), requires_grad and OrderedDict() (8), the memo entry for the tensor (9). The other
# memo entries (PUT) are never used.
_TENSOR: Final = (
    rb"(GET\(\(GETGETX)(.)\0\0\0([0-9]{1,20})(PUT)(GETINTt)PUTQ(INT@)PUT?(@)PUT?([\x88\x89]GET\)R)PUTtPUTR(PUT)".replace(
        b"@", _INTS
    )
    .replace(b"INT", _INT)
    .replace(b"GET", _GET)
)
_RECORD: Final = re.compile(_TENSOR.replace(b"PUT", _PUT), re.DOTALL)
_RECORD_AFTER_NAME: Final = re.compile((b"PUT" + _TENSOR).replace(b"PUT", _PUT), re.DOTALL)
_BINUNICODE: Final = ord("X")
_BININT: Final = ord("J")
_SIZES: Final = dict(zip(b"qrhjKMJ", (1, 4, 1, 4, 1, 2, 4), strict=True))
_U32: Final = Struct("<I")
_new: Final = tuple.__new__  # a named tuple in half the time of calling its class


class RestartError(Exception):
    """The pickle uses a memo entry that a record would have made: start again, without records."""


class Records:
    """Takes tensor records out of one pickle, beside the machine that interprets it.

    Args:
        data: the pickle.
        memo: the machine's memo. Entries in it never change, which is why what was looked at once can be trusted.
    """

    __slots__ = ("_data", "_known", "_memo", "_names", "_positions", "any_lost")

    def __init__(self, data: bytes, memo: dict[int, Any]) -> None:
        self._data = data
        self._memo = memo
        self._known: dict[bytes, Any] = {}  # parts of records that have been looked at, and what they mean
        # Records taken: their positions, and the names before them. Two lists, since every tuple that is kept is one
        # more for the garbage collector to look at while a file is read.
        self._positions: list[int] = []
        self._names: list[str | None] = []
        self.any_lost = False  # memo entries of records that were not made

    def after_name(self, name: str, pos: int, stack: list[Any]) -> int:
        """Push tensors, and the names between them, for as long as they come in the usual form.

        Args:
            name: the string that was pushed last.
            pos: the position after it.
            stack: what to push to.

        Returns:
            the position of the first opcode that was not taken.
        """
        data, push, take = self._data, stack.append, self._take
        add_position, add_name = self._positions.append, self._names.append
        match = _RECORD_AFTER_NAME.match(data, pos)
        while match:
            tensor = take(match)
            if tensor is None:
                break
            self.any_lost = True
            push(tensor)
            add_position(pos)
            add_name(name)
            pos = match.end()
            if data[pos] != _BINUNICODE:
                break
            end = pos + 5 + _U32.unpack_from(data, pos + 1)[0]
            match = _RECORD_AFTER_NAME.match(data, end)
            if match:
                name = str(data[pos + 5 : end], "utf-8", "surrogatepass")
                push(name)
                pos = end
        return pos

    def at_fetch(self, pos: int) -> tuple[TensorStub, int] | None:
        """The tensor that begins with the memo fetch at `pos`, and the position after it; None where there is none."""
        match = _RECORD.match(self._data, pos)
        tensor = match and self._take(match)
        if match is None or tensor is None:
            return None
        self.any_lost = True
        self._positions.append(pos)
        self._names.append(None)
        return tensor, match.end()

    def recall(self, index: int) -> object:
        """The value of a memo entry that is not in the memo, such as the key of a storage that tensors share.

        Raises:
            RestartError: it may be one of those that were left out.
            KeyError: there never was one.
        """
        memo, data = self._memo, self._data
        for start, name in zip(self._positions, self._names, strict=True):
            match = (_RECORD if name is None else _RECORD_AFTER_NAME).match(data, start)
            tensor = match and self._take(match)
            if match and tensor:
                key_put, tensor_put = _indexes(match[4] + match[9])
                memo.setdefault(key_put, tensor.key)
                memo.setdefault(tensor_put, tensor)
            if name is not None:
                memo.setdefault(_indexes(data[start : start + 5])[0], name)
        self._positions.clear()
        self._names.clear()
        if index in memo:
            return memo[index]
        if self.any_lost:
            raise RestartError
        raise KeyError(f"memo entry {index}")

    def _take(self, match: re.Match[bytes]) -> TensorStub | None:
        head, n_key, key, size, place, stride, tail = match.group(1, 2, 3, 5, 6, 7, 8)
        known = self._known
        try:
            known[tail]
            n_elements = known[size]
            offset, shape = known[place]
            strides = known[stride]
            kind = known[head]
        except KeyError:
            return self._take(match) if self._learn(head, size, place, stride, tail) else None
        if n_key[0] != len(key) or len(shape) != len(strides):
            return None
        return _new(TensorStub, (key.decode("ascii"), kind, n_elements, offset, shape, strides, None))

    def _learn(self, head: bytes, size: bytes, place: bytes, stride: bytes, tail: bytes) -> bool:
        """Look at parts of a record that have not been met before; False where one is not what it should be.

        No two of the parts can be the same bytes and mean different things: opcodes and their arguments are a prefix
        code, and the first or the last opcode of each part is its own.
        """
        function, word, kind = map(self._memo.get, _indexes(head))
        location, ordered_dict = map(self._memo.get, _indexes(size) + _indexes(tail))
        if function is not REBUILD_TENSOR_V2 or word != "storage" or type(kind) is not StorageType:
            return False
        if type(location) is not str or ordered_dict is not ORDERED_DICT:
            return False
        (n_elements,), (offset, *shape), strides = _integers(size), _integers(place), _integers(stride)
        if min(n_elements, offset, *shape, *strides) < 0:
            return False
        self._known |= {head: kind, size: n_elements, place: (offset, tuple(shape)), stride: tuple(strides), tail: True}
        return True


def _indexes(raw: bytes) -> list[int]:
    """The memo entries that opcodes put and get."""
    return [value for op, value in _arguments(raw) if op in b"qrhj"]


def _integers(raw: bytes) -> list[int]:
    """The numbers that opcodes push."""
    return [value for op, value in _arguments(raw) if op in b"KMJ"]


def _arguments(raw: bytes) -> list[tuple[int, int]]:
    found, pos = [], 0
    while pos < len(raw):
        op, size = raw[pos], _SIZES.get(raw[pos], 0)
        pos += 1 + size
        found.append((op, int.from_bytes(raw[pos - size : pos], "little", signed=op == _BININT)))
    return found
