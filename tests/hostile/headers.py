"""Files of safetensors whose headers lie: by name of the lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

__all__ = ["headers"]

_ENTRY = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
_HUGE = 2**64 - 1


def _file(header: str | bytes, data: bytes = b"ab") -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + data


def _entry(dtype: object = "U8", shape: object = (2,), offsets: object = (0, 2), **more: object) -> str:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}})


def headers() -> Iterator[tuple[str, bytes]]:
    """All of them."""
    yield from _lengths()
    for name, header in {**_texts(), **_values()}.items():
        yield name, _file(header)
    yield from _layouts()


def _lengths() -> Iterator[tuple[str, bytes]]:
    good = _file(f'{{"a":{_ENTRY}}}')
    yield "an empty file", b""
    yield "half a length", good[:4]
    yield "a length and nothing else", good[:8]
    yield "a length of zero", bytes(8) + good[8:]
    yield "half a header", good[:20]
    yield "data that ends early", good[:-1]
    yield "data that goes on", good + b"c"
    yield "only zeros", bytes(1000)
    yield "only ones", b"\xff" * 1000
    for name, length in {
        "a length that is one short": len(good) - 11,
        "a length that takes the data in": len(good) - 8,
        "a length beyond the file": len(good) - 7,
        "a length beyond the format": 100_000_001,
        "a length of four gigabytes": 2**32,
        "a negative length": _HUGE,
        "a length that wraps around": _HUGE - 7,
        "a length in the other byte order": int.from_bytes(good[:8], "big"),
    }.items():
        yield name, struct.pack("<Q", length) + good[8:]


def _texts() -> dict[str, str | bytes]:
    good = f'{{"a":{_ENTRY}}}'
    return {
        "spaces": " " * 100,
        "an array": "[]",
        "a string": '"a"',
        "null": "null",
        "a number": "7",
        "HTML": "<html><body>Sign in</body></html>",
        "a pointer of Git LFS": "version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "braces that do not close": '{"a":{',
        "two objects": good + good,
        "text after the object": good + "x",
        "zeros after the object": good + "\0\0",
        "a trailing comma": good[:-1] + ",}",
        "a comment": good[:-1] + "/* */}",
        "single quotes": good.replace('"', "'"),
        "a byte order mark": b"\xef\xbb\xbf" + good.encode(),
        "UTF-16": good.encode("utf-16"),
        "UTF-32": good.encode("utf-32-le"),
        "Latin-1": good.replace("a", "\xe9", 1).encode("latin-1"),
        "overlong UTF-8": good.encode().replace(b'"a"', b'"\xc1\xa1"'),
        "half characters in UTF-8": good.encode().replace(b'"a"', b'"\xed\xa0\x80"'),
        "a cut character": good.encode().replace(b'"a"', b'"\xf0\x9f\x98"'),
        "half a character in a key": good.replace('"a"', '"\\ud800"'),
        "half a character in a field": _entry(x=0).replace("0}", '"\\udc00"}'),
        "half a character in the metadata": f'{{"__metadata__":{{"x":"\\ud800"}},"a":{_ENTRY}}}',
        "a control character in a key": good.replace('"a"', '"\n"'),
        "an unknown escape": good.replace('"a"', '"\\a"'),
        "whitespace before the brace": " " + good,
        "whitespace that JSON does not know": good + "\v\f",
        "arrays nested too deeply": '{"a":' + "[" * 1_000_000,
        "objects nested too deeply": '{"a":' * 200_000,
        "arrays nested too deeply in a field": _entry(x=0).replace("0}", "[" * 200 + "]" * 200 + "}"),
        "arrays nested too deeply in the metadata": '{"__metadata__":' + "[" * 1_000_000,
        "a key twice": f'{{"a":{_ENTRY},"a":{_ENTRY}}}',
        "a key twice, once escaped": f'{{"a":{_ENTRY},"\\u0061":{_ENTRY}}}',
        "a field twice": good.replace('"dtype":"U8"', '"dtype":"U8","dtype":"I8"'),
        "an unknown field twice": good.replace('"dtype":"U8"', '"dtype":"U8","x":1,"x":2'),
        "the metadata twice": f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{_ENTRY}}}',
        "a text of the metadata twice": f'{{"__metadata__":{{"x":"","x":""}},"a":{_ENTRY}}}',
        "metadata that are a list": f'{{"__metadata__":[],"a":{_ENTRY}}}',
        "metadata that are a text": f'{{"__metadata__":"pt","a":{_ENTRY}}}',
        "metadata of numbers": f'{{"__metadata__":{{"x":1}},"a":{_ENTRY}}}',
        "metadata of objects": f'{{"__metadata__":{{"x":{{}}}},"a":{_ENTRY}}}',
        "metadata of null": f'{{"__metadata__":{{"x":null}},"a":{_ENTRY}}}',
        "metadata that are a tensor": f'{{"__metadata__":{_ENTRY}}}',
    }


def _values() -> dict[str, str]:
    plain = _entry()
    shapes = {
        "negative": "[-2]",
        "minus zero": "[2,1,-0]",
        "a fraction": "[2.0]",
        "an exponent": "[2e0]",
        "NaN": "[NaN]",
        "infinite": "[Infinity]",
        "beyond a double": "[1e999]",
        "true": "[true,2]",
        "a text": '["2"]',
        "null": "[null]",
        "nested": "[[2]]",
        "an object": '{"0":2}',
        "a number": "2",
        "hexadecimal": "[0x2]",
        "with leading zeros": "[02]",
        "with a plus": "[+2]",
        "with underscores": "[1_0]",
        "in other digits": "[\u0662]",
        "with a hole": "[2,,1]",
        "beyond 64 bits": f"[{2**64 + 2}]",
        "of thousands of digits": f"[{'9' * 5000}]",
        "whose product overflows 32 bits": f"[{2**31},2]",
        "whose product wraps around to the size": f"[{2**63 + 1},2]",
        "whose product overflows 64 bits": f"[{2**33},{2**33}]",
        "whose product overflows but for a zero": f"[{2**63},{2**63},0]",
        "of a million dimensions": "[" + "2," * 1_000_000 + "2]",
        "of a million dimensions of one": "[" + "1," * 100_000 + "3]",
        "one too large": "[3]",
        "one too small": "[1]",
        "empty, with bytes": "[0]",
    }
    offsets = {
        "negative": "[-2,0]",
        "minus zero": "[-0,2]",
        "the wrong way round": "[2,0]",
        "one": "[2]",
        "three": "[0,2,2]",
        "fractions": "[0.0,2.0]",
        "true and false": "[false,true]",
        "texts": '["0","2"]',
        "null": "null",
        "an object": '{"begin":0,"end":2}',
        "beyond 64 bits": f"[{2**64},{2**64 + 2}]",
        "beyond the file": "[1000000000000,1000000000002]",
        "at the end of 64 bits": f"[{_HUGE - 2},{_HUGE}]",
        "behind a hole": "[1,3]",
    }
    types = ('"U7"', '"u8"', '"uint8"', '"C128"', '""', "8", "null", "true", '["U8"]', '{"U8":null}', '"\\u0000"')
    return {
        **{f"a shape that is {name}": plain.replace("[2]", value) for name, value in shapes.items()},
        **{f"offsets that are {name}": plain.replace("[0, 2]", value) for name, value in offsets.items()},
        **{f"the type {value}": plain.replace('"U8"', value) for value in types},
        **{
            f"the type {code} for another's bytes": _entry(code)
            for code in ("F32", "F64", "BF16", "I64", "F4", "F6_E2M3")
        },
        **{f"no {field}": plain.replace(f'"{field}"', '"other"') for field in ("dtype", "shape", "data_offsets")},
        **{f"an entry that is {value}": f'{{"a":{value}}}' for value in ("null", "3", '"U8"', "[]", "{}", "true")},
        "an entry that is a list": '{"a":["U8",[2],[0,2]]}',
        "fields in capitals": plain.replace("dtype", "DTYPE"),
        "a field beyond a double": _entry(x=0).replace("0}", "1e999}"),
        "a field of hundreds of digits": _entry(x=0).replace("0}", "9" * 400 + "}"),
        "a field of NaN": _entry(x=0).replace("0}", "NaN}"),
        "half a byte": _entry("F4", [3], [0, 2]),
        "four-bit floats in odd rows": _entry("F4", [4, 1]),
    }


def _layouts() -> Iterator[tuple[str, bytes]]:
    for name, places in {
        "tensors that overlap": [(0, 2), (1, 3)],
        "two tensors in one place": [(0, 2), (0, 2)],
        "a tensor within another": [(0, 4), (1, 3)],
        "a hole between tensors": [(0, 2), (3, 5)],
        "a hole before the first": [(2, 4)],
        "out of order, with a hole": [(4, 6), (0, 2)],
        "out of order, overlapping": [(1, 3), (0, 2)],
        "an empty tensor within another": [(0, 4), (2, 2)],
        "an empty tensor beyond the end": [(0, 2), (9, 9)],
        "the last tensor beyond the end": [(0, 2), (2, 12)],
    }.items():
        rows = {
            f"t{i}": {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
            for i, (begin, end) in enumerate(places)
        }
        n_data = 6 if name.endswith("the end") else max(end for _, end in places)
        yield name, _file(json.dumps(rows), bytes(n_data))
    many = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]} for i in range(100_000)}
    yield "a hundred thousand tensors in one place", _file(json.dumps(many), b"a")
    yield "data and no tensors", _file("{}", b"abc")
