#!/usr/bin/env python
"""Train all runs of a study; finished ones are skipped, and what was killed goes on where it was."""

from megamm.commands.run_study import command

if __name__ == "__main__":
    command()
