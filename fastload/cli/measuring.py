"""One library, one checkpoint, one fresh process: ``python -m fastload.cli.measuring JOB``.

The process imports the library, loads the model, runs it, and says on its last line of output what that took. Its clock
begins in the process that asks, before this one is made: time.monotonic() is one clock for all processes of a machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib import import_module
from time import monotonic
from typing import Any

from fastload.cli.usage import peak_bytes, read_bytes
from fastload.errors import FastloadError
from fastload.storage.memory import private_bytes

__all__ = ["Job", "run_job"]

# Local files, no bars, no advice: what has nothing to do with the work takes no time.
_SETTINGS = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
_N_OUTPUTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a process is to do.

    Attributes:
        library: ``"fastload"`` or ``"transformers"``.
        auto_class: such as ``"AutoModelForCausalLM"``.
        folder: of the checkpoint.
        load_options: for from_pretrained.
        tokens: the input, one text.
        generate_options: for generate, after ``torch.manual_seed(seed)``; None to run the model itself, twice.
    """

    library: str
    auto_class: str
    folder: str
    load_options: dict[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...]
    generate_options: dict[str, Any] | None = None
    seed: int = 0


def run_job(job: Job) -> dict[str, Any]:
    """Do it in a fresh process.

    Returns:
        Seconds since the process was asked for: ``at_torch``, ``at_library`` (their imports), ``at_model``, and either
        ``at_output`` and ``at_second_output`` of two forwards, or ``at_tokens``, one a token. ``stages_ms`` of the load
        (fastload), ``private_bytes``, ``peak_bytes``, ``read_bytes``. ``output``: numbers to compare, or the tokens.

    Raises:
        FastloadError: the process ended with an error, the end of which is in the message.
    """
    # The same fastload as here, from whatever folder it was imported.
    package_folder = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    paths = os.pathsep.join(filter(None, [package_folder, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "fastload.cli.measuring", json.dumps(asdict(job)), repr(monotonic())]
    environment = os.environ | _SETTINGS | {"PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise FastloadError(
            f"{job.library} did not come to an end",
            file=job.folder,
            found="\n            ".join(done.stderr.strip().splitlines()[-8:]) or f"exit status {done.returncode}",
        )
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def _main(text: str, asked_at: str) -> None:
    job = Job(**json.loads(text))
    begun = float(asked_at)
    import torch

    result: dict[str, Any] = {"at_torch": monotonic() - begun}
    library = import_module(job.library)
    auto_class = getattr(library, job.auto_class)
    result["at_library"] = monotonic() - begun
    model = auto_class.from_pretrained(job.folder, **job.load_options)
    result["at_model"] = monotonic() - begun
    tokens = torch.tensor([job.tokens], device=model.device)
    if job.generate_options is None:
        result |= _run_twice(model, tokens, begun)
    else:
        result |= _generate(model, tokens, job, begun)
    result |= {"private_bytes": private_bytes(), "peak_bytes": peak_bytes(), "read_bytes": read_bytes()}
    result |= {"class": type(model).__name__, "stages_ms": _stages_ms(model), "version": library.__version__}
    print(json.dumps(result))


def _run_twice(model: Any, tokens: Any, begun: float) -> dict[str, Any]:
    import torch

    with torch.inference_mode():
        output = model(tokens)[0]
        at_output = monotonic() - begun
        model(tokens)
    # The last token's numbers, or those of a classifier.
    numbers = output.float().flatten()[-_N_OUTPUTS:].tolist()
    return {"at_output": at_output, "at_second_output": monotonic() - begun, "output": numbers}


def _generate(model: Any, tokens: Any, job: Job, begun: float) -> dict[str, Any]:
    import torch

    torch.manual_seed(job.seed)
    clock = _Clock(begun)
    made = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), streamer=clock, **(job.generate_options or {})
    )
    # The first that a streamer gets is the prompt.
    return {"at_tokens": clock.times[1:], "output": made[0, tokens.shape[1] :].tolist()}


class _Clock:
    """A streamer that notes when tokens come."""

    def __init__(self, begun: float) -> None:
        self.times: list[float] = []
        self._begun = begun

    def put(self, tokens: object) -> None:
        self.times.append(monotonic() - self._begun)

    def end(self) -> None:
        pass


def _stages_ms(model: Any) -> dict[str, float] | None:
    from fastload.errors import OptionError
    from fastload.filling import report

    try:
        return report(model).stages_ms
    except OptionError:  # loaded by somebody else
        return None


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except FastloadError as error:
        sys.exit(str(error))
