"""A progress bar for work that turns out to be long, and nothing for work that is not."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Progress"]

_SHOW_AFTER_S = 1.0


class Progress:
    """Counts bytes; shows a bar on stderr once the work has taken a second, if stderr is a terminal.

    tqdm is imported at that moment and not before: most loads are over by then.
    """

    def __init__(self, title: str, total_bytes: int) -> None:
        self._title = title
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._begin = time.monotonic()
        self._bar: tqdm[Any] | None = None

    def advance(self, n_bytes: int) -> None:
        """Note that n_bytes more are done."""
        self._done_bytes += n_bytes
        if self._bar is not None:
            self._bar.update(n_bytes)
        elif time.monotonic() - self._begin > _SHOW_AFTER_S and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self._title,
                total=self._total_bytes,
                initial=self._done_bytes,
                unit="B",
                unit_scale=True,
                leave=False,
                file=sys.stderr,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
