"""Parts of pages that are generated from the code.

A page contains the mark ``<!-- generated: NAME ARGUMENTS -->`` and below it a line in italics, for those who read the
Markdown itself. Both are replaced by the lines that the generator NAME in :data:`PARTS` yields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

from docs.tools import results
from pnanalysis import plots, schema
from pnanalysis.errors import PnError

_MARK = re.compile(r"^<!-- generated: ([\w-]+)(?: ([\w. ]+))? -->\n\*\(.*\)\*$", flags=re.MULTILINE)


def fill_in(text: str) -> str:
    """The page with every mark replaced by its generated part."""
    return _MARK.sub(lambda match: "\n".join(PARTS[match[1]](*(match[2] or "").split())), text)


def command_line(program: str) -> Iterator[str]:
    """Help, arguments and options of every command of ``pnanalysis`` or ``pntrain``."""
    command = command_of(program)
    if not hasattr(command, "commands"):  # pntrain is a single command
        yield from _command(program, command, "##")
        return
    for name, sub in command.commands.items():
        yield from _command(f"{program} {name}", sub, "##")


@cache
def command_of(program: str) -> Any:
    """The click command behind ``pnanalysis`` or ``pntrain``."""
    import typer

    from pnanalysis.cli import app as analysis
    from trainers.cli import app as trainer

    return typer.main.get_command({"pnanalysis": analysis, "pntrain": trainer}[program])


def _command(name: str, command: Any, heading: str) -> Iterator[str]:
    """A section about one command: text, examples, and a table of options."""
    yield f"{heading} {name}\n"
    # The help texts end with a bold heading and the examples below it.
    text, _, examples = (command.help or "").partition("[bold]")
    yield _with_options(text.strip()) + "\n"
    lines = [line.strip() for line in examples.partition("[/bold]")[2].splitlines() if line.strip()]
    if lines:
        yield "\n".join(["```console", *(f"$ {line}" for line in lines), "```\n"])
    context = command.context_class(command, info_name=name)
    rows = [_parameter(parameter, context) for parameter in command.params if not getattr(parameter, "hidden", False)]
    yield from _table(["option", "default", "meaning"], [row for row in rows if "--help" not in row[0]])


def _with_options(text: str) -> str:
    """The text with options such as ``--seed`` marked as code."""
    return re.sub(r"--[\w-]+", r"`\g<0>`", text)


def _parameter(parameter: Any, context: Any) -> list[str]:
    """The table row of an argument or option: name, default, meaning."""
    meaning = _with_options(parameter.help or "")
    if parameter.param_type_name == "argument":
        return [f"`{parameter.metavar or parameter.name.upper()}`", "", meaning]
    name = parameter.get_help_record(context)[0]
    default = parameter.default
    if isinstance(default, bool):
        shown = "on" if default else ""
    else:
        shown = "" if default in (None, "", ()) else f"`{default}`"
    return [f"`{' '.join(name.split())}`", shown, meaning]


def kinds() -> Iterator[str]:
    """A table of variables for every kind of dataset."""
    for kind, variables in schema.SCHEMAS.items():
        yield f"### {kind}\n"
        first = next(other for other, table in schema.SCHEMAS.items() if table is variables)
        if first != kind:  # kinds that share a table: list it once, and link to it
            yield f"The variables of [{first}](#{first.replace('_', '-')}).\n"
            continue
        rows = [
            [f"`{name}`", ", ".join(v.dims), v.units, v.long_name, "" if v.required else "optional"]
            for name, v in variables.items()
        ]
        yield from _table(["variable", "own dims", "units", "meaning", ""], rows)


def recipes() -> Iterator[str]:
    """The named experiments, with the settings that differ from the defaults of ``Config``."""
    from trainers import RECIPES, Config

    defaults = Config().to_dict()
    rows = []
    for name, recipe in RECIPES.items():
        settings = recipe.config.to_dict()
        changed = [f"{key}={value}" for key, value in settings.items() if value != defaults[key] and key != "recipe"]
        rows.append([f"`{recipe.id}` `{name}`", recipe.summary, ", ".join(changed) or "the defaults"])
    yield from _table(["recipe", "experiment", "settings"], rows)
    yield "The defaults: " + ", ".join(f"{key}={value}" for key, value in defaults.items() if key != "recipe") + "."


def public_names(module: str) -> Iterator[str]:
    """The public names of a module, documented from their docstrings."""
    from importlib import import_module

    package = import_module(module)
    objects = {name: getattr(package, name) for name in package.__all__}
    # Subclasses of PnError have a table of their own (`errors`); modules among the names have their own pages.
    yield from _documented(
        f"{module}.{name}" for name, it in objects.items() if callable(it) and (it is PnError or not _is_error(it))
    )


def figures() -> Iterator[str]:
    """The function of every figure and the name that ``plot`` knows it by, with its documentation."""
    rows = [[f"`{name}`", f"`{path.replace(':', '.')}`"] for name, path in plots.FIGURES.items()]
    yield from _table(["figure", "function"], rows)
    # Several names may share a function: document it once, in the order of the table.
    yield from _documented(dict.fromkeys(path.replace(":", ".") for path in plots.FIGURES.values()))


def documented(*paths: str) -> Iterator[str]:
    """Documentation of objects given by their full names."""
    yield from _documented(paths)


def errors() -> Iterator[str]:
    """A table of the errors that pnanalysis raises, with the first line of their docstrings."""
    yield from _table(
        ["error", "when"], [[f"`{it.__name__}`", (it.__doc__ or "").splitlines()[0]] for it in PnError.__subclasses__()]
    )


def _documented(paths: Iterable[str]) -> Iterator[str]:
    """Autodoc directives, in reStructuredText because that is what autodoc writes."""
    from pkgutil import resolve_name

    yield "```{eval-rst}"
    for path in paths:
        if isinstance(resolve_name(path), type):
            yield f".. autoclass:: {path}\n   :members:\n"
        else:
            yield f".. autofunction:: {path}\n"
    yield "```"


def _is_error(it: Any) -> bool:
    return isinstance(it, type) and issubclass(it, PnError)


def _table(columns: list[str], rows: list[list[str]]) -> Iterator[str]:
    """A Markdown table; bars and line breaks in cells would end them, so they are escaped."""
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
    yield ""


def cost_model() -> Iterator[str]:
    """What spectra cost on 1 to 512 GPUs, by ``benchmarks/cost_model.py``."""
    from benchmarks.cost_model import table

    return table()


PARTS: dict[str, Callable[..., Iterator[str]]] = {
    "command-line": command_line,
    "kinds": kinds,
    "recipes": recipes,
    "public-names": public_names,
    "figures": figures,
    "documented": documented,
    "errors": errors,
    "cost-model": cost_model,
    "results": results.results,
    "kink": results.kink,
    "verdict-rule": results.rule,
}
