"""A tokenizer of another model with our special tokens before its own: every id moves up by their number.

So the rows of its embedding go to ``start.first_row`` 5 of ours, and text is cut as it was in its training.
"""

import json
from pathlib import Path

from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError
from megamm.files import write_json
from megamm.sequence import SPECIAL_TOKENS

TOKENIZER = "tokenizer.json"


def shift_tokenizer(source: Path, out: Path) -> int:
    """Write ``out``, a ``tokenizer.json`` whose first ids are our special tokens and then those of ``source``.

    What ``source`` adds around a text (its post-processor) is left out: documents have our own marks.

    Returns:
        The number of ids.

    Raises:
        InputError: not a byte-pair tokenizer, or one that has a special token of ours already.
    """
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        vocabulary, added = content["model"]["vocab"], content.get("added_tokens") or []
        names = {*vocabulary, *(token["content"] for token in added)}
        largest = max([*vocabulary.values(), *(token["id"] for token in added)])
        if content["model"].get("type", "BPE") != "BPE" or len(names) != largest + 1:
            raise ValueError("not a byte-pair tokenizer with an id for each number from 0 on")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{source}: cannot be extended ({error}); prepare data with a tokenizer of your own"
        ) from error
    if both := sorted(names & set(SPECIAL_TOKENS)):
        raise InputError(f"{source}: has {both[0]} already, which is a special token of ours; it cannot be extended")
    num = len(SPECIAL_TOKENS)
    specials = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    content["model"]["vocab"] = specials | {token: number + num for token, number in vocabulary.items()}
    marks = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [{"id": number, "content": token, **marks} for token, number in specials.items()]
    content["added_tokens"] += [token | {"id": token["id"] + num} for token in added]
    content["post_processor"] = None
    write_json(out, content)
    return Tokenizer(out).vocab_size
