"""ARC evaluation: candidates, ranking, attempts, scores and plots."""

import json
from pathlib import Path

import pytest
import torch

from tinsmith.core.errors import UserError
from tinsmith.data.arc.encoding import encode_answer, encode_puzzle_prompt
from tinsmith.data.arc.generators import TRAIN_RULES, Sizes, generate_puzzle, generate_puzzles
from tinsmith.data.arc.grids import Pair, Puzzle, View
from tinsmith.evals import arc
from tinsmith.evals.arc import ArcOutcome, ArcResult, aug_scores, evaluate_arc, rank_candidates
from tinsmith.nn.model import LM, ModelConfig
from tinsmith.text.grid_vocab import SYMBOLS, grid_tokenizer
from tinsmith.train.plots.arc import draw_puzzles, pick_outcomes
from tinsmith.train.plots.style import render_figures
from tinsmith.verbs.puzzles import open_puzzles, save_puzzles

ONE, TWO, WIDE = ((1,),), ((2,),), ((1, 1),)
END = SYMBOLS.index("<|im_end|>")
GRIDS = grid_tokenizer()


def puzzle(name="p", number=0, answer=ONE):
    return Puzzle(name, number, (Pair(TWO, ONE),), TWO, answer)


def make(seed=0, dim=32, **model) -> LM:
    torch.manual_seed(seed)
    mixer = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8}
    layer = {"mixer": mixer, "feed_forward": {"kind": "swiglu", "hidden_dim": 48}}
    section = {"vocab_size": 18, "dim": dim, "depth": 2, "max_seq_len": 160, "pattern": [layer]}
    return LM(ModelConfig.from_dict(section | model))


@pytest.fixture
def copier() -> LM:
    """A model that repeats its last token; with unshifted labels it would be perfect."""
    lm = make(dim=20, tie_embeddings=True)
    with torch.no_grad():
        for block in lm.blocks:
            for parameter in block.parameters():
                parameter.zero_()
        lm.embed.weight.copy_(torch.eye(18, 20) * 5)
    return lm


@pytest.mark.parametrize(
    ("attempts", "right"),
    [
        ((TWO, ONE), True),
        ((ONE, TWO), True),
        ((TWO,), False),
        ((WIDE, TWO), False),
        ((((1,), (1,)), WIDE), False),
        ((), False),
    ],
)
def test_ARC5_a_puzzle_is_correct_if_one_of_two_attempts_equals_the_answer(attempts, right):
    assert ArcOutcome(puzzle(), attempts).correct is right


def test_ARC5_the_score_counts_outputs_and_task_scores_their_own_outputs():
    """One of three outputs of task a and the output of task b: 2 of 4, not the mean of
    1/3 and 1.
    """
    outcomes = [ArcOutcome(puzzle("a", n), (ONE,) if n == 1 else (TWO,)) for n in range(3)]
    found = ArcResult([*outcomes, ArcOutcome(puzzle("b"), (TWO, ONE))])
    assert found.score == 0.5
    assert found.task_scores == {"a": pytest.approx(1 / 3), "b": 1.0}
    assert found.to_dict()["tasks"] == 2
    assert found.to_dict()["outputs"] == 4


def test_ARC6_a_model_that_repeats_its_last_token_scores_0(copier):
    logits = copier(torch.arange(18)[None]).logits
    assert logits is not None
    assert torch.equal(logits[0].argmax(-1), torch.arange(18))
    puzzles = [generate_puzzle(rule, 0, n, Sizes(3, 3, 1)) for n, rule in enumerate(TRAIN_RULES)]
    assert evaluate_arc(copier, GRIDS, puzzles).score == 0


def test_ARC6_a_model_that_generates_the_answer_scores_1(copier):
    """The same model: after the opening symbol a cell of colour 1, then the end."""
    lm = make(dim=20, tie_embeddings=False)
    lm.load_state_dict(copier.state_dict() | {"head.weight": torch.zeros(18, 20)})
    opening = SYMBOLS.index("<|solution|>")
    with torch.no_grad():
        lm.head.weight[1, opening] = lm.head.weight[END, 1] = 5
    assert evaluate_arc(lm, GRIDS, [puzzle(answer=ONE)]).score == 1
    assert evaluate_arc(lm, GRIDS, [puzzle(answer=TWO)]).score == 0


def naive_score(lm: LM, one: Puzzle, candidate) -> float:
    """View by view, token by token, with no row beside another."""
    total = 0.0
    for symmetry in range(8):
        seen = View(symmetry).apply_to_puzzle(one)
        ids = encode_puzzle_prompt(seen.demonstrations, seen.test_input)
        for token in encode_answer(View(symmetry).apply(candidate)):
            logits = lm(torch.tensor([ids])).logits
            total += logits[0, -1].detach().log_softmax(-1)[token].item()
            ids.append(token)
    return total


def test_ARC7_augscore_is_the_sum_over_eight_views():
    lm = make().double().eval()
    one = generate_puzzle("half", 0, 0, Sizes(3, 3, 1))
    candidates = [one.answer, one.test_input, ((1,),), ((1, 2, 3, 4), (5, 6, 7, 8))]
    expected = [naive_score(lm, one, candidate) for candidate in candidates]
    assert aug_scores(lm, one, candidates) == pytest.approx(expected, abs=1e-9)
    order = sorted(range(4), key=lambda place: -expected[place])
    assert [grid for grid, _ in rank_candidates(lm, one, candidates)] == [
        candidates[p] for p in order
    ]
    assert rank_candidates(lm, one, [TWO, TWO])[0] == (TWO, aug_scores(lm, one, [TWO])[0])


def test_ARC7_scores_do_not_depend_on_batching(monkeypatch):
    lm = make().double().eval()
    one = generate_puzzle("crop", 0, 0, Sizes(3, 4, 1))
    candidates = [one.answer, one.test_input, ((1,),)]
    whole = aug_scores(lm, one, candidates)
    monkeypatch.setattr(arc, "MAX_BATCH_TOKENS", 1)
    assert aug_scores(lm, one, candidates) == pytest.approx(whole, abs=1e-10)


def test_ARC4_the_answer_is_not_part_of_the_prompt(monkeypatch):
    """Other answers and hidden answers give the same prompts and attempts."""
    requested = []
    real = arc.generate

    def listening(lm, tokenizer, prompts, **settings):
        requested.append(prompts)
        return real(lm, tokenizer, prompts, **settings)

    monkeypatch.setattr(arc, "generate", listening)
    one = generate_puzzle("swap", 0, 0, Sizes(3, 3, 1))
    lm = make()
    runs = [
        evaluate_arc(lm, GRIDS, [one._replace(answer=answer)]).outcomes[0].attempts
        for answer in (one.answer, ((7,),), None)
    ]
    assert runs[0] == runs[1] == runs[2]
    assert requested[0] == requested[len(requested) // 3] == requested[2 * len(requested) // 3]
    for prompt in requested[0]:
        assert prompt[-2:] == [SYMBOLS.index("<|im_start|>"), SYMBOLS.index("<|solution|>")]


class Always:
    """Replaces `generate`: one grid for every view, and another one when sampling."""

    def __init__(self, greedy, sampled):
        self.greedy, self.sampled, self.seeds = greedy, sampled, []

    def __call__(self, lm, tokenizer, prompts, *, sampling_params, max_new_tokens, batch_size):
        completions = []
        for each in sampling_params:
            self.seeds.append(each.seed)
            grid = self.greedy if each.greedy else self.sampled
            ids = [1, 1, 1] if grid is None else encode_answer(grid)
            completions.append(type("Stub", (), {"token_ids": ids})())
        return completions


@pytest.mark.parametrize(
    ("greedy", "sampled", "attempts"),
    [(WIDE, ONE, 3), (None, ONE, 1), (None, None, 0), (ONE, ONE, 1)],
)
def test_sampled_candidates_are_added_if_there_are_fewer_than_two(
    greedy, sampled, attempts, monkeypatch
):
    """A 1 x 2 grid transformed back from 8 views gives two candidates, so nothing is
    sampled then.
    """
    always = Always(greedy, sampled)
    monkeypatch.setattr(arc, "generate", always)
    outcome = evaluate_arc(make(), GRIDS, [puzzle()]).outcomes[0]
    assert len(outcome.attempts) == min(attempts, 2)
    assert len(set(outcome.attempts)) == len(outcome.attempts)
    assert len(always.seeds) == (8 if greedy == WIDE else 16)
    assert len(set(always.seeds[:8])) == 8


def test_modes_and_random_state_are_restored():
    lm = make(dropout={"residual": 0.5}).train()
    lm.blocks[0].eval()
    modes, state = [module.training for module in lm.modules()], torch.get_rng_state()
    first = evaluate_arc(lm, GRIDS, [puzzle()])
    assert evaluate_arc(lm, GRIDS, [puzzle()]) == first
    assert [module.training for module in lm.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_puzzle_longer_than_the_context_is_skipped_without_error():
    large = generate_puzzle("recolour", 0, 0, Sizes(9, 10, 3))
    found = evaluate_arc(make(), GRIDS, [large, puzzle()])
    assert found.outcomes[0].attempts == ()
    assert found.to_dict()["outputs"] == 2


def test_a_truncated_answer_is_no_grid():
    """A grid needs its end of turn, so a truncated answer does not parse."""
    lm, one = make(), generate_puzzle("recolour", 0, 0, Sizes(3, 3, 1))
    assert evaluate_arc(lm, GRIDS, [one], max_new_tokens=1).outcomes[0].attempts == ()


def test_a_tokenizer_that_is_not_for_grids_is_refused_in_one_line(tokenizer):
    with pytest.raises(UserError, match=r"set tokenizer: \{symbols: grids\}"):
        evaluate_arc(make(), tokenizer, [puzzle()])


def test_task_files_are_evaluated_and_invalid_ones_reported(tmp_path):
    pair = {"input": [[2]], "output": [[1]]}
    good, hidden = {"train": [pair], "test": [pair]}, {"train": [pair], "test": [{"input": [[2]]}]}
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps({"a": good, "b": {"train": [], "test": []}, "c": hidden}))
    solutions = tmp_path / "solutions.json"
    solutions.write_text(json.dumps({"c": [[[3]]]}))
    reported: list[str] = []
    groups = open_puzzles("m", None, path, solutions, None, reported.append)
    assert [each.answer for each in groups["tasks"]] == [ONE, ((3,),)]
    assert len(reported) == 1
    assert f"{path}:2: task b: no demonstrations" in reported[0]
    path.write_text("[]")
    with pytest.raises(UserError, match="no task in it can be used"):
        open_puzzles("m", None, path, None, None, reported.append)
    with pytest.raises(UserError, match="name ARC tasks with --data"):
        open_puzzles("m", None, None, None, None, reported.append)
    with pytest.raises(UserError, match="--solutions: needs --data"):
        open_puzzles("m", None, None, solutions, None, reported.append)
    path.write_text(json.dumps({"a": good, "bad": [], "c": hidden}))
    assert len(open_puzzles("m", None, path, solutions, None, reported.append)["tasks"]) == 2
    assert f"{path}:2: task bad: not a task" in reported[-1]
    path.write_text(json.dumps({"a": good, "c": hidden}))
    reported.clear()
    (found,) = open_puzzles("m", None, tmp_path, solutions, None, reported.append).values()
    assert [each.answer for each in found] == [ONE, ((3,),)]
    assert reported == [], "the file of solutions is no task"


def outcomes(right: int, wrong: int) -> list[ArcOutcome]:
    made = list(generate_puzzles(TRAIN_RULES, 0, right + wrong, Sizes(3, 6, 2)))
    answers = [(each.answer,) if n < right else () for n, each in enumerate(made)]
    return [ArcOutcome(one, attempts) for one, attempts in zip(made, answers, strict=True)]


@pytest.mark.parametrize(
    ("right", "wrong", "shown"),
    [(20, 20, (4, 4)), (0, 20, (0, 8)), (20, 1, (7, 1)), (2, 1, (2, 1))],
)
def test_a_plot_shows_solved_and_unsolved_puzzles(right, wrong, shown, tmp_path):
    picked = pick_outcomes(outcomes(right, wrong))
    assert (sum(each.correct for each in picked), sum(not each.correct for each in picked)) == shown


def test_a_plot_is_byte_identical_each_time(tmp_path):
    every = outcomes(3, 5)
    path = save_puzzles(tmp_path, every)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert render_figures(lambda: draw_puzzles(every), ["png"])["png"] == path.read_bytes()
    with pytest.raises(UserError, match=r"arc_agi\.png"):
        save_puzzles(Path(tmp_path / "nowhere"), every)
