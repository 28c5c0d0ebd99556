from dataclasses import dataclass

import pytest

from tinsmith.core.errors import UserError
from tinsmith.core.parse import Config, parse, to_plain
from tinsmith.data.sources import ChatsData, DataConfig, HubData, StdlibData, TasksData, TextData


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    data: DataConfig | tuple[DataConfig, ...]


def read(data):
    return parse(Recipe, {"data": data}, "r.yaml").data


def test_a_recipe_names_one_kind_or_a_list_of_them():
    assert read({"kind": "stdlib"}) == StdlibData()
    assert read(
        [{"kind": "tasks", "count": "20k"}, {"kind": "text", "path": "x", "weight": 2}]
    ) == (
        TasksData(count=20_000),
        TextData(path="x", weight=2.0),
    )
    assert read({"kind": "hub", "name": "a/b", "field": None}) == HubData(name="a/b", field=None)
    assert read({"kind": "chats", "path": "x", "validation": "y.jsonl"}).validation == "y.jsonl"


def test_configs_round_trip_through_plain_data():
    for config in (
        StdlibData(),
        TasksData(tasks=("sort",)),
        TextData(path="x"),
        ChatsData(path="x"),
        HubData(name="n", limit=5),
    ):
        assert next(iter(to_plain(config))) == "kind"
        assert read(to_plain(config)) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "stdlb"}, "Did you mean 'stdlib'"),
        ({"kind": "text"}, "data.path: required"),
        (
            {"kind": "text", "path": "x", "feld": "y"},
            "data.feld: unknown key. Did you mean 'field'",
        ),
        ({"kind": "stdlib", "weight": 0}, "weight=0.0 must be above 0"),
        ({"kind": "stdlib", "weight": float("inf")}, "data.weight: Input should be a finite"),
        ({"kind": "stdlib", "validation": 0.9}, "validation=0.9 must be a fraction from 0 to 0.5"),
        ({"kind": "stdlib", "validation": "x"}, "data.validation"),
        ({"kind": "stdlib", "limit": 0}, "limit=0 must be at least 1"),
        ({"kind": "tasks", "tasks": []}, "tasks must name at least one of"),
        ({"kind": "tasks", "tasks": ["sorting"]}, "'arithmetic', 'sort', 'copy' or 'calculator'"),
        ({"kind": "tasks", "digits": 20}, "digits=20 must be from 1 to 9"),
        ({"kind": "text", "path": "x", "on_bad_line": "skip"}, "'reject' or 'fail'"),
    ],
)
def test_an_invalid_value_is_a_one_line_error_that_names_the_key(data, message):
    with pytest.raises(UserError) as caught:
        read(data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
