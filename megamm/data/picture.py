"""Packed rows drawn as the model sees them: documents, patches, text tokens, labels and the attention mask.

A row becomes one picture: its documents as cards in reading order, column by column, and at the right the mask
with a pixel for each pair of query and key.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer

from megamm.sequence import IMAGE, SPECIAL_TOKENS, Batch, Span, row_spans

INK, MUTED, FAINT, PAPER, CARD = "#1f2430", "#8a919c", "#d8dce2", "#ffffff", "#f6f7f9"
LABELLED, SPECIAL = "#cfe3f5", "#e6e8ec"
CAUSAL, WITHIN_IMAGE, HIDDEN = (0, 114, 178), (230, 159, 0), (241, 243, 245)
COLUMNS, GAP, PAD, LINE = 3, 10, 9, 18


def draw_row(
    batch: Batch,
    row: int,
    tokenizer: Tokenizer,
    *,
    sources: list[str] | None = None,
    width: int = 1120,
    scale: int = 2,
    max_tokens: int = 70,
) -> Image.Image:
    """Draw one packed row.

    Args:
        batch: packed rows on the CPU.
        tokenizer: made the ids; decodes one token at a time.
        sources: names in the order of the data config, to head each document.
        width: of the picture, in units of ``scale`` pixels.
        scale: pixels per unit; 2 is sharp on a screen of high density.
        max_tokens: of a longer text span the rest is only counted.

    Returns:
        An RGB picture of ``width * scale`` pixels by as many as it needs.
    """
    pen = _Pen(batch=batch, row=row, tokenizer=tokenizer, scale=scale, max_tokens=max_tokens)
    mask_width = width * 27 // 100
    column = (width - mask_width - COLUMNS * GAP) // COLUMNS
    cards = [pen.card(number, spans, sources, column) for number, spans in enumerate(_documents(batch, row), start=1)]
    columns = _fill_columns(cards, COLUMNS, GAP * scale)
    mask = pen.mask(mask_width)
    height = max([mask.height, *(sum(card.height + GAP * scale for card in stack) for stack in columns)])
    picture = Image.new("RGB", (width * scale, height), PAPER)
    for i, stack in enumerate(columns):
        y = 0
        for card in stack:
            picture.paste(card, (i * (column + GAP) * scale, y))
            y += card.height + GAP * scale
    picture.paste(mask, ((width - mask_width) * scale, 0))
    return picture


def _documents(batch: Batch, row: int) -> list[list[Span]]:
    return row_spans(*(getattr(batch, name)[row].numpy() for name in ("tokens", "lo", "hi")))


def mask_picture(lo: np.ndarray, hi: np.ndarray, in_image: np.ndarray) -> np.ndarray:
    """uint8 [S, S, 3]: row q, column k; blue where q sees k, orange where both are in one image."""
    keys = np.arange(len(lo))
    seen = (lo[:, None] <= keys) & (keys <= hi[:, None])
    # An image is a run of image positions; two positions of one run have the same number of non-image ones before.
    run = np.where(in_image, np.cumsum(~in_image), -1)
    same = seen & (run[:, None] == run) & in_image[:, None]
    picture = np.full((*seen.shape, 3), HIDDEN, np.uint8)
    picture[seen], picture[same] = CAUSAL, WITHIN_IMAGE
    return picture


@dataclass(kw_only=True)
class _Pen:
    """Draws the parts of one row."""

    batch: Batch
    row: int
    tokenizer: Tokenizer
    scale: int
    max_tokens: int

    def card(self, number: int, spans: list[Span], sources: list[str] | None, width: int) -> Image.Image:
        """One document: a heading, then its images as grids of patches and its text as tokens."""
        s = self.scale
        # Higher than it can be: the height is known only once all is drawn, and the rest is cut off.
        area = sum(LINE * (3 + min(x.stop - x.start, self.max_tokens)) for x in spans) + 400 * len(spans)
        card = Image.new("RGB", (width * s, area * s), CARD)
        draw = ImageDraw.Draw(card)
        start, stop = spans[0].start, spans[-1].stop
        name = self._source(start, stop, sources)
        draw.text((PAD * s, 7 * s), f"document {number}{name}", INK, _font(10.5 * s, bold=True))
        place = f"positions {start}–{stop - 1}"
        draw.text((width * s - PAD * s, 7.5 * s), place, MUTED, _font(9.5 * s), anchor="ra")
        y = 26 * s
        for span in spans:
            y = self._image(card, span, y, width) if span.is_image else self._text(draw, span, y, width)
        y += (PAD - 3) * s
        draw.rectangle((0, 0, width * s - 1, y - 1), outline=FAINT, width=s)
        return card.crop((0, 0, width * s, y))

    def _source(self, start: int, stop: int, sources: list[str] | None) -> str:
        labelled = self.batch.targets[self.row, start:stop] >= 0
        if not sources or not bool(labelled.any()):
            return ""
        # The first label will do: a document is of one source.
        index = int(self.batch.source[self.row, start:stop][labelled][0])
        return f" · {sources[index]}" if index < len(sources) else ""

    def _image(self, card: Image.Image, span: Span, y: int, width: int) -> int:
        """Paste an image as the grid of its patches; returns the next y."""
        s, count = self.scale, span.stop - span.start
        flat = self.row * self.batch.tokens.shape[1] + np.arange(span.start, span.stop)
        order = np.searchsorted(self.batch.patch_index.numpy(), flat)  # patch_index increases
        pixels = self.batch.patches[order].numpy()
        ends = self.batch.grids.prod(1).cumsum(0)
        rows, columns = self.batch.grids[int((ends <= order[0]).sum())].tolist()
        edge = round(np.sqrt(pixels.shape[1] / 3))
        # At least a pixel, for the longest of images.
        tile = max(1, min(24 * s, 112 * s // rows, ((width - 2 * PAD) * s * 6 // 10) // columns - s))
        for i, patch in enumerate(pixels.reshape(count, edge, edge, 3)):
            corner = (PAD * s + i % columns * (tile + s), y + i // columns * (tile + s))
            # Enlarged pixels stay sharp, reduced ones are averaged.
            how = Image.Resampling.NEAREST if tile >= edge else Image.Resampling.BOX
            card.paste(Image.fromarray(patch).resize((tile, tile), how), corner)
        draw, x = ImageDraw.Draw(card), PAD * s + columns * (tile + s) + 7 * s
        for i, line in enumerate(("image", f"{count} patches", f"at {span.start}–{span.stop - 1}", "no label")):
            draw.text((x, y + (1 + 14 * i) * s), line, INK if i == 0 else MUTED, _font(9.5 * s))
        return y + max(rows * (tile + s), 58 * s) + 6 * s

    def _text(self, draw: ImageDraw.ImageDraw, span: Span, y: int, width: int) -> int:
        """Write a text span token by token, those that carry a loss on blue; returns the next y."""
        s, font = self.scale, _font(10.5 * self.scale)
        tokens = self.batch.tokens[self.row].tolist()
        targets = self.batch.targets[self.row].tolist()
        x, right = float(PAD * s), (width - PAD) * s
        for position in range(span.start, min(span.stop, span.start + self.max_tokens)):
            text = self._decode(tokens[position])
            # The label of a token is stored with the position before it, which predicts it.
            predicted = position > 0 and targets[position - 1] == tokens[position]
            special = tokens[position] < len(SPECIAL_TOKENS)
            label = text.strip() or "␣"
            while len(label) > 1 and draw.textlength(label, font) > right - PAD * s - 8 * s:
                label = label[: len(label) * 3 // 4] + "…"  # ever shorter, until it fits the card
            size = draw.textlength(label, font) + 6 * s
            if x + size > right:
                x, y = PAD * s, y + LINE * s
            fill = LABELLED if predicted else SPECIAL
            draw.rounded_rectangle((x, y, x + size, y + (LINE - 3) * s), 3 * s, fill=fill)
            draw.text((x + 3 * s, y + 1 * s), label, MUTED if special else INK, font)
            x += size + 2 * s
        rest = span.stop - span.start - self.max_tokens
        if rest > 0:
            y += LINE * s
            draw.text((PAD * s, y + 1 * s), f"… and {rest} more text tokens", MUTED, font)
        return y + (LINE + 4) * s

    def _decode(self, token: int) -> str:
        return SPECIAL_TOKENS[token] if token < len(SPECIAL_TOKENS) else self.tokenizer.decode([token])

    def mask(self, width: int) -> Image.Image:
        """The attention mask of the row with axes and a key to the colours."""
        s, margin = self.scale, 26
        lo, hi, tokens = (getattr(self.batch, name)[self.row].numpy() for name in ("lo", "hi", "tokens"))
        pixels = mask_picture(lo, hi, tokens == IMAGE)
        side = (width - margin) * s
        how = Image.Resampling.NEAREST if len(lo) <= side else Image.Resampling.BOX
        picture = Image.new("RGB", (width * s, (width + 92) * s), PAPER)
        draw, font = ImageDraw.Draw(picture), _font(9.5 * s)
        left, top = margin * s, 40 * s
        draw.text((left, 3 * s), "attention mask", INK, _font(10.5 * s, bold=True))
        draw.text((left, 23 * s), "key position →", MUTED, font)
        draw.text((width * s, 23 * s), str(len(lo)), MUTED, font, anchor="ra")
        picture.paste(Image.fromarray(pixels).resize((side, side), how), (left, top))
        draw.rectangle((left, top, left + side - 1, top + side - 1), outline=FAINT, width=s)
        sideways = Image.new("RGB", (side, 14 * s), PAPER)
        pen = ImageDraw.Draw(sideways)
        pen.text((side, 0), "← query position", MUTED, font, anchor="ra")
        pen.text((0, 0), str(len(lo)), MUTED, font)
        picture.paste(sideways.rotate(90, expand=True), ((margin - 18) * s, top))
        y = top + side + 10 * s
        keys = (
            (CAUSAL, "seen: earlier in the same document"),
            (WITHIN_IMAGE, "seen: same image, both directions"),
            (HIDDEN, "hidden"),
        )
        for colour, text in keys:
            draw.rectangle((left, y + 2 * s, left + 10 * s, y + 12 * s), fill=colour, outline=FAINT)
            draw.text((left + 16 * s, y), text, INK, font)
            y += 17 * s
        return picture


def _fill_columns(cards: list[Image.Image], columns: int, gap: int) -> list[list[Image.Image]]:
    """Cards in order, column by column, at the least height at which they fit."""
    heights = [card.height + gap for card in cards]

    def fill(limit: int) -> list[list[Image.Image]]:
        stacks: list[list[Image.Image]] = [[]]
        used = 0
        for card, height in zip(cards, heights, strict=True):
            if used and used + height > limit:
                stacks.append([])
                used = 0
            stacks[-1].append(card)
            used += height
        return stacks

    # Bisection: what fits at some height fits at every larger one.
    low, high = max(heights, default=0), sum(heights)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(fill(middle)) <= columns else (middle + 1, high)
    return fill(low)


@cache
def _font(size: float, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, from matplotlib's own data, so that a picture does not depend on the machine's fonts."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
