"""The one table of data types: safetensors' codes, torch's names, and sizes.

The table itself needs no torch, so that headers can be read and plans made before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from fastload.errors import OptionError, UnknownDtypeError

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "DType", "from_code", "from_name", "from_torch", "to_torch"]


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """One data type. There is one instance of each, compared by identity.

    Attributes:
        code: name in a safetensors header, such as ``"BF16"``.
        n_bits: size of one element as the header counts elements.
        torch_name: name in the torch module, or None where torch has no such type.
        castable: a floating point type that a ``dtype=`` argument converts from and to. Integers, booleans,
            complex numbers and the 8-bit and smaller floats (whose values need scales to be read) are not.
    """

    code: str
    n_bits: int
    torch_name: str | None
    castable: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of one torch element. Types below a byte are packed by torch into items of one byte."""
        return max(1, self.n_bits // 8)

    @property
    def elements_per_item(self) -> int:
        """Elements of the header's count in one torch element: 2 for F4, 1 for all others torch has."""
        return max(1, 8 // self.n_bits)

    def __repr__(self) -> str:
        return self.code


# Codes and sizes as in safetensors 0.8. The 6-bit types are valid in a header; torch has no such type.
DTYPES: dict[str, DType] = {
    dtype.code: dtype
    for dtype in (
        DType("BOOL", 8, "bool"),
        DType("F4", 4, "float4_e2m1fn_x2"),
        DType("F6_E2M3", 6, None),
        DType("F6_E3M2", 6, None),
        DType("U8", 8, "uint8"),
        DType("I8", 8, "int8"),
        DType("F8_E5M2", 8, "float8_e5m2"),
        DType("F8_E4M3", 8, "float8_e4m3fn"),
        DType("F8_E8M0", 8, "float8_e8m0fnu"),
        DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
        DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
        DType("I16", 16, "int16"),
        DType("U16", 16, "uint16"),
        DType("F16", 16, "float16", castable=True),
        DType("BF16", 16, "bfloat16", castable=True),
        DType("I32", 32, "int32"),
        DType("U32", 32, "uint32"),
        DType("F32", 32, "float32", castable=True),
        DType("C64", 64, "complex64"),
        DType("F64", 64, "float64", castable=True),
        DType("I64", 64, "int64"),
        DType("U64", 64, "uint64"),
        # Not in safetensors; torch's own files may hold it.
        DType("C128", 128, "complex128"),
    )
}
_BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in DTYPES.values() if dtype.torch_name}
_SHORT_NAMES = {
    "half": "float16",
    "float": "float32",
    "double": "float64",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
}


def from_code(code: str, *, file: str, key: str) -> DType:
    """The type with a safetensors code; UnknownDtypeError names the file and the tensor that ask for it."""
    try:
        return DTYPES[code]
    except (KeyError, TypeError):
        raise UnknownDtypeError(
            "the data type of a tensor is unknown",
            file=file,
            key=key,
            expected=f"one of {', '.join(DTYPES)}",
            found=repr(code),
            fix="update fastload, or ask whoever wrote the file which type this is",
        ) from None


def from_name(name: str) -> DType:
    """The type a person names: ``"bfloat16"``, ``"torch.bfloat16"``, ``"bf16"`` or ``"BF16"``."""
    plain = name.removeprefix("torch.")
    plain = _SHORT_NAMES.get(plain, plain)
    found = _BY_TORCH_NAME.get(plain) or DTYPES.get(plain)
    if found is None:
        raise OptionError("unknown dtype", expected=f"one of {', '.join(_BY_TORCH_NAME)}", found=repr(name))
    return found


@cache
def from_torch(dtype: torch.dtype) -> DType:
    """The type of a torch dtype; UnknownDtypeError for those no checkpoint format can hold (quantised ones)."""
    found = _BY_TORCH_NAME.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise UnknownDtypeError("no checkpoint format holds this dtype", found=dtype, fix="convert the tensor first")
    return found


@cache
def to_torch(dtype: DType) -> torch.dtype:
    """The torch dtype; UnknownDtypeError where the installed torch has none."""
    import torch

    found = getattr(torch, dtype.torch_name or "", None)
    if not isinstance(found, torch.dtype):
        raise UnknownDtypeError(
            f"torch {torch.__version__} has no data type for {dtype.code}",
            fix="install a newer torch" if dtype.torch_name else "convert the checkpoint to another type",
        )
    return found
