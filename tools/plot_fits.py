#!/usr/bin/env python
"""Draw fits for a paper: frontiers with bands, residuals against N, D and C, correlations, hold-out (PNG and PDF)."""

from megamm_laws.commands.plot_fits import command

if __name__ == "__main__":
    command()
