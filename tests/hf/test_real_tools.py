"""Libraries on top of transformers, unchanged: the same results with fastload switched on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import sentence_transformers
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.data import Dataset

import fastload
from fastload import hf
from fastload.examples.semantic_search import SENTENCES, packaged_model
from tests.conformance.compare import TensorState, tensor_state
from tests.hf.families import build
from tests.hf.sides import assert_same_models

# peft asks a model for something under its older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Written = Callable[..., Path]
TEXTS = [text for _, text in SENTENCES]


@pytest.fixture(scope="module")
def mini_lm() -> Path:
    """A trained model of 90 MB and its tokenizer."""
    return Path(packaged_model())


def test_sentences_have_the_same_embeddings(mini_lm: Path) -> None:
    expected = sentence_transformers.SentenceTransformer(str(mini_lm), device="cpu").encode(TEXTS)
    hf.reset_stats()
    with hf.enabled():
        model = sentence_transformers.SentenceTransformer(str(mini_lm), device="cpu")
    assert hf.stats() == hf.Stats(fast_loads=1)
    assert (model.encode(TEXTS) == expected).all()
    assert fastload.report(model[0].auto_model).bytes_by_action.keys() == {"map"}


def with_tokenizer(folder: Path, model: Any, mini_lm: Path) -> Path:
    model.save_pretrained(folder)
    for file in mini_lm.glob("*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize(
    ("task", "family", "class_name", "text", "options"),
    [
        ("fill-mask", "bert", "BertForMaskedLM", "a [MASK] sat here", {}),
        ("feature-extraction", "bert", "BertModel", "a kitten naps", {"dtype": "bfloat16"}),
        ("text-classification", "bert", "BertForSequenceClassification", "a kitten naps", {}),
        ("text-generation", "gpt2", "GPT2LMHeadModel", "the market", {"device_map": "cpu"}),
    ],
)
def test_a_pipeline_answers_the_same(
    tmp_path: Path, mini_lm: Path, task: Any, family: str, class_name: str, text: str, options: dict[str, Any]
) -> None:
    size = transformers.AutoTokenizer.from_pretrained(mini_lm).vocab_size
    folder = with_tokenizer(tmp_path, build(family, class_name, vocab_size=size), mini_lm)
    asked: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False} if task == "text-generation" else {}
    expected = transformers.pipeline(task, model=str(folder), **options)(text, **asked)
    hf.reset_stats()
    with hf.enabled():
        found = transformers.pipeline(task, model=str(folder), **options)
    assert hf.stats() == hf.Stats(fast_loads=1)
    assert found(text, **asked) == expected


@pytest.fixture(scope="module")
def adapter(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A low-rank adapter of the small Llama, with weights that are not zero."""
    folder = tmp_path_factory.mktemp("adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(written("llama"))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    peft.get_peft_model(base, config).save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(10)[None]).logits
    return found


def test_an_adapter_on_a_base_that_fastload_loaded(written: Written, adapter: Path) -> None:
    bases = [autos.AutoModelForCausalLM.from_pretrained(written("llama")) for autos in (transformers, hf)]
    plain = logits(bases[0])
    expected, found = (peft.PeftModel.from_pretrained(base, str(adapter)) for base in bases)
    assert torch.equal(logits(found), logits(expected))
    assert not torch.equal(logits(found), plain)
    merged = found.merge_and_unload()
    assert torch.equal(logits(merged), logits(expected.merge_and_unload()))


def test_a_folder_of_an_adapter_alone_brings_its_base(written: Written, adapter: Path) -> None:
    expected = transformers.AutoModelForCausalLM.from_pretrained(adapter)
    hf.reset_stats()
    found = hf.AutoModelForCausalLM.from_pretrained(adapter)
    with hf.enabled():
        switched = transformers.AutoModelForCausalLM.from_pretrained(adapter)
        through_peft = peft.AutoPeftModelForCausalLM.from_pretrained(str(adapter))
    assert hf.stats().fast_loads == 3
    assert torch.equal(logits(through_peft), logits(expected))
    for model in (found, switched):
        assert_same_models(expected, model)
        assert torch.equal(logits(model), logits(expected))


def test_an_adapter_is_added_to_a_model(written: Written, adapter: Path) -> None:
    expected = transformers.AutoModelForCausalLM.from_pretrained(written("llama"))
    expected.load_adapter(str(adapter), adapter_name="mine")
    with hf.enabled():
        found = transformers.AutoModelForCausalLM.from_pretrained(written("llama"))
        found.load_adapter(str(adapter), adapter_name="mine")
    assert_same_models(expected, found)
    assert torch.equal(logits(found), logits(expected))


def weights(folder: Path) -> dict[str, TensorState]:
    tensors = load_file(folder / "model.safetensors")
    return {key: tensor_state("stored", tensor) for key, tensor in tensors.items()}


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """A few texts of eight tokens."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(8) + number
        return {"input_ids": tokens, "labels": tokens}


def trained(folder: Path, start: Path) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, seed=1
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(start)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Sentences())
    trainer.train()
    return trainer


def test_a_trainer_saves_and_resumes_the_same(written: Written, tmp_path: Path) -> None:
    trained(tmp_path / "stock", written("llama")).save_model(str(tmp_path / "stock" / "final"))
    hf.reset_stats()
    with hf.enabled():
        trainer = trained(tmp_path / "fast", written("llama"))
        trainer.save_model(str(tmp_path / "fast" / "final"))
        assert hf.stats() == hf.Stats(fast_loads=1, fast_saves=3)
        for saved in ("final", "checkpoint-1", "checkpoint-2"):
            assert weights(tmp_path / "fast" / saved) == weights(tmp_path / "stock" / saved)
        trainer.train(resume_from_checkpoint=str(tmp_path / "fast" / "checkpoint-1"))
    final = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock" / "final").state_dict()
    assert all(torch.equal(tensor, final[key]) for key, tensor in trainer.model.state_dict().items())
    assert {path.name for path in (tmp_path / "fast" / "final").iterdir()} == {
        path.name for path in (tmp_path / "stock" / "final").iterdir()
    }
