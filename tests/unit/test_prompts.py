"""Data sources, tokenisation and the prompt stream: what becomes a prompt, what is refused, and that a stream resumes exactly."""

import importlib.util
import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from maspo_ray.config import DataConfig, HuggingFaceSource, JsonlSource, ReasoningGymSource
from maspo_ray.data.prompts import PromptStream, load_prompts
from maspo_ray.data.samplers import PassRateSampler, UniformSampler
from maspo_ray.data.sources import read_rows
from maspo_ray.errors import ConfigError, RunError
from maspo_ray.experience import Prompt

LETTERS = "abcdefgh:|"
BOS, EOS, UNK = 0, 1, 2
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


def _ids(text: str) -> list[int]:
    return [3 + LETTERS.index(letter) if letter in LETTERS else UNK for letter in text]


def _tokenizer(single: str = "$A", template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    vocabulary = {"<bos>": BOS, "<eos>": EOS, "<unk>": UNK} | {c: 3 + i for i, c in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<bos>", BOS), ("<eos>", EOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = template
    return fast


def _jsonl(folder: Path, *records: Any) -> JsonlSource:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return JsonlSource(path=path)


def _data(source: JsonlSource, **keys: Any) -> DataConfig:
    return DataConfig(train=source, **keys)


def _prompts(count: int) -> list[Prompt]:
    return [Prompt(f"train/{i}", "a", np.array([i], dtype=np.int32), None) for i in range(count)]


# Data sources.


def test_jsonl_row_keeps_answer_other_columns_and_a_numbered_id(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, {"prompt": "a", "answer": 1, "level": 3}, {"prompt": "b", "answer": None})
    first, second = read_rows(source, "data.eval")
    assert (first.prompt, first.answer, first.row_id, first.metadata) == ("a", 1, "eval/0", {"level": 3})
    assert (second.answer, second.row_id) == (None, "eval/1")


def test_jsonl_blank_lines_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": 1}\n\n{"prompt": "b", "answer": 2}\n\n')
    rows = read_rows(JsonlSource(path=tmp_path / "rows.jsonl"), "data.train")
    assert [row.row_id for row in rows] == ["train/0", "train/1"]


def test_jsonl_limit_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": 2}\nbroken\n')
    assert len(read_rows(JsonlSource(path=path, limit=2), "data.train")) == 2


def test_jsonl_dotted_answer_column_goes_into_dictionaries(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, {"prompt": "a", "reward_model": {"ground_truth": "7"}, "id": 4})
    row = read_rows(source.model_copy(update={"answer_column": "reward_model.ground_truth"}), "data.train")[0]
    assert (row.answer, row.metadata) == ("7", {"id": 4})


def test_jsonl_column_whose_name_has_a_dot_is_taken_as_it_is(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, {"prompt": "a", "x.y": 1, "x": {"y": 2}})
    assert read_rows(source.model_copy(update={"answer_column": "x.y"}), "data.train")[0].answer == 1


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, "there is no such file. Give the path of a file of one JSON object a line."),
        ("", "the file is empty. Give one that has a JSON object a line."),
        ('{"prompt": "a", "answer": 1}\n{"prompt": \n', "line 2 is not JSON (Expecting value). Mend the line."),
        ('{"prompt": "a", "answer": 1}\n\n[1]\n', "line 3 is not a JSON object but a list. Mend the line."),
        ('{"question": "a", "answer": 1}\n', "line 1 lacks the column prompt (it has question, answer). Set data.train.prompt_column."),
        ('{"prompt": "a", "label": 1}\n', "line 1 lacks the column answer (it has prompt, label). Set data.train.answer_column."),
    ],
)  # fmt: skip
def test_jsonl_fault_is_one_line_with_field_value_rule_and_remedy(
    tmp_path: Path, content: str | None, rule: str
) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_rows(JsonlSource(path=path), "data.train")
    assert str(caught.value) == f"data.train.path is {path}; {rule}"


@pytest.mark.parametrize("prompt", ["", 7, [], ["a"], [{"role": "user"}], [{"role": "user", "content": None}]])
def test_jsonl_prompt_that_cannot_be_asked_is_refused(tmp_path: Path, prompt: Any) -> None:
    with pytest.raises(ConfigError, match="line 1 has in column prompt neither a text nor a list of messages"):
        read_rows(_jsonl(tmp_path, {"prompt": prompt, "answer": 1}), "data.train")


def test_jsonl_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="the file is not UTF-8 text"):
        read_rows(JsonlSource(path=tmp_path / "rows.jsonl"), "data.train")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_huggingface_without_the_library_says_what_to_install() -> None:
    with pytest.raises(ConfigError) as caught:
        read_rows(HuggingFaceSource(name="org/name"), "data.train")
    assert str(caught.value) == (
        "data.train.kind is huggingface; the package datasets is not installed. Install datasets, or use a jsonl file."
    )


def _huggingface_folder(folder: Path) -> str:
    pytest.importorskip("datasets")
    record = {"prompt": [{"role": "user", "content": "ab"}], "reward_model": {"ground_truth": "7"}, "level": 1}
    (folder / "train.jsonl").write_text(3 * (json.dumps(record) + "\n"))
    return str(folder)


def test_huggingface_row_has_messages_and_the_dotted_answer(tmp_path: Path) -> None:
    name = _huggingface_folder(tmp_path)
    source = HuggingFaceSource(name=name, answer_column="reward_model.ground_truth", limit=2)
    rows = read_rows(source, "data.train")
    assert [row.row_id for row in rows] == ["train/0", "train/1"]
    assert (rows[0].text, rows[0].answer, rows[0].metadata) == ("ab", "7", {"level": 1})


def test_huggingface_fault_is_one_line(tmp_path: Path) -> None:
    name = _huggingface_folder(tmp_path)
    with pytest.raises(
        ConfigError, match=f"^data.train.name is {name}; loading it fails: .*Check data.train.name"
    ) as caught:
        read_rows(HuggingFaceSource(name=name, split="nope"), "data.train")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"row 0 lacks the column answer .*Set data.train.answer_column"):
        read_rows(HuggingFaceSource(name=name), "data.train")


def test_reasoning_gym_rows_hold_what_the_scorer_needs_and_survive_pickling() -> None:
    source = ReasoningGymSource(task="chain_sum", size=3, seed=5, args={"max_terms": 3}, suffix=" Answer only.")
    rows = read_rows(source, "data.train")
    assert len(rows) == 3 and all(row.text.endswith(" Answer only.") for row in rows)
    row = pickle.loads(pickle.dumps(rows[1]))
    assert row.metadata["task"] == "chain_sum" and row.metadata["args"] == {"max_terms": 3}
    assert row.answer == row.metadata["entry"]["answer"]
    assert read_rows(source, "data.train") == rows
    assert read_rows(source.model_copy(update={"seed": 6}), "data.train") != rows


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            ReasoningGymSource(task="chain_sums"),
            "data.train.task is chain_sums; reasoning-gym has no such task. Did you mean chain_sum?",
        ),
        (
            ReasoningGymSource(task="chain_sum", args={"min_terms": 5, "max_terms": 2}),
            (
                "data.train.args is {'min_terms': 5, 'max_terms': 2}; the task chain_sum does not take it: "
                "max_terms must be >= min_terms. Change data.train.args."
            ),
        ),
    ],
)
def test_reasoning_gym_fault_is_one_line(source: ReasoningGymSource, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_rows(source, "data.train")
    assert str(caught.value) == message


def test_data_sources_and_prompts_import_no_heavy_library() -> None:
    heavy = "{'torch', 'ray', 'vllm', 'transformers', 'datasets', 'reasoning_gym'}"
    code = f"import sys, maspo_ray.data.prompts, maspo_ray.data.sources; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Tokenisation.


def test_load_prompts_plain_text_has_the_tokenizers_bos_but_no_eos(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, {"prompt": "abc", "answer": "d", "level": 2})
    tokenizer = _tokenizer("<bos> $A <eos>")
    assert tokenizer("abc")["input_ids"] == [BOS, *_ids("abc"), EOS]
    (prompt,) = load_prompts(source, _data(source, chat_template=False), tokenizer, "data.train")
    assert prompt.token_ids.tolist() == [BOS, *_ids("abc")]
    assert prompt.token_ids.dtype == np.int32
    assert (prompt.prompt_id, prompt.text, prompt.answer, prompt.metadata) == ("train/0", "abc", "d", {"level": 2})


def test_load_prompts_plain_text_of_a_tokenizer_without_specials_is_whole(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, {"prompt": "abc", "answer": "d"})
    (prompt,) = load_prompts(source, _data(source, chat_template=False), _tokenizer(), "data.train")
    assert prompt.token_ids.tolist() == _ids("abc")


@pytest.mark.parametrize(
    ("prompt", "system", "rendered"),
    [
        ("abc", None, "u:abc|a:"),
        ("abc", "de", "s:de|u:abc|a:"),
        ([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}], None,
         "u:ab|a:c|u:d|a:"),
        ([{"role": "user", "content": "ab"}], "de", "s:de|u:ab|a:"),
        ([{"role": "system", "content": "h"}, {"role": "user", "content": "ab"}], "de", "s:h|u:ab|a:"),
    ],
)  # fmt: skip
def test_load_prompts_chat_template_renders_up_to_the_assistants_turn(
    tmp_path: Path, prompt: Any, system: str | None, rendered: str
) -> None:
    # The template writes its own special tokens, so the tokenizer must add none.
    source = _jsonl(tmp_path, {"prompt": prompt, "answer": "x"}, {"prompt": "hh", "answer": "x"})
    loaded = load_prompts(source, _data(source, system_prompt=system), _tokenizer("<bos> $A <eos>"), "data.train")
    assert loaded[0].token_ids.tolist() == _ids(rendered)
    assert loaded[0].text == (prompt if isinstance(prompt, str) else prompt[-1]["content"])
    assert loaded[1].text == "hh"


def test_load_prompts_without_a_template_says_so(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, {"prompt": "abc", "answer": "d"})
    with pytest.raises(
        ConfigError, match="^data.chat_template is True; the model's tokenizer has no chat template. Set it to"
    ):
        load_prompts(source, _data(source), _tokenizer(template=None), "data.train")


def test_load_prompts_messages_without_chat_template_name_the_row(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "ab"}]
    source = _jsonl(tmp_path, {"prompt": "abc", "answer": "d"}, {"prompt": messages, "answer": "d"})
    with pytest.raises(
        ConfigError, match=r"^data.chat_template is False; data.train holds chat messages \(row train/1\)"
    ):
        load_prompts(source, _data(source, chat_template=False), _tokenizer(), "data.train")


def test_load_prompts_template_that_refuses_the_messages_is_quoted(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, {"prompt": "abc", "answer": "d"})
    tokenizer = _tokenizer(template="{{ raise_exception('no system role') }}")
    with pytest.raises(ConfigError, match="refuses the messages of data.train: no system role. Change the messages or"):
        load_prompts(source, _data(source, system_prompt="a"), tokenizer, "data.train")


def test_load_prompts_too_long_are_left_out_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = _jsonl(tmp_path, *({"prompt": text, "answer": "x"} for text in ("abcd", "abc", "abcde", "a")))
    data = _data(source, chat_template=False, max_prompt_tokens=3)
    with caplog.at_level(logging.WARNING):
        loaded = load_prompts(source, data, _tokenizer(), "data.train")
    assert [prompt.prompt_id for prompt in loaded] == ["train/1", "train/3"]
    assert loaded.num_too_long == 2
    assert "data.train: left out 2 of 4 prompts, which are longer than data.max_prompt_tokens (3)." in caplog.text


def test_load_prompts_all_too_long_says_how_long_the_shortest_is(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, {"prompt": "abcd", "answer": "x"}, {"prompt": "abc", "answer": "x"})
    with pytest.raises(ConfigError) as caught:
        load_prompts(source, _data(source, chat_template=False, max_prompt_tokens=2), _tokenizer(), "data.eval")
    assert str(caught.value) == (
        "data.max_prompt_tokens is 2; every prompt of data.eval is longer, the shortest has 3 tokens. Raise it."
    )


# The stream.


def _stream(num_prompts: int, shuffle: bool = True, seed: int = 0) -> PromptStream:
    sampler = UniformSampler(num_prompts, shuffle, seed)
    return PromptStream(_prompts(num_prompts), sampler, shuffle=shuffle, seed=seed)


def _drawn(stream: PromptStream, count: int) -> list[str]:
    return [stream.next().prompt.prompt_id for _ in range(count)]


def _as_a_file_has_it(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


@given(
    num_prompts=st.integers(1, 12), before=st.integers(0, 40), other=st.integers(0, 40), seed=st.integers(0, 5), shuffle=st.booleans()
)  # fmt: skip
def test_stream_restored_gives_the_same_continuation(
    num_prompts: int, before: int, other: int, seed: int, shuffle: bool
) -> None:
    stream, resumed = _stream(num_prompts, shuffle, seed), _stream(num_prompts, shuffle, seed)
    _drawn(stream, before)
    state = _as_a_file_has_it(stream.state())
    _drawn(resumed, other)
    resumed.restore(state)
    assert resumed.state() == stream.state() == state
    count = 3 * num_prompts
    continued, expected = ([s.next() for _ in range(count)] for s in (resumed, stream))
    # A prompt's ids are an array, which is compared with nothing but itself.
    assert [(draw.index, draw.times_drawn) for draw in continued] == [
        (draw.index, draw.times_drawn) for draw in expected
    ]


@given(num_prompts=st.integers(1, 12), seed=st.integers(0, 5))
def test_stream_every_epoch_gives_each_prompt_once_and_counts_the_times(num_prompts: int, seed: int) -> None:
    stream = _stream(num_prompts, seed=seed)
    for epoch in range(3):
        draws = [stream.next() for _ in range(num_prompts)]
        assert sorted(draw.index for draw in draws) == list(range(num_prompts))
        assert all(draw.prompt.prompt_id == f"train/{draw.index}" for draw in draws)
        assert {draw.times_drawn for draw in draws} == {epoch}


def test_stream_without_shuffle_keeps_the_datas_order() -> None:
    assert _drawn(_stream(3, shuffle=False), 5) == ["train/0", "train/1", "train/2", "train/0", "train/1"]


def test_stream_order_depends_on_seed_and_epoch() -> None:
    def epochs(seed: int) -> Sequence[list[str]]:
        stream = _stream(50, seed=seed)
        return [_drawn(stream, 50), _drawn(stream, 50)]

    assert epochs(1) == epochs(1)
    assert epochs(1)[0] != epochs(1)[1]
    assert epochs(1)[0] != epochs(2)[0]
    # Epochs of one seed are not those of its neighbour, shifted by one.
    assert epochs(1)[1] != epochs(2)[0]


class _Scripted:
    """A sampler that gives what it is told to, and remembers what it was told."""

    def __init__(self, *indices: int) -> None:
        self._indices = list(indices)
        self.observed: list[tuple[int, float]] = []

    def next(self) -> int:
        return self._indices.pop(0)

    def observe(self, index: int, pass_rate: float) -> None:
        self.observed.append((index, pass_rate))

    def state(self) -> dict[str, Any]:
        return {"left": self._indices}

    def restore(self, state: dict[str, Any]) -> None:
        self._indices = list(state["left"])


def test_stream_of_a_sampler_of_ones_own_counts_each_prompts_draws_and_restores_them() -> None:
    sampler = _Scripted(1, 1, 0, 1)
    stream = PromptStream(_prompts(2), sampler, shuffle=False, seed=0)
    assert [(draw.index, draw.times_drawn) for draw in (stream.next(), stream.next())] == [(1, 0), (1, 1)]
    stream.observe(1, 0.25)
    assert sampler.observed == [(1, 0.25)]
    resumed = PromptStream(_prompts(2), _Scripted(), shuffle=False, seed=0)
    resumed.restore(_as_a_file_has_it(stream.state()))
    assert [(draw.index, draw.times_drawn) for draw in (resumed.next(), resumed.next())] == [(0, 0), (1, 2)]


@pytest.mark.parametrize("index", [-1, 2])
def test_stream_index_that_no_prompt_has_is_an_error_that_names_the_sampler(index: int) -> None:
    stream = PromptStream(_prompts(2), _Scripted(index), shuffle=False, seed=0)
    with pytest.raises(RunError) as caught:
        stream.next()
    assert str(caught.value) == (
        f"{__name__}:_Scripted.next gave {index}; there are 2 prompts, counted from 0. Mend the sampler."
    )


def test_stream_restore_of_another_data_set_or_order_is_refused() -> None:
    state = _stream(3, seed=4).state()
    with pytest.raises(ConfigError) as caught:
        _stream(2, seed=4).restore(state)
    assert (
        str(caught.value) == "data.train is 2 prompts; the saved run had 3. Resume with the config it was saved with."
    )
    with pytest.raises(ConfigError, match="^seed is 5; the saved run had 4"):
        _stream(3, seed=5).restore(state)
    with pytest.raises(ConfigError, match="^data.shuffle is False; the saved run had True"):
        _stream(3, shuffle=False, seed=4).restore(state)
    other = PromptStream(_prompts(3), PassRateSampler(3, True, 4), shuffle=True, seed=4)
    with pytest.raises(
        ConfigError,
        match="^data.sampler.path is maspo_ray.data.samplers:PassRateSampler; the saved run had maspo_ray.data.samplers:UniformSampler",
    ):
        other.restore(state)
