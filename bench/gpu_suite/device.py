"""The device under test: a GPU, or the CPU where only the suite's own logic is to be seen at work."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

from gpu_suite.schedule import NotHereError

__all__ = ["Device", "free_pinned_memory"]


@dataclass(frozen=True, slots=True)
class Device:
    """Named as torch names it: ``"cuda:0"`` or ``"cpu"``, which has no memory of its own to count."""

    name: str

    @property
    def is_gpu(self) -> bool:
        """Whether bytes have to cross a link."""
        return self.name != "cpu"

    def check(self) -> None:
        """NotHereError where torch has no such device."""
        if not self.is_gpu:
            return
        import torch

        if not torch.cuda.is_available():
            raise NotHereError("torch finds no CUDA device (--device cpu --small runs the script's own logic)")
        index = torch.device(self.name).index or 0
        if index >= torch.cuda.device_count():
            raise NotHereError(f"{self.name} is not among the {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(index)

    def describe(self) -> dict[str, Any]:
        """Name, memory and the CUDA that torch was built with."""
        if not self.is_gpu:
            return {"device": "cpu"}
        import torch

        properties = torch.cuda.get_device_properties(self.name)
        return {"device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}

    def synchronise(self) -> None:
        """Wait until the device has done all that it was given."""
        import torch

        if self.is_gpu:
            torch.cuda.synchronize(self.name)

    def clear(self) -> None:
        """Collect what is dead, give cached memory back, and forget the peak."""
        gc.collect()
        if self.is_gpu:
            import torch

            torch.cuda.synchronize(self.name)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.name)

    def used_bytes(self) -> int:
        """Memory of the device that is in use, by whomever: what the driver says, not torch's allocator."""
        import torch

        if not self.is_gpu:
            return 0
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.name)
        return int(total_bytes - free_bytes)

    def held_bytes(self) -> int:
        """What torch's allocator holds."""
        import torch

        return int(torch.cuda.memory_reserved(self.name)) if self.is_gpu else 0

    def peak_bytes(self) -> int:
        """The most that torch's allocator has held since `clear`."""
        import torch

        return int(torch.cuda.max_memory_reserved(self.name)) if self.is_gpu else 0


def free_pinned_memory(device: Device) -> None:
    """Have fastload give back the memory that it keeps pinned for its next load to a GPU."""
    import fastload

    if device.is_gpu:
        fastload.free_pinned_memory()
