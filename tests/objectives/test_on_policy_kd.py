"""On-policy distillation: sampled completions, teacher prompts, and the ramp of the on-policy
fraction.
"""

import pytest
import torch

from tinsmith.core.parse import parse
from tinsmith.data.formats.prompts import Prompt
from tinsmith.objectives import ObjectiveConfig
from tinsmith.objectives.base import RankLoader
from tinsmith.objectives.kd import generalized_jsd
from tinsmith.objectives.on_policy_kd import LinearRamp, OnPolicyKD
from tinsmith.text.bpe import train_bpe
from tinsmith.text.chat import encode_prompt, parse_conversation

VOCAB = 330


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["what is one and two, it is three"] * 3, VOCAB)


class Prompts:
    """Questions without end, each with an answer of its own, but for every fifth."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def get_prompts(self, start: int, count: int) -> list[Prompt]:
        return [self.prompt(number) for number in range(start, start + count)]

    def prompt(self, number: int) -> Prompt:
        answer = None if number % 5 == 4 else f"it is {number}"
        record = {"prompt": f"what is {number * 'one '}?", "answer": answer}
        requested = parse_conversation(
            {"messages": [{"role": "user", "content": record["prompt"]}]}, answered=False
        )
        return Prompt(encode_prompt(self.tokenizer, requested), number, answer, record)


@pytest.fixture
def made(tokenizer, small):
    """(settings) -> objective, student, feed of four prompts."""

    def make(world: int = 1, rank: int = 0, teacher: dict | None = None, **keys):
        objective = OnPolicyKD(teacher="x", max_new_tokens=6, **keys).build()
        objective.frozen_models = {"teacher": small(vocab_size=VOCAB, **(teacher or {})).eval()}
        student = small(vocab_size=VOCAB)
        objective.prepare(student, tokenizer)
        return objective, student, RankLoader(Prompts(tokenizer), 4, rank, world)

    return make


def batches(made, count: int, **keys):
    objective, student, feed = made(**keys)
    given = objective.batches(feed, student)
    return [next(given) for _ in range(count)]


def test_the_ramp_goes_from_begin_to_end():
    ramp = LinearRamp(begin=0.0, end=0.7, after=20, over=60)
    assert [ramp.at(batch) for batch in (0, 20, 50, 80, 1000)] == pytest.approx(
        [0, 0, 0.35, 0.7, 0.7]
    )
    assert LinearRamp(begin=0.0, end=1.0, after=3).at(2) == 0
    assert LinearRamp(begin=0.0, end=1.0, after=3).at(3) == 1
    assert LinearRamp().at(0) == 1


def test_the_fraction_of_own_completions_follows_the_ramp(made):
    share = LinearRamp(begin=0.5, end=0.5)
    drawn = [bool(example.sampled.all()) for example in batches(made, 40, on_policy_fraction=share)]
    assert 10 <= sum(drawn) <= 30
    assert not any(
        bool(example.sampled.all())
        for example in batches(made, 5, on_policy_fraction=LinearRamp(begin=0, end=0))
    )


def test_answers_of_the_data_are_complete_with_end_of_turn(made, tokenizer):
    (example,) = batches(made, 1, on_policy_fraction=LinearRamp(begin=0, end=0))
    output = example.student.targets[1][example.student.mask[1]].tolist()
    assert tokenizer.decode(output) == "it is 1<|im_end|>"
    assert example.sampled.tolist() == [False] * 4


def test_the_student_completes_prompts_without_an_answer(made):
    _, example = batches(made, 2, on_policy_fraction=LinearRamp(begin=0, end=0))
    assert example.sampled.tolist() == [True, False, False, False]
    assert bool(example.student.mask[0].any())


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_an_answer_of_the_data_is_truncated_to_the_students_context(positions, tokenizer, small):
    """The teacher has room for all of it, and the last prompt fills the student's context."""
    source = Prompts(tokenizer)
    room = len(source.prompt(3).ids)
    objective = OnPolicyKD(
        teacher="x", max_new_tokens=200, on_policy_fraction=LinearRamp(begin=0, end=0)
    ).build()
    objective.frozen_models = {"teacher": small(vocab_size=VOCAB, max_seq_len=512).eval()}
    student = small(vocab_size=VOCAB, max_seq_len=room, positions=positions)
    objective.prepare(student, tokenizer)
    example = next(objective.batches(RankLoader(source, 4, 0, 1), student))
    held = (example.student.segments >= 0).sum(1) + 1
    assert held.tolist() == [
        min(room, len(prompt.ids) + len(objective.dataset_answer_ids(prompt)))
        for prompt in source.get_prompts(0, 4)
    ]
    assert not bool(example.student.mask[3].any())
    assert torch.equal(example.student.mask.sum(1), example.teacher.mask.sum(1))
    assert bool(torch.isfinite(objective.loss(student, example).total))


def test_without_a_privileged_prompt_both_prompts_are_equal(made):
    (example,) = batches(made, 1)
    assert torch.equal(example.student.ids, example.teacher.ids)
    assert torch.equal(example.student.mask, example.teacher.mask)


def test_only_the_teacher_gets_the_privileged_prompt_before_the_same_completion(made, tokenizer):
    (example,) = batches(made, 1, privileged_prompt="psst: {answer}, <|im_end|>!")
    for row in range(4):
        theirs = tokenizer.decode(example.teacher.ids[row].tolist())
        ours = tokenizer.decode(example.student.ids[row].tolist())
        assert f"<|im_start|>system\npsst: it is {row}" in theirs
        assert "psst" not in ours
        assert torch.equal(
            example.student.targets[row][example.student.mask[row]],
            example.teacher.targets[row][example.teacher.mask[row]],
        )
    assert int((example.teacher.ids[0] == tokenizer.end_of_turn).sum()) == 2


def test_a_privileged_prompt_is_appended_to_the_system_message(made, tokenizer):
    objective, _, _ = made(privileged_prompt="psst")
    record = {"system": "be kind", "prompt": "one?"}
    prompt = objective.teacher_prompt_ids(Prompt([], 0, None, record))
    assert "<|im_start|>system\nbe kind\n\npsst<|im_end|>" in tokenizer.decode(prompt)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_loss_is_the_divergence_on_completion_tokens(beta, made):
    objective, student, feed = made(
        beta=beta, distill_temperature=1.3, privileged_prompt="it is {answer}", teacher={"dim": 48}
    )
    example = next(objective.batches(feed, student))
    found = objective.loss(student, example)
    ours = student(example.student.ids, segments=example.student.segments).logits
    theirs = objective.frozen_models["teacher"](
        example.teacher.ids, segments=example.teacher.segments
    ).logits
    both = (ours[example.student.mask][None], theirs[example.teacher.mask][None])
    mean = generalized_jsd(*both, torch.ones(1, both[0].shape[1]), beta, 1.3)
    assert torch.allclose(found.total / objective.units(example), mean, atol=1e-10)
    found.total.backward()
    assert all(p.grad is None for p in objective.frozen_models["teacher"].parameters())
    assert any(bool((p.grad != 0).any()) for p in student.parameters())


def test_a_teacher_equal_to_the_student_with_equal_prompts_gives_no_gradient(made):
    objective, student, feed = made()
    loss = objective.loss(student, next(objective.batches(feed, student)))
    loss.total.backward()
    assert abs(loss.total.item()) < 1e-12
    assert all(bool((p.grad.abs() < 1e-12).all()) for p in student.parameters())


def test_two_ranks_generate_the_completions_of_one_process(made):
    whole = batches(made, 2)
    for rank in range(2):
        for one, part in zip(whole, batches(made, 2, world=2, rank=rank), strict=True):
            rows = one.student.select_rows(torch.arange(2 * rank, 2 * rank + 2))
            width = part.student.ids.shape[1]
            assert torch.equal(rows.ids[:, :width], part.student.ids)
            assert torch.equal(rows.mask[:, :width], part.student.mask)


def test_a_completion_is_truncated_for_both_to_fit_after_the_teachers_prompt(made):
    for example in batches(made, 3, teacher={"max_seq_len": 60}, privileged_prompt="a long hint"):
        assert example.teacher.ids.shape[1] < 60
        assert torch.equal(example.student.mask.sum(1), example.teacher.mask.sum(1))


def test_a_batch_without_completions_has_zero_loss(made):
    objective, student, feed = made(teacher={"max_seq_len": 1})
    example = next(objective.batches(feed, student))
    loss = objective.loss(student, example)
    loss.total.backward()
    assert int(objective.units(example)) == 0
    assert loss.total.item() == 0


def test_sampling_changes_no_global_random_state_and_no_mode(made):
    objective, student, feed = made()
    student.train()
    before = torch.get_rng_state()
    next(objective.batches(feed, student))
    assert torch.equal(before, torch.get_rng_state())
    assert student.training


@pytest.mark.parametrize(
    ("keys", "output"),
    [
        ({"beta": 2}, r"beta=2\.0 must be from 0 to 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"sampling_temperature": 0}, r"sampling_temperature=0\.0 must be a number above 0"),
        ({"on_policy_fraction": {"end": 1.5}}, r"end=1\.5 must be from 0 to 1"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(keys, output):
    with pytest.raises(Exception, match=output) as refused:
        parse(ObjectiveConfig, {"kind": "on_policy_kd", "teacher": "x"} | keys, "objective")
    assert "\n" not in str(refused.value)
