"""Final answers: extraction from references and completions, and their comparison."""

import json
import random

import pytest

from tinsmith.data.formats.prompts import Prompt, read_prompt
from tinsmith.rewards.functions import exact_match
from tinsmith.text.answers import is_same_answer

GSM8K = "6 * 12 = <<6*12=72>>72 clips.\n#### 72"
RIGHT = [
    (GSM8K, "72"),
    (GSM8K, "The answer is 72."),
    (GSM8K, "#### 72"),
    (GSM8K, "<think>6 * 12</think><answer>72</answer>"),
    (GSM8K, GSM8K),
    (GSM8K, "So it is \\boxed{72}."),
    (GSM8K, "She sold $72 in all"),
    (GSM8K, "#### 72\nI used 2 steps."),
    (GSM8K, "#### Step 1\nMultiply 6 by 12.\n#### Step 2\nIt is 72"),
    (GSM8K, "#### 1. Multiply 6 by 12\nThe answer is 72"),
    (GSM8K, "The answer is 72. I used 2 steps."),
    (GSM8K, "The answer is 6 * 12 = 72."),
    (GSM8K, "**Answer:** 72 clips, 12 a month"),
    ("... so \\boxed{72}", "72"),
    ("\\boxed{\\frac{3}{4}}", "3/4"),
    ("\\boxed{\\text{(A)}}", "A"),
    ("#### \\boxed{5}", "5"),
    ("<think>x</think><answer>5</answer>", "<think>x</think><answer>5</answer>"),
    ("<think>x</think><answer>5</answer>", "5"),
    ("$72", "72"),
    ("72", "$72"),
    ("72%", "72"),
    ("72", "72\\%"),
    ("72 clips", "72"),
    ("72 clips", "It is 72."),
    ("72元", "答案是72元。"),
    ("1,234", "1234"),
    ("1234", "1,234.00"),
    ("1,234", "1{,}234"),
    ("3/4", "3/4"),
    ("3/4", "It is 3/4 of a cup"),
    ("3/4", "0.75"),
    ("-5", "\u22125"),
    ("\u22125", "-5"),
    ("-5", "-$5"),
    ("3", "8-5, which is 3"),
    ("3", "5-3"),
    ("A", "The answer is A"),
    ("A", "The answer is A."),
    ("A", "(A)"),
    ("(A)", "A"),
    ("(a)", "A"),
    ("A", "A. Paris"),
    ("B", "A dog would bark, so it must be B"),
    ("B", "B, I think"),
    ("yes", "Yes!"),
    ("yes", "The answer is yes."),
    ("no", "No, because it is true that fish swim."),
    ("True", "The statement is true."),
    ("Paris", "The answer is Paris."),
    ("St. Petersburg", "The answer is St. Petersburg."),
    ("The green wood", "the  green wood."),
    ("?", "?"),
    ("1e5", "100000"),
    ("5 km/h", "5"),
    ("5km", "5 km"),
    ("20°C", "20"),
    ("x = 5", "5"),
    *((text, text) for text in ("nan", "Infinity", "inf", "1e5", "1_000", "-inf", "1e999999999")),
    ("9" * 6000, "9" * 6000),
]
WRONG = [
    (GSM8K, "12"),
    (GSM8K, "#### 71\nor 72"),
    (GSM8K, "72 or 71"),
    (GSM8K, "<think>72</think> 71"),
    ("123", "1,2,3"),
    ("nan", "5"),
    ("inf", "1e5"),
    ("1e5", "5"),
    ("1_000", "0"),
    ("4", "3/4"),
    ("-5", "5"),
    ("A", "B"),
    ("A", "The answer is B, not A"),
    ("I", "I think it is B"),
    ("yes", "no"),
    ("yes", "The answer is no."),
    ("true", "It is not true."),
    ("yes", "yes or no? no"),
    ("2 Samuel", "2 Kings"),
    ("5x", "5"),
    ("5x + 3", "5"),
    ("#### x = 5", "x = 6"),
    ("The green wood", "not the green wood"),
    ("?", ""),
    ("?", "!"),
    ("5", ""),
    ("5/0", "5"),
    ("72", "1e999999999"),
    ("72", "9" * 6000),
]


@pytest.mark.parametrize(("reference", "text"), RIGHT)
def test_E2_D7_T4_a_right_answer_counts_in_every_notation(reference, text):
    assert is_same_answer(reference, text)


@pytest.mark.parametrize(("reference", "text"), WRONG)
def test_E2_D7_T4_a_wrong_answer_does_not_count(reference, text):
    assert not is_same_answer(reference, text)


PHRASINGS = [
    "{}",
    "The answer is {}.",
    "So she has {} left.",
    "#### {}",
    "First 7, then 8.\n#### {}",
    "#### {}\nChecked in 3 steps, 12 lines.",
    "\\boxed{{{}}}",
    "We get $\\boxed{{{}}}$ after 5 steps.",
    "<think>2 and 3</think>\n\n{}",
    "<think>2 and 3</think><answer>{}</answer>",
    "**{}**",
    "Final answer: {}",
    "It costs ${}",
    "{} clips",
    "= {}",
]


def notations(value: float) -> list[str]:
    """Spellings of one number."""
    whole = value == int(value)
    spellings = [f"{value:,}", f"{value:.2f}", f"{value:.3f}"]
    spellings += [str(int(value)), f"{int(value):,}"] if whole else [str(value)]
    return spellings + [each.replace("-", "\u2212") for each in spellings]


def test_E2_D7_T4_numbers_are_compared_in_every_phrasing_of_both_sides():
    rng = random.Random(0)
    for _ in range(3000):
        value = rng.randint(-(10 ** rng.randint(1, 7)), 10 ** rng.randint(1, 7))
        value = value / 4 if rng.random() < 0.3 else float(value)
        other = value + rng.choice([-100, -1, 1, 0.5, 1000])
        reference, text = (
            rng.choice(PHRASINGS).format(rng.choice(notations(value))) for _ in range(2)
        )
        wrong = rng.choice(PHRASINGS).format(rng.choice(notations(other)))
        if reference.startswith("So she") or reference.startswith("It costs"):
            reference = notations(value)[0]
        assert is_same_answer(reference, text), (reference, text)
        assert not is_same_answer(reference, wrong), (reference, wrong)
        assert is_same_answer(reference, reference)


def test_E2_D7_T4_equal_text_is_always_right():
    rng = random.Random(1)
    parts = [
        *("####", "\\boxed{", "}", "<answer>", "</answer>", "</think>", "answer is", "nan", "1e5"),
        *(" ", "\n", "5", "-", ".", "A", "yes", "no", "x", ",", "/", "0", "$", "%", "not", "="),
    ]
    for _ in range(5000):
        text = "".join(rng.choices(parts, k=rng.randint(1, 12)))
        assert is_same_answer(text, text), text
        is_same_answer(text, "".join(rng.choices(parts, k=rng.randint(1, 12))))


def test_E2_published_gsm8k_rewards_its_own_answers(real_data):
    lines = (real_data / "gsm8k" / "val.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    for line in lines:
        row = json.loads(line)
        final = str(row["final"])
        published = read_prompt({"question": row["question"], "answer": f"See.\n#### {final}"})
        prompt = Prompt([], 0, published.answer, published.record)
        for text in (final, f"The answer is {final}.", f"#### {final}", f"\\boxed{{{final}}}"):
            assert exact_match(prompt, text) == 1
        assert exact_match(prompt, f"{final}1") == 0
