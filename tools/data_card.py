#!/usr/bin/env python
"""Draw the card of a prepared dataset: one HTML page with counts, lengths, samples and what was left out."""

from megamm.commands.data_card import command

if __name__ == "__main__":
    command()
