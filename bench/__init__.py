"""Benches: `python -m bench.NAME` prints a table, and one JSON object as its last line."""
