"""One fuzz target in a process of its own: ``python -m tests.fuzz.running TARGET SEEDS [options of libFuzzer]``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from random import Random

import atheris

from tests.fuzz.mutating import MUTATORS

with atheris.instrument_imports(include=["fastload"]):
    from tests.fuzz.targets import TARGETS

_MAX_SECONDS = 1.0


def main() -> None:
    """Fuzz. SEEDS is a folder of valid inputs."""
    target, by_grammar = TARGETS[sys.argv[1]], MUTATORS.get(sys.argv[1])
    seeds = [path.read_bytes() for path in sorted(Path(sys.argv[2]).iterdir())]

    def run(data: bytes) -> None:
        begin = time.process_time()
        target(data)
        seconds = time.process_time() - begin
        if seconds > _MAX_SECONDS:
            raise TimeoutError(f"{seconds:.1f} s for {len(data)} bytes")

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        # Half of what is tried is close to a valid input: most of the others end in a parser's first lines.
        chance = Random(seed)
        if by_grammar is None or chance.random() < 0.25:
            return bytes(atheris.Mutate(data, max_size))
        return by_grammar(chance.choice(seeds) if chance.random() < 0.7 else data, chance)[:max_size]

    atheris.Setup([sys.argv[0], *sys.argv[3:]], run, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
