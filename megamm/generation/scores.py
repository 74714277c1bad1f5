"""Scores in training: every rank answers its share of the prompts of ``eval.tasks``, with the whole model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from megamm.config import Config, ModelConfig, TaskConfig
from megamm.data.images import DEFAULT_FIT
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError
from megamm.generation.answers import Answerer, AnswerOptions, make_prompt
from megamm.generation.load import TrainingData
from megamm.generation.prompts import PromptMaker
from megamm.generation.questions import Question, answer, read_questions, score
from megamm.parallel.mesh import World
from megamm.parallel.whole import gather_model


@dataclass(kw_only=True)
class EvalTask:
    """One of ``eval.tasks``, and what makes its prompts."""

    config: TaskConfig
    questions: list[Question]
    maker: PromptMaker
    options: AnswerOptions


def open_tasks(config: Config) -> dict[str, EvalTask]:
    """The tasks of a run with a resolved config, by name; images are looked for, but not read.

    Raises:
        InputError: a file, an image or the tokenizer is missing, or a line is no question of its kind.
    """
    if not config.eval.tasks:
        return {}
    data, model = TrainingData(config.data, {}), config.model
    if data.tokenizer is None:
        raise InputError("eval.tasks: none of data.sources is at hand; prepare the data again")
    tokenizer, found = Tokenizer(data.tokenizer), {}
    if tokenizer.sha256 not in data.tokenizers:
        raise InputError(f"eval.tasks: {data.tokenizer} is not that of the prepared data beside it; put that one back")
    for name, task in config.eval.tasks.items():
        setting = f"eval.tasks.{name}"
        with _beginning(f"{setting}.path"):
            questions = read_questions(Path(task.path), task.kind)
            images = [(one, image) for one in questions for image in one.images]
            missing = next(((one, image) for one, image in images if not image.is_file()), None)
            if missing:
                raise InputError(f"{missing[0].where}: {missing[1]} does not exist; put the image there")
        fit = task.fit or (data.fit(model, f"{setting}.fit") if images else DEFAULT_FIT)
        options = AnswerOptions(
            max_length=config.data.row_length,
            max_new_tokens=task.max_new_tokens,
            stop=task.stop,
            dtype=getattr(torch, config.train.dtype),
        )
        maker = PromptMaker(tokenizer, model.image_size, model.patch_size, fit)
        found[name] = EvalTask(config=task, questions=questions, maker=maker, options=options)
    return found


def check_prompts(tasks: dict[str, EvalTask], world: World) -> None:
    """Read this rank's share of the images, and see that each prompt leaves room for an answer.

    Raises:
        InputError: one cannot be read, or there is no room.
    """
    for name, task in tasks.items():
        with _beginning(f"eval.tasks.{name}.path"):
            for one in task.questions[world.rank :: world.size]:
                make_prompt(task.maker, task.options.max_length, one.prompt, one.images, one.where)


def score_tasks(tasks: dict[str, EvalTask], model: nn.Module, config: ModelConfig, world: World) -> dict[str, float]:
    """The score of each task, the same on all ranks, which must all call.

    Args:
        model: this rank's parameters under the names of the whole model.
        config: of the whole model.

    Raises:
        InputError: an image can no longer be read, on any rank.
    """
    found: dict[str, float] = {}
    if not tasks:
        return found
    whole = gather_model(model, config, world)
    for name, task in tasks.items():
        answerer = Answerer(whole, task.maker, task.options)
        mine, texts, size = task.questions[world.rank :: world.size], [], task.config.batch_size
        # Nothing in here is a collective, so that ranks may need unlike numbers of steps, or fail alone.
        with world.agree():
            for start in range(0, len(mine), size):
                texts += answer(answerer, mine[start : start + size])
        shares = world.gather(texts)
        # Dealt one by one, and put together so.
        answers = [shares[n % world.size][n // world.size] for n in range(len(task.questions))]
        found[name] = world.decide(score, task.config.kind, task.questions, answers)
    return found


@contextmanager
def _beginning(setting: str) -> Iterator[None]:
    """Put the setting before what is wrong with what it names."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{setting}: {error}") from None
