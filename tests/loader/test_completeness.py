"""What is missing of a checkpoint, or was cut short, and that nothing is said of one that is whole."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from bad_server import Behaviour
from every_kind import KINDS, copy_kind, serving
from rankload.loader import AccessError
from rankload.loader.alone import OUTLINE, open_alone
from rankload.loader.completeness import Fault, faults_of
from rankload.loader.stores.manifest import manifest_of


def faults(path: str | Path, **options: object) -> tuple[Fault, ...]:
    with open_alone(path, OUTLINE, options=options) as opened:
        return faults_of(opened)


def tag_folder(target: Path) -> Path:
    """A copy of DeepSpeed's folder for one tag."""
    return Path(copy_kind("zero1", target)) / "step3"


def another_file(path: str) -> Path:
    """The checkpoint's last file, which an outline does not read."""
    with open_alone(path) as opened:
        return Path(opened.files.object_of(opened.saved.files[-1]))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_said_of_a_whole_checkpoint(kind: str, tmp_path: Path) -> None:
    path = copy_kind(kind, tmp_path)
    assert faults(path) == ()
    with serving(tmp_path) as server:
        url = server.url(f"/{Path(path).relative_to(tmp_path)}")
        assert faults(url, cache_dir=str(tmp_path / "cache")) == ()


def cut(data: bytes, suffix: str) -> dict[str, bytes | None]:
    """What may be left of a file, by a part of the reason."""
    shorter = {"is not there": None, "is empty: expected": b"", "cut": data[: len(data) // 4]}
    # A tar's last bytes are padding.
    return shorter if suffix == ".tar" else {**shorter, "cut by a byte": data[:-1]}


@pytest.mark.parametrize(
    "kind", ["zero1", "zero3", "trainer", "composer-zero1", "dcp", "slices", "rank-shards"]
)
def test_each_lost_or_cut_file_is_named_and_no_other(kind: str, tmp_path: Path) -> None:
    path = copy_kind(kind, tmp_path)
    with open_alone(path) as opened:
        for file in (Path(opened.files.object_of(one)) for one in opened.saved.files):
            data = file.read_bytes()
            if file.suffix == ".json" or file.name == ".metadata":
                continue  # it shows no end; opening has read it
            for reason, left in cut(data, file.suffix).items():
                file.unlink()
                if left is not None:
                    file.write_bytes(left)
                found = faults_of(opened)
                assert [one.file for one in found] == [str(file)]
                assert (
                    "is damaged" if "cut" in reason and ".distcp" not in file.name else reason[:3]
                ) in str(found)
                file.write_bytes(data)
        assert faults_of(opened) == ()


@pytest.mark.parametrize("kind", ["zero3", "dcp", "slices", "composer-zero3"])
def test_the_same_by_http(kind: str, tmp_path: Path) -> None:
    path = Path(copy_kind(kind, tmp_path / "copy")).relative_to(tmp_path / "copy")
    options = {"cache_dir": str(tmp_path / "cache")}
    with serving(tmp_path / "copy") as server, open_alone(server.url(f"/{path}"), options=options) as opened:
        one = opened.files.object_of(opened.saved.files[-1])
        served = server.objects.pop(one.removeprefix(server.url("")))
        assert [str(fault) for fault in faults_of(opened)] == [f"{one} is not there"]
        for left in (b"", served.body[: len(served.body) // 4]):
            server.objects[one.removeprefix(server.url(""))] = Behaviour(left, etag='"cut"')
            assert [fault.file for fault in faults_of(opened)] == [one]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<!DOCTYPE html><html>gone</html>", "is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of Git LFS"),
        (bytes(4000), "is of an unknown kind"),
    ],
)
def test_what_is_no_file_of_tensors_is_named_for_what_it_is(data: bytes, reason: str, tmp_path: Path) -> None:
    file = another_file(copy_kind("zero1", tmp_path))
    file.write_bytes(data)
    found = faults(tmp_path / "s1-w4")
    assert [(one.file, one.reason.startswith(reason)) for one in found] == [(str(file), True)]


def test_a_zip_that_lost_bytes_in_the_middle_is_named(tmp_path: Path) -> None:
    file = another_file(copy_kind("zero3", tmp_path))
    data = file.read_bytes()
    file.write_bytes(data[:1000] + data[2000:])
    found = faults(tmp_path / "s3-w4")
    assert [one.file for one in found] == [str(file)]
    assert "has lost some of its bytes" in found[0].reason


def test_each_file_that_a_manifest_lists_must_be_there(tmp_path: Path) -> None:
    folder = tag_folder(tmp_path)
    (folder / "notes.txt").write_text("mine")
    sums = {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in folder.iterdir()}
    (folder / "SHA256SUMS").write_bytes(manifest_of(sums))
    assert faults(folder) == faults(folder, verify="off") == ()
    (folder / "notes.txt").unlink()
    assert faults(folder) == faults(folder, verify="off")
    assert [str(one) for one in faults(folder)] == [
        f"{folder / 'notes.txt'} is not there, and SHA256SUMS lists it"
    ]
    with serving(tmp_path) as server:
        found = faults(server.url("/s1-w4/step3"), cache_dir=str(tmp_path / "cache"))
    assert [one.file for one in found] == [server.url("/s1-w4/step3/notes.txt")]


def test_of_a_manifest_beside_latest_other_tags_may_be_gone(tmp_path: Path) -> None:
    folder = tag_folder(tmp_path)
    digest = hashlib.sha256(b"").hexdigest()
    listed = {"older/model.pt": digest, f"{folder.name}/gone.txt": digest, "zero_to_fp32.py": digest}
    (folder.parent / "SHA256SUMS").write_bytes(manifest_of(listed))
    found = faults(folder.parent, verify="off")
    assert [one.file for one in found] == [str(folder / "gone.txt"), str(folder.parent / "zero_to_fp32.py")]


def test_what_the_store_refuses_to_say_is_raised(tmp_path: Path) -> None:
    path = copy_kind("zero1", tmp_path / "copy")
    file = another_file(path)
    with serving(tmp_path / "copy") as server:
        refused = server.objects[f"/s1-w4/step3/{file.name}"]
        refused.needs = lambda headers, query: False
        refused.head_status = 403
        with pytest.raises(AccessError, match=file.name):
            faults(server.url("/s1-w4"), cache_dir=str(tmp_path / "cache"))


def test_few_bytes_are_read_of_each_file_and_no_torch_is_imported(tmp_path: Path) -> None:
    import torch

    folder = tag_folder(tmp_path)
    large = folder / "mp_rank_00_model_states.pt"
    tree = torch.load(large, weights_only=False)
    torch.save({**tree, "padding": torch.zeros(4 << 20)}, large)
    with (
        serving(tmp_path) as server,
        open_alone(
            server.url("/s1-w4/step3"), OUTLINE, options={"cache_dir": str(tmp_path / "cache")}
        ) as opened,
    ):
        server.asked.clear()
        before = server.sent_bytes
        assert faults_of(opened) == ()
        assert server.sent_bytes - before < 5 << 10
        requests = [one for one in server.asked if one.range]
        assert len(requests) == 2 * len(opened.saved.files)
    code = (
        "import sys\nfrom rankload.loader.alone import open_alone\n"
        "from rankload.loader.completeness import faults_of\n"
        "with open_alone(sys.argv[1]) as opened:\n    assert faults_of(opened) == ()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60)
