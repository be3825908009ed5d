"""The parts of `bench.gpu_drill`."""
