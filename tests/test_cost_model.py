"""The model of costs: its parts by hand, and a measurement that it must reproduce."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.cost_model import H100, Link, Machine, Workload, calibrated, cost, peaks, predictions, report, table

MACHINE = Machine("of round numbers", 1e12, 1e12, 80e9, Link(1e11, 0.0), Link(1e10, 0.0))
WORK = Workload("example", 1e9, 1e9, 0.0, 1000, 10, 1)


def test_costs_by_hand() -> None:
    one = cost(WORK, MACHINE, 1)
    fixed = 10 * 14 * 4e9 / 1e12  # ten products read numbers of all parameters 14 times
    assert one.arithmetic == pytest.approx(10 * 6 * 1e9 * 1000 / 1e12 + fixed)
    assert one.messages == 0
    assert one.orthogonalisation == pytest.approx(10 * 3 * 5 * 4e9 / 1e12)  # five vectors on average
    assert one.memory == pytest.approx(17 * 4e9)
    eight = cost(WORK, MACHINE, 8)
    assert eight.arithmetic - fixed == pytest.approx((one.arithmetic - fixed) / 8)
    assert eight.orthogonalisation == one.orthogonalisation
    assert eight.messages == pytest.approx(10 * (2 * 7 / 8 + 1) * 4e9 / 1e11)
    divided = cost(WORK, MACHINE, 8, divided=True)
    assert divided.orthogonalisation == pytest.approx(one.orthogonalisation / 8)
    assert divided.memory == pytest.approx((10 / 8 + 7) * 4e9)
    assert divided.messages < eight.messages
    between = cost(WORK, MACHINE, 64).messages - eight.messages  # an eighth for each device, at a tenth of the rate
    assert between == pytest.approx(10 * (2 * 7 / 8 + 1) * 4e9 / 8 / 1e10)


def test_more_processes_than_cores_are_no_faster() -> None:
    shared = replace(MACHINE, cores=2)
    two, four = (cost(WORK, shared, n).arithmetic for n in (2, 4))
    assert two == pytest.approx(cost(WORK, MACHINE, 2).arithmetic)
    assert four == pytest.approx(2 * cost(WORK, MACHINE, 4).arithmetic)


def measurement(machine: Machine) -> dict[str, Any]:
    """What ``benchmarks/scaling.py`` would measure on a machine that the model describes."""
    work = Workload("net", 1e6, 1e9, 0.0, 10, 1, 1, fixed=0.02)
    ideal = replace(machine, memory_rate=math.inf)

    def exchange(n: int, size: float) -> float:
        return machine.sum_seconds(size, n) + machine.broadcast_seconds(size, n)

    return {
        "cores": machine.cores,
        "load_before": 0.0,
        "products": [
            {
                "network": "net", "parameters": 1e6, "processes": n, "examples": 10,
                "fastest": cost(work, ideal, n).seconds,
            }
            for n in (1, 2, 3, 4)
        ],
        "parts": [{"network": "net", "examples": 5, "fastest": cost(replace(work, examples=5), ideal, 1).seconds}],
        "exchanges": [
            {"processes": n, "bytes": size, "fastest": exchange(n, size)} for n in (2, 3, 4) for size in (1e5, 4e6, 4e7)
        ],
        "gram_schmidt": [
            {"processes": 1, "bytes": size, "fastest": 3 * size / machine.memory_rate} for size in (64e6, 192e6)
        ],
    }  # fmt: skip


def test_calibration_finds_the_rates_of_a_machine_and_predicts_its_times() -> None:
    link = Link(2e9, 1e-4)
    machine = Machine("two cores", 5e10, 1e10, 1e10, link, link, per_node=64, cores=2)
    found = measurement(machine)
    assert calibrated(found).inside.rate == pytest.approx(link.rate)
    assert calibrated(found).inside.latency == pytest.approx(link.latency)
    rows = predictions(found)
    assert len(rows) == 3 + 6 + 1
    assert all(abs(row["off"]) < 1e-9 for row in rows)
    assert "3 of 3 products, 10 of all 10 predictions" in report(found)


def test_peaks_are_predicted_from_that_of_one_process() -> None:
    link = Link(2e9, 1e-4)
    machine = Machine("two cores", 5e10, 1e10, 1e10, link, link, per_node=64, cores=2)
    work = Workload("net", 1e6, 0.0, 3e4, 12, 30, 12)
    spectra = [
        {
            "network": "net", "parameters": 1e6, "examples": 12, "products": 30, "processes": n, "divided": divided,
            "bytes": cost(work, machine, n, divided).memory,
        }
        for n, divided in ((1, False), (2, False), (2, True), (3, True))
    ]  # fmt: skip
    found = measurement(machine) | {"spectra": spectra}
    rows = peaks(found)
    assert [row["processes"] for row in rows] == [2, 2, 3]
    assert all(abs(row["off"]) < 1e-9 for row in rows)
    assert "| net, 30 products, divided basis | 3 | 68 MB | 68 MB | +0% |" in report(found)


def test_the_table_has_all_numbers_of_gpus() -> None:
    lines = list(table())
    for n in (1, 8, 64, 512):
        assert sum(line.startswith(f"| {n} |") for line in lines) == 3 * (1 if n == 1 else 2)
    assert len({line.count("|") for line in lines}) == 1
    assert H100.memory == 80e9
