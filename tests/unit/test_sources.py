"""Data sources: what each kind of file holds comes out as it is, and what cannot be read is named with its place."""

import csv
import gzip
import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from maspo_ray.config import DataSource, HuggingFaceSource, JsonlSource, ReasoningGymSource
from maspo_ray.data.sources import Row, read_source
from maspo_ray.errors import ConfigError

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"content": "How many?", "role": "user"}],
    "ability": "math",
    "reward_model": {"ground_truth": "72", "style": "rule"},
    "extra_info": {"index": 0, "split": "train"},
}
"""A row with the columns of verl's data."""


def _source(**keys: Any) -> DataSource:
    source: DataSource = TypeAdapter(DataSource).validate_python(keys)
    return source


def _rows(field: str = "data.train", **keys: Any) -> list[Row]:
    """Returns the rows of a source, none of which is bad."""
    found = read_source(_source(**keys), field)
    found.settle("refuse")
    return found.rows


def _bad(**keys: Any) -> list[tuple[str, str]]:
    """Returns the place and the fault of each bad row."""
    return [(row.place, row.fault.rule) for row in read_source(_source(**keys), "data.train").bad]


def _refusal(**keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read_source(_source(**keys), "data.train").settle("refuse")
    message = str(caught.value)
    assert "\n" not in message
    return message


def _jsonl(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# JSONL.


def test_jsonl_row_keeps_answer_other_columns_and_a_numbered_id(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", {"prompt": "a", "answer": 1, "level": 3}, {"prompt": "b", "answer": None})
    first, second = _rows("data.eval", kind="jsonl", path=path)
    assert (first.prompt, first.answer, first.row_id, first.metadata) == ("a", 1, "eval/0", {"level": 3})
    assert (second.answer, second.row_id, second.place) == (None, "eval/1", "line 2")


def test_jsonl_blank_lines_are_no_rows_and_a_mark_of_the_encoding_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": 1}\r\n\r\n{"prompt": "b\xc3\xa9", "answer": 2}\r\n \n')
    rows = _rows(kind="jsonl", path=path)
    assert [(row.row_id, row.place, row.prompt) for row in rows] == [
        ("train/0", "line 1", "a"),
        ("train/1", "line 3", "bé"),
    ]


def test_jsonl_limit_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": 2}\nbroken\n')
    assert len(_rows(kind="jsonl", path=path, limit=2)) == 2


def test_jsonl_dotted_column_goes_into_dictionaries(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", {"q": {"text": "a"}, "reward_model": {"ground_truth": "7"}, "id": 4})
    (row,) = _rows(kind="jsonl", path=path, prompt_column="q.text", answer_column="reward_model.ground_truth")
    assert (row.prompt, row.answer, row.metadata) == ("a", "7", {"id": 4})


def test_jsonl_column_whose_name_has_a_dot_is_taken_as_it_is(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", {"prompt": "a", "x.y": 1, "x": {"y": 2}})
    assert _rows(kind="jsonl", path=path, answer_column="x.y")[0].answer == 1


def test_jsonl_compressed_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a", "answer": 1}\n'))
    assert _rows(kind="jsonl", path=path)[0].answer == 1
    path.write_bytes(path.read_bytes()[:-12])
    assert _refusal(kind="jsonl", path=path).startswith(f"data.train.path is {path}; the file cannot be read (")


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"prompt": ', "is not JSON (Expecting value)"),
        ("[1]", "is not a JSON object but a list"),
        ('{"question": "a", "answer": 1}', "lacks the column prompt (it has question, answer)"),
        ('{"prompt": "a", "label": 1}', "lacks the column answer (it has prompt, label)"),
        ("{}", "lacks the column prompt (it has none)"),
        ('{"prompt": "", "answer": 1}', "has a prompt without text"),
        ('{"prompt": " \\n\\t\\u3000", "answer": 1}', "has a prompt without text"),
        ('{"prompt": [{"role": "user", "content": " "}], "answer": 1}', "has a prompt without text"),
        ('{"prompt": "1\\ud83d+2=", "answer": 1}', "has a prompt that is no valid text (\\ud83d is half a surrogate pair)"),
        ('{"prompt": [{"role": "user", "content": "\\udc00"}], "answer": 1}',
         "has a prompt that is no valid text (\\udc00 is half a surrogate pair)"),
        (json.dumps({"prompt": json.dumps([{"role": "user", "content": "hi"}]), "answer": 1}), "has a prompt that spells chat messages as text"),
        (json.dumps({"prompt": str([{"role": "user", "content": "it's"}]), "answer": 1}), "has a prompt that spells chat messages as text"),
        ('{"prompt": "a", "answer": "\\ud83d"}', "has an answer that is no valid text (\\ud83d is half a surrogate pair)"),
        *((f'{{"prompt": {prompt}, "answer": 1}}',
           "has in column prompt neither a text nor a list of messages with a role and a content each")
          for prompt in ("7", "null", "[]", '["a"]', '[{"role": "user"}]', '[{"role": "user", "content": null}]')),
    ],
)  # fmt: skip
def test_jsonl_row_that_cannot_be_asked_is_named_and_the_others_are_kept(tmp_path: Path, line: str, rule: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n\n' + line + '\n{"prompt": "b", "answer": 2}\n')
    found = read_source(JsonlSource(path=path), "data.train")
    assert [(row.place, row.fault.rule) for row in found.bad] == [("line 3", rule)]
    # The bad row has its number: mending it renames no other.
    assert [row.row_id for row in found.rows] == ["train/0", "train/2"]
    with pytest.raises(ConfigError) as caught:
        found.settle("refuse")
    assert str(caught.value).startswith(f"data.train.path is {path}; line 3 {rule}. ")
    assert str(caught.value).endswith(" or set data.on_bad_row to skip.")
    found.settle("skip")


def test_bad_rows_are_counted_and_all_of_them_are_refused_in_any_case(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", {"prompt": "", "answer": 1}, {"prompt": "", "answer": 1})
    message = f"data.train.path is {path}; line 1 has a prompt without text. Mend it. All 2 rows are at fault."
    found = read_source(JsonlSource(path=path), "data.train")
    for policy in ("refuse", "skip"):
        with pytest.raises(ConfigError) as caught:
            found.settle(policy)  # type: ignore[arg-type]
        assert str(caught.value) == message
    _jsonl(path, {"prompt": "a", "answer": 1}, {"prompt": "", "answer": 1}, {"answer": 1})
    assert _refusal(kind="jsonl", path=path) == (
        f"data.train.path is {path}; line 3 lacks the column prompt (it has answer). Set data.train.prompt_column or set "
        "data.on_bad_row to skip. 2 of 3 rows are at fault."
    )


@pytest.mark.parametrize("text", ["[{role}] of a [{content}]", '[{"role": "user"}', '[{"role": 1}]', "[1]"])
def test_text_that_only_resembles_messages_is_a_prompt(tmp_path: Path, text: str) -> None:
    path = _jsonl(tmp_path / "a.jsonl", {"prompt": text, "answer": 1})
    assert _rows(kind="jsonl", path=path)[0].prompt == text


# Files, folders, globs.


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_file_that_is_not_there_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "no.file"
    assert _refusal(kind=kind, path=path) == (
        f"data.train.path is {path}; there is no such file. Give the path of a file, a folder or a glob."
    )
    path = tmp_path / "*.file"
    assert _refusal(kind=kind, path=path).startswith(f"data.train.path is {path}; no file matches. Give")


@pytest.mark.parametrize(("kind", "content"), [("jsonl", ""), ("jsonl", " \n\n"), ("json", "[]"), ("csv", "prompt,answer\n"), ("csv", "")])  # fmt: skip
def test_file_without_rows_is_named(tmp_path: Path, kind: str, content: str) -> None:
    (tmp_path / "rows").write_text(content)
    assert _refusal(kind=kind, path=tmp_path / "rows") == (
        f"data.train.path is {tmp_path / 'rows'}; it is empty. Give a source that has rows."
    )


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_file_that_is_no_text_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "rows").write_bytes(b"\xff\xfe\x00")
    assert _refusal(kind=kind, path=tmp_path / "rows") == (
        f"data.train.path is {tmp_path / 'rows'}; the file is not UTF-8 text. Give one that is."
    )


def _two_files(folder: Path) -> tuple[Path, Path]:
    second = _jsonl(folder / "b.jsonl", {"prompt": "c", "answer": 3})
    return _jsonl(folder / "a.jsonl", {"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}), second


@pytest.mark.parametrize("path", ["", "*.jsonl", "**/[ab].jsonl"])
def test_folder_and_glob_are_read_in_the_order_of_names_and_rows_are_placed(tmp_path: Path, path: str) -> None:
    first, second = _two_files(tmp_path)
    (tmp_path / "README.md").write_text("no data")
    rows = _rows(kind="jsonl", path=tmp_path / path)
    assert [(row.row_id, row.place, row.answer) for row in rows] == [
        ("train/0", f"{first}, line 1", 1),
        ("train/1", f"{first}, line 2", 2),
        ("train/2", f"{second}, line 1", 3),
    ]
    assert len(_rows(kind="jsonl", path=tmp_path / path, limit=2)) == 2


def test_folder_without_files_of_the_kind_says_what_they_end_in(tmp_path: Path) -> None:
    _two_files(tmp_path)
    assert _refusal(kind="parquet", path=tmp_path) == (
        f"data.train.path is {tmp_path}; no file of this folder ends in .parquet. Give another, or set kind."
    )


@pytest.mark.parametrize("names", [("train.jsonl", "heldout.jsonl"), ("a_train-0.jsonl", "a_test-0.jsonl"), ("x.val.jsonl", "x.train.jsonl")])  # fmt: skip
def test_folder_of_several_splits_is_refused_so_that_no_test_row_is_trained_on(
    tmp_path: Path, names: Sequence[str]
) -> None:
    for name in names:
        _jsonl(tmp_path / name, {"prompt": name, "answer": 1})
    message = _refusal(kind="jsonl", path=tmp_path)
    assert message.startswith(f"data.train.path is {tmp_path}; this folder has files of several splits (")
    assert message.endswith(f"Give a glob, such as {tmp_path}/train*.jsonl.")
    assert len(_rows(kind="jsonl", path=tmp_path / "*train*")) == 1


def test_folder_of_one_splits_parts_is_read(tmp_path: Path) -> None:
    for i in range(3):
        _jsonl(tmp_path / f"train-{i}-of-3.jsonl", {"prompt": "a", "answer": i})
    assert [row.answer for row in _rows(kind="jsonl", path=tmp_path)] == [0, 1, 2]


# JSON.


def test_json_list_of_objects_keeps_each_rows_types(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "7"}, {"prompt": [{"role": "user", "content": "b"}], "answer": [1, "x"]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=2))
    assert [row.answer for row in _rows(kind="json", path=tmp_path / "rows.json")] == ["7", [1, "x"]]
    (tmp_path / "rows.json").write_text(json.dumps({"version": 1, "data": [*rows, 5]}))
    found = _bad(kind="json", path=tmp_path / "rows.json", list_key="data")
    assert found == [("row 2", "is not a JSON object but a int")]


@pytest.mark.parametrize(
    ("content", "list_key", "rule"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"}\n', None, "the file holds more than one JSON document. Set kind to jsonl, if each line is one."),
        ('[{"prompt": "a",}]', None, "the file is not JSON (line 1: Illegal trailing comma before end of object). Mend it."),
        ('{"v": 1, "rows": []}', None, "the file holds no list of objects but a dict (its keys are v, rows). Set list_key to the key of its list."),
        ('{"v": 1, "rows": []}', "row", "the file has no key row (its keys are v, rows). Change list_key."),
        ("[" + "9" * 5000 + "]", None, "the file is not JSON (Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit). Mend it."),
        ("3", None, "the file holds no list of objects but a int. Set list_key to the key of its list."),
    ],
)  # fmt: skip
def test_json_file_that_holds_no_rows_is_one_line(
    tmp_path: Path, content: str, list_key: str | None, rule: str
) -> None:
    (tmp_path / "rows.json").write_text(content)
    message = _refusal(kind="json", path=tmp_path / "rows.json", list_key=list_key)
    if "comma" in rule:
        # Its wording differs between versions of Python.
        assert message.startswith(f"data.train.path is {tmp_path / 'rows.json'}; the file is not JSON (line 1: ")
    else:
        assert message == f"data.train.path is {tmp_path / 'rows.json'}; {rule}"


# CSV.


def test_csv_values_are_the_texts_that_the_file_has(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    cells = [["a, b", "007"], ["two\nlines", "1e5"], ['a "quote"', "NA"], ["c", "nan"], ["d", "1.0"]]
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["prompt", "answer"], *cells])
    rows = _rows(kind="csv", path=path)
    assert [[row.prompt, row.answer] for row in rows] == cells
    # The second row takes lines 3 and 4.
    assert [row.place for row in rows] == ["line 2", "line 3", "line 5", "line 6", "line 7"]


def test_csv_delimiter_is_a_tab_in_tsv_and_otherwise_as_given(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text("prompt\tanswer\na, b\t1\n")
    (tmp_path / "rows.txt").write_text("prompt;answer\na, b;1\n")
    assert _rows(kind="csv", path=tmp_path / "rows.tsv")[0].prompt == "a, b"
    assert _rows(kind="csv", path=tmp_path / "rows.txt", delimiter=";")[0].prompt == "a, b"


def test_csv_row_with_a_value_too_many_or_too_few_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,answer\na,1\nb\n\nc, d,2\n")
    assert _bad(kind="csv", path=tmp_path / "rows.csv") == [
        ("line 3", "has 1 values, the header has 2"),
        ("line 5", "has 3 values, the header has 2"),
    ]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("prompt,answer,answer\na,1,2\n", "the file has the column answer twice. Rename one."),
        ('prompt,answer\na,1\n"b,2\nc,3\n', "the file is not CSV from line 3 on (unexpected end of data). Mend its quotes."),
    ],
)  # fmt: skip
def test_csv_file_that_cannot_be_read_is_one_line(tmp_path: Path, content: str, rule: str) -> None:
    (tmp_path / "rows.csv").write_text(content)
    assert _refusal(kind="csv", path=tmp_path / "rows.csv") == f"data.train.path is {tmp_path / 'rows.csv'}; {rule}"


def test_csv_value_longer_than_pythons_default_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,answer\n" + "a" * 200_000 + ",1\n")
    assert len(_rows(kind="csv", path=tmp_path / "rows.csv")[0].text) == 200_000


# Tables: Parquet, saved datasets, the hub's. The rows are of the shapes that people have: verl's columns and TRL's.


def _parquet(path: Path, *records: Any) -> Path:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(Table.from_pylist(list(records)), path)
    return path


def _saved(folder: Path, *records: Any) -> Any:
    """Returns a dataset of `datasets`, made of a file: one made in memory cannot be hashed by the library beside pyarrow 22 and later."""
    from datasets import load_dataset

    path = _jsonl(folder / "rows.jsonl", *records)
    return load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))


def test_parquet_with_verls_columns_has_messages_and_the_ground_truth(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "train.parquet", VERL, {**VERL, "reward_model": {"ground_truth": "8", "style": "rule"}})
    rows = _rows(kind="parquet", path=path, answer_column="reward_model.ground_truth")
    assert [(row.answer, row.place) for row in rows] == [("72", "row 0"), ("8", "row 1")]
    assert rows[0].prompt == [{"content": "How many?", "role": "user"}]
    assert rows[0].metadata == {k: VERL[k] for k in ("data_source", "ability", "extra_info")}


def test_parquet_message_lacks_the_keys_that_only_others_have(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "b", "name": "n"}, {"role": "user", "content": "a"}]
    (row,) = _rows(kind="parquet", path=_parquet(tmp_path / "a.parquet", {"prompt": messages, "answer": "1"}))
    assert row.prompt == messages


def test_parquet_several_files_are_one_source_and_place_their_rows(tmp_path: Path) -> None:
    first = _parquet(tmp_path / "train-0.parquet", {"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"})
    second = _parquet(tmp_path / "train-1.parquet", {"prompt": " ", "answer": "3"}, {"prompt": "d", "answer": "4"})
    found = read_source(_source(kind="parquet", path=tmp_path), "data.train")
    assert [row.place for row in found.rows] == [f"{first}, row 0", f"{first}, row 1", f"{second}, row 1"]
    assert [row.place for row in found.bad] == [f"{second}, row 0"]


def test_parquet_without_rows_is_passed_over_and_none_at_all_is_named(tmp_path: Path) -> None:
    from pyarrow import array, string, table
    from pyarrow.parquet import write_table

    second = _parquet(tmp_path / "b.parquet", {"prompt": "a", "answer": "1"})
    no_texts = array([], string())
    write_table(table({"prompt": no_texts, "answer": no_texts}), tmp_path / "a.parquet")
    assert [row.place for row in _rows(kind="parquet", path=tmp_path)] == [f"{second}, row 0"]
    assert _refusal(kind="parquet", path=tmp_path / "a.parquet").endswith("; it is empty. Give a source that has rows.")


def test_parquet_files_of_other_columns_or_types_keep_their_own(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", {"prompt": "a", "answer": "1"})
    _parquet(tmp_path / "b.parquet", {"prompt": "b", "answer": 2})
    other = _parquet(tmp_path / "c.parquet", {"question": "a", "answer": "1"})
    found = read_source(_source(kind="parquet", path=tmp_path), "data.train")
    assert [row.answer for row in found.rows] == ["1", 2]
    assert [(row.place, row.fault.rule) for row in found.bad] == [
        (f"{other}, row 0", "lacks the column prompt (it has question, answer)")
    ]


def test_parquet_that_is_none_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("no table")
    message = _refusal(kind="parquet", path=path)
    assert message.startswith(f"data.train.path is {path}; the file cannot be read (")
    assert message.endswith("Give Parquet files.")
    _parquet(tmp_path / "b.parquet", VERL)
    assert _refusal(kind="parquet", path=tmp_path).startswith(f"data.train.path is {tmp_path}; {path} cannot be read (")


def test_saved_dataset_is_read_and_a_split_is_asked_for_where_there_are_several(tmp_path: Path) -> None:
    # As TRL's datasets have it: the prompt as messages, the answer as `solution`.
    trl = {"prompt": [{"role": "user", "content": "a"}], "solution": "$2$"}
    data = _saved(tmp_path / "made", trl, {**trl, "solution": "$3$"})
    data.save_to_disk(str(tmp_path / "one"))
    keys = {"kind": "saved", "answer_column": "solution"}
    rows = _rows(path=tmp_path / "one", **keys)
    assert [(row.text, row.answer, row.place) for row in rows] == [("a", "$2$", "row 0"), ("a", "$3$", "row 1")]
    assert _refusal(path=tmp_path / "one", split="train", **keys) == (
        f"data.train.split is train; {tmp_path / 'one'} holds one dataset without splits. Remove it."
    )
    from datasets import DatasetDict

    DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "two"))
    assert len(_rows(path=tmp_path / "two", split="test", limit=1, **keys)) == 1
    for split in (None, "eval"):
        assert _refusal(path=tmp_path / "two", split=split, **keys) == (
            f"data.train.path is {tmp_path / 'two'}; it holds the splits train, test. Set data.train.split to one of them."
        )
    assert _refusal(path=tmp_path / "none", **keys).endswith(
        "there is no such folder. Give one that save_to_disk of datasets wrote."
    )
    assert _refusal(path=tmp_path, **keys).startswith(f"data.train.path is {tmp_path}; loading it fails: ")


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder laid out like a dataset of the hub."""
    _parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", VERL, VERL, VERL)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    _parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", VERL)
    return str(tmp_path / "hub")


def test_huggingface_row_has_messages_and_the_dotted_answer(hub_folder: str) -> None:
    source = HuggingFaceSource(name=hub_folder, answer_column="reward_model.ground_truth", limit=2)
    rows = read_source(source, "data.train").rows
    assert [(row.row_id, row.place) for row in rows] == [("train/0", "row 0"), ("train/1", "row 1")]
    assert (rows[0].text, rows[0].answer, rows[0].metadata["ability"]) == ("How many?", "72", "math")
    assert len(read_source(source.model_copy(update={"split": "test"}), "data.eval").rows) == 1


def test_huggingface_fault_is_one_line(hub_folder: str) -> None:
    message = _refusal(kind="huggingface", name=hub_folder, split="nope")
    assert message.startswith(f"data.train.name is {hub_folder}; loading it fails: ")
    assert message.endswith("Check data.train.name, subset and split, and whether the hub can be reached.")
    assert "row 0 lacks the column answer (it has " in _refusal(kind="huggingface", name=hub_folder)


def test_local_files_are_read_without_datasets(tmp_path: Path) -> None:
    _two_files(tmp_path)
    (tmp_path / "a.csv").write_text("prompt,answer\na,1\n")
    (tmp_path / "a.json").write_text('[{"prompt": "a", "answer": 1}]')
    _parquet(tmp_path / "a.parquet", {"prompt": "a", "answer": 1})
    code = """
import sys
from maspo_ray.config import CsvSource, JsonlSource, JsonSource, ParquetSource
from maspo_ray.data.sources import read_source
for source in (CsvSource, JsonlSource, JsonSource):
    assert read_source(source(path=sys.argv[1]), "data.train").rows
print(sorted({"datasets", "pyarrow", "pandas", "torch"} & set(sys.modules)))
assert read_source(ParquetSource(path=sys.argv[1]), "data.train").rows
print(sorted({"datasets", "pandas", "torch"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n[]\n", "")


# reasoning-gym.


def test_reasoning_gym_rows_hold_what_the_scorer_needs_and_survive_pickling() -> None:
    source = ReasoningGymSource(task="chain_sum", size=3, seed=5, args={"max_terms": 3}, suffix=" Answer only.")
    rows = read_source(source, "data.train").rows
    assert len(rows) == 3 and all(row.text.endswith(" Answer only.") for row in rows)
    row = pickle.loads(pickle.dumps(rows[1]))
    assert row.metadata["task"] == "chain_sum" and row.metadata["args"] == {"max_terms": 3}
    assert row.answer == row.metadata["entry"]["answer"]
    assert read_source(source, "data.train").rows == rows
    assert read_source(source.model_copy(update={"seed": 6}), "data.train").rows != rows


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
        read_source(source, "data.train")
    assert str(caught.value) == message
