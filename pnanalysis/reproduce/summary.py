"""The main claims of all experiments, with what was found, in one table."""

from __future__ import annotations

from collections.abc import Iterator

from pnanalysis.reproduce import accuracy, gradient_rows, saturated, small_problems, spectrum
from pnanalysis.reproduce.accuracy import CLAIM, Arms
from pnanalysis.reproduce.markdown import table
from pnanalysis.reproduce.plan import Plan
from pnanalysis.reproduce.settings import TITLES
from pnanalysis.reproduce.statistics import Claim


def summary(plan: Plan) -> str:
    """The table; experiments without a cell have none of its rows."""
    rows = []
    for experiment in (name for name in TITLES if name in plan.experiments):
        for variant in plan.setting(experiment).variants:
            name = " ".join(filter(None, (experiment, variant)))
            rows += [[name, *claim.row] for claim in claims(plan, experiment, variant) if claim.main]
    return table(["", *CLAIM], rows) if rows else "No cell is done."


def claims(plan: Plan, experiment: str, variant: str) -> Iterator[Claim]:
    """All claims about one variant of an experiment of which there is a cell."""
    if experiment == "S1":
        yield from small_problems.two_well_claims(plan)
    elif experiment == "S2":
        yield from small_problems.kink_claims(plan, variant)
    elif experiment == "S7":
        yield from gradient_rows.claims(plan)
    elif experiment != "S9-sweep":
        arms = Arms(plan, experiment, variant)
        measures = plan.setting(experiment).measures
        if any(result.is_finished for result in arms.all):
            yield from accuracy.claims(arms) if experiment != "S8" else ()
            yield from spectrum.claims(arms) if "hessian" in measures else ()
            yield from saturated.claims(arms) if "saturation" in measures else ()
