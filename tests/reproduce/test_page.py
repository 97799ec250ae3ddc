"""The page of results from cells made by hand: its numbers, failed cells, links, and that it never changes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from pnanalysis.reproduce import small_problems
from pnanalysis.reproduce.accuracy import Arms, claims
from pnanalysis.reproduce.cells import Cell, planned
from pnanalysis.reproduce.costs import costs
from pnanalysis.reproduce.gradient_rows import claims as gradient_claims
from pnanalysis.reproduce.page import page_text, write_page
from pnanalysis.reproduce.plan import Plan, make_plan
from pnanalysis.reproduce.saturated import sweep_claims
from pnanalysis.reproduce.settings import SCALES, control_of
from pnanalysis.reproduce.small_problems import kink_claims
from pnanalysis.reproduce.spectrum import claims as spectrum_claims
from pnanalysis.reproduce.spectrum import section as spectra
from pnanalysis.reproduce.statistics import FAILS, HOLDS, UNKNOWN
from tests.reproduce.handmade import ensemble, gradients, put, put_failed, saturation, spectrum


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """S4 with three seeds: champions are 1.0, 1.1 and 1.2 points better than plain, restarts 3 points."""
    plan = make_plan(["S4", "S2"], "smoke", 3, tmp_path)
    for seed, gain in enumerate((0.010, 0.011, 0.012)):
        test = 0.30 + 0.01 * seed
        spectra = spectrum([20.0, 10.0 + seed], [9, 8])
        put(plan, Cell("S4", "", seed, "persistent"), [(0.3, test), (0.2, test - gain)], hessian=spectra)
        restarts = spectrum([20.0 + k for k in range(12)], [9] * 12)
        errors = [(0.3, test), *[(0.21 + 0.001 * k, test - 0.03 - gain / 10) for k in range(11)]]
        put(plan, Cell("S4", "", seed, "restart"), errors, hessian=restarts)
    return plan


def test_differences_and_verdicts(plan: Plan) -> None:
    found = {claim.text: claim for claim in claims(Arms(plan, "S4", ""))}
    gain = found["the champion is more accurate on the test set than the plain model"]
    assert (gain.paper, gain.here, gain.n, gain.verdict) == ("+0.62, outside", "+1.10 (+0.85 to +1.35)", "3", HOLDS)
    assert gain.p == pytest.approx(float(stats.ttest_1samp([1.0, 1.1, 1.2], 0).pvalue), rel=1e-6)
    assert found["the champion is more accurate on the test set than the best restart"].verdict == FAILS
    selected = found["champion − plain model, validation, on which the champion is selected"]
    assert (selected.verdict, math.isnan(selected.p)) == ("–", True)
    one = make_plan(["S4"], "smoke", 1, plan.store.out)
    assert {claim.verdict for claim in claims(Arms(one, "S4", ""))} == {UNKNOWN, "–"}


def test_failed_cells_are_rows_and_in_no_mean(plan: Plan) -> None:
    before = {claim.text: claim.here for claim in claims(Arms(plan, "S4", ""))}
    more = make_plan(["S4"], "smoke", 4, plan.store.out)
    put_failed(more, Cell("S4", "", 3, "persistent"), "the loss became nan in iteration 2")
    text = page_text(more, plan.store.out / "RESULTS.md")
    assert "persistent 3 of 4, restart 3 of 4" in text
    assert re.search(r"\| \[S4-seed3-persistent\]\(\S+\) \| diverged \| the loss became nan in iteration 2 \|", text)
    assert {claim.text: claim.here for claim in claims(Arms(more, "S4", ""))} == before


def test_the_champion_is_ranked_among_restarts(plan: Plan) -> None:
    arms = Arms(plan, "S4", "")
    from pnanalysis.reproduce.markdown import Links

    text = spectra(arms, Links(plan.store, plan.store.out / "RESULTS.md"))
    # the first of twelve is the plain model; all have the same ratio and part of the trace, and no edge of the bulk
    assert "| iteration 1 | 0 of 11 | 0 of 11, 11 equal | 0 of 11, 11 equal | 0 of 11 | 0 of 11 | – |" in text
    assert "| all seeds: p of ranks so low |  | 0.00058 | 1 | 1 | 0.00058 | 0.00058 | – |" in text  # 1 / 12^3
    assert "| the champion has a smaller λ₁ (log10) than the plain model | – | -0.26" in text
    assert "the best restart has cost more" not in text


def test_spectra_none_of_which_has_a_gap_say_so(tmp_path: Path) -> None:
    plan = make_plan(["S8"], "smoke", 1, tmp_path)
    put(plan, Cell("S8", "", 0, "persistent"), [(0.3, 0.3), (0.2, 0.2)], hessian=spectrum([20.0, 10.0], [0, 0]))
    claims = {claim.text: claim for claim in spectrum_claims(Arms(plan, "S8", ""))}
    fewer = claims["the champion has fewer outliers than the plain model"]
    assert (fewer.paper, fewer.here, fewer.verdict) == ("yes", "undefined: no spectrum has a gap", UNKNOWN)
    assert claims["the champion has a smaller λ₁ (log10) than the plain model"].here == "-0.30"


def test_descents_that_have_not_arrived_are_counted(tmp_path: Path) -> None:
    plan = make_plan(["S1"], "smoke", 1, tmp_path)
    ends = np.array([-1.0, -1.534, -1.534, -1.0, -1.0, -1e-9, -0.5])
    found = xr.Dataset({"end_value": ("iteration", ends)})
    assert small_problems.wells(found).tolist() == [1, 2, 2, 1, 1, 0, 0]
    cell = Cell("S1", "", 0, "restart")
    record = {**planned(cell, plan.scale, plan.setting("S1")), "status": "finished", "failure": None, "cost": {}}
    plan.store.save(cell, record, {"descent": found})
    (deep,) = small_problems.two_well_claims(plan)
    assert deep.here.startswith("33.3 % (9.7 to 70.0) of 6;")
    assert deep.here.endswith("; 2 have not arrived in either well")


def test_chains_are_timed_beside_restarts(plan: Plan) -> None:
    for seed, seconds in enumerate((2.0, 3.0)):
        put(plan, Cell("S4", "", seed, "persistent"), [(0.3, 0.3), (0.2, 0.2)], seconds=seconds)
    text = costs(plan).partition("## Chains beside restarts")[2]
    assert "| S4 | 2.00 (1.00 to 3.00) | 3 |" in text  # the third is as it was, one second as restarts are


def test_restarts_that_cost_more_are_said_to(tmp_path: Path) -> None:
    plan = make_plan(["S8"], "cpu", 1, tmp_path)
    put(plan, Cell("S8", "", 0, "restart"), [(0.3, 0.3), (0.2, 0.2)], hessian=spectrum([20.0, 10.0], [9, 8]))
    text = page_text(plan, tmp_path / "RESULTS.md")
    assert "There are 11 restarts for 5 iterations, which ranks need: the best restart has cost more." in text


def test_the_page_is_the_same_whenever_it_is_written(plan: Plan) -> None:
    out = plan.store.out
    first = write_page(plan, out / "RESULTS.md").read_bytes()
    figures = {file.name: file.read_bytes() for file in (out / "figures").iterdir()}
    assert write_page(plan, out / "RESULTS.md").read_bytes() == first
    assert {file.name: file.read_bytes() for file in (out / "figures").iterdir()} == figures
    assert {"S4.png", "S4-spectra.png"} <= set(figures)
    costs = (out / "COSTS.md").read_text()
    for arm in ("persistent", "restart"):
        assert f"| S4 | {arm} | 3 of 3 | 3 s | 2 s | 12 | 21 | test machine, 2 cores |" in costs
        assert f"| S2 | {arm} | 0 of 2 | – | – | – | – | – |" in costs
    assert "| all |  | 6 of 10 | 6 s | 3 s | 24 | 42 |  |" in costs


@pytest.mark.parametrize(
    "where", [pytest.param("RESULTS.md", marks=pytest.mark.slow), "../RESULTS.md", "pages/of/RESULTS.md"]
)
def test_links_lead_to_cells_and_figures(where: str, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> None:
    page = write_page(plan, Path(plan.store.out / where).resolve())
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())
    assert len(targets) > 10
    sections = {target for target in targets if target.startswith("#")}
    assert sections == {"#s4-lenet-5-one-layer-repelled"}  # as GitHub names "## S4: LeNet-5, one layer repelled"
    assert [target for target in targets if target not in sections and not (page.parent / target).is_file()] == []


def test_every_cell_is_named_on_the_page(plan: Plan) -> None:
    text = page_text(plan, plan.store.out / "RESULTS.md")
    assert all(f"[{folder.name}](" in text for folder in (plan.store.out / "cells").iterdir())


@pytest.mark.parametrize("scale", SCALES)
def test_a_page_without_cells_says_so(scale: str, tmp_path: Path) -> None:
    text = page_text(make_plan(["all"], scale, None, tmp_path), tmp_path / "RESULTS.md")
    assert text.count("Not yet known at this scale: no cell is done.") >= 8
    assert not re.search(r"\b(nan|None)\b", text)


def put_kink(plan: Plan, arm: str, losses: np.ndarray) -> None:
    cell = Cell("S2", "kink6", 0, arm)
    record = {**planned(cell, plan.scale, plan.setting("S2")), "status": "finished", "failure": None, "cost": {}}
    plan.store.save(cell, record, {"ensemble": ensemble(losses)})


def test_claims_about_the_kink(plan: Plan) -> None:
    stuck = np.full((20, 10), 4.2)
    chains = stuck.copy()
    chains[5:, :9] = np.linspace(0.1, 0.2, 9)  # nine of ten leave at iteration 5
    restarts = stuck.copy()
    restarts[3, :] = np.linspace(1.0, 2.0, 10)
    put_kink(plan, "persistent", chains)
    put_kink(plan, "restart", restarts)
    most, early, more, sooner, few, best = kink_claims(plan, "kink6")
    assert (most.here, most.verdict) == ("95.0 % (91.0 to 97.3) of 200", HOLDS)
    assert (early.here, early.verdict) == ("90.0 % (59.6 to 98.2) of 10", HOLDS)
    here = "9 chains and 10 sets of restarts; only the chain for 0, only restarts for 1"
    assert (more.here, more.n, more.verdict, more.p) == (here, "10 starts", UNKNOWN, 1.0)
    later = np.r_[np.full(9, 6), 20] - 4  # a chain that never leaves counts as twenty trainings
    assert sooner.here.startswith(f"{later.mean():+.2f} (")
    assert sooner.p == pytest.approx(float(stats.ttest_1samp(later, 0).pvalue), rel=1e-6)
    assert "of 12 trainings" in few.text
    expected = np.log10(chains.min(0)) - np.log10(restarts.min(0))
    assert best.here.startswith(f"{expected.mean():+.2f} (")
    assert best.verdict == HOLDS


def test_chains_that_leave_where_restarts_do_not_are_tested_in_pairs(plan: Plan) -> None:
    chains = np.full((20, 12), 4.2)
    restarts = chains.copy()
    chains[5:, :10] = 1.0
    restarts[5:, 7:11] = 1.0
    for losses in (chains, restarts):
        losses[:, 11] = 1.0  # never stuck, and so no evidence
    put_kink(plan, "persistent", chains)
    put_kink(plan, "restart", restarts)
    more = kink_claims(plan, "kink6")[2]
    here = "10 chains and 4 sets of restarts; only the chain for 7, only restarts for 1"
    assert (more.here, more.n, more.verdict) == (here, "11 starts", UNKNOWN)
    assert more.p == pytest.approx(stats.binomtest(1, 8).pvalue)
    restarts[5:, 10] = 4.2
    put_kink(plan, "restart", restarts)
    again = kink_claims(plan, "kink6")[2]
    assert (again.verdict, again.p) == (HOLDS, pytest.approx(2 / 2**7))


@pytest.mark.parametrize(
    ("halves", "fluctuation", "here", "judged"),
    [
        ([0.0] * 6, 0.0, "never changes in 6", HOLDS),
        ([1.0] * 6, 0.3, "its halves differ in 0 of 6 layers and iterations", UNKNOWN),  # not seen is not shown
        # each is beyond 1.96, none beyond 2.64: 6 tests at 5 %
        ([2.6, 2.6, 1.0, 1.0, 1.0, 1.0], 0.3, "its halves differ in 0 of 6 layers and iterations", UNKNOWN),
        ([2.7, 1.0, 1.0, 1.0, 1.0, 1.0], 0.3, "its halves differ in 1 of 6 layers and iterations", FAILS),
    ],
)
def test_a_constant_gradient_is_refuted_by_what_chance_does_not_explain(
    halves: list[float], fluctuation: float, here: str, judged: str, tmp_path: Path
) -> None:
    plan = make_plan(["S7"], "smoke", 1, tmp_path)
    (cell,) = plan.cells
    put(plan, cell, [(0.3, 0.3), (0.2, 0.2), (0.2, 0.2)], gradients=gradients(np.reshape(halves, (2, 3)), fluctuation))
    claim, small = gradient_claims(plan)
    assert (claim.here, claim.verdict) == (here, judged)
    assert (small.here, small.verdict) == (("not in 6 of 6", FAILS) if fluctuation else ("not in 0 of 6", HOLDS))
    assert f"| 1 | {judged} |" in page_text(plan, tmp_path / "RESULTS.md").partition("## S7")[2]


def test_layers_and_networks_compared_with_themselves_are_shown(tmp_path: Path) -> None:
    plan = make_plan(["S4"], "smoke", 2, tmp_path)
    for seed, champion in enumerate((0.4, 0.2)):
        layers = [[f"fc{seed + 1}"]] * 2
        put(plan, Cell("S4", "", seed, "persistent"), [(0.3, 0.3), (champion, 0.2)], layers=layers)
        put(plan, Cell("S4", "", seed, "restart"), [(0.3, 0.3 + 0.01 * seed), (0.4, 0.4)])
    text = page_text(plan, tmp_path / "RESULTS.md")
    assert re.search(r"S4-seed1-persistent\]\(\S+\) \| fc2 \| 70.00 / 70.00 \| iteration 1 \|", text)
    assert "the champion is the plain model itself in 1 of 2 seeds and the best restart" in text
    assert "the best restart is the plain model itself in 2 of 2 seeds: these differences are zero by" in text
    assert "intervals of what repulsion does include the choice of the layer" in text
    assert (
        "and here they differ, as on different machines or versions (test accuracy, seed 1: 70.00 and 69.00 %)" in text
    )


def test_spectra_without_a_gap_have_no_number_of_outliers(tmp_path: Path) -> None:
    plan = make_plan(["S4"], "smoke", 2, tmp_path)
    for seed in range(2):
        found = spectrum([20.0, 10.0, 5.0], [4, 2 * seed, 8])
        found["bulk_edge_high"] = ("checkpoint", np.array([2.0, 1.0, 5.0 / 3]))
        put(plan, Cell("S4", "", seed, "persistent"), [(0.3, 0.3), (0.2, 0.2), (0.4, 0.4)], hessian=found)
    claims = {claim.text: claim for claim in spectrum_claims(Arms(plan, "S4", ""))}
    fewer = claims["the champion has fewer outliers than the plain model"]
    assert (fewer.here, fewer.n) == ("-2.00", "1")  # of seed 0 it is not known
    closer = claims["the champion has a smaller λ₁ / bulk edge (log10) than the plain model"]
    assert (closer.here, closer.n, closer.paper) == ("+0.00", "1", "–")  # the paper's spectra are not of this network
    assert "There is a gap in 5 of 6 networks of the persistent arm" in page_text(plan, tmp_path / "RESULTS.md")


def test_the_sweep_is_judged_for_all_points_together(tmp_path: Path) -> None:
    plan = make_plan(["S9-sweep"], "cpu", 3, tmp_path)
    points = [name for name in plan.setting("S9-sweep").variants if "-lam" in name][:4]
    # falls of 0.1 with a spread that makes p 0.02 for one of them, and p 0.0002 for another; two stay as they were
    for k, point in enumerate(points):
        for seed, noise in enumerate((-1.0, 0.0, 1.0)):
            fall = (0.1, 0.1, 0.0, 0.0)[k] + (0.025, 0.0025, 0.1, 0.1)[k] * noise
            errors = [(0.3, 0.3), (0.3, 0.3)]
            layers, values = [[f"fc{seed + 1}"]], saturation([0.5, 0.5 - fall])
            put(plan, Cell("S9-sweep", point, seed, "persistent"), errors, layers=layers, saturation=values)
            if k == 0:
                control = Cell("S9-sweep", control_of(point), seed, "restart")
                put(plan, control, [(0.3, 0.3), (0.3, 0.29)], saturation=saturation([0.5, 0.5 - noise / 10]))
    (claim,) = sweep_claims(plan)
    assert (claim.here, claim.verdict) == (f"at 1 of 4 tested points, of 32: {points[1]}", HOLDS)
    text = page_text(plan, tmp_path / "RESULTS.md")
    assert "4 of 32 points have a cell" in text
    row = next(line for line in text.splitlines() if line.startswith("| 64 | Xavier (0.125) | 0.001 |"))
    raw = float(stats.ttest_1samp([-0.075, -0.1, -0.125], 0).pvalue)
    assert raw < 0.05 < 3 * raw
    assert f"| +1.00 | {3 * raw:.2g} | {UNKNOWN} | [seed 0](" in row  # points of test error beside restarts
    changes = re.findall(r"\[(fc\d): (\S+)\]\(\S+\)", row)
    assert changes == [("fc1", "-0.0750"), ("fc2", "-0.1000"), ("fc3", "-0.1250")]
    assert "a change then has to be 15 times its standard deviation over seeds" in text
    assert (tmp_path / "figures" / "S9-sweep.png").is_file()


def test_layers_of_the_sweep_are_compared_by_strength(tmp_path: Path) -> None:
    plan = make_plan(["S9-sweep"], "cpu", 3, tmp_path)
    falls = {0: (0.0, 0.0, 0.0, 0.0), 1: (0.0, 0.01, 0.02, 0.03)}  # by seed and strength
    points = [name for name in plan.setting("S9-sweep").variants if "-lam" in name]
    for place, point in enumerate(points):
        for seed, fall in falls.items():
            wobble = 0.001 * math.sin(place + 40 * seed)
            values = saturation([0.5, 0.5 - fall[place % 4] + wobble])
            layers = [[f"fc{seed + 1}"]]
            cell = Cell("S9-sweep", point, seed, "persistent")
            put(plan, cell, [(0.3, 0.3)] * 2, layers=layers, saturation=values)
    text = page_text(plan, tmp_path / "RESULTS.md")
    by_layer = text.partition("| layer repelled | λ | beside λ |")[2]
    row = r"^\| (fc\d) \(seed \d\) \| (\S+) \| 0.001 \| (\S+) .*\| (\d) of 8 \| (?:< )?(\S+) \|$"
    rows = re.findall(row, by_layer, re.MULTILINE)
    assert [(layer, lam) for layer, lam, *_ in rows] == [
        (f, lam) for f in ("fc1", "fc2") for lam in ("0.01", "0.1", "1")
    ]
    for layer, lam, change, lower, p in rows:
        expected = 0 if layer == "fc1" else -0.01 * {"0.01": 1, "0.1": 2, "1": 3}[lam]
        assert float(change) == pytest.approx(expected, abs=0.001)
        assert (lower == "8", float(p) < 0.05) == ((True, True) if layer == "fc2" else (False, False))


def test_p_values_of_the_summary_are_adjusted(plan: Plan) -> None:
    found = claims(Arms(plan, "S4", ""))
    text = page_text(plan, plan.store.out / "RESULTS.md")
    summary = text.partition("## Summary")[2].partition("## S2")[0]
    rows = [line.split(" | ") for line in summary.splitlines() if line.startswith("| [S4]")]
    known = [row for row in rows if row[-1] != "– |"]
    gain = next(claim for claim in found if claim.text.endswith("test set than the plain model") and claim.main)
    (mine,) = [row for row in known if row[1] == gain.text]
    assert float(mine[-1].removesuffix(" |")) >= gain.p
    assert f"{len(known)} of these claims have a p-value" in summary
