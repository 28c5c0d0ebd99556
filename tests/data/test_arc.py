"""Puzzles: ids and back, views, what is learned of them, and files that hold them."""

import gzip
import itertools
import json
import random

import numpy as np
import pytest
import torch

from tinsmith.core.errors import UserError
from tinsmith.data.arc.encoding import (
    MAX_ANSWER_TOKENS,
    ArcExample,
    answer_has_input_shape,
    encode_answer,
    encode_example,
    encode_puzzle_prompt,
    parse_answer,
)
from tinsmith.data.arc.grids import Pair, Puzzle, View, apply_symmetry, augment, inverse_symmetry
from tinsmith.data.files import Reject
from tinsmith.data.loader.loader import open_dataset
from tinsmith.data.sources import ArcData, TextData
from tinsmith.data.sources.arc import find_task_files, read_solutions, read_tasks
from tinsmith.text.grid_vocab import SYMBOLS, grid_tokenizer

SOLUTION, TURN, END = SYMBOLS.index("<|solution|>"), SYMBOLS.index("<|im_start|>"), 11
ODD = ((1, 2, 3), (4, 5, 6))
"""A grid that no symmetry leaves as it is."""


def grid(numbers, height, width):
    return tuple(tuple(numbers.randrange(10) for _ in range(width)) for _ in range(height))


def puzzle(numbers, demonstrations=3):
    def one():
        return grid(numbers, numbers.randint(1, 6), numbers.randint(1, 6))

    shown = tuple(Pair(one(), one()) for _ in range(demonstrations))
    return Puzzle("p", 0, shown, one(), one())


def record(**changed):
    pair = {"input": [[1, 2]], "output": [[2, 1]]}
    return {"train": [pair, pair], "test": [pair]} | changed


@pytest.fixture
def symbols():
    return grid_tokenizer()


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_ARC1_grids_of_1_to_30_rows_and_columns_round_trip():
    numbers = random.Random(0)
    sizes = [(1, 1), (1, 30), (30, 1), (30, 30)]
    sizes += [(numbers.randint(1, 30), numbers.randint(1, 30)) for _ in range(200)]
    for height, width in sizes:
        one = grid(numbers, height, width)
        ids = encode_answer(one)
        assert parse_answer(ids) == one
        assert len(ids) == height * (width + 1) <= MAX_ANSWER_TOKENS


def test_ARC1_an_invalid_answer_parses_to_none():
    line = SYMBOLS.index("\n")
    for bad in (
        *([], [END], [1, 2], [1, line, END], [1, 2, line, 3, END], [line, 1, END]),
        *([1, SOLUTION, END], [1] * 31 + [END], [1, line] * 30 + [1, END]),
    ):
        assert parse_answer(bad) is None, bad


def test_ARC2_symmetries_are_a_group_of_eight_with_inverses():
    seen = [apply_symmetry(ODD, symmetry) for symmetry in range(8)]
    assert len(set(seen)) == 8
    for one, other in itertools.product(range(8), repeat=2):
        assert apply_symmetry(seen[one], other) in seen
    for symmetry in range(8):
        assert apply_symmetry(seen[symmetry], inverse_symmetry(symmetry)) == ODD
    assert apply_symmetry(ODD, 1) == ((4, 1), (5, 2), (6, 3))
    assert apply_symmetry(ODD, 4) == ((1, 4), (2, 5), (3, 6))


@pytest.mark.parametrize("colours", ["all", "keep_0", "none"])
def test_ARC2_views_are_invertible_and_equal_for_all_grids_of_a_puzzle(colours):
    for seed in range(50):
        given = puzzle(random.Random(seed))
        seen = augment(
            given,
            random.Random(seed),
            symmetries=True,
            colours=colours,
            shuffle_demonstrations=False,
        )
        views = [
            View(symmetry, View().colours)
            for symmetry in range(8)
            if [len(each) for each in seen.grids()]
            == [len(apply_symmetry(each, symmetry)) for each in given.grids()]
        ]
        found = [
            mapped
            for view in views
            if (mapped := _colours([view.apply(each) for each in given.grids()], seen.grids()))
        ]
        assert found, "one symmetry and one permutation explain every grid"
        for mapped in found:
            assert colours != "keep_0" or mapped.get(0, 0) == 0
            assert colours != "none" or all(a == b for a, b in mapped.items())
        view = View(seed % 8, tuple(random.Random(seed).sample(range(10), 10)))
        for one in given.grids():
            assert view.invert(view.apply(one)) == one


def _colours(before, after):
    """The map of colours between two lists of grids; nothing where there is none."""
    pairs = {
        pair
        for a, b in zip(before, after, strict=True)
        for x, y in zip(a, b, strict=True)
        if len(x) == len(y)
        for pair in zip(x, y, strict=True)
    }
    mapped = dict(pairs)
    one_to_one = len(mapped) == len(pairs) == len(set(mapped.values()))
    return mapped if one_to_one else None


def test_augmentation_shuffles_demonstrations_and_depends_only_on_the_generator():
    given = puzzle(random.Random(0), demonstrations=5)
    plain = {"symmetries": False, "colours": "none"}
    seen = [
        augment(given, random.Random(n), shuffle_demonstrations=True, **plain) for n in range(20)
    ]
    assert len({each.demonstrations for each in seen}) > 10
    assert all(sorted(each.demonstrations) == sorted(given.demonstrations) for each in seen)
    assert augment(given, random.Random(3), shuffle_demonstrations=True, **plain) == seen[3]
    assert augment(given, random.Random(3), shuffle_demonstrations=False, **plain) == given


@pytest.mark.parametrize("every", [False, True])
def test_ARC3_only_outputs_are_trained_from_the_first_token_after_the_solution_mark(
    every, symbols, prepared
):
    example = ArcExample(puzzle(random.Random(1)), every)
    ids, mask = encode_example(example)
    outputs = [pair.output for pair in example.puzzle.demonstrations] if every else []
    outputs.append(example.puzzle.answer)
    runs = [
        [n for _, n in group]
        for learned, group in itertools.groupby(
            zip(mask, ids, strict=True), key=lambda pair: pair[0]
        )
        if learned
    ]
    assert runs == [encode_answer(output) for output in outputs]
    begins = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
    assert [ids[i - 2 : i] for i in begins] == [[TURN, SOLUTION]] * len(outputs)
    assert [ids[0], *ids[-2:]] == [16, END, 17]
    loss = "all_outputs" if every else "test_only"
    made = prepared(ArcData(count=40, loss=loss), "answers", symbols, seq_len=512)
    batch = open_dataset(made.folder, "answers", "train", 512, 0).get_batch(0, 4)
    for row in range(4):
        places = batch.mask[row].nonzero()[:, 0]
        learned = batch.targets[row][places]
        assert set(learned.tolist()) <= {*range(10), END, SYMBOLS.index("\n")}
        assert torch.equal(batch.ids[row][places + 1], learned), "shifted by one"
        assert batch.ids[row, places[0]] == SOLUTION


def test_ARC4_a_prompt_does_not_depend_on_the_answer_and_is_a_prefix_of_the_example():
    for seed in range(30):
        one = puzzle(random.Random(seed))
        prompt = encode_puzzle_prompt(one.demonstrations, one.test_input)
        whole = encode_example(ArcExample(one, train_on_all_outputs=False)).ids
        assert whole == [*prompt, *encode_answer(one.answer), 17]
        assert prompt[-2:] == [TURN, SOLUTION]
        other = one._replace(answer=((0,),))
        assert (
            encode_example(ArcExample(other, train_on_all_outputs=False)).ids[: len(prompt)]
            == prompt
        )


def test_answer_has_input_shape_compares_an_answer_with_the_test_input():
    for requested, answer, same in (
        (ODD, ODD, True),
        (ODD, apply_symmetry(ODD, 1), False),
        (((1,) * 5,), ((1,), (1,), (1,)), False),
        (((1, 2),), ((0, 0),), True),
    ):
        prompt = encode_puzzle_prompt((Pair(((1,),), ((2, 2),)),), requested)
        ids = [*prompt, *encode_answer(answer), 17]
        assert answer_has_input_shape(ids, len(prompt), len(ids) - 1) is same


def test_the_grid_tokenizer_loads_in_transformers(symbols, tmp_path):
    from transformers import AutoTokenizer

    symbols.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|startoftext|><|im_start|><|problem|>01\n29<|im_end|><|endoftext|>"
    assert theirs(text).input_ids == [16, 10, 12, 0, 1, 15, 2, 9, 11, 17]
    assert (len(theirs), theirs.pad_token_id, theirs.eos_token_id) == (18, 14, 17)
    assert theirs.decode(theirs("01\n9").input_ids) == "01\n9"
    mine = type(symbols).load(tmp_path)
    assert mine.fingerprint() == symbols.fingerprint()
    assert mine.vocab_size == 18
    with pytest.raises(UserError, match="cannot represent"):
        symbols.encode("a")


def test_all_task_file_layouts_are_read(write):
    two = record(test=[record()["test"][0], {"input": [[3]]}])
    write("one/a.json", record())
    write("one/b.json", record())
    many = write("many.json", {"x": record(), "y": two})
    solved = read_solutions(str(write("solved.json", {"y": [[[9]], [[7]]]})))
    lines = write("rows.jsonl", json.dumps(record() | {"id": "r"}) + "\n")
    packed = lines.with_name("rows.jsonl.gz")
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    folder = list(read_tasks(find_task_files(str(many.parent / "one")), {}))
    assert [task.puzzles[0].name for task in folder] == ["a", "b"]
    assert [next(iter(read_tasks([path], {}))).puzzles[0].name for path in (lines, packed)] == [
        "r"
    ] * 2
    x, y = read_tasks([many], solved)
    assert [len(x.puzzles), len(y.puzzles)] == [1, 2]
    assert [each.answer for each in y.puzzles] == [((2, 1),), ((7,),)]
    assert y.puzzles[1].test_index == 1


@pytest.mark.parametrize(
    ("content", "printed"),
    [
        (record(train=[]), "task bad: no demonstrations"),
        (record(test=[]), "task bad: no test input"),
        (record(test=[{"input": [[1]]}]), "task bad: test 1 has no output, and there is no sol"),
        (
            record(train=[{"input": [[1, 2], [3]], "output": [[1]]}]),
            "input: ragged, with rows of 1",
        ),
        (record(train=[{"input": [[1]], "output": [[1] * 31]}]), "output: 1 x 31; a grid has 1"),
        (record(train=[{"input": [[1]] * 31, "output": [[1]]}]), "input: 31 x 1; a grid has 1"),
        (record(train=[{"input": [[10]], "output": [[1]]}]), "10 is no colour from 0 to 9"),
        (record(train=[{"input": [[True]], "output": [[1]]}]), "True is no colour"),
        (record(train=[{"input": [[]], "output": [[1]]}]), "input: 1 x 0; a grid has 1"),
        (record(train=[{"input": [], "output": [[1]]}]), "demonstration 1, input: not a grid"),
        (record(train=[{"output": [[1]]}]), "demonstration 1, input: not a grid"),
        (record(train="x"), "`train` is not a list of pairs"),
        ({"train": []}, "not a task: it needs `train` and `test`"),
        ([1, 2], "not a task: it needs `train` and `test`"),
        ("{", "not JSON"),
        ("", "not JSON"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("fails", [False, True])
def test_a_bad_task_is_a_one_line_error_and_no_file_remains(
    content, printed, fails, write, prepared, symbols, tmp_path
):
    path = write("tasks/bad.json", content)
    (found,) = read_tasks([path], {})
    assert isinstance(found, Reject)
    assert printed in found.reason
    section = ArcData(path=str(path.parent), on_bad_line="fail" if fails else "reject")
    with pytest.raises(UserError) as caught:
        prepared(section, "chats", symbols)
    line = str(caught.value)
    assert printed in line
    assert f"{path}:1: " in line
    assert "\n" not in line
    assert not list((tmp_path / "data").iterdir()), "nothing half-written"


def test_a_bad_task_among_good_ones_is_rejected(write, prepared, symbols, rejects_of):
    path = write("tasks.json", {"good": record(), "bad": record(train=[]), "fine": record()})
    found = prepared(ArcData(path=str(path), validation=0.0), "chats", symbols)
    assert rejects_of(found) == [("tasks.json", 2, "task bad: no demonstrations")]
    assert found.report["sources"][0]["train"]["documents"] == 2


@pytest.mark.parametrize(
    ("section", "shape", "printed"),
    [
        (ArcData(path="nowhere.json"), "chats", "data.path: nowhere.json does not exist"),
        (ArcData(path="a.txt"), "chats", "a.txt is not of a known kind"),
        (ArcData(path="a.json", solutions="a.json"), "chats", "a.json is no file of solutions"),
        (ArcData(), "prompts", "data.kind: 'arc' has no prompts"),
    ],
)
def test_an_unusable_task_path_is_a_one_line_error(
    section, shape, printed, write, prepared, symbols, monkeypatch
):
    monkeypatch.chdir(write("a.json", record()).parent)
    write("a.txt", "x")
    with pytest.raises(UserError, match=printed):
        prepared(section, shape, symbols, seq_len=64)


def test_grids_and_text_need_different_tokenizers(prepared, tokenizer, symbols, story_file):
    with pytest.raises(UserError, match=r"set tokenizer: \{symbols: grids\}"):
        prepared(ArcData(count=4), "chats", tokenizer)
    with pytest.raises(UserError, match="cannot represent"):
        prepared(TextData(path=str(story_file)), "documents", symbols)


def test_puzzles_longer_than_seq_len_are_rejected_and_never_cut(prepared, symbols, rejects_of):
    found = prepared(ArcData(count=60), "answers", symbols, seq_len=200)
    rejected = rejects_of(found)
    assert 0 < len(rejected) < 60
    assert "more than seq_len=200" in rejected[0][2]
    source = open_dataset(found.folder, "answers", "train", 200, 0)
    for number in range(source.size):
        row = source.take(np.array([number]))
        assert (int(row.ids[0, 0]), int(row.ids[0, -1])) == (16, 17)


def test_all_views_of_a_task_are_in_the_same_split(prepared, symbols):
    found = prepared(ArcData(count=30, views=4, validation=0.3), "answers", symbols, seq_len=1024)
    counts = [found.report["sources"][0][side]["documents"] for side in ("train", "validation")]
    assert sum(counts) == 120
    assert all(count % 4 == 0 and count for count in counts)


def test_real_tasks_are_read_completely(real_data, prepared, symbols):
    section = ArcData(path=str(real_data / "arc_agi1" / "training_small10.jsonl"))
    found = prepared(section, "chats", symbols)
    (source,) = found.report["sources"]
    assert source["rejected"] == 0
    assert source["train"]["documents"] + source["validation"]["documents"] >= 178
