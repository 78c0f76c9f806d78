"""What a learner's step costs beside what it must: on SmolLM2 (`make smollm2` makes the model).

    python -m bench.learner

rl_overhead            a whole step, optimizer included / plain transformers' forward and backward of the same sequences, with
                       logits of the completions alone
utilisation            the step's model FLOP/s / the matrix product's, measured in the same run
ragged_speedup         rows padded to the longest of the batch / packed; 4 groups of 8, 40-token prompts, completions of log-normal
                       length, of mean 64 and at most 512 tokens; no prompt is shared
shared_prompt_speedup  a copy of the prompt for each completion / one for the group; 40 and 24 tokens, groups of 8
shared_at_prompt_share_X  the same where the prompt makes up a share X of a sequence, without the optimizer
shared_break_even      the share of prompt tokens where that crosses 1, between those tried; 0 if it paid at all of them, 1 if at none
objective_share        the objective, its metrics and its backward pass / the step without the optimizer
logits_memory, _time   chunked log-probs and entropy / the plain form (`bench.logits`)
trl_speedup            loss and backward pass of TRL's GRPOTrainer, in the fastest of some micro-batches / ours, on the ragged groups; if
                       TRL is installed (`bench.trl_side`). Both compute GRPO's loss, and their gradients are compared

Each ratio is of two things timed in turn; its median is printed with the least and the most.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from time import perf_counter
from typing import Any

from maspo_ray.dtype_speed import bfloat16_slowdown
from maspo_ray.fleet.environment import CPU_ALLOCATOR

Ratio = tuple[float, float, float]


def seconds(call: Callable[[], object]) -> float:
    started = perf_counter()
    call()
    return perf_counter() - started


def ratio(over: Callable[[], object], under: Callable[[], object], repeats: int) -> Ratio:
    """Returns median, least and most of the time of `over` / the time of `under`, after one round that does not count."""
    rounds = [(seconds(over), seconds(under)) for _ in range(repeats + 1)][1:]
    values = [a / b for a, b in rounds]
    return statistics.median(values), min(values), max(values)


def matmul_flops(dtype: Any) -> float:
    """Returns FLOP/s of the best of several products of 1024 × 1024 matrices."""
    import torch

    a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    return 2 * 1024**3 / min(seconds(lambda: a @ b) for _ in range(20))


class Bench:
    """A learner of one rank in this process, and plain transformers beside it."""

    def __init__(self, model: str, dtype: Any, threads: int, repeats: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from actors.deepspeed_learner import DeepSpeedLearner
        from maspo_ray.config import KLConfig, LearnerConfig, MaspoConfig, ModelConfig

        self.model_path = model
        self.repeats = repeats
        self.dtype = getattr(torch, dtype)
        self.learner = DeepSpeedLearner(
            model=ModelConfig(path=model, dtype=dtype),
            learner=LearnerConfig(lr=1e-9),
            objective=MaspoConfig(),
            kl=KLConfig(),
            temperature=1.0,
            total_updates=1000,
            rank=0,
            world_size=1,
            threads=threads,
            seed=0,
        )
        self.learner.setup(*self.learner.rendezvous())
        self.plain = AutoModelForCausalLM.from_pretrained(model, dtype=self.dtype, attn_implementation="sdpa")
        self.config = self.plain.config

    def batch(self, prompt_tokens: int, lengths: Sequence[Sequence[int]], seed: int = 0) -> Any:
        from bench.synthetic import SyntheticBatch

        return SyntheticBatch(prompt_tokens, lengths, self.config.vocab_size, seed)

    def step(self, batch: Any, max_tokens: int, share: bool) -> Callable[[], object]:
        plan, payloads = batch.plan(max_tokens, share)
        return lambda: self.learner.train_step(0, [plan], *payloads)

    def plain_step(self, batch: Any, rows: int) -> Callable[[], object]:
        """Returns transformers' own forward pass, logits of completion tokens only, cross-entropy, and the backward pass.

        Args:
            batch: its sequences are of one length.
            rows: sequences of one forward pass.
        """
        import numpy as np
        import torch

        ids = torch.from_numpy(np.stack(batch.sequences()).astype(np.int64))
        completion_tokens = ids.shape[1] - batch.experiences[0].group.prompt_tokens

        def run() -> None:
            self.plain.zero_grad()
            for part in ids.split(rows):
                output = self.plain(input_ids=part, logits_to_keep=completion_tokens + 1, use_cache=False)
                logits = output.logits[:, :-1].flatten(0, 1).float()
                torch.nn.functional.cross_entropy(logits, part[:, -completion_tokens:].flatten()).backward()

        return run

    def padded_step(self, batch: Any, max_tokens: int) -> Callable[[], object]:
        """Returns forward and backward pass of rows that are padded to the longest, log-probs for real tokens only."""
        import numpy as np
        import torch

        from maspo_ray.objectives.tensor_ops import chunked_logprobs

        sequences = batch.sequences()
        width = max(map(len, sequences))
        rows = max(1, max_tokens // width)
        ids = torch.from_numpy(np.stack([np.pad(s, (0, width - len(s))) for s in sequences]).astype(np.int64))
        mask = torch.arange(width)[None] < torch.tensor([len(s) for s in sequences])[:, None]

        def run() -> None:
            self.plain.zero_grad()
            for part, real in zip(ids.split(rows), mask.split(rows), strict=True):
                decoder = self.plain.get_decoder()
                hidden = decoder(input_ids=part, attention_mask=real.long(), use_cache=False).last_hidden_state
                wanted = real[:, 1:].clone()
                wanted[:, : batch.experiences[0].group.prompt_tokens - 1] = False
                head = self.plain.get_output_embeddings().weight
                chunked_logprobs(hidden[:, :-1][wanted], head, part[:, 1:][wanted], 1.0)[0].sum().backward()

        return run

    def without_optimizer(self, plan: Any, payloads: Sequence[Any]) -> Callable[[], object]:
        """Returns forward and backward pass of a plan; the gradient stays until the next."""
        from actors.learner_metrics import UpdateSums

        engine = self.learner._engine

        def run() -> None:
            # ZeRO keeps the sum in a place of its own.
            (engine.optimizer if engine.zero_optimization_stage() else engine).zero_grad()
            sums = UpdateSums(self.learner._device)
            for bundles in plan.micro_batches:
                loss, _ = self.learner._loss(bundles, payloads, None, sums, None)
                engine.backward(loss / plan.batch_tokens, scale_wrt_gas=False)

        return run

    def trl_speedup(self, batch: Any) -> Ratio:
        """Returns TRL's time / ours for the same loss of the same rollouts.

        Raises:
            AssertionError: the gradients are not the same.
        """
        from bench.trl_side import TrlSide
        from maspo_ray.config import GrpoConfig

        trl = TrlSide(self.model_path, self.dtype, batch)
        times = {rows: seconds(trl.step(rows)) for rows in (2, 4, 8)}
        fastest = min(times, key=times.__getitem__)
        print(f"TRL's fastest micro-batch: {fastest} rows of {times}", flush=True)
        objective, self.learner._objective = self.learner._objective, GrpoConfig()
        found = ratio(trl.step(fastest), self.without_optimizer(*batch.plan(1024, True)), self.repeats)
        self.learner._objective = objective
        if self.learner._engine.zero_optimization_stage() == 0:
            theirs, ours = trl.gradient(), self.learner._engine.module.model.get_input_embeddings().weight.grad
            distance = float((ours - theirs).norm() / theirs.norm())
            print(f"relative distance of the two gradients: {distance:.1e}", flush=True)
            assert distance < 1e-4, "the two sides do not compute the same loss"
        return found

    def flops(self, batch: Any, share: bool) -> float:
        """Returns FLOP of forward and backward pass: what is recomputed does not count."""
        config = self.config
        embedding = config.vocab_size * config.hidden_size
        linear = sum(p.numel() for p in self.plain.parameters()) - embedding
        tokens, targets, pairs = 0, 0, 0.0
        for experience in batch.experiences:
            prompt = experience.group.prompt_tokens
            lengths = [rollout.facts.num_tokens for rollout in experience.group.rollouts]
            copies = 1 if share else len(lengths)
            # A completion's last token is a target only.
            tokens += copies * prompt + sum(lengths) - len(lengths)
            targets += sum(lengths)
            pairs += copies * prompt * (prompt + 1) / 2
            pairs += sum((n - 1) * (prompt + n / 2) for n in lengths)
        attention = 2 * pairs * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        return 6.0 * (linear * tokens + embedding * targets + attention)


def objective_share(batch: Any, step: Callable[[], object], repeats: int) -> Ratio:
    import torch

    from actors.learner_metrics import UpdateSums
    from maspo_ray.config import MaspoConfig
    from maspo_ray.objectives import policy_loss
    from maspo_ray.objectives.breakdown import ScoredTokens
    from maspo_ray.objectives.tensor_ops import masked_sum

    tokens = sum(r.facts.num_tokens for e in batch.experiences for r in e.group.rollouts)
    old, entropy, advantages = torch.randn(tokens) - 8, torch.rand(tokens), torch.randn(tokens)
    mask, lags = torch.ones(tokens, dtype=torch.bool), torch.zeros(tokens, dtype=torch.int64)
    leaf = (old + 0.1 * torch.randn(tokens)).requires_grad_()

    def objective() -> None:
        policy = policy_loss(leaf, old, advantages, MaspoConfig())
        sums = UpdateSums(leaf.device)
        sums.add_objective(policy, ScoredTokens(leaf, old, old, entropy, advantages, lags, mask))
        masked_sum(policy.token_loss, mask).backward()

    return ratio(objective, step, repeats)


def break_even(speedups: Sequence[tuple[float, float]]) -> float:
    """Returns the prompt share where the speed-up comes to 1, on a line between the two around it; 0 if it was never below, 1 if it
    is below at the largest.

    Args:
        speedups: (share, speed-up), by rising share.
    """
    crossing = 0.0
    for (x0, y0), (x1, y1) in pairwise(speedups):
        if y0 < 1 <= y1:
            crossing = x0 + (1 - y0) / (y1 - y0) * (x1 - x0)
    return crossing if speedups[-1][1] >= 1 else 1.0


def measure(bench: Bench) -> dict[str, Ratio]:
    """Returns each ratio."""
    from bench import trl_side
    from bench.synthetic import lognormal_lengths

    found: dict[str, Ratio] = {}
    # A step of examples/smollm2/run.yaml.
    groups = bench.batch(40, [[24] * 8] * 8)
    whole = bench.step(groups, 1024, share=False)
    found["rl_overhead"] = ratio(whole, bench.plain_step(groups, rows=16), bench.repeats)
    peak = matmul_flops(bench.dtype)
    times = [seconds(whole) for _ in range(bench.repeats)]
    rates = [bench.flops(groups, share=False) / time / peak for time in times]
    found["utilisation"] = statistics.median(rates), min(rates), max(rates)
    print(f"matrix product {peak / 1e9:.0f} GFLOP/s; a step of {statistics.median(times):.2f} s", flush=True)
    shared = bench.step(groups, 1024, share=True)
    found["shared_prompt_speedup"] = ratio(whole, shared, bench.repeats)
    found["objective_share"] = objective_share(groups, bench.without_optimizer(*groups.plan(1024, True)), bench.repeats)
    ragged = bench.batch(40, [lognormal_lengths(8, 64, 512, seed) for seed in range(4)])
    found["ragged_speedup"] = ratio(
        bench.padded_step(ragged, 1024), bench.without_optimizer(*ragged.plan(1024, False)), bench.repeats
    )
    points = []
    for prompt_tokens in (1, 3, 10):
        groups = bench.batch(prompt_tokens, [[24] * 8] * 2)
        alone, together = (bench.without_optimizer(*groups.plan(1024, share)) for share in (False, True))
        share_of_tokens = prompt_tokens / (prompt_tokens + 24)
        speedup = found[f"shared_at_prompt_share_{share_of_tokens:.2f}"] = ratio(alone, together, bench.repeats)
        points.append((share_of_tokens, speedup[0]))
    found["shared_break_even"] = (break_even(points),) * 3
    if trl_side.is_there():
        found["trl_speedup"] = bench.trl_speedup(ragged)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/smollm2/model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    wanted = {**CPU_ALLOCATOR, "OMP_NUM_THREADS": str(options.threads)}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        # The allocator reads its settings when the process starts; both sides of each ratio have the same.
        os.execve(sys.executable, [sys.executable, "-m", "bench.learner", *sys.argv[1:]], {**os.environ, **wanted})
    if options.dtype == "bfloat16" and (slowdown := bfloat16_slowdown()) > 1:
        sys.exit(
            f"--dtype is bfloat16; this CPU takes {slowdown:.1f} times as long for its products as for float32's, which says nothing "
            "of one that is made for it."
        )
    from bench import logits

    found = measure(Bench(options.model, options.dtype, options.threads, options.repeats))
    print(f"{options.dtype}, {options.threads} threads, {options.repeats} repeats: median (least to most)")
    for name, (median, low, high) in found.items():
        print(f"{name:32s} {median:8.4f}  ({low:.4f} to {high:.4f})")
    memory = logits.measure(options.repeats)
    for name in ("logits_memory", "logits_time"):
        print(f"{name:32s} {memory[name]:8.4f}")
    flat = {name: median for name, (median, _, _) in found.items()} | memory
    spread = {name: [low, high] for name, (_, low, high) in found.items()}
    print(json.dumps({"bench": "learner", "dtype": options.dtype, **flat, "spread": spread}))


if __name__ == "__main__":
    main()
