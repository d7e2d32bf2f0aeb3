"""The state of the pickle machine, which torch_opcodes works on and torch_pickle runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastload.errors import FormatError, TruncatedFileError, UnsafePickleError
from fastload.formats.torch_records import Records
from fastload.formats.torch_stubs import GLOBALS

__all__ = ["FIX_DAMAGED", "Machine", "PickleEndsEarlyError", "damaged"]


FIX_DAMAGED = "copy or download the file again"


class PickleEndsEarlyError(TruncatedFileError):
    """The bytes ended before the pickle did."""


class Machine:
    """What a pickle has built so far.

    Attributes:
        data: the pickle, padded with zeros.
        n_bytes: its length without the padding.
        file: named in errors.
        persistent_load: turns the id of a storage into its description.
        names: what may be mentioned, and what stands in for it.
        stack: objects since the last mark.
        marks: the stacks before each mark.
        memo: what can be fetched again; an entry never changes.
        records: takes whole tensors, or None to go step by step.
        end: position after the pickle, once it has stopped.
    """

    __slots__ = ("data", "end", "file", "marks", "memo", "n_bytes", "names", "persistent_load", "records", "stack")

    def __init__(
        self,
        data: bytes,
        n_bytes: int,
        file: str,
        persistent_load: Callable[[object], object],
        use_records: bool,
        names: Mapping[tuple[str, str], object] = GLOBALS,
    ) -> None:
        self.data = data
        self.n_bytes = n_bytes
        self.file = file
        self.persistent_load = persistent_load
        self.names = names
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.records = Records(data, self.memo) if use_records else None
        self.end = 0

    def take(self, pos: int, n: int) -> bytes:
        """The `n` bytes at `pos`; PickleEndsEarlyError where there are fewer."""
        if pos + n > self.n_bytes:
            raise PickleEndsEarlyError("a pickle ends before it is complete")  # load_pickle says where
        return self.data[pos : pos + n]

    def pop_mark(self) -> list[Any]:
        """What was pushed since the last mark, which is taken away."""
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def unsafe(self, problem: str, *, expected: object = None, found: object = None) -> UnsafePickleError:
        """The error for something no state dict needs."""
        return UnsafePickleError(
            problem,
            file=self.file,
            key=self.key_at_hand(),
            expected=expected,
            found=found,
            fix="load the file with the program that wrote it, if you trust it, and save only the state dict "
            "(tensors under names), best as safetensors",
        )

    def key_at_hand(self) -> str | None:
        """The outermost dict key that was waiting for its value, for error messages."""
        for frame in [*self.marks, self.stack]:
            for item in frame[-2:]:
                if type(item) is str:
                    return item[:200]
        return None


def damaged(file: str, found: str) -> FormatError:
    """The error for a pickle that makes no sense."""
    return FormatError("the pickle is damaged", file=file, found=found, fix=FIX_DAMAGED)
