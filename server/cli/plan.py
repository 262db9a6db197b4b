"""`jax-engine plan`: what a model needs and can do on devices that need not be here."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_engine.sampling_params import integer
from jax_engine.server.cli.bench import names
from jax_engine.server.cli.flags import Flag, Options, count, engine_config, engine_groups
from jax_engine.server.cli.parser import Command
from jax_engine.server.logs import set_up_logging

if TYPE_CHECKING:
    from jax_engine.plan.chips import Target
    from jax_engine.plan.compare import Impossible
    from jax_engine.plan.figures import Plan, Question

EPILOG = """\
examples:
  jax-engine plan llama-3-70b --device v6e-8
  jax-engine plan ./my-model --device v5e-4 --max-model-len 8K --max-num-seqs 64
  jax-engine plan llama-3-70b --device v6e-8 --compare --plot strategies.html
  jax-engine plan llama-3-8b --devices v5e-4,v6e-4,h200-1 --json

MODEL is a folder with a config.json, a Hugging Face name, or a built-in configuration: llama-3-8b, llama-3-70b,
llama-3.2-1b, qwen3-0.6b, qwen3-32b, qwen3-235b-a22b. Nothing else of the model is read, and no accelerator is needed:
the real compilers make the step programs, for TPUs (pip install "jax-engine[tpu]") and for GPUs ("jax-engine[cuda]";
without it, figures are by arithmetic, and say so).

--max-num-seqs sequences of --max-model-len tokens must fit at once; left out, one sequence of the model's own length.
Exit code: 0 it fits (of several plans, one does), 1 it does not, 2 for a mistake.
"""
MODEL = Flag("model", "a folder with a config.json, a Hugging Face name, or a built-in configuration", metavar="MODEL")
PLAN_FLAGS = (
    Flag("device", "what to plan for: v6e-8, v5e-4, v5p-8, tpu7x-8, h200-1, ...", metavar="NAME"),
    Flag("devices", "several, to compare, with commas between", type=names, metavar="NAMES"),
    Flag("strategy", "how devices share the model, or several to compare, with commas", type=names, metavar="NAMES"),
    Flag("compare", "every sharding strategy side by side, your own --sharding-rules too", type=bool),
    Flag("all_meshes", "in a comparison, every division of the devices between the axes of a strategy", type=bool),
    Flag("input_len", "tokens of a prompt, for the bounds", type=count, metavar="TOKENS", default=1024),
    Flag("output_len", "tokens of an answer, for the bounds", type=count, metavar="TOKENS", default=128),
    Flag("json", "as JSON, for programs; bytes and seconds", type=bool),
    Flag("plot", "draw the comparison: a .html, .svg or .png file", metavar="FILE", type=Path),
)


def plan_command() -> Command:
    """The command."""
    return Command(
        "plan",
        "Say whether a model fits on devices that need not be here, and how fast it can be there.",
        run_plan,
        usage="MODEL --device NAME [options]",
        argument=MODEL,
        groups={"plan": PLAN_FLAGS, **engine_groups()},
        epilog=EPILOG,
    )


def run_plan(options: Options) -> int:
    config, named = engine_config(options), options["devices"] or ()
    if bool(named) == (options["device"] is not None):
        raise ValueError("give the devices to plan for: --device v6e-8, or --devices v5e-4,v6e-8 to compare several")
    lengths = {"input_len": options["input_len"] or 1024, "output_len": options["output_len"] or 128}
    for name, value in lengths.items():
        integer(name, value, low=1, high=2**30, remedy="it is a number of tokens")
    set_up_logging("warning")
    from jax_engine.compilation.memory_check import host_memory_bytes
    from jax_engine.plan.chips import parse_target
    from jax_engine.plan.drawing import check_plot
    from jax_engine.plan.models import model_folder

    targets = [parse_target(name, host_bytes=host_memory_bytes()) for name in named or [options["device"]]]
    if options["plot"] is not None:
        check_plot(options["plot"])
    from jax_engine.plan.targets import prepare

    prepare(targets)
    from jax_engine.plan.figures import Question

    with model_folder(config.model, revision=config.revision) as folder:
        question = Question(
            replace(config, model=str(folder)),
            config.model or "demo",
            targets[0],
            max_num_seqs=options["max_num_seqs"],
            **lengths,
        )
        return answer(question, targets, options)


def answer(question: "Question", targets: "list[Target]", options: Options) -> int:
    """Make the plans, print them; the exit code."""
    from jax_engine.plan.compare import candidates_of, compare
    from jax_engine.plan.figures import Plan

    strategies = options["strategy"]
    if strategies is None and not options["compare"] and question.config.sharding_rules is None:
        strategies = (question.config.sharding_strategy,)
    elif strategies is None and not options["compare"]:
        strategies = ()  # the user's rules alone
    candidates = candidates_of(
        question.config,
        targets,
        strategies=strategies,
        spread=options["tensor_parallel_size"] is None,
        all_meshes=bool(options["all_meshes"]),
    )
    rows = []
    for candidate, row in zip(candidates, compare(question, candidates), strict=True):
        rows.append(row)
        if len(candidates) > 1:  # each takes a while
            print(f"{candidate.strategy} on {candidate.target.name}: {len(rows)} of {len(candidates)}", file=sys.stderr)
    show(rows, options, title=question.model_name)
    return 0 if any(isinstance(row, Plan) and row.fits for row in rows) else 1


def show(rows: "list[Plan | Impossible]", options: Options, *, title: str) -> None:
    """Print plans, and draw them if asked for; one that is impossible, alone, is a mistake."""
    from jax_engine.plan.compare import Impossible
    from jax_engine.plan.figures import Plan, as_json
    from jax_engine.plan.plot import comparison_drawing
    from jax_engine.plan.report import comparison_text, plan_text

    alone = rows[0] if len(rows) == 1 and not options["compare"] else None
    if isinstance(alone, Impossible) and not alone.by_compiler:
        raise ValueError(alone.reason)
    table = comparison_text(rows)
    if options["json"]:
        found: list[dict[str, Any]] = [as_json(row) if isinstance(row, Plan) else row.__dict__ for row in rows]
        print(json.dumps(found[0] if alone else found, indent=2))
    else:
        print(plan_text(alone) if isinstance(alone, Plan) else table)
    if options["plot"] is not None:
        comparison_drawing(rows, title).write(options["plot"], title=title, table=table)
