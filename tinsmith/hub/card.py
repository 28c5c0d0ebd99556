"""Write model cards: a README.md from recorded facts. A section without facts is omitted."""

import re
from typing import NotRequired, Required, TypedDict

from tinsmith.core.units import format_count
from tinsmith.core.yamlfile import write_yaml


class CardDataset(TypedDict):
    """A source of training data."""

    name: Required[str]
    documents: NotRequired[int]
    tokens: NotRequired[int]
    rejected: NotRequired[int]
    license: NotRequired[str]


class CardScore(TypedDict):
    """One result of an evaluation."""

    task: Required[str]
    metric: Required[str]
    value: Required[float]
    items: NotRequired[int]
    """Number of tokens, questions, ... over which the value is a mean."""


class CardSample(TypedDict):
    """A prompt and a completion; `note` comments on its quality."""

    prompt: Required[str]
    text: Required[str]
    note: NotRequired[str]


class CardFacts(TypedDict, total=False):
    """The facts of a card. Only `name` and `parameters` are required."""

    name: Required[str]
    parameters: Required[int]
    active_parameters: int
    """Parameters that act on one token, if fewer than all."""
    family: str
    """`model_type` of config.json."""
    reason: str | None
    """Why no stock class can express the model, if `family` is "tinsmith"."""
    dtype: str
    max_seq_len: int
    """Context length in tokens."""
    architecture: str
    """One line, such as "8 x (gqa, swiglu)"."""
    base: str
    """Model from which training started."""
    objective: str
    license: str
    tokens_seen: int
    steps: int
    data: list[CardDataset]
    recipe: str
    """The resolved recipe as YAML."""
    command: str
    commit: str
    versions: dict[str, str]
    loss_plot: str
    """File name of a picture in the same folder."""
    scores: list[CardScore]
    samples: list[CardSample]
    bad_sample: CardSample
    limits: list[str]
    tokenizer: bool
    """Whether the folder has a tokenizer (default True)."""
    chat: bool
    """Whether the model was trained on conversations."""
    hashes: dict[str, str]
    """SHA-256 of every weights file, by file name."""


def model_card(facts: CardFacts) -> str:
    """Return the README.md of a model's folder."""
    sections = [
        ("", _introduction(facts)),
        ("How to load it", _loading(facts)),
        ("Data", _data(facts)),
        ("Training", _training(facts)),
        ("Evaluation", _evaluation(facts)),
        ("Samples", _samples(facts)),
        ("Limits", "\n".join(f"- {limit}" for limit in facts.get("limits", []))),
        ("Recipe", _fenced(facts["recipe"], "yaml") if "recipe" in facts else ""),
        ("Weights", _weights(facts)),
    ]
    parts = [f"## {title}\n\n{body}" if title else body for title, body in sections if body]
    return "\n\n".join([_front_matter(facts), *parts]) + "\n"


def _front_matter(facts: CardFacts) -> str:
    stock = facts.get("family", "tinsmith") != "tinsmith"
    data = {
        "library_name": "transformers" if stock else "tinsmith",
        "pipeline_tag": "text-generation",
        "tags": ["tinsmith"],
    }
    if "license" in facts:
        data["license"] = facts["license"]
    return f"---\n{write_yaml(data).strip()}\n---\n\n# {_one_line(facts['name'])}"


def _introduction(facts: CardFacts) -> str:
    parameters = f"{facts['parameters']:,} parameters"
    if "active_parameters" in facts:
        parameters += f", {facts['active_parameters']:,} of which act on a token"
    rows = [
        ("Parameters", parameters),
        ("Architecture", facts.get("architecture")),
        ("Weights", facts.get("dtype")),
        ("Context", f"{facts['max_seq_len']:,} tokens" if "max_seq_len" in facts else None),
        ("Objective", facts.get("objective")),
        ("Started from", facts.get("base")),
        ("Class", _class(facts)),
    ]
    table = _table(["", ""], [[name, value] for name, value in rows if value])
    size = format_count(facts["parameters"])
    return f"A language model of {size} parameters, made with Tinsmith.\n\n{table}"


def _class(facts: CardFacts) -> str | None:
    if "family" not in facts:
        return None
    if facts["family"] != "tinsmith":
        return f"`{facts['family']}`, a stock class of transformers"
    reason = facts.get("reason")
    return "`tinsmith`, Tinsmith's own" + (f", because {reason}" if reason else "")


def _loading(facts: CardFacts) -> str:
    stock = facts.get("family", "tinsmith") != "tinsmith"
    tokenizer, chat = facts.get("tokenizer", True), facts.get("chat", False)
    registration = [] if stock else ["import tinsmith.hub.auto  # registers the class"]
    names = "AutoModelForCausalLM, AutoTokenizer" if tokenizer else "AutoModelForCausalLM"
    transformers_lines = [
        *registration,
        f"from transformers import {names}",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        *(['tokenizer = AutoTokenizer.from_pretrained("FOLDER")'] if tokenizer else []),
    ]
    tinsmith_lines = ["import tinsmith", "", 'lm, tokenizer = tinsmith.load("FOLDER")']
    shell = "tinsmith chat FOLDER" if chat else 'tinsmith generate FOLDER -p "Once"'
    snippets = [
        _fenced("\n".join(lines), "python") for lines in (transformers_lines, tinsmith_lines)
    ]
    return "\n\n".join([*snippets, *([_fenced(shell, "sh")] if tokenizer else [])])


def _data(facts: CardFacts) -> str:
    rows = [
        [
            source["name"],
            _format_int(source.get("documents")),
            _format_int(source.get("tokens")),
            _format_int(source.get("rejected")),
            source.get("license", "not stated"),
        ]
        for source in facts.get("data", [])
    ]
    return _table(["source", "documents", "tokens", "rejected", "license"], rows) if rows else ""


def _training(facts: CardFacts) -> str:
    parts: list[str] = []
    if "steps" in facts and "tokens_seen" in facts:
        parts.append(f"{facts['steps']:,} steps, {facts['tokens_seen']:,} tokens seen.")
    if "loss_plot" in facts:
        parts.append(f"![loss]({facts['loss_plot']})")
    if "command" in facts:
        parts.append(_fenced(facts["command"], "sh"))
    versions = dict(facts.get("versions", {}))
    if "commit" in facts:
        versions = {"commit": facts["commit"]} | versions
    if versions:
        parts.append(_table(["with", "version"], [[name, versions[name]] for name in versions]))
    return "\n\n".join(parts)


def _evaluation(facts: CardFacts) -> str:
    rows = [
        [score["task"], score["metric"], f"{score['value']:.4g}", _format_int(score.get("items"))]
        for score in facts.get("scores", [])
    ]
    return _table(["task", "metric", "value", "over"], rows) if rows else ""


def _samples(facts: CardFacts) -> str:
    samples = [("", sample) for sample in facts.get("samples", [])]
    if "bad_sample" in facts:
        samples.append(("A bad one. ", facts["bad_sample"]))
    parts: list[str] = []
    for prefix, sample in samples:
        note = prefix + _one_line(sample.get("note", ""))
        parts += [note.strip()] if note.strip() else []
        parts += [_fenced(sample["prompt"], "text"), _fenced(sample["text"], "text")]
    return "\n\n".join(parts)


def _weights(facts: CardFacts) -> str:
    hashes = facts.get("hashes", {})
    return _table(["file", "SHA-256"], [[name, f"`{hashes[name]}`"] for name in sorted(hashes)])


def _table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _format_int(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
