"""Types of command-line arguments, for argparse."""

import argparse


def not_negative(text: str) -> int:
    """A whole number of zero or more, such as a seed."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of zero or more")
    return value
