"""Reader of torch's own files (``.bin``, ``.pt``, ``.pth``): a pickle of a state dict, and raw storages beside it.

Three containers have been in use: a zip archive since torch 1.6, a run of pickles and raw bytes before it, a tar file
before torch 0.2. Which one a file is shows in its first bytes; its name says nothing. No byte of any storage is read
here, and torch is not imported.
"""

from __future__ import annotations

from typing import Any, Final, TypeGuard

from fastload.dtypes import DTYPES, DType
from fastload.errors import ArchiveError, FormatError, UnknownDtypeError
from fastload.formats.specs import FileContents, Region, StorageView, TensorSpec
from fastload.formats.torch_legacy import is_tar, read_legacy, read_tar
from fastload.formats.torch_pickle import MAX_PICKLE_BYTES, load_pickle
from fastload.formats.torch_source import Source, Storages, open_source
from fastload.formats.torch_stubs import OrderedDictStub, StorageStub, StorageType, TensorStub, UnsupportedStub
from fastload.formats.torch_zip import Directory, ZipStorages, read_directory, read_entry

__all__ = ["NESTED_UNDER", "read_bin", "read_tensor"]

#: Where training programs keep the weights, when they are not at the top.
NESTED_UNDER: Final = ("state_dict", "model", "module")
# Views of a storage larger than it (expanded tensors) cost nothing until someone copies them.
_MAX_EXPANDED_BYTES: Final = 1 << 30
# Hashes of tuples can be made to collide; a small cache cannot be made slow.
_MAX_LAYOUTS: Final = 1_000
_ITEMSIZES: Final = {dtype: dtype.itemsize for dtype in DTYPES.values()}
# Real and imaginary part are swapped each for itself.
_SWAP_BYTES: Final = _ITEMSIZES | {DTYPES["C64"]: 4, DTYPES["C128"]: 8}
_new: Final = tuple.__new__


def read_bin(path: str) -> FileContents:
    """Describe the tensors of a file written by ``torch.save``.

    The weights are the tensors of the pickled dict itself or, where it holds none, of the dict under ``state_dict``,
    ``model`` or ``module``. Of what is not a tensor only the key is kept. Parameters are tensors; gradients, hooks,
    devices and Python attributes are dropped.

    Args:
        path: the file.

    Returns:
        its tensors in the order of the dict. Tensors on one storage have equal regions, and views of them.

    Raises:
        UnreadableFileError: it cannot be opened or read.
        TruncatedFileError: it ends early.
        UnsafePickleError: its pickle asks for code, or for anything else no state dict needs.
        ArchiveError: the archive around the pickle is damaged or lies.
        UnknownDtypeError: a tensor is of a type no checkpoint format holds.
        FormatError: it is no torch file, or holds no weights, or tensors that cannot be described (sparse, quantised).
    """
    with open_source(path) as source:
        start = source.read(0, min(source.n_bytes, 512))
        root: object
        storages: Storages
        if start.startswith(b"PK\3\4"):
            root, storages = _read_zip(source)
        elif is_tar(start):
            root, storages = read_tar(source)
        elif start:
            root, storages = read_legacy(source)
        else:
            raise source.truncated("a torch file")
        state = _find_state(root, source.file)
        specs = _specs(state, storages, source)
        others = () if len(specs) == len(state) else _others(state)
        return FileContents(specs, {}, source.n_bytes, source.modified_ns, others)


def read_tensor(source: Source, key: str) -> TensorSpec:
    """Describe the one tensor that ``torch.save`` wrote, as a zip archive, to a file or a part of one.

    Raises as `read_bin` does.

    Args:
        source: where it is.
        key: the name that it shall have.
    """
    root, storages = _read_zip(source)
    if type(root) is not TensorStub and type(root) is not UnsupportedStub:
        raise FormatError("a tensor was expected", file=source.file, key=key, found=_describe(root))
    (spec,) = _specs({key: root}, storages, source)
    return spec


def _read_zip(source: Source) -> tuple[object, Storages]:
    directory = read_directory(source)
    archive = _archive_name(directory)
    order = b"little"
    if archive + b"/byteorder" in directory:
        order = read_entry(directory, archive + b"/byteorder", 64)
        if order not in (b"little", b"big"):
            raise ArchiveError(
                "the byte order of the archive is unknown",
                file=source.file,
                expected="little or big",
                found=repr(order),
            )
    pickle = read_entry(directory, archive + b"/data.pkl", MAX_PICKLE_BYTES)
    root, _ = load_pickle(pickle, 0, source.file, _storage)
    return root, ZipStorages(directory, archive, big_endian=order == b"big")


def _archive_name(directory: Directory) -> bytes:
    file = directory.source.file
    names = [name[: -len(b"/data.pkl")] for name in directory.rows if name.endswith(b"/data.pkl")]
    if len(names) != 1:
        raise ArchiveError(
            "a zip archive, but not one that torch.save wrote",
            file=file,
            expected="one entry <name>/data.pkl",
            found=f"{len(directory.rows)} entries, {len(names)} of that name",
        )
    if names[0] + b"/constants.pkl" in directory:
        raise FormatError(
            "a TorchScript program, which is code and not a checkpoint",
            file=file,
            fix="load it with torch.jit.load, and save its state_dict() instead",
        )
    return names[0]


def _storage(saved: object) -> StorageStub:
    """The storage that a persistent id of the zip format names: ("storage", class, key, location, n_elements)."""
    if type(saved) is tuple and len(saved) == 5:
        word, kind, key, _, n_elements = saved
        if word == "storage" and type(kind) is StorageType and type(key) is str and type(n_elements) is int:
            return StorageStub(key, kind, n_elements)
    raise FormatError("the pickle is damaged: a storage is not described as torch does it")


def _find_state(root: object, file: str) -> dict[Any, Any]:
    if _is_dict(root):
        places = [root, *(root.get(name) for name in NESTED_UNDER)]
        for place in places:
            if _is_dict(place) and any(type(value) in (TensorStub, UnsupportedStub) for value in place.values()):
                return place
        if not root:
            return root  # a module without parameters
    raise FormatError(
        "the file holds no state dict",
        file=file,
        expected=f"a dict of tensors, by itself or under {', '.join(NESTED_UNDER)}",
        found=_describe(root),
        fix="save a state_dict(), or take the tensors out of this file with the program that wrote it",
    )


def _is_dict(value: object) -> TypeGuard[dict[Any, Any]]:
    return type(value) is dict or type(value) is OrderedDictStub


def _describe(root: Any) -> str:
    if type(root) is TensorStub or type(root) is UnsupportedStub:
        return "a single tensor"
    if not _is_dict(root):
        return f"a {type(root).__name__}"
    names = [repr(name)[:60] for name, _ in zip(root, range(8), strict=False)]
    return f"a dict with {', '.join(names)}{' and more' if len(root) > len(names) else ''}"


def _specs(state: dict[Any, Any], storages: Storages, source: Source) -> tuple[TensorSpec, ...]:
    specs = []
    regions: dict[str, Region] = {}
    layouts: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, int, bool]] = {}
    n_expanded_bytes = 0
    for key, value in state.items():
        if type(value) is not TensorStub:
            if type(value) is UnsupportedStub:
                raise _unsupported(value, key, source.file)
            continue
        storage_key, kind, _, offset, shape, stride, dtype = value
        if dtype is None:
            dtype = kind.dtype
        if type(key) is not str or type(dtype) is not DType:
            raise _nameless_or_typeless(key, value, source.file)
        region = regions.get(storage_key)
        if region is None or region.encoding is not None or kind.untyped:
            region = regions[storage_key] = _region(storages, value, dtype, region, key, source)
        layout = layouts.get((shape, stride))
        if layout is None:
            if len(layouts) > _MAX_LAYOUTS:
                layouts.clear()
            layout = layouts[shape, stride] = _layout(shape, stride)
        n_elements, n_reach, is_contiguous = layout
        itemsize = _ITEMSIZES[dtype]
        view = None
        if not is_contiguous or offset or n_elements * itemsize != region.n_bytes:
            view = StorageView(offset, stride)
            if (offset + n_reach) * itemsize > region.n_bytes:
                raise _outside(key, offset + n_reach, region.n_bytes // itemsize, source.file)
            if n_elements > n_reach:
                n_expanded_bytes += n_elements * itemsize
                _check_expanded(n_expanded_bytes, key, source)
        specs.append(_new(TensorSpec, (key, dtype, shape, region, view)))
    return tuple(specs)


def _others(state: dict[Any, Any]) -> tuple[str, ...]:
    """Keys of what is no tensor; a key that is no string can be no tensor's name, and counts for nothing."""
    return tuple(key for key, value in state.items() if type(key) is str and type(value) is not TensorStub)


def _region(
    storages: Storages, tensor: TensorStub, dtype: DType, known: Region | None, key: str, source: Source
) -> Region:
    kind = tensor.kind
    if kind.dtype is None:
        raise _nameless_or_typeless(key, tensor, source.file)
    try:
        region = storages.region(tensor.key, tensor.n_elements * _ITEMSIZES[kind.dtype], _SWAP_BYTES[dtype])
    except FormatError as error:
        raise type(error)(
            error.problem, file=error.file, key=key, expected=error.expected, found=error.found, fix=error.fix
        ) from None
    if known is not None and known != region:
        raise FormatError(
            "two tensors of different types stand on one storage of the other byte order", file=source.file, key=key
        )
    return region


def _layout(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int, bool]:
    """Number of elements, how far beyond its first element a tensor reaches, and whether it is contiguous."""
    n_elements, n_reach, is_contiguous = 1, 1, True
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != n_elements:
            is_contiguous = False
        n_reach += (size - 1) * step
        n_elements *= size
    return (n_elements, n_reach, is_contiguous) if n_elements else (0, 0, True)


def _check_expanded(n_bytes: int, key: str, source: Source) -> None:
    limit = _MAX_EXPANDED_BYTES + 16 * source.n_bytes
    if n_bytes > limit:
        raise FormatError(
            "the tensors of the file are far larger than the storages under them",
            file=source.file,
            key=key,
            expected=f"at most {limit} bytes in tensors that repeat the elements of their storage",
            found=n_bytes,
            fix="save the tensors without expand()",
        )


def _outside(key: str, n_needed: int, n_storage: int, file: str) -> FormatError:
    return FormatError(
        "a tensor reaches beyond its storage",
        file=file,
        key=key,
        expected=f"a storage of at least {n_needed} elements",
        found=n_storage,
        fix="copy or download the file again",
    )


def _unsupported(value: UnsupportedStub, key: object, file: str) -> FormatError:
    return FormatError(
        f"{value.what} has no plain bytes to load",
        file=file,
        key=repr(key)[:200] if type(key) is not str else key,
        expected="a dense tensor",
        fix="load the file with torch.load and save dense tensors",
    )


def _nameless_or_typeless(key: object, tensor: TensorStub, file: str) -> FormatError:
    if type(key) is not str:
        return FormatError(
            "the name of a tensor is not a string",
            file=file,
            key=repr(key)[:200],
            expected="a string",
            found=type(key).__name__,
        )
    return UnknownDtypeError(
        "a tensor is of a type that no checkpoint format holds",
        file=file,
        key=key,
        found=f"torch.{tensor.dtype or tensor.kind.name}",
        fix="load the file with torch.load, convert the tensor (for instance with dequantize()), and save it again",
    )
