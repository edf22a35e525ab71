"""What scripts/benchmark.py measures: how, on which data, and part by part."""
