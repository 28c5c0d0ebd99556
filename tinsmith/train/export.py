"""Export a finished run: loss plot, `samples.md`, and `final/`, a Hugging Face folder with a model
card.
"""

import shlex
import sys
from pathlib import Path

from safetensors.torch import save as bytes_of

from tinsmith.config import dump
from tinsmith.core.errors import UserError
from tinsmith.core.files import atomic_write
from tinsmith.core.log import read_metrics
from tinsmith.data.formats import FORMATS
from tinsmith.hub.card import CardDataset, CardFacts, CardSample, CardScore, model_card
from tinsmith.hub.hf import ExportResult, write_folder
from tinsmith.hub.load import base_model_path
from tinsmith.hub.peft.adapters import Adapters, write_adapters
from tinsmith.hub.vocabulary import save_tokenizer
from tinsmith.nn import lora
from tinsmith.train import parallel
from tinsmith.train.checkpoint import OBJECTIVE_FILE
from tinsmith.train.report import HEADLINE_METRICS, plot_run, write_samples
from tinsmith.train.run import Run
from tinsmith.train.run_dir import environment


def export_run(run: Run) -> None:
    """Write plot, samples and `final/`. Every rank must call it. A second call changes nothing."""
    own = run.policy.state_dict().keys()
    state = {name: t for name, t in parallel.full_tensors(run.policy).items() if name in own}
    trained = dict(run.objective.named_parameters()).keys()
    heads = {k: v for k, v in parallel.full_tensors(run.objective).items() if k in trained}
    if not run.ranks.is_main:
        return
    plot = plot_run(run.folder)
    pictures = [path for path in (plot, plot.with_name("experts.png")) if path.exists()]
    write_samples(run.folder)
    final = run.folder / "final"
    state, weights = lora.split_state_dict(state)
    config = run.config.lora
    done = write_folder(
        run.policy.config,
        state if config is None else lora.merged_state_dict(state, weights, config.scaling),
        run.tokenizer,
        final,
        card=lambda exported: model_card(card_facts(run, exported)),
        extra_files=pictures,
        overwrite=True,
        write_extra=None
        if config is None
        else lambda folder: write_adapter(run, Adapters.from_weights(config, weights), folder),
    )
    if heads:  # a reward model is no model without its head
        atomic_write(final / OBJECTIVE_FILE, bytes_of(heads))
    output = _outcome(run.state.evaluation, run.state.best)
    opens = f"opens as {done.family}" if done.family != "tinsmith" else "opens with tinsmith.load"
    drawn = ", ".join(path.name for path in pictures)
    run.log.line(f" finished {output}{run.folder / 'final'} ({opens}), {drawn}, samples.md")


def write_adapter(run: Run, adapters: Adapters, folder: Path) -> None:
    """Save the LoRA adapter and the tokenizer in PEFT format next to the merged model."""
    base = None if run.config.init_from is None else base_model_path(run.config.init_from)
    try:
        write_adapters(folder / "adapter", run.policy.config, adapters, base)
        save_tokenizer(run.tokenizer, folder / "adapter", run.policy.config)
    except UserError as error:
        run.log.line(f" warning no adapter/ in final/: {error}")


def card_facts(run: Run, exported: ExportResult) -> CardFacts:
    """Collect the facts for the model card from the run."""
    config, model, env = run.config, run.policy.config, environment(run.ranks)
    layers = dict.fromkeys((layer.mixer.kind, layer.feed_forward.kind) for layer in model.layers)
    found = CardFacts(
        name=run.folder.name,
        parameters=exported.parameters,
        family=exported.family,
        reason=exported.reason,
        dtype=exported.dtype,
        hashes=exported.hashes,
        max_seq_len=model.max_seq_len,
        architecture=f"{model.depth} layers of {model.dim}: "
        + ", ".join(" + ".join(pair) for pair in layers),
        objective=config.objective.kind,
        tokens_seen=run.state.tokens,
        steps=run.state.step,
        data=[_data(source) for source in run.data_report["sources"]],
        recipe=dump(config),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        versions=env["versions"],
        loss_plot="loss.png",
        scores=_scores(run),
        tokenizer=True,
        chat=FORMATS[config.objective.data_format].is_chat,
    )
    if env["git"]:
        found["commit"] = env["git"]["sha"] + (" with changes" if env["git"]["dirty"] else "")
    if config.init_from:
        found["base"] = config.init_from
    return found | _samples(run.folder)


def _data(source: dict) -> CardDataset:
    parts = [source["train"], source["validation"]]
    documents, tokens = (sum(part[key] for part in parts) for key in ("documents", "tokens"))
    return CardDataset(
        name=source["name"], documents=documents, tokens=tokens, rejected=source["rejected"]
    )


def _outcome(last: dict[str, float] | None, best: dict[str, float] | None) -> str:
    """Describe the last evaluation, which is that of `final/`, and the best one if it differs."""
    if last is None:
        return ""
    text = f"{_first(last)} (step {int(last['step'])}"
    if best and best["step"] != last["step"]:
        text += f"; best {_first(best)} at step {int(best['step'])}"
    return f"{text})  "


def _first(evaluation: dict[str, float]) -> str:
    name = next(name for name in HEADLINE_METRICS if name in evaluation)
    return f"{name} {evaluation[name]:.3f}"


def _scores(run: Run) -> list[CardScore]:
    last = run.state.evaluation
    if last is None:
        return []
    items = min(run.config.eval.max_samples, run.validation.size if run.validation else 0)
    data_format = FORMATS[run.config.objective.data_format]
    if data_format.counts_tokens:
        items *= run.config.train.seq_len
    return [
        CardScore(task="validation", metric=metric, value=last[name], items=items)
        for name, metric in data_format.score_names.items()
        if name in last
    ]


def _samples(folder: Path) -> CardFacts:
    drawn = [
        line["samples"]
        for line in read_metrics(folder / "metrics.jsonl")
        if line["kind"] == "samples"
    ]
    if not drawn or not drawn[-1]:
        return CardFacts()  # type: ignore[typeddict-item]
    newest = [CardSample(prompt=each["prompt"], text=each["text"]) for each in drawn[-1]]
    worst = min(newest, key=lambda each: distinct_trigrams(each["text"]))
    note = "the one that repeats itself most"
    return CardFacts(samples=newest, bad_sample=CardSample(**worst, note=note))  # type: ignore[typeddict-item]


def distinct_trigrams(text: str) -> float:
    """Return the fraction of distinct three-word sequences; 0 for fewer than three words."""
    words = text.split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(triples)) / len(triples) if triples else 0.0
