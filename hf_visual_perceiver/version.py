"""The package's version, apart from `__init__`, which everything else of the package may not import."""

__version__ = "0.1.0"
