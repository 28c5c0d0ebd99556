import re
from typing import cast

import pytest

from tinsmith.data.documents import Document
from tinsmith.data.sources import SourceContext, TasksData, open_source
from tinsmith.data.sources.tasks import check_answer, generate_task
from tinsmith.text.bpe import train_bpe
from tinsmith.text.chat import Conversation, encode_prompt
from tinsmith.text.tools import calculate

NAMES = ("arithmetic", "sort", "copy")


def solve(question):
    """The answer, worked out from the question alone."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if sign := re.search(r"\d ([-+*]) \d", question):
        return str(
            {"+": sum(numbers), "-": numbers[0] - numbers[1], "*": numbers[0] * numbers[1]}[sign[1]]
        )
    if "from small to large" in question or "from large to small" in question:
        return " ".join(map(str, sorted(numbers, reverse="from large" in question)))
    letters = question.rpartition(": ")[2].split()
    return " ".join(letters[::-1] if "backwards" in question else letters)


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_of_every_task_is_correct(name):
    for index in range(2000):
        task = generate_task(name, 1, index, digits=1 + index % 6, length=1 + index % 12)
        assert task.answer == solve(task.question), task


def test_a_calculator_task_is_an_expression_in_the_words_of_its_question():
    for index in range(500):
        task = generate_task("calculator", 1, index, digits=1 + index % 4)
        assert calculate(task.expression) == task.answer
        used, named = (sorted(re.findall(r"\d+", s)) for s in (task.expression, task.question))
        assert used == named
        assert check_answer(task, f"It is {task.answer}.")
        called = task.chat()["messages"][1]["tool_calls"][0]["function"]
        assert called == {"name": "calculator", "arguments": {"expression": task.expression}}
        assert task.prompt()["tools"] == task.chat()["tools"]


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_a_pure_function_of_its_arguments(name):
    first = [generate_task(name, 3, index) for index in range(200)]
    assert [generate_task(name, 3, index) for index in reversed(range(200))][::-1] == first
    assert [generate_task(name, 4, index) for index in range(200)] != first
    assert len(set(first)) > 150


def test_a_generated_task_is_pinned():
    assert generate_task("arithmetic", 0, 3).question == "43 + 7 = ?"
    assert generate_task("sort", 0, 2).answer == "9 42 52"
    assert generate_task("copy", 0, 0).answer == "y v w"


@pytest.mark.parametrize("name", NAMES)
def test_a_correct_reply_is_accepted_and_a_wrong_one_is_not(name):
    for index in range(200):
        task, other = generate_task(name, 0, index), generate_task(name, 9, index)
        assert check_answer(task, f"<think>\n{task.reasoning}\n</think>\n\n{task.answer}<|im_end|>")
        assert check_answer(task, f"<think>7 7 7</think><answer> {task.answer}\n</answer> done")
        assert check_answer(task, task.answer)
        if other.answer != task.answer:
            assert not check_answer(task, f"<think>\n{task.answer}\n</think>\n\n{other.answer}")
            assert not check_answer(task, f"<answer>{other.answer}</answer>")
        assert not check_answer(task, "")


def test_a_sentence_around_a_number_does_not_matter():
    task = generate_task("arithmetic", 0, 3)
    assert check_answer(task, "43 + 7 is 50.")
    assert check_answer(task, "The answer is 50")
    assert not check_answer(task, "The answer is 507")
    assert not check_answer(task, "-50")
    assert not check_answer(task, "50 or 51")


def test_the_order_of_a_sorted_list_matters():
    task = generate_task("sort", 0, 2)
    assert check_answer(task, "9  42\n52")
    assert not check_answer(task, "42 9 52")


def column(step):
    left, _, right = step.partition("=")
    return sum(map(int, re.findall(r"-?\d+", left.replace("- ", "-")))), int(right.split(",")[0])


def test_the_steps_of_sums_and_differences_are_right():
    for index in range(500):
        task = generate_task("arithmetic", 2, index)
        for step in task.reasoning.splitlines():
            if "write" in step:
                expected, written = column(step)
                assert written == expected, task


def test_the_steps_lead_to_the_answer():
    for index in range(500):
        task = generate_task("arithmetic", 2, index)
        written = re.findall(r"write (\d) (?:carry|borrow) (\d)", task.reasoning)
        if written:
            digits = [digit for digit, _ in written][::-1]
            carried = written[-1][1] if "carry" in task.reasoning else "0"
            sign = -1 if "sign is -" in task.reasoning else 1
            assert sign * int(carried + "".join(digits)) == int(task.answer), task
        else:
            assert task.reasoning.endswith(f"= {task.answer}"), task


def test_every_kind_of_sum_occurs_with_every_count_of_digits():
    questions = [generate_task("arithmetic", 0, index, digits=2).question for index in range(400)]
    signs = {re.search(r"(\d+) ([-+*]) (\d+)", question).groups() for question in questions}
    assert {(len(a), sign) for a, sign, b in signs} == {(n, sign) for n in (1, 2) for sign in "+-*"}


def test_chats_show_the_steps_as_reasoning():
    task = generate_task("sort", 0, 0)
    user, assistant = task.chat()["messages"]
    assert (user["content"], assistant["content"]) == (task.question, task.answer)
    assert assistant["reasoning_content"] == task.reasoning
    assert task.text().startswith(f"{task.question}\n{task.reasoning}\n")


def test_a_wrong_label_is_one_too_high():
    task = generate_task("arithmetic", 0, 3)
    assert (task.answer, task.with_error().answer) == ("50", "51")
    assert not check_answer(task, task.with_error().answer)
    task = generate_task("sort", 0, 2)
    assert not check_answer(task, task.with_error().answer)


def test_reasoning_can_be_left_out():
    task = generate_task("arithmetic", 0, 3)
    assert task.chat()["messages"][1]["reasoning_content"] == task.reasoning
    assert task.chat(reasoning=False)["messages"][1] == {"role": "assistant", "content": "50"}


def documents(config, shape):
    found = list(open_source(config, shape, SourceContext("data")).train())
    assert all(isinstance(each, Document) for each in found)
    return cast(list[Document], found)


def chats(config):
    """What is said last in every chat of a section, and what is asked."""
    output = [cast(Conversation, document.content) for document in documents(config, "chats")]
    return [(chat.messages[0].content, chat.messages[-1]) for chat in output]


@pytest.mark.parametrize("shape", ["chats", "pairs"])
def test_tasks_without_reasoning_show_no_steps_and_have_the_same_split(shape):
    keys = []
    for thoughts in (True, False):
        found = documents(TasksData(count=50, reasoning=thoughts), shape)
        keys.append([each.split_key for each in found])
        assert any("take" in text for each in found for text in each.texts()[1:]) == thoughts
    assert keys[0] == keys[1]


def test_error_rate_makes_labels_one_too_high_and_the_question_does_not_reveal_it():
    config = TasksData(count=2000, tasks=("arithmetic",), digits=1, error_rate=0.4)
    off = [
        (requested, int(output.content) - int(solve(requested)))
        for requested, output in chats(config)
    ]
    assert {difference for _, difference in off} == {0, 1}
    assert 0.35 < sum(difference for _, difference in off) / len(off) < 0.45
    seen = {}
    for requested, difference in off:
        seen.setdefault(requested, set()).add(difference)
    assert sum(len(each) == 2 for each in seen.values()) > 100
    assert {difference for _, difference in off[:50]} == {0, 1}
    plain = [
        output.content
        for _, output in chats(TasksData(count=2000, tasks=("arithmetic",), digits=1))
    ]
    assert plain == [solve(requested) for requested, _ in off]


def test_an_error_rate_out_of_range_raises():
    with pytest.raises(ValueError, match="from 0 to 1"):
        TasksData(error_rate=1.5)


def test_a_wrong_calculator_task_does_not_call_the_calculator():
    config = TasksData(count=500, tasks=("calculator",), digits=1, error_rate=0.4)
    guesses = 0
    for index, document in enumerate(documents(config, "chats")):
        chat = cast(Conversation, document.content)
        task = generate_task("calculator", 0, index, digits=1, length=8)
        requested = [call.arguments for message in chat.messages for call in message.calls]
        off = int(chat.messages[-1].content) - int(task.answer)
        assert chat.tools, "whether it is asked or not"
        assert (requested, off) in (([{"expression": task.expression}], 0), ([], 1))
        guesses += off
    assert 0.3 < guesses / 500 < 0.5


@pytest.mark.parametrize("shape", ["chats", "prompts"])
def test_a_tokenizer_is_trained_on_tool_descriptions(shape):
    (document,) = documents(TasksData(count=1, tasks=("calculator",)), shape)
    learned = "".join(document.tokenizer_texts())
    assert '{"name": "calculator", "parameters"' in learned
    assert ('"arguments": {"expression"' in learned) == (shape == "chats")
    assert all(text in learned for text in document.texts() if shape == "chats")
    assert "<|im_" not in learned
    (plain,) = documents(TasksData(count=1, tasks=("copy",)), shape)
    assert plain.tokenizer_texts() == plain.texts()


def test_a_prompt_with_a_tool_is_short_for_a_small_tokenizer_of_its_own():
    found = documents(TasksData(count=300, tasks=("calculator",), digits=1), "chats")
    tokenizer = train_bpe((text for each in found for text in each.tokenizer_texts()), 512)
    requested = [cast(Conversation, each.content) for each in found[:50]]
    prompts = [Conversation(messages=chat.messages[:1], tools=chat.tools) for chat in requested]
    assert max(len(encode_prompt(tokenizer, each)) for each in prompts) <= 110
