"""Process start to first output: ``first_output.py LIBRARY FOLDER``, where LIBRARY is fastload or transformers."""

from __future__ import annotations

import sys
from importlib import import_module
from time import monotonic


def main(library: str, folder: str) -> None:
    """What a user's script does, with a look at the clock between the steps; it stops when the output is there."""
    at_python = monotonic()
    import torch

    at_torch = monotonic()
    model_class = import_module(library).BertModel
    at_imports = monotonic()
    model = model_class.from_pretrained(folder)
    at_model = monotonic()
    ids = torch.arange(1000, 1032).unsqueeze(0)
    with torch.inference_mode():
        output = model(ids).last_hidden_state
    at_output = monotonic()

    from suite.fingerprint import fingerprint
    from suite.fresh import finish, started
    from suite.memory import peak_resident_bytes, private_bytes

    finish(
        metrics={
            "seconds": at_output - started(),
            "python_s": at_python - started(),
            "torch_s": at_torch - at_python,
            "model_class_s": at_imports - at_torch,
            "load_s": at_model - at_imports,
            "forward_s": at_output - at_model,
            "private_bytes": private_bytes(),
            "peak_bytes": peak_resident_bytes(),
        },
        digest=fingerprint(model.state_dict()),
        output=output.flatten().tolist(),
    )


main(*sys.argv[1:])
