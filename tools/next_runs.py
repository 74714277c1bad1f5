#!/usr/bin/env python
"""Propose the runs that shrink the interval of a decision most for a budget of FLOPs."""

from megamm_laws.commands.next_runs import command

if __name__ == "__main__":
    command()
