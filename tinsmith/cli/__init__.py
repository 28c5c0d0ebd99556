"""The command line. Heavy libraries are imported inside the commands that need them."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from tinsmith.cli.config import config_app
from tinsmith.cli.options import (
    AcceptChanges,
    Device,
    DryRun,
    Imports,
    Json,
    Limit,
    MaxNew,
    MinP,
    ModelPath,
    More,
    Overrides,
    Recipe,
    RepetitionPenalty,
    Resume,
    ResumeFrom,
    Scaling,
    Seed,
    Temperature,
    Thinking,
    Tools,
    TopK,
    TopP,
    WindowLength,
)
from tinsmith.core.log import escape_unencodable

app = typer.Typer(
    name="tinsmith",
    help="A workshop for small language models.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(config_app, name="config")


@app.command()
def quickstart(
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Smaller models; takes under two minutes.")
    ] = False,
    name: Annotated[str, typer.Option(help="Name of the runs.")] = "quickstart",
) -> None:
    """Train, fine-tune and align small models on this machine in minutes.

    Trains a tokenizer, pretrains and fine-tunes a chat model, and prints three answers. Then it
    fine-tunes a smaller model on sums with 60 % wrong labels, and improves it by DPO and by GRPO.

    \b
    tinsmith quickstart
    tinsmith quickstart --tiny
    """
    from tinsmith.verbs.quickstart import quickstart as run

    run(tiny, name)


@app.command()
def prepare(
    recipe: Recipe, overrides: Overrides = None, more: More = None, imports: Imports = None
) -> None:
    """Convert raw files to a tokenizer and token shards.

    Prints counts, rejected lines and bytes per token. The tokenizer is trained if there is none.

    \b
    tinsmith prepare recipes/tiny/pretrain.yaml
    tinsmith prepare my.yaml data.path=corpus/
    """
    from tinsmith.verbs.prepare import prepare as run

    run(recipe, overrides or [], more or [])


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the run: a folder under runs/.")] = None,
    resume: Resume = False,
    resume_from: ResumeFrom = None,
    accept_changes: AcceptChanges = False,
    dry_run: DryRun = False,
    more: More = None,
    imports: Imports = None,
) -> None:
    """Train a model as a recipe describes: pretrain, fine-tune, align or distil.

    \b
    tinsmith train recipes/tiny/pretrain.yaml --name first
    tinsmith train recipes/tiny/pretrain.yaml train.steps=500 --name first --resume
    """
    from tinsmith.verbs.train import train as run

    run(recipe, overrides or [], more or [], name, resume, resume_from, accept_changes, dry_run)


@app.command("eval")
def evaluate(
    model: ModelPath,
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated: bpb, routing, format, arc_agi, or question files (.jsonl)."
        ),
    ] = "bpb",
    data: Annotated[
        Path | None,
        typer.Option(help="Text for bits per byte, or tasks for arc_agi (default: the run's own)."),
    ] = None,
    solutions: Annotated[
        Path | None, typer.Option(help="File with the test outputs of --data, for arc_agi.")
    ] = None,
    seq_len: WindowLength = None,
    limit: Limit = None,
    device: Device = "auto",
    rope_scaling: Scaling = None,
    as_json: Json = False,
    imports: Imports = None,
) -> None:
    """Evaluate a model: bits per byte, multiple choice, expert specialisation, answer format,
    ARC-AGI puzzles.

    \b
    tinsmith eval runs/first
    tinsmith eval runs/first --tasks bpb,questions.jsonl --data book.txt --json
    """
    from tinsmith.verbs.evaluate import EvalOptions
    from tinsmith.verbs.evaluate import evaluate as run

    run(model, tasks, EvalOptions(data, seq_len, limit, solutions), device, rope_scaling, as_json)


@app.command()
def generate(
    model: ModelPath,
    prompt: Annotated[
        list[str] | None,
        typer.Option("-p", "--prompt", help="Prompt to continue (default: standard input)."),
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", help="Completions per prompt.")] = 1,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the prompt as a user message and print the answer.")
    ] = False,
    max_new_tokens: MaxNew = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 0.95,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop string; may be given several times.")
    ] = None,
    rope_scaling: Scaling = None,
    as_json: Json = False,
    imports: Imports = None,
) -> None:
    """Generate text from a prompt.

    \b
    tinsmith generate runs/first -p "def fibonacci(n):"
    echo "Once upon" | tinsmith generate runs/first -n 3 --temperature 0.7 --seed 1 --json
    """
    from tinsmith.verbs.generate import GenerateOptions, sampling_params
    from tinsmith.verbs.generate import generate as run

    params = sampling_params(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    options = GenerateOptions(count, chat, max_new_tokens, params, tuple(stop or ()))
    run(model, prompt or [], options, rope_scaling, as_json)


@app.command()
def chat(
    model: ModelPath,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    max_new_tokens: MaxNew = 400,
    seed: Seed = None,
    thinking: Thinking = False,
    tool: Tools = None,
    rope_scaling: Scaling = None,
    imports: Imports = None,
) -> None:
    """Chat with a model. /help lists the commands. Ctrl-C stops a reply; twice, it quits.

    \b
    tinsmith chat runs/quickstart --system "Be brief." --temperature 0 --tool calculator
    """
    from tinsmith.verbs.chat import Settings
    from tinsmith.verbs.chat import chat as run

    settings = Settings(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens,
        seed=seed,
        thinking=thinking,
    )
    run(model, system, settings, tool or [], rope_scaling)


@app.command()
def export(
    model: ModelPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    to: Annotated[
        str,
        typer.Option(help="hf: a Hugging Face folder. peft: only the adapters of a checkpoint."),
    ] = "hf",
    adapter: Annotated[
        Path | None, typer.Option(help="A PEFT adapter folder to merge into the model.")
    ] = None,
    imports: Imports = None,
) -> None:
    """Export a model as a Hugging Face folder, or its LoRA adapters in PEFT's format.

    \b
    tinsmith export runs/first out/
    tinsmith export runs/base out/ --adapter runs/tuned/final/adapter
    """
    from tinsmith.verbs.export_import import export as run

    run(model, out, to, adapter)


@app.command("import")
def import_(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A Hugging Face folder or Hub id.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    rope_scaling: Scaling = None,
) -> None:
    """Import a Hugging Face model.

    Every tensor is checked, and the model is written to a new folder.

    \b
    tinsmith import ~/models/my-llama runs/llama
    tinsmith import Qwen/Qwen3-0.6B qwen/
    """
    from tinsmith.verbs.export_import import import_ as run

    run(source, out, rope_scaling)


@app.command()
def transplant(
    model: ModelPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    keys: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Keys of the new feed-forward: experts=64, router_grad=smk, kind=topk_moe.",
        ),
    ] = None,
    init: Annotated[
        str,
        typer.Option(
            help="Initialisation of experts: random, or slice (parts of the dense layer)."
        ),
    ] = "random",
    train_norms: Annotated[
        bool, typer.Option("--train-norms", help="Train the norms too. By default they are frozen.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Random seed of the new weights.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count parameters from the config and write nothing.")
    ] = False,
) -> None:
    """Replace the feed-forwards of a dense model by experts.

    Embedding, attention and norms are kept and frozen. Train the result with objective kd.

    \b
    tinsmith transplant Qwen/Qwen3-0.6B runs/hyper-smoe router_grad=smk
    tinsmith transplant runs/first/final sparse/ experts=16 --init slice --dry-run
    """
    from tinsmith.verbs.transplant import check_init
    from tinsmith.verbs.transplant import transplant as run

    run(model, out, keys or [], check_init(init), train_norms, seed, dry_run)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Picture to write (default: into the run).")
    ] = None,
) -> None:
    """Draw the curves of a run, or of several in one picture.

    \b
    tinsmith plot runs/first
    tinsmith plot runs/first runs/second -o compare.png
    """
    from tinsmith.verbs.runs import plot as run

    run(runs, out)


@app.command("runs")
def list_runs(as_json: Json = False) -> None:
    """List the runs, newest first, with objective, step, best bits per byte, age and size.

    \b
    tinsmith runs
    """
    from tinsmith.verbs.runs import table as run

    run(as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Report versions, device, speed, disk and optional packages of this machine.

    \b
    tinsmith doctor
    """
    from tinsmith.verbs.doctor import doctor as run

    run(as_json)


@app.callback(invoke_without_command=True)
def version(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """A workshop for small language models."""
    if show_version:
        from tinsmith import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run a command. Exit codes: 0 success, 1 failure, 2 bad input, 75 stopped, resume later."""
    escape_unencodable()
    code = _run()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(code)  # torch's collectives may abort an interpreter that exits after FSDP
    sys.exit(code)


def _run() -> int:
    from tinsmith.core.errors import Failure, Stopped, UserError

    try:
        app()
        return 0
    except UserError as error:
        line, code = f"error: {error}", 2
    except Failure as error:
        line, code = f"failed: {error}", 1
    except Stopped as error:
        line, code = str(error), error.code
    except KeyboardInterrupt:
        line, code = "interrupted", 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 0
    print(" ".join(line.split("\n")), file=sys.stderr)
    return code
