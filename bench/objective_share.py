"""What the objective costs of a learner's step, on SmolLM2 (`make smollm2` makes the model).

    python -m bench.objective_share

A step is the forward and backward pass of one micro-batch through the learner's own model code. The objective is all that stands
between the log-probs and the loss, its metrics and its own backward pass. Both are timed in turn, in one process.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch

from actors.token_model import TokenModel, load_token_model, pad_sequences
from maspo_ray.config import MaspoConfig, ModelConfig
from maspo_ray.objectives import policy_loss
from maspo_ray.objectives.metrics import objective_sums
from maspo_ray.tensor_ops import masked_sum


def seconds(call: Callable[[], None]) -> float:
    started = perf_counter()
    call()
    return perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/smollm2/model")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=40)
    parser.add_argument("--completion-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    model: TokenModel = load_token_model(ModelConfig(path=options.model, dtype=options.dtype))
    shape = options.prompt_tokens, options.completion_tokens
    pairs = [
        tuple(rng.integers(3, 1000, size=size).astype(np.int32) for size in shape) for _ in range(options.sequences)
    ]
    batch = pad_sequences(pairs, torch.device("cpu"))
    tokens = options.sequences * options.completion_tokens
    old, advantages = torch.randn(tokens) - 5, torch.randn(tokens)
    mask = torch.ones(tokens, dtype=torch.bool)
    leaf = (old + 0.1 * torch.randn(tokens)).requires_grad_()

    def objective() -> None:
        policy = policy_loss(leaf, old, advantages, MaspoConfig())
        loss = masked_sum(policy.token_loss, mask)
        objective_sums(policy, advantages, mask)
        loss.backward()

    def step() -> None:
        logprobs, _ = model(batch.input_ids, batch.attention_mask, batch.completion_mask, 1.0)
        policy = policy_loss(logprobs, old, advantages, MaspoConfig())
        objective_sums(policy, advantages, mask)
        masked_sum(policy.token_loss, mask).backward()

    step()
    objective()
    times = [(seconds(objective), seconds(step)) for _ in range(options.repeats)]
    shares = [cost / whole for cost, whole in times]
    median, low, high = statistics.median(shares), min(shares), max(shares)
    print(f"completion tokens {tokens}, {options.dtype}, {torch.get_num_threads()} threads, {options.repeats} repeats")
    print(f"objective  {statistics.median(cost for cost, _ in times) * 1e3:9.2f} ms")
    print(f"step       {statistics.median(whole for _, whole in times) * 1e3:9.2f} ms")
    print(f"share      {median:9.4%}  ({low:.4%} to {high:.4%})")
    print(
        json.dumps({"bench": "objective_share", "objective_share": median, "low": low, "high": high, "tokens": tokens})
    )


if __name__ == "__main__":
    main()
