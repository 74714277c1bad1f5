"""Whole-or-nothing file output; ``megamm_laws``, a library of its own, defines it for both."""

from megamm_laws.files import atomic_path, check_out, write_json, write_text

__all__ = ["atomic_path", "check_out", "write_json", "write_text"]
