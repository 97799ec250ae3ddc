"""The main claims of all experiments, with what was found, in one table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pnanalysis.reproduce import accuracy, gradient_rows, saturated, small_problems, spectrum
from pnanalysis.reproduce.accuracy import CLAIM, Arms
from pnanalysis.reproduce.markdown import blocks, p_text, significant, table
from pnanalysis.reproduce.plan import Plan
from pnanalysis.reproduce.settings import TITLES
from pnanalysis.reproduce.statistics import Claim
from pnanalysis.significance import LEVEL, holm


def summary(plan: Plan, link: bool = False) -> str:
    """The table; experiments without a cell have none of its rows. ``link``: to their sections on the same page."""
    found = []
    for experiment in (name for name in TITLES if name in plan.experiments):
        shown = f"[{experiment}](#{anchor(experiment)})" if link else experiment
        if experiment == "S9-sweep":  # its variants are points, which are judged together
            found += [(shown, claim) for claim in saturated.sweep_claims(plan)]
            continue
        for variant in plan.setting(experiment).variants:
            name = " ".join(filter(None, (shown, variant)))
            found += [(name, claim) for claim in claims(plan, experiment, variant) if claim.main]
    if not found:
        return "No cell is done."
    adjusted = holm([claim.p for _, claim in found])
    rows = [[name, *claim.row, p_text(p)] for (name, claim), p in zip(found, adjusted, strict=True)]
    return blocks([table(["", *CLAIM, "p, Holm"], rows), _by_chance(int(np.isfinite(adjusted).sum()))])


def anchor(experiment: str) -> str:
    """What the heading of an experiment is linked by, as GitHub makes it."""
    text = f"{experiment}: {TITLES[experiment]}".lower()
    return "".join(c for c in text.replace(" ", "-") if c.isalnum() or c == "-")


def _by_chance(n: int) -> str:
    """How many verdicts of ``n`` chance alone would give."""
    if n < 2:
        return ""
    return (
        f"{n} of these claims have a p-value. Were there no difference in any of them, "
        f"{significant(LEVEL * n, 2)} would be expected to have a verdict by chance, half of them *holds*."
    )


def claims(plan: Plan, experiment: str, variant: str) -> Iterator[Claim]:
    """All claims about one variant of an experiment of which there is a cell."""
    if experiment == "S1":
        yield from small_problems.two_well_claims(plan)
    elif experiment == "S2":
        yield from small_problems.kink_claims(plan, variant)
    elif experiment == "S7":
        yield from gradient_rows.claims(plan)
    else:
        arms = Arms(plan, experiment, variant)
        measures = plan.setting(experiment).measures
        if any(result.is_finished for result in arms.all):
            yield from accuracy.claims(arms) if experiment != "S8" else ()
            yield from spectrum.claims(arms) if "hessian" in measures else ()
            yield from saturated.claims(arms) if "saturation" in measures else ()
