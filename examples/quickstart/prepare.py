"""Makes what the quickstart needs, once: the task's prompts, and a tiny model that was taught the task carelessly.

The task is to add two numbers of two digits: prompt `37+48=`, answer `85`. Every eighth pair of numbers is held out: neither the
warm-up nor the training ever sees it. The model is a Llama of 0.8M parameters with one token for each character. The warm-up is
supervised: right examples until the model answers nine prompts in ten rightly, then some of which eight in ten are off by one, until
it gives three prompts in ten the right answer. What is right it learns again from the verified reward alone.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789+="
PAD, EOS = 0, 1
PROMPT_TOKENS = len("37+48=")
# Of the examples, in the careless part; and of the model's own answers, where each part of the warm-up ends.
CARELESS_SHARE_RIGHT = 0.2
SKILLED, CARELESS = 0.9, 0.3


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token for each character, and a vocabulary padded to 64."""
    vocabulary = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2} | {c: 3 + i for i, c in enumerate(CHARACTERS)}
    vocabulary |= {f"<{i}>": i for i in range(len(vocabulary), 64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """Returns a Llama of 0.8M parameters; a head of 32 is the smallest that vLLM's CPU attention takes."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            # 1 / √hidden_size: at the default of 0.02 so small a model takes two to four times as many steps to learn.
            initializer_range=0.088,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def additions() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Returns (training, held-out) pairs of prompt and answer, shuffled the same way each time."""
    pairs = [(f"{a}+{b}=", str(a + b)) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    return pairs[len(pairs) // 8 :], pairs[: len(pairs) // 8]


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rows as [rows, width] int64, and labels that are -100 but on the answer."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(ids == PAD, -100)
    labels[:, :PROMPT_TOKENS] = -100
    return ids, labels


def warm_up(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, max_steps: int) -> tuple[int, float]:
    """Trains the model on answers to training prompts, right ones and then careless ones.

    Returns how many steps it took, and how often the model then gives the right answer.
    """
    train, _ = additions()
    rng = random.Random(1)
    prompts = {prompt: tokenizer(prompt)["input_ids"] for prompt, _ in train}
    answers = [tokenizer(str(number))["input_ids"] + [EOS] for number in range(2 * 99 + 2)]
    probe = padded([prompts[prompt] + answers[int(answer)] for prompt, answer in train[:512]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    share_right = 1.0
    for step in range(1, max_steps + 1):
        rows = []
        for prompt, answer in rng.sample(train, 128):
            slip = 0 if rng.random() < share_right else rng.choice((-1, 1))
            rows.append(prompts[prompt] + answers[int(answer) + slip])
        ids, labels = padded(rows)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or share_right < 1.0:
            accuracy = sampled_accuracy(model, *probe)
            if share_right == 1.0 and accuracy >= SKILLED:
                share_right = CARELESS_SHARE_RIGHT
            elif share_right < 1.0 and accuracy <= CARELESS:
                break
    return step, sampled_accuracy(model, *probe)


@torch.no_grad()
def sampled_accuracy(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns how often an answer sampled at temperature 1 is the labelled one: its probability, mean over rows."""
    logprobs = model(ids).logits[:, :-1].log_softmax(-1)
    wanted = labels[:, 1:]
    tokens = logprobs.gather(-1, wanted.clamp(min=0)[..., None])[..., 0].masked_fill(wanted < 0, 0.0)
    return float(tokens.sum(-1).exp().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    parser.add_argument("--max-steps", type=int, default=2000, help="bound of the warm-up's supervised steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model_folder, data_folder = options.folder / "model", options.folder / "data"
    if (model_folder / "config.json").exists() and (data_folder / "heldout.jsonl").exists():
        print(f"{model_folder} and {data_folder} are there already")
        return
    started = time.perf_counter()
    tokenizer, model = build_tokenizer(), build_model(options.seed)
    steps, accuracy = warm_up(model, tokenizer, options.max_steps)
    data_folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in zip(("train", "heldout"), additions(), strict=True):
        lines = (json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs)
        (data_folder / f"{name}.jsonl").write_text("".join(lines))
    tokenizer.save_pretrained(model_folder)
    model.save_pretrained(model_folder)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"warmed up a model of {millions:.2f}M parameters by {steps} supervised steps in "
        f"{time.perf_counter() - started:.0f} s; it answers {accuracy:.0%} of the training prompts rightly: {model_folder}"
    )


if __name__ == "__main__":
    main()
