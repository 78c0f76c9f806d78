"""Masked sums, KL estimators and chunked log-probs: hand values, the plain form, gradients, and what is never kept."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maspo_ray.errors import ConfigError
from maspo_ray.objectives.tensor_ops import KLEstimator, chunked_logprobs, kl_estimate, masked_sum

TOKENS, WIDTH, VOCAB = 23, 6, 41


def test_masked_sum_adds_only_what_the_mask_selects() -> None:
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    total = masked_sum(values, torch.tensor([True, False, True]))
    total.backward()
    assert total.item() == 5.0
    assert values.grad is not None and values.grad.tolist() == [1.0, 0.0, 1.0]


def test_masked_sum_nan_under_the_mask_leaks_into_neither_sum_nor_gradient() -> None:
    values = torch.tensor([1.0, math.nan, math.inf], requires_grad=True)
    total = masked_sum(values, torch.tensor([True, False, False]))
    total.backward()
    assert total.item() == 1.0
    assert values.grad is not None and values.grad.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_masked_sum_empty_mask_is_a_zero_with_a_gradient(num_tokens: int) -> None:
    values = torch.ones(num_tokens, requires_grad=True)
    total = masked_sum(values, torch.zeros(num_tokens, dtype=torch.bool))
    total.backward()
    assert total.item() == 0.0
    assert values.grad is not None and values.grad.tolist() == [0.0] * num_tokens


def test_masked_sum_half_precision_accumulates_in_float32() -> None:
    # bfloat16 has 8 bits of mantissa: 257 is not among its values.
    total = masked_sum(torch.ones(257, dtype=torch.bfloat16), torch.ones(257, dtype=torch.bool))
    assert total.dtype == torch.float32 and total.item() == 257.0


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # π = 1/2, π_ref = 1/4, so r = 1/2 and log r = −0.693147; then π = 1/4, π_ref = 1/2, so r = 2, log r = 0.693147.
        ("k1", [0.693147, -0.693147]),
        ("k2", [0.240227, 0.240227]),  # 0.693147² / 2
        ("k3", [0.193147, 0.306853]),  # 1/2 − 1 + 0.693147;  2 − 1 − 0.693147
    ],
)
def test_kl_estimate_half_and_quarter_gives_hand_values(estimator: KLEstimator, expected: list[float]) -> None:
    logprobs, reference = torch.log(torch.tensor([0.5, 0.25])), torch.log(torch.tensor([0.25, 0.5]))
    assert kl_estimate(logprobs, reference, estimator).tolist() == pytest.approx(expected, abs=1e-6)


def test_kl_estimate_k1_and_k3_averaged_over_the_policy_are_the_kl() -> None:
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((policy * kl_estimate(policy.log(), reference.log(), estimator)).sum(), exact)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 50.0, 1e4])
def test_kl_estimate_k3_any_gap_is_not_negative_and_has_a_finite_gradient(scale: float) -> None:
    gaps = scale * torch.linspace(-1, 1, 2001)
    logprobs = (-gaps).requires_grad_()
    values = kl_estimate(logprobs, torch.zeros(2001), "k3")
    values.sum().backward()
    assert values.isfinite().all() and (values >= 0).all()
    assert logprobs.grad is not None and logprobs.grad.isfinite().all()


def test_kl_estimate_k3_gradient_never_pushes_away_from_the_reference() -> None:
    # d k3 / d log π = 1 − r, up to where r = e^20 is bounded: from there on 0, as of a constant.
    logprobs = torch.tensor([-30.0, -1.0, -1.0, -1.0], requires_grad=True)
    kl_estimate(logprobs, torch.tensor([-1.0, -1.0, -2.0, -31.0]), "k3").sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, 0.0, 1 - math.exp(-1), 1.0])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimate_bfloat16_is_worked_out_in_float32_and_leaves_the_reference_alone(estimator: KLEstimator) -> None:
    logprobs = torch.tensor([-1.0], dtype=torch.bfloat16, requires_grad=True)
    reference = torch.tensor([-1.5], dtype=torch.bfloat16, requires_grad=True)
    values = kl_estimate(logprobs, reference, estimator)
    assert values.dtype == torch.float32
    values.sum().backward()
    assert logprobs.grad is not None and reference.grad is None


def test_kl_estimate_unknown_estimator_raises_and_names_the_choices() -> None:
    with pytest.raises(ConfigError, match="kl.estimator is k4; it must be k1, k2 or k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


def _plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T + (0 if bias is None else bias)
    table = torch.log_softmax(logits / temperature, dim=-1)
    return table[torch.arange(len(targets)), targets], -(table.exp() * table).sum(-1)


def _inputs(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(VOCAB, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(VOCAB, (tokens,), generator=generator)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 7, 22, TOKENS, 1024])
def test_chunked_logprobs_any_chunk_size_equals_the_plain_form_with_gradients(
    chunk_tokens: int, with_bias: bool
) -> None:
    hidden, weight, bias, targets = _inputs()
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    # Uneven weights, so that a chunk out of order would be seen.
    cotangent = torch.linspace(-1, 2, TOKENS)
    expected, expected_entropy = _plain(hidden, weight, targets, 0.7, bias if with_bias else None)
    expected_grads = torch.autograd.grad((expected * cotangent).sum(), leaves)
    logprobs, entropy = chunked_logprobs(hidden, weight, targets, 0.7, chunk_tokens, bias if with_bias else None)
    grads = torch.autograd.grad((logprobs * cotangent).sum(), leaves)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chunked_logprobs_a_transform_of_the_logits_counts_with_its_gradient(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = _inputs(dtype)
    kept = VOCAB - 3
    targets = targets % kept

    def transform(products: Tensor) -> Tensor:
        # A scale, a soft cap that the logits reach, and rows of padding that are cut.
        return (2.0 * torch.tanh(products * 0.5 / 2.0))[..., :kept]

    leaves, cotangent = [hidden, weight, bias], torch.linspace(-1, 2, TOKENS)
    table = torch.log_softmax(transform(hidden @ weight.T + bias) / 0.7, dim=-1)
    expected = table[torch.arange(TOKENS), targets]
    expected_grads = torch.autograd.grad((expected * cotangent).sum(), leaves)
    logprobs, entropy = chunked_logprobs(hidden, weight, targets, 0.7, 5, bias, transform)
    grads = torch.autograd.grad((logprobs * cotangent).sum(), leaves)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(-1).detach(), rtol=1e-5, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()


def test_chunked_logprobs_two_logits_give_hand_values() -> None:
    # Logits (log 3, 0) at temperature 1: p = (3/4, 1/4). At temperature 1/2: (9, 1)/10.
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[math.log(3)], [0.0]])
    logprobs, entropy = chunked_logprobs(hidden, weight, torch.tensor([1]), 1.0)
    assert logprobs.item() == pytest.approx(math.log(1 / 4), abs=1e-6)
    # −(3/4 log 3/4 + 1/4 log 1/4) = 0.562335
    assert entropy.item() == pytest.approx(0.562335, abs=1e-6)
    assert chunked_logprobs(hidden, weight, torch.tensor([1]), 0.5)[0].item() == pytest.approx(
        math.log(1 / 10), abs=1e-6
    )


def test_chunked_logprobs_bfloat16_model_gives_float32_and_a_detached_entropy() -> None:
    hidden, weight, bias, targets = _inputs(torch.bfloat16)
    logprobs, entropy = chunked_logprobs(hidden, weight, targets, 1.0, 8, bias)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logprobs.requires_grad and not entropy.requires_grad
    # Only the logits may be rounded to bfloat16: what follows them is not.
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    expected = torch.log_softmax(logits, -1)[torch.arange(TOKENS), targets]
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)


def test_chunked_logprobs_no_tokens_gives_an_empty_result_with_a_gradient() -> None:
    hidden, weight, _, targets = _inputs(tokens=0)
    logprobs, entropy = chunked_logprobs(hidden, weight, targets, 1.0)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_chunked_logprobs_forbidden_tokens_leave_logprobs_entropy_and_gradient_finite() -> None:
    hidden, weight, _, targets = _inputs()
    bias = torch.where(torch.arange(VOCAB) < VOCAB - 3, 0.0, -math.inf)
    targets = targets.clamp(max=VOCAB - 4)
    logprobs, entropy = chunked_logprobs(hidden, weight, targets, 1.0, 8, bias)
    logprobs.sum().backward()
    assert logprobs.isfinite().all() and entropy.isfinite().all()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_chunked_logprobs_without_gradients_needs_no_graph() -> None:
    hidden, weight, bias, targets = _inputs()
    expected = chunked_logprobs(hidden, weight, targets, 1.0, 8, bias)[0].detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            logprobs, _ = chunked_logprobs(hidden, weight, targets, 1.0, 8, bias)
            assert not logprobs.requires_grad
            assert torch.equal(logprobs, expected)


class _LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        tensors = [item for item in (result if isinstance(result, tuple) else (result,)) if isinstance(item, Tensor)]
        self.numel = max([self.numel, *(item.numel() for item in tensors)])
        return result


def test_chunked_logprobs_forward_and_backward_never_make_or_keep_all_logits() -> None:
    hidden, weight, _, targets = _inputs(tokens=200)
    kept: list[int] = []

    def note_kept(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with _LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(note_kept, lambda tensor: tensor):
            logprobs, _ = chunked_logprobs(hidden, weight, targets, 1.0, 10)
        logprobs.sum().backward()
    # The largest is the hidden states' gradient; the logits would be 200 · 41.
    assert largest.numel <= 200 * WIDTH
    assert sum(kept) < 200 * VOCAB


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_chunked_logprobs_temperature_not_above_zero_raises(temperature: float) -> None:
    hidden, weight, _, targets = _inputs()
    with pytest.raises(ConfigError, match="temperature is .*; log-probs need one above 0"):
        chunked_logprobs(hidden, weight, targets, temperature)


def test_chunked_logprobs_chunk_of_no_tokens_raises() -> None:
    hidden, weight, _, targets = _inputs()
    with pytest.raises(ConfigError, match="chunk_tokens is 0; it must be at least 1"):
        chunked_logprobs(hidden, weight, targets, 1.0, chunk_tokens=0)
