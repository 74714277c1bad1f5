"""Records whose pictures stand amid text: conversations and web documents.

Known are LLaVA's conversations (https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md), chats
with ``messages``, the pairs of lists of OBELICS (``texts``, ``images``) and documents of mmc4 (``text_list``,
``image_info``).
"""

from collections.abc import Callable, Iterator

CONVERSATIONS = ("conversations", "messages")
WEB_DOCUMENTS = (("texts", "images"), ("text_list", "image_info"))
FIELDS = (*CONVERSATIONS, *(name for pair in WEB_DOCUMENTS for name in pair))
MARK = "<image>"
MISSING = {"missing": True}
"""Stands for a picture that is not in the archive of its record."""

_SPEAKERS = {"human": "USER", "user": "USER", "gpt": "ASSISTANT", "assistant": "ASSISTANT", "system": "SYSTEM"}


class BadRecordError(Exception):
    """A record that contradicts itself; the message is a short reason."""


def is_interleaved(record: dict) -> bool:
    """Whether a record is a conversation or a web document."""
    return is_conversation(record) or any(
        isinstance(record.get(texts), list) and isinstance(record.get(images), list) for texts, images in WEB_DOCUMENTS
    )


def is_conversation(record: dict) -> bool:
    """Whether a record has the turns of a conversation."""
    return any(_turns(record.get(name)) for name in CONVERSATIONS)


def parts(record: dict, images: list) -> Iterator[str | list]:
    """Texts, and pictures as lists of one value, in reading order.

    Args:
        record: one for which :func:`is_interleaved` holds.
        images: the pictures of a conversation; its ``<image>`` marks are replaced by them in order.

    Raises:
        BadRecordError: more marks than pictures, lists of different lengths, a picture's place that is none.
    """
    for name in CONVERSATIONS:
        if turns := _turns(record.get(name)):
            return _conversation(turns, images)
    if isinstance(record.get("texts"), list):
        return _obelics(record["texts"], record["images"])
    return _mmc4(record["text_list"], record["image_info"])


def with_pictures(
    record: dict, members: list[str], find: Callable[[str], str | None], load: Callable[[str], bytes]
) -> dict:
    """A record whose pictures are bytes where an archive has them: by their name, or in order if there are as many.

    Args:
        members: names of the pictures that share the record's name.
        find: the member of the archive that a record means by a name.
        load: the bytes of a member.
    """

    def filled(values: list) -> list:
        wanted = [value for value in values if value]
        found = [find(value) if isinstance(value, str) else None for value in wanted]
        if not any(found) and len(members) == len(wanted):
            found = list(members)
        # A name that the archive lacks must not be looked for elsewhere: an archive may come from anybody.
        missing = [v if isinstance(v, str) and v.startswith("data:") else MISSING for v in wanted]
        places = iter([load(name) if name else value for name, value in zip(found, missing, strict=True)])
        return [value and next(places) for value in values]

    if is_conversation(record):
        named = record.get("image") or record.get("images") or []
        listed = named if isinstance(named, list) else [named]
        return {key: value for key, value in record.items() if key != "images"} | {
            "image": filled(listed) or [load(name) for name in members]
        }
    if isinstance(record.get("texts"), list):
        return record | {"images": filled(record["images"])}
    infos = record["image_info"]
    names = [info.get("image_name") or info.get("raw_url") if isinstance(info, dict) else None for info in infos]
    pairs = zip(infos, filled(names), strict=True)
    return record | {"image_info": [info | {"image_name": value} if value else info for info, value in pairs]}


def _turns(value) -> list[dict]:
    """Turns of a conversation; none where it is not one."""
    good = isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("value", turn.get("content")), str | list) for turn in value
    )
    return value if good else []


def _conversation(turns: list[dict], images: list) -> Iterator[str | list]:
    lines = []
    for turn in turns:
        said = turn.get("value", turn.get("content"))
        if isinstance(said, list):  # chats: {"type": "text", "text": ...}, {"type": "image"}
            said = "".join(MARK if p.get("type") == "image" else str(p.get("text") or "") for p in said)
        speaker = str(turn.get("from", turn.get("role", "")))
        lines.append(f"{_SPEAKERS.get(speaker.lower(), speaker.upper())}: {said.strip()}")
    texts = "\n".join(lines).split(MARK)
    marks = len(texts) - 1
    if marks > len(images):
        raise BadRecordError(f"more {MARK} marks than images: {marks} marks, {len(images)} images")
    # Pictures that no mark speaks of are what the conversation is about.
    first = len(images) - marks
    for image in images[:first]:
        yield [image]
    for number, text in enumerate(texts):
        if number:
            yield [images[first + number - 1]]
        yield text


def _obelics(texts: list, images: list) -> Iterator[str | list]:
    if len(texts) != len(images):
        raise BadRecordError(f"texts and images of different lengths: {len(texts)} texts, {len(images)} images")
    for text, image in zip(texts, images, strict=True):
        if image is not None:
            yield [image]
        if text is not None:
            yield f"{text}\n\n"


def _mmc4(texts: list, infos: list) -> Iterator[str | list]:
    at: dict[int, list] = {}
    for info in infos:
        place = info.get("matched_text_index") if isinstance(info, dict) else None
        if not isinstance(place, int) or not 0 <= place < len(texts):
            raise BadRecordError(f"no good matched_text_index: {place}, of {len(texts)} texts")
        at.setdefault(place, []).append(info.get("image_name") or info.get("raw_url"))
    for number, text in enumerate(texts):
        for image in at.get(number, ()):
            yield [image]
        yield f"{text}\n"
