"""Every network of the zoo in every analysis: as its owner means it, or refused with the reason."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import pytest

from pnanalysis import PnError
from tests.zoo.checks import CHECKS
from tests.zoo.entry import Entry
from tests.zoo.families import ENTRIES


def parameters() -> list[pytest.ParameterSet]:
    """Entries and checks. Without the mark ``zoo`` there is one check of each entry that needs torch only, in turn."""
    columns = list(CHECKS)
    found = []
    for i, entry in enumerate(ENTRIES):
        for name in columns:
            quick = name == columns[i % len(columns)] and not entry.packages and not entry.slow
            if name not in entry.not_for:
                found.append(
                    pytest.param(entry, name, marks=[] if quick else pytest.mark.zoo, id=f"{entry.name}-{name}")
                )
    return found


@pytest.mark.parametrize(("entry", "name"), parameters())
def test_a_network_is_right_or_refused(entry: Entry, name: str, record_property: Callable[[str, object], None]) -> None:
    missing = [package for package in entry.packages if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}")
    words, refusal = entry.words(name), ""
    for check in CHECKS[name]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the networks' own packages
            if words is None:
                check(entry)
            else:
                with pytest.raises(PnError, match=words) as caught:
                    check(entry)
                refusal = str(caught.value)
    record_property("cell", [entry.family, entry.name, name, refusal])


def test_names_are_unique() -> None:
    names = [entry.name for entry in ENTRIES]
    assert len(names) == len(set(names))
