"""Decoders give what transformers gives, from the files that transformers wrote."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_decoders import DENSE, FAMILIES, SIZES, assert_close, each_family, left_padded, pair, their_model, tokens

import fastload
from fastload import KVCache
from tests.conftest import same_bytes


@each_family
@torch.no_grad()
def test_logits_and_hidden_states_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, family)
    for length in (1, 3, 11):
        expected = theirs(tokens(2, length), output_hidden_states=True)
        output = ours(tokens(2, length), output_hidden_states=True)
        assert_close(output.logits, expected.logits)
        assert len(output.hidden_states) == len(expected.hidden_states) == SIZES["num_hidden_layers"] + 1
        for mine, other in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert_close(mine, other)
    assert output.logits.std() > 0.1


@each_family
@torch.no_grad()
def test_texts_of_a_batch_may_be_padded_on_the_left(family: str, tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, family)
    inputs = left_padded(11, 11, 4, 8)
    kept = inputs["attention_mask"].bool()
    output = ours(**inputs).logits
    assert_close(output[kept], theirs(**inputs).logits[kept])
    alone = ours(inputs["input_ids"][1:2, -4:]).logits
    assert_close(output[1:2, -4:], alone)
    assert output.isfinite().all()


@each_family
@pytest.mark.parametrize("steps", [[1] * 11, [6, 1, 1, 3], [2, 9]], ids=["one by one", "a prompt first", "in chunks"])
@torch.no_grad()
def test_tokens_may_come_in_steps(family: str, steps: list[int], tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, family)
    inputs = left_padded(11, 11, 7)
    expected = theirs(**inputs).logits
    cache = KVCache(ours.config, batch_size=2, max_length=11)
    begin = 0
    for n_tokens in steps:
        end = begin + n_tokens
        output = ours(
            inputs["input_ids"][:, begin:end],
            inputs["attention_mask"][:, :end],
            inputs["position_ids"][:, begin:end],
            past_key_values=cache,
        )
        assert output.past_key_values is cache
        assert cache.length == end
        kept = inputs["attention_mask"][:, begin:end].bool()
        assert_close(output.logits[kept], expected[:, begin:end][kept])
        begin = end


@each_family
@torch.no_grad()
def test_positions_go_on_from_the_cache(family: str, tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, family)
    text = tokens(2, 9)
    first = ours(text[:, :4], use_cache=True)
    second = ours(text[:, 4:8], past_key_values=first.past_key_values)
    third = ours(text[:, 8:], past_key_values=second.past_key_values)
    assert third.past_key_values.length == 9
    assert_close(torch.cat([first.logits, second.logits, third.logits], dim=1), theirs(text).logits)


@each_family
@torch.no_grad()
def test_greedy_decoding_gives_the_same_tokens(family: str, tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, family)
    inputs = left_padded(6, 6, 3)
    expected = theirs.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)[:, 6:]
    cache = KVCache(ours.config, batch_size=2, max_length=18)
    ids, mask, positions = inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"]
    chosen = []
    for _ in range(12):
        logits = ours(ids, mask, positions, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        # transformers forbids the end of a text before the least length.
        logits[:, SIZES["eos_token_id"]] = -torch.inf
        ids = logits.argmax(-1, keepdim=True)
        mask, positions = torch.cat([mask, torch.ones_like(ids)], dim=1), positions[:, -1:] + 1
        chosen.append(ids)
    assert torch.equal(torch.cat(chosen, dim=1), expected)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no biases": ("llama", {"attention_bias": False, "mlp_bias": False}),
    "one head for all keys": ("llama", {"num_key_value_heads": 1}),
    "as many heads of keys": ("qwen2", {"num_key_value_heads": 4}),
    "heads that fill the hidden size": ("llama", {"head_dim": None}),
    "a tied head": ("llama", {"tie_word_embeddings": True}),
    "a head of its own": ("gemma", {"tie_word_embeddings": False}),
    "another activation": ("mistral", {"hidden_act": "gelu"}),
    "an old name of an activation": ("gemma", {"hidden_act": "gelu"}),
    "no window": ("mistral", {"sliding_window": None}),
    "a window longer than the text": ("mistral", {"sliding_window": 40}),
    "a window of one": ("mistral", {"sliding_window": 1}),
    "windows for some layers": ("qwen3", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
    "types of layers": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "a window for experts": ("mixtral", {"sliding_window": 4}),
    "a window for experts of qwen": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4}),
    "dense layers among experts": ("qwen3_moe", {"mlp_only_layers": [0], "decoder_sparse_step": 1}),
    "every second layer of experts": ("qwen3_moe", {"decoder_sparse_step": 2, "norm_topk_prob": False}),
    "no experts": ("qwen3_moe", {"num_experts": 0}),
    "one expert for a token": ("mixtral", {"num_experts_per_tok": 1}),
    "no caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "a cap that is not applied": ("gemma3_text", {"attn_logit_softcapping": 0.1}),
    "eyes for both sides": ("gemma3_text", {"use_bidirectional_attention": True}),
}


@pytest.mark.parametrize(("family", "fields"), VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_fields_of_a_config_mean_what_they_mean_to_transformers(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    theirs, ours = pair(tmp_path, family, **fields)
    inputs = left_padded(11, 11, 6)
    kept = inputs["attention_mask"].bool()
    assert_close(ours(**inputs).logits[kept], theirs(**inputs).logits[kept])
    assert_close(ours(tokens(2, 11)).logits, theirs(tokens(2, 11)).logits)


@each_family
@torch.no_grad()
def test_eager_attention_gives_the_same_and_the_weights(family: str, tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, family)
    theirs.set_attn_implementation("eager")
    inputs = left_padded(9, 9, 5)
    kept = inputs["attention_mask"].bool()
    expected, output = theirs(**inputs, output_attentions=True), ours(**inputs, output_attentions=True)
    assert_close(output.logits[kept], expected.logits[kept])
    for mine, other in zip(output.attentions, expected.attentions, strict=True):
        assert mine.shape == other.shape
        assert_close(mine.transpose(1, 2)[kept], other.transpose(1, 2)[kept])
    eager = fastload.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert_close(eager(**inputs).logits[kept], expected.logits[kept])
    assert eager(**inputs).attentions is None


@each_family
def test_losses_and_gradients_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, family)
    theirs.train(), ours.train()
    labels = tokens(2, 9)
    labels[0, :3] = -100
    for model in (theirs, ours):
        model(tokens(2, 9), labels=labels).loss.backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, expected[name])
        assert parameter.grad.abs().sum() > 0


def test_checkpointed_activations_give_the_same_gradients(tmp_path: Path) -> None:
    _, ours = pair(tmp_path, "qwen3")
    ours.train()
    gradients = []
    for _ in range(2):
        ours.zero_grad()
        output = ours(tokens(2, 9), labels=tokens(2, 9), use_cache=True)
        output.loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in ours.named_parameters()})
        ours.gradient_checkpointing_enable()
    assert output.past_key_values is None
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@each_family
@torch.no_grad()
def test_loaded_as_bfloat16_the_weights_are_bit_for_bit_those_of_transformers(family: str, tmp_path: Path) -> None:
    their_model(family).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = fastload.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(same_bytes(mine[name], other[name]) for name in other)
    assert {buffer.dtype for buffer in ours.buffers()} == {torch.float32}
    ids = tokens(2, 9)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0.02, atol=0.05)


@torch.no_grad()
def test_what_is_asked_of_a_forward(tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, "llama")
    ids = tokens(2, 7)
    everything = ours(ids).logits
    assert_close(ours(ids, logits_to_keep=2).logits, everything[:, -2:])
    assert_close(ours(ids, logits_to_keep=torch.tensor([1, 5])).logits, everything[:, [1, 5]])
    embedded = ours.get_input_embeddings()(ids)
    assert_close(ours(inputs_embeds=embedded).logits, everything)
    logits, *_ = ours(ids, return_dict=False, use_cache=False)
    assert_close(logits, everything)
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    seen[4:, 1] = False
    expected = theirs(ids, attention_mask=seen[None, None]).logits
    assert_close(ours(ids, attention_mask=seen[None, None]).logits, expected)
    numbers = torch.zeros(7, 7).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert_close(ours(ids, attention_mask=numbers[None, None]).logits, expected)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        ours(ids, inputs_embeds=embedded)
    with pytest.raises(ValueError, match=r"an attention mask is \(batch, 7\)"):
        ours(ids, attention_mask=torch.ones(2, 5))


def test_a_cache_is_made_where_one_is_asked_for(tmp_path: Path) -> None:
    _, ours = pair(tmp_path, "llama")
    ids = tokens(1, 3)
    assert ours(ids).past_key_values is None
    assert ours(ids, use_cache=True).past_key_values.length == 3
    with torch.no_grad():
        assert ours(ids).past_key_values.length == 3
        assert ours(ids, use_cache=False).past_key_values is None
        ours.config.use_cache = False
        assert ours(ids).past_key_values is None


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_models_have_the_values_that_transformers_gives_them(family: str) -> None:
    fields = {**SIZES, **FAMILIES[family]}
    config = fastload.AutoConfig.for_model(family, **fields)
    ours = fastload.AutoModelForCausalLM.from_config(config)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **fields))
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert abs(mine.mean() - other.mean()) < 0.01, name
        assert abs(mine.std() - other.std()) < 0.01, name


@pytest.mark.parametrize("family", DENSE[:1])
@torch.no_grad()
def test_a_vocabulary_can_be_resized(family: str, tmp_path: Path) -> None:
    _, ours = pair(tmp_path, family)
    before = ours(tokens(1, 5)).logits
    ours.resize_token_embeddings(120)
    assert_close(ours(tokens(1, 5)).logits[..., :97], before)
    assert ours.config.vocab_size == 120


@each_family
@torch.no_grad()
def test_models_can_be_copied_and_pickled(family: str, tmp_path: Path) -> None:
    _, ours = pair(tmp_path, family)
    expected = ours(tokens(1, 7)).logits
    assert torch.equal(copy.deepcopy(ours)(tokens(1, 7)).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(tokens(1, 7)).logits, expected)


@pytest.mark.parametrize("family", DENSE)
@torch.no_grad()
def test_models_without_experts_can_be_exported(family: str, tmp_path: Path) -> None:
    _, ours = pair(tmp_path, family)
    exported = torch.export.export(ours, (tokens(1, 7),), {"use_cache": False}).module()
    assert_close(exported(tokens(1, 7, seed=5), use_cache=False).logits, ours(tokens(1, 7, seed=5)).logits)


def test_a_fresh_process_needs_no_other_library(tmp_path: Path) -> None:
    theirs = their_model("qwen3_moe")
    theirs.save_pretrained(tmp_path)
    script = """
import sys
sys.modules["transformers"] = None
import torch
from fastload import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model(torch.tensor([[3, 4, 5]])).logits.argmax(-1).tolist())
print([name for name in ("accelerate", "huggingface_hub", "safetensors", "numpy.random") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    expected = theirs(torch.tensor([[3, 4, 5]])).logits.argmax(-1).tolist()
    assert done.stdout.splitlines() == [str(expected), "[]"]
