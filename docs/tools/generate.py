"""Parts of pages that are made from the code: ``<!-- generated: NAME -->`` in a page, with the line below it that says
so to who reads the page as it is, becomes what NAME gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from pnanalysis import plots, schema
from pnanalysis.errors import PnError

_MARK = re.compile(r"^<!-- generated: ([\w-]+)(?: ([\w. ]+))? -->\n\*\(.*\)\*$", flags=re.MULTILINE)


def fill_in(text: str) -> str:
    """The page with every mark replaced."""
    return _MARK.sub(lambda match: "\n".join(PARTS[match[1]](*(match[2] or "").split())), text)


def command_line(program: str) -> Iterator[str]:
    """Every command of ``pnanalysis`` or ``pntrain``: its help, arguments and options."""
    command = command_of(program)
    if not hasattr(command, "commands"):
        yield from _command(program, command, "##")
        return
    for name, sub in command.commands.items():
        yield from _command(f"{program} {name}", sub, "##")


def command_of(program: str) -> Any:
    """The click command behind ``pnanalysis`` or ``pntrain``."""
    import typer

    from pnanalysis.cli import app as analysis
    from trainers.cli import app as trainer

    return typer.main.get_command({"pnanalysis": analysis, "pntrain": trainer}[program])


def _command(name: str, command: Any, heading: str) -> Iterator[str]:
    yield f"{heading} {name}\n"
    text, _, examples = (command.help or "").partition("[bold]")
    yield _with_options(text.strip()) + "\n"
    lines = [line.strip() for line in examples.partition("[/bold]")[2].splitlines() if line.strip()]
    if lines:
        yield "\n".join(["```console", *(f"$ {line}" for line in lines), "```\n"])
    context = command.context_class(command, info_name=name)
    rows = [_parameter(parameter, context) for parameter in command.params if not getattr(parameter, "hidden", False)]
    yield from _table(["option", "default", "meaning"], [row for row in rows if "--help" not in row[0]])


def _with_options(text: str) -> str:
    """The text with options set as code."""
    return re.sub(r"--[\w-]+", r"`\g<0>`", text)


def _parameter(parameter: Any, context: Any) -> list[str]:
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
        same = next(other for other, table in schema.SCHEMAS.items() if table is variables)
        if same != kind:
            yield f"The variables of [{same}](#{same.replace('_', '-')}).\n"
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
        own = [f"{key}={value}" for key, value in settings.items() if value != defaults[key] and key != "recipe"]
        rows.append([f"`{recipe.id}` `{name}`", recipe.summary, ", ".join(own) or "the defaults"])
    yield from _table(["recipe", "what", "settings"], rows)
    yield "The defaults: " + ", ".join(f"{key}={value}" for key, value in defaults.items() if key != "recipe") + "."


def public_names(module: str) -> Iterator[str]:
    """The public names of a module, documented from their docstrings."""
    from importlib import import_module

    found = import_module(module)
    objects = {name: getattr(found, name) for name in found.__all__}
    yield from _documented(
        f"{module}.{name}" for name, it in objects.items() if callable(it) and not (_is_error(it) and it is not PnError)
    )


def figures() -> Iterator[str]:
    """The function of every figure, under the name that ``plot`` knows it by."""
    rows = [[f"`{name}`", f"`{path.replace(':', '.')}`"] for name, path in plots.FIGURES.items()]
    yield from _table(["figure", "function"], rows)
    yield from _documented(dict.fromkeys(path.replace(":", ".") for path in plots.FIGURES.values()))


def documented(*paths: str) -> Iterator[str]:
    """Objects by their full names."""
    yield from _documented(paths)


def errors() -> Iterator[str]:
    """Every error that is raised on purpose."""
    yield from _table(
        ["error", "when"], [[f"`{it.__name__}`", (it.__doc__ or "").splitlines()[0]] for it in PnError.__subclasses__()]
    )


def _documented(paths: Any) -> Iterator[str]:
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
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
    yield ""


PARTS: dict[str, Callable[..., Iterator[str]]] = {
    "command-line": command_line,
    "kinds": kinds,
    "recipes": recipes,
    "public-names": public_names,
    "figures": figures,
    "documented": documented,
    "errors": errors,
}
