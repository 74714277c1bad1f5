"""Which documents are held out for validation."""

from array import array
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from megamm.data import near

MIN_IMAGES = 16
"""Pictures that validation has at least, where the share asked for would give it that many."""
MOST = 1.5
"""A document is passed over where it would bring validation above this many times its share of the tokens."""


class Documents:
    """What is kept of each document until all have been seen: about 50 bytes, and 64 for a longer text.

    A repeat is a document with the same content as another, or, in captions, with the same picture; a near repeat has
    nearly the same text, or, in captions, nearly the same picture (megamm.data.near). Add all documents before asking
    about them: what is found is kept, as it takes half a minute for a million.
    """

    def __init__(self):
        self._digests, self._images = bytearray(), bytearray()
        self._num_tokens, self._num_images, self._num_pieces = array("q"), array("q"), array("q")
        self._bands, self._texts, self._bits, self._pictures = array("Q"), array("q"), array("Q"), array("q")

    def add(
        self,
        digest: bytes,
        image_digests: list[bytes],
        num_tokens: int,
        num_images: int,
        num_pieces: int,
        text_bands: Sequence[int] = (),
        image_bits: Sequence[int] = (),
    ) -> None:
        """Append a document.

        Args:
            digest: 16 bytes, of its content.
            image_digests: 16 bytes of each picture that no other document may have.
            num_tokens: text tokens and patches.
            text_bands, image_bits: by which near repeats are found; of a short text there are no bands.
        """
        if len(text_bands):
            self._texts.append(len(self))
            self._bands.extend(text_bands)
        for bits in image_bits:
            self._pictures.append(len(self))
            self._bits.append(bits)
        self._digests += digest
        for image in image_digests:
            # Half of the digest is enough to tell pictures apart; a chance match only keeps a document out of
            # validation.
            self._images += len(self._num_tokens).to_bytes(8, "little") + image[:8]
        self._num_tokens.append(num_tokens)
        self._num_images.append(num_images)
        self._num_pieces.append(num_pieces)

    def __len__(self) -> int:
        return len(self._num_tokens)

    @property
    def num_pieces(self) -> np.ndarray:
        """int64 [num_documents]"""
        return np.array(self._num_pieces, np.int64)

    def num_repeats(self) -> int:
        """Documents whose content stood in an earlier one."""
        return len(self) - len(np.unique(self._contents))

    def num_near_repeats(self) -> int:
        """Documents that are near an earlier one, or share its picture, without having its content."""
        return len(self) - self.num_repeats() - len(np.unique(self._groups))

    def hold_out(self, fraction: float) -> np.ndarray:
        """Choose the documents of validation: bool [num_documents].

        They are taken by the hash of their content, so that those of a corpus mostly stay as it grows, until they
        hold ``fraction`` of all tokens and enough pictures. Repeats and near repeats are left out, so that nothing in
        validation is trained on; where all have some, a group of repeats goes there as a whole. If all documents are
        near each other, only equal ones count as repeats. Of two or more different documents at least one goes to each
        split, unless ``fraction`` is 0.
        """
        chosen = np.zeros(len(self), bool)
        keys = self._keys()
        groups = [self._groups, self._contents]
        group = next((group for group in groups if group.any()), None)  # of only one group all have the number 0
        if not fraction or group is None:
            return chosen
        tokens, images = np.array(self._num_tokens), np.array(self._num_images)
        # The digest's first half as a big-endian number. It is random already, so no seed is needed.
        order = np.argsort(keys["hash"], kind="stable")
        order = order[np.bincount(group)[group[order]] == 1]
        if not len(order):  # all are repeats: the smallest group goes there, of equal ones the first by hash
            sizes = np.bincount(group, weights=tokens)[group]
            return group == group[np.lexsort((keys["hash"], sizes))[0]]
        # A few long documents may fill the budget without one picture, hence a second pass for pictures alone.
        budget, wanted = fraction * tokens.sum(), min(MIN_IMAGES, np.ceil(fraction * images.sum()))
        held = held_images = 0
        # The second pass may go beyond the budget, but not without bounds.
        for only_images in (False, True):
            for index in order.tolist():
                if held_images >= wanted if only_images else held >= budget:
                    break
                fits = held + tokens[index] <= MOST * budget * (1 + only_images)
                if fits and not chosen[index] and (images[index] or not only_images):
                    chosen[index] = True
                    held, held_images = held + tokens[index], held_images + images[index]
        # Where most documents have near repeats: whole groups of them, the smallest first.
        if held < budget / 2:
            sizes = np.bincount(group, weights=tokens)
            numbers = np.argsort(sizes, kind="stable")
            numbers = numbers[np.bincount(group)[numbers] > 1]
            before = held + np.cumsum(sizes[numbers]) - sizes[numbers]
            chosen |= np.isin(group, numbers[(before < budget) & (before + sizes[numbers] <= MOST * budget)])
        # All documents with pictures may be too long for the budget: then the shortest, so that pictures are validated
        # at all.
        with_images = order[images[order] > 0]
        if wanted and not held_images and len(with_images):
            chosen[with_images[np.argmin(tokens[with_images])]] = True
        if not chosen.any():  # every document alone is above the budget
            chosen[order[np.argmin(tokens[order])]] = True
        if chosen.all():  # training must keep one
            chosen[order[-1]] = False
        return chosen

    def _keys(self) -> np.ndarray:
        """The digests as numbers: [num_documents] of fields ``hash`` and ``rest``."""
        # Big-endian, so that numbers sort as the digests do.
        return np.frombuffer(bytes(self._digests), [("hash", ">u8"), ("rest", ">u8")])

    @cached_property
    def _contents(self) -> np.ndarray:
        """int64 [num_documents]: a number for each content."""
        keys = self._keys()
        order = np.lexsort((keys["rest"], keys["hash"]))  # ten times faster than a sort of records
        ranked = keys[order]
        differs = (ranked["hash"][1:] != ranked["hash"][:-1]) | (ranked["rest"][1:] != ranked["rest"][:-1])
        contents = np.zeros(len(self), np.int64)
        contents[order[1:]] = np.cumsum(differs)
        return contents

    @cached_property
    def _groups(self) -> np.ndarray:
        """int64 [num_documents]: the group of documents that repeat each other, nearly or exactly."""
        entries = np.frombuffer(bytes(self._images), [("document", "<u8"), ("image", "<u8")])
        texts, pictures = np.array(self._texts, np.int64), np.array(self._pictures, np.int64)
        edges = [
            near.equal(self._contents, np.arange(len(self))),
            near.equal(entries["image"], entries["document"].astype(np.int64)),
            near.near_texts(np.array(self._bands, np.uint64).reshape(len(texts), near.BANDS), texts),
            near.near_images(np.array(self._bits, np.uint64), pictures),
        ]
        return near.groups(len(self), np.concatenate(edges))
