"""Benchmarks that print a result and write it, with the machine it is from, as JSON."""
