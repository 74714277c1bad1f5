"""Answers of a model to prompts: text after them, piece by piece or in batches, or one of several choices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megamm.errors import InputError
from megamm.generation.generate import generate, log_likelihood, stream
from megamm.generation.prompts import Prompt, PromptMaker
from megamm.generation.sampling import Sampling
from megamm.model.multimodal import MultimodalModel
from megamm.sequence import EOS


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How a model is asked.

    Attributes:
        max_length: positions of a row; an answer ends there.
        max_new_tokens: of an answer.
        stop: text before which an answer ends.
        sampling: by default always the most probable token.
        dtype: of activations, keys and values.
        cache: without it the whole row is computed anew for every token.
    """

    max_length: int
    max_new_tokens: int = 128
    stop: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    dtype: torch.dtype = torch.float32
    cache: bool = True


def make_prompt(maker: PromptMaker, max_length: int, text: str, images: Sequence[Path | str], where: str) -> Prompt:
    """A prompt that leaves room for an answer.

    Args:
        max_length: positions of a row.
        where: how messages begin.

    Raises:
        InputError: an image cannot be read, or there is no room.
    """
    try:
        made = maker.make(text, images)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if made.length >= max_length:
        raise InputError(
            f"{where}: {made.length} positions leave no room in the rows of {max_length} that the model is trained on; "
            "shorten the text or leave images out"
        )
    return made


class Answerer:
    """Answers prompts that ``maker`` makes for ``model``."""

    def __init__(self, model: MultimodalModel, maker: PromptMaker, options: AnswerOptions):
        self.model, self.maker, self.options = model, maker, options

    def prompt(self, text: str, images: Sequence[Path | str], where: str) -> Prompt:
        """See :func:`make_prompt`."""
        return make_prompt(self.maker, self.options.max_length, text, images, where)

    def pieces(self, prompt: Prompt) -> Iterator[str]:
        """The answer to one prompt, piece by piece, as soon as its characters are whole."""
        ids: list[int] = []
        said = ""
        for (token,) in stream(self.model, [prompt], self.options.max_new_tokens, **self._how):
            if token is None or token == EOS:
                break
            ids.append(token)
            text, ended = self._cut(self.maker.tokenizer.decode(ids))
            whole = text if ended else self._whole(text)
            # What is printed cannot be taken back: where a further token changes it, the rest waits for the end.
            if whole.startswith(said):
                yield whole[len(said) :]
                said = whole
            if ended:
                return
        yield self._cut(self.maker.tokenizer.decode(ids))[0][len(said) :]

    def answers(self, prompts: Sequence[Prompt], numbers: Sequence[int]) -> list[str]:
        """The answers to some prompts; ``numbers``: of the prompts among all, on which draws depend."""
        found = generate(self.model, prompts, self.options.max_new_tokens, numbers=numbers, **self._how)
        return [self._cut(self.maker.tokenizer.decode(ids))[0] for ids in found]

    def choose(self, prompt: Prompt, choices: Sequence[str]) -> int:
        """The number of the choice with the highest probability per token."""
        ids = [self.maker.tokenizer.encode(choice).tolist() for choice in choices]
        scores = log_likelihood(self.model, prompt, ids, self.options.dtype)
        return max(range(len(ids)), key=lambda i: float(scores[i]) / max(1, len(ids[i])))

    @property
    def _how(self) -> dict:
        how = self.options
        return {"max_length": how.max_length, "sampling": how.sampling, "dtype": how.dtype, "cache": how.cache}

    def _cut(self, text: str) -> tuple[str, bool]:
        stop = self.options.stop
        return (text.split(stop)[0], True) if stop and stop in text else (text, False)

    def _whole(self, text: str) -> str:
        """Without what a later token may still change: half a character, or the beginning of the stop text."""
        text = text.rstrip("\ufffd")
        stop = self.options.stop or ""
        held = next((n for n in range(min(len(stop), len(text)), 0, -1) if stop.startswith(text[-n:])), 0)
        return text[: len(text) - held]
