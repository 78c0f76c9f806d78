"""The row of tokens: what is in it, at which positions, and which hidden state predicts what."""

import numpy as np
import torch

from actors.token_batch import Tree, lay_out


def _ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_lay_out_has_each_prompt_once_and_no_completions_last_token() -> None:
    batch = lay_out([(_ids(1, 2), [_ids(3, 4, 5), _ids(6)]), (_ids(7), [_ids(8, 9)])], torch.device("cpu"))
    # Prompt 1 2, then 3 4 (5 is a target only), then nothing of 6; prompt 7, then 8.
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch.trees == (Tree(2, (2, 0)), Tree(1, (1,)))
    assert batch.targets.tolist() == [3, 4, 5, 6, 8, 9]
    # 3 and 6 both follow the prompt's last token, which lies at 1; 8 follows 7, which lies at 4.
    assert batch.predictors.tolist() == [1, 2, 3, 1, 4, 5]
    assert batch.input_ids.dtype == batch.predictors.dtype == torch.int64
