"""The least that a first output can cost: ``import torch``, then the same forward on weights that are ready.

Two spans of one fresh process are added: process start to the end of ``import torch``, and the process's first
forward of the same model class on the same input. Between them, unmeasured, the model is loaded and every byte of it
is read once (without a torch kernel, so that the forward still has to start torch's threads, as a first forward does).
So neither the import of modelling code, nor building a module, nor finding and mapping files, nor the page faults of
the weights are in it.
"""

from __future__ import annotations

import sys
from time import monotonic


def main(folder: str) -> None:
    """Measure the two spans."""
    at_python = monotonic()
    import torch

    at_torch = monotonic()
    from suite.fingerprint import fingerprint
    from suite.fresh import finish, started

    from fastload import BertModel

    model = BertModel.from_pretrained(folder)
    digest = fingerprint(model.state_dict())
    ids = torch.arange(1000, 1032).unsqueeze(0)
    begun = monotonic()
    with torch.inference_mode():
        output = model(ids).last_hidden_state
    forward = monotonic() - begun
    finish(
        metrics={
            "seconds": at_torch - started() + forward,
            "python_s": at_python - started(),
            "torch_s": at_torch - at_python,
            "forward_s": forward,
        },
        digest=digest,
        output=output.flatten().tolist(),
    )


main(sys.argv[1])
