"""The machinery of the benchmarks: checkpoints, fresh processes, interleaved rounds, checks, tables."""
