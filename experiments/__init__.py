"""The outside world: command line, disk, tracking and benchmarks."""
