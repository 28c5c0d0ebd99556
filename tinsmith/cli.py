"""The verbs of the command line. Nothing heavy is imported before a verb needs it."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="tinsmith",
    help="A workshop for small language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(
    no_args_is_help=True, help="Look at recipes: show, check, schema, diff.", rich_markup_mode=None
)
app.add_typer(config_app, name="config")

ModelPath = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A run, a checkpoint, a Hugging Face folder or Hub id."),
]
Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override keys: train.steps=100."),
]
More = Annotated[
    list[Path] | None,
    typer.Option("-c", "--config", help="Another YAML file on top of the recipe."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
Scaling = Annotated[
    str | None, typer.Option("--rope-scaling", help="YAML, e.g. '{kind: yarn, factor: 4, ...}'.")
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens only.")]
TopP = Annotated[
    float | None, typer.Option(help="Sample from the likeliest tokens of this total probability.")
]
MinP = Annotated[
    float | None, typer.Option(help="Leave out tokens below this share of the likeliest one.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1: tokens that were there already become less likely.")
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
MaxNew = Annotated[int, typer.Option(help="Tokens to make, at most.")]


@app.command()
def quickstart(
    tiny: Annotated[
        bool, typer.Option("--tiny", help="The same story in under two minutes.")
    ] = False,
    name: Annotated[str, typer.Option(help="The run's name.")] = "quickstart",
) -> None:
    """The whole story on this machine, in minutes.

    A tokenizer, pretraining, fine-tuning, three answers; then sums that a smaller model learns
    from a careless teacher, and better from preferences and from rewards.

    \b
    tinsmith quickstart
    tinsmith quickstart --tiny
    """
    from tinsmith.verbs.quickstart import quickstart as run

    run(tiny, name)


@app.command()
def prepare(recipe: Recipe, overrides: Overrides = None, more: More = None) -> None:
    """Turn raw files into tokenizer and shards.

    Prints counts, rejected lines and bytes per token; the tokenizer is trained if there is none.

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
    name: Annotated[str | None, typer.Option(help="The run's name: a folder under runs/.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest valid checkpoint of --name.")
    ] = False,
    resume_from: Annotated[Path | None, typer.Option(help="Go on from this checkpoint.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, take one tiny step, write nothing.")
    ] = False,
    more: More = None,
) -> None:
    """Train what a recipe says.

    The recipe's objective says what for: to continue texts, or to answer.

    \b
    tinsmith train recipes/tiny/pretrain.yaml --name first
    tinsmith train recipes/tiny/pretrain.yaml train.steps=500 --name first --resume
    """
    from tinsmith.verbs.train import train as run

    run(recipe, overrides or [], more or [], name, resume, resume_from, dry_run)


@app.command("eval")
def evaluate(
    model: ModelPath,
    tasks: Annotated[
        str,
        typer.Option(help="Comma-separated: bpb, routing, format, arc_agi, question files."),
    ] = "bpb",
    data: Annotated[
        Path | None,
        typer.Option(help="Text for bits per byte, or tasks for arc_agi (default: the run's own)."),
    ] = None,
    solutions: Annotated[
        Path | None, typer.Option(help="Outputs of the tests of --data, for arc_agi.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of a window of --data (default: what the run trained on)."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many rows, questions, puzzles per task.")
    ] = None,
    device: Device = "auto",
    rope_scaling: Scaling = None,
    as_json: Json = False,
) -> None:
    """Measure a model: bits per byte, multiple choice, how its experts specialise, the format of
    its answers, puzzles of ARC-AGI.

    \b
    tinsmith eval runs/first
    tinsmith eval runs/first --tasks bpb,questions.jsonl --data book.txt --json
    """
    from tinsmith.verbs.evaluate import EvalOptions
    from tinsmith.verbs.evaluate import evaluate as run

    run(model, tasks, EvalOptions(data, context, limit, solutions), device, rope_scaling, as_json)


@app.command()
def generate(
    model: ModelPath,
    prompt: Annotated[
        list[str] | None,
        typer.Option("-p", "--prompt", help="What to continue; else standard input."),
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", help="Continuations per prompt.")] = 1,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message; print the answer.")
    ] = False,
    max_new: MaxNew = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = 0.95,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text; may be given several times.")
    ] = None,
    rope_scaling: Scaling = None,
    as_json: Json = False,
) -> None:
    """Continue a text.

    \b
    tinsmith generate runs/first -p "def fibonacci(n):"
    echo "Once upon" | tinsmith generate runs/first -n 3 --temperature 0.7 --seed 1 --json
    """
    from tinsmith.verbs.generate import Request, sampling
    from tinsmith.verbs.generate import generate as run

    chosen = sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    request = Request(count, chat, max_new, chosen, tuple(stop or ()))
    run(model, prompt or [], request, rope_scaling, as_json)


@app.command()
def chat(
    model: ModelPath,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    max_new: MaxNew = 400,
    seed: Seed = None,
    thinking: Annotated[
        bool, typer.Option("--thinking", help="Let every answer begin with <think>.")
    ] = False,
    rope_scaling: Scaling = None,
) -> None:
    """Talk to a model. /help lists what can be said beside text; Ctrl-C stops an answer, twice
    quits.

    \b
    tinsmith chat runs/quickstart
    tinsmith chat runs/quickstart --system "Answer in one line." --temperature 0
    """
    from tinsmith.verbs.chat import Settings
    from tinsmith.verbs.chat import chat as run

    settings = Settings(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_new=max_new,
        seed=seed,
        thinking=thinking,
    )
    run(model, system, settings, rope_scaling)


@app.command()
def export(
    model: ModelPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    to: Annotated[
        str, typer.Option(help="hf: a Hugging Face folder; peft: a checkpoint's adapters alone.")
    ] = "hf",
    adapter: Annotated[
        Path | None, typer.Option(help="A folder of adapters (PEFT's) to merge into the model.")
    ] = None,
) -> None:
    """Write a model as a folder that others open.

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
    """Take in a Hugging Face model.

    It is checked tensor by tensor and written as a folder of this project's own making.

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
            help="Of the new feed-forward: experts=64, router_grad=smk, kind=topk_moe.",
        ),
    ] = None,
    init: Annotated[
        str, typer.Option(help="How experts begin: random, or slice (parts of the dense layer).")
    ] = "random",
    train_norms: Annotated[
        bool, typer.Option("--train-norms", help="Train the norms too; else they are frozen.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count parameters from the config alone.")
    ] = False,
) -> None:
    """Put experts in the place of a dense model's feed-forwards.

    All else is kept and frozen: embedding, attention, norms. Train it with objective kd.

    \b
    tinsmith transplant Qwen/Qwen3-0.6B runs/hyper-smoe router_grad=smk
    tinsmith transplant runs/first/final sparse/ experts=16 --init slice --dry-run
    """
    from tinsmith.verbs.transplant import check_init
    from tinsmith.verbs.transplant import transplant as run

    run(model, out, keys or [], check_init(init), train_norms, seed, dry_run)


@config_app.command()
def show(recipe: Recipe, overrides: Overrides = None, more: More = None) -> None:
    """Print the whole resolved recipe; what is not a default says where it comes from.

    \b
    tinsmith config show recipes/tiny/pretrain.yaml
    tinsmith config show recipes/tiny/pretrain.yaml train.steps=10
    """
    from tinsmith.verbs.config import show as run

    run(recipe, overrides or [], more or [])


@config_app.command()
def check(recipe: Recipe, overrides: Overrides = None, more: More = None) -> None:
    """Validate a recipe and say nothing but `ok`.

    \b
    tinsmith config check my.yaml
    tinsmith config check my.yaml optim.max_grad_norm=0.5
    """
    from tinsmith.verbs.config import check as run

    run(recipe, overrides or [], more or [])


@config_app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, with every key there is.

    \b
    tinsmith config schema > recipe.schema.json
    tinsmith config schema | less
    """
    from tinsmith.verbs.config import schema as run

    run()


@config_app.command()
def diff(left: Recipe, right: Recipe) -> None:
    """Print the keys in which two recipes differ, defaults included.

    \b
    tinsmith config diff a.yaml b.yaml
    tinsmith config diff runs/a/config.yaml runs/b/config.yaml
    """
    from tinsmith.verbs.config import diff as run

    run(left, right)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The picture to write (default: in the run).")
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
    """List the runs, the newest first.

    Name, objective, step, best bits per byte, age, size.

    \b
    tinsmith runs
    tinsmith runs --json
    """
    from tinsmith.verbs.runs import table as run

    run(as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look at this machine.

    Versions, device, speed, disk, optional parts.

    \b
    tinsmith doctor
    tinsmith doctor --json
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
    """Run a verb. Exit codes: 0 done, 1 failure, 2 bad input, 75 stopped and to be resumed."""
    code = _run()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(code)  # torch's collectives may abort an interpreter that ends with FSDP about
    sys.exit(code)


def _run() -> int:
    from tinsmith.core.errors import Failure, Stopped, UserError

    try:
        app()
    except UserError as error:
        return _say(f"error: {error}", 2)
    except Failure as error:
        return _say(f"failed: {error}", 1)
    except Stopped as error:
        return _say(str(error), error.code)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    return 0


def _say(line: str, code: int) -> int:
    print(" ".join(line.split("\n")), file=sys.stderr)
    return code
