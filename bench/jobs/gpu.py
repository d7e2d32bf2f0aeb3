"""A process that measures what it is asked, for ``bench/gpu.py``: ``gpu.py LOADER DEVICE``.

It imports what the loader needs, says what it is, and then answers each line of stdin, a request in JSON, by a line of
stdout: what was measured, or ``{"error": ...}``, or ``{"not_here": ...}``. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import IO, Any

from gpu_suite import hardware, loading
from gpu_suite.checkpoints import FULL, SMALL, make
from gpu_suite.device import Device
from gpu_suite.loaders import LOADERS, Loader
from gpu_suite.schedule import NotHereError
from suite.checkpoints import warm_up, weight_files
from suite.cold import cached_share
from suite.machine import describe_machine

# Whatever libraries print goes where errors go: stdout is for answers.
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def main(name: str, device: Device, requests: IO[str]) -> None:
    """Answer until the requests end."""
    loader = LOADERS.get(name)
    try:
        about = _prepare(loader, device)
    except NotHereError as reason:
        _say({"not_here": str(reason)})
        return
    except ImportError as error:
        assert loader is not None
        _say({"not_here": f"{loader.package} cannot be imported: {error}"})
        return
    _say(about)
    for line in requests:
        _say(_answer(json.loads(line), loader, device))


def _prepare(loader: Loader | None, device: Device) -> dict[str, Any]:
    if loader is None:
        device.check()
        return {"machine": describe_machine(), "accelerator": device.describe()}
    loader.prepare(device)
    device.check()
    return {"version": describe_machine()["versions"].get(loader.package)}


def _answer(request: dict[str, Any], loader: Loader | None, device: Device) -> dict[str, Any]:
    what = request.pop("do")
    try:
        return _of_loader(what, loader, device, **request) if loader else _of_machine(what, device, **request)
    except NotHereError as reason:
        return {"not_here": str(reason)}
    except Exception as error:  # noqa: BLE001  the process that asks has to hear of it, whatever it is
        traceback.print_exc()
        return {"error": "".join(traceback.format_exception_only(error)).strip()}
    finally:
        device.clear()  # nothing of it is left when others have their turn: no mapped file, no memory


def _of_loader(what: str, loader: Loader, device: Device, folder: str, **options: Any) -> dict[str, Any]:
    if what == "load":
        import torch

        dtype = torch.bfloat16 if options.pop("to_bfloat16") else None
        return loading.loads(loader, device, Path(folder), dtype=dtype, **options)
    if what == "first forward":
        return loading.first_forwards(loader, device, Path(folder), **options)
    return loading.repeated_loads(loader, device, Path(folder), **options)


def _of_machine(what: str, device: Device, **options: Any) -> dict[str, Any]:
    if what == "link":
        return hardware.link_rates(device, **options)
    if what == "flush":
        return hardware.flush(**options)
    folder = Path(options.pop("folder"))
    if what == "make":
        shape = (SMALL if options["small"] else FULL)[options["shape"]]
        make(folder, shape)
        if any(cached_share(file) < 1 for file in weight_files(folder)):  # it was made by an earlier run
            warm_up(folder)
        return {"folder": str(folder), "n_bytes": shape.n_bytes, "n_tensors": shape.n_tensors}
    if what == "page cache":
        return hardware.page_cache_rates(folder, device, **options)
    return hardware.storage_rates(weight_files(folder))


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=_answers, flush=True)


main(sys.argv[1], Device(sys.argv[2]), sys.stdin)
