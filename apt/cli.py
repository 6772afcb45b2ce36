"""The command line: ``python -m apt train``, ``eval``, ``report``, ... Errors of the user end in one line.

What a command needs is imported when it runs, so that ``doctor`` also works where torch does not.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from apt.deploy.formats import FORMATS
from apt.files.telling import printable, tell
from apt.process.stopping import AT_ONCE, Stopped, signals, stop_at_once

if TYPE_CHECKING:
    from apt.runs.config import RunConfig

# Flags in the words of the documents -> the setting.
FLAGS = {
    "model_type": "model.architectures",
    "dataset": "dataset",
    "sparsity_level": "pruning.target_sparsity",
    "ablation": "ablation",
}
USER_ERRORS = (ValueError, ImportError, OSError, FloatingPointError)


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments as any other error of the user, in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists what there is")


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 after an error of the user, or 128 and its number where a signal stopped it.

    That of ``doctor`` is 1 where no run can work.
    """
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        with signals(stop_at_once):
            return COMMANDS[arguments.command](arguments)
    except USER_ERRORS as error:
        if os.environ.get("APT_TRACEBACK") == "1":
            raise
        tell(f"error: {' '.join(str(error).split())}")
        return 2
    except Stopped as stopped:
        tell(str(stopped))
        return stopped.exit_code
    except KeyboardInterrupt:
        tell(AT_ONCE)
        return 130


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command and its arguments.

    Raises:
        ValueError: there is no such command, or it takes no such argument.
    """
    parser = make_parser()
    # argparse takes no more positionals after an option; what it leaves over are overrides, or unknown.
    arguments, rest = parser.parse_known_args(argv)
    takes_overrides = hasattr(arguments, "overrides")
    unknown = [text for text in rest if text.startswith("-") or not takes_overrides]
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")
    if takes_overrides:
        arguments.overrides += rest
    arguments.command_line = argv
    return arguments


def read_config(arguments: argparse.Namespace) -> "RunConfig":
    """The config that the arguments name: a file, or a preset by its model and data set, and what goes on top."""
    from apt.runs.config import load_config
    from apt.runs.config.presets import find_preset

    path = arguments.config
    overrides = list(arguments.overrides)
    flags = {name: value for name in FLAGS if (value := getattr(arguments, name, None)) is not None}
    no_file_is_named = path is not None and "=" in str(path) and not path.exists()
    if no_file_is_named:
        overrides.insert(0, str(path))
        path = None
    if path is None:
        if not {"model_type", "dataset"} <= set(flags):
            raise ValueError("config: give a config file, or --model_type and --dataset for one of the presets")
        path = find_preset(flags.pop("model_type"), flags.pop("dataset"))
    overrides += [f"{FLAGS[name]}={value}" for name, value in flags.items()]
    return load_config(path, overrides)


def _train(arguments: argparse.Namespace) -> int:
    config = read_config(arguments)
    if arguments.dry_run:
        from apt.runs.estimate.dry_run import dry_run

        print(printable(dry_run(config), keep="\n"))
        return 0
    from apt.export.model_card import command_of
    from apt.runs.run import train

    command = command_of(arguments.command_line)
    train(config, overwrite=arguments.overwrite, resume=arguments.resume, command=command)
    return 0


def read_compression(arguments: argparse.Namespace) -> "RunConfig":
    """The settings of a compression that the arguments name."""
    from apt.runs.compress import compress_config

    data, overrides = arguments.data, list(arguments.overrides)
    if data is not None and "=" in data:  # after a config file
        overrides.insert(0, data)
        data = None
    return compress_config(arguments.model, data, arguments.out, arguments.sparsity, overrides)


def _compress(arguments: argparse.Namespace) -> int:
    from apt.export.model_card import command_of
    from apt.runs.compress import compress_to

    command = command_of(arguments.command_line)
    compress_to(read_compression(arguments), arguments.out, overwrite=arguments.overwrite, command=command)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from apt.deploy.export import export_source

    source = str(arguments.source).rstrip("/")
    folder = arguments.out or Path(f"{Path(source).name}-{arguments.to}")
    told = {"quantise": arguments.quantise, "check": arguments.check, "overwrite": arguments.overwrite}
    export_source(source, arguments.to, folder, **told)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    config = read_config(arguments)
    from apt.runs.run import evaluate

    print(json.dumps(evaluate(arguments.folder, config)))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from apt.runs.report import report

    report(arguments.run)
    return 0


def _experiment(arguments: argparse.Namespace) -> int:
    from apt.runs.experiment import run_experiment

    return int(bool(run_experiment(arguments.grid)))


def _harness(arguments: argparse.Namespace) -> int:
    from apt.runs.evaluation.harness import HarnessConfig, harness

    names = tuple(arguments.tasks.split(","))
    settings = {name: getattr(arguments, name) for name in ("num_fewshot", "include", "limit", "batch_size")}
    harness(arguments.folder, HarnessConfig(tasks=names, **settings), arguments.out)
    return 0


def _config(arguments: argparse.Namespace) -> int:
    print(read_config(arguments).to_yaml(), end="")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from apt.doctor import diagnose, print_findings

    findings = diagnose()
    print_findings(findings)
    return int(any(finding.broken for finding in findings))


def _estimate(arguments: argparse.Namespace) -> int:
    config = read_config(arguments)
    from apt.runs.estimate.estimate import estimate

    print(printable(estimate(config), keep="\n"))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "compress": _compress,
    "export": _export,
    "eval": _eval,
    "report": _report,
    "experiment": _experiment,
    "harness": _harness,
    "config": _config,
    "doctor": _doctor,
    "estimate": _estimate,
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="apt", description="Fine-tune a language model and make it smaller while it trains.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    training = commands.add_parser("train", help="fine-tune, prune, export and measure")
    shrinking = commands.add_parser(
        "compress", help="prune and repair a model in minutes, without training, and export"
    )
    shrinking.add_argument("model", help="a model, as model.name takes it, or a config file that names model and data")
    shrinking.add_argument("data", nargs="?", help="its data, as data.datasets takes it")
    shrinking.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top, e.g. rounds=1")
    shrinking.add_argument("--sparsity", type=float, default=0.3, help="fraction of the block parameters that goes")
    shrinking.add_argument("--out", type=Path, required=True, help="folder of the export")
    shrinking.add_argument("--overwrite", action="store_true", help="replace a folder that is there")
    _add_export(commands)
    scoring = commands.add_parser("eval", help="scores of an export on the test split of a config; prints JSON")
    scoring.add_argument("folder", type=Path, help="an export, such as runs/demo/model")
    reporting = commands.add_parser("report", help="tables of a finished run, and a page with its pictures")
    reporting.add_argument("run", type=Path, help="folder of the run, or of several")
    trying = commands.add_parser("experiment", help="do all runs of a grid that are not finished; tables and pages")
    trying.add_argument("grid", type=Path, help="YAML file of the grid, such as examples/grid.yaml")
    asking = commands.add_parser("harness", help="scores of a decoder on benchmark tasks, by lm-evaluation-harness")
    asking.add_argument("folder", type=Path, help="an export, or a model folder of transformers, with its tokenizer")
    named = "of tasks, groups and tags of the library; or paper: ARC, HellaSwag, MMLU and TruthfulQA as in the paper"
    asking.add_argument("--tasks", required=True, metavar="NAME[,NAME]", help=named)
    asking.add_argument("--num_fewshot", type=int, metavar="N", help="solved examples in each prompt")
    asking.add_argument("--include", type=Path, metavar="FOLDER", help="task files (YAML) of your own")
    asking.add_argument("--limit", type=int, metavar="N", help="rows of each task, to try it out")
    asking.add_argument("--batch_size", type=int, default=8, metavar="N", help="sequences of one forward pass")
    asking.add_argument("--out", type=Path, metavar="FILE", help="JSON with all scores, members of groups too")
    showing = commands.add_parser("config", help="print the settings that a run would have")
    commands.add_parser("doctor", help="whether a run can work here: versions, devices, backends, clashes of names")
    guessing = commands.add_parser("estimate", help="peak memory and speed-up of a run, before it; no weights, no data")
    for command in (training, scoring, showing, guessing):
        command.add_argument("config", type=Path, nargs=None if command is scoring else "?", help="YAML file")
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="settings on top, e.g. target_sparsity=0.8"
        )
    for command in (training, showing, guessing):
        command.add_argument("--model_type", metavar="NAME", help="another model: roberta, t5, llama, or any name")
        both = "another data set, as dataset=NAME; with --model_type and without a file: a preset of configs/"
        command.add_argument("--dataset", metavar="NAME", help=both)
        command.add_argument("--sparsity_level", metavar="FRACTION", help="another target_sparsity")
        ablation = "leave out a part of the method: w/o_Ap, w/o_AT, w/o_Ds, ..."
        command.add_argument("--ablation", metavar="NAME", help=ablation)
    training.add_argument("--dry-run", action="store_true", help="check and print the plan; no weights, no data")
    training.add_argument("--overwrite", action="store_true", help="replace a finished run once this one has succeeded")
    training.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint, if any; a finished run stays"
    )
    return parser


def _add_export(commands: Any) -> None:
    writing = commands.add_parser("export", help="write a run, an export or a model for another program")
    writing.add_argument(
        "source", help="folder of a run, of an export or of a PEFT adapter, a model, a name on the hub"
    )
    known = ", ".join(FORMATS)
    writing.add_argument("--to", required=True, metavar="FORMAT", help=f"one of {known}")
    writing.add_argument("--out", type=Path, metavar="FOLDER", help="by default the name of the source and the format")
    writing.add_argument(
        "--quantise", "--quantize", metavar="TYPE", help="numbers of fewer bits, as the format has them"
    )
    writing.add_argument("--check", action="store_true", help="run it in its program and compare with torch")
    writing.add_argument("--overwrite", action="store_true", help="replace a folder that this has written")
