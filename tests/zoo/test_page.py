"""The page of the documentation lists every network of the zoo, and what is refused."""

from __future__ import annotations

from tests.zoo.checks import CHECKS
from tests.zoo.families import ENTRIES
from tests.zoo.page import PAGE, Cell, lines


def test_the_page_lists_every_network_and_analysis() -> None:
    text = PAGE.read_text()
    families = {entry.family for entry in ENTRIES}
    assert {family for family in families if f"\n| {family} | " not in text} == set()
    assert {family for family in families if f"\n- **{family}**: " not in text} == set()
    assert {entry.name for entry in ENTRIES if entry.name not in text} == set()
    assert f"| family | {' | '.join(CHECKS)} |\n" in text


def test_the_page_lists_what_is_refused() -> None:
    text = PAGE.read_text()
    assert {entry.name for entry in ENTRIES if entry.refused and f"\n- **{entry.name}** (" not in text} == set()


def test_a_family_with_both_says_so() -> None:
    first, second = ENTRIES[0], ENTRIES[1]
    cells = [
        Cell(first.family, first.name, "Hessian", ""),
        Cell(first.family, first.name, "compare", ""),
        Cell(second.family, second.name, "Hessian", "no, because"),
    ]
    text = "\n".join(lines(cells))
    assert f"\n| {first.family} | right, refused | – | – | – | right |" in text
    assert f"\n- **{second.name}** (Hessian): no, because" in text
