#!/usr/bin/env python
"""Fit scaling laws to a table of runs: fits.json, fits.md, bootstrap.npz and plots."""

from megamm_laws.commands.fit_scaling_laws import command

if __name__ == "__main__":
    command()
