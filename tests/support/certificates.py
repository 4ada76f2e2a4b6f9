"""A certificate for servers on this machine, and the authority that signed it."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from server_process import ServerMissing

BUNDLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""The variables by which clients are told whom to trust."""
_CONFIG = """
[req]
distinguished_name = name
prompt = no
[name]
CN = rankload's tests
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, digitalSignature, keyCertSign
subjectKeyIdentifier = hash
[server]
subjectAltName = IP:127.0.0.1
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


@dataclass(frozen=True)
class Certificate:
    server: Path
    """The server's own."""
    key: Path
    bundle: Path
    """What a client must trust."""


def make_certificate(folder: Path) -> Certificate:
    """Its files, new, in `folder`. Raises `ServerMissing` without openssl."""
    if shutil.which("openssl") is None:
        raise ServerMissing("openssl is not installed")
    (folder / "config").write_text(_CONFIG)
    made = Certificate(folder / "server.pem", folder / "key.pem", folder / "bundle.pem")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-config", "config")
    signed = (
        "-CA",
        made.bundle,
        "-CAkey",
        "authority.pem",
        "-set_serial",
        "2",
        "-days",
        "2",
        "-out",
        made.server,
    )
    for command in (
        ("req", "-x509", *key, "-extensions", "authority", "-keyout", "authority.pem", "-out", made.bundle),
        ("req", "-new", *key, "-subj", "/CN=server", "-keyout", made.key, "-out", "request.pem"),
        ("x509", "-req", "-in", "request.pem", "-extfile", "config", "-extensions", "server", *signed),
    ):
        subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True, timeout=60)
    return made
