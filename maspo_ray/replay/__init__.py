"""A step of a run made again, from what its folder holds."""
