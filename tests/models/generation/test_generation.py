"""Texts made by fastload's models are those that transformers makes from the same checkpoint, token by token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastload
from fastload import GenerationConfig
from fastload.errors import ConfigError
from tests.models.generation.causal import BEGIN, FAMILIES, PADDING, VOCABULARY, prompts, save_small, twins

N_NEW = 12


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A small Llama twice: transformers' and fastload's."""
    return twins(save_small(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A small model of each family, twice."""
    return twins(save_small(tmp_path_factory.mktemp(request.param), request.param))


def assert_same_texts(pair: tuple[Any, Any], *inputs: torch.Tensor, **options: Any) -> torch.Tensor:
    """Both make the same tokens of the same call. Returns them."""
    made = []
    for model in pair:
        torch.manual_seed(17)
        made.append(model.generate(*inputs, **options))
    theirs, ours = made
    assert ours.tolist() == theirs.tolist()
    assert ours.dtype == torch.long
    return ours


def ending_tokens(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> list[int]:
    """Tokens that greedy texts have at different steps: the fourth new one of the first row, the sixth of the next."""
    made = model.generate(tokens, attention_mask=mask, max_new_tokens=N_NEW)[:, tokens.shape[1] :]
    return [int(made[row, 3 + 2 * row]) for row in range(len(made))]


def test_a_text_is_transformers_text(family: tuple[Any, Any]) -> None:
    tokens, _ = prompts(7)
    made = assert_same_texts(family, tokens, max_new_tokens=N_NEW)
    assert made.shape == (1, 7 + N_NEW)
    assert len(set(made[0, 7:].tolist())) > 1


def test_texts_of_different_lengths_are_padded_on_the_left(family: tuple[Any, Any]) -> None:
    tokens, mask = prompts(9, 3, 6)
    made = assert_same_texts(family, tokens, attention_mask=mask, max_new_tokens=N_NEW)
    alone = family[1].generate(tokens[1:2, 6:], max_new_tokens=N_NEW)
    assert made[1, 6:].tolist() == alone[0].tolist()


def test_repetition_is_penalised_as_in_transformers(family: tuple[Any, Any]) -> None:
    tokens, mask = prompts(5, 8)
    made = assert_same_texts(family, tokens, attention_mask=mask, max_new_tokens=20, repetition_penalty=1.8)
    plain = family[1].generate(tokens, attention_mask=mask, max_new_tokens=20)
    assert made.tolist() != plain.tolist()


def test_the_prompt_may_be_a_single_token(family: tuple[Any, Any]) -> None:
    assert_same_texts(family, torch.tensor([[5]]), max_new_tokens=3)


def test_rows_that_have_ended_are_filled_while_others_go_on(pair: tuple[Any, Any]) -> None:
    tokens, mask = prompts(9, 3, 6)
    ends = ending_tokens(pair[1], tokens, mask)
    made = assert_same_texts(pair, tokens, attention_mask=mask, max_new_tokens=40, eos_token_id=ends[:2])
    filled = (made[:, 9:] == PADDING).sum(1).tolist()
    assert min(filled) == 0
    assert max(filled) > 0


def test_generation_ends_with_the_last_text(pair: tuple[Any, Any]) -> None:
    tokens, mask = prompts(4)
    (end,) = ending_tokens(pair[1], tokens, mask)
    made = assert_same_texts(pair, tokens, max_new_tokens=40, eos_token_id=end)
    assert made.shape[1] < 4 + 40
    assert int(made[0, -1]) == end


def test_without_a_padding_token_the_first_that_ends_a_text_fills(pair: tuple[Any, Any]) -> None:
    tokens, mask = prompts(9, 3)
    ends = ending_tokens(pair[1], tokens, mask)
    options = {"attention_mask": mask, "eos_token_id": ends, "max_new_tokens": 30}
    held = [model.generation_config.pad_token_id for model in pair]
    for model in pair:
        model.generation_config.pad_token_id = None
    try:
        assert_same_texts(pair, tokens, **options)
    finally:
        for model, token in zip(pair, held, strict=True):
            model.generation_config.pad_token_id = token


@pytest.mark.parametrize("fewest", [{"min_new_tokens": 9}, {"min_length": 18}], ids=str)
def test_no_text_ends_before_it_may(pair: tuple[Any, Any], fewest: dict[str, int]) -> None:
    tokens, mask = prompts(9, 3)
    ends = ending_tokens(pair[1], tokens, mask)
    options: dict[str, Any] = {"attention_mask": mask, "eos_token_id": ends, "max_new_tokens": 20, **fewest}
    made = assert_same_texts(pair, tokens, **options)
    assert not set(made[:, 9:17].flatten().tolist()) & set(ends)


def test_the_padding_token_is_padding_where_no_mask_is_given(pair: tuple[Any, Any]) -> None:
    tokens, mask = prompts(9, 3)
    made = assert_same_texts(pair, tokens, max_new_tokens=N_NEW)
    assert made.tolist() == pair[1].generate(tokens, attention_mask=mask, max_new_tokens=N_NEW).tolist()


def test_without_a_prompt_a_text_begins_with_the_token_for_that(pair: tuple[Any, Any]) -> None:
    made = assert_same_texts(pair, max_new_tokens=5)
    assert int(made[0, 0]) == BEGIN


def test_the_length_of_the_text_may_be_limited_instead(pair: tuple[Any, Any]) -> None:
    tokens, _ = prompts(6)
    assert assert_same_texts(pair, tokens, max_length=11).shape == (1, 11)


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 0, "top_p": 0.8},
    {"min_p": 0.05},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
    {"num_return_sequences": 3},
]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_the_tokens_drawn_are_those_that_transformers_draws(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    tokens, mask = prompts(9, 3)
    made = assert_same_texts(pair, tokens, attention_mask=mask, do_sample=True, max_new_tokens=20, **options)
    greedy = pair[1].generate(tokens, attention_mask=mask, max_new_tokens=20)
    assert made[:2].tolist() != greedy.tolist()


def test_the_same_seed_gives_the_same_tokens(pair: tuple[Any, Any]) -> None:
    model, (tokens, _) = pair[1], prompts(5, 5)
    options = {"do_sample": True, "max_new_tokens": 20}
    first = model.generate(tokens, seed=3, **options)
    assert torch.equal(model.generate(tokens, seed=3, **options), first)
    assert torch.equal(model.generate(tokens, generator=torch.Generator().manual_seed(3), **options), first)
    assert not torch.equal(model.generate(tokens, seed=4, **options), first)


def test_a_seed_of_ones_own_leaves_the_global_generator_alone(pair: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    pair[1].generate(prompts(5)[0], do_sample=True, max_new_tokens=5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_scores_are_returned_on_request(pair: tuple[Any, Any]) -> None:
    tokens, mask = prompts(9, 3)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs, ours = (
        model.generate(tokens, attention_mask=mask, max_new_tokens=4, repetition_penalty=1.4, **options)
        for model in pair
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    for kind in ("scores", "logits"):
        assert len(ours[kind]) == 4
        for our_step, their_step in zip(ours[kind], theirs[kind], strict=True):
            torch.testing.assert_close(our_step, their_step, atol=1e-4, rtol=1e-4)
    ours.scores[0].requires_grad_().sum().backward()


def test_rules_of_transformers_are_taken(pair: tuple[Any, Any]) -> None:
    tokens, _ = prompts(6)
    rules = transformers.LogitsProcessorList([transformers.NoRepeatNGramLogitsProcessor(1)])
    made = assert_same_texts(pair, tokens, max_new_tokens=N_NEW, logits_processor=rules)
    new = made[0, 6:].tolist()
    assert len(set(new)) == len(new)


def test_the_result_may_be_written_to(pair: tuple[Any, Any]) -> None:
    made = pair[1].generate(prompts(4)[0], max_new_tokens=2)
    made[0, 0] = 5
    assert made.untyped_storage().nbytes() == made.nbytes


def test_a_prompt_on_another_integer_type_is_taken(pair: tuple[Any, Any]) -> None:
    tokens, mask = prompts(5, 3)
    made = pair[1].generate(tokens.int(), attention_mask=mask.bool(), max_new_tokens=3)
    assert torch.equal(made, pair[1].generate(tokens, attention_mask=mask, max_new_tokens=3))


# The config that lies beside the weights


def test_the_checkpoints_own_config_is_honoured(tmp_path: Path) -> None:
    folder = save_small(tmp_path)
    fields = {"max_new_tokens": 7, "do_sample": True, "top_k": 3, "repetition_penalty": 1.5, "pad_token_id": PADDING}
    (folder / "generation_config.json").write_text(json.dumps({**fields, "house_style": "terse"}))
    pair = twins(folder)
    assert pair[1].generation_config == GenerationConfig(**fields, house_style="terse")
    tokens, _ = prompts(5)
    assert assert_same_texts(pair, tokens).shape[1] == 12
    assert assert_same_texts(pair, tokens, do_sample=False, max_new_tokens=4).shape[1] == 9
    given = {"generation_config": GenerationConfig(max_new_tokens=3)}
    assert pair[1].generate(tokens, **given).shape[1] == 8


def test_it_is_saved_with_the_model(tmp_path: Path) -> None:
    model = fastload.AutoModelForCausalLM.from_pretrained(save_small(tmp_path / "a"))
    model.generation_config = GenerationConfig(top_k=3, house_style="terse", pad_token_id=PADDING)
    model.save_pretrained(tmp_path / "b")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").generation_config
    assert (theirs.top_k, theirs.house_style, theirs.pad_token_id) == (3, "terse", PADDING)
    again = fastload.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert again.generation_config == model.generation_config


def test_without_one_the_models_config_says_it(tmp_path: Path) -> None:
    folder = save_small(tmp_path, eos_token_id=7)
    (folder / "generation_config.json").unlink()
    for model in twins(folder):
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (7, PADDING)


def test_what_a_new_model_saves_is_what_transformers_saves(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "theirs", eos_token_id=7)
    config = fastload.AutoConfig.from_pretrained(folder)
    fastload.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / name / "generation_config.json").read_text()) for name in ("theirs", "ours"))
    theirs.pop("transformers_version")
    ours.pop("transformers_version", None)
    assert ours == theirs


def test_a_damaged_one_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = save_small(tmp_path)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        fastload.AutoModelForCausalLM.from_pretrained(folder)


# Streaming


class Listener:
    """Keeps what a streamer gets."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


def test_a_streamer_gets_what_transformers_gives_it(pair: tuple[Any, Any]) -> None:
    tokens, mask = prompts(9, 3)
    ends = ending_tokens(pair[1], tokens, mask)
    theirs, ours = Listener(), Listener()
    for model, listener in zip(pair, (theirs, ours), strict=True):
        model.generate(tokens, attention_mask=mask, eos_token_id=ends, max_new_tokens=20, streamer=listener)
    assert ours.got == theirs.got
    assert ours.got[0] == tokens.tolist()
    assert ours.got[-1] == "end"


def test_tokens_can_be_taken_one_by_one(pair: tuple[Any, Any]) -> None:
    tokens, mask = prompts(9, 3)
    made = pair[1].generate(tokens, attention_mask=mask, max_new_tokens=5)
    stream = pair[1].stream(tokens, attention_mask=mask, max_new_tokens=5)
    assert isinstance(stream, Iterator)
    assert torch.equal(torch.stack(list(stream), 1), made[:, 9:])


def test_leaving_the_loop_ends_the_work(pair: tuple[Any, Any]) -> None:
    n_calls = 0

    def count(*arguments: Any) -> None:
        nonlocal n_calls
        n_calls += 1

    hook = pair[1].lm_head.register_forward_hook(count)
    try:
        for number, _ in enumerate(pair[1].stream(prompts(4)[0], max_new_tokens=50)):
            if number == 2:
                break
    finally:
        hook.remove()
    assert n_calls == 3
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_between_two_tokens_the_callers_gradients_are_as_they_were(pair: tuple[Any, Any]) -> None:
    for _ in pair[1].stream(prompts(4)[0], max_new_tokens=2):
        assert not torch.is_inference_mode_enabled()
        assert torch.ones(1, requires_grad=True).mul(2).requires_grad


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_reaches_the_caller_and_the_streamer(pair: tuple[Any, Any], kind: type[BaseException]) -> None:
    class Interrupter(Listener):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.got) == 3:
                raise kind

    listener, model = Interrupter(), pair[1]
    with pytest.raises(kind):
        model.generate(prompts(4)[0], max_new_tokens=50, streamer=listener)
    assert listener.got[-1] == "end"
    assert len(listener.got) == 4
    # Nothing is left of it.
    assert not torch.is_inference_mode_enabled()
    assert_same_texts(pair, prompts(4)[0], max_new_tokens=4)


# What is computed


def test_the_prompt_is_scored_at_its_end_alone_and_each_token_seen_once(pair: tuple[Any, Any]) -> None:
    shapes: list[list[int]] = []
    decoder = pair[1].model.layers[0].register_forward_hook(lambda m, i, o: shapes.append(list(i[0].shape[:2])))
    head = pair[1].lm_head.register_forward_hook(lambda m, i, o: shapes.append(list(o.shape)))
    try:
        pair[1].generate(prompts(9, 3)[0], max_new_tokens=3)
    finally:
        decoder.remove()
        head.remove()
    scores = [2, 1, VOCABULARY]
    assert shapes == [[2, 9], scores, [2, 1], scores, [2, 1], scores]


def test_no_gradients_are_kept(pair: tuple[Any, Any]) -> None:
    recorded = []
    hook = pair[1].lm_head.register_forward_hook(lambda m, i, o: recorded.append(o.requires_grad))
    try:
        pair[1].generate(prompts(4)[0], max_new_tokens=2)
    finally:
        hook.remove()
    assert recorded == [False, False]


def test_a_model_trains_after_it_has_generated(tmp_path: Path) -> None:
    model = fastload.AutoModelForCausalLM.from_pretrained(save_small(tmp_path))
    tokens, _ = prompts(6)
    model.generate(tokens, max_new_tokens=2)
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("way", [{"lazy": True}, {"stream": True}, {"memory_budget": "auto"}], ids=str)
@pytest.mark.parametrize("dtype", ["auto", "float64"])
def test_weights_may_arrive_while_the_text_is_made(tmp_path: Path, way: dict[str, Any], dtype: str) -> None:
    folder = save_small(tmp_path)
    tokens, mask = prompts(9, 3)
    load = fastload.AutoModelForCausalLM.from_pretrained
    options = {"attention_mask": mask, "max_new_tokens": N_NEW}
    expected = load(folder, dtype=dtype).generate(tokens, **options)
    assert torch.equal(load(folder, dtype=dtype, **way).generate(tokens, **options), expected)
