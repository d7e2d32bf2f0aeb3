"""Process start to first token, and decoding: ``first_token.py LIBRARY FOLDER COLD N``.

LIBRARY is fastload or transformers. With COLD "cold" the files' cached pages are dropped before the clock starts, with
N above 1 so many tokens are generated greedily after the first.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from time import monotonic

_PROMPT = [[1, 1000, 1001, 1002, 1003, 1004, 1005, 1006]]


def main(library: str, folder: str, n_tokens: int) -> None:
    """What a script does that generates."""
    import torch

    at_torch = monotonic()
    model_class = import_module(library).AutoModelForCausalLM
    model = model_class.from_pretrained(folder, dtype="auto")
    at_model = monotonic()
    ids = torch.tensor(_PROMPT)
    with torch.inference_mode():
        first = int(model(ids).logits[0, -1].argmax())
    at_token = monotonic()
    metrics = {}
    tokens = [first]
    if n_tokens > 1:
        model.generate(ids, max_new_tokens=4, do_sample=False)
        begun = monotonic()
        output = model.generate(ids, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False)
        metrics = {"decode_s": monotonic() - begun}
        tokens = output[0].tolist()[len(_PROMPT[0]) :]

    from suite.fresh import finish, started
    from suite.memory import peak_resident_bytes, private_bytes

    finish(
        metrics={
            "seconds": at_token - started(),
            "torch_s": at_torch - started(),
            "load_s": at_model - at_torch,
            "forward_s": at_token - at_model,
            "private_bytes": private_bytes(),
            "peak_bytes": peak_resident_bytes(),
            **metrics,
        },
        tokens=tokens,
    )


if sys.argv[3] == "cold":
    from suite.checkpoints import weight_files
    from suite.cold import drop_cached

    drop_cached(weight_files(Path(sys.argv[2])))
main(sys.argv[1], sys.argv[2], int(sys.argv[4]))
