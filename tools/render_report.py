#!/usr/bin/env python
"""Render a study as one HTML page that needs no network, with PNG plots beside it."""

from megamm.commands.render_report import command

if __name__ == "__main__":
    command()
