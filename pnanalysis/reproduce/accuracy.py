"""S3 to S6, and the errors of S9: plain model, champion, best of as many restarts, ensembles, and distances."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import xarray as xr

from pnanalysis.reproduce.cells import Result
from pnanalysis.reproduce.markdown import UNKNOWN, Links, blocks, failures, number, table, with_interval
from pnanalysis.reproduce.plan import Plan
from pnanalysis.reproduce.settings import PAPER, PERSISTENT, RESTART
from pnanalysis.reproduce.statistics import Claim, claim, differences, over_seeds, paired

BySeed = dict[int, float]
SPLITS = ("validation", "test")
_ROUNDED = 1e-3  # points, below which accuracies agree: they are kept to six digits
#: Columns of a table of claims.
CLAIM = ("claim", "paper", "here", "seeds or starts", "verdict")


def repelled(result: Result) -> str:
    """The layers that a chain was repelled in."""
    names = {tuple(layers) for layers in result.record.get("layers") or ()}
    return "; ".join(", ".join(each) for each in sorted(names)) or UNKNOWN


@dataclass
class Arms:
    """The cells of one variant: persistent chains and restarts, by seed.

    Attributes
    ----------
    plan : Plan
    experiment, variant : str
    all : list of Result
        Failed ones too.
    """

    plan: Plan
    experiment: str
    variant: str
    all: list[Result] = field(init=False)

    def __post_init__(self) -> None:
        arms = self.plan.setting(self.experiment).arms_of(self.variant)
        self.all = [result for arm in arms for result in self.plan.results(self.experiment, self.variant, arm)]

    def finished(self, arm: str) -> dict[int, Result]:
        """Those of an arm whose training ended well, by seed."""
        return {r.cell.seed: r for r in self.all if r.cell.arm == arm and r.is_finished}

    def accuracy(self, arm: str, split: str, iteration: int | None = None) -> BySeed:
        """Accuracies in per cent by seed, of an iteration or of the one with the lowest validation error."""
        found = {}
        for seed, result in self.finished(arm).items():
            chosen = result.champion if iteration is None else iteration
            found[seed] = 100 * (1 - float(result.final_errors(split)[chosen]))
        return found

    def plain(self, split: str) -> BySeed:
        """Accuracies of the plain model, which both arms train."""
        return self.accuracy(RESTART, split, 0) | self.accuracy(PERSISTENT, split, 0)

    def plain_differs(self) -> str:
        """A sentence on seeds whose arms have trained different plain models, which should be one; empty without."""
        first, second = self.accuracy(PERSISTENT, "test", 0), self.accuracy(RESTART, "test", 0)
        both = sorted(first.keys() & second.keys())
        differ = [seed for seed in both if abs(first[seed] - second[seed]) > _ROUNDED]
        if not differ:
            return ""
        each = ", ".join(f"seed {seed}: {number(first[seed])} and {number(second[seed])} %" for seed in differ)
        return (
            "The plain model is the first training of both arms, and here they differ, as on different machines or "
            f"versions (test accuracy, {each}). Tables show the persistent arm's."
        )

    @property
    def is_partial(self) -> bool:
        """Whether chains are repelled in one layer, drawn for each seed."""
        drawn = [result.record.get("layers") for result in self.finished(PERSISTENT).values()]
        return any(layers and all(len(each) == 1 for each in layers) for layers in drawn)

    def later(self, arm: str, split: str) -> BySeed:
        """Mean accuracies of the iterations after the plain one: nothing is selected here."""
        return {
            seed: 100 * (1 - float(result.final_errors(split)[1:].mean()))
            for seed, result in self.finished(arm).items()
            if len(result.final_errors(split)) > 1
        }

    def measured(self, arm: str, of: Callable[[xr.Dataset], float]) -> BySeed:
        """A number of the end points, by seed."""
        return {
            seed: of(result.dataset("end_points"))
            for seed, result in self.finished(arm).items()
            if result.has("end_points")
        }

    @property
    def progress(self) -> str:
        """How many seeds of each arm are done, of those that are planned."""
        planned = self.plan.n_seeds(self.experiment)
        arms = self.plan.setting(self.experiment).arms_of(self.variant)
        parts = [f"{arm} {len(self.finished(arm))} of {planned}" for arm in arms]
        unequal = len({frozenset(self.finished(arm)) for arm in arms}) > 1
        note = " Means are over the seeds of each arm, differences over those that both have." if unequal else ""
        return f"Seeds done: {', '.join(parts)}.{note}"


def section(arms: Arms, links: Links, figure: str = "") -> str:
    """What the page says about accuracies of one variant."""
    if not arms.all:
        return blocks([arms.progress, "Not yet known at this scale: no cell is done."])
    return blocks(
        [
            arms.progress,
            table(["accuracy, %", "validation", "test"], _accuracies(arms)),
            figure,
            table(["claim (differences in accuracy, points)", *CLAIM[1:]], [each.row for each in claims(arms)]),
            _functions(arms),
            by_cell(arms, links),
            failures(arms.all, links),
        ]
    )


def _accuracies(arms: Arms) -> list[list[str]]:
    rows = []
    paper = PAPER.get((arms.experiment, arms.variant))
    if paper is not None:
        rows.append(["paper: plain", number(paper.plain_validation), number(paper.plain_test)])
        rows.append(["paper: champion", number(paper.champion_validation), number(paper.champion_test)])
    rows.append(["plain", *(with_interval(over_seeds([*arms.plain(split).values()])) for split in SPLITS)])
    for arm, name in ((PERSISTENT, "champion"), (RESTART, "best of as many restarts")):
        means = [over_seeds([*arms.accuracy(arm, split).values()]) for split in SPLITS]
        rows.append([name, *map(with_interval, means)])
    for arm, name in ((PERSISTENT, "mean of the persistent iterations"), (RESTART, "mean of the other restarts")):
        rows.append([name, *(with_interval(over_seeds([*arms.later(arm, split).values()])) for split in SPLITS)])
    for arm, name in ((PERSISTENT, "ensemble of all iterations"), (RESTART, "ensemble of all restarts")):
        values = [over_seeds([*arms.measured(arm, _ensemble(split)).values()]) for split in SPLITS]
        rows.append([name, *map(with_interval, values)])
    return rows


def _ensemble(split: str) -> Callable[[xr.Dataset], float]:
    """The accuracy of the average of all networks' probabilities, in per cent."""
    return lambda ds: 100 * (1 - float(ds.ensemble_error.sel(split=split).isel(iteration=-1)))


def claims(arms: Arms) -> list[Claim]:
    """Differences in accuracy, with those that the paper claims."""
    paper = PAPER.get((arms.experiment, arms.variant))
    said, validation = math.nan, math.nan
    if paper is not None:
        said, validation = paper.champion_test - paper.plain_test, paper.champion_validation - paper.plain_validation
    plain = arms.plain("test")
    champion, best = arms.accuracy(PERSISTENT, "test"), arms.accuracy(RESTART, "test")
    later, others = arms.later(PERSISTENT, "test"), arms.later(RESTART, "test")
    chain, control = arms.measured(PERSISTENT, _ensemble("test")), arms.measured(RESTART, _ensemble("test"))

    def better(
        first: str, second: str, of: Mapping[int, float], beside: Mapping[int, float], paper: float = math.nan,
        main: bool = False,
    ) -> Claim:  # fmt: skip
        text = f"{first} more accurate on the test set than {second}"
        return claim(text, differences(of, beside), paper=paper, main=main)

    selected = differences(arms.accuracy(PERSISTENT, "validation"), arms.plain("validation"))
    return [
        better("the champion is", "the plain model", champion, plain, said, main=True),
        better("the champion is", "the best restart", champion, best, main=True),
        better("the best restart is", "the plain model", best, plain),
        better("persistent iterations are on average", "the plain model", later, plain),
        better("persistent iterations are on average", "restarts", later, others),
        better("the ensemble of iterations is", "the ensemble of restarts", chain, control, main=True),
        better("the ensemble of iterations is", "the champion", chain, champion),
        claim("champion − plain model, validation, on which the champion is selected", selected, sign=0,
              paper=validation, main=False),
    ]  # fmt: skip


def _picked_plain(arms: Arms) -> str:
    """How often a network is compared with itself; empty where none is."""
    parts = []
    for arm, name in ((PERSISTENT, "champion"), (RESTART, "best restart")):
        found = arms.finished(arm)
        n = sum(result.champion == 0 for result in found.values())
        if n:
            parts.append(f"the {name} is the plain model itself in {n} of {len(found)} seeds")
    return f"By validation error, {' and '.join(parts)}: these differences are zero by construction." if parts else ""


def _by_layer(arms: Arms) -> str:
    if not arms.is_partial:
        return ""
    return (
        "The repelled layer is drawn anew for each seed, so that intervals of what repulsion does include the choice "
        "of the layer, and layers cannot be compared with each other."
    )


#: What repulsion does to a network, beside what another start does: numbers relative to the plain model.
_FUNCTION: dict[str, tuple[Callable[[xr.Dataset], float], int]] = {
    "distance from the plain model / its norm": (lambda ds: _from_plain(ds, "relative_distance"), 3),
    "cosine to the plain model": (lambda ds: _from_plain(ds, "cosine"), 3),
    "disagreement with the plain model, %": (lambda ds: 100 * _from_plain(ds, "disagreement"), 2),
    "disagreement between later ones, %": (lambda ds: 100 * _among_later(ds, "disagreement"), 2),
}


def _functions(arms: Arms) -> str:
    rows = []
    for name, (of, digits) in _FUNCTION.items():
        persistent, restart = arms.measured(PERSISTENT, of), arms.measured(RESTART, of)
        difference = paired(persistent, restart)
        rows.append(
            [name, *(with_interval(over_seeds([*each.values()]), digits) for each in (persistent, restart)),
             with_interval(difference, digits, signed=True)]
        )  # fmt: skip
    return table(["how far from the plain model", "persistent iterations", "restarts", "difference"], rows)


def _from_plain(ds: xr.Dataset, name: str) -> float:
    """Mean over the iterations after the plain one, each against the plain one."""
    later = ds[name].isel(iteration=slice(1, None), other=0)
    return float(later.mean()) if later.size else math.nan


def _among_later(ds: xr.Dataset, name: str) -> float:
    """Mean over pairs of iterations after the plain one."""
    among = ds[name].values[1:, 1:]
    return float(among[np.triu_indices(len(among), 1)].mean()) if len(among) > 1 else math.nan


def by_cell(arms: Arms, links: Links) -> str:
    """The accuracies of each cell, with the layer that was repelled, and what they imply for differences."""
    columns = ["cell", "layer repelled", "plain, validation / test, %", "picked", "picked, validation / test, %"]
    notes = " ".join(filter(None, (_picked_plain(arms), _by_layer(arms), arms.plain_differs())))
    return blocks([table(columns, _rows(arms, links)), notes])


def _rows(arms: Arms, links: Links) -> list[list[str]]:
    def both(result: Result, iteration: int) -> str:
        return " / ".join(number(100 * (1 - float(result.final_errors(split)[iteration]))) for split in SPLITS)

    return [
        [links.cell(result.cell), repelled(result) if result.cell.arm == PERSISTENT else UNKNOWN, both(result, 0),
         f"iteration {result.champion}", both(result, result.champion)]
        for result in arms.all
        if result.is_finished
    ]  # fmt: skip


def curves(arms: Arms) -> xr.Dataset:
    """Test errors by arm, seed and iteration, of single networks and of ensembles, for the figure."""
    parts = []
    for arm in (PERSISTENT, RESTART):
        for seed, result in arms.finished(arm).items():
            ds = xr.Dataset({"test_error": ("iteration", result.final_errors("test"))})
            if result.has("end_points"):
                points = result.dataset("end_points")
                ds["ensemble_error"] = ("iteration", points.ensemble_error.sel(split="test").values)
            ds = ds.assign_coords(iteration=np.arange(ds.sizes["iteration"]))
            parts.append(ds.expand_dims(run=[f"{arm} {seed}"]).assign_coords(arm=("run", [arm]), seed=("run", [seed])))
    return xr.concat(parts, dim="run", join="outer") if parts else xr.Dataset()
