"""Packages that import what they offer when it is first asked for: a command line answers before torch is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _LazyPackage(ModuleType):
    """A package whose public names are looked up in its modules, and whose modules are its attributes.

    A submodule that is called like the function it defines never hides that function, whichever is imported first.
    """

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__["_WHERE"].get(name)
        if module is not None:
            found = import_module(module)
            value = getattr(found, name, found)
            setattr(self, name, value)
            return value
        if name.startswith("__") or find_spec(f"{self.__name__}.{name}") is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return import_module(f"{self.__name__}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in self.__dict__["_WHERE"]:
            value = getattr(value, name, value)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__dict__["_WHERE"]})


def offer(package: str, where: Mapping[str, str]) -> None:
    """Make a package offer names without importing their modules yet.

    Parameters
    ----------
    package : str
        Its ``__name__``.
    where : mapping of str to str
        The module that defines each name; a subpackage stands for itself.
    """
    module = sys.modules[package]
    module.__dict__["_WHERE"] = dict(where)
    module.__class__ = _LazyPackage
