"""What fuzzing starts from: small valid files of every kind, by target."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator

import torch
from safetensors.torch import save

from fastload.dtypes import DTYPES
from fastload.formats.index import encode_index
from fastload.sources.journal import Journal, encode_journal

__all__ = ["WORDS", "seeds"]

# What inputs are made of, told to the fuzzer.
WORDS = [
    *(f'"{code}"' for code in DTYPES),
    *(
        '"dtype":',
        '"shape":',
        '"data_offsets":',
        '"__metadata__":',
        '"format":"pt"',
        "null",
        "true",
        "NaN",
        "1e999",
        "-0",
        "[[[[[",
    ),
    *('"weight_map":', '"metadata":', '"total_size":', "../", "..\\\\", "model.safetensors", "\\ud800", "\\u0000"),
    *('"version":1', '"renames":', '"superseded":', ".fastload-tmp-"),
    *("collections\nOrderedDict\n", "torch\nFloatStorage\n", "torch._utils\n_rebuild_tensor_v2\n", "torch\nSize\n"),
    *(
        "torch._utils\n_rebuild_parameter\n",
        "torch._tensor\n_rebuild_from_type_v2\n",
        "builtins\nset\n",
        "storage",
        "cpu",
    ),
    *("PK\3\4", "PK\1\2", "PK\5\6", "PK\6\6", "PK\6\7", "archive/data.pkl", "archive/data/0", "archive/byteorder"),
]


def _tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(6.0).reshape(2, 3)
    return {"a.weight": base, "a.bias": base[1], "b": torch.ones(2, dtype=torch.bool), "c": torch.tensor(1).half()}


def _saved(**options: object) -> bytes:
    stream = io.BytesIO()
    torch.save(_tensors(), stream, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def _repacked(data: bytes, method: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", method) as new:
        for name in old.namelist():
            if not name.endswith((".format_version", ".storage_alignment", "serialization_id")):
                new.writestr("archive" + name[name.index("/") :], old.read(name))
    return stream.getvalue()


def _tar() -> bytes:
    kind = pickle.dumps((1, "cpu", torch.FloatStorage), 2)
    storages = pickle.dumps(1, 2) + kind + struct.pack("<q", 4) + bytes(16) + pickle.dumps([], 2)
    tensors = pickle.dumps(1, 2) + pickle.dumps((7, 1, torch.FloatTensor), 2) + struct.pack("<iiqqq", 1, 0, 4, 1, 0)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in {"pickle": b"\x80\x02}U\1wK\x07Qs.", "storages": storages, "tensors": tensors}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue().rstrip(b"\0") + bytes(1024)


def seeds(target: str) -> Iterator[bytes]:
    """Valid inputs of a target."""
    apart = {key: tensor.clone() for key, tensor in _tensors().items()}
    others = {"x": torch.empty(0, 4), "y": torch.ones(2).bfloat16()}
    files = [save(apart, {"format": "pt"}), save({}), save(others)]
    if target == "safetensors_file":
        yield from files
    elif target == "safetensors_header":
        for file in files:
            yield file[8 : 8 + int.from_bytes(file[:8], "little")]
        for code, dtype in DTYPES.items():
            yield json.dumps({"k": {"dtype": code, "shape": [8], "data_offsets": [0, dtype.n_bits]}}).encode()
    elif target == "shard_index":
        yield encode_index({"a": "model-1.safetensors", "b": "below/model-2.safetensors"}, 3, 12).encode()
        yield b'{"weight_map": {"a": "x.bin"}}'
    elif target == "journal":
        yield encode_journal(Journal({"config.json": ".fastload-tmp-1", "model.bin": "t"}, ("model-1.bin",))).encode()
    elif target == "pickle_machine":
        for protocol in (1, 2, 4):
            with zipfile.ZipFile(io.BytesIO(_saved(pickle_protocol=max(protocol, 2)))) as archive:
                yield archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
            yield pickle.dumps([{"a": (1, 2.5, None, "text", True)}, {1, 2}, OrderedDict(b=1), 2**70], protocol)
    else:
        yield _repacked(_saved(), zipfile.ZIP_STORED)
        yield _repacked(_saved(), zipfile.ZIP_DEFLATED)
        yield _saved(_use_new_zipfile_serialization=False)
        yield _tar()
