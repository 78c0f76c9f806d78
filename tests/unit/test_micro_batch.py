"""What a micro-batch's tensors hold, token for token."""

import numpy as np
import pytest
import torch

from actors.micro_batch import gather_micro_batch
from maspo_ray.experience import Completion, Prompt, SampledGroup, VersionSpan
from maspo_ray.packing import Bundle, Item

CPU = torch.device("cpu")
PROMPT = Prompt("test/0", "", np.array([3, 4], dtype=np.int32), "")
COMPLETIONS = (
    Completion(
        np.array([5, 6, 7], dtype=np.int32),
        np.array([-1.0, -2.0, -3.0], dtype=np.float32),
        (VersionSpan(3, 0, 1), VersionSpan(4, 1, 3)),
        "stop",
        "",
    ),
    Completion(np.array([8], dtype=np.int32), np.array([-4.0], dtype=np.float32), (VersionSpan(5, 0, 1),), "stop", ""),
)
REFERENCES = [np.array([-1.5, -2.5, -3.5], dtype=np.float32), np.array([-4.5], dtype=np.float32)]
PAYLOADS = [None, SampledGroup(PROMPT, COMPLETIONS), REFERENCES]
BUNDLE = Bundle(1, 2, group_id=9, replica=7, items=(Item(1, 0.5, 1), Item(0, -0.5, 3)))


def test_micro_batch_follows_its_items_and_ages_each_token_by_the_oldest_weights_it_is_of() -> None:
    batch = gather_micro_batch([BUNDLE], PAYLOADS, 5, CPU)
    assert batch.tokens.targets.tolist() == [8, 5, 6, 7]
    assert batch.behaviour_logprobs.tolist() == [-4.0, -1.0, -2.0, -3.0]
    assert batch.advantages.tolist() == [0.5, -0.5, -0.5, -0.5]
    # At version 5: the short one is fresh, the long one began two versions ago, and what came later lies over that cache.
    assert batch.lags.tolist() == [0, 2, 2, 2]
    assert batch.reference_logprobs is not None
    assert batch.reference_logprobs.tolist() == [-4.5, -1.5, -2.5, -3.5]
    assert batch.replicas.tolist() == [7, 7, 7, 7]
    assert batch.mask.all()


def test_micro_batch_of_several_bundles_has_each_tokens_own_replica_and_payload() -> None:
    other = SampledGroup(Prompt("test/1", "", np.array([9], dtype=np.int32), ""), (COMPLETIONS[1],))
    bundles = [BUNDLE._replace(reference=None), Bundle(0, None, 4, 2, (Item(0, 1.0, 1),))]
    batch = gather_micro_batch(bundles, [other, PAYLOADS[1]], 5, CPU)
    assert batch.tokens.targets.tolist() == [8, 5, 6, 7, 8]
    assert batch.replicas.tolist() == [7, 7, 7, 7, 2]
    assert batch.reference_logprobs is None


def test_micro_batch_with_tokens_of_the_future_is_refused() -> None:
    with pytest.raises(AssertionError, match="newer than version 4"):
        gather_micro_batch([BUNDLE], PAYLOADS, 4, CPU)


def test_micro_batch_without_bundles_has_one_token_that_does_not_count() -> None:
    batch = gather_micro_batch([], [], 0, CPU)
    assert batch.mask.tolist() == [False]
    assert batch.tokens.targets.shape == batch.lags.shape == batch.replicas.shape == batch.advantages.shape == (1,)
