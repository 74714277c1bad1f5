#!/usr/bin/env python
"""Compare two groups of runs by their fits: who is ahead at which compute, and by how much."""

from megamm_laws.commands.compare_groups import command

if __name__ == "__main__":
    command()
