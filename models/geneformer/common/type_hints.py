# SPDX-License-Identifier: Apache-2.0
"""Whether a value from YAML is what an argument's type hint asks for, and that hint in words.

Values are what YAML has: numbers, true and false, text, null, lists and sections. So a list stands for a tuple or a
set too, text for a path, one of its values for an Enum, and a section for a mapping, a TypedDict or a dataclass.
"""

import json
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import reduce
from operator import or_
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NewType,
    NotRequired,
    Required,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import GroupedMetadata
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo


NOUNS = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers"), str: ("text", "texts"),
         Path: ("a path", "paths")}  # fmt: skip
LIMITS = {"gt": "above {}", "ge": "of at least {}", "lt": "below {}", "le": "of at most {}",
          "multiple_of": "divisible by {}", "pattern": "that matches {}"}  # fmt: skip
LIST, SECTION, RECORD, UNION, LEAF = "list", "section", "record", "union", "leaf"


def misfit(key: str, value: Any, hint: Any) -> str | None:
    """The sentence for `key=value`, or for the first thing inside it, that is not as `hint` says; None if all is."""
    kind, metadata = _bare(hint)
    form, args = _form(kind), get_args(kind)
    wrong = f"{key}={as_text(value)} must be {describe(hint)}."
    if form == UNION:
        found = [misfit(key, value, _limited(branch, metadata)) for branch in args]
        inside = [sentence for sentence in found if sentence and not sentence.startswith(f"{key}=")]
        # Where one branch only takes such a list or section, what is wrong inside it says more.
        return None if None in found else inside[0] if len(inside) == 1 else wrong
    if form in (SECTION, RECORD):
        if not isinstance(value, dict):
            return wrong
        below = _misfits_of_record(key, value, kind) if form == RECORD else _misfits_of_section(key, value, args)
    elif form == LIST:
        if not isinstance(value, list | tuple) or len(value) != (_length(kind) or len(value)):
            return wrong
        items = _items(kind) if _length(kind) else [next(iter(_items(kind)), Any)] * len(value)
        below = (misfit(f"{key}[{i}]", x, item) for i, (x, item) in enumerate(zip(value, items, strict=True)))
    else:
        below = iter(())
    if sentence := next(filter(None, below), None):
        return sentence
    stands_for = {LIST: list, SECTION: dict, RECORD: dict}.get(form, kind)
    return None if _fits(value, _limited(stands_for, metadata)) else wrong


def _misfits_of_section(key: str, value: dict, args: tuple) -> Iterator[str | None]:
    of_keys, of_values = args if len(args) == 2 else (Any, Any)
    for name, item in value.items():
        if misfit(key, name, of_keys):
            yield f"{key}: its key {as_text(name)} must be {describe(of_keys)}."
        yield misfit(f"{key}.{name}", item, of_values)


def _misfits_of_record(key: str, value: dict, kind: type) -> Iterator[str | None]:
    hints, required = _record(kind)
    for name in value:
        if name not in hints:
            yield f"Unknown key {key}.{name}: known are {', '.join(f'{key}.{known}' for known in hints)}."
    for name, hint in hints.items():
        if name in value:
            yield misfit(f"{key}.{name}", value[name], hint)
        elif name in required:
            yield f"{key}.{name} is not set; {key} needs it."


def _fits(value: Any, hint: Any) -> bool:
    try:
        adapter = TypeAdapter(hint)
    except PydanticUserError:  # a type that pydantic does not know: whoever takes the value judges it
        return True
    try:  # JSON's strict mode, which knows that text may be a path; Python's would want the Path itself
        adapter.validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError:
        return False
    return True


def _bare(hint: Any) -> tuple[Any, tuple]:
    """A hint without names that stand for it, and what Annotated adds."""
    metadata: tuple = ()
    while True:
        origin = get_origin(hint)
        if origin is Annotated:
            hint, *added = get_args(hint)
            metadata = (*added, *metadata)
        elif origin in (Required, NotRequired):
            hint = get_args(hint)[0]
        elif isinstance(hint, NewType):
            hint = hint.__supertype__
        elif isinstance(hint, TypeVar):
            hint = reduce(or_, hint.__constraints__) if hint.__constraints__ else hint.__bound__ or Any
        elif type(hint).__name__ == "TypeAliasType":  # the statement `type X = ...`
            hint = hint.__value__
        elif type(origin).__name__ == "TypeAliasType":  # `X[int]` of `type X[T] = ...`
            hint = origin.__value__[get_args(hint)]
        else:
            return type(None) if hint is None else Any if hint is object else hint, metadata


def _limited(hint: Any, metadata: tuple) -> Any:
    return Annotated[hint, *metadata] if metadata and hint not in (None, type(None)) else hint


def _form(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin in (Union, types.UnionType):
        return UNION
    if not isinstance(origin, type) or issubclass(origin, str | bytes | Enum):
        return LEAF
    if is_dataclass(origin) or hasattr(origin, "__required_keys__") or hasattr(origin, "model_fields"):
        return RECORD
    if issubclass(origin, Mapping):
        return SECTION
    named = hasattr(origin, "_fields")  # a NamedTuple
    return LIST if origin is Iterable or (issubclass(origin, Collection) and not named) else LEAF


def _items(kind: Any) -> tuple:
    return tuple(arg for arg in get_args(kind) if arg is not ...)


def _length(kind: Any) -> int | None:
    """Of `tuple[X, Y]`; None where a list may have any."""
    args = get_args(kind)
    return len(args) if get_origin(kind) is tuple and ... not in args else None


def _record(kind: type) -> tuple[dict[str, Any], set[str]]:
    """Fields of a dataclass, a TypedDict or a pydantic model, and which must be given."""
    origin = get_origin(kind) or kind
    hints = get_type_hints(origin, include_extras=True)
    if is_dataclass(origin):
        given = [field for field in fields(origin) if field.init]
        required = {f.name for f in given if f.default is MISSING and f.default_factory is MISSING}
        return {field.name: hints[field.name] for field in given}, required
    if hasattr(origin, "__required_keys__"):
        return hints, set(origin.__required_keys__)
    return (
        {name: hints[name] for name in origin.model_fields},
        {name for name, field in origin.model_fields.items() if field.is_required()},
    )


# ---- in words


def as_text(value: Any) -> str:
    """A value as the command line has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def describe(hint: Any, many: bool = False) -> str:
    """What a hint asks for, in words, as in `lr must be a number above 0`; in the plural if `many`.

    `Annotated[..., Field(description="a list of layers")]` gives the words itself.
    """
    kind, metadata = _bare(hint)
    for item in metadata:
        if isinstance(item, FieldInfo) and item.description:
            return item.description
    form, args = _form(kind), get_args(kind)
    if kind is Any:
        return "anything"
    if form in (LIST, SECTION, RECORD):
        words = _list_words(kind, many) if form == LIST else _section_words(kind, form, many)
        return _with_limits(words, metadata, "items" if form == LIST else "keys")
    if form == UNION:
        choice = " or ".join(describe(_limited(branch, metadata)) for branch in args)
    elif get_origin(kind) is Literal:
        choice = "one of " + ", ".join(map(as_text, args))
    elif isinstance(kind, type) and issubclass(kind, Enum):
        choice = "one of " + ", ".join(as_text(member.value) for member in kind)
    elif kind in (bool, type(None)):
        choice = "true or false" if kind is bool else "null"
    else:
        name = getattr(kind, "__name__", str(kind))
        words = NOUNS.get(kind if isinstance(kind, type) else None, (f"a {name}", f"items of type {name}"))[many]
        if any(getattr(item, "allow_inf_nan", None) is False for item in _flattened(metadata)):
            words = words.replace("number", "finite number")
        return _with_limits(words, metadata, "characters")
    return f"items that are each {choice}" if many else choice


def _list_words(kind: Any, many: bool) -> str:
    items, length = _items(kind), _length(kind)
    words = "lists" if many else "a list"
    if length and any(item != items[0] for item in items):
        return f"{words} of {length} items ({', '.join(map(describe, items))})"
    if not items or _bare(items[0])[0] is Any:
        return f"{words} of {length} items" if length else words
    return f"{words} of {f'{length} ' if length else ''}{describe(items[0], many=True)}"


def _section_words(kind: Any, form: str, many: bool) -> str:
    words = "sections" if many else "a section"
    if form == RECORD:
        return f"{words} with {', '.join(_record(kind)[0])}"
    of_keys, of_values = get_args(kind) if len(get_args(kind)) == 2 else (Any, Any)
    words += " of keys"
    if _bare(of_keys)[0] not in (Any, str):
        words += f" that are each {describe(of_keys)}"
    return words if _bare(of_values)[0] is Any else f"{words} with {describe(of_values, many=True)}"


def _flattened(metadata: Iterable) -> Iterator[Any]:
    """Pydantic's Field and StringConstraints, and Interval, are several limits in one."""
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _flattened(item.metadata)
        elif isinstance(item, GroupedMetadata):
            yield from _flattened(item)
        else:
            yield item


def _with_limits(words: str, metadata: tuple, unit: str) -> str:
    found = {}
    for item in _flattened(metadata):
        for name in (*LIMITS, "min_length", "max_length"):
            if getattr(item, name, None) is not None:
                found[name] = getattr(item, name)
    least, most = found.get("min_length"), found.get("max_length")
    given = ((text, found[name]) for name, text in LIMITS.items() if name in found)
    limits = [text.format(getattr(limit, "pattern", limit)) for text, limit in given]  # a pattern may be compiled
    for count, how in ((least, "at least"), (most, "at most")) if least != most else ((least, "exactly"),):
        if count is not None:
            limits.append(f"with {how} {count} {unit if count != 1 else unit.removesuffix('s')}")
    return " ".join([words, " and ".join(limits)] if limits else [words])
