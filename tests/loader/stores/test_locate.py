from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from http_server import Served, counting_server
from rankload.loader.errors import CorruptError, FormatError, NotFoundError, UnsafeError
from rankload.loader.stores.locate import Located, locate
from rankload.loader.stores.open import open_store

MODEL = "mp_rank_00_model_states.pt"


def found(path: object) -> Located:
    store, name = open_store(str(path))
    return locate(store, name)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"x")
    assert found(path) == Located("file", str(path), str(path))


def test_a_file_without_a_suffix(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.write_bytes(b"x")
    assert found(path).form == "file"


def test_a_deepspeed_folder_by_latest_or_by_its_tag(tmp_path: Path) -> None:
    tag = tmp_path / "global_step3"
    tag.mkdir()
    (tag / MODEL).write_bytes(b"x")
    with pytest.raises(NotFoundError, match="is no checkpoint"):
        found(tmp_path)
    (tmp_path / "latest").write_text("global_step3\n")
    root = str(tmp_path)
    expected = Located("folder", str(tag), str(tag / MODEL), "global_step3", by_latest=True, root=root)
    assert found(tmp_path) == expected
    assert found(f"{tmp_path}/") == expected
    # A tag's folder holds what DeepSpeed saved, and nothing of a framework's.
    assert found(tag) == replace(expected, by_latest=False, root=None)


def test_stage_3_has_its_own_first_file(tmp_path: Path) -> None:
    (tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"x")
    assert found(tmp_path).first.endswith("zero_pp_rank_0_mp_rank_00_model_states.pt")


@pytest.mark.parametrize("head", [None, 405])
def test_over_http_nothing_is_listed(head: int | None) -> None:
    served = {
        "/run/latest": Served(b"step3", head_status=head),
        f"/run/step3/{MODEL}": Served(b"x" * 10_000, head_status=head),
    }
    with counting_server(served) as server:
        located = found(server.url("/run"))
        assert located.name == server.url("/run/step3")
        assert located.first == server.url(f"/run/step3/{MODEL}")


@pytest.mark.parametrize("text", ["../elsewhere", "a/../b", "..", ".", "/etc", "a\\b"])
def test_latest_names_a_folder_beside_it_and_nothing_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "latest").write_text(text)
    with pytest.raises(UnsafeError, match="expected the name of a folder beside it"):
        found(tmp_path)


@pytest.mark.parametrize(
    ("content", "tag"),
    [
        (b"epoch1/step3", "epoch1/step3"),
        (b"./step3", "step3"),
        (b"step3/\r\n", "step3"),
        (b"\xef\xbb\xbfstep3\n", "step3"),
        (b"epoch1//./step3/", "epoch1/step3"),
        (b"step #3 100%", "step #3 100%"),
    ],
)
def test_tags_as_deepspeed_and_people_write_them(tmp_path: Path, content: bytes, tag: str) -> None:
    (tmp_path / tag).mkdir(parents=True)
    (tmp_path / tag / MODEL).write_bytes(b"x")
    (tmp_path / "latest").write_bytes(content)
    assert (found(tmp_path).tag, found(tmp_path).first) == (tag, str(tmp_path / tag / MODEL))
    path = f"/run/{quote(tag)}/{MODEL}"
    with counting_server({"/run/latest": Served(content), path: Served(b"x")}) as server:
        located = found(server.url("/run?sig=a/b.pt"))
        assert (located.tag, located.first) == (tag, server.url(f"{path}?sig=a/b.pt"))
        # Its own URL is asked for as it is, before anything is made of it.
        assert server.requests[0].target == "/run?sig=a/b.pt"
        assert found(server.url(f"/run/{quote(tag)}/?sig=a/b.pt")).tag == tag.rpartition("/")[2]


@pytest.mark.parametrize("content", [b"", b"  \n", b"\xff\xfe", b"x" * 5000, b"\0\0\0", b"a\nb"])
def test_a_broken_latest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(CorruptError, match="latest"):
        found(tmp_path)


def test_a_tag_without_files(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step9")
    with pytest.raises(NotFoundError, match="names the tag 'step9', but"):
        found(tmp_path)


@pytest.mark.parametrize("first", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"])
def test_a_universal_checkpoint_has_native_model_files_and_is_refused(tmp_path: Path, first: str) -> None:
    tag = tmp_path / "step3_universal"
    (tag / "zero" / "head.weight").mkdir(parents=True)
    (tag / "zero" / "head.weight" / "fp32.pt").write_bytes(b"x")
    (tag / first).write_bytes(b"x")
    assert found(tag).form == "folder"
    (tag / "zero" / "optimizer_state.pt").write_bytes(b"x")
    (tmp_path / "latest").write_text(tag.name)
    for path in (tag, tmp_path):
        with pytest.raises(FormatError, match=r"step3_universal is a DeepSpeed universal checkpoint"):
            found(path)


def test_a_store_that_refuses_to_say_has_no_universal_checkpoint() -> None:
    served = {
        f"/step3/{MODEL}": Served(b"x"),
        "/step3/zero/optimizer_state.pt": Served(b"", status=403, head_status=403),
    }
    with counting_server(served) as server:
        assert found(server.url("/step3")).form == "folder"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("__3_0.distcp", "one file of a torch.distributed.checkpoint .*pass the folder"),
        ("adapter_config.json", "the settings of a PEFT adapter"),
    ],
)
def test_files_that_are_no_checkpoint_say_what_they_are(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    with pytest.raises(NotFoundError):
        found(path)
    path.write_bytes(b"{}")
    with pytest.raises(FormatError, match=kind):
        found(path)


@pytest.mark.parametrize(
    ("marker", "kind"),
    [
        ("latest_universal", "universal"),
        ("__0_0.distcp", "DCP.* not finished.* older checkpoint"),
        ("adapter_config.json", "a PEFT adapter's folder.* adapter_model.bin"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, marker: str, kind: str) -> None:
    (tmp_path / marker).write_text("{}")
    with pytest.raises(FormatError, match=kind):
        found(tmp_path)


SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
LISTED = tuple(f"{name}.index.json" for name in SINGLE)
SLICES = "shard-00001-model-00001-of-00003.safetensors"


@pytest.mark.parametrize("name", [*SINGLE, *LISTED, SLICES])
def test_a_folder_of_a_model_by_the_file_that_shows_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"x")
    form, place = ("file", path) if name in SINGLE else ("folder", tmp_path)
    expected = Located(form, str(place), str(path))
    assert found(tmp_path) == replace(expected, root=str(tmp_path))
    assert found(path) == expected


def test_the_index_comes_before_the_file_and_safetensors_before_pickles(tmp_path: Path) -> None:
    order = [LISTED[0], SINGLE[0], LISTED[1], SINGLE[1], LISTED[2], SINGLE[2], SLICES]
    for name in reversed(order):
        (tmp_path / name).write_bytes(b"x")
        assert found(tmp_path).first == str(tmp_path / name)
    (tmp_path / MODEL).write_bytes(b"x")
    assert found(tmp_path).first == str(tmp_path / MODEL)


def test_any_index_and_any_ranks_slices_mean_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ema.safetensors.index.json", "shard-00012-model-00002-of-00040.safetensors"):
        (tmp_path / name).write_bytes(b"x")
        assert found(tmp_path / name) == Located("folder", str(tmp_path), str(tmp_path / name))
        monkeypatch.chdir(tmp_path)
        assert found(name) == Located("folder", ".", name)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_models_folder_over_http(name: str) -> None:
    with counting_server({f"/m/{name}": Served(b"x")}) as server:
        located = found(server.url("/m"))
        assert located.first == server.url(f"/m/{name}")
        assert located.name == (server.url("/m") if name.endswith("json") else located.first)


def test_what_is_asked_of_a_deepspeed_folder_stays_the_same() -> None:
    with counting_server({f"/step3/{MODEL}": Served(b"x")}) as server:
        found(server.url("/step3"))
        assert [one.path for one in server.requests] == [
            "/step3/latest",
            f"/step3/{MODEL}",
            "/step3/zero/optimizer_state.pt",
        ]


def message(path: object, error: type[Exception] = NotFoundError) -> str:
    with pytest.raises(error) as told:
        found(path)
    return str(told.value)


def test_a_trainers_output_folder_names_what_lies_in_it(tmp_path: Path) -> None:
    for step in (8, 16, 24):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-8" / "latest").write_text("global_step8")
    (tmp_path / "checkpoint-16" / "optimizer.pt").write_bytes(b"x")
    (tmp_path / "checkpoint-16" / "saved_model.pt").write_bytes(b"x")
    (tmp_path / "checkpoint-24" / "model.safetensors").write_bytes(b"x")
    (tmp_path / "checkpoint-32").mkdir()
    (tmp_path / "checkpoint-32" / ".metadata").write_bytes(b"x")
    (tmp_path / "runs").mkdir()
    (tmp_path / "trainer_state.json").write_text("{}")
    told = message(tmp_path)
    assert "is no checkpoint: no 'latest' in it" in told
    assert (
        f"In {tmp_path} there is checkpoint-8 (a DeepSpeed folder), "
        "checkpoint-16 (a folder with optimizer.pt, saved_model.pt), checkpoint-24 (a model's folder), "
        "checkpoint-32 (a DCP folder), runs, trainer_state.json. "
        f"Pass one of them, such as {tmp_path}/checkpoint-32"
    ) in told


def test_what_a_wrong_folders_message_advises_can_be_loaded(tmp_path: Path) -> None:
    for name in ("step-9", "step-10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MODEL).write_bytes(b"x")
    for told in (message(tmp_path), message(f"{tmp_path}/")):
        advised = told.split("Pass one of them, such as ")[1]
        assert advised == f"{tmp_path}/step-10"
        assert found(advised).form == "folder"
    (tmp_path / "last.ckpt").write_bytes(b"x")
    (tmp_path / "latest").write_text("step-11")
    assert "names the tag 'step-11'" in message(tmp_path)
    assert f"In {tmp_path} there is last.ckpt, step-9 (a DeepSpeed folder)" in message(tmp_path)


def test_a_long_folder_shows_its_newest_checkpoints_and_counts_the_others(tmp_path: Path) -> None:
    for step in range(100, 120):
        (tmp_path / f"step{step}.pt").write_bytes(b"x")
    told = message(tmp_path)
    assert "step112.pt, step113.pt" in told
    assert "step119.pt and 12 more" in told
    assert "step111.pt" not in told


def test_a_name_that_is_not_there_shows_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    told = message(tmp_path / "last.pt")
    assert "there is no such object" in told
    assert f"In {tmp_path} there is last.ckpt. Did you mean {tmp_path}/last.ckpt?" in told
    assert f"There is no folder {tmp_path}/nun. In {tmp_path} there is" in message(tmp_path / "nun" / "a.pt")
    assert message(tmp_path / "last.ckpt" / "x.pt")  # below a file
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/empty is empty" in message(tmp_path / "empty")


def test_a_home_folder_is_expanded_unless_the_name_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.pt").write_bytes(b"x")
    assert found("~/a.pt").name == f"{tmp_path}/a.pt"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "a.pt").write_bytes(b"x")
    assert found("~/a.pt").name == "~/a.pt"


@pytest.mark.parametrize(("path", "told"), [("there/run", False), ("their/run", True)])
def test_a_bucket_that_is_not_there_is_said(path: str, *, told: bool) -> None:
    class Buckets(MemoryFileSystem):
        protocol = "s3"
        store: ClassVar[dict[str, Any]] = {}
        pseudo_dirs: ClassVar[list[str]] = ["", "/there"]

    store, name = open_store(path, Buckets(skip_instance_cache=True))
    with pytest.raises(NotFoundError) as error:
        locate(store, name)
    assert ("There is no bucket their: check its name" in str(error.value)) == told


@pytest.mark.parametrize("ranks", [1, 7, 1000])
def test_one_file_a_rank_is_found_by_its_names(tmp_path: Path, ranks: int) -> None:
    first = tmp_path / f"model_world_size_{ranks}_rank_0.pt"
    first.write_bytes(b"x")
    expected = Located("folder", str(tmp_path), str(first))
    assert found(tmp_path) == found(first) == expected
    config = tmp_path / "fsdp_config.json"
    for text in (json.dumps({"FSDP_version": 2, "world_size": ranks}), "none", "[" * 50_000):
        config.write_text(text)
        assert found(tmp_path) == expected


def test_the_number_of_ranks_is_asked_for_once_or_guessed_by_few_requests() -> None:
    names = {f"/run/model_world_size_{ranks}_rank_0.pt": Served(b"x") for ranks in (64, 512)}
    with counting_server(names) as server:
        located = found(server.url("/run"))
        assert located.first == server.url("/run/model_world_size_64_rank_0.pt")
        asked = {one.path for one in server.requests if "world_size" in one.path}
    assert len(asked) == 14
    names["/run/fsdp_config.json"] = Served(b'{"world_size": 512}')
    with counting_server(names) as server:
        assert found(server.url("/run")).first == server.url("/run/model_world_size_512_rank_0.pt")
        assert {one.path for one in server.requests if "world_size" in one.path} == {
            "/run/model_world_size_512_rank_0.pt"
        }
