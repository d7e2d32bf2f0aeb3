"""Which key goes to which name."""

from __future__ import annotations

import pytest

from fastload.dtypes import DTYPES
from fastload.errors import OptionError
from fastload.plan.keys import KeyRules, match_keys
from fastload.plan.slots import Slot


def slots(*names: str, transient: tuple[str, ...] = (), tied: dict[str, str] | None = None) -> dict[str, Slot]:
    tied = tied or {}
    return {
        name: Slot(name, DTYPES["F32"], (1,), persistent=name not in transient, tied_to=tied.get(name))
        for name in (*names, *transient)
    }


HEAD_RULES = KeyRules(base_prefix="bert")


def test_equal_names_match() -> None:
    match = match_keys(["a", "b"], slots("a", "b"), KeyRules())
    assert match.fqn_of_key == {"a": "a", "b": "b"}
    assert (match.missing, match.unexpected, match.ignored) == ((), (), ())


def test_what_does_not_match_is_missing_and_unexpected_in_order() -> None:
    match = match_keys(["z", "y"], slots("b", "a"), KeyRules())
    assert match.missing == ("b", "a")
    assert match.unexpected == ("z", "y")


def test_base_checkpoint_gets_the_prefix_of_a_model_with_a_head() -> None:
    match = match_keys(["encoder.w"], slots("bert.encoder.w", "classifier.w"), HEAD_RULES)
    assert match.fqn_of_key == {"encoder.w": "bert.encoder.w"}
    assert match.missing == ("classifier.w",)


def test_head_checkpoint_loses_the_prefix_in_a_base_model() -> None:
    match = match_keys(["bert.encoder.w", "classifier.w"], slots("encoder.w"), HEAD_RULES)
    assert match.fqn_of_key == {"bert.encoder.w": "encoder.w"}
    assert match.unexpected == ("classifier.w",)


def test_an_exact_name_wins_over_a_prefixed_one_whatever_the_order() -> None:
    match = match_keys(["encoder.w", "bert.encoder.w"], slots("bert.encoder.w"), HEAD_RULES)
    assert match.fqn_of_key == {"bert.encoder.w": "bert.encoder.w"}
    assert match.unexpected == ("encoder.w",)


def test_gamma_and_beta_are_old_names_of_weight_and_bias() -> None:
    match = match_keys(
        ["LayerNorm.gamma", "LayerNorm.beta"], slots("bert.LayerNorm.weight", "bert.LayerNorm.bias"), HEAD_RULES
    )
    assert match.fqn_of_key == {
        "LayerNorm.gamma": "bert.LayerNorm.weight",
        "LayerNorm.beta": "bert.LayerNorm.bias",
    }


def test_a_parameter_that_is_really_called_gamma_keeps_its_name() -> None:
    match = match_keys(["LayerNorm.gamma"], slots("LayerNorm.gamma"), KeyRules())
    assert match.fqn_of_key == {"LayerNorm.gamma": "LayerNorm.gamma"}


def test_a_key_of_a_computed_buffer_is_ignored_with_and_without_prefix() -> None:
    match = match_keys(
        ["embeddings.position_ids"], slots("bert.w", transient=("bert.embeddings.position_ids",)), HEAD_RULES
    )
    assert match.ignored == ("embeddings.position_ids",)
    assert match.unexpected == ()


def test_patterns_hide_what_an_architecture_knows_of() -> None:
    rules = KeyRules(ignore_missing=(r"^head\.",), ignore_unexpected=(r"masked_bias$",))
    match = match_keys(["attn.masked_bias", "other"], slots("head.w", "body.w"), rules)
    assert match.missing == ("body.w",)
    assert match.ignored == ("attn.masked_bias",)
    assert match.unexpected == ("other",)


def test_one_name_of_a_tied_group_is_enough_whichever_it_is() -> None:
    tied = slots("embed", "head", tied={"head": "embed"})
    assert match_keys(["embed"], tied, KeyRules()).missing == ()
    assert match_keys(["head"], tied, KeyRules()).missing == ()
    assert match_keys([], tied, KeyRules()).missing == ("embed",)


def test_key_mapping_applies_each_pattern_in_order() -> None:
    mapping = {r"^transformer\.": "", r"^h\.(\d+)\.": r"layers.\1."}
    match = match_keys(["transformer.h.3.w"], slots("layers.3.w"), KeyRules(), mapping)
    assert match.fqn_of_key == {"transformer.h.3.w": "layers.3.w"}


def test_a_key_mapping_that_is_no_pattern_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"\(\["):
        match_keys(["a"], slots("a"), KeyRules(), {"([": ""})
