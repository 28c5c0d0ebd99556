"""Reward functions: their values, and that a failing reward cannot end a run."""

import json
import math
import shutil

import pytest
import torch

from tinsmith.core.errors import UserError
from tinsmith.core.sandbox import SandboxLimits
from tinsmith.data.formats.prompts import Prompt, read_prompt
from tinsmith.data.sources import tasks
from tinsmith.rewards.classifier import Classifier
from tinsmith.rewards.functions import (
    Response,
    RewardFailure,
    WeightedReward,
    as_batch_reward,
    distinct_ngrams,
    exact_match,
    make_length_reward,
    score_responses,
    think_format,
    unit_tests,
)
from tinsmith.text.specials import our_template


def requested(answer=None, number=0, **record):
    return Prompt([1, 2], number, answer, {"prompt": "What?", **record})


@pytest.mark.parametrize(
    ("answer", "text", "worth"),
    [
        ("72", "72", 1),
        ("72", "She sold 48, so in all it is 72.", 1),
        ("72", "<think>71</think>\n\n72", 1),
        ("72", "<think>72</think>\n\n71", 0),
        ("72", "<answer>72</answer>, not 71", 1),
        ("72", "72 or 71", 0),
        ("1200", "It costs $1,200.00", 1),
        ("0.5", ".5", 1),
        ("-3", "-3<|im_end|>", 1),
        ("72", "", 0),
        ("72", "seventy-two", 0),
        ("The green wood", "the  green wood.", 1),
        ("The green wood", "not the green wood", 0),
    ],
)
def test_exact_match_is_one_or_zero(answer, text, worth):
    assert exact_match(requested(answer), text) == worth


@pytest.mark.parametrize("name", ["arithmetic", "sort", "copy"])
def test_generated_tasks_are_checked_by_their_own_rule(name):
    for index in range(50):
        task = tasks.generate_task(name, 1, index, digits=2, length=4)
        prompt = requested(task.answer, task=name)
        assert exact_match(prompt, f"<think>\nhm\n</think>\n\n{task.answer}") == 1
        assert exact_match(prompt, task.wrong_answer()) == 0


def test_E3_several_ground_truths_are_rewarded_by_their_share():
    prompt = requested("5, 7.50, New York", gt=["5", 7.5, "New York"])
    for text, worth in (
        ("It is 7.5, in new york, and 5", 1),
        ("<think>7.5 in New York</think>\n\n5", 1 / 3),
        ("55 and 7", 0),
        ("5, 7.50, New York", 1),
    ):
        assert exact_match(prompt, text) == worth
    assert exact_match(requested("5", gt=["5"]), "4 and then 5") == 1
    assert exact_match(requested("5", gt=["5"]), "5 and then 4") == 0


def test_format_requires_one_span_of_each_in_order():
    good = "<think>\nwell\n</think>\n<answer>\n5\n</answer>"
    assert think_format(requested(), good) == 1
    for bad in (
        "5",
        good + " and more",
        good + good,
        "<think></think><answer>5</answer>",
        "<answer>5</answer><think>well</think>",
        "<think>a<think>b</think><answer>5</answer>",
    ):
        assert think_format(requested(), bad) <= 0.5
    assert think_format(requested(), "") == 0
    assert think_format(requested(), "<think>well</think> 5") == 0.25


def test_length_reward_is_one_within_bounds_and_falls_outside():
    worth = make_length_reward(10, 20)
    assert [worth(requested(), "x" * n) for n in (0, 5, 10, 20, 30, 40, 99)] == [
        0,
        0.5,
        1,
        1,
        0.5,
        0,
        0,
    ]
    with pytest.raises(ValueError, match="low=5 and high=4"):
        make_length_reward(5, 4)


def test_repetition_reduces_distinct_ngrams():
    assert distinct_ngrams(requested(), "one two three four five") == 1
    assert distinct_ngrams(requested(), "a b c " * 20) == pytest.approx(3 / 58)
    assert distinct_ngrams(requested(), "too short") == 1


TESTS = ["assert double(2) == 4", "assert double(0) == 0"]


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("def double(x):\n    return 2 * x", 1),
        ("<think>easy</think>Here:\n```python\ndef double(x):\n    return 2 * x\n```\nDone.", 1),
        ("```python\ndef double(x):\n    return x + 2\n```", 0),
        ("def double(x) return", 0),
        ("import sys\nsys.exit(0)", 0),
        ("import os\nos._exit(0)", 0),
        ("while True: pass", 0),
        ("def double(x):\n    return 2 * x\nwhile True: print('x' * 10**6)", 0),
        ("import os\nwhile True: os.fork()", 0),
        ("x = [0] * 10**10", 0),
    ],
)
def test_unit_tests_pass_or_fail_for_any_behaviour_of_the_program(text, worth):
    assert unit_tests(requested(test_list=TESTS), text, limits=SandboxLimits(seconds=5.0)) == worth


@pytest.mark.parametrize(
    "output",
    [
        "(os.lseek(0, 0, 0), os.read(0, 10**6))",
        "open('/proc/self/fd/0').read()",
        "sys._getframe().f_code.co_consts",
    ],
)
def test_a_program_cannot_find_the_success_marker(output):
    """Otherwise a program could pass without running the tests."""
    program = f"import os, re, sys\nsaid = str({output})\n"
    program += "print(*re.findall('[0-9a-f]{32}', said))\nos._exit(0)"
    assert unit_tests(requested(test_list=TESTS), program) == 0


def test_failed_rewards_are_reported_and_replaced_by_the_fallback():
    def fails(prompt, text):
        if text == "raise":
            raise RuntimeError("no idea")
        return {"nan": math.nan, "inf": math.inf}.get(text, 0.5)

    prompts = [requested("5", number) for number in (7, 8, 9, 10)]
    rules = [
        WeightedReward("exact", as_batch_reward(exact_match), 2.0),
        WeightedReward("odd", as_batch_reward(fails), 1.0, fallback=-1.0),
    ]
    texts = ["5", "nan", "inf", "raise"]
    found = score_responses(rules, [Response(*pair) for pair in zip(prompts, texts, strict=True)])
    assert found.rewards == [2.5, -1.0, -1.0, -1.0]
    assert found.per_reward == {"exact": [1, 0, 0, 0], "odd": [0.5, -1.0, -1.0, -1.0]}
    assert found.failures == [
        RewardFailure(1, 8, "odd", "returned nan"),
        RewardFailure(2, 9, "odd", "returned inf"),
        RewardFailure(3, 10, "odd", "RuntimeError: no idea"),
    ]


def test_prompts_without_required_fields_are_reported():
    rules = [
        WeightedReward("exact", as_batch_reward(exact_match)),
        WeightedReward("tests", as_batch_reward(unit_tests)),
    ]
    found = score_responses(rules, [Response(requested(), "5")])
    assert found.rewards == [0.0]
    assert [failure.reward_name for failure in found.failures] == ["exact", "tests"]
    assert "has no answer" in found.failures[0].reason


def test_a_failing_batch_reward_fails_for_every_completion():
    def gone(answers):
        raise RuntimeError("no memory")

    found = score_responses(
        [WeightedReward("model", gone, 2.0, fallback=-1.0)], [Response(requested(), "5")] * 2
    )
    assert found.rewards == [-2.0, -2.0]
    assert [failure.response_index for failure in found.failures] == [0, 1]


@pytest.mark.parametrize("given", [[1.0], [1.0] * 3, []], ids=len)
def test_a_batch_reward_with_a_wrong_number_of_values_fails_for_every_completion(given):
    found = score_responses(
        [WeightedReward("model", lambda answers: given)], [Response(requested(), "5")] * 2
    )
    assert found.rewards == [0.0, 0.0]
    assert [failure.response_index for failure in found.failures] == [0, 1]
    assert found.failures[0].reason == f"ValueError: {len(given)} rewards for 2 completions"


def test_a_reward_that_exits_is_caught_and_ctrl_c_is_not():
    def leaves(prompt, text):
        raise SystemExit(3)

    def panel(answers):
        raise SystemExit(3)

    for reward in (as_batch_reward(leaves), panel):
        found = score_responses([WeightedReward("odd", reward)], [Response(requested(), "5")])
        assert [failure.reason for failure in found.failures] == ["SystemExit: 3"]

    def asks_to_stop(prompt, text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_responses(
            [WeightedReward("odd", as_batch_reward(asks_to_stop))], [Response(requested(), "5")]
        )


def test_a_missing_classifier_folder_is_reported():
    with pytest.raises(UserError, match=r"objective\.rewards: /nowhere: no such folder"):
        Classifier("/nowhere")


@pytest.fixture
def words(tmp_path):
    """A small tokenizer that reads our chats, saved to a folder."""
    transformers = pytest.importorskip("transformers")
    import tokenizers

    words = ["<unk>", *map(str, range(10)), "What?", "user", "assistant", "<pad>"]
    model = tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<pad>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    fast.chat_template = our_template()
    fast.save_pretrained(tmp_path)
    return tmp_path


LLAMA = {
    **{"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "pad_token_id": 14},
}


@pytest.fixture(params=[1, 2])
def folder(request, words):
    """A small random classifier of one or two labels."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**LLAMA, num_labels=request.param)
    transformers.LlamaForSequenceClassification(config).save_pretrained(words)
    return words


def test_a_sequence_classifier_gives_its_score(folder):
    transformers = pytest.importorskip("transformers")
    found = Classifier(str(folder))([Response(requested("5"), text) for text in ("1 2", "7")])
    assert found[0] != found[1]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    text = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n7<|im_end|>\n"
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**ids).logits[0]
    expected = logits[0] if len(logits) == 1 else logits[1] - logits[0]
    assert found[1] == pytest.approx(float(expected), abs=1e-6)


def test_classifier_scores_do_not_depend_on_the_batch(folder):
    answers = [Response(requested(), " ".join("1234567"[: 1 + n % 7])) for n in range(20)]
    alone = [Classifier(str(folder), batch_size=1)([answer])[0] for answer in answers[:7]]
    found = Classifier(str(folder), batch_size=6)(answers)
    assert found == pytest.approx([alone[n % 7] for n in range(20)], abs=1e-6)
    assert len({round(score, 6) for score in found}) == 7


def test_a_classifier_gives_nan_for_inputs_longer_than_its_positions(words):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12}
    config = transformers.GPT2Config(**sizes, num_labels=1, pad_token_id=14)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(words)
    classifier = Classifier(str(words), batch_size=4)
    short, long = Response(requested(), "1 2"), Response(requested(), "1 2 " * 10)
    (alone,) = classifier([short])
    found = classifier([long, short, long, long, short, long])
    assert [math.isnan(score) for score in found] == [True, False, True, True, False, True]
    assert [found[1], found[4]] == pytest.approx([alone] * 2, abs=1e-6)
    assert all(map(math.isnan, classifier([long])))


@pytest.mark.parametrize(
    ("kind", "changed", "output"),
    [
        ("LlamaForCausalLM", {}, "is no classifier: it lacks score.weight"),
        ("LlamaForSequenceClassification", {"num_labels": 3}, "of 3 labels is no reward"),
        ("LlamaForSequenceClassification", {"vocab_size": 12, "pad_token_id": 0}, "more ids than"),
    ],
)
def test_invalid_classifiers_are_refused_in_one_line(kind, changed, output, words):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**LLAMA | changed)
    getattr(transformers, kind)(config).save_pretrained(words)
    with pytest.raises(UserError, match=output) as refused:
        Classifier(str(words))
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=r"objective.rewards: .*nowhere"):
        Classifier(str(words / "nowhere"))


@pytest.mark.parametrize("torn", ["cut", "pickle"])
def test_truncated_or_pickled_weights_are_refused_in_one_line(torn, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    if torn == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        torch.save({}, weights.with_name("pytorch_model.bin"))
        weights.unlink()
    with pytest.raises(UserError, match=r"objective.rewards: .*copy") as refused:
        Classifier(str(tmp_path / "copy"))
    assert "\n" not in str(refused.value)


def test_real_questions_and_programs(real_data):
    lines = (real_data / "svamp" / "val.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[:50]:
        question = read_prompt(json.loads(line))
        prompt = Prompt([], 0, question.answer, question.record)
        assert exact_match(prompt, f"So it is {question.answer}.") == 1
        assert exact_match(prompt, f"So it is {question.answer}1.") == 0
    passed = 0
    lines = (real_data / "mbpp" / "val.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[:8]:
        record = json.loads(line)
        passed += unit_tests(Prompt([], 0, None, record), f"```python\n{record['code']}\n```")
    assert passed == 8
