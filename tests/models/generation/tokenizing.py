"""Small real tokenizers, trained here."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = ["the quick brown fox jumps over the lazy dog", "stop at the stop sign, then go on", "naïve café 漢字 🎉"] * 3
END = "<|end|>"


def byte_level(n_tokens: int = 300) -> Tokenizer:
    """Tokens are bytes and merges of them, as Llama 3 and Qwen have: characters may be cut in the middle."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def word_level() -> Tokenizer:
    """Tokens are words that bring their own space, but the first: as Llama 2 has them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", END], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer
