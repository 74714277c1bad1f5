#!/usr/bin/env python
"""Compute-optimal sizes from isoFLOP profiles: isoflops.json, isoflops.md and plots."""

from megamm_laws.commands.fit_isoflops import command

if __name__ == "__main__":
    command()
