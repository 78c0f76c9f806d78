"""The actors of a run: which class, where, started and called."""
