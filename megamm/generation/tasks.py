"""How good answers are: exact match, multiple choice by likelihood, captions by CIDEr."""

import re
from collections.abc import Sequence
from typing import Any

from megamm.errors import InputError

ARTICLES = {"a", "an", "the"}


def normalised(answer: str) -> str:
    """As the VQA metric compares: small letters, no punctuation, no articles (arXiv 1505.00468, evaluation code)."""
    words = re.sub(r"[^\w\s]", " ", answer.lower()).split()
    return " ".join(word for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Share of credit of an answer: min(matches / 3, 1) of ten and more human answers, 1 for a match of fewer.

    With ten answers the mean over the ten subsets of nine is taken (arXiv 1505.00468, section 3).
    """
    own, others = normalised(answer), [normalised(reference) for reference in references]
    if len(others) < 10:
        return float(own in others)
    matches = [sum(own == other for j, other in enumerate(others) if j != i) for i in range(len(others))]
    return sum(min(m / 3, 1.0) for m in matches) / len(others)


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of captions (arXiv 1411.5726): document frequencies are those of the references given.

    Raises:
        InputError: the package that computes it is missing.
    """
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise InputError(
            "--task caption: CIDEr needs pycocoevalcap, which is missing; pip install '.[eval]' from this folder"
        ) from error
    own = {i: [normalised(answer)] for i, answer in enumerate(answers)}
    others = {i: [normalised(reference) for reference in some] for i, some in enumerate(references)}
    return float(Cider().compute_score(others, own)[0])


def references_of(record: dict[str, Any], where: str) -> list[str]:
    """The right answers of a record: ``answers``, a list, or ``answer``.

    Raises:
        InputError: neither is there.
    """
    found = record.get("answers", record.get("answer"))
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not found or not all(isinstance(answer, str) for answer in found):
        raise InputError(f"{where}: answer: expected text, or answers: a list of texts")
    return found


def choices_of(record: dict[str, Any], where: str) -> tuple[list[str], int]:
    """The ``choices`` of a record and the number of the right one, ``answer``: a number or one of them.

    Raises:
        InputError: they are missing or do not fit together.
    """
    choices, answer = record.get("choices"), record.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise InputError(f"{where}: choices: expected a list of at least two texts")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise InputError(f"{where}: answer: expected one of the choices, or its number from 0 to {len(choices) - 1}")
    return choices, answer
