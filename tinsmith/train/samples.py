"""Samples during training: completions of fixed prompts."""

from tinsmith.core.rng import derive_seed
from tinsmith.data.formats import FORMATS
from tinsmith.data.formats.base import DataFormat
from tinsmith.data.loader.batch import Batch
from tinsmith.infer.generate import generate
from tinsmith.infer.sample import SamplingParams
from tinsmith.text.chat import encode_prompt, parse_conversation
from tinsmith.train.precision import autocast
from tinsmith.train.run import Run

NUM_PROMPTS = 3
PROMPT_TOKENS = 12


def sample_prompts(run: Run) -> list[list[int]]:
    """Return the prompts of the recipe, or else of the first validation (or training) samples."""
    data_format = FORMATS[run.config.objective.data_format]
    if run.config.eval.prompts is not None:
        return [_encode(run, text, data_format) for text in run.config.eval.prompts]
    dataset = run.validation or run.source
    prompts: list[list[int]] = []
    for index in range(min(dataset.size, 4 * NUM_PROMPTS)):
        prompts += _sequence_prompts(dataset.get_batch(index, 1), data_format)
        if len(prompts) >= NUM_PROMPTS:
            break
    return prompts[:NUM_PROMPTS]


def _encode(run: Run, text: str, data_format: DataFormat) -> list[int]:
    if data_format.is_chat:
        return encode_prompt(
            run.tokenizer,
            parse_conversation({"messages": [{"role": "user", "content": text}]}, answered=False),
        )
    return run.tokenizer.encode(text)


def _sequence_prompts(batch: Batch, data_format: DataFormat) -> list[list[int]]:
    """Return the prompts of the sequences in the first row of a batch."""
    ids, mask, segments = (part[0].numpy() for part in (batch.ids, batch.mask, batch.segments))
    prompts = []
    for segment in range(int(segments.max()) + 1):
        here = segments == segment
        prompt = data_format.sample_prompt(ids[here], mask[here], PROMPT_TOKENS)
        if prompt is not None:
            prompts.append(prompt)
    return prompts


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
