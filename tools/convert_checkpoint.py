#!/usr/bin/env python
"""Convert weights between megamm runs and Hugging Face folders."""

from megamm.commands.convert_checkpoint import command

if __name__ == "__main__":
    command()
