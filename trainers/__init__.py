"""The trainer: plain and persistent training into run directories."""

from trainers.fit import fit
from trainers.persistence import PersistentPenalty
from trainers.recipes import RECIPES, Config, configure, find_recipe
from trainers.strategies import train

__all__ = ["RECIPES", "Config", "PersistentPenalty", "configure", "find_recipe", "fit", "train"]
