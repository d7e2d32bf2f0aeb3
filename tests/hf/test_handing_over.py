"""What fastload leaves to transformers' own code: the same result, counted, with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastload import hf
from tests.hf.families import LLAMA, build
from tests.hf.sides import assert_same_load, assert_same_outcome

Written = Callable[..., Path]
Llama = transformers.LlamaForCausalLM
# GGUF's names of what a Llama is made of.
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture
def fp8(written: Written, tmp_path: Path) -> Path:
    """A Llama whose linear layers are stored in 8 bits, with a scale for each block."""
    shutil.copytree(written("llama"), tmp_path / "fp8")
    tensors = load_file(written("llama") / "model.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if "_proj" in key:
            stored[key] = (tensor * 100).to(torch.float8_e4m3fn)
            stored[f"{key}_scale_inv"] = torch.full((1, 1), 0.01)
        else:
            stored[key] = tensor
    save_file(stored, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [64, 64],
    }
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    return tmp_path / "fp8"


def test_a_quantised_checkpoint(fp8: Path) -> None:
    loaded = assert_same_load(Llama, fp8, reason="quantizer fp8")
    assert loaded.model is not None
    expected = load_file(fp8 / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float() * 0.01
    assert torch.allclose(loaded.model.model.layers[0].mlp.up_proj.weight.float(), expected, rtol=0.01)


def test_the_auto_classes_hand_over_too(fp8: Path) -> None:
    hf.reset_stats()
    hf.AutoModelForCausalLM.from_pretrained(fp8)
    assert hf.stats() == hf.Stats(handed_over_loads=1, reasons={"quantizer fp8": 1})


def test_a_gguf_file(tmp_path: Path) -> None:
    model = build("llama")
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(LLAMA["num_hidden_layers"])
    writer.add_context_length(LLAMA["max_position_embeddings"])
    writer.add_embedding_length(LLAMA["hidden_size"])
    writer.add_feed_forward_length(LLAMA["intermediate_size"])
    writer.add_head_count(LLAMA["num_attention_heads"])
    writer.add_head_count_kv(LLAMA["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(LLAMA["vocab_size"])
    for key, tensor in model.state_dict().items():
        for ours, theirs in GGUF_NAMES.items():
            key = key.replace(ours, theirs)
        writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = assert_same_load(Llama, tmp_path, reason="quantizer gguf", gguf_file="tiny.gguf")
    assert loaded.model is not None
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)


def test_a_checkpoint_without_weights_is_transformers_error(written: Written, tmp_path: Path) -> None:
    shutil.copy(written("llama") / "config.json", tmp_path)
    before = hf.stats()
    assert assert_same_outcome(Llama, tmp_path).error.startswith("OSError")
    assert hf.stats() == before


def test_counts_begin_anew_and_can_be_read() -> None:
    hf.reset_stats()
    assert hf.stats() == hf.Stats()
    assert str(hf.stats()) == "0 loads by fastload, 0 handed over; 0 saves by fastload, 0 handed over"


def test_counts_say_what_was_done_and_why(written: Written, fp8: Path) -> None:
    hf.reset_stats()
    with hf.enabled():
        Llama.from_pretrained(written("llama"))
        Llama.from_pretrained(fp8)
        Llama.from_pretrained(fp8)
    assert hf.stats() == hf.Stats(fast_loads=1, handed_over_loads=2, reasons={"quantizer fp8": 2})
    assert str(hf.stats()).startswith("1 loads by fastload, 2 handed over;")
    assert "2 x quantizer fp8" in str(hf.stats())
