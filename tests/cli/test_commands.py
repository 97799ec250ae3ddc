"""What the commands print, save and draw, and how they say no."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import signal
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from pnanalysis.cli import app
from pnanalysis.io import netcdf
from pnanalysis.io.runs import Run, open_run
from pnanalysis.spectra.summary import compare_spectra

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TINY = ("--data", "digits", "--model", "tanh7", "--model-option", "input_shape=[1,8,8]", "--model-option", "width=16")


def test_pntrain_trains_a_recipe_and_its_control(run, tmp_path: Path) -> None:
    options = ("--iterations", 2, "--epochs", 2, "--control", "--out", tmp_path / "net")
    done = run("pntrain", "tanh7", *TINY, *options)
    assert done.status == 0, done.err
    assert "champion" in done.out
    assert open_run(tmp_path / "net").manifest["strategy"] == "partial"
    assert open_run(tmp_path / "net-restart").manifest["strategy"] == "restart"
    again = run("pntrain", "tanh7", *TINY, *options)
    assert again.status == 2
    assert "--resume" in again.err
    assert run("pntrain", "tanh7", *TINY, *options, "--resume").status == 0


def test_pntrain_trains_ones_own_model_and_data(run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def net():\n    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))\n"
        "def data():\n"
        "    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))\n"
        "    y = x[:, :1].sin()\n"
        "    return {'train': (x[:150], y[:150]), 'validation': (x[150:], y[150:])}\n"
    )
    monkeypatch.chdir(tmp_path)
    own = ("--model", "mine:net", "--data", "mine:data", "--loss", "mse")
    done = run("pntrain", "custom", *own, "--epochs", 3, "--iterations", 2, "--out", "net", "--lam", 0.1)
    assert done.status == 0, done.err
    refused = run("pnanalysis", "saturation", "net")
    assert refused.status == 2
    assert "vouch" in refused.err
    done = run("pnanalysis", "saturation", "net", "--model", "mine:net", "--data", "mine:data")
    assert done.status == 0, done.err


REGRESSION = """
import torch
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
def examples(n):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(n))
    return x, 5 * x[:, :1].sin()
def data():
    return {"train": examples(150), "validation": examples(50)}
def unvalidated():
    return {"train": examples(150)}
"""


def test_errors_of_numbers_are_no_percentages_anywhere(run, own_run: Run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "numbers_.py").write_text(REGRESSION)
    monkeypatch.chdir(tmp_path)
    own = ("custom", "--model", "numbers_:net", "--data", "numbers_:data", "--loss", "mse", "--layers", "0")
    done = run("pntrain", *own, "--epochs", 2, "--iterations", 2, "--out", "net")
    assert done.status == 0, done.err
    history = open_run("net").history
    assert history.attrs["error"] == "squared error"
    assert history.validation_error.attrs["long_name"] == "validation squared error"
    value = f"{float(history.validation_error[1, -1]):.4g}"
    lines = [line for line in done.err.splitlines() if line.startswith("custom partial")]
    assert lines[1].startswith("custom partial iteration 1 (2 of 2): loss ")
    assert f"validation squared error {value}, test squared error –, " in lines[1]
    alone = run("pnanalysis", "history", "net").out
    beside = run("pnanalysis", "history", "net", own_run.path)
    assert beside.status == 0, beside.err
    drawn = run("pnanalysis", "history", "net", "--plot", "net.png")
    assert drawn.status == 0, drawn.err
    for table in (done.out, alone):
        assert "validation squared error" in table
        assert value in table
        assert "%" not in table
    assert "nan" not in done.out + done.err + alone
    assert value in beside.out
    assert f"{float(own_run.history.validation_error[1, -1]):.2%}" in beside.out
    assert "validation error" in beside.out
    assert "no validation split" not in done.out


def test_a_champion_that_nothing_validates_is_told(run, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "numbers_.py").write_text(REGRESSION)
    monkeypatch.chdir(tmp_path)
    own = ("custom", "--model", "numbers_:net", "--data", "numbers_:unvalidated", "--loss", "mse", "--layers", "0")
    note = "there is no validation split: the champion is the iteration with the lowest training loss"
    assert note in run("pntrain", *own, "--epochs", 2, "--iterations", 2, "--out", "net").out
    grid = ("--sweep", "seed=0,1", "--jobs", 1, "--out", "grid", "--epochs", 1)
    assert note in run("pntrain", *own, *grid, "--iterations", 2).out
    assert note not in run("pntrain", *own, "--strategy", "plain", "--epochs", 1, "--out", "plain").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pntrain", "lenet6"), "S4 lenet5"),
        (("pntrain", "lenet5", "--lam", "-1"), "lam"),
        (("pntrain", "lenet5", "--strategy", "magic"), "restart"),
        (("pntrain", "custom"), "--model"),
        (("pntrain", "custom", "--model", "lenet5"), "custom needs --data"),
        (("pntrain", "lenet5", "--lr", "-1"), "lr is -1.0; it must be"),
        (("pntrain", "lenet5", "--momentum", "nan"), "momentum is nan; it must be"),
        (("pntrain", "tanh7", "--model-option", "width"), "NAME=JSON"),
        (("pntrain", "lenet5", "--data", "imagefolder:/no/such/folder"), "no such folder"),
        (("pntrain", "lenet5", "--device", "gpu"), "not a device"),
        (("pntrain", "lenet5", "--epochs", "many"), "--epochs"),
        (("pnanalysis", "saturation"), "name a run"),
        (("pnanalysis", "saturation", "/no/such/run"), "no such run"),
        (("pnanalysis", "hessian", "--weights", "a.pt"), "--model"),
        (("pnanalysis", "history"), "name a run"),
        (("pnanalysis", "compare"), "name a run"),
        (("pnanalysis", "info", "/no/such/run"), "no such run"),
        (("pnanalysis", "plot", "/no/such/file.nc"), "no such file"),
        (("pnanalysis", "landscape"), "name a run"),
        (("pnanalysis", "landscape", "/no/such/run", "--view", "plane"), "no such run"),
        (("pnanalysis", "sharpness", "/no/such/run", "--radius", "ball=wide"), "write ball|adaptive|box"),
        (("pnanalysis", "dance"), "see pnanalysis --help"),
        (("pnanalysis", "hesian"), "Did you mean 'hessian'"),
        (("pnanalysis", "hessian", "--lanczos", "3"), "see pnanalysis hessian --help"),
        (("pnanalysis", "hessian", "--operator", "laplacian", "/no/such/run"), "'ggn'"),
        (("pnanalysis", "landscape", "--view", "sphere", "/no/such/run"), "'plane'"),
        (("pnanalysis", "saturation", "/no/such/run", "--plot", "a.gif"), ".svg"),
        (("pnanalysis", "saturation", "/no/such/run", "-o", "/dev/null/a.nc"), "is a file"),
        (("pnanalysis", "report", "/no/such/run", "-o", "."), "is a folder"),
        (("pnanalysis", "info", __file__), "is no run directory"),
        (("pntrain", "lenet5", "--optimizer", "adagrad"), "'sgd'"),
        (("pntrain", "lenet5", "--augment", "blur"), "crop, flip"),
        (("pntrain", "lenet5", "--layers", "conv9", "--data", "imagefolder:/no/such/folder"), "conv9"),
        (("pntrain", "lenet5", "--loss", "hinge", "--data", "imagefolder:/no/such/folder"), "hinge"),
        (("pntrain", "lenet5", "--out", "/dev/null/x", "--data", "imagefolder:/no/such/folder"), "/dev/null"),
    ],
)
def test_bad_input_is_one_clear_line_and_status_2(run, arguments, message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.status == 2
    assert message in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert not list(tmp_path.rglob("*.nc"))


def test_nan_in_training_says_where_and_loses_nothing(run, tmp_path: Path) -> None:
    done = run("pntrain", "tanh7", *TINY, "--lr", 1e38, "--epochs", 2, "--out", tmp_path / "net", "--quiet")
    assert done.status == 2
    assert "epoch 1, step" in done.err
    assert open_run(tmp_path / "net").manifest["status"] == "failed"


def test_analyses_save_beside_the_run_and_draw(run, own_run: Run, tmp_path: Path) -> None:
    for kind in ("saturation", "trajectory", "history"):
        figure = tmp_path / f"{kind}.png"
        done = run("pnanalysis", kind, own_run.path, "--plot", figure)
        assert done.status == 0, done.err
        assert figure.read_bytes()[:4] == b"\x89PNG"
    saved = {path.stem: netcdf.load(path).attrs["kind"] for path in (own_run.path / "analysis").glob("*")}
    assert saved == {kind: kind for kind in ("saturation", "trajectory")}  # its history is in the run already


def test_hessian_of_a_run_has_plain_and_champion(run, own_run: Run, tmp_path: Path) -> None:
    small = ("--n", 100, "--n-lanczos", 10, "--n-probes", 2)
    done = run("pnanalysis", "hessian", own_run.path, *small, "-o", tmp_path / "h.nc", "--plot", tmp_path / "h.svg")
    assert done.status == 0, done.err
    ds = netcdf.load(tmp_path / "h.nc")
    assert ds.checkpoint.values.tolist() == ["plain", "champion"]
    assert "lambda_max" in done.out
    assert run("pnanalysis", "plot", tmp_path / "h.nc", "-o", tmp_path / "h.pdf").status == 0
    assert (tmp_path / "h.pdf").read_bytes()[:5] == b"%PDF-"
    info = run("pnanalysis", "info", tmp_path / "h.nc")
    assert "Ritz" in info.out


def test_a_users_own_weights_go_through_every_analysis(run, tmp_path: Path, own_run: Run, monkeypatch) -> None:
    (tmp_path / "own_nets.py").write_text(
        "from trainers.zoo.models import tanh7\ndef make():\n    return tanh7((1, 8, 8), width=16)\n"
    )
    monkeypatch.chdir(tmp_path)
    weights = [checkpoint.path for checkpoint in own_run.checkpoints]
    own = ("--model", "own_nets:make", "--weights", *weights)
    data = ("--data", "digits")
    assert run("pnanalysis", "saturation", *own, *data).status == 0
    assert run("pnanalysis", "trajectory", *own).status == 0
    small = ("--n", 100, "--n-lanczos", 8, "--n-probes", 2, "-o", "own.nc")
    done = run("pnanalysis", "hessian", *own, *data, *small)
    assert done.status == 0, done.err
    assert netcdf.load("own.nc").sizes["checkpoint"] == len(weights)


def test_a_pickle_posing_as_weights_is_refused(run, tmp_path: Path, monkeypatch) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, ("run-by-the-pickle",)

    monkeypatch.chdir(tmp_path)
    Path("evil.pt").write_bytes(pickle.dumps(Evil()))
    done = run("pnanalysis", "saturation", "--model", "tanh7", "--weights", "evil.pt", "--data", "digits")
    assert done.status == 2
    assert "state_dict" in done.err
    assert not Path("run-by-the-pickle").exists()


def test_weights_of_another_architecture_are_refused(run, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    done = run("pnanalysis", "saturation", "--model", "lenet5", "--weights", tmp_path / "other.pt", "--data", "digits")
    assert done.status == 2
    assert "another architecture" in done.err


def test_an_output_that_cannot_be_written_is_one_line(run, own_run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run("pnanalysis", "trajectory", own_run.path, "-o", tmp_path / "file" / "t.nc")
    assert done.status == 2
    assert "Traceback" not in done.err


def test_info_and_report_describe_a_run(run, own_run: Run, tmp_path: Path) -> None:
    assert "finished, 2 of 2 iterations" in run("pnanalysis", "info", own_run.path).out
    done = run("pnanalysis", "report", own_run.path, "-o", tmp_path / "r.html")
    assert done.status == 0, done.err
    assert "<svg" in (tmp_path / "r.html").read_text()


def test_quiet_says_nothing(run, own_run: Run) -> None:
    done = run("pnanalysis", "saturation", own_run.path, "--quiet")
    assert (done.status, done.out, done.err) == (0, "", "")
    assert np.isfinite(netcdf.load(own_run.path / "analysis/saturation.nc").percentile).any()


def test_a_sweep_ends_with_a_table_and_tells_of_failures(run, tmp_path: Path) -> None:
    small = [
        "--model",
        "tanh7",
        "--model-option",
        "input_shape=[1,8,8]",
        "--model-option",
        "width=8",
        "--data",
        "digits",
    ]
    sweep = ["--epochs", 1, "--iterations", 2, "--sweep", "layers=fc1,nowhere", "--jobs", 1, "--out", tmp_path / "grid"]
    outcome = run("pntrain", "custom", *small, *sweep, "--device", "cpu")
    assert outcome.status == 2
    assert "1 of 2 runs failed" in outcome.err
    assert "layers=fc1" in outcome.out
    assert run("pntrain", "S9", "--sweep", "nothing=1", "--out", tmp_path / "no").status == 2


def test_gradients_of_a_run_are_drawn_and_saved(run, own_run: Run, tmp_path: Path) -> None:
    outcome = run("pnanalysis", "gradients", own_run.path, "--n", 100, "--plot", tmp_path / "g.svg", "--device", "cpu")
    assert outcome.status == 0
    assert "constant push" in outcome.out
    assert (own_run.path / "analysis" / "gradients.nc").is_file()
    assert (tmp_path / "g.svg").is_file()


def test_hessian_says_how_checkpoints_differ(run, own_run: Run) -> None:
    few = ["--n", 100, "--n-hvp", 60, "--device", "cpu", "-q"]
    assert run("pnanalysis", "hessian", own_run.path, *few, "-c", "plain", "--per-layer").status == 0
    outcome = run("pnanalysis", "hessian", own_run.path, *few[:-1], "-c", "start", "-c", "plain")
    assert "plain - start" in outcome.out
    assert "noise" in outcome.out
    spectra, differences = json.loads(
        run("pnanalysis", "hessian", own_run.path, *few, "-c", "start", "-c", "plain", "--json").out
    )["tables"]
    ds = netcdf.load(own_run.path / "analysis" / "hessian.nc")
    for name, column in (("lambda_max", "lambda_max"), ("n_outliers", "outliers"), ("bulk_edge_high", "bulk edge")):
        ends = {key: float(ds[name + end][1]) for key, end in (("value", ""), ("low", "_low"), ("high", "_high"))}
        assert spectra["rows"][1][column] == ends
    found = compare_spectra(ds.sel(checkpoint="start"), ds.sel(checkpoint="plain"))
    shown = differences["rows"][0]["lambda_max"]
    assert (shown["low"], shown["high"]) == (float(found.lambda_max_low), float(found.lambda_max_high))


def test_trajectories_by_layer_are_drawn_by_layer(run, own_run: Run, tmp_path: Path) -> None:
    svg = tmp_path / "layers.svg"
    assert run("pnanalysis", "trajectory", own_run.path, "--per-layer", "--plot", svg).status == 0
    drawn = svg.read_text()
    assert all(f">{layer}<" in drawn for layer in ("whole network", "fc1", "fc7"))


def test_json_is_for_machines(run, own_run: Run, tmp_path: Path) -> None:
    out = json.loads(run("pnanalysis", "history", own_run.path, "--json", "-o", tmp_path / "h.nc").out)
    assert out["files"] == [str(tmp_path / "h.nc")]
    row = out["tables"][0]["rows"][0]
    assert row["iteration"] == 0
    assert row["test error"] == pytest.approx(float(own_run.history.test_error[0, -1]))
    described = json.loads(run("pnanalysis", "info", own_run.path, "--json").out)["tables"][0]["rows"]
    assert {"entry": "status", "value": "finished, 2 of 2 iterations"} in described
    failed = run("pnanalysis", "info", "/no/such/run", "--json")
    assert failed.status == 2
    assert "no such run" in json.loads(failed.out)["error"]
    tiny = ("--iterations", 1, "--epochs", 1, "--out", tmp_path / "net", "--json")
    table = json.loads(run("pntrain", "tanh7", *TINY, *tiny).out)["tables"][0]
    assert 0 <= table["rows"][0]["validation error"] <= 1
    assert table["rows"][0]["role"] == "plain, champion"


@pytest.mark.parametrize("program", ["pnanalysis", "pntrain"])
def test_version_help_and_completion(run, program: str, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(program, "--version").out.strip() == metadata.version("pnanalysis")
    shown = run(program, "--help")
    assert shown.status == 0
    assert "--install-completion" in shown.out


@pytest.mark.parametrize("command", [command.name for command in app.registered_commands])
def test_every_command_shows_examples(run, command: str) -> None:
    shown = run("pnanalysis", command, "--help")
    assert shown.status == 0
    assert "Example" in shown.out
    assert f"pnanalysis {command} " in " ".join(shown.out.split("Example", 1)[1].split())


def test_compare_prints_a_table_and_sentences(run, own_run: Run, tmp_path: Path) -> None:
    few = ["--n", 200, "--n-hessian", 50, "--device", "cpu"]
    picture = tmp_path / "dashboard.svg"
    outcome = run("pnanalysis", "compare", own_run.path, "-c", "ends", *few, "--plot", picture)
    assert outcome.status == 0, outcome.err
    for text in ("test error", "difference", "disagreement", "CKA of fc3", "Hessian trace", "iter01 (iteration 1"):
        assert text in outcome.out
    assert "<svg" in picture.read_text()
    ds = netcdf.load(own_run.path / "analysis" / "comparison.nc")
    assert ds.attrs["kind"] == "comparison"
    assert ds.n_examples.values.tolist() == [200, 200, 200]


def test_compare_takes_many_checkpoints_and_own_weights(run, own_run: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = ("--no-hessian", "--no-cka", "--device", "cpu")
    outcome = run("pnanalysis", "compare", own_run.path, "-c", "all", "-c", "plain", *plain, "-o", "c.nc")
    assert outcome.status == 0, outcome.err
    assert "values" in outcome.out
    assert "By test error" in outcome.out
    (tmp_path / "compared.py").write_text(
        "from trainers.zoo.models import tanh7\ndef make():\n    return tanh7((1, 8, 8), width=16)\n"
    )
    weights = [end.path for end in own_run.ends]
    own = ("--model", "compared:make", "--weights", *weights[:1], "--data", "digits", *weights[1:])
    outcome = run("pnanalysis", "compare", *own, *plain, "-o", "own.nc", "--quiet")
    assert (outcome.status, outcome.out) == (0, ""), outcome.err
    assert netcdf.load("own.nc").sizes["checkpoint"] == 2
    refused = run("pnanalysis", "compare", own_run.path, "-c", "plain", *plain)
    assert refused.status == 2
    assert "at least two checkpoints" in refused.err


def test_landscapes_are_saved_drawn_and_summed_up(run, own_run: Run, tmp_path: Path) -> None:
    ends = ("-c", "start", "-c", "plain", "--n", 100, "--points", 3, "--device", "cpu")
    done = run("pnanalysis", "landscape", own_run.path, *ends, "--align")
    assert done.status == 0, done.err
    assert "aligned" in done.out
    done = run("pnanalysis", "landscape", own_run.path, *ends, "--view", "curve", "--steps", 5, "-o", tmp_path / "c.nc")
    assert done.status == 0, done.err
    assert netcdf.load(tmp_path / "c.nc").path.values.tolist() == ["line", "curve"]
    plane = ("--view", "plane", "--points", 3, "--n", 50, "--device", "cpu")
    done = run("pnanalysis", "landscape", own_run.path, *plane, "--plot", tmp_path / "p.svg")
    assert done.status == 0, done.err
    assert "path of plain" in (tmp_path / "p.svg").read_text()
    done = run("pnanalysis", "sharpness", own_run.path, "--n", 50, "--steps", 3, "--radius", "ball=0.1", "-q")
    assert done.status == 0, done.err
    assert set(own_run.results.children) == {"history", "barrier", "landscape", "sharpness"}
    assert netcdf.load(own_run.path / "analysis" / "sharpness.nc").radius.values.tolist() == [0.1]
    assert run("pnanalysis", "report", own_run.path, "-o", tmp_path / "r.html").status == 0
    page = (tmp_path / "r.html").read_text()
    assert all(title in page for title in ("Loss between minima", "Loss on a plane", "Sharpness"))


def test_no_command_shows_the_help(run) -> None:
    assert "hessian" in run("pnanalysis").out
    assert "RECIPE" in run("pntrain").out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_says_how_to_go_on_and_training_does(run, tmp_path, monkeypatch, number, status) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)

    out = tmp_path / "a net"
    command = ("pntrain", "tanh7", *TINY, "--iterations", 2, "--epochs", 1, "--strategy", "persistent", "--out", out)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr("trainers.runs.session.PersistentPenalty", interrupted)
        stopped = run(*command)
    assert signal.getsignal(number) is before
    assert stopped.status == status
    assert stopped.err.splitlines()[-1] == f"interrupted; resume with: {shlex.join(map(str, command))} --resume"
    assert len(open_run(out).ends) == 1
    resumed = run(*command, "--resume")
    assert resumed.status == 0
    assert f"{out}: resuming iteration 1 (2 of 2)" in resumed.err
    again = run(*command, "--resume")
    assert again.status == 0
    assert f"{out}: is complete" in again.err


def test_info_lists_weights(run, own_run: Run) -> None:
    done = run("pnanalysis", "info", own_run.champion.path, "--json")
    rows = json.loads(done.out)["tables"][0]["rows"]
    state = own_run.champion.load()
    assert {row["tensor"]: row["numbers"] for row in rows} == {name: value.numel() for name, value in state.items()}


def test_names_are_cells_of_their_own(run, own_run: Run, tmp_path: Path) -> None:
    done = run("pnanalysis", "saturation", own_run.path, "-c", "ends", "--json", "-o", tmp_path / "s.nc")
    rows = json.loads(done.out)["tables"][0]["rows"]
    assert {row["iteration"] for row in rows} == set(range(len(own_run.ends)))
    assert {row["layer"] for row in rows} == set(netcdf.load(tmp_path / "s.nc").layer.values)


@pytest.mark.parametrize(
    ("code", "spec", "said"),
    [
        ("def make():\n    raise KeyError('width')", ":make", "KeyError: 'width' (ID.py, line 2)"),
        ("def make(width):\n    return width", ":make", "missing 1 required positional argument"),
        ("1 / 0", ":make", "cannot import 'ID': ZeroDivisionError: division by zero (ID.py, line 1)"),
        ("def (", ":make", "SyntaxError"),
        ("import no_such_module", ":make", "No module named 'no_such_module'"),
        ("make = None", ":mkae", "has no 'mkae'"),
    ],
)
@pytest.mark.parametrize("option", ["--model", "--data"])
def test_errors_in_ones_own_code_are_told_with_their_place(
    run, own_run, tmp_path, monkeypatch, code, spec, said, option
):
    name = f"broken_{abs(hash(code + option))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    done = run("pnanalysis", "saturation", own_run.path, option, name + spec, "--n", 10)
    assert done.status == 2
    assert said.replace("ID", name) in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("batch", ["(1, 2, 3)", "[(x, y, y)]", "[{'x': x, 'y': y}]", "[x]"])
def test_data_that_are_no_pairs_are_refused(run, own_run: Run, tmp_path: Path, monkeypatch, batch: str) -> None:
    name = f"odd_data_{abs(hash(batch))}"
    (tmp_path / f"{name}.py").write_text(
        f"import torch\nx, y = torch.zeros(8, 1, 8, 8), torch.zeros(8).long()\ndef make():\n    return {batch}\n"
    )
    monkeypatch.chdir(tmp_path)
    for command in ("hessian", "saturation", "compare", "landscape", "sharpness"):
        options = ("--split", "train") if command in ("saturation", "compare", "landscape") else ()
        done = run("pnanalysis", command, own_run.path, "--data", f"{name}:make", *options)
        assert done.status == 2
        assert "pair of tensors (inputs, targets)" in done.err, command
