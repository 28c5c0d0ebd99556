"""Multiple choice: scores against a plain loop, planted preferences, unusual records."""

import gzip
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.core.errors import UserError
from tinsmith.evals.choice import ChoiceSequence, encode_question, evaluate_choice, log_likelihoods
from tinsmith.evals.questions import parse_question
from tinsmith.infer.generate import eval_mode

ROWS = [
    {"context": "the cat", "choices": ["sat on the mat", "off", "ran off."], "answer": 0},
    {"question": "where?", "choices": ["on the mat", "and"], "answer": "B"},
    {"context": "the dog.", "question": "what?", "choices": ["ran", "sat"], "answer": "ran"},
    {"choices": ["the cat sat", "the dog"], "continuation": " on the mat", "answer": 1},
    {"good": "the dog ran off.", "bad": "ran the dog off."},
    {"context": "<|endoftext|>", "choices": ["<|im_end|>", "<think>"], "answer": 1},
]


def by_hand(lm, before, after):
    """ln p(after | before), one token at a time, from the logits of a row on its own."""
    total = 0.0
    for count in range(len(after)):
        logits = lm(torch.tensor([before + after[:count]])).logits[0, -1]
        total += float(logits.log_softmax(-1)[after[count]])
    return total


@torch.no_grad()
@pytest.mark.parametrize("batch_rows", [1, 4, 16])
def test_scores_equal_a_plain_loop(make_lm, tokenizer, batch_rows):
    lm = make_lm().eval()
    encoded = [encode_question(parse_question(row), tokenizer, 64) for row in ROWS]
    lines = [line for one in encoded for line in one.sequences]
    found = log_likelihoods(lm, lines, batch_rows, lambda: None)
    wanted = [by_hand(lm, ids[:-scored], ids[-scored:]) for ids, scored in lines]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-10)


def test_padding_has_segment_minus_one(make_lm, tokenizer):
    lm, seen = make_lm().eval(), []
    lm.register_forward_pre_hook(
        lambda *output: seen.append(output[2]["segments"]), with_kwargs=True
    )
    lines = [ChoiceSequence([1, 2, 3, 4], 1), ChoiceSequence([1, 2], 1)]
    log_likelihoods(lm, lines, 2, lambda: None)
    assert seen[0].tolist() == [[0, 0, 0], [0, -1, -1]]


def test_sequences_decode_to_context_and_choice(tokenizer):
    contexts = {0: b"the cat", 1: b"Question: where?\nAnswer:", 4: b"<|endoftext|>"}
    contexts[2] = b"the dog.\nQuestion: what?\nAnswer:"
    for number, context in contexts.items():
        question = parse_question(ROWS[number])
        for line, ending in zip(
            encode_question(question, tokenizer, 64).sequences, question.endings, strict=True
        ):
            assert tokenizer.bytes_of(line.ids[: -line.num_scored]) == context
            assert tokenizer.bytes_of(line.ids[-line.num_scored :]) == ending.encode()


def test_a_special_token_replaces_only_an_empty_context(tokenizer):
    for row in ROWS:
        for line in encode_question(parse_question(row), tokenizer, 64).sequences:
            specials = set(tokenizer.added_tokens.values()).intersection(line.ids)
            assert specials == ({0} if "good" in row else set())


def test_a_model_with_planted_preferences_answers_all_questions(bigrams, tokenizer, write_rows):
    rows = [
        {"context": "the cat", "choices": ["off", "sat", "mat"], "answer": 1, "task": "one"},
        {"question": "where?", "choices": ["mat", "and"], "answer": "B", "task": "two"},
        {"choices": ["the cat", "the dog"], "continuation": " ran", "answer": 1, "task": "two"},
        {"good": "the dog", "bad": "dog the"},
    ]
    encoded = [encode_question(parse_question(row), tokenizer, 512) for row in rows]
    lm = bigrams([one.sequences[one.question.gold].ids for one in encoded])
    result = evaluate_choice(lm, tokenizer, write_rows(rows))
    assert result.total == (1.0, 1.0, pytest.approx((1 / 3 + 3 / 2) / 4), 4)
    assert {name: score.n for name, score in result.groups.items()} == {"one": 1, "two": 2}
    swapped = [{"good": "dog the", "bad": "the dog"}, rows[2] | {"answer": 0}]
    assert evaluate_choice(lm, tokenizer, write_rows(swapped)).total[:2] == (0.0, 0.0)


def test_the_normalised_score_does_not_favour_short_choices(bigrams, tokenizer, write_rows):
    """Every token costs the same: the sum prefers the choice of few tokens, the share of a byte
    the one whose tokens are long.
    """
    rows = [{"context": "a", "choices": ["the the the", "x"], "answer": 0}]
    long, short = (len(tokenizer.encode_inside(text)) for text in (" the the the", " x"))
    assert short < long < 11 * short
    total = evaluate_choice(bigrams([]), tokenizer, write_rows(rows)).total
    assert (total.acc, total.acc_norm) == (0.0, 1.0)


def test_a_uniform_model_is_at_chance(bigrams, tokenizer, write_rows):
    rows = [{"choices": choices, "answer": 0} for choices in (["b", "c"], ["b", "c", "d"])]
    total = evaluate_choice(bigrams([]), tokenizer, write_rows(rows)).total
    assert total.acc == total.acc_norm == total.chance == pytest.approx(5 / 12)


def test_nan_scores_get_no_credit(bigrams, tokenizer, write_rows):
    lm = bigrams([])
    with torch.no_grad():
        lm.embed.weight.fill_(math.nan)
    assert evaluate_choice(lm, tokenizer, write_rows(ROWS)).total.acc == 0.0


def test_a_long_context_is_truncated_on_the_left_and_counted(make_lm, tokenizer, write_rows):
    lm = make_lm(max_seq_len=16)
    long = {"context": "the dog " * 40, "choices": ["ran", "sat on the mat"], "answer": 0}
    result = evaluate_choice(lm, tokenizer, write_rows([long, ROWS[4]]))
    assert (result.truncated, result.total.n) == (1, 2)
    whole = encode_question(parse_question(long), tokenizer, 10_000)
    cut = encode_question(parse_question(long), tokenizer, 16)
    assert max(len(line.ids) for line in cut.sequences) == 17
    assert len({len(line.ids) - line.num_scored for line in cut.sequences}) == 1
    for a, b in zip(whole.sequences, cut.sequences, strict=True):
        assert a.ids[-len(b.ids) :] == b.ids
        assert a.num_scored == b.num_scored


def test_invalid_records_are_skipped_and_the_first_is_named(make_lm, tokenizer, write_rows):
    reported = []
    choices = ["a", "b"]
    bad = [
        "{broken",
        '"text"',
        {"context": "a"},
        {"context": "a", "choices": ["b"], "answer": 0},
        {"context": "a", "choices": ["b", ""], "answer": 0},
        {"context": "a", "choices": ["b", 3], "answer": 0},
        {"context": "a", "choices": choices},
        {"context": "a", "choices": choices, "answer": 2},
        {"context": "a", "choices": choices, "answer": -1},
        {"context": "a", "choices": choices, "answer": True},
        {"context": "a", "choices": choices, "answer": "C"},
        {"context": "a", "choices": choices, "answer": "other"},
        {"context": 3, "choices": choices, "answer": 0},
        {"context": "a", "choices": ["b", "the cat sat " * 30], "answer": 0},
        {"good": "a", "bad": ""},
        '{"good": "\\ud800", "bad": "a"}',
    ]
    path = write_rows([ROWS[0], *bad])
    result = evaluate_choice(make_lm(), tokenizer, path, say=reported.append)
    assert (result.total.n, result.rejected) == (1, len(bad))
    assert len(reported) == 1
    assert f"{path}:2: not JSON" in reported[0]
    assert f"{len(bad)} lines" in reported[0]


def test_a_file_without_a_question_is_refused_in_one_line(make_lm, tokenizer, write_rows, tmp_path):
    lm = make_lm()
    with pytest.raises(UserError, match=r"rows\.jsonl:1: needs a list 'choices'") as error:
        evaluate_choice(lm, tokenizer, write_rows([{"text": "a"}]))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="empty"):
        evaluate_choice(lm, tokenizer, write_rows([]))
    with pytest.raises(UserError, match="does not exist"):
        evaluate_choice(lm, tokenizer, tmp_path / "missing.jsonl")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a\.txt: questions are read from"):
        evaluate_choice(lm, tokenizer, tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("answer", "choices", "gold"),
    [
        (1, ["a", "b"], 1),
        ("b", ["a", "b"], 1),
        ("B", ["x", "y"], 1),
        ("b", ["x", "y"], 1),
        ("A", ["C", "B", "A"], 2),
        ("1", ["2", "1", "0"], 1),
        (1, ["2", "3", "1"], 1),
    ],
)
def test_answers_are_indices_then_texts_then_letters(answer, choices, gold):
    assert parse_question({"choices": choices, "gold": answer}).gold == gold


@pytest.mark.parametrize(
    ("context", "choice", "ending"),
    [
        ("is", "a", " a"),
        ("is ", "a", "a"),
        ("is\n", "a", "a"),
        ("is", " a", " a"),
        ("", "a", "a"),
    ],
)
def test_one_space_separates_context_and_choice(context, choice, ending):
    record = {"context": context, "choices": [choice, "b"], "answer": 0}
    assert parse_question(record).endings[0] == ending
    assert parse_question(record | {"separator": ""}).endings[0] == choice


def test_a_limit_is_spread_over_the_file(bigrams, tokenizer, write_rows):
    rows = [ROWS[0] | {"task": str(number)} for number in range(10)]
    result = evaluate_choice(bigrams([]), tokenizer, write_rows(rows), limit=3)
    assert list(result.groups) == ["0", "3", "6"]
    assert evaluate_choice(bigrams([]), tokenizer, write_rows(rows), limit=99).total.n == 10
    with pytest.raises(UserError, match="limit: 0 must be at least 1"):
        evaluate_choice(bigrams([]), tokenizer, write_rows(rows), limit=0)


def test_the_model_is_restored_and_poll_may_raise(make_lm, tokenizer, write_rows):
    lm = make_lm()
    lm.blocks[0].eval()
    before = [module.training for module in lm.modules()]
    state = torch.get_rng_state()

    class Enough(Exception):
        pass

    calls = []

    def poll():
        calls.append(1)
        if len(calls) == 2:
            raise Enough

    with pytest.raises(Enough):
        evaluate_choice(lm, tokenizer, write_rows(ROWS), batch_size=4, poll=poll)
    assert [module.training for module in lm.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_mode_is_on_inside_only(make_lm):
    lm = make_lm()
    with eval_mode(lm):
        assert not any(module.training for module in lm.modules())
    assert all(module.training for module in lm.modules())


def test_a_compressed_file_gives_the_same_result(make_lm, tokenizer, write_rows, tmp_path):
    lm = make_lm()
    plain = evaluate_choice(lm, tokenizer, write_rows(ROWS))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    assert evaluate_choice(lm, tokenizer, tmp_path / "rows.jsonl.gz") == plain
    assert json.loads(json.dumps(plain.to_dict()))["n"] == len(ROWS)


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=5), st.data())
@settings(derandomize=True, max_examples=30, deadline=None)
def test_an_answer_given_as_text_is_found_at_any_index(choices, data):
    answer = data.draw(st.sampled_from(choices))
    shuffled = data.draw(st.permutations(choices))
    records = [{"choices": some, "answer": answer} for some in (choices, shuffled)]
    if choices.count(answer) == 1:
        assert all(r["choices"][parse_question(r).gold] == answer for r in records)


def test_the_real_files_can_be_read(real_data, bigrams, tokenizer):
    rows = {
        "mc_eval/eval_open.jsonl.gz": (5156, 9),
        "mc_eval/mc_train.jsonl.gz": (8309, 3),
        "blimp/eval_open.jsonl.gz": (6700, 67),
        "mmlu_small/val_open.jsonl": (1224, 57),
    }
    for name, (count, groups) in rows.items():
        opener = gzip.open if name.endswith(".gz") else open
        with opener(real_data / name, "rt", encoding="utf-8") as file:
            questions = [parse_question(json.loads(line)) for line in file]
        assert len(questions) == count
        assert len({question.group for question in questions}) == groups
    found = evaluate_choice(bigrams([]), tokenizer, real_data / "blimp/eval_open.jsonl.gz", limit=9)
    assert (found.total.n, found.total.chance, found.rejected) == (9, 0.5, 0)
