"""``rankload run``: a job under its launcher, resumed, watched, and its first failure told."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from ...loader.options import FROM_ENVIRONMENT
from ..command_lines import Job, split_words
from ..running import GRACE_S
from ..running import run as run_job
from .calls import Call, sharing
from .endings import WrongArgumentsError


class RunCommand(TyperCommand):
    """Takes its own options out of a command line that has a launcher's and a script's too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        takes_value = dict.fromkeys(self.get_help_option_names(ctx), False)
        for one in self.params:
            if one.param_type_name == "option":
                takes_value |= {name: not getattr(one, "is_flag", False) for name in one.opts}
        words = split_words(args, takes_value)
        return super().parse_args(ctx, [*words.own, "--", *words.launcher, "--", *words.script])


@sharing("storage_option", "cache_dir", "cache_home", "cache_size", "stall_timeout", "verify", "mode")
def run(
    call: Call,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="SCRIPT [ARGUMENTS]",
            help="The script is the first word that ends in .py, or follows -m (a module) or --. Options before it "
            "that are not listed here are the launcher's; all after it is the script's.",
        ),
    ],
    launcher: Annotated[
        Literal["torchrun", "deepspeed", "slurm", "mpi"],
        typer.Option(help="What starts the ranks: torchrun, deepspeed, srun or mpirun."),
    ] = "torchrun",
    nproc_per_node: Annotated[
        str | None, typer.Option(metavar="N", help="Ranks on each node, in the launcher's own option.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|FOLDER",
            help="What the script's autoresume(None, state) takes: a run's folder or URI, or one checkpoint. What is "
            "remote is fetched on each node while Python and torch start.",
        ),
    ] = None,
    grace: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="How long the job may take to end after SIGINT or SIGTERM."),
    ] = GRACE_S,
    records: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Where ranks record how they end, visible to all nodes. Needed where one command starts the ranks "
            "of several nodes, to name the first that failed on another one.",
        ),
    ] = None,
) -> int:
    """Run a training job under its launcher, resume it, and say which rank failed first.

    SIGINT and SIGTERM end the job, SIGUSR1 and SIGUSR2 reach its ranks. The exit code is the launcher's. With --json
    the last line on standard output is the report.
    """
    separator = words.index("--")
    options, script = words[:separator], words[separator + 1 :]
    if not [word for word in script if word != "-m"]:
        raise WrongArgumentsError(
            "no script: it is the first word that ends in .py, or what follows -m, or else what follows --"
        )
    given = call.load_options
    variables = {
        f"RANKLOAD_{name.upper()}": str(value)
        for name in FROM_ENVIRONMENT
        if (value := getattr(given, name)) is not None
    }
    job = Job(
        launcher=launcher,
        script=script,
        options=options,
        nproc_per_node=nproc_per_node,
        resume=resume,
        variables=variables,
    )
    report = run_job(job, grace_s=grace, records=records, storage_options=given.storage_options)
    if call.json:
        call.show(report.as_fields(), [])
    else:
        print("".join(f"{line}\n" for line in report.lines()), end="", file=sys.stderr)
    return report.exit_code


run.__dict__["command_class"] = RunCommand
