"""How good answers are: exact match, multiple choice by likelihood, captions by CIDEr."""

import re
from collections.abc import Sequence

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

    pycocoevalcap has to be installed (see extras.py).
    """
    from pycocoevalcap.cider.cider import Cider

    own = {i: [normalised(answer)] for i, answer in enumerate(answers)}
    others = {i: [normalised(reference) for reference in some] for i, some in enumerate(references)}
    return float(Cider().compute_score(others, own)[0])
