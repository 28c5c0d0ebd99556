"""D2, D15: adapters on a base model without chat tokens learn to end turns and open with PEFT."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tinsmith
from tests.hf_folders import byte_level, sentencepiece, write_source
from tinsmith.config import from_dict
from tinsmith.core.errors import UserError
from tinsmith.hub.hf import export_folder
from tinsmith.hub.peft.adapters import merge_adapters, read_adapters
from tinsmith.text.chat import encode_chat, parse_conversation
from tinsmith.train.plan import resolve
from tinsmith.train.trainer import train
from tinsmith.verbs.export_import import export

CHAT = {
    "messages": [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "ran"},
    ]
}


def recipe(base, chats, **changes):
    chats.write_text("".join(json.dumps(CHAT) + "\n" for _ in range(40)))
    return {
        "init_from": str(base),
        "data": {"kind": "chats", "path": str(chats)},
        "objective": {"kind": "sft"},
        "lora": {"targets": "all", "rank": 4},
        "optim": {
            "matrices": {"kind": "adamw", "lr": 0.01},
            "others": {"kind": "adamw", "lr": 0.01},
        },
        "train": {
            **{"steps": 60, "seq_len": 64, "batch_size": 2, "precision": "fp32"},
            **{"save_every": 30, "eval_every": 60, "sample_every": 60},
        },
        "eval": {"max_samples": 2, "max_new_tokens": 4},
    } | changes


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def runs(request, tmp_path_factory):
    """A base model without chat tokens (qwen3: a tied head) and a LoRA run of it."""
    root = tmp_path_factory.mktemp("runs")
    base = write_source(root / "base", request.param, sentencepiece())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINSMITH_RUNS", str(root))
        run = train(from_dict(recipe(base, root / "chats.jsonl")), "lora")
    return base, run


def test_D2_the_rows_of_new_tokens_are_trained_and_turns_end(runs):
    base, run = runs
    size = tinsmith.load(base)[0].config.vocab_size
    lm, tokenizer = tinsmith.load(run)
    assert lm.config.vocab_size == tokenizer.vocab_size == size + 11
    rows = lm.head.weight
    unused = rows[tokenizer.special("<tool_call>")]
    assert not torch.equal(rows[tokenizer.end_of_turn], unused)
    assert torch.equal(lm.embed.weight[:size], tinsmith.load(base)[0].embed.weight)
    encoded = encode_chat(tokenizer, parse_conversation(CHAT))
    probabilities = lm(torch.tensor([encoded.ids])).logits.softmax(-1)
    end = encoded.ids.index(tokenizer.end_of_turn, encoded.mask.index(True))
    assert probabilities[0, end - 1, tokenizer.end_of_turn] > 0.5


def test_D2_a_checkpoint_and_the_adapter_make_the_same_model_as_final(runs, tmp_path):
    base, run = runs
    final = tinsmith.load(run)[0].state_dict()
    checkpoint = tinsmith.load(run / "checkpoints" / "step-00000060")[0].state_dict()
    lm = tinsmith.load(base)[0]
    merged = merge_adapters(lm, read_adapters(run / "final" / "adapter", lm.config)).state_dict()
    export(str(base), tmp_path / "out", "hf", run / "final" / "adapter")
    exported, tokenizer = tinsmith.load(tmp_path / "out")
    assert tokenizer is not None
    assert tokenizer.vocab_size == exported.config.vocab_size
    for state in (checkpoint, merged, exported.state_dict()):
        assert state.keys() == final.keys()
        assert all(torch.equal(state[name], final[name]) for name in final)


def test_D2_D15_peft_opens_the_adapter_on_its_base(runs):
    peft = pytest.importorskip("peft")
    _, run = runs
    folder = run / "final" / "adapter"
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(CHAT["messages"], return_dict=False, return_tensors="pt")
    lm, _ = tinsmith.load(run)
    torch.testing.assert_close(model(ids).logits, lm(ids).logits, rtol=1e-4, atol=1e-4)


def test_D15_the_base_of_an_adapter_is_a_folder_that_transformers_opens(tmp_path, monkeypatch):
    monkeypatch.setenv("TINSMITH_RUNS", str(tmp_path))
    base = write_source(tmp_path / "source", "llama", byte_level())
    lm, tokenizer = tinsmith.load(base)
    export_folder(lm, tokenizer, tmp_path / "pretrained" / "final")
    monkeypatch.chdir(tmp_path)
    steps = {"steps": 1, "seq_len": 64, "batch_size": 2, "precision": "fp32"}
    run = train(from_dict(recipe("pretrained", tmp_path / "chats.jsonl", train=steps)), "lora")
    stored = json.loads((run / "final" / "adapter" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(tmp_path / "pretrained" / "final")
    assert stored["trainable_token_indices"] is None
    AutoModelForCausalLM.from_pretrained(stored["base_model_name_or_path"])
    export("lora", tmp_path / "peft", "peft", None)
    again = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert again["base_model_name_or_path"] == stored["base_model_name_or_path"]


def test_D2_a_resumed_run_ends_in_the_same_bits(runs, monkeypatch):
    base, run = runs
    monkeypatch.setenv("TINSMITH_RUNS", str(run.parent))
    config = from_dict(recipe(base, run.parent / "chats.jsonl"))
    half = run / "checkpoints" / "step-00000030"
    resumed = train(config, "resumed", resume_from=half)
    last = "checkpoints/step-00000060/model.safetensors"
    one, two = (load_file(folder / last) for folder in (run, resumed))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_D2_new_token_ids_and_fsdp_are_refused_in_one_line(runs):
    base, run = runs
    config = recipe(base, run.parent / "chats.jsonl", parallel={"kind": "fsdp"})
    with pytest.raises(UserError, match=r"parallel\.kind=fsdp: does not support new token ids"):
        resolve(from_dict(config))
