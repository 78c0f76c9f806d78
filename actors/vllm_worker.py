"""What this project adds to vLLM's workers, by `worker_extension_cls`: its methods become the worker's."""

from maspo_ray.weight_sync.checksum import ChecksumWorkerExtension
from maspo_ray.weight_sync.gloo_engine import GlooWorkerExtension


class LogprobTemperature:
    """Raw log-probs at the sampling temperature.

    vLLM 0.32 has log-probs of the whole distribution at temperature 1 (`raw_logprobs`), or at the sampling temperature of what `top_p`,
    `top_k`, `min_p` and `min_tokens` leave of it (`processed_logprobs`). The learner's are of the whole one at the sampling temperature.
    Can go when vLLM has these.
    """

    def score_at_temperature(self, temperature: float) -> None:
        """Lets the log-probs of all requests from here on be those at a temperature, whatever each is sampled at."""
        # An attribute of the sampler itself goes before its class's static method.
        self.model_runner.sampler.compute_logprobs = lambda logits: (logits.float() / temperature).log_softmax(-1)  # type: ignore[attr-defined]


class GpuWorkerExtension(ChecksumWorkerExtension, LogprobTemperature):
    """Of an engine on GPUs."""


class CpuWorkerExtension(GlooWorkerExtension, LogprobTemperature):
    """Of an engine on CPU. Importing this module registers the `gloo` transfer engine in the engine's process."""
