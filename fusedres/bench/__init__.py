"""Measuring whole models: what `python -m fusedres bench` and `profile` do, and what benchmarks/ shares with them."""
