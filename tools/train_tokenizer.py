#!/usr/bin/env python
"""Train a byte-level BPE tokenizer on the text of pages, captions, text files, tables or generated scenes."""

from megamm.commands.train_tokenizer import command

if __name__ == "__main__":
    command()
