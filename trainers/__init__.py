"""The trainer: plain and persistent training into run directories."""

import lazy_loader

# The names and where they are defined stand in __init__.pyi; none is imported before it is asked for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
