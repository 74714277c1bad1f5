"""Readers: files of many formats to documents.

:func:`open_inputs` lists tasks; calling a task, in any process, yields the documents of one page, pair or
record, and what had to be left out.
"""

from megamm.data.readers.inputs import KINDS, Inputs, open_inputs

__all__ = ["KINDS", "Inputs", "open_inputs"]
