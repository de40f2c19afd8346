"""What the benchmarks share: networks with batches, how a batch is timed, medians of rounds, tables."""
