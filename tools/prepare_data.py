#!/usr/bin/env python
"""Prepare one data source for training: shards of token ids and resized images, with dataset.json."""

from megamm.commands.prepare_data import command

if __name__ == "__main__":
    command()
