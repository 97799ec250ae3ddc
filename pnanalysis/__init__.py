"""Are these two minima different, and which is better? Diagnostics of minima of neural networks.

Public names::

    import pnanalysis as pn
    run = pn.open_run("runs/lenet5")
    ds = pn.hessian(run)
    pn.plots.spectral_density(ds)
"""

from pnanalysis import plots
from pnanalysis.collection import open_runs
from pnanalysis.comparison import compare
from pnanalysis.curvature.density import spectral_density
from pnanalysis.curvature.linear import as_operator
from pnanalysis.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator
from pnanalysis.errors import PnError
from pnanalysis.functional import functional_distance
from pnanalysis.gradients import gradient_split
from pnanalysis.hessian import hessian
from pnanalysis.history import history
from pnanalysis.landscape import landscape
from pnanalysis.monitor import SaturationMonitor
from pnanalysis.runs import Checkpoint, Run, open_run
from pnanalysis.saturation import saturation
from pnanalysis.schema import load, save, validate
from pnanalysis.sharpness import sharpness
from pnanalysis.sources import open_files
from pnanalysis.trajectory import trajectory
from pnanalysis.verdict import verdict

__all__ = [
    "Checkpoint",
    "EmpiricalFisherOperator",
    "GGNOperator",
    "HessianOperator",
    "PnError",
    "Run",
    "SaturationMonitor",
    "as_operator",
    "compare",
    "functional_distance",
    "gradient_split",
    "hessian",
    "history",
    "landscape",
    "load",
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
