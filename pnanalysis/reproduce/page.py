"""RESULTS.md: every number comes from a cell, and the same cells give the same page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pnanalysis.io.atomic import atomic_path
from pnanalysis.plots.gradients import gradients
from pnanalysis.plots.style import save_figure, style
from pnanalysis.reproduce import accuracy, figures, saturated, small_problems, spectrum
from pnanalysis.reproduce.accuracy import Arms
from pnanalysis.reproduce.costs import write_costs
from pnanalysis.reproduce.gradient_rows import gradient_split
from pnanalysis.reproduce.markdown import UNKNOWN as DASH
from pnanalysis.reproduce.markdown import Links, blocks, table
from pnanalysis.reproduce.plan import Plan
from pnanalysis.reproduce.settings import PAPER_CHANNELS, PAPER_LENGTHS, PERSISTENT, RESTART, SCALES, TITLES
from pnanalysis.reproduce.statistics import RULE
from pnanalysis.reproduce.summary import summary

_COSTS = "COSTS.md"
#: What a recipe sets that a reader wants to know.
_RECIPES_OWN = ("lam", "optimizer", "lr", "momentum", "batch_size")
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
            "so only test accuracies say what is gained. Equal cost means as many trainings of the same length: those "
            f"of a chain take longer, as their penalty is computed too ([how much]({costs})). Every section links the "
            "cells that its numbers come from.",
            f"Scale `{plan.scale}`: {SCALES[plan.scale].summary}. {done} of {len(plan.cells)} cells are done; "
            f"[what they cost]({costs}).{_capped(plan)}",
            RULE,
            "## Summary",
            summary(plan, link=True),
        ]
    )


def _capped(plan: Plan) -> str:
    """A sentence on experiments that have fewer seeds than others; empty if none has."""
    fewer = [name for name in TITLES if name in plan.experiments and plan.n_seeds(name) < plan.seeds]
    if not fewer:
        return ""
    return f" {plan.seeds} seeds are planned, and one of {', '.join(fewer)}, whatever `--seeds` says."


def _section(plan: Plan, experiment: str, links: Links) -> str:
    settings = _settings(plan, experiment)
    if experiment == "S1":
        return blocks([settings, small_problems.two_well(plan, links), _two_wells(plan, links)])
    if experiment == "S2":
        return blocks([settings, *_kink_parts(plan, links)])
    if experiment == "S7":
        return blocks([settings, gradient_split(plan, links), _split(plan, links)])
    if experiment == "S9-sweep":
        found = saturated.changes(plan)
        text = "changes of the saturation measure, mean of iterations less plain model, one line for each initial scale"
        drawn = _figure(figures.sweep(found), "S9-sweep", text, links) if found else ""
        return blocks([settings, saturated.sweep(plan, links, drawn)])
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
    text = "test errors of single networks, and of ensembles by their size, by arm and seed"
    figure = _figure(figures.errors(curves), name, text, links) if curves.sizes else ""
    if arms.experiment != "S8":  # its arms are not of equal cost
        parts.append(accuracy.section(arms, links, figure))
    if "saturation" in setting.measures:
        values = saturated.by_iteration(arms)
        text = "saturation measure by iteration, arm and seed"
        drawn = _figure(figures.saturation(values), f"{name}-saturation", text, links) if values else ""
        drawn = blocks([drawn, _activity(arms, name, links)])
        parts.append("### Saturation\n\n" + saturated.section(arms, links, drawn))
    if "hessian" in setting.measures:
        found = spectrum.densities(arms)
        text = (
            "spectral densities of the lowest seed; kernels differ between panels, and so do curves of the plain model"
        )
        drawn = _figure(figures.spectra(found), f"{name}-spectra", text, links) if found else ""
        heading = "" if arms.experiment == "S8" else "### Hessian spectra (as in S8)\n\n"
        parts.append(heading + spectrum.section(arms, links, drawn))
    return blocks(parts)


def _two_wells(plan: Plan, links: Links) -> str:
    chain, restarts = small_problems.descents(plan, PERSISTENT), small_problems.descents(plan, RESTART)
    if chain is None:
        return ""
    starts, wells = np.empty((0, 2)), np.empty(0, dtype=int)
    if restarts is not None:
        starts, wells = restarts.path.values[1:, 0], small_problems.wells(restarts)[1:]
    figure = figures.two_wells(chain, starts, wells)
    return _figure(
        figure, "S1", "the descents, from the dot to the stars, and random starts by the well that they lead to", links
    )


def _split(plan: Plan, links: Links) -> str:
    """The gradients of the last iteration of the first seed."""
    finished = [result for result in plan.results("S7", "", PERSISTENT) if result.is_finished]
    if not finished:
        return ""
    with style():
        figure = gradients(finished[0].dataset("gradients"))
    text = (
        f"gradients of the loss and of the penalty in the last iteration, seed {finished[0].cell.seed}; fluctuations "
        "that are zero have no line"
    )
    return _figure(figure, "S7", text, links)


def _activity(arms: Arms, name: str, links: Links) -> str:
    """The 98th percentile and histograms of the first seed's chain."""
    found = [result for result in arms.finished(PERSISTENT).values() if result.has("saturation")]
    if not found:
        return ""
    first = min(found, key=lambda result: result.cell.seed)
    text = (
        f"98th percentile and histograms of activations, seed {first.cell.seed}; markers are epochs that were kept, "
        "and distances below 1e-6, which are not kept, are drawn there"
    )
    return _figure(figures.activity(first.dataset("saturation"), first.champion), f"{name}-activity", text, links)


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
    parts += _recorded(plan, experiment)
    parts += [f"{arm}: {_options(options)}" for arm, options in setting.arm_options.items()]
    if setting.n_train is not None:
        parts.append(f"{setting.n_train:,} training images")
    measures = [f"{name} ({_options(options)})" for name, options in setting.measures.items() if options]
    return "; ".join(parts) + (f". Measured: {', '.join(measures)}." if measures else ".")


def _recorded(plan: Plan, experiment: str) -> list[str]:
    """Settings of the recipe that cells have recorded, where neither the scale nor a variant gives another."""
    setting = plan.setting(experiment)
    given = {name for variant in setting.variants.values() for name in variant} | setting.options.keys()
    for cell in (cell for cell in plan.cells if cell.experiment == experiment):
        result = plan.store.load(cell, plan.scale, setting)
        config = {} if result is None else result.config
        if config:
            unused = {"momentum"} if config.get("optimizer", "sgd") != "sgd" else set()
            names = [name for name in _RECIPES_OWN if name in config and name not in given | unused]
            return [f"of the recipe: {_options({name: config[name] for name in names})}"]
    return []


def _options(options: object) -> str:
    assert isinstance(options, dict)
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _deviations(plan: Plan) -> str:
    """What differs from the paper."""
    rows = []
    for experiment in (name for name in TITLES if name in plan.experiments and name in PAPER_LENGTHS):
        setting, (iterations, epochs) = plan.setting(experiment), PAPER_LENGTHS[experiment]
        own = [setting.options.get("iterations", iterations), setting.options.get("epochs", epochs)]
        channels = PAPER_CHANNELS.get(setting.recipe)
        width = DASH if channels is None else str(setting.options.get("model_options", {}).get("width", channels))
        images = "all" if setting.n_train is None else f"{setting.n_train:,}"
        rows.append(
            [experiment, f"{iterations or 'several'} x {epochs}", f'{own[0] or "as in the recipe"} x {own[1]}', width,
             DASH if experiment in ("S1", "S2") else images]
        )  # fmt: skip
    results = [
        result
        for cell in plan.cells
        if (result := plan.store.load(cell, plan.scale, plan.setting(cell.experiment))) and "data" in result.record
    ]
    names = sorted({str(name) for result in results if (name := result.record["data"].get("name"))})
    data = {
        "imagefolder": "CIFAR-10 (JPEG copy), read from an image folder: images differ a little from the original",
        "cifar10": "CIFAR-10 as published",
        "digits": "scikit-learn's handwritten digits, in place of CIFAR-10",
    }
    points = [
        *(f"Data: {data[name]}." for name in names if name in data),
        *_shortened(plan),
        "No augmentation, weight decay or learning-rate schedule: the paper gives none. Its 92 % on ResNet-18 are not "
        "reached without crops and flips, so accuracies of S6 are lower for that reason, too.",
        "The layer of partial repulsion is drawn once for each seed; the paper does not say when it is drawn.",
        f"{_SPLITS.get(SCALES[plan.scale].data, _SPLITS['cifar10'])}, the same ones for all seeds.",
        "The data of S2 are not given in the paper: two sets are used, scaled to the paper's plateau of 4.2.",
        "AlexNet for small images, and of S9 the width (256 where no other is given), strength, optimizer, learning "
        "rate, batch size and number of iterations are choices; the paper gives none. Its figures of S9 show every "
        "epoch; here activations are kept at some.",
        "The paper gives no numbers for S7, nor settings: those of init 2 of S3 are used, with every epoch kept.",
        "Spectra of S4 are an addition; the paper shows those of a ResNet-18 (S8).",
        "No arm trains again from the same start without repulsion, in another order of batches for example. What a "
        "chain does beyond its plain model is therefore not known to be due to repulsion rather than to any change at "
        "all: restarts show what another start does, and the weakest strength of S9-sweep what nearly no force does.",
        *_spectra(plan),
        "The projection of two trajectories (fig. 6) needs their weights, which cells do not keep; "
        "`pnanalysis trajectory` draws it of a run.",
    ]
    return blocks(
        [
            "## What differs from the paper",
            table(
                ["experiment", "paper: iterations x epochs", "here", "channels (paper: 64)", "training images"], rows
            ),
            "\n".join(f"- {point}" for point in points),
        ]
    )


def _shortened(plan: Plan) -> list[str]:
    """Why S5, S6 and S8 are smaller at a scale."""
    smaller = [name for name in TITLES if name in plan.experiments and plan.setting(name).n_train is not None]
    if not smaller:
        return []
    return [
        f"{', '.join(smaller)}: the largest setting with which each was expected to take about an hour on two cores "
        "for three seeds: five iterations of networks with fewer channels, on as many images and for as many epochs as "
        "20 minutes of one core allow for a chain or its restarts (30 where there are more restarts), by epochs that "
        "were timed beforehand; what they took is on the page of costs. Errors on all 10,000 test images are part of "
        "that."
    ]


def _spectra(plan: Plan) -> list[str]:
    """How the spectra are computed."""
    found = [
        f"{options['n']:,} training images and {options['n_hvp']} products in {name}"
        for name in TITLES
        if name in plan.experiments and (options := plan.setting(name).measures.get("hessian"))
    ]
    if not found:
        return []
    points = [f"Spectra are of the Hessian of {' and '.join(found)}, with batch normalisation in evaluation mode."]
    if "S8" in plan.experiments:
        setting = plan.setting("S8")
        restarts, iterations = (setting.training("", arm).get("iterations") for arm in (RESTART, PERSISTENT))
        if restarts != iterations:
            points.append(f"S8 has {restarts} restarts, the plain model among them, for {iterations} iterations.")
    return points


__all__ = ["page_text", "write_page"]
