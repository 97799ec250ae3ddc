"""What the repository's results say, as generated parts of pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_RESULTS = Path(__file__).resolve().parents[2] / "results"


def results(scale: str) -> Iterator[str]:
    """The summary of all claims at a scale, and how many cells it rests on."""
    from pnanalysis.reproduce.plan import make_plan
    from pnanalysis.reproduce.settings import SCALES
    from pnanalysis.reproduce.summary import summary

    plan = make_plan(["all"], scale, None, _RESULTS / scale)
    done = len(plan.cells) - len(plan.left())
    yield f"Scale `{scale}`, {SCALES[scale].summary}: {done} of {len(plan.cells)} cells are done.\n"
    yield summary(plan)
    yield ""


def kink(scale: str) -> Iterator[str]:
    """What S2 says of chains beside restarts at equal cost, the place where repulsion should help most."""
    from pnanalysis.reproduce.plan import make_plan
    from pnanalysis.reproduce.small_problems import compared_claims

    plan = make_plan(["S2"], scale, None, _RESULTS / scale)
    for variant in plan.setting("S2").variants:
        for claim in compared_claims(plan, variant):
            yield f"- {variant}: {claim.text}: {claim.here} over {claim.n}, **{claim.verdict}**."
    yield ""


def rule() -> Iterator[str]:
    """The rule behind the verdicts."""
    from pnanalysis.reproduce.statistics import RULE

    yield RULE
