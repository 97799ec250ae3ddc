from .loop.fit import fit as fit
from .loop.persistence import PersistentPenalty as PersistentPenalty
from .recipes import RECIPES as RECIPES
from .recipes import Config as Config
from .recipes import configure as configure
from .recipes import find_recipe as find_recipe
from .runs.strategies import train as train

__all__ = [
    "RECIPES",
    "Config",
    "PersistentPenalty",
    "configure",
    "find_recipe",
    "fit",
    "train",
]
