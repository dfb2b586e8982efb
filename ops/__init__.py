"""Operators of the dialect, one a file: reference, kernel, shape rule, gradient, cost, samples."""
