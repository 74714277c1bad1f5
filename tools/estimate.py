#!/usr/bin/env python
"""Estimate memory, communication, bubble, step time and MFU of a training run without a GPU, or rank its layouts."""

from megamm.commands.estimate import command

if __name__ == "__main__":
    command()
