"""Special tokens, and the numbers that the data and the model must agree on.

A document is ``<bos> span span ... <eos>``. An image span is its patches, each at a position holding
``<image>``, followed by ``<image_end>``: the text token from which the first word after the image is
predicted, since image positions themselves have no label.
"""

PAD, BOS, EOS, IMAGE, IMAGE_END = range(5)
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<image>", "<image_end>")

IGNORE = -100
"""Target at positions without a label."""

MODALITIES = ("text", "text_after_image")
"""Kinds of label: no image before it in its document, or at least one."""
