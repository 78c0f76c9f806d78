"""The rows of a run: each source read once, answers held against what the reward takes, bad rows refused or left out as the config says."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from maspo_ray.config import DataConfig
from maspo_ray.data.run_rows import RunRows
from maspo_ray.errors import ConfigError

REWARD = "my_rewards:Mine"


def _file(path: Path, *answers: Any) -> dict[str, str]:
    path.write_text("".join(json.dumps({"prompt": "q", "answer": answer}) + "\n" for answer in answers))
    return {"kind": "jsonl", "path": str(path)}


def _rows(train: Mapping[str, Any], **keys: Any) -> RunRows:
    return RunRows(DataConfig.model_validate({"train": train, **keys}))


def _text_alone(answer: Any, metadata: Mapping[str, Any]) -> str | None:
    return None if isinstance(answer, str) else "Mine takes a text"


def _fault(rows: RunRows, check: Any = _text_alone) -> str:
    with pytest.raises(ConfigError) as caught:
        rows.check_answers(check, REWARD)
    return str(caught.value)


def test_run_rows_read_a_file_once(tmp_path: Path) -> None:
    rows = _rows(_file(tmp_path / "a.jsonl", "1", "2"), eval=_file(tmp_path / "b.jsonl", "3"))
    rows.read_files()
    for file in tmp_path.iterdir():
        file.unlink()
    rows.read_all()
    (train,) = rows.train
    assert [row.answer for row in train.rows] == ["1", "2"]
    assert rows.eval is not None and [row.row_id for row in rows.eval.rows] == ["eval/0"]


def test_run_rows_read_files_leaves_what_is_generated_or_fetched(tmp_path: Path) -> None:
    gym = {"kind": "reasoning_gym", "task": "chain_sum", "size": 2}
    rows = _rows({"kind": "mix", "sources": {"file": _file(tmp_path / "a.jsonl", "1"), "gym": gym}})
    rows.read_files()
    with pytest.raises(KeyError):
        _ = rows.train
    rows.read_all()
    assert [(source.name, [row.row_id for row in source.rows]) for source in rows.train] == [
        ("file", ["train/file/0"]),
        ("gym", ["train/gym/0", "train/gym/1"]),
    ]


def test_run_rows_name_each_source_that_is_at_fault(tmp_path: Path) -> None:
    missing = {"kind": "csv", "path": "no.csv"}
    rows = _rows({"kind": "mix", "sources": {"a": missing, "b": _file(tmp_path / "b.jsonl", "1")}}, eval=missing)
    with pytest.raises(ConfigError) as caught:
        rows.read_files()
    assert [line.partition(" is ")[0] for line in str(caught.value).splitlines()] == [
        "data.train.sources.a.path",
        "data.eval.path",
    ]


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (["7"], "['7'], a list"),
        (None, "None, a missing value"),
        (7, "7, a whole number"),
        (7.0, "7.0, a float"),
        ({"a\n": 1}, "{'a\\n': 1}, a dictionary"),
        (["x" * 80], "['" + "x" * 55 + "..., a list"),
    ],
)
def test_answer_of_a_type_that_the_reward_does_not_take_is_one_line(tmp_path: Path, answer: Any, shown: str) -> None:
    rows = _rows(_file(tmp_path / "a.jsonl", "1", answer, "2"))
    rows.read_files()
    assert _fault(rows) == (
        f"data.train.path is {tmp_path / 'a.jsonl'}; line 2 has the answer {shown}; Mine takes a text. Mend it, set "
        "data.train.answer_column, take another reward.actor or set data.on_bad_row to skip."
    )


def test_answers_of_all_rows_at_fault_are_counted_and_not_to_be_skipped(tmp_path: Path) -> None:
    rows = _rows(_file(tmp_path / "a.jsonl", *range(3)), on_bad_row="skip", eval=_file(tmp_path / "b.jsonl", "1", 2))
    rows.read_files()
    assert _fault(rows).endswith(
        "Mend it, set data.train.answer_column or take another reward.actor. All 3 rows are at fault."
    )


def test_answers_are_held_against_the_reward_once_read_however_often_it_is_asked(tmp_path: Path) -> None:
    rows = _rows(_file(tmp_path / "a.jsonl", "1", 2), on_bad_row="skip")
    asked: list[Any] = []

    def check(answer: Any, metadata: Mapping[str, Any]) -> str | None:
        asked.append(answer)
        return _text_alone(answer, metadata)

    rows.read_files()
    rows.check_answers(check, REWARD)
    rows.check_answers(check, REWARD)
    rows.check_answers(None, REWARD)
    assert asked == ["1", 2]
    assert [row.answer for row in rows.train[0].rows] == ["1"]


def test_check_answer_that_breaks_is_the_rewards_fault_not_the_datas(tmp_path: Path) -> None:
    rows = _rows(_file(tmp_path / "a.jsonl", "1"), on_bad_row="skip")
    rows.read_files()
    assert _fault(rows, lambda answer, metadata: metadata["level"]) == (
        "reward.actor is my_rewards:Mine; its check_answer raises on '1' (KeyError: 'level'). Mend it."
    )
    assert _fault(rows, lambda answer, metadata: False) == (
        "reward.actor is my_rewards:Mine; its check_answer returned a bool; it must return a text or None. Mend it."
    )


def test_rows_that_are_skipped_are_said_counted_and_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = _file(tmp_path / "a.jsonl", "1", 2, *[None] * 20)
    with Path(source["path"]).open("a") as file:
        file.write('broken\n{"prompt": " ", "answer": "3"}\n')
    rows = _rows(source, on_bad_row="skip")
    rows.read_files()
    rows.check_answers(_text_alone, REWARD)
    with caplog.at_level(logging.WARNING):
        rows.warn()
    (message,) = caplog.messages
    assert message.startswith(
        f"data.train.path is {source['path']}; left out 23 of 24 rows: line 23 is not JSON (Expecting value); line 24 has a prompt "
        "without text; line 2 has the answer 2, a whole number; Mine takes a text; line 3 has"
    )
    assert message.endswith("; and 13 more.")
    listed = rows.left_out()
    assert len(listed) == 23
    assert listed[2] == {
        "source": f"data.train.path is {source['path']}",
        "row": "line 2",
        "cause": "has the answer 2, a whole number; Mine takes a text",
    }


def test_rows_that_are_all_right_are_not_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = _rows(_file(tmp_path / "a.jsonl", "1"))
    rows.read_files()
    with caplog.at_level(logging.WARNING):
        rows.warn()
    assert caplog.messages == [] and rows.left_out() == []
