"""Which versions of transformers fastload knows."""

from __future__ import annotations

from functools import cache

from fastload.errors import MissingDependencyError

__all__ = ["unsupported_reason"]

# The first that is known, and the first that is not.
_FROM, _BEFORE = (5, 17), (5, 24)


@cache
def unsupported_reason() -> str:
    """Why loads and saves are left to the installed transformers; "" if they are not.

    Raises:
        MissingDependencyError: there is no transformers.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "transformers is not installed", found=str(error), fix="pip install 'fastload[hf]'"
        ) from error
    numbers = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if _FROM <= numbers < _BEFORE:
        return ""
    known = f"{'.'.join(map(str, _FROM))} to {_BEFORE[0]}.{_BEFORE[1] - 1}"
    return f"transformers {transformers.__version__} is not among the versions that fastload knows ({known})"
