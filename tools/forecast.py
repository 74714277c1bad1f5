#!/usr/bin/env python
"""Forecast the loss of a run before it is trained, score the forecast afterwards, and keep the record."""

from megamm_laws.commands.forecast import command

if __name__ == "__main__":
    command()
