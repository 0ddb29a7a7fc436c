"""The `posttrain` command: finds the verb, runs it, and turns errors into one line and an exit code.

A verb's module is imported only when that verb runs or its own help is asked for, so `posttrain --help` loads no torch.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

import posttrain
from posttrain.cli.terminal import printable, tell_error
from posttrain.errors import EXIT_CRASH, EXIT_USAGE, PosttrainError
from posttrain.rollout.vllm.options import torchvision_misfit

EXIT_INTERRUPTED = 130

VERBS: dict[str, tuple[str, str, str]] = {
    "init": ("posttrain.cli.init", "init", "Ask five questions and write a project that runs."),
    "run": ("posttrain.cli.train", "run", "Run a pipeline: stages, evals, gates, registry."),
    "sft": ("posttrain.cli.train", "sft", "Run one stage of supervised fine-tuning."),
    "dpo": ("posttrain.cli.train", "dpo", "Run one stage of preference optimisation."),
    "reward_model": ("posttrain.cli.train", "reward_model", "Train a reward model on preferences."),
    "process_reward_model": (
        "posttrain.cli.train",
        "process_reward_model",
        "Train a process reward model on rated steps.",
    ),
    "grpo": ("posttrain.cli.train", "grpo", "Run one stage of RL with verifiable rewards."),
    "ppo": ("posttrain.cli.train", "ppo", "Run one stage of RL with a critic."),
    "online_dpo": ("posttrain.cli.train", "online_dpo", "Run one stage of DPO on the policy's own completions."),
    "distill": ("posttrain.cli.train", "distill", "Distil what teachers know into the model."),
    "ebft": ("posttrain.cli.train", "ebft", "Match answers in the features of the given model."),
    "plan": ("posttrain.cli.plan", "plan", "Say what a run needs in memory and time before it starts."),
    "import": ("posttrain.cli.import_", "import_", "Write another tool's configuration as a YAML of ours."),
    "data": (
        "posttrain.cli.data",
        "data",
        "Show the data as the model will see it; make rows of samples (synth), let a teacher write them (instruct), curate them.",
    ),
    "rewards": ("posttrain.cli.rewards", "rewards", "Check reward functions and certify them."),
    "eval": ("posttrain.cli.evaluate", "evaluate", "Score a model on eval suites."),
    "gate": ("posttrain.cli.gate", "app", "Judge a candidate's eval reports against a baseline's; decide; A/A check."),
    "notify": ("posttrain.cli.notify", "notify", "Send the notices of a run that its hooks have not taken."),
    "reproduce": (
        "posttrain.cli.reproduce",
        "reproduce",
        "Repeat a registered version: verdict, answers or training.",
    ),
    "runs": ("posttrain.cli.runs", "app", "Take weights and checkpoints out of run folders whose model is registered."),
    "registry": (
        "posttrain.cli.registry",
        "app",
        "List, show, verify, promote, roll back and remove registered models; their log.",
    ),
    "merge": ("posttrain.cli.merge", "merge", "Merge models by mergekit's YAML, or an adapter into its base."),
    "export": (
        "posttrain.cli.export",
        "export",
        "Write a model as GGUF, int8, fp8 or safetensors, proven to be the same.",
    ),
    "chat": ("posttrain.cli.chat", "chat", "Talk to a model."),
    "serve": ("posttrain.cli.serve", "serve", "Serve models to the openai client and curl; follow a registry's alias."),
    "tinker": (
        "posttrain.cli.tinker",
        "tinker",
        "Train for clients of Tinker's SDK: forward_backward, optim_step, sample.",
    ),
    "mirror": (
        "posttrain.cli.mirror",
        "send_to_trackers",
        "Send to its trackers what a run has recorded and they have not got.",
    ),
    "forecast": (
        "posttrain.cli.forecast",
        "forecast_run",
        "Say where a run's reward will end, and whether to go on.",
    ),
    "report": ("posttrain.cli.report", "report", "Write the HTML report of a run."),
    "diff": ("posttrain.cli.diff", "diff", "Compare two runs."),
    "mcp": (
        "posttrain.cli.mcp",
        "mcp",
        "Let an agent read runs, metrics, verdicts, registry, plans and keys (MCP, stdio).",
    ),
    "ui": ("posttrain.cli.ui", "ui", "Show runs, curves, gates and the registry in a browser, on this machine."),
    "explain": ("posttrain.cli.explain", "explain", "Say what a key means, its default and what other tools call it."),
    "doctor": ("posttrain.cli.doctor", "doctor", "Check this machine and its packages."),
}
"""Verb → module, attribute (a function or a typer app), one line for `--help`."""

_TRAIN = "to train: sft, dpo, reward_model, process_reward_model, grpo, ppo, online_dpo, distill or ebft for a single stage, run for a pipeline"
_MEASURE = "to score a model: eval; to judge one against another: gate"
_ASK = "to talk to a model: chat; for its answers to a whole suite: eval"
_CHECK = "for a YAML's data: data; for its rewards: rewards check; for this machine: doctor"
_VERSIONS = "it stands under registry: posttrain registry --help"
OTHER_WORDS: dict[str, str] = {
    "train": _TRAIN, "fit": _TRAIN, "finetune": _TRAIN, "fine-tune": _TRAIN, "tune": _TRAIN, "start": _TRAIN, "resume": f"{_TRAIN}; started again, it goes on",
    "pretrain": "training starts from a base model that is there", "kto": "KTO is a loss of dpo: loss_type: kto", "orpo": "ORPO is a loss of dpo: loss_type: orpo",
    "simpo": "SimPO is a loss of dpo: loss_type: simpo", "rl": "RL is grpo, or ppo where a critic is wanted", "rlhf": "RL is grpo, or ppo where a critic is wanted",
    "rloo": "RLOO is a loss of grpo: loss_type: rloo", "rlvr": "RL is grpo, whatever its loss_type",
    "evaluate": _MEASURE, "score": _MEASURE, "test": _MEASURE, "benchmark": _MEASURE, "judge": _MEASURE,
    "generate": _ASK, "infer": _ASK, "inference": _ASK, "predict": _ASK, "sample": _ASK, "ask": _ASK,
    "check": _CHECK, "validate": _CHECK, "lint": _CHECK, "preview": _CHECK, "preprocess": f"data is read where it is used; {_CHECK}",
    "list": _VERSIONS, "ls": _VERSIONS, "promote": _VERSIONS, "rollback": _VERSIONS, "verify": _VERSIONS, "register": _VERSIONS,
    "compare": "two runs: diff; two models: gate", "convert": "a model to another form: export; another tool's YAML: import", "quantize": "export --to gguf, int8 or fp8",
    "keys": "explain, without a key, lists them all", "config": "explain, without a key, lists the keys", "new": "a project that runs: init",
    "help": "posttrain --help, or posttrain VERB --help", "version": "posttrain --version",
}  # fmt: skip
"""What people type for a verb that is called otherwise → what to type."""

_ELSEWHERE = "let this user read and write it, or name another place"
_SPACE = "make room there, or name another place"
NO_PLACE: Mapping[int, str] = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR), _ELSEWHERE),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _SPACE),
}
"""What a place that cannot be used answers → what to do."""

# UsageError and ClickException, by way of a public name: typer carries its own copy of click from 0.26 on.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[1])
_ClickException = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])


def available_verbs() -> list[str]:
    """The verbs whose module is installed, in the order of the table."""
    return [verb for verb, (module, _, _) in VERBS.items() if importlib.util.find_spec(module) is not None]


def load_verb(verb: str) -> Any:
    """Import a verb and build its command; a kind of stage without a row is a verb too."""
    if verb in VERBS:
        module, attribute, help_text = VERBS[verb]
        target = getattr(importlib.import_module(module), attribute)
    else:
        from posttrain.cli.train import stage_verb

        target = stage_verb(verb)
        help_text = target.__doc__
    if isinstance(target, typer.Typer):
        command = typer.main.get_command(target)
    else:
        single = typer.Typer(add_completion=False)
        single.command(help=target.__doc__ or help_text)(target)
        command = typer.main.get_command(single)
    command.name = verb
    return command


def _is_a_kind(name: str) -> bool:
    from posttrain.config.kinds import STAGE_KINDS

    return name in STAGE_KINDS


class LazyGroup(TyperGroup):
    """Lists the verbs from the table; imports the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return available_verbs()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A verb by its line of help only; a kind of stage that has no row among the verbs as it is."""
        if cmd_name in available_verbs():
            return TyperCommand(name=cmd_name, help=VERBS[cmd_name][2])
        return load_verb(cmd_name) if _is_a_kind(cmd_name) else None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args and args[0] in OTHER_WORDS and args[0] not in VERBS:
            raise _UsageError(f"No such command '{args[0]}'; {OTHER_WORDS[args[0]]}.", ctx)
        self.commands = {verb: self.get_command(ctx, verb) for verb in available_verbs()}  # for "did you mean"
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_verb(name) if name is not None else command, rest


app = typer.Typer(
    name="posttrain",
    cls=LazyGroup,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"posttrain {posttrain.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """From an open-weight base model to an evaluated, gated, registered, servable one."""
    misfit = torchvision_misfit()
    if misfit:
        typer.echo(misfit, err=True)
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 64 for what the user must fix, 130 for Ctrl-C, 70 for a defect of ours.

    Other codes are the verb's own (`typer.Exit`). `POSTTRAIN_DEBUG=1` shows the traceback of a user's error too.
    """
    sys.exit(_run(list(sys.argv[1:] if argv is None else argv)))


def _run(argv: list[str]) -> int:
    for libraries in ("HF_HUB", "HF_DATASETS"):  # read when they are imported, which a verb does
        os.environ.setdefault(f"{libraries}_DISABLE_PROGRESS_BARS", "1")
    command = typer.main.get_command(app)
    try:
        result = command.main(args=argv, prog_name="posttrain", standalone_mode=False)
    except PosttrainError as error:
        tell_error(error)
        return EXIT_USAGE
    except OSError as error:
        line = no_place(error)
        if not line or os.environ.get("POSTTRAIN_DEBUG") == "1":
            traceback.print_exc()
        if not line:
            return EXIT_CRASH
        typer.echo(line, err=True)
        return EXIT_USAGE
    except _ClickException as error:
        error.show(file=sys.stderr)
        return EXIT_USAGE
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except Exception:  # noqa: BLE001 - the process boundary: a crash must not look like the gate's FAIL (1)
        traceback.print_exc()
        return EXIT_CRASH
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def no_place(error: OSError) -> str:
    """The line about a place that cannot be used, with what to do; nothing for another failure."""
    advice = NO_PLACE.get(error.errno or 0)
    return f"error: {printable(str(error.filename))}: {error.strerror}; {advice}" if advice and error.filename else ""


if __name__ == "__main__":
    main()
