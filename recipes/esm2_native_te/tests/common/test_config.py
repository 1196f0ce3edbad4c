# SPDX-License-Identifier: Apache-2.0
"""Every kind of type hint is checked and described, and a mistake is one sentence that names the key."""

import enum
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NewType, NotRequired, Optional, TypedDict, TypeVar, Union

import annotated_types as at
import pytest
import torch
from omegaconf import OmegaConf
from pydantic import (
    BaseModel,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    conint,
    conlist,
)
from typing_extensions import TypeAliasType

import common.config
from common.config import check_config, check_section, help_text, keyword_only
from common.type_hints import describe, misfit


class Kind(enum.Enum):
    LINEAR = "linear"
    STEP = "step"


class Element(enum.IntEnum):
    H = 1
    C = 6


@dataclass(kw_only=True)
class Term:
    weight: PositiveFloat
    kind: Literal["mse", "mae"] = "mse"
    of: list[str] = field(default_factory=list)
    computed: int = field(default=0, init=False)


class Source(TypedDict):
    path: str
    share: NotRequired[Annotated[float, at.Interval(ge=0, le=1)]]


class Options(BaseModel):
    depth: PositiveInt
    name: str = "x"


class Point(NamedTuple):
    x: float
    y: float


Width = NewType("Width", int)
Shape = TypeAliasType("Shape", list[PositiveInt])
Item = TypeVar("Item")
Named = TypeAliasType("Named", dict[str, Item], type_params=(Item,))
Number = TypeVar("Number", bound=float)
Either = TypeVar("Either", int, str)


# hint, its words, values that fit, values that do not
HINTS = [
    (int, "a whole number", [0, -3, 10**20], [1.0, True, "1", None, [1]]),
    (float, "a number", [1, 2.5, float("inf"), float("nan")], ["1.0", True, None]),
    (bool, "true or false", [True, False], [0, 1, "true", None]),
    (str, "text", ["", "a"], [1, None, ["a"], True]),
    (None, "null", [None], [0, "", "null"]),
    (type(None), "null", [None], [0]),
    (Path, "a path", ["a/b", ""], [1, None, ["a"]]),
    (Any, "anything", [None, 1, {"a": [1]}], []),
    (object, "anything", [None, "a"], []),
    (int | None, "a whole number or null", [1, None], [1.5, "1"]),
    (Optional[float], "a number or null", [1, None], ["1"]),  # noqa: UP045
    (Union[int, str], "a whole number or text", [1, "a"], [1.5, None]),  # noqa: UP007
    (bool | None, "true or false or null", [True, None], [1]),
    (Literal["a", 2, True, None], "one of a, 2, true, null", ["a", 2, True, None], ["b", 3, False]),
    (Literal["a", "b"] | None, "one of a, b or null", ["a", None], ["c"]),
    (PositiveInt, "a whole number above 0", [1], [0, -1, 1.0]),
    (NonNegativeInt | None, "a whole number of at least 0 or null", [0, None], [-1]),
    (FiniteFloat, "a finite number", [1.5], [float("inf"), float("nan")]),
    (list[FiniteFloat], "a list of finite numbers", [[1.5]], [1.5]),
    (Annotated[float, at.Gt(0), at.Lt(1)], "a number above 0 and below 1", [0.5], [0, 1, 1.5, float("nan")]),
    (Annotated[float, at.Interval(ge=0, le=1)], "a number of at least 0 and of at most 1", [0, 1], [-0.1, 1.1]),
    (Annotated[float, Field(ge=0, lt=1)], "a number of at least 0 and below 1", [0], [1]),
    (Annotated[int, Field(multiple_of=8)], "a whole number divisible by 8", [16], [12]),
    (Annotated[int | None, at.Gt(2)], "a whole number above 2 or null", [3, None], [2]),
    (Annotated[Annotated[int, at.Ge(1)], at.Le(3)], "a whole number of at least 1 and of at most 3", [1], [0, 4]),
    (conint(ge=1, multiple_of=3), "a whole number of at least 1 and divisible by 3", [3], [4, 0]),
    (Annotated[str, at.MinLen(1)], "text with at least 1 character", ["a"], [""]),
    (Annotated[str, StringConstraints(max_length=3)], "text with at most 3 characters", ["abc"], ["abcd"]),
    (Annotated[str, Field(pattern="^[a-z]+$")], "text that matches ^[a-z]+$", ["abc"], ["a1"]),
    (Annotated[str, at.Len(2, 2)], "text with exactly 2 characters", ["ab"], ["a"]),
    (Annotated[str, "a note of somebody else's"], "text", ["a"], [1]),
    (Annotated[list[int | str], Field(description="a list of layers")], "a list of layers", [[1, "2-3"]], [1, "1"]),
    (list, "a list", [[], [1, "a"]], [1, "a", {}]),
    (list[Any], "a list", [[1, "a"]], [1]),
    (list[int], "a list of whole numbers", [[], [1]], [1, "12"]),
    (list[str], "a list of texts", [["a"]], ["a"]),
    (list[Path], "a list of paths", [["a"]], ["a"]),
    (list[bool], "a list of items that are each true or false", [[True]], [True]),
    (list[list[float]], "a list of lists of numbers", [[[1]]], [1]),
    (list[PositiveInt], "a list of whole numbers above 0", [[1]], [0]),
    (list[int | None], "a list of items that are each a whole number or null", [[1, None]], [1]),
    (list[dict[str, int]], "a list of sections of keys with whole numbers", [[{"a": 1}]], [{"a": 1}]),
    (conlist(float, min_length=2, max_length=2), "a list of numbers with exactly 2 items", [[1, 2]], [[1]]),
    (Annotated[list[float], at.MinLen(1)], "a list of numbers with at least 1 item", [[1]], [[]]),
    (tuple, "a list", [[1, "a"]], [1]),
    (tuple[float, ...], "a list of numbers", [[], [1, 2]], [1]),
    (tuple[float, float], "a list of 2 numbers", [[0.9, 0.98]], [[0.9], [1, 2, 3], 1]),
    (tuple[int, str], "a list of 2 items (a whole number, text)", [[1, "a"]], [[1], "ab"]),
    (set[int], "a list of whole numbers", [[1, 2]], [1]),
    (frozenset[str], "a list of texts", [["a"]], ["a"]),
    (Sequence[float], "a list of numbers", [[1]], [1, "1"]),
    (Sequence[str], "a list of texts", [["a"]], ["a"]),
    (Iterable[int], "a list of whole numbers", [[1]], [1]),
    (Collection[int], "a list of whole numbers", [[1]], [1]),
    (Sequence[int | str] | str | int | None, "a list of items that are each a whole number or text or text or a whole "
     "number or null", [[1, "2"], "a", 1, None], [1.5]),
    (dict, "a section of keys", [{}, {"a": 1}], [[], 1, "a"]),
    (dict[str, float], "a section of keys with numbers", [{"a": 1}], [1]),
    (dict[str, Any] | None, "a section of keys or null", [{"a": [1]}, None], [1]),
    (dict[int, str], "a section of keys that are each a whole number with texts", [{1: "a"}], [1]),
    (Mapping[str, int], "a section of keys with whole numbers", [{"a": 1}], [[1]]),
    (MutableMapping[str, list[int]], "a section of keys with lists of whole numbers", [{"a": [1]}], [1]),
    (dict[Literal["e", "f"], float], "a section of keys that are each one of e, f with numbers", [{"e": 1}], [1]),
    (Annotated[dict[str, int], at.MinLen(1)], "a section of keys with whole numbers with at least 1 key",
     [{"a": 1}], [{}]),
    (Kind, "one of linear, step", ["linear", "step"], ["LINEAR", "x", 1]),
    (list[Kind], "a list of items that are each one of linear, step", [["step"]], ["step"]),
    (Element, "one of 1, 6", [1, 6], [2, "H"]),
    (Term, "a section with weight, kind, of", [{"weight": 1}, {"weight": 1, "kind": "mae", "of": ["a"]}], [1, []]),
    (Source, "a section with path, share", [{"path": "a"}, {"path": "a", "share": 1}], ["a"]),
    (Options, "a section with depth, name", [{"depth": 1}], [1]),
    (list[Term], "a list of sections with weight, kind, of", [[{"weight": 1}]], [{"weight": 1}]),
    (Width, "a whole number", [1], ["a"]),
    (Shape, "a list of whole numbers above 0", [[1]], [1]),
    (Named[int], "a section of keys with whole numbers", [{"a": 1}], [1]),
    (Number, "a number", [1.5], ["a"]),
    (Either, "a whole number or text", [1, "a"], [1.5]),
    # What YAML cannot say is for the callable to judge.
    (torch.dtype, "a dtype", ["float32", 1], []),
    (Callable[[int], int], "a Callable", [], ["a"]),
    (Point, "a Point", [[1, 2]], [[1]]),
    (type[int], "a type", [], []),
    ("Elsewhere", "a Elsewhere", [], []),
]  # fmt: skip


@pytest.mark.parametrize(("hint", "words", "good", "bad"), HINTS, ids=[str(row[0]) for row in HINTS])
def test_every_kind_of_hint(hint, words, good, bad):
    assert describe(hint) == words
    describe(hint, many=True)
    for value in good:
        assert misfit("key", value, hint) is None
    for value in bad:
        assert misfit("key", value, hint).endswith(f" must be {words}.")


@pytest.mark.parametrize(
    ("hint", "value", "sentence"),
    [
        (list[float], [1, 2, "abc"], "key[2]=abc must be a number."),
        (list[float], [None], "key[0]=null must be a number."),
        (list[list[int]], [[1], [2, True]], "key[1][1]=true must be a whole number."),
        (dict[str, PositiveFloat], {"a": 1, "b": -1}, "key.b=-1 must be a number above 0."),
        (dict[str, list[float]], {"a": [1, "x"]}, "key.a[1]=x must be a number."),
        (dict[Literal["e", "f"], float], {"e": 1, "g": 2}, "key: its key g must be one of e, f."),
        (dict[str, int], {1: 1}, "key: its key 1 must be text."),
        (tuple[int, str], [1, 2], "key[1]=2 must be text."),
        (tuple[float, ...], [1, "x"], "key[1]=x must be a number."),
        (set[int], [1, 1.5], "key[1]=1.5 must be a whole number."),
        (list[Kind], ["linear", "cubic"], "key[1]=cubic must be one of linear, step."),
        (list[Path], ["a", 1], "key[1]=1 must be a path."),
        (Term, {"kind": "mse"}, "key.weight is not set; key needs it."),
        (Term, {"weight": 0}, "key.weight=0 must be a number above 0."),
        (Term, {"weight": 1, "wait": 2}, "Unknown key key.wait: known are key.weight, key.kind, key.of."),
        (Term, {"weight": 1, "computed": 2}, "Unknown key key.computed: known are key.weight, key.kind, key.of."),
        (dict[str, Term], {"e": {"weight": 1, "of": ["a", 1]}}, "key.e.of[1]=1 must be text."),
        (list[Source], [{"path": "a", "share": 2}], "key[0].share=2 must be a number of at least 0 and of at most 1."),
        (Options, {"depth": 0}, "key.depth=0 must be a whole number above 0."),
        (list[float] | None, [1, "x"], "key[1]=x must be a number."),  # only one of the two takes a list
        (dict[str, int] | list[int], [1, "x"], "key[1]=x must be a whole number."),
        (list[int] | list[str], [1, "x"], "key=[1, 'x'] must be a list of whole numbers or a list of texts."),
        (Annotated[list[int], at.MaxLen(1)], [1, "x"], "key[1]=x must be a whole number."),
        (
            Annotated[list[int], at.MaxLen(1)],
            [1, 2],
            "key=[1, 2] must be a list of whole numbers with at most 1 item.",
        ),
    ],
)
def test_what_is_wrong_inside_is_named(hint, value, sentence):
    assert misfit("key", value, hint) == sentence


# ---- sections


class Reader:
    def __init__(self, rank: int, *, path: str, mix: list[float] = (), workers: NonNegativeInt = 0):
        pass


def start(run: dict, *, mode: Literal["on", "off"] = "off", **settings: float):
    pass


def top_level(*, seed: int = 0, name: str | None = None):
    pass


def check(values: dict, refuse: str | None = None) -> None:
    def check_pairs(config):
        if refuse:
            raise ValueError(f"{refuse}: {config.reader.path}")

    check_config(OmegaConf.create(values), top_level, {"reader": Reader, "start": start}, check_pairs)


GOOD = {"seed": 1, "name": None, "reader": {"path": "a", "mix": [1, 0.5]}, "start": {"mode": "on", "x": 2}}


def test_a_sections_keys_are_what_is_keyword_only():
    assert list(keyword_only(Reader)) == ["path", "mix", "workers"]
    assert list(keyword_only(start)) == ["mode"]
    check(GOOD)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": "a"}, "seed=a must be a whole number."),
        ({"sed": 1}, "Unknown key sed: did you mean seed?"),
        ({"reader": {"path": 3}}, "reader.path=3 must be text."),
        ({"reader": {"path": "???"}}, "reader.path is not set; give it on the command line or in the config."),
        ({"reader": {"path": "???"}, "name": "${reader.path}"}, "reader.path is not set; give it on the command line"),
        ({"reader": {"path": "a", "mix": [1, "x"]}}, "reader.mix[1]=x must be a number."),
        ({"reader": {}}, "reader.path was taken out of the configuration; to leave it as it is, do not name it."),
        ({"reader": {"path": "a", "rank": 1}}, "Unknown key reader.rank"),
        ({"reader": None}, "reader=null must be a section; set its keys, reader.<name>=<value>."),
        ({"start": {"mode": True}}, "start.mode=true must be one of on, off."),
        ({"start": {"y": "fast"}}, "start.y=fast must be a number."),  # by the hint of **settings
        ({"name": "${nothing}"}, "Interpolation key 'nothing' not found"),
    ],
)
def test_one_sentence(capsys, change, sentence):
    with pytest.raises(SystemExit) as stopped:
        check({**GOOD, **change})
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {sentence}") and said.count("\n") == 1


@pytest.mark.parametrize("key", ["seed", "name", "reader", "start"])
def test_a_key_that_is_gone(capsys, key):
    with pytest.raises(SystemExit):
        check({k: v for k, v in GOOD.items() if k != key})
    assert f"error: {key} was taken out of the configuration" in capsys.readouterr().err


def test_a_name_may_be_a_large_number(monkeypatch):
    values = OmegaConf.create({**GOOD, "name": 202611292314})  # a folder named by the time, say
    monkeypatch.setattr(common.config, "_typed", lambda: {"name": "202611292314"})
    check_config(values, top_level, {"reader": Reader, "start": start}, lambda config: None)
    assert values.name == "202611292314"


def test_pairs_are_last(capsys):
    with pytest.raises(SystemExit):
        check(GOOD, refuse="these two cannot be")
    assert capsys.readouterr().err == "error: these two cannot be: a\n"
    with pytest.raises(SystemExit):
        check({**GOOD, "seed": None}, refuse="these two cannot be")
    assert capsys.readouterr().err == "error: seed=null must be a whole number.\n"


def test_kwargs_without_a_hint_take_anything():
    def passes_on(*, a: int = 0, **others):
        pass

    check_section("s", {"a": 1, "b": [None]}, passes_on)
    with pytest.raises(ValueError, match=r"s\.a=x must be a whole number"):
        check_section("s", {"a": "x"}, passes_on)


def test_without_kwargs_no_other_key_will_do():
    def strange(*, kwargs: int = 0):
        pass

    with pytest.raises(ValueError, match=r"Unknown key s\.b"):
        check_section("s", {"b": 1}, strange)


def test_help_begins_with_the_first_section_of_keys():
    text = help_text("What it is.\n")
    assert text.startswith("What it is.\n") and "# ---- " in text and "hydra:" not in text
    assert "defaults:" not in text
