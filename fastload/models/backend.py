"""Families that fastload has no architecture for: transformers' classes, loaded by fastload."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from fastload.errors import OptionError
from fastload.models import registry

__all__ = ["Backend", "left_to_transformers", "transformers_class"]

Backend: TypeAlias = Literal["native", "transformers"]


def left_to_transformers(values: Mapping[str, Any], backend: Backend | None, *, file: str) -> bool:
    """Whether a model is one of transformers' classes: by its family alone, unless the caller says.

    Args:
        values: the fields of its config.
        backend: the caller's choice.
        file: the config, for messages.

    Raises:
        OptionError: a backend that there is not.
        ConfigError: neither fastload nor transformers has such a family.
        MissingDependencyError: transformers is needed to tell, and not installed.
    """
    if backend not in (None, "native", "transformers"):
        raise OptionError("no such backend", expected="'native', 'transformers' or None", found=repr(backend))
    if backend == "native" or (backend is None and registry.is_native(values)):
        return False
    from fastload.hf.versions import unsupported_reason

    unsupported_reason()
    from fastload.hf.autos import knows_family

    model_type = values.get("model_type")
    if not values.get("auto_map") and not (isinstance(model_type, str) and knows_family(model_type)):
        # Nobody has it: say what is known here.
        registry.family_of(values, file=file)
        return False
    return True


def transformers_class(name: str) -> Any:
    """An Auto class of transformers whose models fastload loads."""
    import fastload.hf

    return getattr(fastload.hf, name)
