"""What came of the faults, as tables in Markdown."""

from __future__ import annotations

from collections import Counter
from typing import Any

_TEXT = """\
# Which faults do the tests notice?

`make mutation`: {n} small faults in `spectra`, `curvature`, `io` and `persistence.py`, drawn at random in each part,
each tried alone with the tests that reach its line. *noticed*: a test fails, the module cannot be
imported, or a test no longer ends. Survivors that do no harm are explained; they count as survivors all the same.

| part | faults | noticed | survived | of these explained |
|---|---|---|---|---|"""
_LOST = ("survived", "untested")


def table(results: dict[str, Any]) -> list[str]:
    """A row for each part, and all survivors."""
    lines = _TEXT.format(n=len(results)).split("\n")
    groups: dict[str, list[dict[str, Any]]] = {}
    for key, result in sorted(results.items()):
        groups.setdefault(_part(key), []).append(result)
    lines += [_row(name, group) for name, group in groups.items()]
    lines += [_row("all", list(results.values())), ""]
    lines += ["| kind of fault | faults | survived |", "|---|---|---|"]
    kinds = Counter(result["kind"] for result in results.values())
    lost = Counter(result["kind"] for result in results.values() if result["outcome"] in _LOST)
    lines += [f"| {kind} | {n} | {lost[kind]} |" for kind, n in kinds.most_common()]
    lines += ["", "## Survivors", "", "| where | was | became | why it does no harm |", "|---|---|---|---|"]
    for key, result in sorted(results.items()):
        if result["outcome"] in _LOST:
            where = f"{key.partition(':')[0].removeprefix('pnanalysis/')}:{result['line']}"
            lines.append(f"| {where} | {_code(result['was'])} | {_code(result['now'])} | {result['why']} |")
    return lines


def _part(key: str) -> str:
    parts = key.partition(":")[0].split("/")
    return parts[1] if parts[0] == "pnanalysis" else parts[-1]


def _row(name: str, group: list[dict[str, Any]]) -> str:
    survivors = [result for result in group if result["outcome"] in _LOST]
    noticed = len(group) - len(survivors)
    explained = sum(bool(result["why"]) for result in survivors)
    return f"| {name} | {len(group)} | {noticed} ({noticed / len(group):.0%}) | {len(survivors)} | {explained} |"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text != "(removed)" else text
