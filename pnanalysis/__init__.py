"""Are these two minima different, and which is better? Diagnostics of minima of neural networks.

Public names::

    import pnanalysis as pn
    run = pn.open_run("runs/lenet5")
    ds = pn.hessian(run)
    pn.plots.spectral_density(ds)
"""

from typing import TYPE_CHECKING

from pnanalysis.lazy import offer

if TYPE_CHECKING:
    from pnanalysis import plots as plots
    from pnanalysis.collection import open_runs as open_runs
    from pnanalysis.comparison import compare as compare
    from pnanalysis.curvature.density import spectral_density as spectral_density
    from pnanalysis.curvature.linear import as_operator as as_operator
    from pnanalysis.curvature.operators import EmpiricalFisherOperator as EmpiricalFisherOperator
    from pnanalysis.curvature.operators import GGNOperator as GGNOperator
    from pnanalysis.curvature.operators import HessianOperator as HessianOperator
    from pnanalysis.errors import PnError as PnError
    from pnanalysis.functional import functional_distance as functional_distance
    from pnanalysis.gradients import gradient_split as gradient_split
    from pnanalysis.hessian import hessian as hessian
    from pnanalysis.history import history as history
    from pnanalysis.landscape import landscape as landscape
    from pnanalysis.monitor import SaturationMonitor as SaturationMonitor
    from pnanalysis.runs import Checkpoint as Checkpoint
    from pnanalysis.runs import Run as Run
    from pnanalysis.runs import open_run as open_run
    from pnanalysis.saturation import saturation as saturation
    from pnanalysis.schema import load as load
    from pnanalysis.schema import save as save
    from pnanalysis.schema import validate as validate
    from pnanalysis.sharpness import sharpness as sharpness
    from pnanalysis.sources import open_files as open_files
    from pnanalysis.trajectory import trajectory as trajectory
    from pnanalysis.verdict import verdict as verdict

_WHERE = {
    "Checkpoint": "pnanalysis.runs",
    "EmpiricalFisherOperator": "pnanalysis.curvature.operators",
    "GGNOperator": "pnanalysis.curvature.operators",
    "HessianOperator": "pnanalysis.curvature.operators",
    "PnError": "pnanalysis.errors",
    "Run": "pnanalysis.runs",
    "SaturationMonitor": "pnanalysis.monitor",
    "as_operator": "pnanalysis.curvature.linear",
    "compare": "pnanalysis.comparison",
    "functional_distance": "pnanalysis.functional",
    "gradient_split": "pnanalysis.gradients",
    "hessian": "pnanalysis.hessian",
    "history": "pnanalysis.history",
    "landscape": "pnanalysis.landscape",
    "load": "pnanalysis.schema",
    "open_files": "pnanalysis.sources",
    "open_run": "pnanalysis.runs",
    "open_runs": "pnanalysis.collection",
    "plots": "pnanalysis.plots",
    "saturation": "pnanalysis.saturation",
    "save": "pnanalysis.schema",
    "sharpness": "pnanalysis.sharpness",
    "spectral_density": "pnanalysis.curvature.density",
    "trajectory": "pnanalysis.trajectory",
    "validate": "pnanalysis.schema",
    "verdict": "pnanalysis.verdict",
}
__all__ = [*_WHERE]
offer(__name__, _WHERE)
