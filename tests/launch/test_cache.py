"""``rankload cache``: what it lists, and what it removes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rankload.launch.cli import run
from rankload.loader.cache.node import NodeCache

SIZE = 1 << 20


def writes(path: str) -> None:
    Path(path).write_bytes(b"x" * SIZE)


def fill(cache: NodeCache, checkpoint: str, *names: str) -> None:
    cache.of_checkpoint("store", checkpoint)
    for name in names:
        entry = cache.entry(f"s3://bucket/{name}", "store", name, "v1", nbytes=SIZE)
        entry.fill("object", name, writes, lambda n_bytes: None)


@pytest.fixture
def folder(tmp_path):
    """A cache in which two checkpoints stayed: ``old``, of two files, and ``new``, of one."""
    path = tmp_path / "cache"
    for checkpoint, names in (("old", ("a.pt", "b.pt")), ("new", ("c.pt",))):
        with NodeCache(str(path), size_bytes=100 * SIZE) as cache:
            fill(cache, checkpoint, *names)
    return path


def told(capsys, *words) -> tuple[int, dict]:
    code = run(["cache", *map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    return code, json.loads(out)


def names(files: list[dict]) -> list[str]:
    return [one["name"] for one in files]


def test_list(folder, capsys):
    code, said = told(capsys, "list", "--cache-dir", folder)
    assert code == 0
    assert said["command"] == "cache list"
    assert names(said["files"]) == ["c.pt", "a.pt", "b.pt"]
    assert [one["in_use"] for one in said["files"]] == [False] * 3
    assert all(one["size_bytes"] >= SIZE for one in said["files"])
    assert [one["checkpoint"] for one in said["files"]] == ["new", "old", "old"]
    assert run(["cache", "list", "--cache-dir", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "a.pt" in out
    assert "3 files of 2 checkpoints, 3.1" in out


def test_list_makes_no_folder(tmp_path, capsys):
    code, said = told(capsys, "list", "--cache-dir", tmp_path / "none")
    assert (code, said["files"]) == (0, [])
    assert list(tmp_path.iterdir()) == []
    assert run(["cache", "list", "--cache-dir", str(tmp_path / "none")]) == 0
    assert "nothing in" in capsys.readouterr().out


def test_prune_removes_the_least_recently_used_checkpoint_as_a_whole(folder, capsys):
    code, said = told(capsys, "prune", "--cache-dir", folder, "--cache-size", "2500KB")
    assert code == 0
    assert (names(said["removed"]), names(said["left"])) == (["a.pt", "b.pt"], ["c.pt"])
    assert told(capsys, "prune", "--cache-dir", folder, "--cache-size", "2500KB")[1]["removed"] == []


def test_prune_takes_the_configured_size_and_never_guesses_one(folder, capsys, monkeypatch):
    assert run(["cache", "prune", "--cache-dir", str(folder)]) == 2
    assert "--cache-size" in capsys.readouterr().err
    monkeypatch.setenv("RANKLOAD_CACHE_SIZE", "10")
    monkeypatch.setenv("RANKLOAD_CACHE_DIR", str(folder))
    assert len(told(capsys, "prune")[1]["removed"]) == 3


def test_what_a_process_uses_stays(folder, capsys):
    with NodeCache(str(folder), size_bytes=100 * SIZE) as cache:
        fill(cache, "old", "a.pt")
        said = told(capsys, "list", "--cache-dir", folder)[1]
        assert {one["name"]: one["in_use"] for one in said["files"]} == {
            "a.pt": True,
            "b.pt": False,
            "c.pt": False,
        }
        said = told(capsys, "prune", "--cache-dir", folder, "--cache-size", "0")[1]
        # A checkpoint of which a file is used stays as a whole.
        assert (names(said["removed"]), names(said["left"])) == (["c.pt"], ["a.pt", "b.pt"])
        said = told(capsys, "clear", "--cache-dir", folder, "--yes")[1]
        assert (names(said["removed"]), names(said["left"])) == (["b.pt"], ["a.pt"])
        assert (Path(said["left"][0]["path"]) / "object" / "a.pt").read_bytes() == b"x" * SIZE
    assert names(told(capsys, "clear", "--cache-dir", folder, "--yes")[1]["removed"]) == ["a.pt"]


def test_clear_asks(folder, capsys, monkeypatch):
    assert run(["cache", "clear", "--cache-dir", str(folder)]) == 2
    assert "--yes" in capsys.readouterr().err
    asked = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda text: bool(asked.append(text)))
    assert run(["cache", "clear", "--cache-dir", str(folder)]) == 1
    (question,) = asked
    assert question.startswith("Remove 3 files, 3.1")
    assert len(told(capsys, "list", "--cache-dir", folder)[1]["files"]) == 3
    monkeypatch.setattr("typer.confirm", lambda text: True)
    assert run(["cache", "clear", "--cache-dir", str(folder)]) == 0
    assert "removed 3 files" in capsys.readouterr().out
    assert not list(folder.iterdir())


def test_what_was_fetched_for_a_load_survives_a_prune_and_goes_with_clear(tmp_path, capsys):
    folder = tmp_path / "cache"
    with NodeCache(str(folder), purpose="prefetch") as cache:
        fill(cache, "run/step-8", "a.pt")
    (one,) = told(capsys, "list", "--cache-dir", folder)[1]["files"]
    assert (one["checkpoint"], one["awaited"], one["in_use"]) == ("run/step-8", True, False)
    said = told(capsys, "prune", "--cache-dir", folder, "--cache-size", "0")[1]
    assert (names(said["removed"]), names(said["left"])) == ([], ["a.pt"])
    assert names(told(capsys, "clear", "--cache-dir", folder, "--yes")[1]["removed"]) == ["a.pt"]


def test_nothing_but_entries_of_a_cache_is_removed(folder, tmp_path, capsys):
    (folder / "project" / "users").mkdir(parents=True)
    (folder / "note.txt").write_text("mine")
    assert len(told(capsys, "clear", "--cache-dir", folder, "--yes")[1]["removed"]) == 3
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "note.txt", "project"]
    # Nor in a folder that is no cache, whatever lies there.
    other = tmp_path / "other"
    (other / "looks-like-one-0123456789abcdef0123" / "users").mkdir(parents=True)
    assert told(capsys, "clear", "--cache-dir", other, "--yes")[1]["removed"] == []
    assert len(list(other.iterdir())) == 1


def test_a_folder_of_others_is_refused(folder, capsys):
    folder.chmod(0o777)
    assert run(["cache", "clear", "--cache-dir", str(folder), "--yes"]) == 3
    assert "can be written by others" in capsys.readouterr().err
