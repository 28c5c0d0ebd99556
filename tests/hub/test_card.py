import re

import pytest
import yaml

from tinsmith.hub.card import model_card
from tinsmith.hub.hf import export_folder

FACTS = {
    "name": "tiny-1",
    "parameters": 12_600_000,
    "active_parameters": 4_100_000,
    "family": "llama",
    "reason": None,
    "dtype": "bfloat16",
    "max_seq_len": 512,
    "architecture": "8 x (gqa 8/2, swiglu 1408)",
    "base": "runs/base",
    "objective": "sft",
    "license": "apache-2.0",
    "tokens_seen": 32_800_000,
    "steps": 2000,
    "data": [
        {"name": "stories | part 1", "documents": 1000, "tokens": 41_200_000, "rejected": 312},
        {"name": "stdlib", "license": "PSF-2.0"},
    ],
    "recipe": "model:\n  dim: 32\n# ```\n",
    "command": "tinsmith train recipes/tiny/sft.yaml --name tiny-1",
    "commit": "abc1234",
    "versions": {"tinsmith": "0.1.0", "torch": "2.13.0"},
    "loss_plot": "loss.png",
    "scores": [{"task": "bpb", "metric": "bits per byte", "value": 1.57123, "items": 65536}],
    "samples": [
        {"prompt": "Once", "text": "upon a time\n```\nescaped\n```", "note": "fixed prompt"}
    ],
    "bad_sample": {"prompt": "2 + 2 =", "text": "5", "note": "wrong"},
    "limits": ["It knows 512 tokens of context.", "It was never evaluated for safety."],
    "tokenizer": True,
    "chat": True,
    "hashes": {"model.safetensors": "ab" * 32},
}


def test_every_fact_is_in_the_card():
    card = model_card(FACTS)
    for fact in (
        "# tiny-1",
        "12,600,000 parameters, 4,100,000 of which act on a token",
        "8 x (gqa 8/2, swiglu 1408)",
        "runs/base",
        "| stories \\| part 1 | 1,000 | 41,200,000 | 312 | not stated |",
        "| stdlib |  |  |  | PSF-2.0 |",
        "2,000 steps, 32,800,000 tokens seen.",
        "![loss](loss.png)",
        "tinsmith train recipes/tiny/sft.yaml --name tiny-1",
        "| commit | abc1234 |",
        "| torch | 2.13.0 |",
        "| bpb | bits per byte | 1.571 | 65,536 |",
        "upon a time",
        "A bad one. wrong",
        "- It was never evaluated for safety.",
        "  dim: 32",
        "ab" * 32,
        "`llama`, a stock class of transformers",
        "tinsmith chat FOLDER",
    ):
        assert fact in card, fact


def test_the_front_matter_is_yaml():
    front = yaml.safe_load(model_card(FACTS).split("---")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tinsmith"],
        "license": "apache-2.0",
    }


def test_sections_without_facts_are_omitted():
    card = model_card({"name": "x", "parameters": 5})
    assert re.findall("^## (.*)", card, re.M) == ["How to load it"]
    assert "None" not in card
    assert "\n\n\n" not in card


def test_text_cannot_end_its_code_block():
    """No text of a sample or recipe appears outside of code blocks."""
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", model_card(FACTS))
    assert "upon" not in outside
    assert "escaped" not in outside
    assert "dim: 32" not in outside
    assert "## Weights" in outside


def test_the_reason_why_no_stock_class_fits_is_in_the_card():
    facts = FACTS | {"family": "tinsmith", "reason": "layer 1 has sinks"}
    card = model_card(facts)
    assert "`tinsmith`, Tinsmith's own, because layer 1 has sinks" in card
    assert "import tinsmith.hub.auto" in card
    assert "library_name: tinsmith" in card


@pytest.mark.parametrize("mixer", [{}, {"sinks": True}])
def test_the_snippets_of_a_card_run(tmp_path, model, tokenizer, mixer):
    export_folder(model(mixer, vocab_size=320), tokenizer, tmp_path / "x")
    card = (tmp_path / "x" / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, re.S)
    assert len(snippets) == 2
    for snippet in snippets:
        names: dict = {}
        exec(snippet.replace("FOLDER", str(tmp_path / "x")), names)  # our own card
        assert names["tokenizer"] is not None
        assert ("model" in names) != ("lm" in names)
