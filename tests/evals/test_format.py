"""Format evaluation: which completions are well-formed, and their counts."""

import pytest

from tinsmith.data.formats.prompts import Prompt
from tinsmith.data.sources.tasks import check_answer, generate_task
from tinsmith.evals import format as form
from tinsmith.evals.format import evaluate_format, extract_answer
from tinsmith.infer.generate import Completion
from tinsmith.text.bpe import train_bpe
from tinsmith.text.chat import encode_chat, parse_conversation
from tinsmith.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["one and one is two"], 300)


def ids(tokenizer: Tokenizer, *parts: str) -> list[int]:
    """Names of special tokens as ids, the rest as text."""
    known = tokenizer.added_tokens
    pieces = ([known[p]] if p in known else tokenizer.encode_inside(p) for p in parts)
    return [number for piece in pieces for number in piece]


RIGHT = ("<think>", "\na\n", "</think>", "\n\n", "<answer>", "4 2", "</answer>", "<|im_end|>")


def test_a_well_formed_completion_gives_its_answer(tokenizer):
    assert extract_answer(tokenizer, ids(tokenizer, *RIGHT)) == "4 2"


@pytest.mark.parametrize("left_out", [0, 2, 4, 6, 7])
def test_a_missing_part_is_not_well_formed(left_out, tokenizer):
    parts = [part for place, part in enumerate(RIGHT) if place != left_out]
    assert extract_answer(tokenizer, ids(tokenizer, *parts)) is None


@pytest.mark.parametrize("place", [0, 2, 4, 6])
def test_a_tag_spelled_in_ordinary_tokens_does_not_count(place, tokenizer):
    output = ids(tokenizer, *RIGHT[:place])
    output += tokenizer.encode_inside(RIGHT[place]) + ids(tokenizer, *RIGHT[place + 1 :])
    assert extract_answer(tokenizer, output) is None


@pytest.mark.parametrize(
    "parts",
    [
        ("<think>", "</think>", "<answer>", "4", "</answer>", "<|im_end|>"),
        ("<think>", "a", "</think>", "<answer>", "</answer>", "<|im_end|>"),
        ("<answer>", "4", "</answer>", "<think>", "a", "</think>", "<|im_end|>"),
        (*RIGHT[:-1], "more", "<|im_end|>"),
        (*RIGHT[:-1], "<answer>", "4", "</answer>", "<|im_end|>"),
        (),
    ],
)
def test_empty_repeated_or_swapped_tags_are_not_well_formed(parts, tokenizer):
    assert extract_answer(tokenizer, ids(tokenizer, *parts)) is None


def test_a_generated_task_with_tags_is_well_formed(tokenizer):
    task = generate_task("arithmetic", 0, 5)
    record = task.chat(answer_tags=True)
    whole, mask = encode_chat(tokenizer, parse_conversation(record))
    output = [number for number, own in zip(whole, mask, strict=True) if own]
    assert extract_answer(tokenizer, output) == task.answer
    assert check_answer(task, record["messages"][1]["content"])
    assert "<answer>" not in task.chat()["messages"][1]["content"]


def test_fractions_are_of_all_completions(tokenizer, monkeypatch):
    good, other = ids(tokenizer, *RIGHT), ids(tokenizer, "<think>", "a", "<|im_end|>")
    answers = [Completion(each, "", "stop", []) for each in (good, good, other, good)]
    monkeypatch.setattr(form, "generate", lambda *rest, **settings: answers)
    prompts = [Prompt([1], n, answer, {}) for n, answer in enumerate(("4 2", "5", "4 2", None))]
    found = evaluate_format(None, tokenizer, prompts).to_dict()  # type: ignore[arg-type]
    assert found == {"format": 0.75, "accuracy": 0.25, "completions": 4}


def test_E2_accuracy_compares_final_answers(tokenizer, monkeypatch):
    parts = (*RIGHT[:5], "It is $72.", *RIGHT[6:])
    answers = [Completion(ids(tokenizer, *parts), "", "stop", [])] * 2
    monkeypatch.setattr(form, "generate", lambda *rest, **settings: answers)
    prompts = [Prompt([1], 0, "6 * 12 = 72\n#### 72", {}), Prompt([1], 1, "#### 71", {})]
    found = evaluate_format(None, tokenizer, prompts)  # type: ignore[arg-type]
    assert found.num_correct == 1
