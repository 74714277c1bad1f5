"""Whole-or-nothing file output, and JSON read back; ``megamm_laws``, a library of its own, defines both for all."""

from megamm_laws.files import atomic_path, check_out, read_json, write_json, write_text

__all__ = ["atomic_path", "check_out", "read_json", "write_json", "write_text"]
