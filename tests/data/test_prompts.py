"""Prompts: what is read, what is refused, and what a rollout gets."""

import json

import pytest
import torch

from tinsmith.data.formats.prompts import read_prompt
from tinsmith.data.loader.loader import open_dataset
from tinsmith.data.sources import ChatsData, TasksData, tasks
from tinsmith.objectives.base import RankLoader
from tinsmith.text.chat import BadRecord, encode_prompt, parse_conversation

SEQ_LEN = 64


def message(role, content):
    return {"role": role, "content": content}


ASK = message("user", "What is 2 + 3?")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "What is 2 + 3?", "answer": "5"},
        {"question": "What is 2 + 3?", "final": 5},
        {"question": "What is 2 + 3?", "final": "5", "answer": "2 and 3 make 5"},
        {"prompt": [ASK], "answer": "5"},
        {"messages": [ASK, message("assistant", "5")]},
        {"messages": [ASK], "answer": "5"},
        {"conversations": [{"from": "human", "value": "What is 2 + 3?"}], "final": 5},
        {"instruction": "What is 2 + 3?", "input": "", "output": "5"},
    ],
)
def test_every_layout_gives_the_same_prompt(record):
    prompt = read_prompt(record)
    assert prompt.prompt == parse_conversation({"messages": [ASK]}, answered=False)
    assert prompt.answer == "5"
    assert prompt.record == record


@pytest.mark.parametrize(
    "ending",
    [
        message("assistant", ""),
        message("assistant", None),
        {"from": "gpt", "value": " \n"},
        message("assistant", "") | {"tool_calls": "", "reasoning_content": ""},
    ],
)
@pytest.mark.parametrize("field", ["messages", "conversations", "prompt"])
def test_E3_an_empty_last_answer_is_to_be_generated(ending, field):
    prompt = read_prompt({field: [ASK, ending], "gt": ["5"]})
    assert prompt.prompt == parse_conversation({"messages": [ASK]}, answered=False)
    assert prompt.answer == "5"
    assert read_prompt({field: [ASK, ending]}).answer is None
    with pytest.raises(BadRecord):
        parse_conversation({"messages": [ASK, ending]})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"gt": ["5"]}, "5"),
        ({"gt": 5}, "5"),
        ({"gt": [5, "7.5"]}, "5, 7.5"),
        ({"gt": []}, None),
        ({"gt": None}, None),
        ({"ground_truth": "5"}, "5"),
        ({"solution": "x\n#### 5"}, "x\n#### 5"),
        ({"answer": None, "gt": ["5"]}, "5"),
        ({"answer": "6", "gt": ["5"]}, "6"),
    ],
)
def test_E3_ground_truth_is_an_answer_field(answer, expected):
    assert read_prompt({"prompt": "What is 2 + 3?"} | answer).answer == expected


def test_a_prompt_may_have_no_reference_answer():
    assert read_prompt({"prompt": "Write.", "test_list": ["assert f()"]}).answer is None


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (3, "not a JSON object"),
        ({"text": "x"}, "has none of `prompt`"),
        ({"prompt": "", "answer": "5"}, "empty content"),
        ({"prompt": "a", "answer": " "}, "empty answer"),
        ({"messages": [message("assistant", "5")]}, "role assistant, expected"),
    ],
)
def test_what_is_no_question_is_refused_with_a_reason(record, reason):
    with pytest.raises(BadRecord, match=reason):
        read_prompt(record)


@pytest.fixture
def source(prepared):
    prepared_data = prepared(TasksData(count=60, digits=2, length=4), "prompts", seq_len=SEQ_LEN)
    return open_dataset(prepared_data.folder, "prompts", "train", SEQ_LEN, 3)


def test_a_prompt_has_ids_answer_number_and_its_record(source, tokenizer):
    prepared_data = source.get_prompts(0, source.size)
    assert sorted(prompt.prompt_id for prompt in prepared_data) == list(range(source.size))
    for prompt in prepared_data:
        requested = parse_conversation(
            {"messages": [message("user", prompt.record["prompt"])]}, answered=False
        )
        assert prompt.ids == encode_prompt(tokenizer, requested)
        made = tasks.GeneratedTask(
            prompt.record["task"], prompt.record["prompt"], "", prompt.answer
        )
        assert tasks.check_answer(made, prompt.answer)


def test_T2_prompts_are_a_function_of_seed_and_number(source):
    early, late = source.get_prompts(150, 10), source.get_prompts(155, 5)
    assert early[5:] == late
    by_number = {prompt.prompt_id: prompt for prompt in source.get_prompts(0, source.size)}
    assert all(by_number[prompt.prompt_id] == prompt for prompt in early)


def test_rows_of_prompts_are_their_ids_with_nothing_to_learn(source):
    batch, prepared_data = source.get_batch(5, 7), source.get_prompts(5, 7)
    for row, prompt in enumerate(prepared_data):
        assert batch.ids[row][batch.segments[row] >= 0].tolist() == prompt.ids
    assert not bool(batch.mask.any())
    assert torch.equal(batch.targets, torch.zeros_like(batch.targets))


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_divide_the_prompts_of_a_step(source, world):
    shares = [RankLoader(source, 4, rank, world) for rank in range(world)]
    drawn = [[feed.next_prompts() for feed in shares] for _ in range(3)]
    flat = [prompt for step in drawn for share in step for prompt in share]
    assert flat == source.get_prompts(0, 12)
    assert [feed.cursor for feed in shares] == [12] * world


def test_prompt_ids_of_several_sources_are_disjoint(prepared):
    prepared_data = prepared(
        (TasksData(count=30, seed=1), TasksData(count=20, seed=2, validation=0.2)),
        "prompts",
        seq_len=300,
    )
    source = open_dataset(prepared_data.folder, "prompts", "train", 300, 0)
    numbers = {}
    for prompt in source.get_prompts(0, 2000):
        assert numbers.setdefault(prompt.prompt_id, prompt) == prompt
    assert sorted(numbers) == list(range(source.size))


def test_bad_prompts_are_rejected_with_their_line(prepared, rejects_of, write_lines):
    records = [
        {"prompt": "Say a.", "answer": "a"},
        {"prompt": "Say a.", "answer": ""},
        {"prompt": "Say a. " * 80, "answer": "a"},
        {"prompt": "Say b.", "answer": "b"},
    ]
    path = write_lines("asked.jsonl", records)
    prepared_data = prepared(ChatsData(path=str(path), validation=0), "prompts", seq_len=SEQ_LEN)
    reasons = {line: reason for _, line, reason in rejects_of(prepared_data)}
    assert set(reasons) == {2, 3}
    assert "empty answer" in reasons[2]
    assert "leaves no room" in reasons[3]


def test_real_prompts_are_read(real_data):
    for file, answered in (
        ("svamp/train.jsonl", True),
        ("gsm8k/val.jsonl", True),
        ("cmath_zh/train.jsonl", True),
        ("mbpp/train.jsonl", False),
    ):
        lines = (real_data / file).read_text(encoding="utf-8").splitlines()
        for line in lines:
            prompt = read_prompt(json.loads(line))
            assert (prompt.answer is not None) == answered
            if answered:
                assert prompt.answer == str(prompt.record["final"])
