from . import plots as plots
from .activations.monitor import SaturationMonitor as SaturationMonitor
from .analyses.blocks import blocks as blocks
from .analyses.champion import champion as champion
from .analyses.comparison import compare as compare
from .analyses.correlation import correlate as correlate
from .analyses.eigenpairs import eigenpairs as eigenpairs
from .analyses.functional import functional_distance as functional_distance
from .analyses.gradients import gradient_split as gradient_split
from .analyses.hessian import hessian as hessian
from .analyses.history import history as history
from .analyses.landscape import landscape as landscape
from .analyses.learning_coefficient import learning_coefficient as learning_coefficient
from .analyses.saturation import saturation as saturation
from .analyses.sharpness import sharpness as sharpness
from .analyses.trajectory import trajectory as trajectory
from .analyses.verdict import verdict as verdict
from .curvature.operators import EmpiricalFisherOperator as EmpiricalFisherOperator
from .curvature.operators import GGNOperator as GGNOperator
from .curvature.operators import HessianOperator as HessianOperator
from .errors import PnError as PnError
from .inputs.networks import open_files as open_files
from .inputs.text import load_text as load_text
from .io.collection import open_runs as open_runs
from .io.datasets import load as load
from .io.datasets import save as save
from .io.runs import Checkpoint as Checkpoint
from .io.runs import Run as Run
from .io.runs import open_run as open_run
from .monitoring.monitor import CurvatureMonitor as CurvatureMonitor
from .schema import validate as validate
from .spectra.density import spectral_density as spectral_density
from .spectra.linear_operator import as_operator as as_operator

__all__ = [
    "Checkpoint",
    "CurvatureMonitor",
    "EmpiricalFisherOperator",
    "GGNOperator",
    "HessianOperator",
    "PnError",
    "Run",
    "SaturationMonitor",
    "as_operator",
    "blocks",
    "champion",
    "compare",
    "correlate",
    "eigenpairs",
    "functional_distance",
    "gradient_split",
    "hessian",
    "history",
    "landscape",
    "learning_coefficient",
    "load",
    "load_text",
    "open_files",
    "open_run",
    "open_runs",
    "plots",
    "saturation",
    "save",
    "sharpness",
    "spectral_density",
    "trajectory",
    "validate",
    "verdict",
]
