"""What every test can rely on."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import signal
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import real_servers
from certificates import Certificate, make_certificate
from framework_jobs import Publish, Published, in_s3, on_the_web
from hypothesis import HealthCheck, settings
from places import DATA
from server_process import ServerMissing, or_skip
from zero_folders import unpack_zero

# No test puts anything into the folder in memory that real loads share, unless it says so.
os.environ["RANKLOAD_CACHE_HOME"] = "disk"

# The same examples on every machine, however busy it is: a failure is of the change. `TEST_ALL` looks further.
settings.register_profile(
    "rankload",
    deadline=None,
    derandomize=os.environ.get("TEST_ALL") is None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("rankload")

# A shell that runs the tests in the background starts them with Ctrl-C ignored, and their processes inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


SKIPPED = {
    "whole_jobs": (("TEST_LAUNCHERS", "TEST_ALL"), "takes minutes with the others: make test-launchers"),
    "takes_long": (("TEST_ALL",), "takes long: make test-all"),
}
"""By their mark, the tests that are skipped unless one of these variables is set, and the reason."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is `SKIPPED`, and puts the files first whose tests run ranks: those take longest, and begun last they
    would leave workers idle."""
    for mark, (variables, reason) in SKIPPED.items():
        if not any(map(os.environ.get, variables)):
            for item in items:
                if item.get_closest_marker(mark) is not None:
                    item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: not (isinstance(item, pytest.Function) and _runs_ranks(item.module)))


@functools.cache
def _runs_ranks(module: ModuleType) -> bool:
    """Whether it starts ranks by itself, or by what it has from tests/support."""
    homes = {getattr(value, "__module__", None) for value in vars(module).values()}
    return any(hasattr(one, "run_ranks") for one in (module, *map(sys.modules.get, filter(None, homes))))


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of tests/data as servers offer them, in the folder (or bucket) ``checkpoints`` of this one."""
    root = tmp_path_factory.mktemp("served")
    target = root / "checkpoints"
    for name in ("composer-monolithic-w2", "composer-zero1-w2", "composer-zero3-w2"):
        shutil.copytree(DATA / name, target / name)
    for stage in (1, 3):
        unpack_zero(stage, target)
    save_larger(target / "larger.pt")
    return root


def save_larger(path: Path) -> None:
    """A file of which a load of weights takes a third: large enough to be fetched in parts."""
    import torch
    from rankload.loader import State

    torch.manual_seed(3)
    module = torch.nn.Linear(512, 1024)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, 512)).sum().backward()
    optimizer.step()
    torch.save({"state": State(module, optimizer).state_dict()}, path)


@pytest.fixture(scope="session")
def servers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where real servers keep what is theirs."""
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def certificate(servers_folder: Path) -> Certificate:
    """Of a server on this machine, with the bundle that vouches for it."""
    folder = servers_folder / "certificate"
    folder.mkdir()
    try:
        return make_certificate(folder)
    except ServerMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture
def encrypted(certificate: Certificate) -> ssl.SSLContext:
    """What a server of Python's wraps its socket in."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(certificate.server, certificate.key)
    return made


@pytest.fixture(scope="session")
def nginx_server(served_folder: Path, servers_folder: Path) -> Iterator[real_servers.Nginx]:
    with or_skip(real_servers.nginx(served_folder, servers_folder)) as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs_server(served_folder: Path, servers_folder: Path) -> Iterator[real_servers.S3Server]:
    """With the bucket ``checkpoints``."""
    pytest.importorskip("s3fs")
    with or_skip(real_servers.seaweedfs(servers_folder)) as server:
        fill("s3", server.options, served_folder)
        yield server


@pytest.fixture(scope="session")
def hadro_server(served_folder: Path, servers_folder: Path) -> Iterator[real_servers.S3Server]:
    """With the bucket ``checkpoints``, read only."""
    pytest.importorskip("s3fs")
    with or_skip(real_servers.hadro(served_folder, servers_folder)) as server:
        yield server


@pytest.fixture(scope="session")
def azurite_server(served_folder: Path, servers_folder: Path) -> Iterator[real_servers.AzureServer]:
    """With the container ``checkpoints``."""
    pytest.importorskip("adlfs")
    with or_skip(real_servers.azurite(servers_folder)) as server:
        fill("az", server.options, served_folder)
        yield server


@pytest.fixture(scope="session")
def gcs_server(served_folder: Path, servers_folder: Path) -> Iterator[real_servers.GcsServer]:
    """With the bucket ``checkpoints``."""
    # Otherwise gcsfs asks what kind of bucket it is over gRPC and TLS, which the server does not speak, for a minute.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs")
    with or_skip(real_servers.fake_gcs(served_folder, servers_folder)) as server:
        yield server


@pytest.fixture(scope="session")
def sftp_server(servers_folder: Path) -> Iterator[real_servers.SftpServer]:
    pytest.importorskip("paramiko")
    with or_skip(real_servers.sftp(servers_folder)) as server:
        yield server


_published = itertools.count()


@pytest.fixture
def published(request: pytest.FixtureRequest) -> Publish:
    """Puts a checkpoint where ``http`` or ``s3`` finds it; as a ``file`` it stays where it is."""

    def publish(scheme: str, path: Path) -> contextlib.AbstractContextManager[Published]:
        if scheme == "http":
            return on_the_web(path)
        if scheme == "s3":
            server = request.getfixturevalue("seaweedfs_server")
            return contextlib.nullcontext(in_s3(path, server, f"published-{next(_published)}"))
        return contextlib.nullcontext(Published(str(path)))

    return publish


def fill(protocol: str, options: dict[str, Any], folder: Path) -> None:
    """Copies the folders of `folder` into a store, as buckets."""
    import fsspec

    store = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
    for bucket in sorted(path for path in folder.iterdir() if path.is_dir()):
        store.mkdir(bucket.name)
        files = [str(path) for path in sorted(bucket.rglob("*")) if path.is_file()]
        store.put(files, [f"{bucket.name}/{Path(name).relative_to(bucket)}" for name in files])
