"""The command line's frame: what it imports, how it ends, what it says of errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import Annotated

import pytest
import typer
from places import REPOSITORY
from rankload.launch import cli
from rankload.launch.commands import endings
from rankload.launch.commands.blocks import Branch, Facts, Line, Table, plain
from rankload.launch.commands.calls import Call, sharing, storage_options
from rankload.loader.errors import NotFoundError, OptionError, TemplateError

HEAVY = {"torch", "fsspec", "deepspeed", "numpy", "aiohttp"}


def groups() -> list[list[str]]:
    """Every command as it is called, and every group of commands."""
    found: list[list[str]] = [[]]
    for name in cli.COMMANDS:
        function = getattr(cli.import_module(f"rankload.launch.commands.{name}"), name)
        found.append([name])
        found += [[name, each] for each in function] if isinstance(function, dict) else []
    return found


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_importing_the_command_line_and_every_help_imports_nothing_heavy():
    code = f"""
import sys
from rankload.launch import cli
first = set(sys.modules)
for words in {groups()!r}:
    assert cli.run([*words, "--help"]) == 0, words
assert not {HEAVY!r} & {{name.split(".")[0] for name in sys.modules}}
assert not {{"typer", "rich"}} & first
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", groups(), ids=lambda words: " ".join(words) or "rankload")
def test_every_help_has_the_exit_codes(words, capsys):
    assert cli.run([*words, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert endings.EXIT_CODES in said
    assert "\x1b" not in said


@pytest.mark.parametrize("module", ["rankload", "rankload.launch"])
def test_is_a_module_too(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"rankload {cli.version()}\n")


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("typer", "rich"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from rankload.launch import cli, demo
demo.demo = lambda stage: print("the demo at stage", stage) or 0
cli.COMMANDS = ("inspect", "demo")
cli.main(sys.argv[1:])
"""


def without_typer(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, timeout=60
    )


def test_without_typer_the_demo_works():
    done = without_typer("demo", "--stage", "3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "the demo at stage 3\n", "")
    assert without_typer("demo", "--plain").stdout == "the demo at stage None\n"
    assert without_typer("--version").stdout.startswith("rankload ")


def test_without_typer_every_other_command_says_what_to_install():
    done = without_typer("inspect", "somewhere", "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "pip install 'rankload[cli]'" in line
    assert "pip install 'rankload[cli]'" in " ".join(without_typer("--help").stdout.split())


@pytest.fixture
def a_command(monkeypatch):
    """Puts a function in the place of every command."""

    def put(function):
        module = type(sys)("probe")
        module.probe = function
        monkeypatch.setattr(cli, "COMMANDS", ("probe",))
        monkeypatch.setattr(cli, "import_module", lambda name, package: module)
        return lambda *words: cli.run(["probe", *words])

    return put


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (NotFoundError("runs/lost: there is no such file", path="runs/lost"), 3, "NotFoundError"),
        (OptionError("cache_size='x': expected bytes"), 2, "OptionError"),
        (TemplateError("{rnk}: unknown variable"), 2, "TemplateError"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
)
def test_an_error_is_one_block_without_a_traceback(error, code, kind, a_command, capsys):
    def probe(call: Call) -> None:
        raise error

    run = a_command(probe)
    assert run() == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{kind}: {error}")
    assert "Traceback" not in err
    assert run("--debug") == code
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert f"{kind}: {error}" in err
    assert run("--json") == code
    record = json.loads(capsys.readouterr().err)
    assert record["schema_version"] == 1
    assert record["error"]["type"] == kind
    assert str(error) in record["error"]["message"]
    assert record["error"]["path"] == getattr(error, "path", None)
    assert set(record["error"]) == {"type", "message", "path"}


def test_a_mistake_of_our_own_shows_where_it_is(a_command, capsys):
    def probe(call: Call) -> None:
        raise ZeroDivisionError("of the frame's test")

    assert a_command(probe)() == 3
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert "ZeroDivisionError: of the frame's test" in err.splitlines()[-1]


def test_wrong_arguments_as_json(a_command, capsys):
    run = a_command(lambda call: None)
    assert run("--no-such-option", "--json") == 2
    record = json.loads(capsys.readouterr().err)
    assert record["error"]["type"] == "WrongArguments"
    assert "--no-such-option" in record["error"]["message"]


def test_shared_options_become_load_options(a_command):
    seen: list[Call] = []

    def probe(call: Call, path: Annotated[str, typer.Argument()]) -> int:
        seen.append(call)
        assert path == "some/path"
        return 1

    words = [
        *("some/path", "--storage-option", "anon=true", "--storage-option", "key=0123"),
        *(
            "--storage-option",
            'client_kwargs={"endpoint_url": "http://127.0.0.1"}',
            "--storage-option",
            "n:=5",
        ),
        *("--cache-dir", "there", "--cache-size", "2GB", "--stall-timeout", "7", "--verify", "before"),
        *("--mode", "job", "--cache-home", "disk", "--safe-type", "my.Type", "--layout", "model=net"),
    ]
    assert a_command(probe)(*words) == 1
    options = seen[0].options
    assert options.storage_options == {
        "anon": True,
        "key": "0123",
        "client_kwargs": {"endpoint_url": "http://127.0.0.1"},
        "n": 5,
    }
    assert (options.cache_dir, options.cache_size, options.stall_timeout_s) == ("there", 2_000_000_000, 7.0)
    assert (options.verify, options.mode, options.cache_home) == ("before", "job", "disk")
    assert (options.safe_types, options.layout) == (("my.Type",), {"model": "net"})
    assert "0123" not in repr(seen[0])


def test_a_command_may_share_fewer_options(a_command, capsys):
    @sharing("cache_dir")
    def probe(call: Call) -> None:
        assert call.options.cache_dir == "there"

    run = a_command(probe)
    assert run("--cache-dir", "there") == 0
    assert run("--verify", "off") == 2


@pytest.mark.parametrize("text", ["secret", "=secret", "key:=[secret", "key={secret"])
def test_a_storage_option_that_cannot_be_read_is_not_shown(text):
    with pytest.raises(endings.WrongArgumentsError) as caught:
        storage_options([text])
    assert "secret" not in str(caught.value)


def test_results_as_text_have_no_boxes_and_no_control_characters(a_command, capsys):
    tree = Branch(
        "state", branches=[Branch("weight\x1b[31m", ("(2, 3)", "float32")), Branch("b", ("()", "int64"))]
    )
    table = Table(("file", "bytes"), [("a.pt", "1"), ("long-name.pt", "1,000")], frozenset({1}))

    def probe(call: Call) -> None:
        call.show(
            {"answer": 42},
            [Line("title", strong=True), Facts([("kind", "dcp"), ("step", None)]), table, tree],
        )

    run = a_command(probe)
    assert run() == 0
    assert capsys.readouterr().out.splitlines() == [
        "title",
        "kind  dcp",
        "file          bytes",
        "a.pt              1",
        "long-name.pt  1,000",
        "state",
        "  weight\\x1b[31m  (2, 3)  float32",
        "  b               ()      int64",
    ]
    assert run("--json") == 0
    assert json.loads(capsys.readouterr().out) == {"schema_version": 1, "command": "probe", "answer": 42}


def test_results_on_a_terminal_are_drawn_and_markup_is_not(a_command, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    inner = Branch(
        "model", branches=[Branch("[red]weight\x1b", ("(2,)", "int8")), Branch("b", ("()", "float32"))]
    )
    tree = Branch("state", branches=[inner, Branch("rng", ("list",))])
    assert a_command(lambda call: call.show({}, [tree, Table(("a",), [("[bold]1",)])]))() == 0
    out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)  # without the colours
    assert out.splitlines()[:5] == [
        "state",
        "├── model",
        "│   ├── [red]weight\\x1b  (2,)  int8",
        "│   └── b                ()    float32",
        "└── rng                  list",
    ]
    assert "[bold]1" in out


def test_plain_lines_of_a_deep_tree():
    tree = Branch("0")
    for depth in range(5000):
        tree = Branch(str(depth + 1), branches=[tree])
    assert sum(1 for _ in plain(tree)) == 5001


def test_a_reader_that_goes_away_is_no_error():
    code = """
import sys
from rankload.launch import cli
from rankload.launch.commands.blocks import Line
module = type(sys)("probe")
module.probe = lambda call: call.show({}, [Line("x" * 70)] * 10000)
cli.COMMANDS, cli.import_module = ("probe",), lambda name, package: module
cli.main(["probe"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), said) == (130, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_so(number):
    code = """
import sys, time
from rankload.launch import cli
module = type(sys)("probe")
def probe(call):
    print("begun", flush=True)
    time.sleep(60)
module.probe = probe
cli.COMMANDS, cli.import_module = ("probe",), lambda name, package: module
cli.main(["probe"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "Interrupted: what was started has been ended\n"


def test_completion_names_the_commands():
    done = subprocess.run(
        # Typer asks which shell started it, which under make is none that it knows.
        [sys.executable, "-m", "rankload", "--show-completion", "bash"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )
    assert "_RANKLOAD_COMPLETE" in done.stdout
    asked = python(
        "from rankload.launch.cli import main; main([])",
        _RANKLOAD_COMPLETE="complete_bash",
        COMP_WORDS="rankload de",
        COMP_CWORD="1",
    )
    assert "demo" in asked.stdout.split()
