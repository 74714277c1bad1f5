#!/usr/bin/env python
"""Let a trained model go on from prompts with images."""

from megamm.commands.generate import command

if __name__ == "__main__":
    command()
