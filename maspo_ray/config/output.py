"""The sections that say what a run writes.

Promise: as in `sections`, each is consistent with itself. Imports neither torch, ray nor vllm.
"""

from typing import Literal

from pydantic import Field

from maspo_ray.config.section import Section


class CheckpointConfig(Section):
    every: int = Field(0, ge=0)
    """Steps between Hugging Face models saved under RUN_DIR/checkpoints, each with the learner's state, from which `maspo replay` goes
    on: weights and two moments of each in float32, three to four times a float32 model beside the model. 0 saves the final model only."""
    save_final: bool = True
    """Save the trained model as RUN_DIR/final."""
    timeout_s: float = Field(3600.0, gt=0)
    """Deadline of saving a model, and of saving or loading the learner's state; each by itself."""


class LoggingConfig(Section):
    tensorboard: bool = True
    """Write RUN_DIR/tensorboard."""
    progress: Literal["auto", "plain", "off"] = "auto"
    """`auto` is a live display on a terminal and plain lines elsewhere."""
    curves: bool = True
    """Draw RUN_DIR/curves.png at the end."""
    timeline: bool = True
    """Write RUN_DIR/timeline.json, which chrome://tracing and ui.perfetto.dev show."""
    steps: bool = True
    """Write RUN_DIR/steps, what each step consumed, for `maspo replay`; 5 to 9 bytes a trained token."""
