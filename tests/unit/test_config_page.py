"""docs/config.md: every key with its type, default and meaning, as the sections have them now."""

from pathlib import Path

import pytest

from maspo_ray.cli import main
from maspo_ray.config import RunConfig
from maspo_ray.config.faults import field_paths, sections_in
from maspo_ray.config.page import config_page

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def _rows() -> dict[str, list[str]]:
    """Returns the cells of each key's row, the first where several kinds have it."""
    rows: dict[str, list[str]] = {}
    for line in config_page().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
            assert len(cells) == 4, line
            rows.setdefault(cells[0].strip("`"), cells[1:])
    return rows


def test_page_in_the_docs_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == config_page(), "run: python -m maspo_ray docs config > docs/config.md"


def test_page_has_every_key_once_described_and_each_has_a_meaning() -> None:
    rows = _rows()
    sections = {name for name, field in RunConfig.model_fields.items() if sections_in(field.annotation)}
    # The kinds of sources stand once, under data.train.
    keys = {path for path in field_paths(RunConfig) if not path.startswith(("data.eval.", "data.train.sources."))}
    assert rows.keys() == keys - sections
    assert [key for key, cells in rows.items() if not cells[2]] == []


def test_page_says_type_bounds_and_default() -> None:
    rows = _rows()
    assert rows["rollout.replicas"] == [
        "whole number (≥ 1) or null",
        "`null`",
        "Actors in all; 1 if neither this nor `per_node` is given.",
    ]
    assert rows["learner.betas"][:2] == ["2 numbers", "`[0.9, 0.95]`"]
    assert rows["rollout.update"][:2] == ["`together`, `rolling`", '`"together"`']
    assert rows["model.path"][:2] == ["text", "must be set"]
    assert rows["reward.max_error_rate"][0] == "number (≥ 0, ≤ 1)"
    # Only its default is another than that of all roles.
    assert rows["reward.cpus"][1:] == ["`0.1`", "Per actor; fractions allowed."]


def test_docs_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["docs", "config"]) == 0
    assert capsys.readouterr().out == config_page()


@pytest.mark.parametrize("command", [[], ["train"], ["check"]])
def test_help_lists_the_sections(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ") and line.split()}
    for name, field in RunConfig.model_fields.items():
        assert field.description and field.description in lines[name]
