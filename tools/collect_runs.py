#!/usr/bin/env python
"""Collect runs from training logs into one table, runs.csv."""

from megamm_laws.commands.collect_runs import command

if __name__ == "__main__":
    command()
