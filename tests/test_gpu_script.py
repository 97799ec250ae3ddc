"""``benchmarks/gpu.py`` on the CPU with tiny sizes: what it measures is for a GPU, that it runs is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of the folder can be imported."""
    monkeypatch.syspath_prepend(FOLDER)


@pytest.fixture
def stages(scripts: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stages, with one tiny network and one that cannot be made."""
    import gpu_stages

    torch.manual_seed(0)
    model, batch = (
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval(),
        (torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])),
    )
    monkeypatch.setattr(
        gpu_stages, "networks", lambda setup: {"missing": _missing, "tiny, batch 4": lambda: (model, batch)}
    )
    monkeypatch.setattr(gpu_stages, "import_compiler", lambda: None)
    monkeypatch.setattr(gpu_stages, "build_model", lambda name: model)
    monkeypatch.setattr(gpu_stages, "images", lambda *_: batch)
    return gpu_stages


def run(*arguments: str) -> None:
    """``gpu.py`` on the CPU with small networks."""
    import gpu

    gpu.main(["--device", "cpu", "--small", *arguments])


def _missing() -> None:
    raise ImportError("no such package")


def _endless(*_: object) -> Any:
    return lambda: time.sleep(60)


@pytest.mark.slow
def test_stages_write_what_they_find(stages: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = {"pnanalysis": stages._ours, "endless": _endless, "not installed": lambda *_: __import__("not_installed")}
    monkeypatch.setattr(stages, "CONTENDERS", ours)
    output = tmp_path / "gpu.md"
    only = ["products", "arithmetic", "recurrent", "syncs", "memory"]
    run("--longest", "10", "--output", str(output), "--only", *only)
    found = json.loads(output.with_suffix(".json").read_text())
    missing, product, endless = found["stages"]["products"]
    assert missing == {"what": "missing", "failed": "ImportError: no such package"}  # and the other networks go on
    assert product["gradients"] > 0
    assert endless["failed"] == "TimeoutError: more than 1 s"
    assert [row["arithmetic"] for row in found["stages"]["arithmetic"]] == ["float64", "float32", "bfloat16"]
    assert max(row["w1"] for row in found["stages"]["arithmetic"]) < 0.1
    assert found["stages"]["recurrent"][0]["relative_error"] < 1e-5
    assert found["environment"]["packages"]["numpy"]
    assert "endless" in output.read_text()
    assert "density" not in output.read_text()
    for name in ("gpu.png", "gpu_spectra.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_compiled_contenders_come_first_and_share_the_time(stages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    left: dict[str, float] = {}

    def contender(name: str) -> Any:
        def make(*_: object) -> Any:
            left[name] = setup.left
            return lambda: None

        return make

    names = ["ours", "ours, compiled", "theirs", "theirs, compiled"]
    monkeypatch.setattr(stages, "CONTENDERS", {name: contender(name) for name in names})
    setup = stages.Setup(torch.device("cpu"), small=True, deadline=time.perf_counter() + 100)
    before = torch.backends.cudnn.allow_tf32
    rows = list(stages.products(setup))
    assert [row.get("package") for row in rows] == [None, "ours, compiled", "theirs, compiled", "ours", "theirs"]
    # the network that cannot be made leaves all of its time: half of 100 s, then all of it, less what was spent
    assert 40 < left["ours, compiled"] < 50 < 90 < left["theirs, compiled"] < 100
    assert torch.backends.cudnn.allow_tf32 == before


def test_networks_are_chosen_by_name(stages: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = stages.Setup(torch.device("cpu"), small=True, deadline=time.perf_counter() + 60, networks=["missing"])
    assert [row["what"] for row in stages.products(setup)] == ["missing"]
    for option, known in (("--networks", "missing, tiny"), ("--only", "tests, syncs")):
        with pytest.raises(SystemExit, match="2"):
            run("--output", str(tmp_path / "gpu.md"), option, "everything")
        assert f"unknown: everything; there are {known}" in capsys.readouterr().err


def test_every_contender_that_is_installed_computes_a_product(stages: Any) -> None:
    model, batch = stages.networks(None)["tiny, batch 4"]()
    for name, make in stages.CONTENDERS.items():
        if "compiled" not in name:
            try:
                call = make(model, batch)
            except ModuleNotFoundError:
                continue
            assert call() is not None, name


def test_the_networks_of_the_script_can_be_made(scripts: None) -> None:
    import gpu_stages

    made = gpu_stages.networks(gpu_stages.Setup(torch.device("cpu"), small=True))
    for make in made.values():
        model, batch = make()
        assert len(gpu_stages.gradient(model, batch)) == len(list(model.parameters()))


@pytest.mark.slow
def test_files_with_cuda_tests_are_named(stages: Any) -> None:
    command = stages.tests_command()
    files = [each for each in command if each.endswith(".py")]
    assert "tests/spectra/test_lanczos.py" in files
    assert len(files) < 8
    for file in files:
        assert "import dask" not in (FOLDER.parent / file).read_text()
    here = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(
        [*command, "--collect-only", "-p", "no:randomly"], cwd=FOLDER.parent, capture_output=True, text=True, env=here
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sys.executable == command[0]


def test_outcomes_of_tests_are_rows(stages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "collected 3 items\n\ntests/a.py::test_one[x y] PASSED [ 33%]\ntests/a.py::test_two FAILED [ 66%]\n"
        "tests/a.py::test_three SKIPPED (needs a CUDA device) [100%]\n"
        "FAILED tests/a.py::test_two - AssertionError: 1 is not 2\n"
    )

    def rows(code: str, seconds: float = 60) -> list[Any]:
        monkeypatch.setattr(stages, "tests_command", lambda: [sys.executable, "-c", code])
        return list(stages.tests(stages.Setup(torch.device("cpu"), True, time.perf_counter() + seconds)))

    assert rows(f"print({said!r}); raise SystemExit(1)") == [
        {"what": "tests/a.py::test_one[x y]", "outcome": "passed"},
        {"what": "tests/a.py::test_two", "outcome": "failed"},
        {"what": "tests/a.py::test_three", "outcome": "skipped"},
        {"what": "tests/a.py::test_two", "outcome": "failed", "reason": "AssertionError: 1 is not 2"},
    ]
    assert rows("print('no such option'); raise SystemExit(4)") == [
        {"what": "pytest", "outcome": "ended with 4", "reason": "no such option"}
    ]
    assert rows("import time; time.sleep(60)", 0.0)[-1]["what"] == "the other tests"


# -- what is kept, and what is said of it -------------------------------------------------------------------------

HERE = {"device": "one", "torch": "2.11", "cuda": "13", "driver": "1", "python": "3.12", "packages": {}, "small": True}


def test_a_row_replaces_what_it_measures_anew(scripts: None) -> None:
    from gpu_report import begin, put

    rows = [{"what": "a", "failed": "no memory"}, {"what": "b", "package": "x", "seconds": 1.0}]
    put(rows, {"what": "b", "package": "y", "seconds": 2.0})
    put(rows, {"what": "b", "package": "x", "seconds": 3.0})
    put(rows, {"what": "a", "package": "x", "seconds": 4.0})  # a network that had failed can be made now
    assert rows == [
        {"what": "a", "package": "x", "seconds": 4.0},
        {"what": "b", "package": "x", "seconds": 3.0},
        {"what": "b", "package": "y", "seconds": 2.0},
    ]
    stages = {"products": [*rows, {"what": "stage products", "failed": "full"}], "tests": [{"what": "t"}]}
    for stage in ("products", "tests", "syncs"):
        begin(stages, stage)
    assert stages == {"products": rows, "tests": [], "syncs": []}


def test_results_of_another_environment_are_not_mixed(scripts: None, tmp_path: Path) -> None:
    from gpu_report import stored, write

    output, stages = tmp_path / "gpu.md", {"memory": [{"what": "products", "growth_bytes": 0}]}
    assert stored(output, HERE)["stages"] == {}
    write({"environment": HERE, "stages": stages}, output, [])
    assert stored(output, HERE) == {"environment": HERE, "stages": stages}
    for other in ({"device": "two"}, {"torch": "2.12"}, {"packages": {"numpy": "2"}}, {"small": False}):
        assert stored(output, HERE | other) == {"environment": HERE | other, "stages": {}}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"environment": 1, "stages": [1]}', '{"environment": 1, "stages": {"a": 1}}']
)
def test_a_file_of_something_else_is_left_alone(
    stages: Any, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        run("--only", "syncs", "--output", str(path.with_suffix(".md")))
    assert "is no file of results of gpu.py" in capsys.readouterr().err
    assert path.read_text() == text


def test_stages_are_added_to_a_file(stages: Any, tmp_path: Path) -> None:
    output = tmp_path / "gpu.md"
    for stage in ("syncs", "memory", "syncs"):
        run("--only", stage, "--output", str(output))
    found = json.loads(output.with_suffix(".json").read_text())
    assert {stage: len(rows) for stage, rows in found["stages"].items()} == {"syncs": 1, "memory": 1}
    assert {row["verdict"] for row in found["targets"]} == {"not measured"}
    assert output.read_text().index("## targets") > output.read_text().index("## memory")


def product(what: str, package: str, seconds: float) -> dict[str, Any]:
    return {"what": what, "package": package, "seconds": seconds}


OURS, THEIRS = "pnanalysis, compiled", "curvlinops, compiled"
PAIR = [product("ResNet-18, batch 1", OURS, 1.0), product("ResNet-18, batch 1", THEIRS, 1.5)]
PEERS = [product("ResNet-18, batch 1", f"PyHessian, {how}", 5.0) for how in ("graph kept", "data loader")]
STEPS = [{"what": f"a step of {name} with 20 end points", "ratio": 1.05} for name in ("lenet5", "resnet18")]
SYNCS = [{"what": f"Lanczos on {name}", "syncs": 0} for name in ("a", "b")]


@pytest.mark.parametrize(
    ("place", "stage", "met", "missed", "unmeasured"),
    [
        (0, "tests", [{"what": "t", "outcome": "passed"}], [{"what": "t", "outcome": "failed"}],
         [{"what": "s", "outcome": "passed"}, {"what": "t", "outcome": "skipped"}]),
        (1, "products", PAIR, [PAIR[0], product("ResNet-18, batch 1", THEIRS, 1.0)],
         [PAIR[0], {"what": "ResNet-18, batch 1", "package": THEIRS, "failed": "no memory"}]),
        (2, "products", PAIR + PEERS, [*PAIR, PEERS[0] | {"seconds": 4.9}], PAIR + PEERS[:1]),
        (3, "training", STEPS, [STEPS[0], STEPS[1] | {"ratio": 1.06}], STEPS[1:]),
        (4, "syncs", SYNCS, [SYNCS[0] | {"syncs": 1}], SYNCS[:1]),
        (5, "memory", [{"what": "m", "growth_bytes": 0}], [{"what": "m", "growth_bytes": 512}], [{"what": "m"}]),
    ],
    ids=["tests", "curvlinops", "PyHessian", "penalty", "syncs", "memory"],
)  # fmt: skip
def test_targets_are_met_missed_or_not_measured(
    scripts: None, place: int, stage: str, met: Any, missed: Any, unmeasured: Any
) -> None:
    from gpu_report import verdicts

    said = [verdicts({stage: rows}, ["ResNet-18, batch 1"])[place]["verdict"] for rows in (met, missed, unmeasured, [])]
    assert said == ["met", "missed", "not measured", "not measured"]


def test_every_network_counts(scripts: None) -> None:
    from gpu_report import verdicts

    judged = verdicts({"products": PAIR}, ["ResNet-18, batch 1", "GPT-2"])[1]
    assert judged["verdict"] == "not measured"
    assert judged["found"] == "ResNet-18, batch 1: 1.50 times as fast; GPT-2: ?"


# -- a machine without network ------------------------------------------------------------------------------------

#: Neither the script nor its tests import them; what comes with torch, torchvision or transformers.
LEFT_OUT = {"plotly", "scikit-learn"}
THERE = {"torch", "torchvision", "numpy", "scipy", "pillow", "jinja2", "safetensors", "rich", "typer"}


def test_requirements_are_those_of_the_package() -> None:
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    named = (FOLDER / "gpu_requirements.txt").read_text().splitlines()
    for each in [*project["dependencies"], *project["optional-dependencies"]["bench"]]:
        if Requirement(each).name not in LEFT_OUT | THERE:
            assert each in named


def test_what_is_missing_is_said_in_a_sentence(
    scripts: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu

    true = metadata.version

    def version(name: str) -> str:
        if name == "h5netcdf":
            raise metadata.PackageNotFoundError(name)
        return "1.0" if name in ("xarray", "curvlinops-for-pytorch") else true(name)

    monkeypatch.setattr(gpu.metadata, "version", version)
    assert gpu.missing() == ["h5netcdf>=1.4", "xarray>=2025.9.1"]  # without a peer the others are compared
    with pytest.raises(SystemExit, match="2"):
        run()
    assert "missing, or too old: h5netcdf>=1.4, xarray>=2025.9.1; `make gpu-wheels`" in capsys.readouterr().err
