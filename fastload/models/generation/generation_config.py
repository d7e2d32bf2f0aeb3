"""generation_config.json: how a model is to generate where a call does not say. Names and defaults are transformers'.

Every field is None until a file, a caller or a config.json of older days says otherwise; what None stands for is in
`fastload.models.generation.settings`. A config needs no torch.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastload.errors import ConfigError
from fastload.models.config_file import encode_special_floats, read_config_file
from fastload.options import FileOptions, HubOptions, reject_unknown
from fastload.sources.resolve import locate_companion
from fastload.storage.atomic import save_error, write_text

if TYPE_CHECKING:
    from typing import Self

    from fastload.models.config import PreTrainedConfig

__all__ = ["ACTED_ON", "GENERATION_CONFIG_NAME", "NOT_BUILT_IN", "WITHOUT_EFFECT", "GenerationConfig"]

GENERATION_CONFIG_NAME = "generation_config.json"

# What `generate` goes by.
ACTED_ON = (
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_return_sequences"),
    *("output_scores", "output_logits", "return_dict_in_generate"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
# What transformers has beyond that -> the values that ask for nothing. Any other one is refused, not passed over.
NOT_BUILT_IN: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale"), (1,)),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha"), (0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "remove_invalid_values"), (False,)),
    **dict.fromkeys(("token_healing", "use_mtp"), (False,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "constraints"), ([],)),
    **dict.fromkeys(("force_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "dola_layers", "top_h"), ()),
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit"), ()),
}
# What says how transformers computes, or tunes what is not built in. The cache is always used: it changes no token.
WITHOUT_EFFECT = (
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
    *("compile_config", "disable_compile", "continuous_batching_config", "renormalize_logits"),
    *("early_stopping", "length_penalty", "decoder_start_token_id", "is_assistant", "num_assistant_tokens"),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type"),
)
_KNOWN = (*ACTED_ON, *NOT_BUILT_IN, *WITHOUT_EFFECT)
# What says where a config came from. Two configs that differ in these alone are equal.
_PROVENANCE = ("_from_model_config", "transformers_version")
# Written by older versions, of one load.
_NOT_READ = ("_commit_hash",)


class GenerationConfig:
    """How to generate: limits, choice of tokens, special tokens.

    Any field may have any value: published files hold many that a call overrides. `generate` checks those it goes by.
    Fields that nobody knows are kept and written back.
    """

    def __init__(self, /, **fields: Any) -> None:
        self.__dict__.update(dict.fromkeys((*_KNOWN, *_PROVENANCE)))
        for name, value in fields.items():
            if name in _NOT_READ:
                continue
            if hasattr(type(self), name):
                raise ConfigError("a field has a name that is reserved", key=name, fix="rename the field")
            setattr(self, name, value)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def has_field(self, name: str) -> bool:
        """Whether ``name`` is a field that transformers knows, or that this config has all the same."""
        return name in self.__dict__ and name not in _PROVENANCE

    def update(self, **fields: Any) -> dict[str, Any]:
        """Set those that are fields; returns the others."""
        known = {name: value for name, value in fields.items() if self.has_field(name)}
        self.__dict__.update(known)
        return {name: value for name, value in fields.items() if name not in known}

    # Reading

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        config_file_name: str = GENERATION_CONFIG_NAME,
        *,
        subfolder: str = "",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **overrides: Any,
    ) -> Self:
        """Read the generation config of a checkpoint.

        Args:
            path: folder of the checkpoint, or the id of a model on the hub.
            config_file_name: the file's name.
            subfolder: folder below the checkpoint's that holds the file.
            revision, token, cache_dir, local_files_only, force_download: see ``HubOptions``.
            overrides: fields and the values they get instead of the file's.

        Raises:
            ConfigError: no such file, or it is no JSON object.
            TypeError: a keyword that is neither an option nor a field.
        """
        hub = HubOptions(
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        file = locate_companion(path, config_file_name, subfolder=subfolder, hub=hub)
        if file is None:
            raise ConfigError(
                "there is no generation config",
                file=os.path.join(os.fspath(path), subfolder, config_file_name),
                fix="check the path; a model without one has it from config.json: model.generation_config",
            )
        config = cls.from_json_file(file)
        reject_unknown(f"{cls.__name__}.from_pretrained", config.update(**overrides))
        return config

    @classmethod
    def from_json_file(cls, file: str | os.PathLike[str]) -> Self:
        """Read one file. Raises ConfigError."""
        return cls(**read_config_file(file))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Self:
        """A config of these fields."""
        return cls(**{**values, **overrides})

    @classmethod
    def from_model_config(cls, config: PreTrainedConfig) -> Self:
        """What a model's config.json says of generating, as all files did before there was one for it."""
        values = config.to_dict()
        found = {name: values[name] for name in _KNOWN if values.get(name) is not None}
        return cls(_from_model_config=True, **found)

    # Writing

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return copy.deepcopy(self.__dict__)

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: value for name, value in self.to_dict().items() if value is not None}

    def to_json_string(self) -> str:
        """The text of generation_config.json."""
        return json.dumps(encode_special_floats(self.to_diff_dict()), indent=2, sort_keys=True) + "\n"

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], config_file_name: str = GENERATION_CONFIG_NAME
    ) -> None:
        """Write the file into a folder, made if need be. Raises SaveError."""
        file = os.path.join(os.fspath(save_directory), config_file_name)
        try:
            os.makedirs(save_directory, exist_ok=True)
        except OSError as error:
            raise save_error(file, error) from error
        write_text(file, self.to_json_string())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GenerationConfig):
            return NotImplemented
        return self._said() == other._said()

    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._said().items())})"

    def _said(self) -> dict[str, Any]:
        return {name: value for name, value in self.to_diff_dict().items() if name not in _PROVENANCE}


def read_beside(path: str | os.PathLike[str], files: FileOptions, hub: HubOptions) -> GenerationConfig | None:
    """The generation config of a checkpoint that is being loaded; None where it has none."""
    file = locate_companion(path, GENERATION_CONFIG_NAME, subfolder=files.subfolder, hub=hub)
    return None if file is None else GenerationConfig.from_json_file(file)
