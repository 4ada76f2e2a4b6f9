"""Loads from paths and servers of all kinds: signed URLs, streams without a length, folders behind a signature."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from http_server import Served, counting_server
from rankload.loader import CorruptError, NotFoundError, State, load, retries
from rankload.loader.receipt import Receipt

QUERIES = [
    "X-Amz-Signature=a%2Fb%2Bc%3D&X-Amz-Expires=60",
    "se=2026~01&sig=a+b/c==",
    "response-content-disposition=attachment%3Bfilename%3Da.pt",
    "file=x.gz",
    "",
]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF_S", 0.01)
    monkeypatch.setattr(retries, "DEFAULT_STALL_TIMEOUT_S", 2.0)


@pytest.fixture(scope="module")
def module() -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(500, 400)


@pytest.fixture(scope="module")
def data(module: torch.nn.Linear, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Large enough to come in parts, where a server does ranges."""
    path = tmp_path_factory.mktemp("saved") / "a.pt"
    torch.save({"model": module.state_dict()}, path)
    return path.read_bytes()


Restore = Callable[..., Receipt]


@pytest.fixture
def restore(module: torch.nn.Linear, tmp_path: Path) -> Restore:
    def run(path: str, **options: Any) -> Receipt:
        """The receipt of a load whose weights are right; where it fails, nothing was changed."""
        target = torch.nn.Linear(500, 400)
        before = target.weight.detach().clone()
        given = {"cache_dir": str(tmp_path / "cache"), **options}
        try:
            result = load(path, State(target), load_weights_only=True, progress_bar=False, options=given)
        except Exception:
            assert torch.equal(target.weight, before)
            raise
        assert torch.equal(target.weight, module.weight)
        return result.receipt

    return run


@pytest.mark.parametrize("head_status", [None, 403])
@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("path", ["/bucket//run%2F1/a~.pt", "/bucket/a%20b+c"])
def test_a_signed_url_is_asked_for_to_the_letter_and_no_other(
    data: bytes, restore: Restore, path: str, query: str, head_status: int | None
) -> None:
    served = Served(data, needs_query=query or None, head_status=head_status)
    with counting_server({path: served}) as server:
        server.missing = Served(status=404 if not query else 403)
        url = server.url(path) + (f"?{query}" if query else "")
        receipt = restore(url)
        assert receipt.path == server.url(path)
        if query:
            assert {one.target for one in server.requests} == {f"{path}?{query}"}
            # A GET says all that a HEAD would, and may be all that was signed.
            assert [one.method for one in server.requests] == ["GET"]


def test_a_compressed_file_at_a_signed_url(data: bytes, restore: Restore) -> None:
    served = Served(gzip.compress(data, 1), needs_query="sig=a%2Fb")
    with counting_server({"/a.pt.gz": served}) as server:
        restore(server.url("/a.pt.gz?sig=a%2Fb"))
        assert server.gets("/a.pt.gz") == 1


def test_a_chain_sends_a_signed_url_to_the_letter(data: bytes, restore: Restore, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    query = "sig=a%2Fb%2Bc%3D&se=x~"
    with counting_server({"/bucket/a%2Fb.pt": Served(data, needs_query=query)}) as server:
        options = {"simplecache": {"cache_storage": str(tmp_path / "simple")}}
        restore(
            f"simplecache::{server.url('/bucket/a%2Fb.pt')}?{query}",
            storage_options={**options, "http": {"skip_instance_cache": True}},
        )
        assert f"/bucket/a%2Fb.pt?{query}" in {one.target for one in server.requests}


@pytest.mark.parametrize("partitioned", [False, True])
def test_a_deepspeed_folder_behind_a_signature(
    module: torch.nn.Linear, restore: Restore, tmp_path: Path, partitioned: bool
) -> None:
    saved = {
        "module": module.state_dict(), "dp_world_size": 1, "mp_world_size": 1, "ds_version": "0.19.8",
        "ds_config": {}, "optimizer": None, "lr_scheduler": None, "param_shapes": None, "buffer_names": [],
        "global_steps": 1, "skipped_steps": 0, "global_samples": 1,
    }  # fmt: skip
    torch.save(saved, tmp_path / "saved.pt")
    # Stage 3's file name is the second that is asked for.
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if partitioned else "mp_rank_00_model_states.pt"
    query = "sv=1&sig=a/b%2Bc.pt"
    served = {
        "/run/latest": Served(b"epoch1/step3\n", needs_query=query),
        f"/run/epoch1/step3/{name}": Served((tmp_path / "saved.pt").read_bytes(), needs_query=query),
    }
    with counting_server(served) as server:
        server.missing = Served(status=403)
        receipt = restore(server.url(f"/run?{query}"))
        assert receipt.path == server.url("/run/epoch1/step3")
        assert {one.target.partition("?")[2] for one in server.requests} == {query}


@pytest.mark.parametrize(
    "kind", [{"chunked": True}, {"send_length": False}], ids=["chunked", "until it closes"]
)
def test_a_stream_without_a_length_comes_by_one_get(
    data: bytes, restore: Restore, kind: dict[str, bool]
) -> None:
    with counting_server({"/a.pt": Served(data, **kind), "/old": Served(data, **kind)}) as server:  # type: ignore[arg-type]
        receipt = restore(server.url("/a.pt"))
        assert server.gets("/a.pt") == 1
        assert "a.pt" in " ".join(receipt.notes)
        assert receipt.files[0].fetched_bytes == len(data)
        server.served["/a.pt"].head_status = 405
        restore(server.url("/a.pt"), verify="off")


@pytest.mark.parametrize("keep", [700_000, 100])
def test_a_stream_that_ends_early_is_found_out_by_the_file(data: bytes, restore: Restore, keep: int) -> None:
    with (
        counting_server({"/a.pt": Served(data[:keep], send_length=False)}) as server,
        pytest.raises(CorruptError, match=r"/a\.pt: "),
    ):
        restore(server.url("/a.pt"))
    with (
        counting_server({"/a.pt": Served(data, chunked=True, truncate_to=keep)}) as server,
        pytest.raises(CorruptError, match="the body ended early"),
    ):
        restore(server.url("/a.pt"), stall_timeout_s=1)


def test_a_server_that_answers_a_page_to_every_name(data: bytes, restore: Restore) -> None:
    with counting_server({"/a.pt": Served(data)}) as server:
        server.missing = Served(b"<!DOCTYPE html><html></html>", content_type="text/html")
        receipt = restore(server.url("/a.pt"))
        assert any("a.pt.sha256 is not in sha256sum's format" in note for note in receipt.notes)
        with pytest.raises(CorruptError, match="HTML page"):
            restore(server.url("/none.pt"))


def test_local_paths_of_all_kinds(data: bytes, restore: Restore, tmp_path: Path) -> None:
    folder = tmp_path / "run::1 100%"
    folder.mkdir()
    (folder / "ck0 #.pt").write_bytes(data)
    for path in (f"{folder}/ck0 #.pt", (folder / "ck{rank} #.pt").as_uri(), f"file:{folder}/ck0 #.pt"):
        assert restore(path).files[0].name == f"{folder}/ck0 #.pt"
    with pytest.raises(NotFoundError, match="is no checkpoint"):
        restore(f"{folder}/{'x' * 300}")
