"""Mutation testing: which of a random sample of small faults in the code do its tests notice?

Each fault is put into one module in memory, in a process of its own and in those that it starts. It runs the tests that
reach the fault's line, the fastest ones first, until one fails. ``make coverage`` says which tests those are; lines
that run while a module is imported or a fixture is made are left to the test file named after the module. A fault is
*noticed* if a test fails or runs out of time, and has *survived* if all of them pass, or as many as fit into
``--seconds``.

Results are kept in a JSON file, and faults that have been tried are not tried again unless their function has changed,
or ``--again`` asks for the survivors that nothing explains. An entry's ``why``, written by hand, explains why a
survivor does no harm.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import coverage
import pytest
from faulty import ROOT, load_with_fault
from mutants import Mutant, mutants
from survivors import table

RESULTS = ROOT / "benchmarks/results/mutation.md"
TARGETS = ("pnanalysis/spectra", "pnanalysis/curvature", "pnanalysis/io", "trainers/loop/persistence.py")
#: Packages that a process with a fault imports anew.
_OWN = ("pnanalysis", "trainers", "tests")
#: Seconds of computing after which one test counts as hanging, in addition to --seconds, and bytes it may take.
_PATIENCE, _MEMORY = 60, 2**35
_MOST_TESTS = 40


class Tests:
    """Which tests reach a line, by what ``make coverage`` has stored, and how long they take."""

    def __init__(self, data: coverage.CoverageData, seconds: dict[str, float]) -> None:
        self._by_line = {
            Path(file).resolve().relative_to(ROOT).as_posix(): data.contexts_by_lineno(file)
            for file in data.measured_files()
        }
        self._seconds = seconds

    def of(self, mutant: Mutant) -> list[str]:
        """Node ids, the fastest ones first, and the test file named after the module, whose tests come early."""
        reaching = self._by_line.get(mutant.file, {}).get(mutant.line, [])
        names = {name for name in reaching if name.startswith("tests.")}  # and not Hypothesis, which runs some of them
        own = f"{_folder(mutant.file)}/test_{Path(mutant.file).name}"

        def place(name: str) -> tuple[float, str]:
            return self._seconds.get(name, math.inf) / (10 if _node_id(name).startswith(own) else 1), name

        ids = [_node_id(name) for name in sorted(names, key=place)][:_MOST_TESTS]
        if (ROOT / own).is_file():
            return [*ids, own]
        return ids or [_folder(mutant.file)]


def _seconds_of_tests(report: Path) -> dict[str, float]:
    """How long tests took, those with parameters all together, by a report of pytest in the form of JUnit."""
    seconds: dict[str, float] = defaultdict(float)
    if report.is_file():
        for case in ElementTree.parse(report).iter("testcase"):
            seconds[f"{case.get('classname')}.{case.get('name', '').partition('[')[0]}"] += float(case.get("time", 0))
    return seconds


def _folder(target: str) -> str:
    """The folder with the tests of a module or folder."""
    inner = Path(target).parent if target.endswith(".py") else Path(target)
    return (Path("tests") / (inner.relative_to("pnanalysis") if inner.parts[0] == "pnanalysis" else inner)).as_posix()


def _node_id(context: str) -> str:
    """The node id of a test that ran as ``tests.io.test_runs.test_name``."""
    module, _, function = context.rpartition(".")
    return f"{module.replace('.', '/')}.py::{function}"


class _Reporter:
    """Runs tests in the order that is asked for, writes which one failed, and stops when the time is up."""

    def __init__(self, tests: list[str], report: Path, seconds: float) -> None:
        self.place, self.report, self.seconds = {test: i for i, test in enumerate(tests)}, report, seconds

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Those that are named come first, which pytest has put beside the others of their file."""
        items.sort(key=lambda item: self.place.get(item.nodeid.partition("[")[0], len(self.place)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.report.write_text(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if time.process_time() > self.seconds:
            item.session.shouldstop = "enough time for one fault"


def _run(mutant: Mutant | None, tests: list[str], seconds: float, report: Path) -> int:
    """Run tests with a fault in this process, and return pytest's status."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    limit = int(seconds + _PATIENCE)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if mutant:
        load_with_fault(mutant.file, mutant.index)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0"]
    marks = ["-m", "not slow and not zoo and not faults"]
    status = pytest.main([*options, *marks, *tests], plugins=[_Reporter(tests, report, seconds)])
    stopped = status == pytest.ExitCode.INTERRUPTED and time.process_time() > seconds and not report.exists()
    return 0 if stopped else int(status)


def _outcome(status: int, report: Path) -> str:
    if os.WIFSIGNALED(status):
        return "out of time" if os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU) else "crashed"
    code = os.WEXITSTATUS(status)
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        return "untested"
    if code == pytest.ExitCode.USAGE_ERROR:
        raise RuntimeError("pytest does not find the tests that `make coverage` has seen; run that again")
    return "survived" if code == 0 else "noticed" if report.exists() else "cannot be imported"


def results(
    work: Iterable[Mutant], tests: Tests, jobs: int, seconds: float, folder: Path
) -> Iterator[tuple[Mutant, dict[str, Any]]]:
    """Try faults, several at a time, and give each with what came of it."""
    waiting, running = list(reversed(list(work))), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                mutant = waiting.pop()
                report = folder / f"{len(waiting)}"
                pid = os.fork()
                if not pid:
                    os.setpgid(0, 0)
                    os._exit(_run(mutant, tests.of(mutant), seconds, report))
                running[pid] = mutant, report, time.monotonic()
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in running:
                mutant, report, start = running.pop(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # workers that its tests have started
                test = report.read_text() if report.exists() else ""
                yield mutant, {"outcome": _outcome(status, report), "test": test}
            for late, (_, _, start) in running.items():
                if time.monotonic() - start > 10 * (seconds + _PATIENCE):
                    os.killpg(late, signal.SIGKILL)
            time.sleep(0.05)
    finally:
        for pid in running:
            os.killpg(pid, signal.SIGKILL)


def _import_packages(targets: Iterable[str]) -> None:
    """Import what tests and packages import, which takes seconds; forget the own modules among them."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-p", "no:cacheprovider", *sorted({_folder(target) for target in targets})])
    for name in [name for name in sys.modules if name.partition(".")[0] in _OWN]:
        del sys.modules[name]


def _possible(target: str) -> list[Mutant]:
    files = sorted((ROOT / target).rglob("*.py")) or [ROOT / target]
    return [mutant for file in files for mutant in mutants(ROOT, file)]


def _drawn(possible: list[Mutant], n: int, seed: int) -> list[Mutant]:
    """The first of a random order that stays the same for functions that have not changed."""
    return sorted(possible, key=lambda mutant: hashlib.sha256(f"{seed} {mutant.key}".encode()).digest())[:n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=60, help="faults in each target, at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seconds", type=float, default=60, help="of computing for one fault")
    parser.add_argument("--again", action="store_true", help="try unexplained survivors again, after new tests")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help="folders and modules")
    parser.add_argument("--coverage", type=Path, default=ROOT / ".coverage", help="what `make coverage` stored")
    parser.add_argument("--times", type=Path, default=ROOT / ".test-times.xml", help="what `make coverage` stored, too")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    data = coverage.CoverageData(str(options.coverage))
    data.read()
    possible = {target: _possible(target) for target in options.targets}
    sample = [mutant for target in possible for mutant in _drawn(possible[target], options.sample, options.seed)]
    present = {mutant.key: mutant for target in {*TARGETS, *possible} for mutant in _possible(target)}

    store = options.output.with_suffix(".json")
    kept: dict[str, Any] = json.loads(store.read_text()) if store.is_file() else {}
    kept = {key: result for key, result in kept.items() if key in present and result["source"] == present[key].source}
    for key, result in kept.items():
        result["line"] = present[key].line
    retried = ("survived", "untested") if options.again else ()
    work = [present[key] for key, result in kept.items() if result["outcome"] in retried and not result["why"]]
    work += [mutant for mutant in sample if mutant.key not in kept]

    _import_packages(options.targets)
    tests = Tests(data, _seconds_of_tests(options.times))
    folder = options.output.parent / f".mutation-{os.getpid()}"
    folder.mkdir()
    try:
        for done, (mutant, result) in enumerate(results(work, tests, options.jobs, options.seconds, folder), 1):
            why = kept.get(mutant.key, {}).get("why", "")
            fault = {"kind": mutant.kind, "was": mutant.was, "now": mutant.now}
            fault |= {"line": mutant.line, "source": mutant.source}
            kept[mutant.key] = {**fault, **result, "why": why}
            where = f"{mutant.file}:{mutant.line}"
            print(f"{done}/{len(work)} {result['outcome']}: {where} {mutant.was} -> {mutant.now}", flush=True)
            store.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    options.output.write_text("\n".join(table(kept)) + "\n")


if __name__ == "__main__":
    main()
