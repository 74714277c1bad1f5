"""The parser of every command line, and types of its arguments."""

import argparse
from typing import NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but bad arguments end in one line on stderr and exit code 2, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; see --help\n")


def not_negative(text: str) -> int:
    """A whole number of zero or more, such as a seed."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of zero or more")
    return value


def flops_list(text: str) -> tuple[float, ...]:
    """Budgets with commas, such as 1e21,1e22."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (0.0,)
    if not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not FLOPs above zero with commas, such as 1e21,1e22")
    return values
