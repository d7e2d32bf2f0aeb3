"""What a torch pickle may mention, and the plain descriptions that stand in for it.

A state dict is a pickle that names some forty things: ``OrderedDict``, the functions that rebuild a tensor from its
storage, storage classes, data types. Here each of these names leads to an inert stand-in, and every other name leads
to UnsafePickleError. Nothing is imported and nothing of torch is called; a "tensor" that comes out of a pickle is a
tuple that says where its elements lie.

Which names real files hold was read from torch's own sources: ``torch/_utils.py`` (the rebuild functions and their
arguments), ``torch/serialization.py`` (persistent ids), ``torch/storage.py`` (storage classes and their types).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from fastload.dtypes import DTYPES, DType
from fastload.errors import FormatError

__all__ = [
    "GLOBALS",
    "OPAQUE",
    "ORDERED_DICT",
    "REBUILD_TENSOR_V2",
    "ClassStub",
    "Inert",
    "InstanceStub",
    "OrderedDictStub",
    "Rebuild",
    "StorageStub",
    "StorageType",
    "TensorStub",
    "UnsupportedStub",
]


class Inert:
    """A name or value that a state dict may hold and that no reader needs: a device, a layout, a set."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<ignored>"


OPAQUE: Final = Inert()
_MAX_DIMENSIONS: Final = 64  # as many as torch works with
_MAX_INT64: Final = 2**63 - 1


class OrderedDictStub(dict[Any, Any]):
    """Stands in for ``collections.OrderedDict``, without the ``__dict__`` that a pickle could fill.

    An instance attribute named ``items`` would hide the method. State that is "built" onto it (the ``_metadata`` of
    a module's state dict) is dropped by the machine instead.
    """

    __slots__ = ()


class StorageType(NamedTuple):
    """A storage class. ``dtype`` is None for quantised types; untyped storages are counted in bytes (U8)."""

    name: str
    dtype: DType | None
    untyped: bool = False


class StorageStub(NamedTuple):
    """A storage that the pickle refers to.

    Attributes:
        key: the name of its bytes in the file.
        kind: its storage class.
        n_elements: size of the bytes under `key`, in elements of that class.
        offset: first element (only legacy files have storages that are parts of others).
    """

    key: str
    kind: StorageType
    n_elements: int
    offset: int = 0


class TensorStub(NamedTuple):
    """A tensor: its storage (`key`, `kind`, `n_elements` as in StorageStub) and its place in it, counted in elements.

    ``dtype`` is None for the storage's own type, a DType, or the torch name of a type that no format holds.
    """

    key: str
    kind: StorageType
    n_elements: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: DType | str | None


class UnsupportedStub(NamedTuple):
    """A tensor of a sort that cannot be described as a region; an error only if it is among the weights."""

    what: str


class ClassStub(NamedTuple):
    """A class that a pickle may make instances of, without arguments. No name of a state dict leads to one."""

    name: str


class InstanceStub:
    """An instance of such a class: the name of its class, and the state that the pickle gives it, as it is there."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = None


class Rebuild:
    """A function the pickle may call: ``make`` takes the pickle's arguments and returns a stand-in."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., object]) -> None:
        self.name = name
        self.make = make


def _refuse(what: str, found: object) -> FormatError:
    return FormatError(f"the pickle is damaged: {what}", found=type(found).__name__)


def _int_tuple(value: Any, what: str) -> tuple[int, ...]:
    # The limit is one of memory, too: a list is copied here, and a pickle can hand in one list any number of times.
    if type(value) not in (tuple, list) or len(value) > _MAX_DIMENSIONS:
        raise _refuse(f"{what} of a tensor is not a tuple of at most {_MAX_DIMENSIONS} numbers", value)
    for item in value:
        if type(item) is not int or not 0 <= item <= _MAX_INT64:
            raise _refuse(f"{what} of a tensor is not made of whole numbers", item)
    return tuple(value)


def _tensor(storage: object, offset: object, size: object, stride: object, dtype: Any = None) -> TensorStub:
    if type(storage) is not StorageStub:
        raise _refuse("a tensor stands on something that is not a storage", storage)
    if type(offset) is not int or offset < 0:
        raise _refuse("the offset of a tensor is not a whole number", offset)
    shape, strides = _int_tuple(size, "the shape"), _int_tuple(stride, "the stride")
    if len(shape) != len(strides):
        raise FormatError(
            "a tensor has more dimensions than strides, or fewer", expected=len(shape), found=len(strides)
        )
    if dtype is not None and storage.offset:
        raise FormatError("a tensor of another type than its storage stands on a part of a storage")
    return TensorStub(storage.key, storage.kind, storage.n_elements, storage.offset + offset, shape, strides, dtype)


def _with_metadata(tensor: TensorStub, metadata: Any) -> TensorStub | UnsupportedStub:
    # torch writes {"conj": True} or {"neg": True} for tensors whose values are to be conjugated or negated when read.
    if metadata is None:
        return tensor
    if type(metadata) not in (dict, OrderedDictStub) or len(metadata) > _MAX_DIMENSIONS:
        raise _refuse("the metadata of a tensor is not a small dict", metadata)
    if all(value is False for value in metadata.values()):
        return tensor
    return UnsupportedStub("a lazily conjugated or negated tensor (call resolve_conj() or resolve_neg() before saving)")


def _rebuild_tensor(storage: object, offset: object, size: object, stride: object) -> object:
    return _tensor(storage, offset, size, stride)


def _rebuild_tensor_v2(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    _grad: object,
    _hooks: object,
    metadata: object = None,
) -> object:
    return _with_metadata(_tensor(storage, offset, size, stride), metadata)


def _rebuild_tensor_v3(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    _grad: object,
    _hooks: object,
    dtype: object,
    metadata: object = None,
) -> object:
    if type(dtype) is not DType and type(dtype) is not str:
        raise _refuse("the data type of a tensor is not a data type", dtype)
    return _with_metadata(_tensor(storage, offset, size, stride, dtype), metadata)


def _rebuild_parameter(data: object, _grad: object, _hooks: object, _state: object = None) -> object:
    if type(data) is not TensorStub and type(data) is not UnsupportedStub:
        raise _refuse("a parameter is made of something that is not a tensor", data)
    return data


def _rebuild_from_type(function: object, kind: object, args: object, _state: object) -> object:
    # What torch writes for a tensor that carries Python attributes; they are dropped, as is the state of parameters.
    if (
        type(function) is not Rebuild
        or function is _FROM_TYPE
        or type(kind) is not Inert
        or type(args) is not tuple
        or len(args) > 16
    ):
        raise _refuse("a tensor with attributes is not built from a tensor", function)
    return function.make(*args)


def _ordered_dict(items: object = ()) -> OrderedDictStub:
    # Python 2 wrote the items as an argument. A dict is not accepted: copying one again and again, at a few bytes of
    # pickle each time, would be a way to fill the memory. Lists are copied at most once each: they are emptied.
    result = OrderedDictStub()
    if type(items) is list:
        for pair in items:
            if type(pair) not in (list, tuple) or len(pair) != 2 or type(pair[0]) is not str:
                raise _refuse("an OrderedDict is not made of pairs", pair)
            result[pair[0]] = pair[1]
        items.clear()
    elif items != ():
        raise _refuse("an OrderedDict is not made of a list", items)
    return result


def _size(items: object = ()) -> tuple[int, ...]:
    return _int_tuple(items, "the size")


def _unsupported(what: str) -> Rebuild:
    return Rebuild(what, lambda *_: UnsupportedStub(what))


def _ignored(*_: object) -> Inert:
    return OPAQUE


ORDERED_DICT: Final = Rebuild("OrderedDict", _ordered_dict)
REBUILD_TENSOR_V2: Final = Rebuild("_rebuild_tensor_v2", _rebuild_tensor_v2)
_FROM_TYPE: Final = Rebuild("_rebuild_from_type_v2", _rebuild_from_type)
_IGNORED: Final = Rebuild("ignored", _ignored)

_STORAGES: Final = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexDoubleStorage": "C128",
    "ComplexFloatStorage": "C64",
    # Quantised types, which no other format holds.
    "QInt8Storage": None,
    "QInt32Storage": None,
    "QUInt8Storage": None,
    "QUInt4x2Storage": None,
    "QUInt2x4Storage": None,
}
_DTYPES_WITHOUT_A_CODE: Final = (
    *("complex32", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
    *("quint8", "qint8", "qint32", "quint4x2", "quint2x4"),
    *(f"{sign}int{n}" for sign in ("", "u") for n in range(1, 8)),
)


def _table() -> dict[tuple[str, str], object]:
    table: dict[tuple[str, str], object] = {
        ("collections", "OrderedDict"): ORDERED_DICT,
        ("torch._utils", "_rebuild_tensor"): Rebuild("_rebuild_tensor", _rebuild_tensor),
        ("torch._utils", "_rebuild_tensor_v2"): REBUILD_TENSOR_V2,
        ("torch._utils", "_rebuild_tensor_v3"): Rebuild("_rebuild_tensor_v3", _rebuild_tensor_v3),
        ("torch._utils", "_rebuild_parameter"): Rebuild("_rebuild_parameter", _rebuild_parameter),
        ("torch._utils", "_rebuild_parameter_with_state"): Rebuild("_rebuild_parameter", _rebuild_parameter),
        ("torch._tensor", "_rebuild_from_type_v2"): _FROM_TYPE,
        ("torch._tensor", "_rebuild_from_type"): _FROM_TYPE,
        ("torch.tensor", "_rebuild_from_type"): _FROM_TYPE,  # its home before torch 1.9
        ("torch", "Size"): Rebuild("Size", _size),
        ("torch._utils", "_rebuild_qtensor"): _unsupported("a quantised tensor"),
        ("torch._utils", "_rebuild_sparse_tensor"): _unsupported("a sparse tensor"),
        ("torch._utils", "_rebuild_nested_tensor"): _unsupported("a nested tensor"),
        ("torch._utils", "_rebuild_meta_tensor_no_storage"): _unsupported("a tensor on the meta device, without data"),
        # Not weights, but found beside them; torch's own restricted loader allows the same.
        ("torch", "device"): _IGNORED,
        ("torch.serialization", "_get_layout"): _IGNORED,
        ("_codecs", "encode"): _IGNORED,
        ("torch", "Tensor"): OPAQUE,
        ("torch.nn.parameter", "Parameter"): OPAQUE,
    }
    for builtins in ("builtins", "__builtin__"):
        table |= {(builtins, name): _IGNORED for name in ("set", "bytearray", "complex")}
    for scheme in ("per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams"):
        table["torch", scheme] = OPAQUE
    for name, code in _STORAGES.items():
        kind = StorageType(name, DTYPES[code] if code else None)
        table |= {(module, name): kind for module in ("torch", "torch.cuda")}
        # The tensor classes that the tar format names.
        tensor_class = name.replace("Storage", "Tensor")
        table |= {(module, tensor_class): OPAQUE for module in ("torch", "torch.cuda")}
    for module, name in (
        ("torch.storage", "UntypedStorage"),
        ("torch.storage", "_UntypedStorage"),
        ("torch", "UntypedStorage"),
    ):
        table[module, name] = StorageType(name, DTYPES["U8"], untyped=True)
    table |= {("torch", dtype.torch_name): dtype for dtype in DTYPES.values() if dtype.torch_name}
    table |= {("torch", name): name for name in _DTYPES_WITHOUT_A_CODE}
    return table


GLOBALS: Final[dict[tuple[str, str], object]] = _table()
