"""Pickles that were made to do harm, as the ``data.pkl`` of an archive: by name of the attack."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator

__all__ = ["CANARY", "pickles", "tensor_of"]

#: A pickle whose code runs would make this file in the folder it is run in.
CANARY = "harmed"

_HEAD = b"\x80\x02"
_DICT = b"ccollections\nOrderedDict\n"
_TENSOR_V2 = b"ctorch._utils\n_rebuild_tensor_v2\n"
_COMMAND = b"touch " + CANARY.encode()


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _int(value: int) -> bytes:
    raw = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _storage(n_elements: int = 4, key: bytes = _text("0"), kind: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    return _tuple(_text("storage"), kind, key, _text("cpu"), _int(n_elements)) + b"Q"


def _tensor(shape: bytes, stride: bytes, offset: bytes = _int(0), storage: bytes | None = None) -> bytes:
    arguments = _tuple(storage or _storage(), offset, shape, stride, b"\x89", _DICT + b")R")
    return _TENSOR_V2 + arguments + b"R"


_GOOD = _tensor(_int(4) + b"\x85", _int(1) + b"\x85")


def _state(value: bytes) -> bytes:
    return _HEAD + b"}" + _text("w") + value + b"s."


def tensor_of(n_elements: int) -> bytes:
    """The pickle of a state dict with one vector of 32-bit floats. There is no harm in it."""
    size = _int(n_elements) + b"\x85"
    return _state(_tensor(size, _int(1) + b"\x85", storage=_storage(n_elements)))


def _call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + _tuple(*arguments) + b"R"


def pickles() -> Iterator[tuple[str, bytes]]:
    """All of them."""
    for name, value in {**_calls(), **_tricks(), **_bombs(), **_tensors()}.items():
        yield name, _state(value)
    yield from _whole().items()


def _calls() -> dict[str, bytes]:
    command, module = _text(_COMMAND.decode()), _text(f"open({CANARY!r},'w')")
    calls = {
        f"call of {home}.{name}": _call(home, name, *arguments)
        for home, name, *arguments in (
            ("os", "system", command),
            ("posix", "system", command),
            ("nt", "system", command),
            ("subprocess", "Popen", command),
            ("subprocess", "check_output", command),
            ("commands", "getoutput", command),
            ("pty", "spawn", command),
            ("runpy", "_run_code", module, b"}"),
            ("builtins", "eval", module),
            ("builtins", "exec", module),
            ("__builtin__", "eval", module),
            ("__builtin__", "apply", b"cos\nsystem\n", _tuple(command)),
            ("builtins", "compile", module, module, _text("exec")),
            ("builtins", "__import__", _text("os")),
            ("builtins", "getattr", b"cos\nsystem\n", _text("__call__")),
            ("builtins", "map", b"cos\nsystem\n", b"](" + command + b"e"),
            ("importlib", "import_module", _text("antigravity")),
            ("timeit", "timeit", module),
            ("bdb", "Bdb"),
            ("asyncio.unix_events", "_UnixSubprocessTransport._start", command),
            ("functools", "partial", b"cos\nsystem\n", command),
            ("operator", "methodcaller", _text("system"), command),
            ("operator", "attrgetter", _text("system.__call__")),
            ("types", "FunctionType", b"N"),
            ("marshal", "loads", _text("x")),
            ("pickle", "loads", b"C\x0b" + b"cos\nsystem\n"),
            ("dill._dill", "_load_type", _text("CodeType")),
            ("cloudpickle.cloudpickle", "_make_function", b"N"),
            ("joblib.numpy_pickle", "NumpyArrayWrapper"),
            ("copyreg", "_reconstructor", b"cos\nsystem\n", b"cbuiltins\nobject\n", b"N"),
            ("copy_reg", "__newobj__", b"cos\n_wrap_close\n"),
            ("socket", "create_connection", _tuple(_text("127.0.0.1"), _int(9))),
            ("webbrowser", "open", _text("http://127.0.0.1:9")),
            ("ctypes", "CDLL", _text("libc.so.6")),
            ("shutil", "rmtree", _text(".")),
            ("torch", "load", _text("x")),
            ("torch.serialization", "load", _text("x")),
            ("torch.hub", "load", _text("x/y"), _text("z")),
            ("torch.jit", "load", _text("x")),
            ("torch.storage", "_load_from_bytes", b"C\1x"),
            ("torch.utils.cpp_extension", "load_inline", _text("x")),
            ("torch._inductor.codecache", "PyCodeCache.load", module),
            ("torch.fx.graph_module", "reduce_graph_module", b"}", _text("")),
            ("torch.package.package_importer", "PackageImporter", _text("x")),
            ("torch", "from_file", _text("/etc/passwd"), b"\x89", _int(16)),
            ("torch", "UntypedStorage.from_file", _text("/etc/passwd"), b"\x89", _int(16)),
            ("torch._utils", "_rebuild_wrapper_subclass", b"N"),
            ("torch._utils", "_import_dotted_name", _text("os.system")),
            ("torch", "empty", _int(2**40)),
            ("torch", "zeros", _int(2**40)),
            ("numpy", "zeros", _int(2**40)),
            ("numpy", "load", _text("x")),
            ("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\n", _int(2**40) + b"\x85", b"C\1b"),
            ("numpy._core.multiarray", "scalar", b"cnumpy\ndtype\n", b"C\1b"),
            ("numpy.random._pickle", "__randomstate_ctor", _text("x")),
            ("transformers.utils", "import_utils.importlib"),
        )
    }
    calls["os.system as a tensor's rebuild function"] = _call(
        "torch._tensor", "_rebuild_from_type_v2", b"cos\nsystem\n", b"ctorch\nTensor\n", _tuple(command), b"}"
    )
    calls["a rebuild function that rebuilds itself"] = _call(
        "torch._tensor",
        "_rebuild_from_type_v2",
        b"ctorch._tensor\n_rebuild_from_type_v2\n",
        b"ctorch\nTensor\n",
        _tuple(b"N"),
        b"}",
    )
    return calls


def _tricks() -> dict[str, bytes]:
    command = _text(_COMMAND.decode())
    by_stack = _text("os") + _text("system") + b"\x93" + _tuple(command) + b"R"
    return {
        "a name from the stack": by_stack,
        "a name from the memo": _text("os") + b"q\1" + _text("system") + b"q\2h\1h\2\x93" + command + b"\x85R",
        "a name that is a number": _int(1) + _int(2) + b"\x93",
        "a name that is a tuple of names": _tuple(_text("os")) + _text("system") + b"\x93",
        "attributes of an allowed name": b"ccollections\nOrderedDict.__init__.__globals__\n",
        "attributes of an allowed name, from the stack": _text("collections")
        + _text("OrderedDict.__reduce__.__func__")
        + b"\x93",
        "a module by a path": b"ctorch/../os\nsystem\n",
        "a name with a line's end": _text("os\nsystem") + _text("x") + b"\x93",
        "a name that is not UTF-8": b"c\xff\xfe\nsystem\n",
        "a name without an end": b"c" + b"o" * 100_000,
        "an instance, by the old opcode": b"(" + command + b"ios\nsystem\n",
        "an object, by the old opcode": b"(cos\nsystem\n" + command + b"o",
        "a new object": b"cos\nsystem\n" + command + b"\x85\x81",
        "a new object with keywords": b"cos\nsystem\n)}\x92",
        "an extension's code": b"\x82\1",
        "an extension's code of two bytes": b"\x83\1\0",
        "an extension's code of four bytes": b"\x84\1\0\0\0",
        "a persistent id in a line": b"P0\n",
        "a persistent id that is no tuple": _text("storage") + b"Q",
        "a persistent id of another kind": _tuple(_text("module"), _text("os"), _text("x")) + b"Q",
        "a persistent id whose class is a function": _storage(kind=b"ctorch._utils\n_rebuild_tensor\n"),
        "a persistent id whose key is a path": _tensor(
            _int(4) + b"\x85", _int(1) + b"\x85", storage=_storage(key=_text("../../etc/passwd"))
        ),
        "a persistent id whose key is a tuple": _storage(key=_tuple(_text("0"))),
        "a buffer from elsewhere": b"\x97",
        "a buffer made read-only": b"\x97\x98",
        "a bytearray": b"\x96" + struct.pack("<Q", 2**40),
        "state that sets attributes": _GOOD + b"}" + _text("__class__") + b"cos\nsystem\nsb",
        "state for a function": b"ctorch._utils\n_rebuild_tensor_v2\n}b",
        "state for a list": b"]}b",
        "state of slots for a storage": _storage() + b"N}" + _text("key") + command + b"s\x86b",
        "items of a tuple": b")" + _text("k") + _text("v") + b"s",
        "items of a function": b"ctorch\nSize\n" + _text("k") + _text("v") + b"s",
        "elements of a string": _text("abc") + _text("d") + b"a",
        "elements of a function": b"ctorch\nSize\n(" + _text("d") + b"e",
        "members of a list": b"](" + _text("d") + b"\x90",
        "a call of a tuple": b"))R",
        "a call of a string": _text("system") + command + b"\x85R",
        "a call with a list of arguments": b"ctorch\nSize\n]R",
        "a call with a thousand arguments": b"ctorch\nSize\n(" + b"N" * 1000 + b"tR",
    }


def _bombs() -> dict[str, bytes]:
    doubled = _text("x") + b"\x85" + b"2\x86" * 60
    laughs = b"(" + b"".join(b"]q" + bytes([i]) + b"(" + (b"h" + bytes([i - 1])) * 10 + b"e0" for i in range(1, 40))
    return {
        "a tuple doubled sixty times, as a key": b"}" + doubled + b"Ns",
        "a billion laughs, as a shape": _tensor(b"]q\0(" + b"Ke0" + laughs + b"h\x27", b")"),
        "a memo entry beyond all memory": b"Nr\xff\xff\xff\xff0" + b"j\xfe\xff\xff\xff",
        "a memo entry that is not there": b"h\7",
        "a memo entry written twice": b"Nq\0q\0",
        "marks within marks": b"(" * 1_000_000,
        "a string of exabytes": b"\x8d" + b"\xff" * 8,
        "bytes of exabytes": b"\x8e" + b"\xff" * 8,
        "a string of gigabytes": b"X\xff\xff\xff\x7f",
        "a negative string": b"T\xff\xff\xff\xff",
        "a number of gigabytes": b"\x8b\xff\xff\xff\x7f",
        "a number of many digits": b"L" + b"9" * 1_000_000 + b"L\n",
        "a float of many digits": b"F" + b"9" * 1_000_000 + b"\n",
        "numbers that collide as keys": b"}(" + b"".join(_int(i * (2**61 - 1)) + b"N" for i in range(20_000)) + b"u",
        "one list copied many times": b"](" + b"N" * 10_000 + b"eq\1" + b"0ctorch\nSize\nq\2" + b"0h\2h\1\x85R" * 5_000,
    }


def _tensors() -> dict[str, bytes]:
    one = _int(1) + b"\x85"
    return {
        "a tensor of exabytes": _tensor(_int(2**62) + b"\x85", one),
        "a tensor of exabytes without strides": _tensor(_int(2**62) + b"\x85", _int(0) + b"\x85"),
        "a tensor of sizes that overflow": _tensor(_tuple(*[_int(2**32)] * 4), _tuple(*[_int(0)] * 4)),
        "a tensor beyond its storage": _tensor(_int(5) + b"\x85", one),
        "a tensor that begins beyond its storage": _tensor(one, one, offset=_int(4)),
        "a tensor that begins before its storage": _tensor(one, one, offset=_int(-1)),
        "a tensor with negative strides": _tensor(_int(4) + b"\x85", _int(-1) + b"\x85", offset=_int(3)),
        "a tensor of a negative size": _tensor(_int(-4) + b"\x85", one),
        "a tensor whose offset overflows": _tensor(one, one, offset=_int(2**64)),
        "a tensor whose stride overflows": _tensor(_int(2) + b"\x85", _int(2**63 - 1) + b"\x85"),
        "a tensor of a thousand dimensions": _tensor(_tuple(*[_int(1)] * 1000), _tuple(*[_int(1)] * 1000)),
        "a tensor with more strides than sizes": _tensor(one, _tuple(_int(1), _int(1))),
        "a tensor of fractions": _tensor(b"G" + struct.pack(">d", 4.0) + b"\x85", one),
        "a tensor of true": _tensor(b"\x88\x85", one),
        "a tensor on a string": _tensor(one, one, storage=_text("0")),
        "a tensor on nothing": _tensor(one, one, storage=b"N"),
        "a storage larger than its entry": _tensor(one, one, storage=_storage(2**40)),
        "a storage smaller than its entry": _tensor(one, one, storage=_storage(1)),
        "a storage of a negative size": _tensor(one, one, storage=_storage(-4)),
        "a storage that is not there": _tensor(one, one, storage=_storage(key=_text("1"))),
        "a storage of quantised numbers": _tensor(one, one, storage=_storage(kind=b"ctorch\nQInt8Storage\n")),
        "a sparse tensor of exabytes": _call(
            "torch._utils", "_rebuild_sparse_tensor", b"N", _tuple(_int(2**62), _int(2**62))
        ),
        "a tensor with hooks that are a call": _TENSOR_V2
        + _tuple(_storage(), _int(0), one, one, b"\x89", _call("os", "system", _text(_COMMAND.decode())))
        + b"R",
    }


def _whole() -> dict[str, bytes]:
    good = _state(_GOOD)
    return {
        "nothing at all": b"",
        "a pickle without an end": good[:-1],
        "a pickle that stops with two objects": good[:-1] + b"N.",
        "a pickle that stops within a mark": _HEAD + b"(}.",
        "a pickle that stops with nothing": _HEAD + b".",
        "an unknown protocol": b"\x80\x06" + good[2:],
        "a protocol of 255": b"\x80\xff" + good[2:],
        "a frame of exabytes": b"\x80\x04\x95" + b"\xff" * 8,
        "an opcode that is none": _HEAD + b"\xff.",
        "a text pickle": pickle.dumps({"a": 1}, protocol=0),
        "a pickle of one number": _HEAD + _int(1) + b".",
        "a pickle of an empty list": _HEAD + b"].",
        "a state dict that is not under its name": _HEAD + b"}" + _text("weights") + b"}" + _text("w") + _GOOD + b"ss.",
        "a tensor under a number": _HEAD + b"}" + _int(1) + _GOOD + b"s.",
        "a program of millions of steps": _HEAD + b"N0" * 9_000_000 + b"}.",
    }
