"""The base of all configs: what config.json holds, read, checked, printed and written as transformers does.

A config needs no torch: one can be read, printed and changed before torch is imported.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

from fastload import dtypes
from fastload.errors import ConfigError, FastloadError
from fastload.models.config_file import encode_special_floats, find_config_file, read_config_file
from fastload.models.fields import Bounds, check_range, check_type, declared_fields, naming_file
from fastload.options import HubOptions, reject_unknown
from fastload.storage.atomic import save_error, write_text

if TYPE_CHECKING:
    from typing import Self

    import torch

__all__ = ["CONFIG_NAME", "PreTrainedConfig", "PretrainedConfig"]

CONFIG_NAME = "config.json"
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
_MOST_LABELS = 2**22
# Attributes that are set through a property: under the property's name in a file, under another in the instance.
_PROPERTIES = {
    "num_labels": "",
    "dtype": "_dtype",
    "torch_dtype": "_dtype",
    "name_or_path": "_name_or_path",
    "attn_implementation": "_attn_implementation",
}
# What older versions of transformers wrote about one load, which says nothing of the model.
_NOT_READ = frozenset({"_commit_hash", "_dtype", "_attn_implementation_internal", "_experts_implementation_internal"})
# What belongs to the class: a field of the name would break every later one.
_RESERVED = frozenset({"attribute_map", "bounds"})


class PreTrainedConfig:
    """What is known of a model besides its weights.

    A subclass declares its fields as annotated class variables with their defaults. Fields a class does not declare
    are kept as attributes and written back. Values are checked when the config is built; what several fields say
    together is checked by ``validate``, which building or loading a model calls.

    Attributes:
        model_type: what the family is called in config.json.
        attribute_map: other name of a field -> its name.
        bounds: smallest and largest value of the fields that are sizes or shares.
        dtype: torch dtype of the weights; a string such as ``"float16"`` is taken too. None where nothing says.
        num_labels: length of ``id2label``; setting it makes up that many labels.
        name_or_path: where the model was loaded from; never written to a file.
    """

    model_type: ClassVar[str] = ""
    attribute_map: ClassVar[Mapping[str, str]] = {}
    bounds: ClassVar[Mapping[str, Bounds]] = {}

    transformers_version: str | None = None
    architectures: list[str] | None = None
    output_hidden_states: bool | None = False
    output_attentions: bool | None = False
    return_dict: bool | None = True
    chunk_size_feed_forward: int = 0
    is_encoder_decoder: bool = False
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None

    _dtype: str | None
    _name_or_path: str
    _attn_implementation: str | None

    def __init__(self, /, **fields: Any) -> None:
        given = {name: value for name, value in fields.items() if name not in _NOT_READ}
        if self.model_type:
            given.pop("model_type", None)
        legacy_dtype = given.pop("torch_dtype", None)
        n_labels = given.pop("num_labels", None)
        self.dtype = given.pop("dtype", None) or legacy_dtype
        # Older files hold the private spellings.
        self._name_or_path = str(given.pop("name_or_path", given.pop("_name_or_path", "")))
        self._attn_implementation = given.pop("attn_implementation", given.pop("_attn_implementation", None))
        for field in declared_fields(type(self)).values():
            self.__dict__[field.name] = field.default
        for name, value in given.items():
            self._refuse_reserved(name)
            setattr(self, name, value)
        self._complete_labels(n_labels)
        self.check_fields()

    def _refuse_reserved(self, name: str) -> None:
        """A field from a file must not take the place of a method, or of what Python itself looks up."""
        held = getattr(type(self), name, None)
        if name.startswith("__") or name in _RESERVED or callable(held):
            raise ConfigError("a field of the config has a name that is reserved", key=name, fix="rename the field")

    def _complete_labels(self, n_labels: int | None) -> None:
        # A classifier of two labels is saved without its labels, because two is the default.
        if self.id2label is None:
            self.num_labels = 2 if n_labels is None else n_labels
            return
        try:
            # The keys of a JSON object are strings.
            self.id2label = {int(index): label for index, label in self.id2label.items()}
        except (ValueError, TypeError, AttributeError):
            raise ConfigError(
                "id2label does not map numbers to labels",
                key="id2label",
                expected='an object such as {"0": "NEGATIVE", "1": "POSITIVE"}',
                found=str(self.id2label)[:80],
            ) from None
        if n_labels is not None:
            self.num_labels = n_labels

    def check_fields(self) -> None:
        """Raise ConfigError where one field on its own cannot be: wrong type, or out of its bounds."""
        for name, field in declared_fields(type(self)).items():
            check_type(field, self.__dict__.get(name))
        for name, bounds in self.bounds.items():
            check_range(name, getattr(self, name, None), bounds)
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ConfigError(
                "unknown problem_type",
                key="problem_type",
                expected=", ".join(PROBLEM_TYPES),
                found=repr(self.problem_type),
            )
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ConfigError(
                "a classification of one label is none",
                key="problem_type",
                expected="two labels or more",
                found="num_labels = 1",
                fix='set num_labels=2, or problem_type="regression" for a single score',
            )

    def check_relations(self) -> None:
        """Raise ConfigError where several fields contradict each other. Families override this."""

    def validate(self, file: str | None = None) -> None:
        """Check everything; ``file`` is named in the ConfigError."""
        with naming_file(file):
            self.check_fields()
            self.check_relations()

    # Fields behind a property

    @property
    def dtype(self) -> torch.dtype | None:
        return None if self._dtype is None else dtypes.to_torch(dtypes.from_name(self._dtype))

    @dtype.setter
    def dtype(self, dtype: str | torch.dtype | None) -> None:
        try:
            self._dtype = None if dtype is None else dtypes.from_name(str(dtype)).torch_name
        except FastloadError as error:
            raise ConfigError(
                "the config asks for an unknown data type",
                key="dtype",
                expected=error.expected,
                found=repr(dtype),
            ) from None

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """Old name of ``dtype``."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, dtype: str | torch.dtype | None) -> None:
        self.dtype = dtype

    @property
    def name_or_path(self) -> str:
        return self._name_or_path

    @name_or_path.setter
    def name_or_path(self, value: str | os.PathLike[str]) -> None:
        self._name_or_path = str(value)

    @property
    def attn_implementation(self) -> str | None:
        """``"sdpa"``, ``"eager"``, or None for the default, sdpa. A choice of this process, not written to files."""
        return self._attn_implementation

    @attn_implementation.setter
    def attn_implementation(self, value: str | None) -> None:
        self._attn_implementation = value

    @property
    def num_labels(self) -> int:
        return len(self.id2label or ())

    @num_labels.setter
    def num_labels(self, n_labels: int) -> None:
        if isinstance(n_labels, bool) or not isinstance(n_labels, int) or not 0 <= n_labels <= _MOST_LABELS:
            raise ConfigError(
                "not a number of labels", key="num_labels", expected=f"0 to {_MOST_LABELS:,}", found=repr(n_labels)
            )
        if self.id2label is None or len(self.id2label) != n_labels:
            self.id2label = {index: f"LABEL_{index}" for index in range(n_labels)}
            self.label2id = {label: index for index, label in self.id2label.items()}

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, self.attribute_map.get(name, name), value)

    def __getattr__(self, name: str) -> Any:
        # Only what is not found otherwise comes here.
        mapped = type(self).attribute_map.get(name)
        if mapped is None:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        return getattr(self, mapped)

    def has_field(self, name: str) -> bool:
        """Whether ``name`` is a field of this config, declared or kept from its file."""
        return name in self.__dict__ or name in _PROPERTIES or name in self.attribute_map

    # Reading

    @overload
    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, return_unused_kwargs: Literal[False] = False, **overrides: Any
    ) -> Self: ...
    @overload
    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, return_unused_kwargs: Literal[True], **overrides: Any
    ) -> tuple[Self, dict[str, Any]]: ...
    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        return_unused_kwargs: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str = "",
        **overrides: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Read the config of a checkpoint.

        Args:
            path: folder of the checkpoint, its config file, or the id of a model on the hub.
            return_unused_kwargs: return also the keywords that are no field, instead of raising TypeError.
            revision, token, cache_dir, local_files_only, force_download: see ``HubOptions``.
            subfolder: folder below the checkpoint's that holds the config.
            overrides: fields and the values they get instead of the file's. ``model_type`` says that a config of
                another family is meant.

        Raises:
            ConfigError: no config, not JSON, of another family, or with values that cannot be.
            TypeError: a keyword that is neither an option nor a field.
        """
        hub = HubOptions(
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        file = find_config_file(path, subfolder=subfolder, hub=hub)
        values = read_config_file(file)
        model_type = overrides.pop("model_type", values.get("model_type"))
        if cls.model_type and model_type not in (None, cls.model_type):
            raise ConfigError(
                f"this is not the config of a model that {cls.__name__} describes",
                file=file,
                key="model_type",
                expected=repr(cls.model_type),
                found=repr(model_type),
                fix=f"use AutoConfig; or pass model_type={cls.model_type!r} to read it as one all the same",
            )
        config, unused = cls._from_values(values, overrides, file)
        if return_unused_kwargs:
            return config, unused
        reject_unknown(f"{cls.__name__}.from_pretrained", unused)
        return config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """A config of these fields; see ``from_pretrained`` for the keywords, the result and the errors."""
        config, unused = cls._from_values(values, overrides, None)
        if return_unused_kwargs:
            return config, unused
        reject_unknown(f"{cls.__name__}.from_dict", unused)
        return config

    @classmethod
    def from_json_file(cls, file: str | os.PathLike[str]) -> Self:
        """Read one file. Raises ConfigError."""
        return cls._from_values(read_config_file(file), {}, os.fspath(file))[0]

    @classmethod
    def _from_values(
        cls, values: Mapping[str, Any], overrides: Mapping[str, Any], file: str | None
    ) -> tuple[Self, dict[str, Any]]:
        """The config of a file's values, some of them overridden, and the overrides that are no field."""
        with naming_file(file):
            config = cls(**values)
            given = dict(overrides)
            known = {name: given.pop(name) for name in overrides if config.has_field(name)}
            if "torch_dtype" in known:
                known.setdefault("dtype", known.pop("torch_dtype"))
            if known.get("dtype") == "auto":
                # That is an option of loading weights: the dtype that the file says.
                del known["dtype"]
            if known:
                config = cls(**{**values, **known})
            config.validate()
        return config, given

    # Writing

    def to_dict(self) -> dict[str, Any]:
        """All fields, as values that JSON has. ``model_type`` and ``_name_or_path`` are among them."""
        values = {name: _plain(value) for name, value in self.__dict__.items()}
        values["dtype"] = values.pop("_dtype")
        del values["_attn_implementation"]
        values["model_type"] = self.model_type
        if self.transformers_version is None:
            # fastload is not transformers: it keeps the version a file came with, and makes none up.
            del values["transformers_version"]
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields a file holds: all that every config has by default are left out."""
        common = PreTrainedConfig().to_dict()
        own = declared_fields(type(self))
        values = self.to_dict()
        del values["_name_or_path"]

        def overrides_base(name: str, value: Any) -> bool:
            # A field to which the class gives a default of its own: what every config has by default is news then.
            default = own[name].default if name in own else None
            return default is not None and value != _plain(default)

        return {
            name: value
            for name, value in values.items()
            if name not in common or value != common[name] or overrides_base(name, value)
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of a config file: indented by 2, keys sorted, a newline at the end."""
        values = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(encode_special_floats(values), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, file: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write one file, atomically. Raises SaveError."""
        write_text(file, self.to_json_string(use_diff))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json into ``folder``, which is made if it is not there. Raises ConfigError, SaveError."""
        self.validate()
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise save_error(folder, error, "be made") from error
        self.to_json_file(os.path.join(folder, CONFIG_NAME))

    def update(self, values: Mapping[str, Any]) -> None:
        """Set many fields."""
        for name, value in values.items():
            setattr(self, name, value)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


# The spelling of transformers 4, which much code still imports.
PretrainedConfig = PreTrainedConfig


def _plain(value: Any) -> Any:
    """A copy that JSON can hold: nested configs become objects, tuples lists."""
    if isinstance(value, PreTrainedConfig):
        return value.to_dict()
    if isinstance(value, dict):
        return {key: _plain(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(held) for held in value]
    return copy.deepcopy(value)
