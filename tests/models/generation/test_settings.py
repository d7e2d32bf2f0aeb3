"""What a call goes by: its words before the config's, and those before the defaults; nonsense is an error."""

from __future__ import annotations

from typing import Any

import pytest

from fastload import GenerationConfig
from fastload.errors import OptionError
from fastload.models.generation.settings import Settings


def settings(held: GenerationConfig | None = None, **overrides: Any) -> Settings:
    return Settings.of(held or GenerationConfig(), None, overrides)


def test_the_defaults_are_those_of_transformers() -> None:
    found = settings()
    assert (found.do_sample, found.temperature, found.top_k, found.top_p, found.repetition_penalty) == (
        *(False, 1.0, 50, 1.0, 1.0),
    )
    assert found.length_limit(5, None) == 25
    assert found.length_limit(5, 12) == 12


def test_a_keyword_goes_before_the_calls_config_and_that_before_the_models() -> None:
    held = GenerationConfig(top_k=1, top_p=0.1, min_p=0.1, do_sample=True)
    given = GenerationConfig(top_p=0.2, min_p=0.2)
    found = Settings.of(held, given, {"min_p": 0.3})
    assert (found.top_k, found.top_p, found.min_p) == (1, 0.2, 0.3)


def test_none_unsets_what_the_config_says() -> None:
    held = GenerationConfig(top_k=7, temperature=0.5, eos_token_id=3, max_new_tokens=5, do_sample=True, num_beams=4)
    unset = dict.fromkeys(("top_k", "temperature", "eos_token_id", "max_new_tokens", "num_beams"))
    found = settings(held, **unset)
    assert (found.top_k, found.temperature, found.eos_token_id, found.max_new_tokens) == (0, 1.0, (), None)


def test_one_token_that_ends_a_text_and_several_are_written_alike() -> None:
    assert settings(eos_token_id=3).eos_token_id == (3,)
    assert settings(eos_token_id=[3, 4]).eos_token_id == (3, 4)
    assert settings(stop_strings="END").stop_strings == ("END",)


def test_ids_below_zero_are_none() -> None:
    found = settings(GenerationConfig(pad_token_id=-1, bos_token_id=-1, eos_token_id=[2, -1]))
    assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (None, None, (2,))
    assert found.filler == 2


def test_new_tokens_go_before_the_length_of_the_text() -> None:
    assert settings(max_new_tokens=3, max_length=4).length_limit(10, None) == 13
    assert settings(max_length=40).length_limit(10, 20) == 40


def test_more_tokens_than_the_model_was_made_for_are_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert settings(max_new_tokens=3).length_limit(10, 13) == 13
    assert not caplog.text
    assert settings(max_new_tokens=4).length_limit(10, 13) == 14
    assert "up to 14 tokens, where the model was made for 13" in caplog.text


def test_a_prompt_that_leaves_no_room_is_an_error() -> None:
    with pytest.raises(OptionError, match="fewer than 10 tokens"):
        settings(max_length=10).length_limit(10, None)
    with pytest.raises(OptionError, match="max_position_embeddings"):
        settings().length_limit(12, 12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (0, 0.0, -1.0, "hot", True, float("nan"), float("inf"))],
        *[("top_p", value) for value in (0, -0.1, 1.1, "all", float("nan"))],
        *[("min_p", value) for value in (-0.1, 1.1)],
        *[("top_k", value) for value in (-1, 2.5, True)],
        *[("repetition_penalty", value) for value in (0, -1)],
        *[("max_new_tokens", value) for value in (0, -1, 1.5)],
        *[("max_length", value) for value in (0, "long")],
        *[("min_new_tokens", value) for value in (-1,)],
        *[("max_time", value) for value in (0, -1)],
        *[("stop_strings", value) for value in ("", ["a", ""], [1], 7)],
        *[("eos_token_id", value) for value in ("</s>", [1.5], {"a": 1})],
        *[("pad_token_id", value) for value in ("pad", 1.5)],
        *[("do_sample", value) for value in ("yes", 1)],
    ],
)
def test_a_value_that_cannot_be_is_an_error_that_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        settings(**{"do_sample": True, name: value})
    assert caught.value.key == name
    assert caught.value.expected


def test_what_sampling_needs_may_be_anything_where_nothing_is_drawn() -> None:
    assert settings(GenerationConfig(temperature=0, top_p=0.0)).do_sample is False


@pytest.mark.parametrize(
    "field",
    [
        {"num_beams": 4},
        {"no_repeat_ngram_size": 2},
        {"guidance_scale": 1.5},
        {"output_attentions": True},
        {"prompt_lookup_num_tokens": 3},
        {"suppress_tokens": [1]},
    ],
    ids=str,
)
def test_what_is_not_built_in_is_refused_whoever_asks_for_it(field: dict[str, Any]) -> None:
    for held, overrides in ((GenerationConfig(), field), (GenerationConfig(**field), {})):
        with pytest.raises(OptionError, match="backend='transformers'"):
            settings(held, **overrides)


def test_what_changes_no_token_is_taken() -> None:
    neutral = {"num_beams": 1, "use_cache": False, "length_penalty": 2.0, "typical_p": 0.5, "output_attentions": False}
    assert settings(GenerationConfig(**neutral)) == settings()


def test_a_misspelt_keyword_is_an_error_that_knows_the_right_one() -> None:
    with pytest.raises(OptionError, match=r"max_new_token\n.*did you mean 'max_new_tokens'"):
        settings(max_new_token=3)
    with pytest.raises(OptionError, match="leave it out"):
        settings(zzz=3)


def test_a_field_of_the_models_own_is_no_unknown_keyword() -> None:
    assert settings(GenerationConfig(chat_format="raw"), chat_format="chatml") == settings()


def test_several_texts_that_would_be_the_same_are_an_error() -> None:
    with pytest.raises(OptionError, match="several would be the same"):
        settings(num_return_sequences=2)


def test_scores_belong_to_a_result_that_can_hold_them() -> None:
    with pytest.raises(OptionError, match="return_dict_in_generate"):
        settings(output_scores=True)


def test_sampling_options_without_sampling_are_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    settings(temperature=0.3)
    assert "temperature without do_sample=True changes nothing" in caplog.text
    caplog.clear()
    settings(GenerationConfig(temperature=0.3))
    assert not caplog.text
