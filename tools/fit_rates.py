#!/usr/bin/env python
"""The best learning rate, or batch, of every size and length that was swept, and the law through them."""

from megamm_laws.commands.fit_rates import command

if __name__ == "__main__":
    command()
