"""Are these two minima different, and which is better? Diagnostics of minima of neural networks.

Public names::

    import pnanalysis as pn
    run = pn.open_run("runs/lenet5")
    ds = pn.hessian(run)
    pn.plots.spectral_density(ds)
"""

import lazy_loader

# The names and where they are defined stand in __init__.pyi; none is imported before it is asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
