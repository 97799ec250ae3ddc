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
    from pnanalysis.activations.monitor import SaturationMonitor as SaturationMonitor
    from pnanalysis.analyses.comparison import compare as compare
    from pnanalysis.analyses.functional import functional_distance as functional_distance
    from pnanalysis.analyses.gradients import gradient_split as gradient_split
    from pnanalysis.analyses.hessian import hessian as hessian
    from pnanalysis.analyses.history import history as history
    from pnanalysis.analyses.landscape import landscape as landscape
    from pnanalysis.analyses.saturation import saturation as saturation
    from pnanalysis.analyses.sharpness import sharpness as sharpness
    from pnanalysis.analyses.trajectory import trajectory as trajectory
    from pnanalysis.analyses.verdict import verdict as verdict
    from pnanalysis.curvature.operators import EmpiricalFisherOperator as EmpiricalFisherOperator
    from pnanalysis.curvature.operators import GGNOperator as GGNOperator
    from pnanalysis.curvature.operators import HessianOperator as HessianOperator
    from pnanalysis.errors import PnError as PnError
    from pnanalysis.inputs.sources import open_files as open_files
    from pnanalysis.io.collection import open_runs as open_runs
    from pnanalysis.io.runs import Checkpoint as Checkpoint
    from pnanalysis.io.runs import Run as Run
    from pnanalysis.io.runs import open_run as open_run
    from pnanalysis.schema import load as load
    from pnanalysis.schema import save as save
    from pnanalysis.schema import validate as validate
    from pnanalysis.spectra.density import spectral_density as spectral_density
    from pnanalysis.spectra.linear_operator import as_operator as as_operator

_WHERE = {
    "Checkpoint": "pnanalysis.io.runs",
    "EmpiricalFisherOperator": "pnanalysis.curvature.operators",
    "GGNOperator": "pnanalysis.curvature.operators",
    "HessianOperator": "pnanalysis.curvature.operators",
    "PnError": "pnanalysis.errors",
    "Run": "pnanalysis.io.runs",
    "SaturationMonitor": "pnanalysis.activations.monitor",
    "as_operator": "pnanalysis.spectra.linear_operator",
    "compare": "pnanalysis.analyses.comparison",
    "functional_distance": "pnanalysis.analyses.functional",
    "gradient_split": "pnanalysis.analyses.gradients",
    "hessian": "pnanalysis.analyses.hessian",
    "history": "pnanalysis.analyses.history",
    "landscape": "pnanalysis.analyses.landscape",
    "load": "pnanalysis.schema",
    "open_files": "pnanalysis.inputs.sources",
    "open_run": "pnanalysis.io.runs",
    "open_runs": "pnanalysis.io.collection",
    "plots": "pnanalysis.plots",
    "saturation": "pnanalysis.analyses.saturation",
    "save": "pnanalysis.schema",
    "sharpness": "pnanalysis.analyses.sharpness",
    "spectral_density": "pnanalysis.spectra.density",
    "trajectory": "pnanalysis.analyses.trajectory",
    "validate": "pnanalysis.schema",
    "verdict": "pnanalysis.analyses.verdict",
}
__all__ = [*_WHERE]
offer(__name__, _WHERE)
