"""Mutations that keep the grammar of an input, so that what is behind a parser is reached too."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Callable
from random import Random

__all__ = ["MUTATORS", "mutate_json"]

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|\w+|\s+|.', re.DOTALL)
_NUMBERS = ["-0", "0", "1", "2", "-1", "00", "1.0", "6e1", "1e999", "-0.0", "60", "64", "9" * 20, "9" * 400, "9" * 5000]
_NUMBERS += [str(2**62), str(2**63), str(2**64 - 1), str(2**64)]
_NAMES = [
    '"dtype"',
    '"shape"',
    '"data_offsets"',
    '"__metadata__"',
    '"weight_map"',
    '"metadata"',
    '"renames"',
    '"version"',
]
_TEXTS = [
    '"a"',
    '"b"',
    '"U8"',
    '"F4"',
    '"F6_E3M2"',
    '"C128"',
    '""',
    '"../a"',
    '"/a"',
    '"a/b"',
    '"a\\\\b"',
    '"./a"',
    '".."',
]
_TEXTS += ['"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\\x"', '"\\u00"', '"\x01"', '"\x7f"', '"dt\\u0079pe"', "'a'"]
_OTHERS = ["true", "null", "NaN", "-Infinity", "[]", "{}", "[" * 130 + "]" * 130, "[" * 120 + "]" * 120, "[" * 100_000]
_OTHERS += [
    *'{}[],:"',
    "\ufeff",
    "\0",
    "\v",
    "\xa0",
    "\n",
    " ",
    "//",
    '"x":1,',
    '"x":1e999,',
    '"x":"\\udc00",',
    ',"x":-0',
]
_ODD_JSON = _NUMBERS + _NAMES + _TEXTS + _OTHERS

_ODD_OPCODES = [bytes([code]) for code in b"(.)]}0NR\x81\x82bacdehijklopqrstu\x85\x86\x87\x88\x89\x8f\x90\x93\x94Q2"]
_ODD_OPCODES += [b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n", b"ctorch\nSize\n", b"cos\nsystem\n"]
_ODD_OPCODES += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"cbuiltins\nset\n"]
_ODD_OPCODES += [
    b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"X\1\0\0\0w",
    b"\x8c\1w",
    b"U\1w",
    b"C\1w",
    b"K\1",
    b"M\0\1",
]
_ODD_OPCODES += [
    b"J\xff\xff\xff\x7f",
    b"J\xff\xff\xff\xff",
    b"\x8a\x09" + b"\xff" * 8 + b"\0",
    b"G" + bytes(8),
    b"I01\n",
]
_ODD_OPCODES += [b"h\0", b"h\1", b"q\0", b"q\xc8", b"j\xff\xff\xff\xff", b"r\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8]
_ODD_OPCODES += [b"\x95" + b"\xff" * 8, b"X\xff\xff\xff\xff", b"T\xff\xff\xff\x7f", b"\x80\6", b"\x80\2"]


def _mutate_list(parts: list[object], odd: list[object], chance: Random) -> None:
    """Replace, leave out, add, repeat or exchange some of the parts, in place."""
    for _ in range(chance.randint(1, 3)):
        at, other = (chance.randrange(len(parts)) if parts else 0 for _ in range(2))
        match chance.randrange(6):
            case 0 | 1:
                parts[at : at + 1] = [chance.choice(odd)]
            case 2:
                parts.insert(at, chance.choice(odd))
            case 3:
                del parts[at : at + chance.randint(1, 3)]
            case 4:
                parts[at:at] = parts[other : other + chance.randint(1, 16)]
            case _ if parts:
                parts[at], parts[other] = parts[other], parts[at]


def mutate_json(data: bytes, chance: Random) -> bytes:
    """Mutate the tokens of a JSON text."""
    tokens: list[object] = list(_TOKEN.findall(data.decode("utf-8", "replace")))
    _mutate_list(tokens, list(_ODD_JSON), chance)
    return "".join(map(str, tokens)).encode()


def mutate_pickle(data: bytes, chance: Random) -> bytes:
    """Mutate the opcodes of a pickle, each with its argument."""
    places = []
    try:
        places = [place for _, _, place in pickletools.genops(data) if place is not None]
    except Exception:  # noqa: BLE001  what was found until then is what there is
        places = places or list(range(0, len(data), 3))
    parts: list[object] = [data[begin:end] for begin, end in zip([0, *places], [*places, len(data)], strict=True)]
    _mutate_list(parts, list(_ODD_OPCODES), chance)
    return b"".join(part for part in parts if isinstance(part, bytes))


def mutate_archive(data: bytes, chance: Random) -> bytes:
    """Mutate the pickle of an archive, or which entries there are, and write the archive anew."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(name, archive.read(name)) for name in archive.namelist()]
    except Exception:  # noqa: BLE001  it is no archive (any more)
        return mutate_pickle(data, chance)
    entries = [
        (name, mutate_pickle(content, chance) if name.endswith(".pkl") else content) for name, content in entries
    ]
    if chance.random() < 0.2:
        entries.append((chance.choice(["archive/data/0", "archive/byteorder", "x/data.pkl", "../data/0"]), b"big"))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, content in dict(entries).items():
            archive.writestr(name, content)
    return stream.getvalue()


#: By target; the others have no grammar that is worth to be kept.
MUTATORS: dict[str, Callable[[bytes, Random], bytes]] = {
    "safetensors_header": mutate_json,
    "shard_index": mutate_json,
    "journal": mutate_json,
    "pickle_machine": mutate_pickle,
    "torch_file": mutate_archive,
}
