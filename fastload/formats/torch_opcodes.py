"""The opcodes that picklers write for state dicts, in protocols 1 to 5. All others are refused.

Each is a function of the machine and the position after the opcode, and returns the position of the next. They are
written against malice: see torch_pickle.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Any, Final

from fastload.formats.torch_machine import Machine, damaged
from fastload.formats.torch_records import RestartError
from fastload.formats.torch_stubs import OPAQUE, REBUILD_TENSOR_V2, ClassStub, InstanceStub, OrderedDictStub, Rebuild

__all__ = ["HANDLERS"]

_U16, _U32, _I32, _U64, _F64 = Struct("<H"), Struct("<I"), Struct("<i"), Struct("<Q"), Struct(">d")
_MAX_ARGUMENTS: Final = 256
_MAX_NAME: Final = 256
_MAX_DEPTH: Final = 1_000
# Instances are told apart by identity, which no pickle chooses.
_KEY_TYPES: Final = {str, int, float, bool, type(None), InstanceStub}


def _unknown(m: Machine, pos: int) -> int:
    m.take(pos, 0)
    raise m.unsafe(
        "the pickle uses an operation that no state dict needs",
        found=f"opcode {m.data[pos - 1]:#04x} at byte {pos - 1}",
    )


def _proto(m: Machine, pos: int) -> int:
    if m.data[pos] > 5:
        raise m.unsafe("the pickle is of an unknown protocol", expected="2 to 5", found=m.data[pos])
    return pos + 1


def _frame(_: Machine, pos: int) -> int:
    return pos + 8  # a hint for reading ahead; everything is in memory already


def _stop(m: Machine, pos: int) -> int:
    if pos > m.n_bytes or m.marks or len(m.stack) != 1:
        raise damaged(m.file, "it stops with unfinished objects")
    m.end = pos
    return -1


def _mark(m: Machine, pos: int) -> int:
    if len(m.marks) > _MAX_DEPTH:
        raise m.unsafe("the pickle is nested too deeply", expected=f"at most {_MAX_DEPTH} levels")
    m.marks.append(m.stack)
    m.stack = []
    return pos


def _constant(value: object) -> Callable[[Machine, int], int]:
    def push(m: Machine, pos: int) -> int:
        m.stack.append(value)
        return pos

    return push


def _number(struct: Struct) -> Callable[[Machine, int], int]:
    unpack, size = struct.unpack_from, struct.size

    def push(m: Machine, pos: int) -> int:
        m.stack.append(unpack(m.data, pos)[0])
        return pos + size

    return push


def _binint1(m: Machine, pos: int) -> int:
    m.stack.append(m.data[pos])
    return pos + 1


def _long1(m: Machine, pos: int) -> int:
    n = m.data[pos]
    m.stack.append(int.from_bytes(m.take(pos + 1, n), "little", signed=True))
    return pos + 1 + n


def _text_number(m: Machine, pos: int) -> int:
    # Protocol 1 writes booleans as I00 and I01, and large numbers as L...L.
    end = m.data.find(b"\n", pos, pos + 80)
    if end < 0:
        m.take(pos, 80)
        raise ValueError("a number without an end")
    text = m.data[pos:end]
    m.stack.append(text == b"01" if text in (b"00", b"01") else int(text.removesuffix(b"L")))
    return end + 1


def _string(length: Callable[[bytes, int], int], size: int, decode: bool) -> Callable[[Machine, int], int]:
    def push(m: Machine, pos: int) -> int:
        n = length(m.data, pos)
        raw = m.take(pos + size, n)
        m.stack.append(str(raw, "utf-8", "surrogatepass") if decode else OPAQUE)
        return pos + size + n

    return push


def _u8(data: bytes, pos: int) -> int:
    return data[pos]


def _u32(data: bytes, pos: int) -> int:
    n: int = _U32.unpack_from(data, pos)[0]
    return n


def _u64(data: bytes, pos: int) -> int:
    n: int = _U64.unpack_from(data, pos)[0]
    return n


def _tuple(m: Machine, pos: int) -> int:
    items = tuple(m.pop_mark())
    m.stack.append(items)
    return pos


def _tuple1(m: Machine, pos: int) -> int:
    m.stack[-1] = (m.stack[-1],)
    return pos


def _tuple2(m: Machine, pos: int) -> int:
    last = m.stack.pop()
    m.stack[-1] = (m.stack[-1], last)
    return pos


def _tuple3(m: Machine, pos: int) -> int:
    last = m.stack.pop()
    middle = m.stack.pop()
    m.stack[-1] = (m.stack[-1], middle, last)
    return pos


def _empty_list(m: Machine, pos: int) -> int:
    m.stack.append([])
    return pos


def _empty_dict(m: Machine, pos: int) -> int:
    m.stack.append({})
    return pos


def _append_to(m: Machine, items: list[Any]) -> None:
    target = m.stack[-1]
    if type(target) is not list:
        raise m.unsafe("the pickle appends to something that is not a list", found=type(target).__name__)
    target.extend(items)


def _append(m: Machine, pos: int) -> int:
    item = m.stack.pop()
    _append_to(m, [item])
    return pos


def _appends(m: Machine, pos: int) -> int:
    _append_to(m, m.pop_mark())
    return pos


def _set_items(m: Machine, items: list[Any]) -> None:
    target = m.stack[-1]
    if type(target) is not dict and type(target) is not OrderedDictStub:
        raise m.unsafe("the pickle sets items of something that is not a dict", found=type(target).__name__)
    keys = items[::2]
    for kind in set(map(type, keys)):
        if kind not in _KEY_TYPES:
            raise m.unsafe("a dict has a key of an unusual type", expected="a string or a number", found=kind.__name__)
        if kind is int and any(key.bit_length() > 64 for key in keys if type(key) is int):
            raise m.unsafe("a dict has a key that is a very large number")
    target.update(zip(keys, items[1::2], strict=True))


def _setitem(m: Machine, pos: int) -> int:
    value = m.stack.pop()
    key = m.stack.pop()
    _set_items(m, [key, value])
    return pos


def _setitems(m: Machine, pos: int) -> int:
    _set_items(m, m.pop_mark())
    return pos


def _additems(m: Machine, pos: int) -> int:
    # Sets are passed over, not made: their elements would have to be hashed.
    m.pop_mark()
    if m.stack[-1] is not OPAQUE:
        raise m.unsafe("the pickle adds to something that is not a set", found=type(m.stack[-1]).__name__)
    return pos


def _frozenset(m: Machine, pos: int) -> int:
    m.pop_mark()
    m.stack.append(OPAQUE)
    return pos


# ---- the memo ----


def _put(m: Machine, index: int, end: int) -> None:
    # Picklers never write an entry twice. That none changes is what lets records trust what was fetched before.
    if index in m.memo:
        m.take(end, 0)  # an index that is not all there reads as zeros
        raise m.unsafe("the pickle writes one memo entry twice", found=index)
    m.memo[index] = m.stack[-1]


def _binput(m: Machine, pos: int) -> int:
    _put(m, m.data[pos], pos + 1)
    return pos + 1


def _long_binput(m: Machine, pos: int) -> int:
    _put(m, _U32.unpack_from(m.data, pos)[0], pos + 4)
    return pos + 4


def _memoize(m: Machine, pos: int) -> int:
    if m.records and m.records.any_lost:
        raise RestartError  # the number of entries is not known
    _put(m, len(m.memo), pos)
    return pos


def _binget(m: Machine, pos: int) -> int:
    return _get(m, m.data[pos], pos - 1, pos + 1)


def _long_binget(m: Machine, pos: int) -> int:
    return _get(m, _U32.unpack_from(m.data, pos)[0], pos - 1, pos + 4)


def _get(m: Machine, index: int, start: int, end: int) -> int:
    value = m.memo.get(index, m)
    if value is REBUILD_TENSOR_V2 and m.records:
        taken = m.records.at_fetch(start)
        if taken:
            m.stack.append(taken[0])
            return taken[1]
    elif value is m:
        m.take(end, 0)
        if not m.records:
            raise KeyError(f"memo entry {index}")
        value = m.records.recall(index)
    m.stack.append(value)
    return end


def _binunicode(m: Machine, pos: int) -> int:
    n = _U32.unpack_from(m.data, pos)[0]
    name = str(m.take(pos + 4, n), "utf-8", "surrogatepass")
    m.stack.append(name)
    pos += 4 + n
    return m.records.after_name(name, pos, m.stack) if m.records else pos


# ---- what names and calls things ----


def _global(m: Machine, pos: int) -> int:
    names = []
    for _ in range(2):
        end = m.data.find(b"\n", pos, pos + _MAX_NAME)
        if end < 0:
            m.take(pos, _MAX_NAME)
            raise m.unsafe("the pickle asks for something with a very long name", found=repr(m.data[pos : pos + 80]))
        names.append(str(m.data[pos:end], "utf-8"))
        pos = end + 1
    _find(m, *names)
    return pos


def _stack_global(m: Machine, pos: int) -> int:
    name, module = m.stack.pop(), m.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise m.unsafe(
            "the pickle asks for something without a name", found=f"{type(module).__name__}, {type(name).__name__}"
        )
    _find(m, module, name)
    return pos


def _find(m: Machine, module: str, name: str) -> None:
    # The pair is looked up as it stands: neither dots in the name nor attributes of anything are followed.
    value = m.names.get((module, name))
    if value is None:
        raise m.unsafe(
            "the pickle asks for code or an object that no state dict needs",
            expected="tensors, parameters, storages, OrderedDict and plain values",
            found=f"{module}.{name}"[:200],
        )
    m.stack.append(value)


def _reduce(m: Machine, pos: int) -> int:
    arguments = m.stack.pop()
    function = m.stack[-1]
    if type(function) is not Rebuild:
        raise m.unsafe("the pickle calls something that cannot be called", found=type(function).__name__)
    if type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS:
        raise m.unsafe("the pickle calls something with unusual arguments", found=function.name)
    m.stack[-1] = function.make(*arguments)
    return pos


def _newobj(m: Machine, pos: int) -> int:
    arguments = m.stack.pop()
    kind = m.stack.pop()
    if type(kind) is not ClassStub or arguments != ():
        raise m.unsafe("the pickle makes an object that no state dict needs", found=f"NEWOBJ at byte {pos - 1}")
    m.stack.append(InstanceStub(kind.name))
    return pos


def _build(m: Machine, pos: int) -> int:
    state = m.stack.pop()
    target = m.stack[-1]
    if type(target) is InstanceStub and target.state is None:
        target.state = state
        return pos
    # State dicts carry `_metadata` (versions of modules) as the state of their OrderedDict. No reader needs it.
    if type(target) is not OrderedDictStub:
        raise m.unsafe("the pickle sets the state of something that has none", found=type(target).__name__)
    return pos


def _binpersid(m: Machine, pos: int) -> int:
    m.stack[-1] = m.persistent_load(m.stack[-1])
    return pos


_TABLE: Final[dict[bytes, Callable[[Machine, int], int]]] = {
    b"\x80": _proto,
    b"\x95": _frame,
    b".": _stop,
    b"(": _mark,
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b"K": _binint1,
    b"M": _number(_U16),
    b"J": _number(_I32),
    b"G": _number(_F64),
    b"\x8a": _long1,
    b"I": _text_number,
    b"L": _text_number,
    b"X": _binunicode,
    b"\x8c": _string(_u8, 1, decode=True),
    b"\x8d": _string(_u64, 8, decode=True),
    # Strings of Python 2, which held the names of tensors.
    b"U": _string(_u8, 1, decode=True),
    b"T": _string(_u32, 4, decode=True),
    b"C": _string(_u8, 1, decode=False),
    b"B": _string(_u32, 4, decode=False),
    b"\x8e": _string(_u64, 8, decode=False),
    b")": _constant(()),
    b"t": _tuple,
    b"\x85": _tuple1,
    b"\x86": _tuple2,
    b"\x87": _tuple3,
    b"]": _empty_list,
    b"a": _append,
    b"e": _appends,
    b"}": _empty_dict,
    b"s": _setitem,
    b"u": _setitems,
    b"\x8f": _constant(OPAQUE),
    b"\x90": _additems,
    b"\x91": _frozenset,
    b"q": _binput,
    b"r": _long_binput,
    b"\x94": _memoize,
    b"h": _binget,
    b"j": _long_binget,
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _reduce,
    b"\x81": _newobj,
    b"b": _build,
    b"Q": _binpersid,
}
HANDLERS: Final = tuple(_TABLE.get(bytes((code,)), _unknown) for code in range(256))
