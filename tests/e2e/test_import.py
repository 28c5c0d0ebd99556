"""A mixer in the user's own file trains, resumes, decodes and is exported."""

import subprocess
import sys
import textwrap

import pytest

USER_MIXER = """
    from dataclasses import dataclass
    from typing import Literal

    from tinsmith.nn.mixers.gqa import GQA, GQAMixer


    @dataclass(frozen=True, kw_only=True)
    class Mine(GQA):
        kind: Literal["mine"] = "mine"
        strength: float = 0.5

        def build(self, build_ctx):
            return MineMixer(self, build_ctx)


    class MineMixer(GQAMixer):
        def __init__(self, config, build_ctx):
            super().__init__(config, build_ctx)
            self.strength = config.strength

        def forward(self, x, ctx, cache=None):
            out = super().forward(x, ctx, cache)
            return out._replace(y=self.strength * out.y)
"""
SIZES = [
    "model.dim=32",
    "model.depth=1",
    "model.pattern.0.feed_forward.hidden_dim=48",
    "model.pattern.0.mixer={kind: mine, heads: 2, strength: 0.25}",
    *("train.seq_len=32", "train.batch_size=2", "train.save_every=1", "train.sample_every=100"),
    *("train.eval_every=100", "data={kind: tasks, count: 200}", "eval.max_samples=2"),
]


@pytest.fixture
def mixer_file(shell):
    path = shell.folder / "mine.py"
    path.write_text(textwrap.dedent(USER_MIXER), encoding="utf-8")
    return path


def test_a_mixer_of_the_user_trains_resumes_and_generates(shell, root, mixer_file):
    recipe = root / "recipes" / "tiny" / "pretrain.yaml"
    train = ["train", recipe, *SIZES, "--name", "mine"]
    assert "'mine' is not one of" in shell(*train, "train.steps=1", code=2)
    shell(*train, "train.steps=1", "--import", mixer_file)
    shell(*train, "train.steps=2", "--import", mixer_file, "--resume")
    assert "kind: mine" in (shell.folder / "runs/mine/config.yaml").read_text()
    generate = ["generate", "runs/mine", "-p", "What", "--max-new-tokens", 2]
    assert "'mine' is not one of" in shell(*generate, code=2)
    shell(*generate, "--import", mixer_file)
    assert "import" not in (shell.folder / "runs/mine/config.yaml").read_text()


def test_a_recipe_names_files_relative_to_itself(shell, root, mixer_file):
    folder = shell.folder / "recipes"
    folder.mkdir()
    text = (root / "recipes" / "tiny" / "pretrain.yaml").read_text(encoding="utf-8")
    (folder / "mine.yaml").write_text(f"import: [../mine.py]\n{text}", encoding="utf-8")
    output = shell("config", "show", "recipes/mine.yaml", *SIZES)
    assert "model.pattern.0.mixer.strength" in output
    resolved = shell("config", "show", "recipes/mine.yaml", *SIZES, "--resolved")
    (shell.folder / "resolved.yaml").write_text(resolved, encoding="utf-8")
    assert shell("config", "check", "resolved.yaml") == "ok\n"
    (folder / "bad.yaml").write_text(f"import: ../mine.py\n{text}", encoding="utf-8")
    assert "import: must be a list" in shell("config", "check", "recipes/bad.yaml", code=2)
    (folder / "gone.yaml").write_text(f"import: [gone.py]\n{text}", encoding="utf-8")
    assert "no such Python file" in shell("config", "check", "recipes/gone.yaml", code=2)


def _contracts(root, file, test):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/contracts/test_mixers.py::{test}", "--contracts", str(file)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_the_contract_suite_accepts_a_sound_mixer_of_the_user(root, mixer_file):
    done = _contracts(root, mixer_file, "test_logits_do_not_depend_on_later_tokens")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_the_contract_suite_catches_a_mixer_of_the_user_that_looks_ahead(root, mixer_file):
    text = mixer_file.read_text(encoding="utf-8")
    mixer_file.write_text(
        text.replace("y=self.strength * out.y", "y=out.y + x.mean(1, keepdim=True)")
    )
    done = _contracts(root, mixer_file, "test_logits_do_not_depend_on_later_tokens")
    assert done.returncode == 1, done.stdout
    assert "mine-kv_heads=2" in done.stdout
