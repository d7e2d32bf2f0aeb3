"""The Auto classes: the config of a checkpoint says which class its model is of."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fastload.errors import ConfigError
from fastload.models import registry
from fastload.models.backend import Backend, left_to_transformers, transformers_class
from fastload.models.config import PreTrainedConfig
from fastload.models.config_file import find_config_file, read_config_file
from fastload.options import FileOptions, HubOptions, reject_unknown
from fastload.prefetching import read_ahead_early
from fastload.sources.hub import pinned

if TYPE_CHECKING:
    import torch

    from fastload.models.base import PreTrainedModel

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForNextSentencePrediction",
    "AutoModelForPreTraining",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
]

_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_FILE_OPTIONS = ("variant", "subfolder", "use_safetensors")
# Fields of a config that are options of loading first, and so are left to the model's from_pretrained.
_LOAD_OPTIONS = ("dtype", "torch_dtype", "attn_implementation")


def _read_ahead(path: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    files = FileOptions(**{name: options[name] for name in _FILE_OPTIONS if name in options})
    read_ahead_early(path, files, HubOptions(**{name: options[name] for name in _HUB_OPTIONS if name in options}))


def _config_values(file: str, options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config file; the family that a caller names counts instead of the file's."""
    values = read_config_file(file)
    if "model_type" in options:
        values["model_type"] = options.pop("model_type")
    return values


def _native_config(values: dict[str, Any], fields: Mapping[str, Any], file: str) -> tuple[Any, dict[str, Any]]:
    """The config of the family that the values are of, and the fields that it does not have."""
    found = registry.config_class_for(registry.family_of(values, file=file))
    config, unused = found._from_values(values, fields, file)
    return config, unused


class _NeverBuilt:
    """Base of classes that only choose another class."""

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} is not built itself: use {name}.from_pretrained(path) or {name}'s other methods")


class AutoConfig(_NeverBuilt):
    """Reads a config of whichever family the file says."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        return_unused_kwargs: bool = False,
        subfolder: str = "",
        backend: Backend | None = None,
        **options: Any,
    ) -> Any:
        """The config of a checkpoint folder, a config file, or a hub id.

        Args:
            path: where the config is.
            return_unused_kwargs: return also the keywords that are no field, instead of raising TypeError.
            subfolder: folder below the checkpoint's that holds the config.
            backend: "native" or "transformers" where it shall be a config of that, whatever the family.
            options: options of ``HubOptions``; fields and the values they get instead of the file's. ``model_type``
                names the family of a config that does not say.

        Raises:
            ConfigError: no config, or one of no native family, or with values that cannot be.
            TypeError: a keyword that is neither an option nor a field.
        """
        hub = HubOptions(**{name: options.pop(name) for name in _HUB_OPTIONS if name in options})
        file = find_config_file(path, subfolder=subfolder, hub=hub)
        values = _config_values(file, options)
        if left_to_transformers(values, backend, file=file):
            given = {name: getattr(hub, name) for name in ("revision", "token", "cache_dir") if getattr(hub, name)}
            return transformers_class("AutoConfig").from_pretrained(
                path, return_unused_kwargs=return_unused_kwargs, subfolder=subfolder, **given, **options
            )
        config, unused = _native_config(values, {"name_or_path": path, **options}, file)
        if return_unused_kwargs:
            return config, unused
        reject_unknown("AutoConfig.from_pretrained", unused)
        return config

    @classmethod
    def for_model(cls, model_type: str, **fields: Any) -> Any:
        """A fresh config of a family. Raises ConfigError where there is no such family."""
        return registry.config_class_for(model_type)(**fields)

    @classmethod
    def register(cls, model_type: str, config: type[PreTrainedConfig], exist_ok: bool = False) -> None:
        """Make a config class of one's own known under its ``model_type``. Raises OptionError where that is taken."""
        if config.model_type != model_type:
            raise ConfigError(
                f"{config.__name__} is of another model type",
                key="model_type",
                expected=repr(model_type),
                found=repr(config.model_type),
                fix=f"set the class attribute model_type = {model_type!r}",
            )
        registry.register(model_type, config, exist_ok=exist_ok)


class AutoModel(_NeverBuilt):
    """The model of a family without a head; the subclasses choose models with one.

    Attributes:
        task: what the registry's rows call this class.
    """

    task: ClassVar[str] = "AutoModel"

    def __init_subclass__(cls) -> None:
        cls.task = cls.__name__

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *model_args: Any,
        config: Any = None,
        backend: Backend | None = None,
        **options: Any,
    ) -> Any:
        """Load a checkpoint into the class that its config says.

        The class is fastload's where it has the family, and transformers' own (loaded through `fastload.hf`) otherwise.
        That depends on the family alone, and not on what is installed.

        Args:
            path: folder of the checkpoint, or id of a model on the hub.
            model_args: further positional arguments of the model's constructor.
            config: used instead of the checkpoint's; a config, or where one is.
            backend: "native" or "transformers" where it shall be that, whatever the family.
            options: options of ``PreTrainedModel.from_pretrained``; fields of the config and the values they get.

        Raises:
            ConfigError: see ``AutoConfig.from_pretrained``; also a family without a model for this class.
            MissingDependencyError: transformers is needed and not installed.
            FastloadError: see ``PreTrainedModel.from_pretrained``.
            TypeError: a keyword that is neither an option nor a field.
        """
        if not isinstance(config, (PreTrainedConfig, str, os.PathLike, type(None))):
            return cls._from_transformers(path, model_args, config, options)
        if not isinstance(config, PreTrainedConfig):
            kept = {name: options.pop(name) for name in (*_HUB_OPTIONS, *_LOAD_OPTIONS) if name in options}
            hub = HubOptions(**{name: kept[name] for name in _HUB_OPTIONS if name in kept})
            subfolder = options.pop("subfolder", "")
            file = find_config_file(path if config is None else config, subfolder=subfolder, hub=hub)
            if config is None:
                # Weights of the commit that the config is of, even if someone pushes in between.
                kept["revision"] = pinned(hub, file).revision
            kept["subfolder"] = subfolder
            values = _config_values(file, options)
            if left_to_transformers(values, backend, file=file):
                return cls._from_transformers(path, model_args, config, {**options, **kept})
            # What is no field of the config may be an option of loading; the model's class tells.
            config, options = _native_config(values, {"name_or_path": file, **options}, file)
            options |= kept
        if "torch" not in sys.modules and not {"memory_budget", "max_memory"} & options.keys():
            # The import below takes seconds, in which a cold checkpoint can be read.
            _read_ahead(path, options)
        found = cls._class_of(cast(PreTrainedConfig, config), os.fspath(path))
        return cast(Any, found).from_pretrained(path, *model_args, config=config, **options)

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
    ) -> Any:
        """A model with random weights. Raises ConfigError where the config's family has none for this class."""
        if not isinstance(config, PreTrainedConfig):
            chosen = {"dtype": dtype, "attn_implementation": attn_implementation}
            given = {name: value for name, value in chosen.items() if value is not None}
            return transformers_class(cls.task).from_config(config, **given)
        return cls._class_of(config, None)._from_config(config, dtype=dtype, attn_implementation=attn_implementation)

    @classmethod
    def register(
        cls, config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel], exist_ok: bool = False
    ) -> None:
        """Make a model class of one's own the choice for a config class. Raises OptionError where there is one."""
        model_type = registry.model_type_of(config_class) or config_class.model_type
        registry.register(model_type, config_class, {cls.task: model_class}, exist_ok=exist_ok)

    @classmethod
    def _from_transformers(
        cls, path: str | os.PathLike[str], model_args: tuple[Any, ...], config: Any, options: dict[str, Any]
    ) -> Any:
        """A model of transformers' class for the same task; the options are theirs, but for fastload's own."""
        if options.pop("detached", False):
            options["disable_mmap"] = True
        if config is not None:
            options["config"] = config
        return transformers_class(cls.task).from_pretrained(path, *model_args, **options)

    @classmethod
    def _class_of(cls, config: PreTrainedConfig, file: str | None) -> type[PreTrainedModel]:
        model_type = registry.model_type_of(type(config)) or config.model_type
        return registry.class_for(cls.task, model_type, file=file)


class AutoModelForPreTraining(AutoModel):
    """The model as it was pretrained."""


class AutoModelForMaskedLM(AutoModel):
    """Predicts masked tokens."""


class AutoModelForCausalLM(AutoModel):
    """Predicts the next token."""


class AutoModelForSequenceClassification(AutoModel):
    """Scores or classifies texts."""


class AutoModelForTokenClassification(AutoModel):
    """Classifies tokens."""


class AutoModelForQuestionAnswering(AutoModel):
    """Finds answers in a text."""


class AutoModelForNextSentencePrediction(AutoModel):
    """Tells whether one sentence follows another."""


class AutoModelForMultipleChoice(AutoModel):
    """Chooses one of several texts."""
