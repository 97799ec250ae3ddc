"""The trainer: plain and persistent training into run directories."""

from typing import TYPE_CHECKING

from pnanalysis.lazy import offer

if TYPE_CHECKING:
    from trainers.loop.fit import fit as fit
    from trainers.loop.persistence import PersistentPenalty as PersistentPenalty
    from trainers.recipes import RECIPES as RECIPES
    from trainers.recipes import Config as Config
    from trainers.recipes import configure as configure
    from trainers.recipes import find_recipe as find_recipe
    from trainers.runs.strategies import train as train

_WHERE = {
    "Config": "trainers.recipes",
    "PersistentPenalty": "trainers.loop.persistence",
    "RECIPES": "trainers.recipes",
    "configure": "trainers.recipes",
    "find_recipe": "trainers.recipes",
    "fit": "trainers.loop.fit",
    "train": "trainers.runs.strategies",
}
__all__ = [*_WHERE]
offer(__name__, _WHERE)
