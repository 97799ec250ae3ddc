"""Bad input: every error is one line on standard error and status 2."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from pnanalysis.io.runs import Run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


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
        (("pntrain", "lenet5", "--seed", 2**70), "seed is 1180591620717411303424; it must be"),
        (("pntrain", "lenet5", "--epochs", 10**12), "epochs is 1000000000000; it must be"),
        (("pntrain", "lenet5", "--batch-size", "1e30"), "--batch-size"),
        (("pntrain", "lenet5", "--batch-size", 10**30), "batch_size is 1000000000000000000000000000000; it must be"),
        (("pntrain", "lenet5", "--sweep", "seed=0,1", "--jobs", -5), "jobs is -5; it must be"),
        (("pntrain", "lenet5", "--sweep", "seed=0:10000000"), "more than 10,000 runs"),
        (("pntrain", "tanh7", "--model-option", f"width={'[' * 5000}"), "NAME=JSON"),
        (("pnanalysis", "saturation"), "name a run"),
        (("pnanalysis", "saturation", "/no/such/run"), "no such run"),
        (("pnanalysis", "hessian", "--weights", "a.pt"), "--model"),
        (("pnanalysis", "history"), "name a run"),
        (("pnanalysis", "compare"), "name a run"),
        (("pnanalysis", "info", "/no/such/run"), "no such run"),
        (("pnanalysis", "plot", "/no/such/file.nc"), "no such file"),
        (("pnanalysis", "landscape"), "name a run"),
        (("pnanalysis", "landscape", "/no/such/run", "--view", "plane"), "no such run"),
        (("pnanalysis", "sharpness", "/no/such/run", "--radius", "ball=wide"), "write ball|adaptive|filter|box"),
        (("pnanalysis", "sharpness", "/no/such/run", "--average-radius", "cube=1"), "--average-radius cube=1"),
        (("pnanalysis", "correlate"), "name a folder of runs"),
        (("pnanalysis", "compare", "--radius", "cube=1"), "such as ball=0.05"),
        (("pnanalysis", "correlate", "/no/such/folder"), "no such run"),
        (("pnanalysis", "dance"), "see pnanalysis --help"),
        (("pnanalysis", "hesian"), "Did you mean 'hessian'"),
        (("pnanalysis", "hessian", "--lanczos", "3"), "see pnanalysis hessian --help"),
        (("pnanalysis", "hessian", "--operator", "laplacian", "/no/such/run"), "'ggn'"),
        (("pnanalysis", "landscape", "--view", "sphere", "/no/such/run"), "'plane'"),
        (("pnanalysis", "saturation", "/no/such/run", "--plot", "a.gif"), ".svg"),
        (("pnanalysis", "saturation", "/no/such/run", "-o", "/dev/null/a.nc"), "is a file"),
        (("pnanalysis", "report", "/no/such/run", "-o", "."), "is a folder"),
        (("pnanalysis", "info", __file__), "is not a run directory"),
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


def test_a_pipe_is_no_output(run, tiny_run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = run("pnanalysis", "history", tiny_run.path, "-o", tmp_path / "pipe")
    assert done.status == 2
    assert "device or pipe" in done.err
    assert (tmp_path / "pipe").is_fifo()


def test_an_output_that_cannot_be_written_is_one_line(run, tiny_run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run("pnanalysis", "trajectory", tiny_run.path, "-o", tmp_path / "file" / "t.nc")
    assert done.status == 2
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "spec", "message"),
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
def test_errors_in_the_users_code_are_located(run, tiny_run, tmp_path, monkeypatch, code, spec, message, option):
    name = f"broken_{abs(hash(code + option))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    done = run("pnanalysis", "saturation", tiny_run.path, option, name + spec, "--n", 10)
    assert done.status == 2
    assert message.replace("ID", name) in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("(1, 2, 3)", "is not a batch of inputs and targets"),
        ("[x]", "is not a batch of inputs and targets"),
        ("[{'x': x}]", "has no targets"),
        ("[(x, y, y)]", "the network cannot take these data"),  # two inputs
        ("[{'x': x, 'y': y}]", "the network cannot take these data"),  # an input called x
    ],
)
def test_data_of_other_forms_are_refused(
    run, tiny_run: Run, tmp_path: Path, monkeypatch, batch: str, message: str
) -> None:
    name = f"odd_data_{abs(hash(batch))}"
    (tmp_path / f"{name}.py").write_text(
        f"import torch\nx, y = torch.zeros(8, 1, 8, 8), torch.zeros(8).long()\ndef make():\n    return {batch}\n"
    )
    monkeypatch.chdir(tmp_path)
    for command in ("hessian", "saturation", "compare", "landscape", "sharpness"):
        options = ("--split", "train") if command in ("saturation", "compare", "landscape") else ()
        done = run("pnanalysis", command, tiny_run.path, "--data", f"{name}:make", *options)
        assert done.status == 2
        assert message in done.err, command
        assert done.err.count("\n") == 1


def test_what_is_no_store_is_not_overwritten(run, tiny_run: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.zarr").mkdir()
    done = run("pnanalysis", "trajectory", tiny_run.path, "-o", tmp_path / "notes.zarr")
    assert done.status == 2
    assert "not a Zarr store of pnanalysis; choose another name" in done.err
    assert not list((tmp_path / "notes.zarr").iterdir())


@pytest.mark.parametrize("size", ["0", "-5G", "inf", "nan", "nanG", "1e400G", "9" * 400, "many", ""])
def test_sizes_of_memory_are_numbers_of_bytes(run, tiny_run: Run, size: str) -> None:
    done = run("pnanalysis", "hessian", tiny_run.path, "--memory", size)
    assert done.status == 2
    assert "write a number and K, M, G or T, such as 8G" in done.err
    assert done.err.count("\n") == 1
    assert len(done.err) < 200


@pytest.mark.parametrize("command", ["eigenpairs", "blocks", "saturation", "learning-coefficient", "report"])
def test_what_processes_cannot_divide_is_refused(run, tiny_run: Run, monkeypatch, command: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    outcome = run("pnanalysis", command, tiny_run.path)
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: pnanalysis {command} runs in one process; start it without torchrun")
    monkeypatch.setenv("RANK", "1")
    outcome = run("pnanalysis", command, tiny_run.path)
    assert (outcome.status, outcome.out, outcome.err) == (2, "", "")
