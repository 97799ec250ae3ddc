"""Every Python block of the documentation runs, every command in it exists, and links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from docs.tools.blocks import code_blocks, commands, run_page
from docs.tools.generate import command_of, fill_in

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path for path in DOCS.glob("**/*.md") if "_build" not in path.parts)
TEXTS = [*PAGES, DOCS.parent / "README.md"]
PROGRAMS = ("pnanalysis", "pntrain")


def check_command(line: str) -> None:
    """Parse a command without running it.

    Raises
    ------
    Exception
        Of the command-line parser, if the command, an option or a value is not one.
    """
    program, *arguments = shlex.split(line)
    command = command_of(program)
    if hasattr(command, "commands"):
        name, command, arguments = command.resolve_command(command.context_class(command), arguments)
        program = f"{program} {name}"
    command.make_context(program, arguments)


def name_of(path: Path) -> str:
    return path.relative_to(DOCS.parent).with_suffix("").as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if code_blocks(p.read_text(), "python")], ids=name_of)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.random.get_rng_state()
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
def test_commands_that_do_not_exist_are_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r"No such (option|command)|valid integer|Missing"):
        check_command(line)


def test_commands_are_found_in_console_blocks_only() -> None:
    text = "```console\n$ pntrain S1 \\\n  --out x  # why\nprinted\n```\n\n```text\n$ pntrain S2\n```\n"
    assert [shlex.split(line) for line in commands(text)] == [["pntrain", "S1", "--out", "x"]]


def test_blocks_that_need_what_is_not_there_are_left_out_with_what_depends_on_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    blocks = ["import pnanalysis as pn\na = 1", "b = pn.no_such_name(a)", "c = b + 1", "import no_such_module", "d = a"]
    page.write_text("".join(f"```python\n{block}\n```\n\n" for block in blocks))
    names: dict[str, object] = {"__name__": "page"}
    assert [reason.partition(": ")[2] for reason in run_page(page, names)] == [
        "no pn.no_such_name", "no b", "no no_such_module",
    ]  # fmt: skip
    assert names["d"] == 1
    assert "c" not in names


def test_a_block_that_fails_fails_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nassert False\n```\n")
    with pytest.raises(AssertionError):
        run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([\w./-]+\.(?:md|png))(?:#[\w-]*)?\)", page.read_text()):
        assert "_figures/" in target or (page.parent / target).is_file(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_is_no_wider_than_the_page(page: Path) -> None:
    text = page.read_text()
    blocks = [block for language in ("python", "console", "text") for block in code_blocks(text, language)]
    assert not [line for block in blocks for line in block.splitlines() if len(line) > 94]


def test_references_are_complete() -> None:
    """What is generated names every command, every kind of dataset and every public name."""
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
