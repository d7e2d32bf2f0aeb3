"""transformers' own models, loaded and saved by fastload.

    from fastload.hf import AutoModelForCausalLM            # any Auto class; transformers itself is left as it is
    with fastload.hf.enabled(): ...                         # or a part of a program: concrete classes, pipelines, ...
    fastload.hf.enable()                                    # or all of it, until disable()
    fastload.hf.stats()                                     # what was fast, what was handed over, and why

Importing this module imports neither transformers nor torch; the first use of a name does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastload.hf.counting import Stats as Stats
    from fastload.hf.counting import reset_stats as reset_stats
    from fastload.hf.counting import stats as stats
    from fastload.hf.saving import save_pretrained as save_pretrained
    from fastload.hf.switching import disable as disable
    from fastload.hf.switching import enable as enable
    from fastload.hf.switching import enabled as enabled

_HOMES = {
    "Stats": "fastload.hf.counting",
    "disable": "fastload.hf.switching",
    "enable": "fastload.hf.switching",
    "enabled": "fastload.hf.switching",
    "reset_stats": "fastload.hf.counting",
    "save_pretrained": "fastload.hf.saving",
    "stats": "fastload.hf.counting",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home != "fastload.hf.counting" and (home or name.startswith("Auto")):
        # Says what to install before anything here imports it.
        import_module("fastload.hf.versions").unsupported_reason()
    if home is not None:
        value = getattr(import_module(home), name)
    elif name.startswith("Auto"):
        from fastload.hf.autos import auto_class

        value = auto_class(name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from fastload.hf.autos import auto_names

    return sorted([*__all__, *auto_names()])
