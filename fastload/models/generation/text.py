"""Text from tokens that come one at a time."""

from __future__ import annotations

from typing import Any

__all__ = ["TextPieces"]

# What decoders write for bytes that are no character (yet).
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, and a token at least one. Beyond that it will not become one.
_MOST_TOKENS_HELD_BACK = 8


class TextPieces:
    """Decodes a text while it grows.

    A token on its own may be the middle of a character, and its space may depend on the one before. Each piece is what
    decoding gains by the new tokens after those of the last piece, and is held back while it ends within a character.

    Args:
        tokenizer: with ``decode(ids, skip_special_tokens=...)``, of tokenizers or of transformers.
        skip_special_tokens: leave out tokens such as the one that ends a text.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int] = []
        self._held: list[int] = []

    def put(self, token: int) -> str:
        """The text that is complete with this token, which may be none."""
        self._held.append(token)
        piece = self._piece()
        if (not piece or piece.endswith(_INCOMPLETE)) and len(self._held) <= _MOST_TOKENS_HELD_BACK:
            return ""
        self._context, self._held = self._held, []
        return piece

    def end(self) -> str:
        """What was held back."""
        piece = self._piece() if self._held else ""
        self._held = []
        return piece

    def _piece(self) -> str:
        before, after = self._decoded(self._context), self._decoded(self._context + self._held)
        return after[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special_tokens)
        return text
