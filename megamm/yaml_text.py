"""YAML for all files and overrides of the project: read one way, and no key twice.

Plain words are read by the core rules of YAML 1.2:

====================================  ==================================================================
``12``, ``-3``, ``064``, ``+7``       whole numbers; a leading zero means nothing (064 is 64)
``0o17``, ``0x1F``                    whole numbers to base 8 and 16
``1.5``, ``1e-3``, ``.5``, ``2.``     numbers; ``.inf``, ``-.inf`` and ``.nan`` too, which no setting takes
``true``, ``false``                   true and false (also True, TRUE); ``yes``, ``no``, ``on``, ``off`` are text
``null``, ``~``, nothing              nothing
``2026-01-31``, ``1:30``, ``0b1``     text, as everything else and all that is in quotes
====================================  ==================================================================

Two things go beyond them: ``1_000_000`` is a number, and ``<<: *name`` merges a mapping into another, whose own keys
win. Values are plain numbers, text, lists and mappings; other tags (``!!python/...``) are refused.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from megamm.errors import InputError, ProblemsError

DIGITS = r"[0-9]+(?:_[0-9]+)*"
WORDS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (rf"[-+]?{DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        rf"[-+]?(?:\.{DIGITS}|{DIGITS}(?:\.(?:{DIGITS})?)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
"""Kind of a plain word -> what it looks like, and its first characters; tried in this order."""
TAG = "tag:yaml.org,2002:"


def read_yaml(path: Path | str) -> dict:
    """Read a YAML file that holds a mapping, by the rules above.

    Raises:
        InputError: the file is missing, is not YAML, has a key twice or is not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    value = parse_yaml(text, where=str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a mapping of sections (model:, data:, ...)")
    return value


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Args:
        where: file or option that it is from, for messages.

    Raises:
        InputError: it is not YAML, or a key stands twice in a mapping; every such key is named with its lines.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        twice: list[str] = []
        _find_twice(loader, node, "", twice, set())
        if twice:
            raise ProblemsError(where, twice)
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        reason = reason.replace('in "<unicode string>", ', "in ")
        raise InputError(f"{where}: not valid YAML: {reason}") from error


def dump_yaml(value: Any) -> str:
    """Numbers, text, lists and mappings as YAML in their order; text is quoted where any reader could mistake it."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """Knows the words and tags of this module, none of PyYAML's (which follow YAML 1.1)."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own table, emptied
    yaml_constructors: dict = {}  # type: ignore[misc]  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would read as something other than text."""


def _find_twice(loader: _Loader, node: yaml.Node, path: str, found: list[str], seen: set[int]) -> None:
    """Append a line to ``found`` for every key that stands twice in a mapping at or below ``node``."""
    if isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _find_twice(loader, item, f"{path}{i}.", found, seen)
        return
    lines: dict[Any, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key_node.start_mark)
        merges = key_node.tag == f"{TAG}merge"
        key = key_node.value if merges else loader.construct_object(key_node)
        if key in lines:
            where = f"twice, in lines {lines[key]} and {line}" if line > lines[key] else f"twice in line {line}"
            found.append(f"{path}{key_node.value}: stands {where}; keep one of them")
        lines.setdefault(key, line)
        _find_twice(loader, value_node, f"{path}{key_node.value}.", found, seen)


def _scalar(kind: str, make: Any) -> None:
    """Teach the loader a kind of plain word and its value."""
    pattern, first = re.compile(rf"(?:{WORDS[kind][0]})\Z"), WORDS[kind][1]
    _Loader.add_implicit_resolver(f"{TAG}{kind}", pattern, first)
    if kind in ("int", "float"):
        _Dumper.add_implicit_resolver(f"{TAG}{kind}", pattern, first)
    if make is None:
        return

    def construct(loader: _Loader, node: Any) -> Any:
        text = loader.construct_scalar(node)
        try:
            if not pattern.match(text):
                raise ValueError
            return make(text.replace("_", ""))
        except ValueError:  # Python reads no whole number of more than 4300 digits
            message = f"{text[:40]!r} is not of the kind {kind}"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from None

    _Loader.add_constructor(f"{TAG}{kind}", construct)


def _integer(text: str) -> int:
    bases = {"0o": 8, "0x": 16}
    return int(text[2:], bases[text[:2]]) if text[:2] in bases else int(text)


def _number(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _text(loader: _Loader, node: Any) -> str:
    return loader.construct_scalar(node)


def _list(loader: _Loader, node: Any) -> list:
    return loader.construct_sequence(node, deep=True)


def _mapping(loader: _Loader, node: yaml.Node) -> dict:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, "expected a mapping", node.start_mark)
    loader.flatten_mapping(node)  # what << merges comes first, so that the mapping's own keys win
    return {loader.construct_object(k): loader.construct_object(v, deep=True) for k, v in node.value}


def _refuse(loader: _Loader, node: yaml.Node) -> None:
    raise yaml.constructor.ConstructorError(
        None, None, f"the tag {node.tag.replace(TAG, '!!')} is not read here", node.start_mark
    )


_scalar("null", lambda text: None)
_scalar("bool", lambda text: text.lower() == "true")
_scalar("int", _integer)
_scalar("float", _number)
_scalar("merge", None)
for _kind, _make in {"str": _text, "seq": _list, "map": _mapping}.items():
    _Loader.add_constructor(f"{TAG}{_kind}", _make)
_Loader.add_constructor(None, _refuse)
