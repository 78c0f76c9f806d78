"""The names of what a run keeps in its folder, one place for them; opens nothing."""

from pathlib import Path


class RunPaths:
    """The names of what a run keeps in its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def checkpoint(self, step: int) -> Path:
        """Returns the folder of the model that is saved after a step; the learner's state is in its folder `state`."""
        return self.path / "checkpoints" / f"step_{step:06d}"

    def step_record(self, step: int) -> Path:
        """Returns the file of what a step consumed."""
        return self.path / "steps" / f"step_{step:06d}.npz"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def final(self) -> Path:
        return self.path / "final"
