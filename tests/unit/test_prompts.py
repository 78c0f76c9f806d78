"""Tokenisation: what becomes a prompt, what is left out, and that each row which does not is named."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_mistral_common import MistralCommonBackend

from actors.completion_text import CompletionText
from maspo_ray.config import DataConfig, JsonlSource
from maspo_ray.data.prompts import load_prompts, load_run_prompts
from maspo_ray.data.run_rows import RunRows
from maspo_ray.data.sources import SourceRows, read_source
from maspo_ray.data.vocabulary import nameless_ids
from maspo_ray.errors import ConfigError
from maspo_ray.experience import Prompt

LETTERS = "abcdefgh:|"
BOS, EOS, UNK = 0, 1, 2
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


def _ids(text: str) -> list[int]:
    return [3 + LETTERS.index(letter) if letter in LETTERS else UNK for letter in text]


def _tokenizer(single: str = "$A", template: str | None = TEMPLATE, unk: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = {"<bos>": BOS, "<eos>": EOS, "<unk>": UNK} | {c: 3 + i for i, c in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>" if unk else "missing"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<bos>", BOS), ("<eos>", EOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = template
    return fast


def _jsonl(folder: Path, *records: Any) -> JsonlSource:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return JsonlSource(path=path)


def _load(
    source: JsonlSource,
    tokenizer: PreTrainedTokenizerFast,
    field: str = "data.train",
    **keys: Any,
) -> tuple[list[Prompt], SourceRows]:
    """Returns the prompts, and the rows with what is left out of them."""
    rows = read_source(source, field)
    return load_prompts(rows, DataConfig(train=source, **keys), tokenizer), rows


def test_data_modules_import_no_heavy_library() -> None:
    heavy = "{'torch', 'ray', 'vllm', 'transformers', 'datasets', 'pyarrow', 'reasoning_gym'}"
    code = f"import sys, maspo_ray.data.prompts, maspo_ray.data.stream; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_load_prompts_plain_text_has_the_tokenizers_bos_but_no_eos(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, {"prompt": "abc", "answer": "d", "level": 2})
    tokenizer = _tokenizer("<bos> $A <eos>")
    assert tokenizer("abc")["input_ids"] == [BOS, *_ids("abc"), EOS]
    ((prompt,), _) = _load(source, tokenizer, chat_template=False)
    assert prompt.token_ids.tolist() == [BOS, *_ids("abc")]
    assert prompt.token_ids.dtype == np.int32
    assert (prompt.prompt_id, prompt.text, prompt.answer, prompt.metadata) == ("train/0", "abc", "d", {"level": 2})


def test_load_prompts_plain_text_of_a_tokenizer_without_specials_is_whole(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, {"prompt": "abc", "answer": "d"})
    ((prompt,), _) = _load(source, _tokenizer(), chat_template=False)
    assert prompt.token_ids.tolist() == _ids("abc")


@pytest.mark.parametrize(
    ("prompt", "system", "rendered"),
    [
        ("abc", None, "u:abc|a:"),
        ("abc", "de", "s:de|u:abc|a:"),
        ([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}], None,
         "u:ab|a:c|u:d|a:"),
        ([{"role": "user", "content": "ab"}], "de", "s:de|u:ab|a:"),
        # A turn that has begun is left open.
        ([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}], "de", "s:de|u:ab|a:cd"),
        ([{"role": "system", "content": "h"}, {"role": "user", "content": "ab"}], "de", "s:h|u:ab|a:"),
    ],
)  # fmt: skip
def test_load_prompts_chat_template_renders_up_to_the_assistants_turn(
    tmp_path: Path, prompt: Any, system: str | None, rendered: str
) -> None:
    # The template writes its own special tokens, so the tokenizer must add none.
    source = _jsonl(tmp_path, {"prompt": prompt, "answer": "x"}, {"prompt": "hh", "answer": "x"})
    loaded, _ = _load(source, _tokenizer("<bos> $A <eos>"), system_prompt=system)
    assert loaded[0].token_ids.tolist() == _ids(rendered)
    asked = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt if m["role"] == "user"]
    assert loaded[0].text == asked[-1]
    assert loaded[1].text == "hh"


def test_load_prompts_without_a_template_says_so(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, {"prompt": "abc", "answer": "d"})
    with pytest.raises(
        ConfigError, match="^data.chat_template is True; the model's tokenizer has no chat template. Set it to"
    ):
        _load(source, _tokenizer(template=None))


def test_load_prompts_messages_without_chat_template_name_the_row(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "ab"}]
    source = _jsonl(tmp_path, {"prompt": "abc", "answer": "d"}, {"prompt": messages, "answer": "d"})
    with pytest.raises(ConfigError) as caught:
        _load(source, _tokenizer(), chat_template=False)
    assert str(caught.value) == (
        f"data.train.path is {source.path}; line 2 has chat messages, which need data.chat_template. Set data.chat_template to true "
        "or set data.on_bad_row to skip."
    )


def test_load_prompts_template_that_refuses_a_rows_messages_names_the_row(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, {"prompt": "abc", "answer": "d"}, {"prompt": "h", "answer": "d"})
    template = "{% if messages[0]['content'] == 'h' %}{{ raise_exception('no h') }}{% endif %}a:"
    with pytest.raises(ConfigError) as caught:
        _load(source, _tokenizer(template=template))
    assert str(caught.value) == (
        f"data.train.path is {source.path}; line 2 has messages that the tokenizer's chat template refuses (TemplateError: no h). "
        "Change the messages, change data.system_prompt or set data.on_bad_row to skip."
    )
    prompts, rows = _load(source, _tokenizer(template=template), on_bad_row="skip")
    assert [prompt.prompt_id for prompt in prompts] == ["train/0"] and [row.place for row in rows.bad] == ["line 2"]


def test_load_prompts_template_that_raises_anything_is_one_line(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, {"prompt": "abc", "answer": "d"})
    for expression, error in (
        ("1 / 0", "ZeroDivisionError"),
        ("messages[7]['x'].y", "UndefinedError"),
        ("1 + 'a'", "TypeE"),
    ):
        with pytest.raises(ConfigError, match=rf"chat template refuses \({error}[^\n]+\)\. Change the messages[^\n]+$"):
            _load(source, _tokenizer(template=f"{{{{ {expression} }}}}"))


def test_load_prompts_turn_that_the_template_drops_is_one_line(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c" * 999}]
    template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}|{% endfor %}"
    with pytest.raises(ConfigError, match=r"refuses \(ValueError: continue_final_message [^\n]+\)\. Change") as caught:
        _load(_jsonl(tmp_path, {"prompt": messages, "answer": "d"}), _tokenizer(template=template))
    assert len(str(caught.value)) < 700


SEVERAL: Any = {"default": TEMPLATE, "short": "{{ messages[0]['content'] }}:"}


@pytest.mark.parametrize(("name", "rendered"), [(None, "u:ab|a:"), ("default", "u:ab|a:"), ("short", "ab:")])
def test_load_prompts_takes_the_template_that_is_named(tmp_path: Path, name: str | None, rendered: str) -> None:
    source = _jsonl(tmp_path, {"prompt": "ab", "answer": "d"})
    [prompt], _ = _load(source, _tokenizer(template=SEVERAL), template_name=name)
    assert prompt.token_ids.tolist() == _ids(rendered)


def test_load_prompts_of_mistrals_own_tokenizer_are_rendered_by_its_code(tmp_path: Path) -> None:
    # Shipped with the package: a tokenizer of 131,072 tokens without a chat template, some of them parts of characters.
    data = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    tokenizer = MistralCommonBackend(data)
    user, begun = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
    source = _jsonl(tmp_path, {"prompt": "Hi", "answer": "d"}, {"prompt": [user, begun], "answer": "d"})
    whole, opened = (prompt.token_ids.tolist() for prompt in _load(source, tokenizer)[0])
    # <s> [INST] Hi [/INST], as its documentation has it; a turn that has begun has no </s>.
    assert [tokenizer.decode([token]) for token in whole] == ["<s>", "[INST]", "Hi", "[/INST]"]
    assert opened[:4] == whole and [tokenizer.decode([token]) for token in opened[4:]] == ["Yes"]
    assert nameless_ids(tokenizer, 131_072) == frozenset() and min(nameless_ids(tokenizer, 131_080)) == 131_072
    reader = CompletionText(tokenizer, 131_080)
    assert reader.of([opened[4], 2], "Yes", True) == "Yes"
    assert reader.of([opened[4], 131_075, 2], "Yes", True) == "Yes\ufffd"


@pytest.mark.parametrize(
    ("template", "name", "line"),
    [
        (
            {"short": "a", "long": "b"},
            None,
            "data.template_name is not set; the model's tokenizer has several chat templates, none of which is called default. Set it "
            "to one of long, short.",
        ),
        (
            SEVERAL,
            "shrt",
            "data.template_name is shrt; the model's tokenizer has several chat templates, none of which is called shrt. Set it to one "
            "of default, short.",
        ),
        (
            TEMPLATE,
            "short",
            "data.template_name is short; the model's tokenizer has one chat template, without a name. Remove it.",
        ),
    ],
)
def test_load_prompts_template_that_is_not_there_is_one_line(
    tmp_path: Path, template: Any, name: str | None, line: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(_jsonl(tmp_path, {"prompt": "ab", "answer": "d"}), _tokenizer(template=template), template_name=name)
    assert str(caught.value) == line


def test_load_prompts_text_that_the_tokenizer_refuses_is_named(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, {"prompt": "abc", "answer": "d"}, {"prompt": "abz", "answer": "d"})
    with pytest.raises(
        ConfigError, match=r"; line 2 has a prompt that the tokenizer refuses \(.*UNK.*\)\. Mend it or set"
    ):
        _load(source, _tokenizer(unk=False), chat_template=False)


def test_load_prompts_row_without_tokens_is_named(tmp_path: Path) -> None:
    tokenizer = _tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(".", "removed")
    source = _jsonl(tmp_path, {"prompt": "a", "answer": "d"}, {"prompt": "...", "answer": "d"})
    assert tokenizer("...")["input_ids"] == []
    with pytest.raises(
        ConfigError, match=f"^data.train.path is {source.path}; line 2 has a prompt without tokens. Mend it or"
    ):
        _load(source, tokenizer, chat_template=False)


def test_load_prompts_too_long_are_left_out_with_their_place(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, *({"prompt": text, "answer": "x"} for text in ("abcd", "abc", "abcde", "a")))
    prompts, rows = _load(source, _tokenizer(), chat_template=False, max_prompt_tokens=3)
    assert [prompt.prompt_id for prompt in prompts] == ["train/1", "train/3"]
    assert [(row.place, row.fault.rule) for row in rows.too_long] == [
        ("line 1", "has 4 tokens, more than data.max_prompt_tokens (3)"),
        ("line 3", "has 5 tokens, more than data.max_prompt_tokens (3)"),
    ]


def test_load_prompts_all_too_long_says_how_long_the_shortest_is(tmp_path: Path) -> None:
    source = _jsonl(tmp_path, {"prompt": "abcd", "answer": "x"}, {"prompt": "abc", "answer": "x"})
    with pytest.raises(ConfigError) as caught:
        _load(source, _tokenizer(), "data.eval", chat_template=False, max_prompt_tokens=2)
    assert str(caught.value) == (
        "data.max_prompt_tokens is 2; every prompt of data.eval is longer, the shortest has 3 tokens. Raise it."
    )


def test_load_run_prompts_of_a_mix_keeps_its_sources_apart_and_the_held_out_rows(tmp_path: Path) -> None:
    _jsonl(tmp_path, {"prompt": "ab", "answer": "1"}, {"prompt": " ", "answer": "2"}, {"prompt": "c", "answer": "3"})
    (tmp_path / "other.csv").write_text("prompt,answer\nabcdef,4\ng,5\n")
    lines = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}
    sources = {"lines": lines, "table": {"kind": "csv", "path": str(tmp_path / "other.csv")}}
    data = DataConfig.model_validate(
        {
            "train": {"kind": "mix", "sources": sources},
            "eval": lines | {"limit": 1},
            "on_bad_row": "skip",
            "chat_template": False,
            "max_prompt_tokens": 3,
        }
    )
    rows = RunRows(data)
    rows.read_all()
    prompts = load_run_prompts(rows, data, _tokenizer())
    assert {name: [prompt.prompt_id for prompt in own] for name, own in prompts.train.items()} == {
        "lines": ["train/lines/0", "train/lines/2"],
        "table": ["train/table/1"],
    }
    assert {prompt.source for prompt in prompts.train["table"]} == {"table"}
    assert [(prompt.prompt_id, prompt.source) for prompt in prompts.held_out] == [("eval/0", "")]
    assert [(row["row"], row["cause"]) for row in rows.left_out()] == [
        ("line 2", "has a prompt without text"),
        ("line 2", "has 6 tokens, more than data.max_prompt_tokens (3)"),
    ]
