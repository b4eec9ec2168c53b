"""What several suites and benchmarks share."""
