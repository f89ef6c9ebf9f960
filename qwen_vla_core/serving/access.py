"""Who may talk to a policy server: loopback without a token, everything else only with one; TLS."""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
import ssl
from pathlib import Path

from qwen_vla_core.errors import UserError

TOKEN_VARIABLE = "QWEN_VLA_TOKEN"
MIN_TOKEN = 16  # characters; shorter ones can be guessed over a network
SCHEMES = ("bearer", "api-key")  # the second one is what openpi's clients send


def read_token(token: str = "", token_file: str = "", variable: str = TOKEN_VARIABLE) -> str:
    """The token from a flag, a file or the environment ``variable``, in this order; empty where there is none.

    Raises:
        UserError: the file cannot be read or is empty, or the token has characters that no header can carry.
    """
    if token and token_file:
        raise UserError("--token and --token-file: give one of them")
    source = "--token"
    if token_file:
        source = f"token file {token_file}"
        try:
            token = Path(token_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{source} cannot be read: {error}") from error
        if not token:
            raise UserError(f"{source} is empty")
    elif not token:
        source, token = variable, os.environ.get(variable, "").strip()
    if not token.isascii() or any(c.isspace() or not c.isprintable() for c in token):
        raise UserError(f"{source}: a token is printable ASCII without spaces")
    return token


def check_binding(
    host: str, token: str, flag: str = "--host", remedy: str = f"--token-file, --token or {TOKEN_VARIABLE}"
) -> None:
    """Refuses to serve the network without a token worth the name.

    Args:
        host: the address to bind; empty: all interfaces.
        token: what clients must show.
        flag: where the address was given, and ``remedy``, where a token can be: for the message.

    Raises:
        UserError: the address is not a loopback one and the token is missing or short, or nothing has this name.
    """
    if is_loopback(host, flag):
        return
    if not token:
        raise UserError(
            f"{flag} {host or '(all)'} is not a loopback address: give a token ({remedy}), or bind to 127.0.0.1"
        )
    if len(token) < MIN_TOKEN:
        raise UserError(f"the token has {len(token)} characters: use at least {MIN_TOKEN}, e.g. openssl rand -hex 32")


def is_loopback(host: str, flag: str = "--host") -> bool:
    """Whether every address of this name stays on this machine.

    Raises:
        UserError: nothing has this name.
    """
    if not host:
        return False  # all interfaces
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{flag} {host}: {error}") from error
    return all(ipaddress.ip_address(str(entry[4][0]).split("%")[0]).is_loopback for entry in found)


def authorised(header: str | None, token: str) -> bool:
    """Whether an ``Authorization`` header carries the token; takes the same time wherever the two differ."""
    if not token:
        return True
    scheme, _, given = (header or "").partition(" ")
    equal = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token.encode())
    return equal and scheme.lower() in SCHEMES


def server_tls(cert: str, key: str) -> ssl.SSLContext | None:
    """A server's context; None without a certificate.

    Raises:
        UserError: only one of the two is given, or they cannot be used.
    """
    if not cert and not key:
        return None
    if not cert or not key:
        raise UserError("--tls-cert and --tls-key belong together")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(Path(cert).expanduser(), Path(key).expanduser())
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"--tls-cert {cert}, --tls-key {key}: {error}") from error
    return context


def client_tls(url: str, ca_file: str = "") -> ssl.SSLContext | None:
    """A client's context, which checks the server's certificate and name; None for ``ws://``.

    Args:
        url: of the server.
        ca_file: certificate to trust instead of the system's, for a self-made one.

    Raises:
        UserError: the file cannot be used, or it is given for an unencrypted connection.
    """
    if not url.startswith("wss://"):
        if ca_file:
            raise UserError(f"server_ca_file is for wss://, but the server is {url}")
        return None
    try:
        return ssl.create_default_context(cafile=str(Path(ca_file).expanduser()) if ca_file else None)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"server_ca_file {ca_file}: {error}") from error
