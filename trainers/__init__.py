"""The trainer: plain and persistent training into run directories."""

import lazy_loader

# __init__.pyi lists the names and where they are defined; each is imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
