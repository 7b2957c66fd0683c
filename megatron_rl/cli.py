"""The command line: `megatron-rl train|check|verify CONFIG [a.b=c ...]`, `megatron-rl eval MODEL [DATA] [a.b=c ...]`,
`megatron-rl report RUN [OTHER]`, `megatron-rl slurm CONFIG [a.b=c ...] --nodes N`,
`megatron-rl convert plan|import|export|verify|inspect|diff|reshard ...`, `megatron-rl bench [NAME ...]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rl import __version__
from megatron_rl.bench import command as bench
from megatron_rl.config.load import Loaded, load, of_trainer
from megatron_rl.config.rules import Config, ConfigError
from megatron_rl.config.schema import EvaluationConfig
from megatron_rl.convert.arguments import add_arguments as add_convert_arguments
from megatron_rl.launch import rank, slurm, torchrun
from megatron_rl.types import RunError

VERBS = {
    "train": "train, on this machine's processes or under torchrun",
    "eval": "answer held-out problems with a model, a run or a checkpoint, and say what the answers are worth",
    "check": "say what `train` would do, and what is wrong, without training",
    "verify": "show that this config's gradient is the same under every layout that fits this machine",
    "report": "say what is wrong with a run, with its curves, or hold two runs against each other",
    "slurm": "write the scripts of a job for a Slurm cluster, and submit them",
    "convert": "checkpoints from and to Hugging Face's format, or for another layout",
    "bench": "measure this machine's CPU, every case beside a baseline and a limit",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code. A mistake of the user's is one line and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["slurm"]:
        return to_slurm(arguments[1:])
    if arguments[:1] == ["bench"]:
        return to_bench(arguments[1:])
    parser = argparse.ArgumentParser(prog="megatron-rl", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(VERBS))
    for verb, help_text in VERBS.items():
        verb_parser = verbs.add_parser(verb, help=help_text)
        if verb == "report":
            add_report_arguments(verb_parser)
            continue
        if verb == "convert":
            add_convert_arguments(verb_parser)
            continue
        if verb == "eval":
            kinds = "a Hugging Face directory, a run directory, a checkpoint, or a YAML file"
            verb_parser.add_argument("config", metavar="MODEL", help=kinds)
            data_help = "problems: a .jsonl or .parquet file, or a reasoning-gym:task; without it the config's data.val"
            verb_parser.add_argument("data", metavar="DATA", nargs="?", help=data_help)
        else:
            verb_parser.add_argument("config", help="a YAML file that names its trainer")
        if verb == "check":
            add_check_arguments(verb_parser)
        verb_parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="options that overrule the file")
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no positional argument that comes after an option.
    if "overrides" not in options or any(word.startswith("-") for word in rest):
        parser.parse_args(arguments)
    else:
        options.overrides += rest
    if options.verb == "report":
        return report_on([options.run, *([options.other] if options.other else [])], options.out)
    if options.verb == "convert":
        return convert_with(options)
    try:
        loaded = read(options)
        if options.verb == "check":
            return check(loaded, options.gpus, options.memory)
        if options.verb != "verify":
            look(loaded)
    except (ValueError, RunError) as error:
        return mistake(error)
    count = torchrun.processes(loaded.config.parallel) if options.verb != "verify" else torchrun.ranks_of_machine()
    if (count > 1 or torchrun.is_one_of_many()) and not torchrun.under_torchrun():
        return torchrun.launch(count, arguments)
    rank.enter(stops_gracefully=options.verb in ("train", "eval"))
    try:
        return work(loaded.config, options.verb)
    except ConfigError as error:
        return mistake(error)
    except RunError as error:
        mistake(error)
        return 1
    except RuntimeError as error:
        if not rank.lost_a_peer(error):
            raise
        rank.leave()


def read(options: argparse.Namespace) -> Loaded:
    """The config that the arguments name; ValueError where they name none."""
    if options.verb != "eval":
        loaded = load(options.config, options.overrides)
        if options.verb != "check":
            of_trainer(loaded, options.config)
        return loaded
    # Imported late: it reads checkpoints, and with them torch.
    from megatron_rl.trainers.evaluation_config import evaluation_config

    data, overrides = options.data, list(options.overrides)
    if data is not None and "=" in data:
        data, overrides = None, [data, *overrides]
    return evaluation_config(options.config, data, overrides)


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Exits with 1 where the run does not fit the memory, with 2 on a mistake, with 0 otherwise."
    parser.add_argument("--gpus", type=int, metavar="N", help="plan the memory of a run on so many: docs/cluster.md")
    parser.add_argument("--memory", metavar="SIZE", help="of each of them, as 80GB or 80GiB (default: 80GB)")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes report.html and report.md. Exits with 1 where something severe was found, with 0 otherwise. "
        "Example: megatron-rl report runs/mine"
    )
    parser.add_argument("run", type=Path, help="a run directory, or one with TensorBoard event files, also verl's")
    parser.add_argument("other", type=Path, nargs="?", help="a run to hold it against")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write, instead of RUN")


def report_on(runs: Sequence[Path], out: Path | None) -> int:
    """Reads and judges runs; the exit code."""
    # Imported late: the other verbs draw nothing.
    from megatron_rl.report.command import report

    try:
        return report(runs, out)
    except ValueError as error:
        return mistake(error)


def to_slurm(arguments: Sequence[str]) -> int:
    """Writes and submits jobs; the exit code. Options and overrides may stand in any order."""
    try:
        slurm.slurm(slurm.parser().parse_intermixed_args(arguments))
    except ValueError as error:
        return mistake(error)
    return 0


def to_bench(arguments: Sequence[str]) -> int:
    """Measures; the exit code. Names and options may stand in any order."""
    try:
        return bench.bench(bench.parser().parse_intermixed_args(arguments))
    except ValueError as error:
        return mistake(error)


def convert_with(options: argparse.Namespace) -> int:
    """Runs a verb of `convert`; the exit code."""
    # Imported late: it reads tensors, and with them torch.
    from megatron_rl.convert.command import convert

    try:
        return convert(options)
    except (ValueError, RunError) as error:
        return mistake(error)
    except OSError as error:
        return mistake(OSError(f"the conversion stopped and goes on when it is started again: {error}"))


def mistake(error: Exception) -> int:
    """Says it in one line, once."""
    if torchrun.is_first():
        print(f"megatron-rl: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def look(loaded: Loaded) -> None:
    """Finds mistakes before any process is started, or any rank waits for another."""
    if torchrun.is_checked():
        return
    # Imported late: a mistake in the config itself is reported without waiting for torch.
    from megatron_rl.trainers.preflight import preflight

    warn(preflight(loaded.config).warnings)


def check(loaded: Loaded, gpus: int | None, memory: str | None) -> int:
    """Says what a run would be, and on `gpus` whether it fits their memory; the exit code."""
    if memory is not None and gpus is None:
        raise ConfigError("--memory plans nothing without --gpus: give the number of GPUs too")
    from megatron_rl.trainers.preflight import describe, preflight

    if gpus is None:
        findings = preflight(loaded.config)
        warn(findings.warnings)
        print(describe(loaded, findings))
        return 0
    from megatron_rl.trainers.sizing import on_gpus, size_up

    config = on_gpus(loaded, gpus)
    findings = preflight(config)
    warn(findings.warnings)
    text, fits = size_up(config, findings.step_lengths, gpus, memory or "80GB")
    print(describe(Loaded(config, loaded.origins), findings), text, sep="\n\n")
    return 0 if fits else 1


def warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"megatron-rl: warning: {warning}", file=sys.stderr)


def work(config: Config | EvaluationConfig, verb: str) -> int:
    """Does what the verb says, in this process and those beside it; the exit code."""
    if isinstance(config, EvaluationConfig):
        from megatron_rl.trainers.evaluation_run import evaluate

        evaluate(config)
    elif verb == "verify":
        from megatron_rl.trainers.verify import verify

        return verify(config)
    else:
        from megatron_rl.trainers.run import run

        run(config)
    return 0
