"""What one call of `generate` goes by: the call's words, the model's generation config and the defaults, as one."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from fastload.errors import OptionError
from fastload.models.generation.generation_config import ACTED_ON, NOT_BUILT_IN, GenerationConfig

__all__ = ["Settings"]

_LOG = logging.getLogger("fastload")

# Tokens that a call makes where nothing says how many.
_DEFAULT_NEW_TOKENS = 20
# What applies where neither the call nor the config says otherwise. The others are None.
_DEFAULTS = {
    "min_length": 0,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
    "output_scores": False,
    "output_logits": False,
    "return_dict_in_generate": False,
}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
# Looked at only where tokens are drawn.
_ONLY_SAMPLING = (*_SAMPLING, "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, float) or _is_int(value)


# Field -> (what it takes, in words; whether a value is such). None is left out of all but the switches.
_GOOD: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("max_length", "max_new_tokens", "num_return_sequences"),
        ("a whole number, 1 or more", lambda value: _is_int(value) and value >= 1),
    ),
    **dict.fromkeys(
        ("min_length", "min_new_tokens", "top_k"),
        ("a whole number, 0 or more", lambda value: _is_int(value) and value >= 0),
    ),
    **dict.fromkeys(
        ("do_sample", "output_scores", "output_logits", "return_dict_in_generate"),
        ("True or False", lambda value: isinstance(value, bool)),
    ),
    **dict.fromkeys(
        ("repetition_penalty", "temperature", "max_time"),
        ("a number above 0", lambda value: _is_number(value) and 0 < value < float("inf")),
    ),
    "top_p": ("a number above 0, at most 1", lambda value: _is_number(value) and 0 < value <= 1),
    "min_p": ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
    "stop_strings": (
        "texts that are not empty",
        lambda value: isinstance(value, tuple) and all(isinstance(text, str) and text for text in value),
    ),
    "eos_token_id": ("token ids", lambda value: isinstance(value, tuple) and all(map(_is_int, value))),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), ("a token id", _is_int)),
}
_FIXES = {
    "temperature": "pass do_sample=False for the most likely token each time",
    "top_k": "pass 0 to draw from all tokens",
    "top_p": "pass 1.0 to draw from all tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How one call generates, checked. See `GenerationMixin.generate` for what each field means."""

    max_length: int | None
    max_new_tokens: int | None
    min_length: int
    min_new_tokens: int | None
    max_time: float | None
    stop_strings: tuple[str, ...]
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float | None
    repetition_penalty: float
    num_return_sequences: int
    output_scores: bool
    output_logits: bool
    return_dict_in_generate: bool
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]

    @classmethod
    def of(cls, held: GenerationConfig, given: GenerationConfig | None, overrides: Mapping[str, Any]) -> Settings:
        """What holds for a call.

        Args:
            held: the model's config.
            given: the call's, which goes before it.
            overrides: the call's keywords, which go before both; None there unsets a field.

        Raises:
            OptionError: a keyword that is no field, a value that cannot be, or something that is not built in.
        """
        given = given or GenerationConfig()
        values = {**_DEFAULTS, **held.to_diff_dict(), **given.to_diff_dict()}
        for name, value in overrides.items():
            if not (held.has_field(name) or given.has_field(name)):
                raise _unknown(name, held)
            values[name] = value
        is_sampling = bool(values["do_sample"])
        _refuse_what_is_not_built_in(values, is_sampling)
        fields = _normalised({name: values.get(name) for name in ACTED_ON})
        for name, value in fields.items():
            if is_sampling or name not in _SAMPLING:
                _check(name, value)
        _check_together(fields)
        unused = [name for name in _SAMPLING if overrides.get(name) is not None]
        if unused and not is_sampling:
            _LOG.warning("generate: %s without do_sample=True changes nothing", ", ".join(unused))
        return cls(**fields)

    @property
    def filler(self) -> int | None:
        """What fills a row that ended before others; None where nothing can end one."""
        return next(iter(self.eos_token_id), None) if self.pad_token_id is None else self.pad_token_id

    def length_limit(self, n_prompt: int, n_positions: int | None) -> int:
        """Most tokens of a text, the prompt's included.

        Args:
            n_prompt: tokens of the prompt, padding included.
            n_positions: tokens that the model was made for, which bounds the default.

        Raises:
            OptionError: there is no room for a single new token.
        """
        key = "max_length"
        if self.max_new_tokens is not None:
            limit = n_prompt + self.max_new_tokens
        elif self.max_length is not None:
            limit = self.max_length
        else:
            limit = min(n_prompt + _DEFAULT_NEW_TOKENS, n_positions or n_prompt + _DEFAULT_NEW_TOKENS)
            key = "max_position_embeddings"
        if n_positions is not None and limit > n_positions:
            _LOG.warning("generate: up to %d tokens, where the model was made for %d", limit, n_positions)
        if limit <= n_prompt:
            raise OptionError(
                "the prompt is as long as the whole text may be",
                key=key,
                expected=f"a prompt of fewer than {limit:,} tokens",
                found=f"{n_prompt:,} tokens",
                fix="shorten the prompt, or pass max_new_tokens= or a larger max_length=",
            )
        return limit

    def first_length_with_eos(self, n_prompt: int) -> int:
        """Tokens a text must have before one that ends it may follow."""
        return max(self.min_length, 0 if self.min_new_tokens is None else n_prompt + self.min_new_tokens)


def _normalised(fields: dict[str, Any]) -> dict[str, Any]:
    """One spelling for what has several."""
    for name, of_many in (("stop_strings", str), ("eos_token_id", int)):
        value = fields[name]
        listed = () if value is None else (value,) if isinstance(value, of_many) else value
        fields[name] = tuple(listed) if isinstance(listed, (list, tuple, set)) else listed
    # An id below zero is an old way to say that there is none.
    if isinstance(fields["eos_token_id"], tuple):
        fields["eos_token_id"] = tuple(token for token in fields["eos_token_id"] if not (_is_int(token) and token < 0))
    for name in ("pad_token_id", "bos_token_id"):
        if _is_int(fields[name]) and fields[name] < 0:
            fields[name] = None
    # None unsets: what then is left is to do nothing.
    nothing = {**_DEFAULTS, "top_k": 0}
    return {name: nothing.get(name) if value is None else value for name, value in fields.items()}


def _check(name: str, value: Any) -> None:
    if value is None:
        return
    expected, is_good = _GOOD[name]
    if not is_good(value):
        raise OptionError(
            f"{name} cannot have this value", key=name, expected=expected, found=repr(value), fix=_FIXES.get(name)
        )


def _check_together(fields: Mapping[str, Any]) -> None:
    if fields["num_return_sequences"] > 1 and not fields["do_sample"]:
        raise OptionError(
            "the most likely text is one: several would be the same",
            key="num_return_sequences",
            expected="1, or do_sample=True",
            found=fields["num_return_sequences"],
        )
    asked = [name for name in ("output_scores", "output_logits") if fields[name]]
    if asked and not fields["return_dict_in_generate"]:
        raise OptionError(
            "more than the tokens is asked for, in a result that is the tokens",
            key=asked[0],
            expected="return_dict_in_generate=True",
            found="False",
        )


def _refuse_what_is_not_built_in(values: Mapping[str, Any], is_sampling: bool) -> None:
    for name, neutral in NOT_BUILT_IN.items():
        value = values.get(name)
        if value is None or value in neutral or (name in _ONLY_SAMPLING and not is_sampling):
            continue
        raise OptionError(
            "fastload's own models do not generate in this way",
            key=name,
            expected=f"nothing, or {neutral[0]!r}" if neutral else "nothing",
            found=repr(value),
            fix=f"pass {name}=None, or load transformers' class with backend='transformers'",
        )


def _unknown(name: str, config: GenerationConfig) -> OptionError:
    near = difflib.get_close_matches(name, [known for known in config.to_dict() if config.has_field(known)], n=1)
    return OptionError(
        "generate has no such option, and the generation config no such field",
        key=name,
        fix=f"did you mean {near[0]!r}?" if near else "leave it out",
    )
