"""The commonest mistakes, each made for real, and what `load` says to them: a section of docs/errors.md.

    python tests/support/mistakes.py    # writes the section; `make docs-errors` does so

Each function below makes one mistake in an empty current folder. Its docstring is the page's heading; what to do
follows after an empty line.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from http_server import Served, counting_server
from places import DATA, REPOSITORY
from processes import run_ranks
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from zero_folders import unpack_zero

from rankload import LoadOptions, RankloadError, State, load, restore_rng

PAGE = REPOSITORY / "docs" / "errors.md"
BEGIN, END = "<!-- mistakes: begin -->", "<!-- mistakes: end -->"


@dataclass(frozen=True)
class Mistake:
    """One mistake: `run` makes it in the current folder, in as many processes as `ranks`, and raises the error."""

    run: Callable[[], object]
    ranks: int = 1

    @property
    def heading(self) -> str:
        return inspect.cleandoc(self.run.__doc__ or "").partition("\n\n")[0]

    @property
    def remedy(self) -> str:
        return inspect.cleandoc(self.run.__doc__ or "").partition("\n\n")[2]


MISTAKES: list[Mistake] = []


def mistake(run: Callable[[], object]) -> Callable[[], object]:
    MISTAKES.append(Mistake(run))
    return run


def on_ranks(ranks: int) -> Callable[[Callable[[], object]], Callable[[], object]]:
    def register(run: Callable[[], object]) -> Callable[[], object]:
        MISTAKES.append(Mistake(run, ranks))
        return run

    return register


class Net(nn.Module):
    """The model of most mistakes."""

    def __init__(self, inside: int = 4, classes: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3, inside)
        self.head = nn.Linear(inside, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def trained(optimizer: type[torch.optim.Optimizer] = AdamW) -> tuple[Net, torch.optim.Optimizer]:
    model = Net()
    made = optimizer(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    made.step()
    return model, made


def save(path: str = "last.pt", **changes: Any) -> Path:
    """A checkpoint as training scripts write them; None in `changes` leaves an entry out."""
    model, optimizer = trained()
    entries = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, **changes}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save({key: value for key, value in entries.items() if value is not None}, path)
    return Path(path)


def job() -> State:
    model = Net()
    return State(model, AdamW(model.parameters(), lr=0.1))


# --- the path --------------------------------------------------------------------------------------------------------


@mistake
def _() -> None:
    """The name is misspelt

    Pass a name that the message found beside it.
    """
    save("runs/last.ckpt")
    load("runs/lost.ckpt", job())


@mistake
def _() -> None:
    """The folder of a whole run, with checkpoints in it

    Pass one of them.
    """
    for step in (8, 16):
        save(f"output/checkpoint-{step}/pytorch_model.bin")
    load("output", job())


@mistake
def _() -> None:
    """`latest` names a folder that is gone

    Pass another of the run's folders, or correct `latest`.
    """
    save("run/step-8/mp_rank_00_model_states.pt")
    Path("run/latest").write_text("step-16")
    load("run", job())


@mistake
def _() -> None:
    """A variable that the path cannot have

    Use one of those that the message lists; `{{` stands for a brace.
    """
    load("runs/ep1-rank{rnk}.pt", job())


@mistake
def _() -> None:
    """A misspelt scheme

    Correct it. For a store of your own, pass `object_store`.
    """
    load("s4://bucket/last.pt", job())


# --- the store -------------------------------------------------------------------------------------------------------


@mistake
def _() -> None:
    """A wrong password, an expired token, or a path that is not there

    Compare the path first: many stores answer 403 for what is not there.
    """
    with counting_server({"/last.pt": Served(b"", status=403)}) as server:
        load(server.url("/last.pt"), job(), progress_bar=False)


@mistake
def _() -> None:
    """The server sends a page in place of the file

    Open the URL in a browser: it is a page to log in, or one of an error.
    """
    page = b"<!DOCTYPE html><html><body>Please sign in</body></html>"
    with counting_server({"/last.pt": Served(page, content_type="text/html")}) as server:
        load(server.url("/last.pt"), job(), progress_bar=False)


@mistake
def _() -> None:
    """A Git LFS pointer, not the file

    Run `git lfs pull` in the clone.
    """
    Path("last.pt").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 421376\n"
    )
    load("last.pt", job())


@mistake
def _() -> None:
    """A download that ended early

    Copy the file again, or pass its URL: a load notices by itself that a download ended early, or came damaged.
    """
    data = save().read_bytes()
    Path("last.pt").write_bytes(data[: len(data) // 2])
    load("last.pt", job())


@mistake
def _() -> None:
    """An empty file

    The job that saved it was killed, or its disk was full: take an older checkpoint.
    """
    Path("last.pt").touch()
    load("last.pt", job())


def damaged() -> None:
    model, _ = trained()
    data = bytearray(save().read_bytes())
    data[data.index(model.body.weight.detach().numpy().tobytes())] ^= 1
    Path("last.pt").write_bytes(data)


@mistake
def _() -> None:
    """A byte that changed on the disk

    Do not train on: the weights are those of a damaged file. Copy it again, or take an older checkpoint. (What comes
    damaged from a store is fetched again within the load.)
    """
    damaged()
    load("last.pt", job())


@mistake
def _() -> None:
    """The same with `verify="before"`

    Nothing was changed: load another checkpoint.
    """
    damaged()
    load("last.pt", job(), options=LoadOptions(verify="before"))


@mistake
def _() -> None:
    """No space for what is fetched

    Set `cache_dir` to a folder with more, or `cache_home` to `disk`.
    """
    from rankload.loader.cache import homes

    data = save().read_bytes()
    before, homes.free_bytes_of = homes.free_bytes_of, lambda folder: 512
    try:
        with counting_server({"/last.pt": Served(data)}) as server:
            load(server.url("/last.pt"), job(), progress_bar=False, options={"cache_dir": "cache"})
    finally:
        homes.free_bytes_of = before


@mistake
def _() -> None:
    """A cache folder that others may write to

    `chmod 700`, or another `cache_dir`.
    """
    data = save().read_bytes()
    os.mkdir("cache")
    os.chmod("cache", 0o777)
    Path("cache/theirs").touch()
    with counting_server({"/last.pt": Served(data)}) as server:
        load(server.url("/last.pt"), job(), progress_bar=False, options={"cache_dir": "cache"})


# --- the kind of file ------------------------------------------------------------------------------------------------


@mistake
def _() -> None:
    """A TorchScript file

    Save the model's `state_dict()`: `torch.save(torch.jit.load(FILE).state_dict(), NEW)`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Net(), torch.ones(1, 3)).save("model.pt")
    load("model.pt", State(Net()))


@mistake
def _() -> None:
    """A GGUF file

    It is made for inference, and its weights are quantized: pass the checkpoint that it was converted from.
    """
    Path("model.gguf").write_bytes(b"GGUF" + bytes(60))
    load("model.gguf", State(Net()))


@mistake
def _() -> None:
    """NumPy's `.npz`

    Save tensors: `torch.save({name: torch.from_numpy(array) for name, array in numpy.load(FILE).items()}, NEW)`.
    """
    np.savez("weights.npz", **{name: tensor.numpy() for name, tensor in Net().state_dict().items()})
    load("weights.npz", State(Net()))


@mistake
def _() -> None:
    """Keras's `.h5`

    Save its weights by `torch.save`, under the model's names.
    """
    Path("weights.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(60))
    load("weights.h5", State(Net()))


@mistake
def _() -> None:
    """The index of a model in several files, without the files

    Copy the files beside it, or pass the folder or repository that has them all.
    """
    index = {"metadata": {}, "weight_map": {"head.weight": "pytorch_model-00001-of-00002.bin"}}
    Path("pytorch_model.bin.index.json").write_text(json.dumps(index))
    load("pytorch_model.bin.index.json", State(Net()))


@mistake
def _() -> None:
    """A whole module, saved by `torch.save(model, ...)`

    Save its `state_dict()`.
    """
    torch.save(nn.Sequential(Net()), "model.pt")
    load("model.pt", State(Net()))


@mistake
def _() -> None:
    """The optimizer's file

    Pass the file with the weights, or one that has both.
    """
    torch.save(trained()[1].state_dict(), "optimizer.pt")
    load("optimizer.pt", State(Net()))


@mistake
def _() -> None:
    """Weights under keys of your own

    Pass the `layout` that the message prints.
    """
    model, optimizer = trained()
    trainer = {"weights": model.state_dict(), "optim": optimizer.state_dict()}
    torch.save({"trainer": {"best": trainer}}, "last.pt")
    load("last.pt", job())


@mistake
def _() -> None:
    """Weights as NumPy arrays

    Save tensors.
    """
    save(model={name: tensor.numpy() for name, tensor in Net().state_dict().items()}, optimizer=None)
    load("last.pt", State(Net()))


# --- safety ----------------------------------------------------------------------------------------------------------


@mistake
def _() -> None:
    """A file that would run code

    Nothing was run. Do not load it with anything else either.
    """

    class Harmful:
        def __reduce__(self) -> Any:
            return os.system, ("echo harm",)

    save(model={**Net().state_dict(), "head.extra": Harmful()}, optimizer=None)
    load("last.pt", State(Net()))


@dataclass
class Schedule:
    """A class of the user's, pickled into a checkpoint."""

    warmup: int = 10


@mistake
def _() -> None:
    """An object of your own among the optimizer's settings

    If you trust the file and the type, allow it by `safe_types`.
    """
    _, optimizer = trained()
    Schedule.__module__ = "my_training"
    sys.modules["my_training"] = sys.modules[__name__]
    optimizer.param_groups[0]["schedule"] = Schedule()
    save(optimizer=optimizer.state_dict())
    load("last.pt", job())


# --- the model -------------------------------------------------------------------------------------------------------


@mistake
def _() -> None:
    """Another architecture

    Build the model with the sizes that were saved, or leave the differing weights out.
    """
    save()
    load("last.pt", State(Net(classes=5)))


@mistake
def _() -> None:
    """All names have one prefix more

    Pass the `rename` that the message prints.
    """
    save(model={f"net.{name}": tensor for name, tensor in Net().state_dict().items()}, optimizer=None)
    load("last.pt", State(Net()))


@mistake
def _() -> None:
    """The model has a new layer

    `strict_model_weights=False` keeps its values, with a warning.
    """
    save(model=nn.ModuleDict({"body": Net().body}).state_dict(), optimizer=None)
    load("last.pt", State(Net()))


@mistake
def _() -> None:
    """An adapter alone, without the model that was frozen under it

    Load the base model first, then the adapter with `allow_missing_frozen=True`.
    """
    model = Net()
    model.body.requires_grad_(False)
    save(
        model={name: tensor for name, tensor in model.state_dict().items() if "head" in name}, optimizer=None
    )
    load("last.pt", State(model))


@mistake
def _() -> None:
    """A parameter that cannot be filled

    Give it memory of its own before the load.
    """
    model = Net()
    model.head.bias = nn.Parameter(torch.zeros(1).expand(2), requires_grad=False)
    save()
    load("last.pt", State(model))


@mistake
def _() -> None:
    """The load lies inside of `FakeTensorMode`, `init_empty_weights` or `zero.Init`

    Build the model there, and load outside of it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    save()
    with FakeTensorMode():
        load("last.pt", State(nn.Linear(1, 1)))


# --- optimizers, schedulers and the rest -----------------------------------------------------------------------------


@mistake
def _() -> None:
    """The checkpoint has no optimizer

    Load the weights alone with `load_weights_only=True`, or leave the optimizer out of `State`.
    """
    save(optimizer=None)
    load("last.pt", job())


@mistake
def _() -> None:
    """An optimizer of another kind

    Use the saved kind, ignore the saved state as the message says, or pass `load_weights_only=True`.
    """
    save()
    model = Net()
    load("last.pt", State(model, SGD(model.parameters(), lr=0.1)))


def two_groups(model: Net) -> torch.optim.Optimizer:
    groups = [
        {"params": list(model.body.parameters()), "weight_decay": 0.3},
        {"params": list(model.head.parameters()), "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=0.1)


@mistake
def _() -> None:
    """One saved group of parameters, two groups in the job

    Say whose hyperparameters count.
    """
    saved = Net()
    save(optimizer=AdamW(saved.named_parameters(), lr=0.1).state_dict())
    model = Net()
    load("last.pt", State(model, two_groups(model)))


@mistake
def _() -> None:
    """The same, where the optimizer was not given the parameters' names

    Make the groups that were saved; change them after the load.
    """
    save()
    model = Net()
    load("last.pt", State(model, two_groups(model)))


@mistake
def _() -> None:
    """A scheduler of another kind

    Use the saved kind, or leave the saved one out: `ignore_keys=["state/schedulers/StepLR"]`.
    """
    model, optimizer = trained()
    save(scheduler=CosineAnnealingLR(optimizer, 10).state_dict())
    mine = AdamW(model.parameters(), lr=0.1)
    load("last.pt", State(model, mine, StepLR(mine, 3)))


@mistake
def _() -> None:
    """Random states of fewer ranks than there are

    Pass what a load returned in this world: it has one for each rank.
    """
    restore_rng([])


# --- arguments -------------------------------------------------------------------------------------------------------


@mistake
def _() -> None:
    """Path and state in the wrong order

    `load(path, state)`.
    """
    load(job(), "last.pt")  # type: ignore[arg-type]


@mistake
def _() -> None:
    """A module in place of a `State`

    Wrap it.
    """
    load("last.pt", Net())


@mistake
def _() -> None:
    """An optimizer where the model belongs

    `State(model, optimizer)`.
    """
    load("last.pt", State(trained()[1]))


@mistake
def _() -> None:
    """A misspelt option

    Take the name that the message proposes or lists.
    """
    load("last.pt", job(), options={"cachedir": "/scratch"})


@mistake
def _() -> None:
    """A value that an option cannot have

    Take one that the message lists.
    """
    load("last.pt", job(), options=LoadOptions(verify="always"))  # type: ignore[arg-type]


@mistake
def _() -> None:
    """A pattern in `rename`

    A key that ends with a dot is a prefix; there are no patterns.
    """
    save()
    load("last.pt", job(), options=LoadOptions(rename={"backbone.*": "body.*"}))


# --- what several ranks saved ----------------------------------------------------------------------------------------


@mistake
def _() -> None:
    """One rank's file of a DeepSpeed folder is missing

    Copy all files of the folder; each node needs those that the message names.
    """
    folder = unpack_zero(1, Path.cwd())
    (folder / "step3" / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    load("s1-w4", job())


@mistake
def _() -> None:
    """One file of a DeepSpeed folder, in place of the folder

    Pass the folder.
    """
    unpack_zero(3, Path.cwd())
    load("s3-w4/step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", job())


@mistake
def _() -> None:
    """A DeepSpeed universal checkpoint

    Pass the native folder that it was converted from: no conversion is needed.
    """
    save("run/step8/mp_rank_00_model_states.pt")
    save("run/step8/zero/optimizer_state.pt")
    load("run/step8", job())


@mistake
def _() -> None:
    """A pipeline's checkpoint, for a model that is none

    Restore it into an engine with as many stages. Another number of data-parallel ranks does no harm.
    """
    step = unpack_zero(1, Path.cwd()) / "step3"
    # As DeepSpeed's PipelineModule saves it: the weights are in a file for each layer.
    saved = torch.load(step / "mp_rank_00_model_states.pt", weights_only=False)
    torch.save({**saved, "module": None}, step / "mp_rank_00_model_states.pt")
    torch.save(saved["module"], step / "layer_00-model_states.pt")
    load("s1-w4", job())


@mistake
def _() -> None:
    """One of the archives that each rank saved

    Write `{rank}` where the rank stands in the name.
    """
    archive = DATA / "composer-zero1-w2" / "ep1-ba4-rank0.pt.tar"
    Path("ep1-ba4-rank0.pt.tar").write_bytes(archive.read_bytes())
    load("ep1-ba4-rank0.pt.tar", job())


# --- ranks -----------------------------------------------------------------------------------------------------------


@on_ranks(2)
def _() -> None:
    """Another path on each rank

    Pass one template on every rank.
    """
    save(f"ep1-rank{os.environ['RANK']}.pt")
    load(f"ep1-rank{os.environ['RANK']}.pt", job())


@on_ranks(2)
def _() -> None:
    """Only some ranks call `load`

    Call it on every rank, outside of `if rank == 0`.
    """
    save(f"of-{os.environ['RANK']}.pt")
    if os.environ["RANK"] == "0":
        load("of-0.pt", job(), options=LoadOptions(stall_timeout_s=2))
    time.sleep(6)


@on_ranks(2)
def _() -> None:
    """A rank that dies during the load

    Look at that rank's own output.
    """
    save(f"of-{os.environ['RANK']}.pt")
    if os.environ["RANK"] == "1":

        def die(tree: dict[str, Any]) -> None:
            os._exit(3)

        load("of-0.pt", job(), ignore_keys=die)
    load("of-0.pt", job(), ignore_keys=lambda tree: None)


# --- running them, and the page --------------------------------------------------------------------------------------


def told(run: Callable[[], object]) -> str:
    """The error of a mistake as the page shows it: its type and message."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run()
        except RankloadError as error:
            return f"{type(error).__name__}: {error.message}"
    raise AssertionError(f"no error: {inspect.getdoc(run)}")


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="mistake-") as folder:
        os.chdir(folder)
        try:
            yield Path(folder).resolve()
        finally:
            os.chdir(before)


def as_rank(index: str) -> None:
    """One rank of a mistake of several ranks: prints what it was told, where it is told anything."""
    mistake = MISTAKES[int(index)]
    if os.environ["RANK"] == "0":
        print(json.dumps(told(mistake.run)), flush=True)
        os._exit(0)
    with contextlib.suppress(RankloadError):
        mistake.run()


def message_of(index: int) -> str:
    """What the mistake is answered with, without what differs from run to run: folders, ports, hosts, seconds."""
    mistake = MISTAKES[index]
    with empty_folder() as folder:
        if mistake.ranks > 1:
            ranks = run_ranks(
                f"{Path(__file__).resolve()}:as_rank", mistake.ranks, args=[index], deadline_s=120
            )
            lines = [line for line in ranks[0].stdout.splitlines() if line.startswith('"')]
            assert lines, ranks
            text = json.loads(lines[-1])
        else:
            text = told(mistake.run)
        text = text.replace(f"{folder}/", "").replace(str(folder), ".")
    for pattern, plain in (
        (r"127\.0\.0\.1:\d+", "server"),
        (re.escape(socket.gethostname()), "node-a"),
        (r"waited \d+ s (?=\(stall_timeout_s=2\))", "waited 2 s "),  # a busy machine takes longer
        (r"/(dev/shm|tmp)/rankload-\d+\S*", "/tmp/rankload-0"),
        (r"pid \d+|process \d+", "process 4711"),
        (r"\d+(\.\d+)? s ago", "2 s ago"),
    ):
        text = re.sub(pattern, plain, text)
    return text


def section(index: int) -> str:
    mistake = MISTAKES[index]
    return f"### {mistake.heading}\n\n```\n{message_of(index)}\n```\n\n{mistake.remedy}\n"


def write() -> None:
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE} has no place for the mistakes: {BEGIN} and {END}")
    sections = "\n".join(section(index) for index in range(len(MISTAKES)))
    PAGE.write_text(f"{before}{BEGIN}\n{sections}{END}{after}")


if __name__ == "__main__":
    write()
