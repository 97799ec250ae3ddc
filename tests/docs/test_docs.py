"""Every Python block of the documentation runs, every command in it exists, and every link has a target."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from docs.tools.blocks import code_blocks, commands, run_page
from docs.tools.generate import command_of, fill_in
from tests.cases import cases

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path for path in DOCS.glob("**/*.md") if "_build" not in path.parts)
TEXTS = [*PAGES, DOCS.parent / "README.md"]
PROGRAMS = ("pnanalysis", "pntrain")
#: Pages whose code takes longest; `make test-slow` runs it, and `make docs` that of pages with figures, too.
SLOW = (
    "docs/gallery", "docs/howto/hugging-face", "docs/howto/language-models", "docs/howto/own-model",
    "docs/howto/sweeps",
    *(f"docs/concepts/{name}" for name in (
        "alignment", "blocks", "champion", "correlation", "curvature-monitor", "eigenpairs", "error-bars",
        "learning-coefficient", "reading-spectra", "sharpness",
    )),
)  # fmt: skip


def check_command(line: str) -> None:
    """Parse a command without running it.

    Raises
    ------
    Exception
        The parser's own, if there is no such command or option, or a value is not of the option's type.
    """
    program, *arguments = shlex.split(line)
    command = command_of(program)
    if hasattr(command, "commands"):
        name, command, arguments = command.resolve_command(command.context_class(command), arguments)
        program = f"{program} {name}"
    command.make_context(program, arguments)


def name_of(path: Path) -> str:
    """The page's path below the repository, without suffix, as a test's id."""
    return path.relative_to(DOCS.parent).with_suffix("").as_posix()


@pytest.mark.parametrize(
    "page", cases({name_of(page): page for page in PAGES if code_blocks(page.read_text(), "python")}, SLOW)
)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.random.get_rng_state()  # pages set seeds, which other tests must not notice
    try:
        skipped = run_page(page)
    finally:
        torch.random.set_rng_state(state)
    if skipped:
        pytest.skip("; ".join(skipped))


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_commands_on_a_page_exist(page: Path) -> None:
    for line in commands(fill_in(page.read_text())):
        if line.split()[0] in PROGRAMS:
            check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "pnanalysis hessian runs/x --n-hvps 10",
        "pnanalysis hessain runs/x",
        "pnanalysis hessian runs/x --n-hvp many",
        "pntrain lenet5 --lambda 1",
        "pnanalysis info",
    ],
)
def test_commands_that_do_not_exist_are_found(line: str) -> None:
    with pytest.raises(Exception, match=r"No such (option|command)|valid integer|Missing"):
        check_command(line)


def test_commands_are_found_in_console_blocks_only() -> None:
    text = "```console\n$ pntrain S1 \\\n  --out x  # why\nprinted\n```\n\n```text\n$ pntrain S2\n```\n"
    assert [shlex.split(line) for line in commands(text)] == [["pntrain", "S1", "--out", "x"]]


def test_blocks_without_their_packages_are_skipped_and_so_are_those_that_depend_on_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    blocks = ["a = 1", "from no_such_package import f\nb = f(a)", "c = b + 1", "import no_such_module.part", "d = a"]
    page.write_text("".join(f"```python\n{block}\n```\n\n" for block in blocks))
    names: dict[str, object] = {"__name__": "page"}
    assert [reason.partition(": ")[2] for reason in run_page(page, names)] == [
        "no no_such_package", "no b", "no no_such_module.part",
    ]  # fmt: skip
    assert names["d"] == 1
    assert "c" not in names


@pytest.mark.parametrize(
    ("block", "error"),
    [("assert False", AssertionError), ("import pnanalysis as pn\npn.no_such_name(1)", AttributeError)],
)
def test_an_error_in_a_block_is_raised(block: str, error: type[Exception], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```python\n{block}\n```\n")
    with pytest.raises(error):
        run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_have_a_target(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([\w./-]+\.(?:md|png))(?:#[\w-]*)?\)", page.read_text())
    stored = [target for target in targets if "_figures/" not in target]  # figures are drawn when the site is built
    assert [target for target in stored if not (page.parent / target).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_is_no_wider_than_the_page(page: Path) -> None:
    text = page.read_text()
    blocks = [block for language in ("python", "console", "text") for block in code_blocks(text, language)]
    assert not [line for block in blocks for line in block.splitlines() if len(line) > 94]


def test_references_are_complete() -> None:
    """The generated parts contain every command, every kind of dataset and every public name."""
    import pnanalysis as pn
    from pnanalysis.schema import SCHEMAS

    pages = {path.stem: fill_in(path.read_text()) for path in (DOCS / "reference").glob("*.md")}
    for name in command_of("pnanalysis").commands:
        assert f"\n## pnanalysis {name}\n" in pages["command-line"]
    assert "`--sweep NAME=A,B" in pages["command-line"]
    for kind, variables in SCHEMAS.items():
        assert f"### {kind}\n" in pages["schema"]
        assert all(f"`{name}`" in pages["schema"] for name in variables)
    for name in set(pn.__all__) - {"plots"}:
        assert re.search(rf"auto(function|class):: pnanalysis\.{name}\n", pages["api"])
