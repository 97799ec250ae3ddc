"""Run a command line so that every foreseeable failure is one clear line on standard error."""

from __future__ import annotations

import os
import sys

import click
import typer

from pnanalysis.errors import PnError


def run_app(app: typer.Typer) -> None:
    """Run a typer application; exit status 2 for what the user can mend, 130 for an interrupt."""
    try:
        status = app(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        status = 2
    except (click.Abort, KeyboardInterrupt):
        print("interrupted; what was saved is intact", file=sys.stderr)
        status = 130
    except PnError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename}", file=sys.stderr)
        status = 2
    sys.exit(status if isinstance(status, int) else 0)
