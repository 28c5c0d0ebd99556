"""Loss and bits per byte against a plain loop; every target counts exactly once."""

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinsmith.core.errors import UserError
from tinsmith.data.files import TextChunk
from tinsmith.data.loader.batch import Row, collate
from tinsmith.data.loader.loader import open_dataset
from tinsmith.data.prepare.prepare import prepare
from tinsmith.data.sources import TextData
from tinsmith.evals.bpb import evaluate_bpb, evaluate_text
from tinsmith.evals.sliding_window import pack_windows, sliding_windows

END = 0


class Source:
    """The interface of a source that `evaluate_bpb` uses: names, subsets, rows, iteration."""

    def __init__(self, rows, sources, names):
        self.all_rows, self.sources, self.by_number = rows, sources, names
        self.limits = []

    @property
    def names(self):
        return list(self.by_number.values())

    def subset(self, name):
        chosen = [i for i, number in enumerate(self.sources) if self.by_number[number] == name]
        return Source(
            [self.all_rows[i] for i in chosen], [self.sources[i] for i in chosen], self.by_number
        )

    def get_batch(self, start, count):
        stop = start + count
        return collate(self.all_rows[start:stop], self.sources[start:stop])

    def iter_batches(self, batch_size, max_samples=None):
        self.limits.append(max_samples)
        count = min(max_samples, len(self.all_rows))
        for start in range(0, count, batch_size):
            yield self.get_batch(start, min(batch_size, count - start))


@pytest.fixture
def source(tokenizer):
    """Five packed rows of two documents and padding from sources 0 and 2; some targets masked out,
    some `<|endoftext|>`.
    """
    drawn = np.random.default_rng(5)
    rows = []
    for _ in range(5):
        first, second, space = 7, 6, 3
        ids = drawn.integers(14, tokenizer.vocab_size, first + second + space)
        ids[[first - 1, first + second - 1]] = END
        ids[first + second :] = 0
        segments = np.repeat([0, 1, -1], [first, second, space])
        positions = np.concatenate([np.arange(first), np.arange(second), np.zeros(space)])
        mask = np.append(segments[1:] == segments[:-1], False) & (segments >= 0)
        mask &= drawn.random(len(mask)) < 0.8
        mask[first - 2] = True
        targets = np.where(mask, np.append(ids[1:], 0), 0)
        rows.append(Row(ids, targets, mask, positions.astype(np.int64), segments))
    return Source(rows, [0, 2, 0, 2, 2], {0: "tales", 2: "code"})


@pytest.fixture
def lengths(tokenizer):
    return torch.from_numpy(tokenizer.byte_lengths())


def measure(lm, source, lengths, *, rows=99, batch_rows=2, poll=lambda: None):
    return evaluate_bpb(
        lm, source, lengths, max_samples=rows, batch_size=batch_rows, device="cpu", poll=poll
    )


@torch.no_grad()
def by_hand(lm, rows, lengths):
    """(nats of all targets, targets, nats of targets with bytes, bytes), one target at a time."""
    lm.eval()
    totals = [0.0, 0, 0.0, 0]
    for row in rows:
        for place in np.flatnonzero(row.mask):
            begin = np.flatnonzero(row.segments == row.segments[place])[0]
            prefix = torch.from_numpy(row.ids[begin : place + 1])[None]
            target = int(row.targets[place])
            nll = -float(lm(prefix).logits[0, -1].log_softmax(-1)[target])
            size = int(lengths[target])
            totals = [
                totals[0] + nll,
                totals[1] + 1,
                totals[2] + nll * (size > 0),
                totals[3] + size,
            ]
    return totals


@pytest.mark.parametrize("batch_rows", [1, 2, 5])
def test_sums_by_source_equal_a_plain_loop(make_lm, source, lengths, batch_rows):
    lm = make_lm()
    found = measure(lm, source, lengths, batch_rows=batch_rows)
    assert list(found) == ["tales", "code", "all"]
    for name in ("tales", "code"):
        wanted = by_hand(lm, source.subset(name).all_rows, lengths)
        assert found[name] == pytest.approx(tuple(wanted), abs=1e-9)
        assert found[name].loss == pytest.approx(wanted[0] / wanted[1])
        assert found[name].bpb == pytest.approx(wanted[2] / math.log(2) / wanted[3])
    assert found["all"] == pytest.approx(
        tuple(a + b for a, b in zip(found["tales"], found["code"], strict=True))
    )
    assert found["all"].text_nll < found["all"].nll


def test_a_uniform_model_has_the_loss_of_guessing(bigrams, source, lengths):
    found = measure(bigrams([]), source, lengths)["all"]
    targets = [int(t) for row in source.all_rows for t in row.targets[row.mask]]
    texts = [target for target in targets if target != END]
    assert len(texts) < len(targets)
    size = sum(int(lengths[target]) for target in texts)
    assert (found.tokens, found.bytes) == (len(targets), size)
    assert found.loss == pytest.approx(math.log(len(lengths)), rel=1e-5)
    assert found.bpb == pytest.approx(math.log2(len(lengths)) * len(texts) / size, rel=1e-5)


def test_no_targets_give_nan_without_failure(make_lm, source, lengths):
    lm = make_lm()
    found = measure(lm, source, torch.zeros_like(lengths))["all"]
    assert math.isnan(found.bpb)
    assert math.isfinite(found.loss)
    blank = Source(
        [row._replace(mask=row.mask & False) for row in source.all_rows], [0] * 5, {0: "x"}
    )
    found = measure(lm, blank, lengths)["all"]
    assert math.isnan(found.bpb)
    assert math.isnan(found.loss)


def test_a_source_without_sampled_rows_is_reported(make_lm, source, lengths):
    found = measure(make_lm(), source, lengths, rows=1)
    assert source.limits == [1]
    assert found["code"].tokens == 0
    assert found["all"] == found["tales"]


def test_evaluation_changes_no_state(make_lm, source, lengths):
    """T2: random state and module modes are the same afterwards, and dropout is off."""
    lm = make_lm()
    lm.blocks[1].eval()
    modes = [module.training for module in lm.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = measure(lm, source, lengths)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert [module.training for module in lm.modules()] == modes
    assert measure(lm, source, lengths) == first
    assert all(parameter.grad is None for parameter in lm.parameters())


def test_poll_is_called_before_every_batch_and_may_raise(make_lm, source, lengths):
    lm, calls = make_lm(), []

    class Enough(Exception):
        pass

    def poll():
        calls.append(1)
        if len(calls) == 3:
            raise Enough

    ran = []
    lm.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(Enough):
        measure(lm, source, lengths, batch_rows=2, poll=poll)
    assert len(ran) == 2
    assert lm.training
    calls = []
    measure(lm, source, lengths, batch_rows=2, poll=lambda: calls.append(1))
    assert len(calls) == 3


def test_prepared_sources_are_evaluated_by_name(make_lm, tokenizer, lengths, tmp_path):
    texts = {"tales": "the cat sat on the mat. ", "code": "print(1 + 1)\n"}
    for name, text in texts.items():
        rows = [json.dumps({"text": f"{text * 4}{number}"}) for number in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    data = tuple(TextData(path=str(tmp_path / f"{name}.jsonl"), validation=0.3) for name in texts)
    prepared = prepare(data, tokenizer, "documents", tmp_path / "data", lambda line: None)
    source = open_dataset(prepared.folder, "documents", "validation", 32, 0)
    found = measure(make_lm(), source, lengths)
    assert set(found) == {*texts, "all"}
    assert found["all"].tokens == int(sum(b.mask.sum() for b in source.iter_batches(4)))
    assert all(math.isfinite(bpb.loss) and math.isfinite(bpb.bpb) for bpb in found.values())


words = st.lists(st.sampled_from(["the ", "cat", "x", "\n", "é", "<|endoftext|>"]), max_size=30)


@given(
    st.lists(st.lists(words.map("".join), min_size=1, max_size=3), max_size=4),
    st.integers(1, 12),
    st.data(),
)
@settings(derandomize=True, max_examples=150, deadline=None)
def test_every_token_but_the_first_is_predicted_exactly_once(tokenizer, documents, context, data):
    stride = data.draw(st.integers(1, context))
    texts, whole = [], []
    for document in documents:
        ends = [i == len(document) - 1 for i in range(len(document))]
        texts += [
            TextChunk(t, "f", 1, i == 0, e)
            for i, (t, e) in enumerate(zip(document, ends, strict=True))
        ]
        ids = tokenizer.encode(document[0])
        for piece in document[1:]:
            ids += tokenizer.encode_inside(piece)
        whole.append([*ids, tokenizer.end_of_text])
    found = list(sliding_windows(texts, tokenizer, context, stride))
    predicted = [token for window in found for token in window.ids[window.first_target :]]
    assert predicted == [token for ids in whole for token in ids[1:]]
    for window in found:
        assert 1 <= window.first_target < len(window.ids) <= context + 1
        assert window.first_target in (1, context - stride + 1)
    for batch in pack_windows(found, context, 3, 7):
        assert batch.ids.shape[1] <= context
        assert batch.source.tolist() == [7] * len(batch.ids)


@pytest.mark.parametrize("stride", [1, 5, 8])
def test_packed_windows_do_not_attend_to_each_other(make_lm, tokenizer, lengths, tmp_path, stride):
    lm = make_lm()
    documents = ["the cat", "the dog ran off. and the cat sat on the mat", "x", "the mat"]
    path = tmp_path / "some.txt"
    path.write_text("\n<|endoftext|>\n".join(documents))
    found = evaluate_text(lm, tokenizer, path, seq_len=8, stride=stride, batch_size=2)
    totals = [0.0, 0, 0.0, 0]
    texts = [f"{text}\n" for text in documents[:-1]] + documents[-1:]
    for window in sliding_windows([TextChunk(t, "f", 1) for t in texts], tokenizer, 8, stride):
        ids = np.array(window.ids)
        mask = np.arange(1, len(ids)) >= window.first_target
        row = Row(ids[:-1], ids[1:], mask, np.arange(len(mask)), np.zeros(len(mask), dtype=int))
        totals = [a + b for a, b in zip(totals, by_hand(lm, [row], lengths), strict=True)]
    assert found.parts["some.txt"] == pytest.approx(tuple(totals), abs=1e-9)
    assert (found.documents, found.rejected, found.stride) == (4, 0, stride)


def test_bits_per_byte_count_the_bytes_of_all_but_the_first_tokens(bigrams, tokenizer, tmp_path):
    text = "the cat sat on the mat é\n" * 30
    (tmp_path / "a.txt").write_text(text)
    found = evaluate_text(bigrams([]), tokenizer, tmp_path, seq_len=16).parts
    first = len(tokenizer.bytes_of(tokenizer.encode(text)[:1]))
    assert found["a.txt"].bytes == len(text.encode()) - first
    assert found["a.txt"].tokens == len(tokenizer.encode(text))
    assert found["all"] == found["a.txt"]


def test_the_window_length_does_not_matter_if_documents_fit(make_lm, tokenizer, write_rows):
    path = write_rows([{"text": "the cat sat"}, {"text": "on the mat"}])
    lm = make_lm()
    one, other = (evaluate_text(lm, tokenizer, path, seq_len=n).parts["all"] for n in (32, 64))
    assert one == pytest.approx(other, abs=1e-9)


def test_invalid_lines_are_skipped_and_the_first_is_named(make_lm, tokenizer, write_rows):
    reported = []
    good = {"story": "the cat sat on the mat"}
    path = write_rows([good, "{broken", {"text": "other"}, {"story": 3}, good])
    found = evaluate_text(make_lm(), tokenizer, path, field="story", say=reported.append)
    assert (found.documents, found.rejected) == (2, 3)
    assert len(reported) == 1
    assert f"{path}:2: not JSON" in reported[0]
    assert evaluate_text(make_lm(), tokenizer, path, field="story", limit=1).documents == 1
    assert json.loads(json.dumps(found.to_dict()))["parts"]["all"]["tokens"] > 0


def test_invalid_arguments_and_files_are_refused_in_one_line(
    make_lm, tokenizer, write_rows, tmp_path
):
    lm, path = make_lm(), write_rows([{"text": "the cat"}])
    with pytest.raises(UserError, match=r"seq_len: 65 must be from 1 to .* 64"):
        evaluate_text(lm, tokenizer, path, seq_len=65)
    with pytest.raises(UserError, match=r"stride: 9 must be from 1 to seq_len=8"):
        evaluate_text(lm, tokenizer, path, seq_len=8, stride=9)
    with pytest.raises(UserError, match="limit: 0 must be at least 1"):
        evaluate_text(lm, tokenizer, path, limit=0)
    with pytest.raises(UserError, match=r"rows\.jsonl:1: no field 'story'"):
        evaluate_text(lm, tokenizer, path, field="story")
    with pytest.raises(UserError, match="does not exist"):
        evaluate_text(lm, tokenizer, tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"empty\.txt: no text in it"):
        evaluate_text(lm, tokenizer, tmp_path / "empty.txt")
