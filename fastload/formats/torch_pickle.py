"""A pickle machine that can only build state dicts.

Python's own unpickler is not used, neither the C one nor the Python one. Whatever classes it is forbidden, it still
allocates a memo of the size a pickle names (gigabytes for a five-byte opcode), sets attributes on whatever stand-ins
it is given, and hashes what a pickle puts in the place of a dict key (a tuple of tuples of tuples takes it for ever);
a scan that would catch these beforehand must know what lies on the stack, so it is a second machine already. This one
knows the opcodes that picklers write for state dicts, in protocols 1 to 5; all others are refused. It is not
recursive, it holds no more than the pickle can pay for, and the dict keys it accepts have hashes that cannot be made
to collide in number. It is fast where it matters, and faster than the C unpickler, because of torch_records.

Opcodes and their arguments: CPython's ``pickletools.py``; what torch writes with them: ``torch/serialization.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import repeat
from struct import error as struct_error
from typing import Final

from fastload.errors import FastloadError
from fastload.formats.torch_machine import FIX_DAMAGED, Machine, PickleEndsEarlyError, damaged
from fastload.formats.torch_opcodes import HANDLERS
from fastload.formats.torch_records import RestartError
from fastload.formats.torch_stubs import GLOBALS

__all__ = ["MAX_PICKLE_BYTES", "PickleEndsEarlyError", "load_pickle"]

# Room for some 400,000 tensors. One step can cost about 100 bytes of memory, and be written in one byte.
MAX_PICKLE_BYTES: Final = 64 << 20
_MAX_STEPS: Final = 16 << 20
_PADDING: Final = bytes(32)


def load_pickle(
    data: bytes,
    pos: int,
    file: str,
    persistent_load: Callable[[object], object],
    names: Mapping[tuple[str, str], object] = GLOBALS,
) -> tuple[object, int]:
    """Read one pickle.

    Args:
        data: bytes that hold the pickle; what follows it is not looked at.
        pos: where in `data` it begins.
        file: named in errors.
        persistent_load: turns the id of a storage into its description.
        names: (module, name) -> what stands in for it. Whatever else the pickle mentions is refused.

    Returns:
        the object (dicts, lists, tuples, strings, numbers and the stand-ins of torch_stubs) and the position after it.

    Raises:
        UnsafePickleError: it names a function or class, or uses an opcode, that no state dict needs.
        PickleEndsEarlyError: `data` ends first.
        FormatError: it is damaged.
    """
    padded = data + _PADDING  # arguments of fixed size are read without asking whether they are there
    for use_records in (True, False):
        machine = Machine(padded, len(data), file, persistent_load, use_records, names)
        try:
            result = _run(machine, pos)
        except RestartError:
            continue
        except FastloadError as error:
            if error.file is not None:
                raise
            raise type(error)(
                error.problem,
                file=file,
                key=machine.key_at_hand(),
                expected=error.expected,
                found=error.found,
                fix=error.fix or FIX_DAMAGED,
            ) from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct_error) as error:
            raise damaged(file, f"{type(error).__name__}: {error}"[:200]) from None
        return result, machine.end
    raise AssertionError("unreachable: without records nothing asks for a restart")


def _run(machine: Machine, pos: int) -> object:
    data = machine.data
    for _ in repeat(None, _MAX_STEPS):
        pos = HANDLERS[data[pos]](machine, pos + 1)
        if pos < 0:
            return machine.stack.pop()
    raise machine.unsafe("the pickle does more than a state dict needs", expected=f"at most {_MAX_STEPS} steps")
