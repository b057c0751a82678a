"""scanloom: real medical scans -> a generator -> synthetic cohorts, with evidence."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("scanloom")
