"""Which documents are held out for validation."""

from array import array

import numpy as np

MIN_IMAGES = 16
"""Pictures that validation has at least, where the share asked for would give it that many."""
MOST = 1.5
"""A document is passed over where it would bring validation above this many times its share of the tokens."""


class Documents:
    """What is kept of each document until all have been seen: about 50 bytes.

    A repeat is a document with the same content as another, or, in captions, with the same picture.
    """

    def __init__(self):
        self._digests, self._images = bytearray(), bytearray()
        self._num_tokens, self._num_images, self._num_pieces = array("q"), array("q"), array("q")

    def add(self, digest: bytes, image_digests: list[bytes], num_tokens: int, num_images: int, num_pieces: int) -> None:
        """Append a document.

        Args:
            digest: 16 bytes, of its content.
            image_digests: 16 bytes of each picture that no other document may have.
            num_tokens: text tokens and patches.
        """
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
        return len(self) - len(np.unique(self._keys()))

    def hold_out(self, fraction: float) -> np.ndarray:
        """Choose the documents of validation: bool [num_documents].

        They are taken by the hash of their content, so that those of a corpus mostly stay as it grows, until they
        hold ``fraction`` of all tokens and enough pictures. Repeats are left out, so that nothing in validation is
        trained on. Of two or more different documents at least one goes to each split, unless ``fraction`` is 0.
        """
        chosen = np.zeros(len(self), bool)
        keys = self._keys()
        # Documents of one content are a group.
        _, group, copies = np.unique(keys, return_inverse=True, return_counts=True)
        if not fraction or len(copies) < 2:
            return chosen
        tokens, images = np.array(self._num_tokens), np.array(self._num_images)
        # The digest's first half as a big-endian number. It is random already, so no seed is needed.
        order = np.argsort(keys["hash"], kind="stable")
        single = (copies[group] == 1) & ~self._shares_image()
        order = order[single[order]]
        if not len(order):  # all are repeats: one of them goes there with all its copies
            return group == group[np.argmin(keys["hash"])]
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

    def _shares_image(self) -> np.ndarray:
        """bool [num_documents]: whether another document has one of its pictures."""
        entries = np.frombuffer(bytes(self._images), [("document", "<u8"), ("image", "<u8")])
        _, number, copies = np.unique(entries["image"], return_inverse=True, return_counts=True)
        shared = np.zeros(len(self), bool)
        shared[entries["document"][copies[number] > 1].astype(np.int64)] = True
        return shared
