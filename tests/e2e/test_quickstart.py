"""The quickstart of the README, and all commands on the runs that it leaves."""

import json
import re

import pytest
import torch

import tinsmith

RUNS = [f"quickstart{ending}" for ending in ("", "-chat", "-sums", "-dpo", "-grpo")]


def accuracies(output: str) -> dict[str, int]:
    """Return the number of right sums in 100 after each stage."""
    return {stage: int(right) for stage, right in re.findall(r"after (\S+) +(\d+)% right", output)}


def test_quickstart_leaves_all_runs_with_all_files(shell, quickstart):
    assert quickstart.count("\n> ") == 3, "three questions"
    assert "eta" in quickstart
    for run in RUNS:
        folder = shell.folder / "runs" / run
        for name in ("loss.png", "samples.md", "metrics.jsonl", "config.yaml", "env.json"):
            assert (folder / name).stat().st_size > 0, name
        for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md", "loss.png"):
            assert (folder / "final" / name).stat().st_size > 0, name


def test_quickstart_lowers_bits_per_byte(shell, quickstart):
    records = [
        json.loads(line)
        for line in (shell.folder / "runs/quickstart/metrics.jsonl").read_text().splitlines()
    ]
    bits = [record["bpb"] for record in records if record["kind"] == "eval"]
    assert bits[-1] < bits[0] < 4.5
    assert bits[-1] > 1.0


def test_quickstart_dpo_and_grpo_raise_the_accuracy_of_sums(quickstart):
    accuracy = accuracies(quickstart)
    assert list(accuracy) == ["fine-tuning", "DPO", "GRPO"]
    assert accuracy["DPO"] > accuracy["fine-tuning"]
    assert accuracy["GRPO"] >= accuracy["fine-tuning"] + 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_full_quickstart_raises_the_accuracy_of_sums(shell):
    accuracy = accuracies(shell("quickstart", "--name", "full", limit=3600))
    assert 20 <= accuracy["fine-tuning"] <= 60
    assert accuracy["DPO"] > accuracy["fine-tuning"]
    assert accuracy["GRPO"] >= accuracy["fine-tuning"] + 10


def test_final_folder_loads_in_transformers_with_the_same_logits(shell, quickstart):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shell.folder / "runs" / "quickstart-chat" / "final"
    hf_model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(hf_model).__name__ == "LlamaForCausalLM"
    lm, tokenizer = tinsmith.load(folder.parent)
    assert tokenizer is not None
    ids = torch.tensor([tokenizer.encode("def main():\n    return 1\n")])
    assert (
        AutoTokenizer.from_pretrained(folder)("def main():\n    return 1\n").input_ids
        == ids[0].tolist()
    )
    with torch.no_grad():
        assert torch.allclose(hf_model(ids).logits, lm(ids).logits, atol=1e-5)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_quickstart_again_takes_another_name(shell, quickstart):
    from tinsmith.verbs.quickstart import _unused_name

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINSMITH_RUNS", str(shell.folder / "runs"))
        assert _unused_name("quickstart") == "quickstart-2"


def test_generate_continues_and_is_repeatable(shell, quickstart):
    one = shell(
        "generate", "runs/quickstart", "-p", "def f(x):", "--seed", 1, "--max-new-tokens", 12
    )
    two = shell(
        "generate", "runs/quickstart", "-p", "def f(x):", "--seed", 1, "--max-new-tokens", 12
    )
    assert one == two
    assert one.startswith("def f(x):")


def test_a_prompt_that_is_too_long_is_not_printed_before_its_error(shell, quickstart):
    output = shell("generate", "runs/quickstart", "-p", "def f(x): " * 3000, code=2)
    assert "def f(x): def" not in output
    assert output.startswith("error: ")


def test_generate_json_counts_and_reads_standard_input(shell, quickstart):
    output = shell(
        "generate", "runs/quickstart", "-n", 2, "--max-new-tokens", 5, "--json", stdin="import os\n"
    )
    records = [json.loads(line) for line in output.splitlines()]
    assert len(records) == 2
    assert all(
        record["prompt"] == "import os\n" and record["completion_tokens"] <= 5 for record in records
    )


def test_T5_completions_of_one_seed_differ_and_repeat(shell, quickstart):
    words = ("generate", "runs/quickstart", "-p", "def f(", "-p", "def f(", "-n", 2, "--seed", 1)
    words += ("--max-new-tokens", 12, "--temperature", 1.5, "--json")
    texts = [json.loads(line)["text"] for line in shell(*words).splitlines()]
    assert len(set(texts)) == 4
    assert [json.loads(line)["text"] for line in shell(*words).splitlines()] == texts


def test_chat_replies_and_runs_its_commands(shell, quickstart):
    inputs = [
        "/set max_new_tokens=5",
        "Hello",
        "/retry",
        "/undo",
        "/undo",
        "/save talk.jsonl",
        "/reset",
    ]
    stdin = "\n".join([*inputs, "/nonsense", "/set x=1", "/help", "/quit", ""])
    output = shell("chat", "runs/quickstart-chat", "--temperature", 0, stdin=stdin)
    assert " max_new_tokens is 5" in output
    assert " the last message is removed" in output
    assert " nothing to undo" in output
    assert "/nonsense is unknown" in output
    assert "with KEY one of" in output
    assert (shell.folder / "talk.jsonl").exists()


def test_eval_gives_bits_per_byte_and_multiple_choice_accuracy(shell, quickstart):
    (shell.folder / "text.txt").write_text("def f():\n    return 1\n" * 20, encoding="utf-8")
    questions = [{"question": "1+1=", "choices": ["2", "3"], "answer": 0}] * 3
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (shell.folder / "quiz.jsonl").write_text(lines, encoding="utf-8")
    output = shell("eval", "runs/quickstart", "--json")
    results = json.loads(output[output.index("{") : output.rindex("}") + 1])
    assert 0 < results["bpb all"]["bpb"] < 5
    output = shell("eval", "runs/quickstart", "--data", "text.txt", "--tasks", "bpb,quiz.jsonl")
    assert "bpb" in output
    assert "acc" in output
    assert "a name is missing" in shell("eval", "runs/quickstart", "--tasks", "bpb,", code=2)
    command = ("eval", "runs/quickstart", "--data", "text.txt", "--json")
    as_trained = shell(*command)
    assert shell(*command, "--seq-len", 128) == as_trained
    assert shell(*command, "--seq-len", 16) != as_trained


def test_export_then_import_gives_the_same_weights(shell, quickstart):
    shell("export", "runs/quickstart/checkpoints/" + newest(shell), "exported")
    shell("import", "exported", "imported")
    assert (shell.folder / "imported" / "config.json").exists()
    one, two = (
        (shell.folder / name / "model.safetensors").read_bytes()
        for name in ("exported", "imported")
    )
    assert one == two
    output = shell("export", "runs/quickstart", "exported", code=2)
    assert "exists" in output


def newest(shell) -> str:
    folder = shell.folder / "runs" / "quickstart" / "checkpoints"
    return (folder / "LATEST").read_text().strip()


def test_runs_plot_doctor_and_config_commands(shell, quickstart):
    table = json.loads(shell("runs", "--json"))
    assert {run["name"] for run in table} >= set(RUNS)
    assert "quickstart-chat" in shell("runs")
    shell("plot", "runs/quickstart", "runs/quickstart-chat", "-o", "both.png")
    assert (shell.folder / "both.png").read_bytes()[:4] == b"\x89PNG"
    facts = json.loads(shell("doctor", "--json"))
    assert facts["torch"] == torch.__version__
    shown = shell("config", "show", "runs/quickstart/config.yaml", "train.seed=5")
    assert "train.seed: 5" in shown
    assert "command line" in shown
    assert shell("config", "check", "runs/quickstart/config.yaml") == "ok\n"
    assert "RunConfig" in shell("config", "schema")
    differences = shell(
        "config", "diff", "runs/quickstart/config.yaml", "runs/quickstart-chat/config.yaml"
    )
    assert "objective.kind: 'pretrain' -> 'sft'" in differences
    assert "train.steps: 60 -> 30" in differences


def test_resume_of_a_finished_run_changes_nothing(shell, quickstart):
    run = shell.folder / "runs" / "quickstart"
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}
    output = shell("train", "runs/quickstart/config.yaml", "--name", "quickstart", "--resume")
    assert "nothing to do" in output
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}


def test_resume_of_a_finished_run_does_not_need_init_from(shell, quickstart):
    base, moved = shell.folder / "runs" / "quickstart", shell.folder / "runs" / "moved"
    base.rename(moved)
    try:
        recipe = "runs/quickstart-chat/config.yaml"
        output = shell("train", recipe, "--name", "quickstart-chat", "--resume")
    finally:
        moved.rename(base)
    assert "nothing to do" in output


def test_resume_without_a_checkpoint_starts_and_T5_an_edited_one_is_refused(shell, quickstart):
    output = shell(
        *("train", "runs/quickstart/config.yaml", "train.steps=2", "train.save_every=1"),
        *("log.every=1", "train.keep.last=3", "--name", "fresh", "--resume"),
    )
    assert "no checkpoint yet: starting from the beginning" in output
    again = shell(
        *("train", "runs/quickstart/config.yaml", "train.steps=3", "train.save_every=1"),
        *(
            "log.every=1",
            "--name",
            "fresh",
            "--resume-from",
            "runs/fresh/checkpoints/step-00000001",
        ),
    )
    assert "from runs/fresh/checkpoints/step-00000001 at step 1" in again
    state = next(shell.folder.glob("runs/fresh/checkpoints/step-*/state.json"))
    text = state.read_text()
    state.write_text(re.sub(r'("tokens": ?)\d', r"\g<1>9", text))
    assert state.read_text() != text
    edited = ("--name", "edited", "--resume-from", state.parent)
    output = shell("train", "runs/quickstart/config.yaml", *edited, code=2)
    assert "state.json" in output, "T5: an edited checkpoint is refused when it is named, too"
    lines = (shell.folder / "runs/fresh/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"train"' in line]
    assert steps == [1, 2, 3], "cut back to the checkpoint, then written again"
