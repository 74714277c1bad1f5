"""Other people's attention behind the interface of :mod:`megamm_kernels.interval_attention`.

Each file has a mask (a named tuple made once per batch), ``make_mask`` that makes it from the intervals, and ``attend``
that takes q, k, v [B, S, H, D] and returns the output and, if asked for, the log-sum-exp [B, S, H].
"""
