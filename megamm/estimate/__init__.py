"""What a training run takes on a cluster - memory, communication, time - from its config alone, without a GPU.

    tokens.py      what a position of a packed row holds: patches, labels, query-key pairs
    operations.py  FLOPs and bytes of every group of operations, forward and backward
    memory.py      bytes that a rank holds
    step.py        communication, step time and MFU of a layout on a GPU
    outputs.py     the same as a table and as JSON

Times are those of a roofline with assumed efficiencies: what the hardware allows, not what was measured.
"""
