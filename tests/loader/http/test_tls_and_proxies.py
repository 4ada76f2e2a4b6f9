"""What the environment says of certificates and proxies holds for every request of a load."""

from __future__ import annotations

import gzip
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from bad_server import BadServer, Behaviour, bad_server
from certificates import BUNDLES, Certificate
from forward_proxy import forward_proxy
from rankload.loader import AccessError, State, load
from rankload.loader.http.addresses import Origin
from rankload.loader.http.connections import Connections
from real_servers import counted
from server_process import or_skip

NAMES = ("/parts.pt", "/whole.pt.gz")
"""One that comes by ranges, and one that comes whole."""


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in (*BUNDLES, "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


@dataclass(frozen=True)
class Saved:
    module: torch.nn.Linear
    objects: dict[str, Behaviour]

    def check(self, server: BadServer, name: str, folder: Path) -> None:
        self.load(server.url(name), folder)

    def load(self, url: str, folder: Path, more: Mapping[str, Any] | None = None) -> None:
        target = torch.nn.Linear(512, 512)
        options = {"cache_dir": str(folder / "cache"), **(more or {})}
        load(url, State(target), load_weights_only=True, progress_bar=False, options=options)
        assert torch.equal(target.weight, self.module.weight)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    path = tmp_path_factory.mktemp("saved") / "a.pt"
    module = torch.nn.Linear(512, 512)
    torch.save({"model": module.state_dict()}, path)
    data = path.read_bytes()
    bodies = (data, gzip.compress(data, 1))
    return Saved(module, {name: Behaviour(body) for name, body in zip(NAMES, bodies, strict=True)})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variable", BUNDLES)
def test_the_environments_certificates(
    saved: Saved,
    encrypted: ssl.SSLContext,
    certificate: Certificate,
    name: str,
    variable: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with bad_server(saved.objects, encrypted) as server:
        monkeypatch.setenv(variable, str(certificate.bundle))
        saved.check(server, name, tmp_path)
        assert any(one.range for one in server.asked) == (name == "/parts.pt")


@pytest.mark.parametrize("name", NAMES)
def test_a_certificate_that_nobody_vouches_for(
    saved: Saved, encrypted: ssl.SSLContext, name: str, tmp_path: Path
) -> None:
    with bad_server(saved.objects, encrypted) as server:
        with pytest.raises(AccessError, match="certificate verify failed"):
            saved.check(server, name, tmp_path)
        assert server.asked == []


@pytest.mark.parametrize("name", NAMES)
def test_the_bundle_that_is_for_s3_alone(
    saved: Saved,
    certificate: Certificate,
    seaweedfs_server: Any,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = f"tls{NAMES.index(name)}"
    files = fsspec.filesystem("s3", **seaweedfs_server.options)
    files.mkdir(bucket)
    files.pipe_file(f"{bucket}{name}", saved.objects[name].body)
    with or_skip(counted(seaweedfs_server.endpoint, tmp_path, certificate=certificate)) as front:
        options = {"storage_options": replace(seaweedfs_server, endpoint=front.url).options}
        with pytest.raises(AccessError, match="certificate"):
            saved.load(f"s3://{bucket}{name}", tmp_path, options)
        assert front.sent() == []
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate.bundle))
        # fsspec hands out a client that was made before.
        fsspec.filesystem("s3", **options["storage_options"]).clear_instance_cache()
        saved.load(f"s3://{bucket}{name}", tmp_path, options)
        gets = [status for method, _, status, _ in front.sent() if method == "GET"]
        assert (206 in gets) == (name == "/parts.pt")


@pytest.mark.parametrize("name", NAMES)
def test_a_proxy_for_http(saved: Saved, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with bad_server(saved.objects) as server, forward_proxy() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        saved.check(server, name, tmp_path)
        assert {target for _, target in proxy.asked} >= {server.url(name)}
        # All that the server was asked for came by the proxy.
        n_gets = sum(method == "GET" for method, _ in proxy.asked)
        assert n_gets == len(server.asked)


@pytest.mark.parametrize("name", NAMES)
def test_a_proxy_for_https(
    saved: Saved,
    encrypted: ssl.SSLContext,
    certificate: Certificate,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with bad_server(saved.objects, encrypted) as server, forward_proxy() as proxy:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.bundle))
        monkeypatch.setenv("https_proxy", proxy.url)
        saved.check(server, name, tmp_path)
        assert set(proxy.asked) == {("CONNECT", f"127.0.0.1:{server.port}")}
        assert len(proxy.asked) >= len({one.client_port for one in server.asked})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_for_the_proxy(
    saved: Saved, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bad_server(saved.objects) as server, forward_proxy() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "example.org,127.0.0.1")
        saved.check(server, name, tmp_path)
        assert (proxy.asked, bool(server.asked)) == ([], True)


def test_objects_share_connections_whoever_is_trusted(saved: Saved, tmp_path: Path) -> None:
    bundle = str(tmp_path / "bundle.pem")
    connections = Connections()
    trusting = connections.trusting(bundle)
    assert trusting is connections.trusting(bundle)
    assert trusting is not connections.trusting(False)
    assert connections.trusting(None) is connections
    with bad_server(saved.objects) as server:
        plain = Origin("http", "127.0.0.1", int(server.url("").rpartition(":")[2]))
        # No bundle is read for what is not encrypted.
        connection = trusting.take(plain)
        connection.http.request("GET", NAMES[0])
        connection.http.getresponse().read()
        trusting.give_back(connection)
        assert connections.trusting(bundle).take(plain) is connection
        trusting.give_back(connection)
        connections.close()
        assert connection.http.sock is None
    with pytest.raises(AccessError, match=re.escape(bundle)):
        trusting.take(Origin("https", "127.0.0.1", 1))
