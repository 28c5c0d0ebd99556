"""Pairs: what is read, what is refused, and what a batch of them holds."""

import json
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.core.errors import UserError
from tinsmith.data.formats.pairs import encode_pair, read_pair
from tinsmith.data.formats.prompts import read_prompt
from tinsmith.data.loader.loader import open_dataset
from tinsmith.data.sources import ChatsData, StdlibData, TasksData, TextData, tasks
from tinsmith.text.chat import BadRecord, encode_chat, encode_prompt

SEQ_LEN = 200


def message(role, content):
    return {"role": role, "content": content}


QUESTION, GOOD, BAD = "Where does the fox live?", "In the green wood.", "Go away."
ASK, YES, NO = message("user", QUESTION), message("assistant", GOOD), message("assistant", BAD)
LAYOUTS = {
    "prompt and texts": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "prompt and a whole conversation": {"prompt": QUESTION, "chosen": [ASK, YES], "rejected": BAD},
    "whole conversations": {"chosen": [ASK, YES], "rejected": [ASK, NO]},
    "messages and a message each": {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
    "DPO-En-Zh": {
        "conversations": [{"from": "human", "value": QUESTION}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "hh_rlhf with a prompt": {
        "prompt": f"Human: {QUESTION}\n\nAssistant:",
        "chosen": GOOD,
        "rejected": BAD,
    },
    "hh_rlhf transcripts": {
        "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {BAD}",
    },
    "rasbt_instruct_pref": {
        "instruction": QUESTION,
        "input": "",
        "output": GOOD,
        "chosen": GOOD,
        "rejected": BAD,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pair(layout):
    assert read_pair(LAYOUTS[layout]) == read_pair(LAYOUTS["prompt and texts"])


def test_a_transcript_keeps_its_earlier_turns_in_the_prompt():
    record = {"prompt": "Human: One?\n\nAssistant: Two.\n\nHuman: Three?\n\nAssistant:"}
    pair = read_pair(record | {"chosen": "Four.", "rejected": "Five."})
    assert [(m.role, m.content) for m in pair.prompt.messages] == [
        ("user", "One?"),
        ("assistant", "Two."),
        ("user", "Three?"),
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "not a JSON object"),
        ({"prompt": "a", "chosen": "b"}, "`rejected` is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are equal"),
        ({"prompt": "a", "chosen": "b", "rejected": "  "}, "`rejected` is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "`rejected` is neither text nor messages"),
        ({"chosen": "b", "rejected": "c"}, "role assistant, expected"),
        ({"chosen": [ASK, YES], "rejected": [message("user", "x"), NO]}, "different prompts"),
        (
            {"prompt": [ASK], "chosen": [YES], "rejected": [message("user", "x")]},
            "role user, expected",
        ),
        ({"chosen": [ASK, YES], "rejected": [ASK, message("assistant", "")]}, "empty content"),
    ],
)
def test_an_invalid_pair_is_rejected_with_a_reason(record, reason):
    with pytest.raises(BadRecord, match=reason):
        read_pair(record)


@pytest.fixture
def pair():
    return read_pair(LAYOUTS["whole conversations"])


def test_the_loss_mask_covers_the_completion_with_its_end_of_turn(tokenizer, pair):
    prompt = encode_prompt(tokenizer, pair.prompt)
    for sequence, text in zip(encode_pair(tokenizer, pair, SEQ_LEN), (GOOD, BAD), strict=True):
        assert sequence.ids[: len(prompt)] == prompt
        assert not any(sequence.mask[: len(prompt)])
        completion = sequence.ids[len(prompt) :]
        assert all(sequence.mask[len(prompt) :])
        assert tokenizer.decode(completion[:-1]) == text
        assert completion[-1] == tokenizer.end_of_turn


def test_earlier_assistant_turns_are_not_trained(tokenizer):
    turns = [ASK, YES, message("user", "And the hen?")]
    pair = read_pair({"prompt": turns, "chosen": "In the town.", "rejected": "No."})
    chosen, _ = encode_pair(tokenizer, pair, 200)
    trained = [id for id, message in zip(chosen.ids, chosen.mask, strict=True) if message]
    assert tokenizer.decode(trained[:-1]) == "In the town."
    assert sum(encode_chat(tokenizer, pair.chosen).mask) > len(trained)


def test_completions_are_truncated_to_seq_len_and_prompts_must_leave_room(tokenizer, pair):
    prompt = len(encode_prompt(tokenizer, pair.prompt))
    chosen, rejected = encode_pair(tokenizer, pair, prompt + 1)
    assert len(chosen.ids) == len(rejected.ids) == prompt + 1
    assert (sum(chosen.mask), sum(rejected.mask)) == (1, 1)
    with pytest.raises(BadRecord, match=f"has {prompt} tokens, and seq_len={prompt}"):
        encode_pair(tokenizer, pair, prompt)


def test_pairs_that_are_equal_after_truncation_are_rejected(tokenizer):
    pair = read_pair({"prompt": "a", "chosen": "b c d e f g", "rejected": "b c d e f h"})
    prompt = len(encode_prompt(tokenizer, pair.prompt))
    with pytest.raises(BadRecord, match="equal within seq_len=20"):
        encode_pair(tokenizer, pair, prompt + 1)


@pytest.fixture
def prepared_data(prepared):
    return prepared(TasksData(count=40, digits=2, length=4), "pairs", seq_len=SEQ_LEN)


def test_a_batch_contains_chosen_and_rejected_rows_alternately(prepared_data, tokenizer):
    source = open_dataset(prepared_data.folder, "pairs", "train", SEQ_LEN, 3)
    batch = source.get_batch(0, 5)
    assert len(batch.ids) == 10
    for chosen, rejected in zip(range(0, 10, 2), range(1, 10, 2), strict=True):
        shared = int(batch.mask[chosen].int().argmax()) + 1
        assert torch.equal(batch.ids[chosen, :shared], batch.ids[rejected, :shared])
        assert not torch.equal(batch.targets[chosen], batch.targets[rejected])
        for row in (chosen, rejected):
            used = int((batch.segments[row] == 0).sum())
            assert bool((batch.segments[row, used:] == -1).all())
            assert torch.equal(batch.positions[row, :used], torch.arange(used))
            assert batch.ids[row, used - 1] == tokenizer.end_of_turn
            assert batch.mask[row, used - 2]
            assert not batch.mask[row, used - 1 :].any()
            trained = batch.mask[row, : used - 1]
            follows = batch.ids[row, 1:used].where(trained, 0)
            assert torch.equal(batch.targets[row, : used - 1], follows)


def test_no_column_of_a_batch_is_all_padding(prepared_data):
    batch = open_dataset(prepared_data.folder, "pairs", "train", SEQ_LEN, 3).get_batch(0, 3)
    assert int((batch.segments >= 0).sum(1).max()) == batch.ids.shape[1] <= SEQ_LEN


def test_T2_rows_are_a_function_of_seed_and_index(prepared_data):
    one, two = (open_dataset(prepared_data.folder, "pairs", "train", SEQ_LEN, 3) for _ in range(2))
    late, early = two.get_batch(60, 4), one.get_batch(60, 4)
    assert all(torch.equal(a, b) for a, b in zip(late, early, strict=True))
    assert not torch.equal(one.get_batch(0, 1).targets[0], two.get_batch(1, 1).targets[0])


def test_the_report_counts_pairs(prepared_data):
    counts = prepared_data.report["sources"][0]
    assert counts["train"]["documents"] + counts["validation"]["documents"] == 40
    assert (
        counts["train"]["documents"]
        == open_dataset(prepared_data.folder, "pairs", "train", SEQ_LEN, 0).size
    )


def test_bad_pairs_are_rejected_with_their_line(prepared, rejects_of, write_lines):
    record = LAYOUTS["prompt and texts"]
    records = [
        record,
        record | {"rejected": GOOD},
        record | {"chosen": ""},
        record | {"prompt": QUESTION * 40},
        b"{",
        record | {"prompt": "Who?"},
    ]
    path = write_lines("pairs.jsonl", records)
    prepared_data = prepared(ChatsData(path=str(path), validation=0), "pairs", seq_len=SEQ_LEN)
    assert [(name, line) for name, line, _ in sorted(rejects_of(prepared_data))] == [
        ("pairs.jsonl", line) for line in (2, 3, 4, 5)
    ]
    reasons = {line: reason for _, line, reason in rejects_of(prepared_data)}
    assert "equal" in reasons[2]
    assert "empty" in reasons[3]
    assert "leaves no room" in reasons[4]
    assert prepared_data.report["sources"][0]["rejected"] == 4
    assert prepared_data.report["sources"][0]["train"]["documents"] == 2


def test_on_bad_line_fail_names_the_line(prepared, write_lines):
    record = LAYOUTS["prompt and texts"]
    path = write_lines("pairs.jsonl", [record, record | {"rejected": GOOD}])
    with pytest.raises(UserError, match=r"pairs\.jsonl:2: .*equal"):
        prepared(ChatsData(path=str(path), on_bad_line="fail"), "pairs", seq_len=SEQ_LEN)


@pytest.mark.parametrize("source", [StdlibData(), TextData(path="x.txt")])
def test_a_source_without_pairs_is_an_error(prepared, source):
    with pytest.raises(UserError, match="no pairs; use tasks, chats or hub"):
        prepared(source, "pairs", seq_len=SEQ_LEN)


def test_all_pairs_of_a_prompt_are_in_the_same_split(prepared, write_lines):
    records = [
        {"prompt": f"Say {n % 7}", "chosen": f"{n} yes", "rejected": f"{n} no"} for n in range(60)
    ]
    path = write_lines("pairs.jsonl", records)
    prepared_data = prepared(ChatsData(path=str(path), validation=0.4), "pairs", seq_len=SEQ_LEN)
    prompts = []
    for part in ("train", "validation"):
        source = open_dataset(prepared_data.folder, "pairs", part, SEQ_LEN, 0)
        batch = source.take(source.evenly_spaced(source.size))
        ends = (batch.mask.int().argmax(1) + 1).tolist()
        prompts.append(
            {tuple(ids[:end]) for ids, end in zip(batch.ids.tolist(), ends, strict=True)}
        )
    assert prompts[0]
    assert prompts[1]
    assert not prompts[0] & prompts[1]


@pytest.mark.parametrize("name", ["arithmetic", "sort", "copy"])
def test_the_rejected_answer_of_a_generated_task_is_wrong(name):
    for index in range(200):
        task = tasks.generate_task(name, 0, index, digits=2, length=4)
        assert tasks.check_answer(task, task.answer)
        assert not tasks.check_answer(task, task.wrong_answer())
        assert task.wrong_answer() == task.wrong_answer()
        read_pair(task.pair())


@pytest.mark.parametrize(
    "file",
    [
        "rasbt_instruct_pref/train.jsonl",
        "hh_rlhf/helpful_base.train_short.jsonl",
        "llamafactory_pref/dpo_en_demo.train.jsonl",
        "llamafactory_pref/dpo_zh_demo.train.jsonl",
    ],
)
def test_real_pairs_are_read(real_data, file):
    read = num_rejected = 0
    for line in (real_data / file).read_text(encoding="utf-8").splitlines()[:300]:
        try:
            read_pair(json.loads(line))
            read += 1
        except BadRecord:
            num_rejected += 1
    assert read > 10 * num_rejected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9) | st.just("Human: a"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "user", "assistant"]), inner
        )
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["prompt", "question", "chosen", "rejected", "messages", "instruction", "system", "answer"]
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(FIELDS, JSON))
@pytest.mark.parametrize("read", [read_pair, read_prompt])
def test_T9_any_record_is_read_or_rejected_with_a_reason(read, record):
    with suppress(BadRecord):
        read(record)
