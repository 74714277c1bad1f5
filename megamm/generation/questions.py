"""Files of prompts, and tasks: prompts whose right answers are known, so that a model's can be scored.

A line of a JSONL has "prompt" and "images" (a list of files, relative to the JSONL; or "image"). A task needs more:

    vqa      "answer" or "answers"
    choice   "choices", and "answer": one of them, or its number
    caption  "answer" or "answers"
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamm.errors import InputError
from megamm.generation.answers import Answerer
from megamm.generation.tasks import cider, vqa_accuracy


@dataclass(kw_only=True)
class Question:
    """A line of a file of prompts.

    Attributes:
        number: among all of the file, from 0.
        record: the line as it stands there.
        where: file and line, for messages.
        choices: of which the model picks one; empty where it writes its answer.
        references: right answers; empty where none is needed.
    """

    number: int
    record: dict[str, Any]
    images: list[Path]
    where: str
    choices: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)

    @property
    def prompt(self) -> str:
        return self.record["prompt"]


def read_questions(path: Path, task: str | None = None) -> list[Question]:
    """The lines of a JSONL of prompts.

    Args:
        task: the kind of task; without one nothing but prompts and images is looked at.

    Raises:
        InputError: names the line and what is wrong with it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    found: list[Question] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise InputError(f'{where}: expected a mapping with "prompt", a text')
        images = record.get("images", record.get("image", []))
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
            raise InputError(f"{where}: images: expected a list of files")
        question = Question(
            number=len(found), record=record, images=[path.parent / name for name in images], where=where
        )
        if task == "choice":
            question.choices, right = _choices_of(record, where)
            question.references = [question.choices[right]]
        elif task is not None:
            question.references = _references_of(record, where)
        found.append(question)
    if not found:
        raise InputError(f"{path}: no prompt in it")
    return found


def answer(answerer: Answerer, questions: Sequence[Question]) -> list[str]:
    """The answers to some questions of one file: text, or the choices that are picked."""
    prompts = [answerer.prompt(one.prompt, one.images, one.where) for one in questions]
    if any(one.choices for one in questions):
        picked = zip(questions, prompts, strict=True)
        return [one.choices[answerer.choose(prompt, one.choices)] for one, prompt in picked]
    return answerer.answers(prompts, [one.number for one in questions])


def score(task: str, questions: Sequence[Question], answers: Sequence[str]) -> float:
    """How good the answers to a whole file are: CIDEr-D, VQA accuracy, or the share of right choices."""
    pairs = list(zip(questions, answers, strict=True))
    if task == "caption":
        return cider(answers, [one.references for one in questions])
    if task == "vqa":
        return sum(vqa_accuracy(text, one.references) for one, text in pairs) / len(pairs)
    return sum(text in one.references for one, text in pairs) / len(pairs)


def _references_of(record: dict[str, Any], where: str) -> list[str]:
    """The right answers of a record: ``answers``, a list, or ``answer``."""
    found = record.get("answers", record.get("answer"))
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not found or not all(isinstance(answer, str) for answer in found):
        raise InputError(f"{where}: answer: expected text, or answers: a list of texts")
    return found


def _choices_of(record: dict[str, Any], where: str) -> tuple[list[str], int]:
    """The ``choices`` of a record and the number of the right one, ``answer``: a number or one of them."""
    choices, right = record.get("choices"), record.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise InputError(f"{where}: choices: expected a list of at least two texts")
    if isinstance(right, str) and right in choices:
        right = choices.index(right)
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(choices):
        raise InputError(f"{where}: answer: expected one of the choices, or its number from 0 to {len(choices) - 1}")
    return choices, right
