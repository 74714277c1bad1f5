"""How settings are declared, read and checked; which ones there are stands in ``config.py``.

A setting is a field of a keyword-only dataclass. :func:`setting` gives it a range and says what may be done with it;
ranges are checked here, for all dataclasses alike, when values come from YAML or from ``--section.key value``. What
concerns several fields is the dataclass's own ``problems()``. All problems are reported at once.
"""

import argparse
import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from megamm.errors import InputError, ProblemsError


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is known of a field beside its type; see :func:`setting`."""

    min: float | None = None
    max: float | None = None
    below: float | None = None
    also: float | None = None
    free: bool = False
    study: bool = False
    partial: bool = False

    def allows(self, number: float) -> bool:
        """Whether a finite number is in the range."""
        # First: it may lie outside of the range.
        if number == self.also:
            return True
        return (
            (self.min is None or number >= self.min)
            and (self.max is None or number <= self.max)
            and (self.below is None or number < self.below)
        )

    def range(self, noun: str) -> str:
        """The range in words: ``noun`` from this to that."""
        if self.min is None:
            return noun
        other = "" if self.also is None else f"{self.also:g}, or "
        end = f"to {_number(self.max)}" if self.below is None else f"to below {_number(self.below)}"
        return f"{other}{noun} from {_number(self.min)} {end}"


def setting(
    default: Any = MISSING,
    *,
    default_factory: Any = MISSING,
    min: float | None = None,
    max: float | None = None,
    below: float | None = None,
    also: float | None = None,
    free: bool = False,
    study: bool = False,
    partial: bool = False,
) -> Any:
    """A dataclass field that is a setting.

    Args:
        min, max, below: the range of a number, or of each number in a list, and of keys and values of a mapping. Every
            number has one, with two finite ends; infinity and NaN are in none.
        also: one more number that is allowed, as a word would be (0 for "off", -1 for "the rest").
        free: may change when a run is resumed: it alters neither the model nor the order of the data.
        study: set by a study for each of its runs.
        partial: settings that others complete; ``problems()`` of what is in it has to wait for that.
    """
    # In the field's metadata, which dataclasses keep for others.
    about = Setting(min=min, max=max, below=below, also=also, free=free, study=study, partial=partial)
    return dataclasses.field(default=default, default_factory=default_factory, metadata={"setting": about})


def marked(cls: type, mark: str) -> list[str]:
    """The settings of ``cls`` that are ``free`` or set by the ``study``, as ``section.key`` in their order."""
    return [".".join(path) for path, f, _ in leaves(cls) if getattr(setting_of(f), mark)]


def setting_of(field: dataclasses.Field) -> Setting:
    """What :func:`setting` said of a field."""
    return field.metadata.get("setting", Setting())


def leaves(cls: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dataclasses.Field, Any]]:
    """Path, field and type of every setting in ``cls`` and in what it holds; NAME stands for a name that users give."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint, here = hints[f.name], (*path, f.name)
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, here)
        elif typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
            yield from leaves(typing.get_args(hint)[1], (*here, "NAME"))
        else:
            yield here, f, hint


# ---- reading ---------------------------------------------------------------------------------------------


def read_settings(cls: type, paths: list[Path | str] | Path | str | None, overrides: list[str] | None = None) -> Any:
    """Settings from YAML files, later ones over earlier ones, and from command-line overrides over both.

    Raises:
        InputError: a file that cannot be read, or every problem of the settings at once.
    """
    # Here and not above: settings that are made in Python need no YAML.
    from megamm.yaml_text import read_yaml

    values: dict = {}
    paths = [paths] if isinstance(paths, str | Path) else paths or []
    for path in paths:
        merge(values, read_yaml(path))
    merge(values, parse_overrides(overrides or []))  # last, so that the command line wins
    return build(cls, values, where=", ".join(map(str, paths)) or "config")


def parse_overrides(arguments: list[str]) -> dict:
    """Turn ``["--train.steps", "10", "--data.workers=2"]`` into nested dictionaries; values are read as YAML.

    Where a setting is given twice the last one holds, as is usual on a command line.

    Raises:
        InputError: an option without a value, or a value that is not YAML.
    """
    from megamm.yaml_text import parse_yaml

    nested: dict = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        key, equals, value = option[2:].partition("=")
        path = key.split(".")
        if not option.startswith("--") or not all(path):
            raise InputError(f"{option!r}: expected --section.key value")
        if not equals:
            if not rest:
                raise InputError(f"--{key}: a value must follow")
            value = rest.pop(0)
        # As in a file: null, 1e-3, [1, 2] and true mean the same in both places.
        entry = parse_yaml(value, where=f"--{key}")
        for name in reversed(path):  # from the inside out
            entry = {name: entry}
        merge(nested, entry)
    return nested


def merge(base: dict, changes: dict) -> dict:
    """Merge nested ``changes`` into ``base`` in place, the later value winning; returns ``base``."""
    for key, value in changes.items():
        # Sections grow together; lists are replaced, as nobody could take an entry out again otherwise.
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value
    return base


def build(cls: type, values: dict, where: str = "config") -> Any:
    """Make a dataclass of settings from nested dictionaries.

    Raises:
        ProblemsError: with every problem in ``values``.
    """
    reader = _Reader()
    found = reader.section(cls, values, "", checked=True)
    if reader.problems:
        raise ProblemsError(where, reader.problems)
    return found


class _Reader:
    """Turns plain values into settings and notes every problem."""

    # None will not do: it is a value that some settings take.
    BAD = object()
    """What stands for a value that has a problem."""

    def __init__(self):
        self.problems: list[str] = []

    def section(self, cls: type, values: Any, where: str, checked: bool) -> Any:
        """A dataclass; where none of its own fields is wrong, and ``checked``, ``problems()`` adds what it finds."""
        if not isinstance(values, dict):
            return self._unexpected(where, "a mapping of settings", values)
        # The problems so far: the length tells afterwards whether this section has added any.
        known, hints, before = (
            {f.name: f for f in dataclasses.fields(cls)},
            typing.get_type_hints(cls),
            self.problems[:],
        )
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
                self.problems.append(f"{_join(where, key)}: unknown key; {hint}")
        made = {}
        for name, field in known.items():
            # Sections also where nothing is given, since their settings may be missing or wrong together.
            if name in values or dataclasses.is_dataclass(hints[name]):
                inner = checked and not setting_of(field).partial
                made[name] = self.value(hints[name], values.get(name), _join(where, name), setting_of(field), inner)
            elif field.default is MISSING and field.default_factory is MISSING:
                self.problems.append(f"{_join(where, name)}: missing; set it")
        # What fields say together makes sense only if each is good by itself.
        if len(self.problems) > len(before):
            return self.BAD
        found = cls(**made)
        if checked and hasattr(found, "problems"):
            self.problems += found.problems()
        return found

    def value(self, hint: Any, value: Any, where: str, about: Setting, checked: bool) -> Any:
        """One value of the type ``hint``."""
        # Leaves the loop at the first kind that fits, which is used below.
        for kind in _alternatives(hint):
            if _is_of(kind, value):
                break
        else:
            return self._unexpected(where, expected(hint, about), value)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return self.section(kind, {} if value is None else value, where, checked)
        if origin is list:
            items = enumerate(value or [])
            return [self.value(arguments[0], item, _join(where, i), about, checked) for i, item in items]
        if origin is dict:
            return self._mapping(arguments, value or {}, where, about, checked)
        if kind in (int, float):
            return self._number(kind, hint, value, where, about)
        return value

    def _mapping(self, kinds: tuple, value: dict, where: str, about: Setting, checked: bool) -> dict:
        found: dict = {}
        for key, entry in value.items():
            here = _join(where, key)
            # A name may look like a number: data.sources.2026.
            name = str(key) if kinds[0] is str and type(key) is int else key
            name = self.value(kinds[0], name, here, about, checked)
            if name in found and name is not self.BAD:  # 2026 and "2026" are one name
                self.problems.append(f"{here}: stands twice; keep one of them")
            found[name] = self.value(kinds[1], entry, here, about, checked)
        return found

    def _number(self, kind: type, hint: Any, value: float, where: str, about: Setting) -> Any:
        # A whole number may be written 1e6, and any number without a point. Huge ones do not fit a float.
        good = -1e300 < value < 1e300 and (kind is float or value == int(value))
        if not good or not about.allows(kind(value)):
            return self._unexpected(where, expected(hint, about), value)
        return kind(value)

    def _unexpected(self, where: str, wanted: str, value: Any) -> Any:
        # YAML reads 1e3, 2026 or true as something else than text.
        hint = "; put it in quotes" if wanted.startswith("text") and type(value) in (int, float, bool) else ""
        self.problems.append(f"{where or 'settings'}: expected {wanted}, found {_show(value)}{hint}")
        return self.BAD


def expected(hint: Any, about: Setting) -> str:
    """What a setting takes, in words."""
    words = []
    for kind in _alternatives(hint):
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is typing.Literal:
            words.append(("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments)))
        elif origin is list:
            words.append(f"a list, each {expected(arguments[0], about)}")
        elif origin is dict:
            words.append("a mapping")
        elif kind in (int, float):
            words.append(about.range("a whole number" if kind is int else "a number"))
        else:
            names = {bool: "true or false", str: "text", types.NoneType: "null"}
            words.append(names.get(kind, "a mapping of settings"))
    return ", or ".join(words)


def _alternatives(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value looks like one of a type; an empty section, list or mapping is written as nothing."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return True
    if kind in (int, float):
        return type(value) in (int, float)  # type, not isinstance: True is no number here
    if origin is typing.Literal:
        return type(value) in (str, int) and value in typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict | None)
    return isinstance(value, origin | None if origin else kind)


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _show(value: Any) -> str:
    """A value as its owner wrote it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    # Python refuses to write integers of thousands of digits, with an error of its own.
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 80
    return shown.repr(value)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and value < 10**12 else f"{value:g}"


# ---- writing ---------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict:
    """The settings as nested plain dictionaries."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The settings as YAML, in the order of their definition."""
    from megamm.yaml_text import dump_yaml

    return dump_yaml(to_dict(config))


def add_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """List every setting of ``cls`` in the help of ``parser``: its sentence, what it takes and its default."""
    groups: dict[str, Any] = {}
    for path, field, hint in leaves(cls):
        owner = _owner(cls, path)
        title = ".".join(path[:-1])
        if title not in groups:
            groups[title] = parser.add_argument_group(title, (owner.__doc__ or "").split("\n")[0])
        default = ""
        if field.default is not MISSING:
            default = f"; default {'null' if field.default is None else _show(field.default).strip(chr(39))}"
        text = f"{sentences(owner)[field.name]} ({expected(hint, setting_of(field))}{default})"
        # For the help alone: the values are read by parse_overrides. argparse takes % for a format.
        groups[title].add_argument(f"--{'.'.join(path)}", metavar="VALUE", help=text.replace("%", "%%"))


def sentences(cls: type) -> dict[str, str]:
    """The docstring under each field of ``cls``, on one line."""
    import docstring_parser

    found = docstring_parser.parse_from_object(cls).params
    return {one.arg_name: " ".join((one.description or "").split()) for one in found}


def _owner(cls: type, path: tuple[str, ...]) -> type:
    """The dataclass that holds the last field of ``path``."""
    for name in path[:-1]:
        if name != "NAME":  # given by users; the type of the entries is that of the mapping
            hint = typing.get_type_hints(cls)[name]
            cls = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else hint
    return cls
