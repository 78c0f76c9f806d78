"""The bench of model families: what it counts, and, slowly, all of its families."""

import pytest

from bench.models import ENGINE, Row, figures, table, try_family
from bench.tiny_models import FAMILIES, KINDS

pytestmark = pytest.mark.engine


def test_figures_count_each_family_once() -> None:
    exact = Row("a", "dense", "sdpa", "trees", "", 1e-6, 1e-6, 1e-6, 0.1, 2e-4)
    beyond = Row("b", "dense", "sdpa", "trees", "", 2e-5, 1e-6, 1e-6, 0.1, 2e-3)
    without_adapters = Row("c", "dense", "sdpa", "trees", "", 1e-6, 1e-6, refused="learner.lora.targets is …")
    refused = Row("d", "dense", refused="its output layer is …")
    found = figures([exact, beyond, without_adapters, refused])
    assert found == {
        "models_tried": 4,
        "models_exact": 1,
        "models_refused": 1,
        "models_wrong": 2,
        "models_served": 1,
    }
    assert "| its output layer is … |" in table([refused])


def test_families_are_of_one_kind_each_and_those_with_an_engine_among_them() -> None:
    assert len(FAMILIES) == sum(map(len, KINDS.values())) >= 30
    assert len(ENGINE) >= 12
    assert set(ENGINE) <= set(FAMILIES)


def test_a_family_is_tried_with_eager_where_its_refusal_says_so() -> None:
    row = try_family("gemma2", "soft caps, scales", None, handle=None)
    assert (row.implementation, row.way, row.output) == ("eager", "packed", "own")
    assert row.exact


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_learner_computes_each_family_as_transformers_does(family: str) -> None:
    row = try_family(family, "", None, handle=None)
    assert row.exact, row
