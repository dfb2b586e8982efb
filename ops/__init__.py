"""Operators of the dialect, one a file: reference, kernel, shape rule, gradient, cost, samples."""

import importlib
import pkgutil


def import_ops() -> None:
    """Fill the table of ops: each file defines its own as it is imported."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
