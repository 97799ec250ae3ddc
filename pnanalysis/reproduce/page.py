"""RESULTS.md: every number comes from a cell, and the same cells give the same page."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from pnanalysis.io.atomic import atomic_path
from pnanalysis.plots.style import save_figure
from pnanalysis.reproduce import accuracy, figures, saturated, small_problems, spectrum
from pnanalysis.reproduce.accuracy import Arms
from pnanalysis.reproduce.costs import write_costs
from pnanalysis.reproduce.gradient_rows import gradient_split
from pnanalysis.reproduce.markdown import Links, blocks, table
from pnanalysis.reproduce.plan import Plan
from pnanalysis.reproduce.settings import PAPER_LENGTHS, PERSISTENT, RESTART, SCALES, TITLES
from pnanalysis.reproduce.statistics import RULE
from pnanalysis.reproduce.summary import summary

_COSTS = "COSTS.md"
#: How the data of a scale are divided.
_SPLITS = {
    "cifar10": "Of the 10,000 test images 5,000 are for validation and 5,000 for test",
    "digits": "Of the digits 300 are for validation and 300 for test",
}


def write_page(plan: Plan, page: Path) -> Path:
    """Write the page, its figures, and the page of costs beside the cells."""
    page.parent.mkdir(parents=True, exist_ok=True)
    plan.store.out.mkdir(parents=True, exist_ok=True)
    with atomic_path(page) as temporary:
        temporary.write_text(page_text(plan, page))
    write_costs(plan, plan.store.out / _COSTS)
    return page


def page_text(plan: Plan, page: Path) -> str:
    """The page as Markdown; figures are drawn on the way."""
    links = Links(plan.store, page)
    order = [name for name in TITLES if name in plan.experiments]
    parts = [_head(plan, links), *(f"## {name}: {TITLES[name]}\n\n{_section(plan, name, links)}" for name in order)]
    return blocks([*parts, _deviations(plan)]) + "\n"


def _head(plan: Plan, links: Links) -> str:
    done = len(plan.cells) - len(plan.left())
    costs = links.to(plan.store.out / _COSTS)
    return blocks(
        [
            "# Persistent training: the paper's experiments, with restarts of equal cost",
            "Written by `pnanalysis reproduce`, never by hand. The paper is [arXiv:2007.01419]"
            "(https://arxiv.org/abs/2007.01419). S3 to S6 and S9 compare one plain training with the champion of a "
            "persistent chain and with the best of as many plain restarts. Both are picked by their validation error, "
            "so only test accuracies say what is gained. Every section links the cells that its numbers come from.",
            f"Scale `{plan.scale}`: {SCALES[plan.scale].summary}. {done} of {len(plan.cells)} cells are done; "
            f"[what they cost]({costs}).",
            RULE,
            "## Summary",
            summary(plan),
        ]
    )


def _section(plan: Plan, experiment: str, links: Links) -> str:
    settings = _settings(plan, experiment)
    if experiment == "S1":
        return blocks([settings, small_problems.two_well(plan, links)])
    if experiment == "S2":
        return blocks([settings, *_kink_parts(plan, links)])
    if experiment == "S7":
        return blocks([settings, gradient_split(plan, links)])
    if experiment == "S9-sweep":
        return blocks([settings, saturated.sweep(plan, links)])
    parts = [settings]
    for variant in plan.setting(experiment).variants:
        arms = Arms(plan, experiment, variant)
        name = "-".join(filter(None, (experiment, variant)))
        if variant:
            parts.append(f"### {variant}: {_options(plan.setting(experiment).variants[variant])}")
        parts.append(_of_variant(arms, name, links))
    return blocks(parts)


def _of_variant(arms: Arms, name: str, links: Links) -> str:
    setting, parts = arms.plan.setting(arms.experiment), []
    curves = accuracy.curves(arms)
    figure = _figure(figures.errors(curves), name, "test errors", links) if curves.sizes else ""
    if arms.experiment != "S8":  # its arms are not of equal cost
        parts.append(accuracy.section(arms, links, figure))
    if "saturation" in setting.measures:
        values = saturated.by_iteration(arms)
        drawn = _figure(figures.saturation(values), f"{name}-saturation", "saturation", links) if values else ""
        parts.append("### Saturation\n\n" + saturated.section(arms, links, drawn))
    if "hessian" in setting.measures:
        found = spectrum.densities(arms)
        drawn = _figure(figures.spectra(found), f"{name}-spectra", "spectral densities", links) if found else ""
        heading = "" if arms.experiment == "S8" else "### Hessian spectra (as in S8)\n\n"
        parts.append(heading + spectrum.section(arms, links, drawn))
    return blocks(parts)


def _kink_parts(plan: Plan, links: Links) -> list[str]:
    variants = plan.setting("S2").variants
    losses = {
        variant: {
            arm: values
            for arm in (PERSISTENT, RESTART)
            if (values := small_problems.final_losses(plan, variant, arm)).size
        }
        for variant in variants
    }
    parts = [f"### {variant}\n\n{small_problems.kink(plan, variant, links)}" for variant in variants]
    if any(losses.values()):
        drawn = figures.kink({name: found for name, found in losses.items() if found}, small_problems.left_below())
        parts.append(_figure(drawn, "S2", "share of starts off the plateau, and lowest loss", links))
    return parts


def _figure(figure: Figure, name: str, text: str, links: Links) -> str:
    folder = links.store.out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    return links.figure(save_figure(figure, folder / f"{name}.png"), text)


def _settings(plan: Plan, experiment: str) -> str:
    """The settings of an experiment, in a sentence."""
    setting = plan.setting(experiment)
    parts = [f"Recipe `{setting.recipe}`", _options(setting.options) or "the recipe's own settings"]
    parts += [f"{arm}: {_options(options)}" for arm, options in setting.arm_options.items()]
    if setting.n_train is not None:
        parts.append(f"{setting.n_train:,} training images")
    measures = [f"{name} ({_options(options)})" for name, options in setting.measures.items() if options]
    return "; ".join(parts) + (f". Measured: {', '.join(measures)}." if measures else ".")


def _options(options: object) -> str:
    assert isinstance(options, dict)
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _deviations(plan: Plan) -> str:
    """What differs from the paper."""
    rows = []
    for experiment in (name for name in TITLES if name in plan.experiments and name in PAPER_LENGTHS):
        setting, (iterations, epochs) = plan.setting(experiment), PAPER_LENGTHS[experiment]
        own = [setting.options.get("iterations", iterations), setting.options.get("epochs", epochs)]
        images = "all" if setting.n_train is None else f"{setting.n_train:,}"
        rows.append([experiment, f"{iterations} x {epochs}", f"{own[0]} x {own[1]}", images])
    names = sorted({str(result.record["data"]["name"]) for cell in plan.cells
                    if (result := plan.store.load(cell, plan.scale, plan.setting(cell.experiment)))
                    and "data" in result.record and result.record["data"].get("name")})  # fmt: skip
    data = {
        "imagefolder": "CIFAR-10 as an image folder; if its files are JPEG, images differ a little from the original",
        "cifar10": "CIFAR-10 as published",
        "digits": "scikit-learn's handwritten digits, in place of CIFAR-10",
    }
    points = [
        *(f"Data: {data.get(name, name)}." for name in names if name in data),
        "No augmentation, weight decay or learning-rate schedule: the paper gives none.",
        "The layer of partial repulsion is drawn once for each seed; the paper does not say when it is drawn.",
        f"{_SPLITS.get(SCALES[plan.scale].data, _SPLITS['cifar10'])}, the same ones for all seeds.",
        "The data of S2 are not given in the paper: two sets are used, scaled to the paper's plateau of 4.2.",
        "AlexNet for small images and the width of the tanh network, 256 where no other is given, are choices; the "
        "paper gives none.",
    ]
    return blocks(
        [
            "## What differs from the paper",
            table(["experiment", "paper: iterations x epochs", "here", "training images"], rows),
            "\n".join(f"- {point}" for point in points),
        ]
    )


__all__ = ["page_text", "write_page"]
