"""Samples during training: completions of fixed prompts."""

from tinsmith.core.rng import derive_seed
from tinsmith.data.config import DataFormat
from tinsmith.data.loader.batch import Batch
from tinsmith.infer.generate import generate
from tinsmith.infer.sample import SamplingParams
from tinsmith.text.chat import encode_prompt, parse_conversation
from tinsmith.train.precision import autocast
from tinsmith.train.run import Run

NUM_PROMPTS = 3
PROMPT_TOKENS = 12


def sample_prompts(run: Run) -> list[list[int]]:
    """The recipe's prompts; otherwise the beginnings of the first validation (or training)
    documents or chats.
    """
    given = run.config.eval.prompts
    if given is not None:
        return [_encoded(run, text) for text in given]
    source = run.validation or run.source
    found: list[list[int]] = []
    for index in range(min(source.size, 4 * NUM_PROMPTS)):
        batch = source.get_batch(index, 1)
        found += _beginnings(batch, run.config.objective.data_format)
        if len(found) >= NUM_PROMPTS:
            break
    return found[:NUM_PROMPTS]


def _encoded(run: Run, text: str) -> list[int]:
    if run.config.objective.data_format != "documents":
        return encode_prompt(
            run.tokenizer,
            parse_conversation({"messages": [{"role": "user", "content": text}]}, answered=False),
        )
    return run.tokenizer.encode(text)


def _beginnings(batch: Batch, shape: DataFormat) -> list[list[int]]:
    """A few first tokens of the documents that begin in a row; of a chat or a pair, all before its
    first answer; a prompt as it is.
    """
    ids, mask, segments = batch.ids[0], batch.mask[0], batch.segments[0]
    found = []
    for segment in range(int(segments.max()) + 1):
        here = (segments == segment).nonzero()[:, 0]
        if shape == "prompts":
            found.append(ids[here].tolist())
        elif shape != "documents":
            first = int(mask[here].int().argmax())
            found.append(ids[here][: first + 1].tolist())
        elif len(here) > 2 * PROMPT_TOKENS:
            found.append(ids[here][:PROMPT_TOKENS].tolist())
    return found


def generate_samples(run: Run) -> list[dict[str, str]]:
    """Complete the sample prompts: the first greedily, the others with seeds that depend on the
    step and the index only.
    """
    prompts = sample_prompts(run)
    params = [
        SamplingParams(
            temperature=0.8 if index else 0.0,
            seed=derive_seed(run.config.train.seed, "sample", run.state.step, index),
        )
        for index in range(len(prompts))
    ]
    with autocast(run.config.train.precision, run.ranks.device):
        completions = generate(
            run.policy,
            run.tokenizer,
            prompts,
            sampling_params=params,
            max_new_tokens=run.config.eval.max_new_tokens,
            batch_size=max(1, len(prompts)),
            should_stop=run.poll,  # raises if the run is interrupted, otherwise False
        )
    return [
        {"prompt": run.tokenizer.decode(ids), "text": completion.text}
        for ids, completion in zip(prompts, completions, strict=True)
    ]
