"""The questions that the suite answers, by name."""

from __future__ import annotations

from suite.outcome import Workload

from workloads import (
    cold,
    decoders,
    first_output,
    formats,
    imports,
    load,
    memory,
    ranks,
    saving,
    verifying,
    whole,
    workers,
)

__all__ = ["WORKLOADS"]

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        imports.IMPORT,
        first_output.BERT,
        load.BERT,
        load.LLAMA,
        load.DEVICE_MAP,
        memory.SAME_TYPE,
        memory.CAST,
        whole.MOE,
        whole.CAST,
        whole.CAST_LAZY,
        formats.BIN,
        formats.MANY,
        workers.WORKERS,
        cold.FIRST_FORWARD,
        cold.STREAM,
        ranks.TENSOR_PARALLEL,
        saving.SAVE,
        verifying.VERIFY,
        decoders.TTFT_LLAMA,
        decoders.TTFT_LLAMA_COLD,
        decoders.TTFT_MOE,
        decoders.DECODE,
        decoders.BIGGER,
        decoders.BIGGER_MOE,
        decoders.LARGE,
    )
}
