"""In what order a model will use its tensors, as far as their names tell.

Before the model is built only the names in the files are known. They tell enough: embeddings come first, layers follow
by number, and what belongs to no layer (the last norm, the head) comes last. Of two numbered stacks the one that looks
at the input (an encoder, a vision tower) precedes the one that answers. Within a layer the order of the file is kept:
it is read at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fastload.formats.specs import TensorSpec

__all__ = ["in_order_of_use"]

_FIRST_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_EMBEDDING = re.compile(r"emb|(?:^|\.)w[tp]e(?:\.|$)", re.IGNORECASE)
_INPUT_SIDE = re.compile(r"encoder|vis(?:ion|ual)|audio", re.IGNORECASE)


def in_order_of_use(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The tensors in the order in which a forward pass is likely to need them; a layer's own by file and offset."""
    return sorted(specs, key=lambda spec: (_block(spec.key), spec.region[:2]))


def _block(key: str) -> tuple[int, str, int]:
    """Where a key's block comes: (kind, name of the stack, number in the stack)."""
    match = _FIRST_NUMBER.search(key)
    stack = key if match is None else key[: match.start()]
    # "model.embed_tokens.weight", but also "embeddings.0.weight"; not the norm within the embeddings of a layer.
    if _EMBEDDING.search(stack):
        return 0, "", 0
    if match is None:
        return 3, "", 0
    return 1 if _INPUT_SIDE.search(stack) else 2, stack, int(match[1])
