"""The two coroutines of a run, producer and trainer, and what they hold together."""
