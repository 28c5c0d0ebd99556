"""Pages under docs/ agree with the code: glossary, data formats."""

import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from tinsmith.config import RunConfig
from tinsmith.data.formats import FORMATS
from tinsmith.data.sources import AnySource
from tinsmith.objectives import ObjectiveConfig

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

SEARCH_TERMS = """
learning-rate warmup; KV cache; response mask; load-balancing loss; gradient checkpointing;
gradient accumulation; gradient clipping; mixed precision; cosine schedule; sequence packing;
weight tying; early stopping; data parallel; tensor parallel; sliding window; attention sink;
multi-head latent attention; hyper-connections; dead expert; LoRA rank; chat template;
system prompt; validation split; data mixture; perplexity; reward; KL penalty; clip fraction;
importance sampling; teacher forcing; quantization; nucleus; top-k sampling; repetition penalty;
stop sequence; continuous batching; rotary; loss spike; tokenizer training; requires_grad
"""


@pytest.mark.parametrize("term", [term.strip() for term in SEARCH_TERMS.split(";")])
def test_a_term_of_the_field_is_found_in_the_glossary(term):
    page = " ".join((DOCS / "glossary.md").read_text(encoding="utf-8").split())
    assert term.lower() in page.lower().replace("-window", " window")


def members(annotation: Any) -> list[Any]:
    """The dataclasses in an annotation, unions and containers opened."""
    if is_dataclass(annotation):
        return [annotation]
    return [each for argument in get_args(annotation) for each in members(argument)]


def recipe_keys(config: Any, seen: set[Any]) -> set[str]:
    """The names of all fields in a config class and the configs in it."""
    if config in seen:
        return set()
    seen.add(config)
    names = {field.name for field in fields(config)}
    for annotation in get_type_hints(config, include_extras=True).values():
        for member in members(annotation):
            names |= recipe_keys(member, seen)
    return names


def test_sections_and_keys_in_the_glossary_are_keys_of_a_recipe():
    page = (DOCS / "glossary.md").read_text(encoding="utf-8")
    dotted = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", page)
    named = {part for name in dotted for part in name.split(".")}
    assert len(named) > 15
    assert named - recipe_keys(RunConfig, set()) == set()


def table(page: str, heading: str) -> dict[str, list[str]]:
    """The rows of the first table after a heading, by the first cell."""
    section = page.split(f"\n{heading}\n")[1]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
    end = next((i for i, row in enumerate(rows) if i > 1 and row[0].startswith("---")), len(rows))
    return {row[0].strip(" `"): row for row in rows[2:end]}


def test_the_page_of_data_formats_lists_all_sources_and_formats():
    page = (DOCS / "data_formats.md").read_text(encoding="utf-8")
    sources = table(page.split("\n## Formats")[0], "## Sources")
    assert set(sources) == {each.kind for each in get_args(AnySource)}
    formats = table(page, "## Formats")
    assert set(formats) == set(FORMATS)


def test_the_page_of_data_formats_names_the_objectives_of_every_format():
    page = (DOCS / "data_formats.md").read_text(encoding="utf-8")
    rows = table(page, "## Formats")
    named = {name: set(re.findall(r"`(\w+)`", row[1])) for name, row in rows.items()}
    objectives = members(ObjectiveConfig)
    assert set().union(*named.values()) == {objective.kind for objective in objectives}
    for objective in objectives:
        if isinstance(objective.data_format, str):  # otherwise a key of the objective selects it
            assert objective.kind in named[objective.data_format]


def test_every_example_record_on_the_page_of_data_formats_is_read():
    page = (DOCS / "data_formats.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```json\n(.*?)```", page, re.S)
    for name, block in zip(("chats", "pairs", "prompts"), blocks, strict=True):
        rest = block.strip()
        while rest:
            record, end = json.JSONDecoder().raw_decode(rest)
            FORMATS[name].read(record)
            rest = rest[end:].strip()
