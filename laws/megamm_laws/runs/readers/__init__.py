"""Readers of training logs, one file per format.

A reader takes a path and returns the :class:`~megamm_laws.runs.readers.curve.Curve` of each run in it, or None if the
path is not of its format. To add a format, write such a function and list it in ``megamm_laws.runs.collect.READERS``.
"""
