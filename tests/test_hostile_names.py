"""Names of runs, layers, checkpoints and files may hold any characters: none reaches the terminal or a figure raw."""

from __future__ import annotations

import os
import sys
import warnings
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text

import pnanalysis as pn
from pnanalysis.errors import PnError, printable
from pnanalysis.io.runs import Run
from pnanalysis.terminal import console
from pnanalysis.terminal.progress import progress_bar
from tests.cases import cases
from tests.cli.conftest import TINY
from tests.cli.conftest import run as run

#: Clears a screen, sets a title, a C1 control, reversed text, markup, an emoji, half a formula, a line break.
HOSTILE = "a\x1b[2J\x1b]0;x\x07\x9b31m\u202eb[/red]:smile:$\\frac\nc"
RAW = set("\x1b\x07\x9b\u202e\x08\r")


class Terminal(StringIO):
    """A terminal that keeps what it is given."""

    def isatty(self) -> bool:
        return True


def test_printable_keeps_what_can_be_read() -> None:
    assert printable("épée – 20 µm [1] \\ 層 🙂") == "épée – 20 µm [1] \\ 層 🙂"
    assert printable("\x1b[0m\n\x85\u2028\udcff") == r"\x1b[0m\n\x85\u2028\udcff"
    assert str(PnError(f"{HOSTILE}: no such file")) == printable(f"{HOSTILE}: no such file")


@pytest.mark.parametrize("channel", ["table", "line", "status", "saved", "warning", "progress"])
def test_channels_to_the_terminal_escape(monkeypatch: pytest.MonkeyPatch, channel: str) -> None:
    shown = StringIO() if channel != "progress" else Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)
    match channel:
        case "table":
            console.print_table(console.make_table(HOSTILE, [HOSTILE], [[HOSTILE]]))
        case "line":
            console.print_line(HOSTILE)
        case "status":
            console.print_status(HOSTILE)
        case "saved":
            console.print_saved(False, HOSTILE)
        case "warning":
            with console._printable_warnings():
                shown.write(warnings.formatwarning(HOSTILE, UserWarning, f"{HOSTILE}.py", 1, "a line of it"))
        case "progress":
            with progress_bar(HOSTILE, 2) as advance:
                advance(1, HOSTILE)
    text = shown.getvalue()
    if channel == "progress":  # the bar itself moves the cursor
        assert not any(part in text for part in ("\x1b[2J", "\x1b]0;", "\x9b", "\u202e", "\x07"))
    else:
        assert not RAW & set(text)
    assert r"\x1b[2J" in text.replace("\n", "")
    if channel in ("line", "status", "saved"):
        assert text.endswith(printable(HOSTILE) + "\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("pnanalysis", "info", HOSTILE),
        ("pnanalysis", "saturation", HOSTILE),
        ("pnanalysis", "plot", HOSTILE),
        ("pnanalysis", "saturation", "x", f"--{HOSTILE}"),
        ("pnanalysis", HOSTILE),
        ("pntrain", HOSTILE),
        ("pntrain", "lenet5", "--data", f"imagefolder:{HOSTILE}"),
        ("pntrain", "lenet5", "--model", f"{HOSTILE}:make"),
        ("pntrain", "lenet5", "--sweep", f"{HOSTILE}=1"),
        ("pntrain", "lenet5", "--layers", HOSTILE, "--data", "digits"),
        ("pntrain", "lenet5", "--epochs", HOSTILE),
    ],
    ids=lambda arguments: " ".join(printable(part) for part in arguments),
)
def test_errors_escape(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.status == 2
    assert not RAW & set(done.out + done.err)
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    "name", cases({"controls": HOSTILE.replace("/", "-"), "bytes": os.fsdecode(b"caf\xe9-\xff")}, ("bytes",))
)
def test_runs_of_any_name_are_trained_analysed_drawn_and_reported(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcomes = [
        run("pntrain", "tanh7", *TINY, "--iterations", 2, "--epochs", 1, "--out", name),
        run("pnanalysis", "history", name, "-o", f"{name}.nc", "--plot", f"{name}.png"),
        run("pnanalysis", "compare", name, "--no-hessian", "--n", 20, "--plot", f"{name}.svg"),
        run("pnanalysis", "info", name),
        run("pnanalysis", "info", name, "--verify"),
        run("pnanalysis", "report", name, "-o", f"{name}.html"),
    ]
    for done in outcomes:
        assert done.status == 0, done.err
        assert not RAW & set(done.out + done.err)


def test_figures_show_names_as_they_are_and_without_controls(tiny_run: Run) -> None:
    ds = pn.saturation(tiny_run, checkpoints=("plain", "champion"), n=20, progress=False)
    named = ds.assign_coords(
        layer=[f"$\\frac{{$ {i} \x1b[2J" for i in range(ds.sizes["layer"])],
    )
    figure = pn.plots.plot(named)
    figure.canvas.draw()
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert any("frac" in text for text in texts)
    assert not RAW & set("".join(texts))
    np.testing.assert_array_equal(named.layer.values[0], "$\\frac{$ 0 \x1b[2J")  # the caller's own stays as it is
