"""Every change of a checkpoint's bytes is found and named, and what has no checksum is never called whole."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from bad_server import Behaviour, bad_server
from every_kind import KINDS, copy_kind, serving
from rankload.loader import AccessError, NotFoundError, OptionError
from rankload.loader.alone import EVERYTHING, open_alone
from rankload.loader.formats.torch_file import read_index
from rankload.loader.saved.tree import tensors
from rankload.loader.wholeness import reading
from rankload.loader.wholeness.check import Watch, check_whole
from rankload.loader.wholeness.values import FileVerdict, Wholeness

SUMMED = [kind for kind in KINDS if kind not in ("slices", "sharded", "safetensors")]
"""Kinds whose tensors have checksums."""


def states(found: Wholeness) -> Counter[str]:
    return Counter(one.state for one in found.files)


def the_wrong(found: Wholeness) -> list[FileVerdict]:
    return [one for one in found.files if one.is_wrong]


def flip(path: Path, place: int, bit: int = 3) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_checkpoint_is_called_so_locally_and_by_http(kind: str, tmp_path: Path) -> None:
    path = copy_kind(kind, tmp_path / "copy")
    found = check_whole(path)
    assert found.is_sound
    assert found.compared_bytes == found.total_bytes
    for one in found.files:
        assert (one.state == "nothing to compare with") == (not one.compared_by)
        assert one.compared_by or one.reason
    if kind in SUMMED:
        assert states(found)["whole"]
    else:
        assert states(found).keys() == {"nothing to compare with"}
    with serving(tmp_path / "copy") as server:
        url = server.url(f"/{Path(path).relative_to(tmp_path / 'copy')}")
        there = check_whole(url, options={"cache_dir": str(tmp_path / "cache")})
    assert [(one.state, one.compared_by, one.compared_bytes) for one in there.files] == [
        (one.state, one.compared_by, one.compared_bytes) for one in found.files
    ]


@pytest.mark.parametrize("kind", [kind for kind in SUMMED if ".tar" not in KINDS[kind]])
def test_each_flipped_bit_of_tensors_is_found_with_its_tensor(kind: str, tmp_path: Path) -> None:
    path = copy_kind(kind, tmp_path)
    places = set()
    with open_alone(path, EVERYTHING) as opened:
        for _, tensor in tensors([opened.saved.state, opened.saved.rng, opened.saved.extra]):
            places |= {one for one in tensor.storages if one.nbytes and one.crc32 is not None}
    chance = random.Random(7)
    ordered = sorted(places, key=lambda one: (one.file, one.offset))
    for storage in chance.choices(ordered, weights=[one.nbytes for one in ordered], k=200 // len(SUMMED) + 1):
        place = storage.offset + chance.randrange(storage.nbytes)
        bit = chance.randrange(8)
        flip(Path(storage.file), place, bit)
        (wrong,) = the_wrong(check_whole(path))
        assert wrong.file == storage.file
        assert wrong.state == "damaged"
        (damage,) = wrong.damages
        assert damage.start <= place < damage.stop
        assert damage.tensors
        flip(Path(storage.file), place, bit)
    assert check_whole(path).is_sound


def test_flipped_bits_of_one_file_are_all_found(tmp_path: Path) -> None:
    path = tmp_path / "many.pt"
    torch.manual_seed(1)
    tree = {f"layer{number}.weight": torch.rand(40, 10) for number in range(250)}
    torch.save(tree, path)
    with open_alone(path) as opened:
        by_name = dict(tensors(opened.saved.state["model"]))
    names = random.Random(3).sample(sorted(tree), 200 if os.environ.get("TEST_ALL") else 50)
    places = {}
    for name in names:
        (storage,) = by_name[name].storages
        places[name] = storage.offset + random.Random(name).randrange(storage.nbytes)
        flip(path, places[name])
    for subset in (None, "100%"):
        found = check_whole(path, subset=subset)
        (one,) = found.files
        named = {damage.tensors[0]: damage for damage in one.damages}
        assert named.keys() == set(names)
        assert all(named[name].start <= place < named[name].stop for name, place in places.items())


@pytest.mark.parametrize("kind", ["composer-zero1", "composer-zero3", "composer-tar"])
def test_a_flipped_bit_inside_of_a_tar_is_found_with_its_tensor(kind: str, tmp_path: Path) -> None:
    path = Path(copy_kind(kind, tmp_path))
    tar = path.parent / path.name.replace("{rank}", "1")
    with tarfile.open(tar) as archive:
        member = max(archive, key=lambda one: one.size)
    data = tar.read_bytes()[member.offset_data : member.offset_data + member.size]
    (tmp_path / "member.pt").write_bytes(data)
    index = read_index(tmp_path / "member.pt")
    storage = max(index.storages, key=lambda one: one.nbytes)
    place = member.offset_data + storage.offset + storage.nbytes // 2
    flip(tar, place)
    (wrong,) = the_wrong(check_whole(path))
    assert (wrong.file, wrong.state) == (str(tar), "damaged")
    (damage,) = wrong.damages
    assert damage.start <= place < damage.stop
    assert member.name in damage.what
    assert damage.tensors


@pytest.mark.parametrize("kind", ["zero3", "dcp", "rank-shards", "composer-zero1"])
def test_missing_empty_and_cut_files_are_told_apart(kind: str, tmp_path: Path) -> None:
    path = copy_kind(kind, tmp_path)
    with open_alone(path) as opened:
        file = Path(opened.files.object_of(opened.saved.files[-1]))
    data = file.read_bytes()
    for state, left in (("missing", None), ("short", b""), ("damaged", data[: len(data) // 4])):
        file.unlink()
        if left is not None:
            file.write_bytes(left)
        found = check_whole(path)
        assert not found.is_sound
        if found.kind is None:  # without it, the checkpoint cannot even be opened
            assert [one.state for one in found.files] == ["missing" if left is None else "damaged"]
            assert "could not be opened" in found.notes[0]
        else:
            (wrong,) = the_wrong(found)
            assert wrong.file == str(file)
            assert wrong.state == state or ".distcp" in file.name
        file.write_bytes(data)
    assert check_whole(path).is_sound


def test_a_bit_of_an_item_in_a_dcp_folder_names_tensor_and_offsets(tmp_path: Path) -> None:
    path = Path(copy_kind("dcp", tmp_path))
    with open_alone(path, EVERYTHING) as opened:
        (piece, *_) = opened.saved.state["model"]["wte.weight"].pieces
        storage = piece.storage
    flip(Path(storage.file), storage.offset + 5)
    (wrong,) = the_wrong(check_whole(path))
    (damage,) = wrong.damages
    assert "wte.weight" in damage.tensors[0]
    assert (damage.start, damage.stop) == (storage.offset, storage.offset + storage.nbytes)


def test_a_save_that_shows_that_it_did_not_end_is_a_problem(tmp_path: Path) -> None:
    path = Path(copy_kind("accelerate-zero", tmp_path))
    (path / "random_states_1.pkl").unlink()
    found = check_whole(path)
    assert states(found)["whole"] == len(found.files)
    assert not found.is_sound
    assert "the save was not finished" in found.problems[0]


def test_a_path_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        check_whole(tmp_path / "nothing")
    with pytest.raises(NotFoundError):
        check_whole(tmp_path)


def test_a_manifest_is_compared_and_so_is_what_it_lists_besides(tmp_path: Path) -> None:
    path = Path(copy_kind("sharded", tmp_path))
    (path / "config.json").write_text("{}")
    sums = {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in path.iterdir()}
    (path / "SHA256SUMS").write_text("".join(f"{value}  {name}\n" for name, value in sums.items()))
    found = check_whole(path)
    assert states(found) == {"whole": 4}
    assert {one.compared_by for one in found.files} == {("sha256 of SHA256SUMS",)}
    flip(path / "model-00002-of-00002.safetensors", 900)
    (path / "config.json").write_text("[]")
    wrong = the_wrong(check_whole(path))
    assert sorted(Path(one.file).name for one in wrong) == ["config.json", "model-00002-of-00002.safetensors"]
    assert all("sha256 of SHA256SUMS" in str(one.damages[0]) for one in wrong)
    (path / "config.json").unlink()
    assert [one.state for one in the_wrong(check_whole(path)) if "config" in one.file] == ["missing"]


@pytest.mark.parametrize(
    "kind", ["zero1", "trainer", "accelerate-zero", "composer", "composer-zero1", "dcp", "sharded"]
)
def test_what_was_compared_can_be_written_as_a_manifest(kind: str, tmp_path: Path) -> None:
    path = copy_kind(kind, tmp_path)
    found = check_whole(path, write_manifest=True)
    assert found.written
    for manifest in found.written:
        subprocess.run(["sha256sum", "-c", "--quiet", manifest], cwd=os.path.dirname(manifest), check=True)
    listed = sum(len(Path(one).read_text().splitlines()) for one in found.written)
    assert listed == len(found.files)
    assert not list(tmp_path.rglob("*.part"))
    again = check_whole(path)
    assert again.is_sound
    # A load finds the one in the checkpoint's folder; one above it holds for what lies there.
    compared = [one for one in again.files if any("sha256" in by for by in one.compared_by)]
    assert len(compared) >= 1


def test_a_manifest_keeps_what_another_listed_and_none_is_written_of_a_damaged_checkpoint(
    tmp_path: Path,
) -> None:
    path = Path(copy_kind("sharded", tmp_path))
    (path / "SHA256SUMS").write_text(f"{hashlib.sha256(b'mine').hexdigest()}  notes.txt\n")
    (path / "notes.txt").write_text("mine")
    check_whole(path, write_manifest=True)
    before = (path / "SHA256SUMS").read_text()
    assert "notes.txt" in before
    assert len(before.splitlines()) == 4
    flip(path / "model-00001-of-00002.safetensors", 700)
    found = check_whole(path, write_manifest=True)
    assert not found.is_sound
    assert found.written == ()
    assert (path / "SHA256SUMS").read_text() == before


def test_a_manifest_is_of_all_bytes_and_needs_a_store_that_takes_it(tmp_path: Path) -> None:
    path = copy_kind("composer", tmp_path)
    with pytest.raises(OptionError, match="all bytes"):
        check_whole(path, subset="5%", write_manifest=True)
    with serving(tmp_path) as server, pytest.raises(OptionError, match="no manifest"):
        check_whole(server.url("/" + KINDS["composer"]), write_manifest=True)


def test_a_manifest_is_written_into_a_store_of_fsspec(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    folder = Path(copy_kind("zero1", tmp_path)) / "step3"
    for file in folder.iterdir():
        memory.pipe_file(f"/verify/step3/{file.name}", file.read_bytes())
    try:
        options = {"cache_dir": str(tmp_path / "cache")}
        found = check_whole("memory://verify/step3", write_manifest=True, options=options)
        assert found.is_sound
        assert len(found.written) == 1
        assert len(memory.cat_file("/verify/step3/SHA256SUMS").splitlines()) == len(found.files)
        again = check_whole("memory://verify/step3", options=options)
        assert {one.compared_by for one in again.files} == {("zip CRC-32", "sha256 of SHA256SUMS")}
    finally:
        memory.rm("/verify", recursive=True)


def test_files_of_two_saves_are_a_problem_though_each_is_whole(tmp_path: Path) -> None:
    folder = Path(copy_kind("zero3", tmp_path)) / "step3"
    other = folder / "zero_pp_rank_2_mp_rank_00_model_states.pt"
    tree = torch.load(other, weights_only=False)
    torch.save({**tree, "global_steps": 2}, other)
    found = check_whole(folder)
    assert states(found) == {"whole": 8}
    assert not found.is_sound
    assert other.name in found.problems[0]


def test_the_parts_of_a_subset_are_all_of_it(tmp_path: Path) -> None:
    path = copy_kind("zero3", tmp_path)
    parts = [check_whole(path, subset=f"{number}/3") for number in (1, 2, 3)]
    whole = check_whole(path)
    assert all(0 < one.compared_bytes < whole.total_bytes for one in parts)
    assert sum(one.compared_bytes for one in parts) == whole.compared_bytes
    assert all(one.seed is None for one in parts)
    file = next((Path(path) / "step3").glob("bf16*rank_1*"))
    flip(file, max(read_index(file).storages, key=lambda one: one.nbytes).offset)
    assert sum(not check_whole(path, subset=f"{number}/3").is_sound for number in (1, 2, 3)) == 1


def test_a_random_subset_reads_less_and_its_seed_repeats_it(tmp_path: Path) -> None:
    torch.save({str(number): torch.rand(4096) for number in range(400)}, tmp_path / "copy.pt")
    size = os.path.getsize(tmp_path / "copy.pt")
    with serving(tmp_path) as server:
        url, options = server.url("/copy.pt"), {"cache_dir": str(tmp_path / "cache")}
        first = check_whole(url, subset="1%", options=options)
        before = server.sent_bytes
        again = check_whole(url, subset="1%", seed=first.seed, options=options)
        assert server.sent_bytes - before < size / 2
    assert first.seed is not None
    assert again.compared_bytes == first.compared_bytes
    assert size / 100 <= first.compared_bytes < size / 50
    assert [one.state for one in first.files] == ["in part"]
    assert check_whole(tmp_path / "copy.pt", subset="200KB", seed=1).compared_bytes >= 200_000


def test_a_remote_file_is_read_once_in_bounded_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1 << 20)
    torch.save({"a": torch.rand(1 << 20), "b": torch.rand(1 << 18)}, tmp_path / "copy.pt")
    size = os.path.getsize(tmp_path / "copy.pt")
    heard = []
    watch = Watch(lambda nbytes, files: heard.append(nbytes), heard.append, lambda verdict: heard.append(0))
    with serving(tmp_path) as server:
        options = {"cache_dir": str(tmp_path / "cache")}
        found = check_whole(server.url("/copy.pt"), options=options, watch=watch)
        assert server.sent_bytes < size + (1 << 20)
    assert found.is_sound
    assert sum(heard[1:]) == heard[0] <= size
    assert len(heard) > 6
    assert not [
        one for one in (tmp_path / "cache").rglob("*") if one.is_file() and one.stat().st_blocks * 512 > size
    ]


def test_headers_that_were_not_read_first_are_compared_too(tmp_path: Path) -> None:
    torch.save({str(number): torch.rand(1 << 16) for number in range(12)}, tmp_path / "copy.pt")
    data = bytearray((tmp_path / "copy.pt").read_bytes())
    place = data.index(b"copy/data/7")
    data[place] ^= 1
    (tmp_path / "copy.pt").write_bytes(data)
    with serving(tmp_path) as server:
        found = check_whole(server.url("/copy.pt"), options={"cache_dir": str(tmp_path / "cache")})
    (one,) = found.files
    assert "header of record data/7" in str(one.damages[0])


def test_checksums_of_the_store_are_compared(tmp_path: Path) -> None:
    import base64

    path = Path(copy_kind("safetensors", tmp_path))
    body = path.read_bytes()
    md5 = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
    served = Behaviour(body, headers={"Repr-Digest": f"md5=:{md5}:"})
    options = {"cache_dir": str(tmp_path / "cache")}
    with bad_server({"/model.safetensors": served}) as server:
        found = check_whole(server.url("/model.safetensors"), options=options)
        assert [(one.state, one.compared_by) for one in found.files] == [("whole", ("md5 of the store",))]
        served.body = body[:-1] + bytes([body[-1] ^ 1])
        served.etag = '"other"'
        (one,) = check_whole(server.url("/model.safetensors"), options=options).files
    # So small a file is compared as it is fetched to be opened.
    assert one.state == "damaged"
    assert "md5 of the store" in one.reason


def test_a_compressed_file_is_compared_with_its_own_checksum(tmp_path: Path) -> None:
    path = Path(copy_kind("composer", tmp_path))
    packed = tmp_path / "packed.pt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    (one,) = check_whole(packed).files
    assert (one.state, one.compared_by) == ("whole", ("gzip's own checksum",))


def test_a_server_without_ranges_is_read_whole_up_to_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(copy_kind("composer", tmp_path))
    served = Behaviour(path.read_bytes(), has_ranges=False)
    options = {"cache_dir": str(tmp_path / "cache")}
    with bad_server({"/a.pt": served}) as server:
        assert [one.state for one in check_whole(server.url("/a.pt"), options=options).files] == ["whole"]
        monkeypatch.setattr(reading, "WHOLE_BYTES", 1000)
        (one,) = check_whole(server.url("/a.pt"), options=options).files
    assert one.state == "nothing to compare with"
    assert "whole objects only" in one.reason


def test_torch_can_be_told_to_write_no_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": {"a": torch.rand(1000)}}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    (one,) = check_whole(tmp_path / "a.pt").files
    assert one.state in ("nothing to compare with", "damaged", "whole")
    assert one.state != "whole"


def test_a_file_that_may_not_be_read_is_an_error_and_no_verdict(tmp_path: Path) -> None:
    folder = Path(copy_kind("zero1", tmp_path)) / "step3"
    with serving(tmp_path) as server:
        name = "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt"
        refused = server.objects[f"/s1-w4/step3/{name}"]
        refused.needs, refused.head_status = lambda headers, query: False, 403
        with pytest.raises(AccessError, match=name):
            check_whole(server.url("/s1-w4/step3"), options={"cache_dir": str(tmp_path / "cache")})
    assert check_whole(folder).is_sound


def test_no_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom rankload.loader.wholeness.check import check_whole\n"
        "assert all(check_whole(path, write_manifest=True).is_sound for path in sys.argv[1:])\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    paths = [copy_kind(kind, tmp_path / kind) for kind in ("zero1", "dcp", "sharded", "composer-tar")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=60)
