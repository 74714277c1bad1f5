#!/usr/bin/env python
"""From your own pages to a first decision: look, tokenizer, data, a proposed study, training, laws, report."""

from megamm.commands.start import command

if __name__ == "__main__":
    command()
