"""What each command prints, made by running it: the examples of docs/commands.md.

    python tests/support/commands_page.py                 # makes all examples anew; `make docs-commands` does so
    python tests/support/commands_page.py inspect find    # those of these commands

To show another command, add an `Example` to `EXAMPLES`. Each runs in a folder of its own, in which `CHECKPOINTS` lie.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from http_server import Served, counting_server
from places import DATA, REPOSITORY
from zero_folders import unpack_zero

PAGE = REPOSITORY / "docs" / "commands.md"
BEGIN, END = "<!-- commands: begin -->", "<!-- commands: end -->"
SERVER = "127.0.0.1:40000"
DEADLINE_S = 240
CHECKPOINTS = {
    "run-1": "a DeepSpeed folder, ZeRO stage 1 on 4 ranks",
    "run-3": "the same at stage 3",
    "dcp": "a DCP folder of FSDP2 on 2 ranks",
    "trainer/checkpoint-4": "a folder of transformers' Trainer",
    "ep1-ba4-rank{rank}.tar": "Composer's archives, one for each of 2 ranks",
    "ep2-ba8-rank0.pt": "Composer's file of a job without DeepSpeed",
}


@dataclass(frozen=True)
class Example:
    """One call of a command, as the page shows it."""

    line: str
    """What follows ``rankload``; ``{server}`` is a server that serves the folder."""
    about: str
    """One or two sentences above it."""
    prepare: Callable[[str], object] | None = None
    """Called before, in the folder, with the server's URL."""
    code: int = 0
    """The exit code that it ends with."""
    most_lines: int = 40
    """How many lines of its output are shown."""
    compared: bool = True
    """Whether the test runs it again: not where it takes long."""

    @property
    def command(self) -> str:
        return shlex.split(self.line)[0]


def lose_a_file(server: str) -> None:
    os.unlink("run-1/step3/bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt")


def flip_a_bit(server: str) -> None:
    path = "run-1/step3/bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"
    with open(path, "r+b") as file:
        file.seek(20_000)
        byte = file.read(1)[0]
        file.seek(20_000)
        file.write(bytes([byte ^ 8]))


def save_again_and_be_killed(server: str) -> None:
    shutil.copytree("trainer/checkpoint-4", "trainer/checkpoint-8")
    os.unlink("trainer/checkpoint-8/trainer_state.json")
    shutil.copytree("trainer/checkpoint-4", "trainer/checkpoint-12")
    os.truncate("trainer/checkpoint-12/model.safetensors", 1000)


def write_a_script(server: str) -> None:
    Path("train.py").write_text(
        "import os, time\n\nif os.environ['RANK'] == '1':\n    raise ValueError('the loss is nan')\ntime.sleep(60)\n"
    )


def load_into_cache(server: str) -> None:
    from rankload import read

    read(f"{server}/ep2-ba8-rank0.pt", options={"cache_dir": "cache", "cache_size": "1GB"})


EXAMPLES: tuple[Example, ...] = (
    Example(
        "inspect run-1 --depth 3",
        "A DeepSpeed folder. One model and one optimizer index are read, and the sizes of all files asked for.",
        most_lines=60,
    ),
    Example(
        "inspect {server}/run-3 --grep 'state/optimizers/*/blocks.0.*'",
        "The same of another one by HTTP, with some keys only. As a glob it matches what `ignore_keys` would.",
    ),
    Example(
        "inspect 'ep1-ba4-rank{rank}.tar' --rank 1 --files",
        "The files of one saved rank.",
    ),
    Example(
        "inspect run-1 --files",
        "A file is missing: it is marked, and the exit code is 1.",
        lose_a_file,
        code=1,
    ),
    Example("inspect run-2", "A path that is not there.", code=3),
    Example("inspect run-2 --json", "The same as JSON, on standard error.", code=3),
    Example("verify run-1", "Every byte that a checksum is known of is read and compared."),
    Example(
        "verify {server}/run-3 --subset 10% --seed 7",
        "A random tenth of one by HTTP. Without `--seed`, a seed is taken at random, and shown.",
    ),
    Example(
        "verify run-1",
        "One bit of a tensor is another: file, record, tensor and place are named, and the exit code is 1.",
        flip_a_bit,
        code=1,
    ),
    Example(
        "verify trainer/checkpoint-4 --write-manifest",
        "What has no checksum is not called whole. From now on `SHA256SUMS` has one of each file.",
    ),
    Example(
        "diff run-1 run-3 --grep 'state/model/blocks.0*'",
        "Two checkpoints of one model, of different kinds: stage 1 keeps fp32 masters beside its weights.",
        code=1,
    ),
    Example("diff dcp {server}/dcp", "A folder and its copy on a server."),
    Example(
        "find trainer",
        "A run of Trainer whose last two saves were killed.",
        save_again_and_be_killed,
    ),
    Example("find nothing", "Where a run would start cold, the exit code is 1.", code=1),
    Example(
        "plan run-1 --world-size 2 --nodes 2 --target stage2 --rank 1",
        "What a load of that folder by an engine on two nodes would do. Local files are read in place.",
        most_lines=44,
    ),
    Example(
        "plan {server}/dcp --world-size 4 --nodes 2",
        "A DCP folder by HTTP, into the kind of job that saved it.",
    ),
    Example(
        "fetch {server}/dcp --cache-dir cache", "Before a load: what it fetches is found by the first one."
    ),
    Example(
        "export run-1 weights --dtype fp32 --max-shard-size 20KB",
        "The weights of ZeRO stage 1 in fp32, as transformers reads them.",
    ),
    Example(
        "export {server}/ep2-ba8-rank0.pt memory://bucket/dcp --format dcp --all",
        "All of a file on a server as a DCP folder in another store.",
    ),
    Example("export run-1 dcp", "A folder that has something in it is left alone.", code=2),
    Example(
        "run --nproc-per-node 2 --max-restarts 1 train.py",
        "A job whose rank 1 fails each time that it is started. The report is the last part of the output.",
        write_a_script,
        code=1,
        compared=False,
    ),
    Example("cache list --cache-dir cache", "What a load left, which had a `cache_size`.", load_into_cache),
    Example(
        "cache prune --cache-dir cache --cache-size 10KB",
        "Down to a size, the least recently used checkpoint first.",
        load_into_cache,
    ),
    Example("cache clear --cache-dir cache --yes", "All that no running process uses.", load_into_cache),
    Example("demo", "Everything at work, on this machine's CPU.", most_lines=60, compared=False),
)


def lay_out(folder: Path) -> None:
    """Puts `CHECKPOINTS` into `folder`."""
    for stage in (1, 3):
        (folder / f"s{stage}").mkdir()
        unpack_zero(stage, folder / f"s{stage}").rename(folder / f"run-{stage}")
        shutil.rmtree(folder / f"s{stage}")
        for oracle in (folder / f"run-{stage}").glob("oracle*"):
            oracle.unlink()
    shutil.copytree(DATA / "dcp-fsdp2-w2" / "ckpt", folder / "dcp")
    shutil.copytree(DATA / "trainer-plain-w2" / "ckpt", folder / "trainer" / "checkpoint-4")
    for rank in range(2):
        archive = DATA / "composer-zero1-w2" / f"ep1-ba4-rank{rank}.pt.tar"
        shutil.copy(archive, folder / f"ep1-ba4-rank{rank}.tar")
    shutil.copy(DATA / "composer-monolithic-w2" / "ep2-ba8-rank0.pt", folder)


def run(example: Example) -> tuple[int, str]:
    """The exit code of `example`, and what it prints, without what differs from run to run."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="commands-") as made, contextlib.ExitStack() as leaving:
        folder = Path(made).resolve()
        lay_out(folder)
        served = {
            f"/{path.relative_to(folder)}": Served(path.read_bytes())
            for path in folder.rglob("*")
            if path.is_file()
        }
        server = leaving.enter_context(counting_server(served)).url("")
        os.chdir(folder)
        leaving.callback(os.chdir, before)
        if example.prepare is not None:
            example.prepare(server)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RANKLOAD_")}
        done = subprocess.run(
            [sys.executable, "-m", "rankload", *shlex.split(example.line.replace("{server}", server))],
            env={**environment, "COLUMNS": "120", "TMPDIR": made},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE_S,
        )
    text = done.stdout.replace(f"{folder}/", "").replace(str(folder), ".")
    for pattern, plain in (
        # As long as most ports are, so that columns stay under each other.
        (r"127\.0\.0\.1:\d+", SERVER),
        (rf"\b{re.escape(socket.gethostname())}\b", "node-a"),
        (re.escape(sys.executable), "python"),
        # torch's own log, whose files are none of ours.
        (r"[\w./-]*torch/[\w/]+/(\w+\.py:\d+)", r"\1"),
        (r"rankload-demo-\w{8}\b", "rankload-demo-0"),
        (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "2026-01-31T12:00:00Z"),
        (r"process \d+", "process 4711"),
    ):
        text = re.sub(pattern, plain, text)
    return done.returncode, text.rstrip()


def section(example: Example) -> str:
    """What the page has of `example`."""
    code, text = run(example)
    if code != example.code:
        raise SystemExit(f"rankload {example.line}: exit code {code}, expected {example.code}\n{text}")
    lines = text.splitlines()
    if len(lines) > example.most_lines:
        left = len(lines) - example.most_lines
        lines = [*lines[: example.most_lines], f"... ({left:,} more lines)"]
    shown = "\n".join(line.rstrip() for line in lines)
    end = f"\n(exit code {code})" if code else ""
    return f"{head(example)}\n{shown}{end}\n```\n"


def head(example: Example) -> str:
    """How the part of `example` begins on the page."""
    line = example.line.replace("{server}", f"http://{SERVER}")
    return f"{example.about}\n\n```console\n$ rankload {line}"


def page(shown: dict[str, str]) -> str:
    """All examples under their commands; `shown` has each one's part by `head`."""
    parts: list[str] = []
    last = ""
    for example in EXAMPLES:
        if example.command != last:
            parts.append(f"## {example.command}\n")
            last = example.command
        parts.append(shown[head(example)])
    return "\n".join(parts)


def on_page() -> dict[str, str]:
    """The part of each example that is on the page, by `head`."""
    text = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    found: dict[str, str] = {}
    for example in EXAMPLES:
        begin = head(example)
        at = text.find(begin + "\n")
        if at >= 0:
            found[begin] = text[at : text.index("\n```\n", at + len(begin)) + 5]
    return found


def write(commands: list[str]) -> None:
    """Makes the examples of `commands` anew, or all; and those that are not on the page yet."""
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE} has no place for the examples: {BEGIN} and {END}")
    shown = on_page()
    for example in EXAMPLES:
        if not commands or example.command in commands or head(example) not in shown:
            shown[head(example)] = section(example)
    PAGE.write_text(f"{before}{BEGIN}\n\n{page(shown)}\n{END}{after}")


if __name__ == "__main__":
    write(sys.argv[1:])
