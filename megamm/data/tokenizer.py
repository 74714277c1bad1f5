"""Byte-level BPE: training, loading, and encoding that never lets text pose as a special token."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from megamm import files
from megamm.errors import InputError
from megamm.sequence import SPECIAL_TOKENS

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


class Tokenizer:
    """A ``tokenizer.json`` whose first ids are :data:`megamm.sequence.SPECIAL_TOKENS`.

    Attributes:
        path: the file.
        sha256: hex digest of the file's bytes.
        vocab_size: number of ids.

    Raises:
        InputError: the file is missing, is no tokenizer, lacks the special tokens, or would turn literal
            text such as "<image>" into a special id.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); make one with tools/train_tokenizer.py"
            ) from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            # From the bytes that were hashed: the file is not read a second time.
            self._hf = HFTokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path}: not a tokenizer.json ({error})") from error
        # A file may say that texts are padded or cut; documents must come out as long as they are.
        self._hf.no_padding()
        self._hf.no_truncation()
        self._hf.encode_special_tokens = True  # special tokens spelled out in text are plain text
        self.vocab_size = self._hf.get_vocab_size()
        for number, token in enumerate(SPECIAL_TOKENS):
            found = self._hf.token_to_id(token)
            if found != number:
                raise InputError(
                    f"{path}: special token {token} must have id {number}, has {found}; "
                    "train one with tools/train_tokenizer.py"
                )
        # The setting above only works for tokens that the file marks as special: tried out, not believed.
        if min(self.encode("".join(SPECIAL_TOKENS)), default=0) < len(SPECIAL_TOKENS):
            raise InputError(
                f"{path}: text that spells {' '.join(SPECIAL_TOKENS)} is encoded to special ids; "
                'mark these tokens "special": true, or train one with tools/train_tokenizer.py'
            )

    def encode(self, text: str) -> np.ndarray:
        """int32 [num_tokens]; no special ids are added or recognised.

        Raises:
            UnicodeEncodeError: the text holds lone surrogates (bytes that were not UTF-8).
        """
        # Raises what the docstring says: the library says of such a text that it is no str.
        text.encode("utf-8")
        return np.array(self._hf.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """:meth:`encode` of each text, in threads."""
        for text in texts:
            text.encode("utf-8")
        encodings = self._hf.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, special tokens spelled out."""
        return self._hf.decode([int(i) for i in ids], skip_special_tokens=False)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path | str) -> int:
    """Train byte-level BPE on ``texts`` and write it to ``path``; the same texts give the same bytes.

    Digits are split one by one, so that a number is spelled alike wherever it stands.

    Returns:
        The number of ids: ``vocab_size``, or fewer where the text has too few repeated pairs.

    Raises:
        InputError: ``vocab_size`` is below 256 bytes + the special tokens, or there is no text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"--vocab-size: {vocab_size} is too small; 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
            f"need at least {MIN_VOCAB_SIZE}"
        )
    count = 0

    def valid() -> Iterable[str]:
        nonlocal count
        for text in texts:
            count += bool(text)
            # Lone surrogates would end the training; in preparation such a text is left out.
            yield text.encode("utf-8", errors="replace").decode("utf-8")

    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        # All 256 bytes, so that any text can be encoded; sorted, as a set would give other ids each time.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(valid(), trainer)
    if not count:  # known only after the texts have gone by
        raise InputError("no text found in the inputs; nothing to train a tokenizer on")
    files.write_text(path, tokenizer.to_str(pretty=True) + "\n")
    return tokenizer.get_vocab_size()
