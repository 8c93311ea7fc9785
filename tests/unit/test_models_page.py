"""docs/models.md says what is tested, and every architecture is tested."""

from models_page import PAGE, configurations, with_tables

from builder_svc.models.families import families


def test_the_tables_are_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_tables(text) == text, "PYTHONPATH=. python tests/unit/models_page.py writes them"


def test_every_family_has_two_configurations_that_equal_its_reference() -> None:
    """RWForCausalLM is an older name of a Falcon, which has a test of its own."""
    cases = configurations()
    assert {name for name in families() if not cases.get(name)} == {"RWForCausalLM"}
    for page in set(families().values()):
        assert sum(len(cases.get(name, [])) for name in page.ARCHITECTURES) >= 2, page.ARCHITECTURES
