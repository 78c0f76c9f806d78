"""Log-probs and entropy from hidden states: the chunked form against the plain one, each in a process of its own.

    python -m bench.logits
    python -m bench.logits --soft_cap 30

Extra peak memory is what the process's resident size grows by at most, in forward and backward pass together. Linux only.
`bench.learner` runs this too.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

FORMS = ("chunked", "plain")


def probe(form: str, tokens: int, vocabulary: int, width: int, soft_cap: float) -> dict[str, float]:
    """Returns extra peak memory in MiB, and seconds, of one forward and backward pass in this process.

    Args:
        soft_cap: of the logits, in both forms; 0 for none.
    """
    import torch

    from maspo_ray.objectives.tensor_ops import chunked_logprobs

    def capped(logits: torch.Tensor) -> torch.Tensor:
        return soft_cap * torch.tanh(logits / soft_cap)

    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) * 0.05).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    # The gradients are there before: they are the same in both forms.
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    (hidden @ weight[:1].T).sum().backward()
    # Forget the peak so far; `getrusage` cannot, and counts that of the parent process too.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_mib()
    started = perf_counter()
    if form == "chunked":
        logprobs, entropy = chunked_logprobs(hidden, weight, targets, 1.0, transform=capped if soft_cap else None)
    else:
        logits = torch.nn.functional.linear(hidden, weight)
        full = (capped(logits) if soft_cap else logits).log_softmax(-1)
        del logits
        logprobs = full.gather(1, targets[:, None])[:, 0]
        with torch.no_grad():
            entropy = -(full.exp() * full).sum(-1)
    logprobs.sum().backward()
    seconds = perf_counter() - started
    assert entropy.isfinite().all()
    return {"mib": _peak_mib() - before, "s": seconds}


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure(
    repeats: int, tokens: int = 4096, vocabulary: int = 49_152, width: int = 576, soft_cap: float = 0.0
) -> dict[str, float]:
    """Returns the memory and time ratios of the chunked form to the plain one, medians with the range of the times."""
    found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    for _ in range(repeats):
        for form in FORMS:
            sizes = ["--tokens", tokens, "--vocabulary", vocabulary, "--width", width, "--soft_cap", soft_cap]
            command = [sys.executable, "-m", "bench.logits", "--probe", form, *map(str, sizes)]
            found[form].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    memory = [c["mib"] / p["mib"] for c, p in zip(found["chunked"], found["plain"], strict=True)]
    times = [c["s"] / p["s"] for c, p in zip(found["chunked"], found["plain"], strict=True)]
    return {
        "logits_memory": statistics.median(memory),
        "logits_time": statistics.median(times),
        "logits_time_low": min(times),
        "logits_time_high": max(times),
        "plain_mib": statistics.median(row["mib"] for row in found["plain"]),
        "chunked_s": statistics.median(row["s"] for row in found["chunked"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--soft_cap", type=float, default=0.0, help="of the logits, as Gemma 2 has it; 0 for none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--probe", choices=FORMS, help="measure one form once, in this process")
    options = parser.parse_args()
    if options.probe:
        print(json.dumps(probe(options.probe, options.tokens, options.vocabulary, options.width, options.soft_cap)))
        return
    found = measure(options.repeats, options.tokens, options.vocabulary, options.width, options.soft_cap)
    print(f"chunked / plain at {options.tokens} tokens × {options.vocabulary}, {options.repeats} repeats")
    print(f"extra peak memory  {found['logits_memory']:.3f}  (plain: {found['plain_mib']:,.0f} MiB)")
    print(
        f"time               {found['logits_time']:.3f}  ({found['logits_time_low']:.3f} to {found['logits_time_high']:.3f})"
    )
    print(f"chunked            {found['chunked_s']:.2f} s")
    print(json.dumps({"bench": "logits", **found}))


if __name__ == "__main__":
    main()
