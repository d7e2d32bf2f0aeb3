"""One fuzz target in a process of its own: ``python -m tests.fuzz.running TARGET [options of libFuzzer]``."""

from __future__ import annotations

import sys
import time
from random import Random

import atheris

from tests.fuzz.mutating import MUTATORS

with atheris.instrument_imports(include=["fastload"]):
    from tests.fuzz.targets import TARGETS

_MAX_SECONDS = 1.0


def main() -> None:
    target = TARGETS[sys.argv[1]]

    def run(data: bytes) -> None:
        begin = time.process_time()
        target(data)
        seconds = time.process_time() - begin
        if seconds > _MAX_SECONDS:
            raise TimeoutError(f"{seconds:.1f} s for {len(data)} bytes")

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        # By turns as the fuzzer would, byte by byte, and by the grammar.
        return bytes(atheris.Mutate(data, max_size)) if seed % 2 else by_grammar(data, Random(seed))[:max_size]

    by_grammar = MUTATORS.get(sys.argv[1])
    atheris.Setup([sys.argv[0], *sys.argv[2:]], run, **({"custom_mutator": mutate} if by_grammar else {}))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
