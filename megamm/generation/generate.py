"""Text after prompts: batches of any lengths, with the cache or, to check it, without."""

from collections.abc import Iterator, Sequence

import torch

from megamm.generation.prompts import Prompt, prompt_batch, token_batch
from megamm.generation.sampling import Sampler, Sampling
from megamm.model.cache import KeyValueCache
from megamm.model.multimodal import MultimodalModel
from megamm.sequence import EOS


@torch.no_grad()
def stream(
    model: MultimodalModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    max_length: int,
    sampling: Sampling | None = None,
    numbers: Sequence[int] | None = None,
    stop: Sequence[int] = (EOS,),
    dtype: torch.dtype = torch.float32,
    cache: bool = True,
) -> Iterator[list[int | None]]:
    """The next token of every row, one step after the other; None where the row has ended.

    Args:
        max_new_tokens: of a row.
        max_length: positions of a row; a row ends there.
        sampling: by default greedy.
        numbers: of the prompts, on which draws depend; by default 0, 1, ...
        stop: tokens that end a row; they are yielded.
        dtype: of activations, keys and values.
        cache: without it the whole row is computed anew for every token.
    """
    device = next(model.parameters()).device
    sampler = Sampler(sampling or Sampling(), list(range(len(prompts)) if numbers is None else numbers))
    lengths = torch.tensor([prompt.length for prompt in prompts])
    active = lengths < max_length
    room = min(max_length, int(lengths.max()) + max_new_tokens)
    memory = KeyValueCache(model, len(prompts), room, dtype, device) if cache else None
    rows, batch = list(prompts), prompt_batch(prompts)
    patch_dim = batch.patches.shape[1]
    for _ in range(max_new_tokens):
        if not active.any():
            return
        on_device = batch.to(device)
        logits = memory.logits(on_device) if memory else _last_logits(model, on_device, dtype)
        tokens = sampler.choose(logits)
        yield [int(token) if on else None for token, on in zip(tokens, active, strict=True)]
        if memory:
            batch = token_batch(tokens, lengths, active, patch_dim)
        else:
            rows = [p.with_text([int(t)]) if on else p for p, t, on in zip(rows, tokens, active, strict=True)]
            batch = prompt_batch(rows)
        # Before rows end: the token that ends a row is still one of its positions.
        lengths += active
        active &= ~torch.isin(tokens, torch.tensor(list(stop), dtype=torch.int64)) & (lengths < max_length)
        # The batch was made before it was known which rows end with these tokens; an empty interval makes theirs
        # padding.
        if memory:
            batch.hi.masked_fill_(~active[:, None], -1)


def generate(model: MultimodalModel, prompts: Sequence[Prompt], max_new_tokens: int, **options) -> list[list[int]]:
    """Token ids after each prompt, without a stop token; see :func:`stream`."""
    found: list[list[int]] = [[] for _ in prompts]
    stop = set(options.get("stop", (EOS,)))
    for step in stream(model, prompts, max_new_tokens, **options):
        for ids, token in zip(found, step, strict=True):
            if token is not None and token not in stop:
                ids.append(token)
    return found


@torch.no_grad()
def log_likelihood(
    model: MultimodalModel, prompt: Prompt, answers: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Log-probabilities float64 [num_answers] of answers after a prompt, summed over their tokens, in nats."""
    device = next(model.parameters()).device
    rows = [prompt.with_text(answer) for answer in answers]
    logits = model.logits(prompt_batch(rows).to(device), dtype)
    found = []
    for row, answer in zip(logits, answers, strict=True):
        # The logits of a position are those of the token after it.
        at = slice(prompt.length - 1, prompt.length - 1 + len(answer))
        scores = row[at].double().log_softmax(-1).cpu()
        found.append(scores[torch.arange(len(answer)), torch.tensor(list(answer), dtype=torch.int64)].sum())
    return torch.stack(found)


def _last_logits(model: MultimodalModel, batch, dtype: torch.dtype) -> torch.Tensor:
    # Padding, at the end of a row, has an empty interval.
    last = (batch.lo <= batch.hi).sum(1) - 1
    x_b1w = model.residual_stream(batch, dtype)[torch.arange(len(last), device=last.device), last][:, None]
    return model.head.logits(x_b1w, model.tied_table)[:, 0]
