"""Weights to and from other programs: Hugging Face folders, and plain safetensors under our own names.

layouts.py    how our matrices are made of theirs        names.py     which tensor is which
families.py   config.json <-> model settings             tensors.py   safetensors files, one tensor at a time
weights.py    one view of runs, checkpoints and folders  convert.py   from one to another
start.py      the first values of a run
"""
