"""Checkpoints loaded from real servers: nginx, two S3 servers, Azure Blob, GCS and SFTP.

Each is skipped, with the reason, where its server or its client is not installed: ``make servers`` installs them.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from modules_worker import Classifier, Squeezing, check_against_oracle, oracle_of, plain_job
from places import SUPPORT
from processes import run_ranks
from rankload.loader import AccessError, NotFoundError, State, load
from rankload.loader.stores.open import open_store
from store_contract import CONTRACT, NAME, SOURCE, Kept

pytest.importorskip("safetensors")

WORKER = str(SUPPORT / "stores_worker.py")
DEADLINE_S = 180


@dataclass(frozen=True)
class Place:
    """Where the checkpoints lie, and how a load gets in, or does not."""

    base: str
    options: Mapping[str, Any]
    refused: tuple[str, Mapping[str, Any]] | None
    """The base and options of somebody whom the server turns away; None where it lets everybody in."""
    secrets: tuple[str, ...] = field(default=(), repr=False)
    """What no message may show."""
    no_such_bucket: str | None = None


def on_nginx(request: pytest.FixtureRequest) -> Place:
    server = request.getfixturevalue("nginx_server")
    host = server.url.removeprefix("http://")
    return Place(
        f"http://{server.user}:{server.password}@{host}/private/checkpoints",
        {},
        (f"http://{server.user}:wrong-{server.password}@{host}/private/checkpoints", {}),
        (server.password,),
    )


def on_s3(name: str) -> Callable[[pytest.FixtureRequest], Place]:
    def place(request: pytest.FixtureRequest) -> Place:
        server = request.getfixturevalue(name)
        wrong = {**server.options, "secret": f"wrong-{server.secret_key}"}
        return Place(
            "s3://checkpoints",
            server.options,
            ("s3://checkpoints", wrong),
            (server.secret_key,),
            "s3://no-such",
        )

    return place


def on_azure(request: pytest.FixtureRequest) -> Place:
    server = request.getfixturevalue("azurite_server")
    # As long as the real one, and as well formed.
    other = server.key[::-1].lstrip("=") + "=="
    wrong = {"connection_string": server.options["connection_string"].replace(server.key, other)}
    return Place(
        "az://checkpoints", server.options, ("az://checkpoints", wrong), (server.key, other), "az://no-such"
    )


def on_gcs(request: pytest.FixtureRequest) -> Place:
    server = request.getfixturevalue("gcs_server")
    return Place("gs://checkpoints", server.options, None, (), "gs://no-such")


def on_sftp(request: pytest.FixtureRequest) -> Place:
    server = request.getfixturevalue("sftp_server")
    base = server.url(request.getfixturevalue("served_folder") / "checkpoints")
    stranger = {**server.options, "key_filename": str(server.stranger_key_file)}
    with_password = base.replace("sftp://", f"sftp://{server.user}:open-sesame@")
    return Place(base, server.options, (with_password, stranger), ("open-sesame",))


PLACES = {
    "nginx": on_nginx,
    "seaweedfs": on_s3("seaweedfs_server"),
    "hadro": on_s3("hadro_server"),
    "azure": on_azure,
    "gcs": on_gcs,
    "sftp": on_sftp,
}


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """A client that waits for ever fails its test."""

    def late(signum: int, frame: object) -> None:
        raise TimeoutError(f"the test took more than {DEADLINE_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(DEADLINE_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    return PLACES[request.param](request)


@pytest.fixture
def options(place: Place, tmp_path: Path) -> dict[str, Any]:
    return {"storage_options": place.options, "cache_dir": str(tmp_path / "cache")}


def test_composers_single_file(place: Place, options: dict[str, Any], served_folder: Path) -> None:
    name = "composer-monolithic-w2/ep2-ba8-rank0.pt"
    whole = torch.load(served_folder / "checkpoints" / name, weights_only=False)
    model = Squeezing()
    result = load(f"{place.base}/{name}", State(model, torch.optim.Adam(model.parameters())), options=options)
    for key, value in whole["state"]["model"].items():
        assert torch.equal(model.state_dict()[key.removeprefix("module.")], value), key
    assert result.receipt.unverified == ()
    for secret in place.secrets:
        assert secret not in json.dumps(result.receipt.as_dict())


def test_parts_of_a_larger_file(place: Place, options: dict[str, Any], served_folder: Path) -> None:
    whole = torch.load(served_folder / "checkpoints" / "larger.pt", weights_only=False)
    model = torch.nn.Linear(512, 1024)
    result = load(f"{place.base}/larger.pt", State(model), load_weights_only=True, options=options)
    for key, value in whole["state"]["model"].items():
        assert torch.equal(model.state_dict()[key], value), key
    (file,) = result.receipt.files
    weights = sum(value.nbytes for value in model.state_dict().values())
    assert weights <= file.fetched_bytes <= weights + (600 << 10) < file.size_bytes // 2
    optimizer = torch.optim.Adam(model.parameters())
    load(f"{place.base}/larger.pt", State(model, optimizer), options=options)
    saved = whole["state"]["optimizers"]["Adam"]["state"]
    assert torch.equal(optimizer.state[model.weight]["exp_avg_sq"], next(iter(saved.values()))["exp_avg_sq"])


def test_composers_archives_of_each_rank(place: Place, options: dict[str, Any], served_folder: Path) -> None:
    folder = "composer-zero1-w2"
    told = json.loads((served_folder / "checkpoints" / folder / "expected.json").read_text())
    model = Classifier()
    state = State(model, torch.optim.Adam(model.parameters(), lr=0.5))
    load(f"{place.base}/{folder}/ep1-ba4-rank{{rank}}.pt.tar", state, options=options)
    with torch.no_grad():
        found = model(torch.linspace(-1, 1, 64).reshape(8, 8))
    assert torch.allclose(found, torch.tensor(told["forward_of_linspace"]))
    assert state.timestamp["batch"] == 4


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeeds_folder(place: Place, options: dict[str, Any], served_folder: Path, stage: int) -> None:
    folder = f"s{stage}-w4"
    state = plain_job()
    load(f"{place.base}/{folder}", state, options=options)
    oracle = oracle_of(served_folder / "checkpoints" / folder)
    check_against_oracle(state, oracle, low=False, weights_only=False)


def test_what_is_not_there(place: Place, options: dict[str, Any]) -> None:
    bases = [
        f"{place.base}/s1-w4/no-such",
        place.base if place.no_such_bucket is None else place.no_such_bucket,
    ]
    for base in bases:
        with pytest.raises(NotFoundError) as caught:
            load(f"{base}/ep1-rank{{rank}}.pt", plain_job(), options=options)
        assert "ep1-rank0.pt" in str(caught.value)
        assert ("There is no bucket no-such" in str(caught.value)) == base.endswith("://no-such")
        assert not [secret for secret in place.secrets if secret in str(caught.value)]


def test_wrong_credentials(place: Place, options: dict[str, Any]) -> None:
    if place.refused is None:
        pytest.skip("the server lets everybody in")
    base, options["storage_options"] = place.refused
    with pytest.raises(AccessError, match="check the credentials") as caught:
        load(f"{base}/composer-monolithic-w2/ep2-ba8-rank0.pt", plain_job(), options=options)
    error: BaseException | None = caught.value
    while error is not None:
        assert not [secret for secret in place.secrets if secret in f"{error} {error!r}"]
        error = error.__cause__


def test_two_ranks_agree(hadro_server: Any, tmp_path: Path, served_folder: Path) -> None:
    """What a rank finds, both find: the checkpoint, that it is not there, that the store says no."""
    variables = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH", "")])),
        "STORAGE_OPTIONS": json.dumps(hadro_server.options),
    }
    finished = run_ranks(
        f"{WORKER}:main",
        2,
        args=(tmp_path / "cache", served_folder / "checkpoints"),
        deadline_s=120,
        env=variables,
    )
    assert [rank.returncode for rank in finished] == [0, 0], finished
    for rank in finished:
        assert rank.stdout.splitlines()[-3:] == ["restored", "NotFoundError", "AccessError"]
        assert hadro_server.secret_key not in rank.stdout + rank.stderr


@pytest.mark.parametrize("part", CONTRACT)
def test_it_keeps_the_contract_of_stores(place: Place, part: str, tmp_path: Path) -> None:
    store, name = open_store(f"{place.base}/{SOURCE.name}/{NAME}", None, place.options)
    (tmp_path / "out").mkdir()
    CONTRACT[part](Kept(store, name), tmp_path / "out" / "x")
    store.close()
