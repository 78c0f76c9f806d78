"""A whole run of a mixture of experts: two ranks of ZeRO-3 that gather it, an engine that receives it, parity at every step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from random_models import EXPERTS, SIZES, random_model
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.slow]

REWARD = """
class EvenReward:
    async def score(self, prompt, completions):
        return [float(sum(completion.token_ids) % 2 == 0) for completion in completions]
"""


def _model(folder: Path) -> None:
    from prepare import build_tokenizer

    # vLLM pads experts to a multiple of 32 on a CPU, which their size is not.
    tokens = {"eos_token_id": 1, "pad_token_id": 0}
    config = Qwen3MoeConfig(
        **SIZES, **EXPERTS, **tokens, head_dim=32, output_router_logits=True, router_aux_loss_coef=0.01
    )
    random_model(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def test_experts_train_with_parity_after_every_update(tmp_path: Path) -> None:
    _model(tmp_path / "model")
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 20) for b in range(10, 20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_reward.py").write_text(REWARD)
    tree = {
        "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
        "data": {
            "train": {"kind": "jsonl", "path": str(tmp_path / "data.jsonl")},
            "chat_template": False,
            "max_prompt_tokens": 8,
        },
        "rollout": {"group_size": 4, "max_new_tokens": 6, "kv_cache_gib": 0.06},
        "reward": {"actor": "my_reward:EvenReward"},
        "learner": {"replicas": 2, "zero_stage": 3, "cpus": 0.4, "lr": 1e-3},
        "kl": {"coef": 0.0},
        "pipeline": {"steps": 4, "groups_per_step": 4, "parity_every": 1, "filter_zero_variance": False},
        "run_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    ended = subprocess.run(
        [sys.executable, "-m", "maspo_ray", "train", "run.yaml"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 4
    for step in steps:
        assert step["parity/max"] <= 1e-3
        assert step["learner/update_to_weight"] > 0
        # 2 experts of 4 for each token: 2 where they are used alike.
        assert 1.9 <= step["objective/load_balance"] <= 4
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[name], before[name]) for name in before if "mlp" in name)
