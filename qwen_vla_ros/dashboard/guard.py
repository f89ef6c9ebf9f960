"""Who may look at the page and press its buttons. No ROS in here.

Without a token the server listens on loopback only, and every browser of this computer may use it; but not every *page*
in such a browser: a request that another site caused (its ``Origin``, ``Sec-Fetch-Site``), or that arrived under a name
that is not this computer's own (DNS rebinding), is refused. With a token every request must carry it in
``Authorization``, or come with the cookie that was given in exchange for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
import time
from urllib.parse import urlsplit

from aiohttp import web

from qwen_vla_core.serving.access import authorised

SESSION_S = 12 * 3600.0
MAX_SESSIONS = 64
WRONG_DELAY_S = 0.5  # an answer to a wrong token; guessing 16 characters was hopeless before
MAX_WAITING = 8  # wrong tokens being answered at once
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "Server": "qwen_vla",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Guard:
    """Checks requests; keeps the sessions of browsers that have shown the token.

    Args:
        token: what must be shown; empty: the server is on loopback, and nothing must.
        secure: whether the connection is encrypted, so that the cookie may say so.
    """

    def __init__(self, token: str, secure: bool = False) -> None:
        self._token = token
        self._secure = secure
        self._sessions: dict[bytes, float] = {}
        self._waiting = 0

    def check_site(self, request: web.BaseRequest) -> None:
        """Refuses what another site's page caused.

        Raises:
            HTTPForbidden: it was.
        """
        if not self._token and not _is_own_name(request.host):
            raise web.HTTPForbidden(text=f"open the dashboard as http://127.0.0.1, not as {request.host!r}")
        site = request.headers.get("Sec-Fetch-Site", "none")
        if site not in ("same-origin", "none"):
            raise web.HTTPForbidden(text="another site's page asked for this")
        origin = request.headers.get("Origin")
        if origin is not None and _place(origin) != request.host.lower():
            raise web.HTTPForbidden(text=f"origin {origin!r} is another site")

    def check_token(self, request: web.BaseRequest) -> None:
        """Refuses who has not shown the token.

        Raises:
            HTTPUnauthorized: no or a wrong token, and no session.
        """
        if authorised(request.headers.get("Authorization"), self._token) or self._has_session(request):
            return
        raise web.HTTPUnauthorized(text="token needed", headers={"WWW-Authenticate": "Bearer"})

    def _has_session(self, request: web.BaseRequest) -> bool:
        given = request.cookies.get(_cookie(request))
        if not given:
            return False
        until = self._sessions.get(_digest(given))
        return until is not None and time.monotonic() < until

    async def login(self, request: web.BaseRequest, token: object) -> web.Response:
        """A session for the right token; a wrong one is answered slowly.

        Raises:
            HTTPUnauthorized: it is wrong; HTTPTooManyRequests: and so are many others just now.
        """
        given = token.encode("utf-8", "surrogateescape") if isinstance(token, str) else b""
        if not hmac.compare_digest(given, self._token.encode()):
            if self._waiting >= MAX_WAITING:
                raise web.HTTPTooManyRequests(text="too many wrong tokens; wait a moment")
            self._waiting += 1
            try:
                await asyncio.sleep(WRONG_DELAY_S)
            finally:
                self._waiting -= 1
            raise web.HTTPUnauthorized(text="this is not the token")
        response = web.json_response({"ok": True})
        if self._token:
            response.set_cookie(
                _cookie(request),
                self._new_session(),
                max_age=int(SESSION_S),
                httponly=True,
                secure=self._secure,
                samesite="Strict",
                path="/",
            )
        return response

    def _new_session(self) -> str:
        now = time.monotonic()
        kept = [(digest, until) for digest, until in self._sessions.items() if until > now]
        self._sessions = dict(kept[-(MAX_SESSIONS - 1) :])
        session = secrets.token_urlsafe(32)
        self._sessions[_digest(session)] = now + SESSION_S
        return session


def _digest(session: str) -> bytes:
    """Sessions are looked up by digest, so that how long a look-up takes tells nothing about them."""
    return hashlib.sha256(session.encode("utf-8", "surrogateescape")).digest()


def _cookie(request: web.BaseRequest) -> str:
    """Cookies do not know ports: two dashboards on one host need two names."""
    try:
        port = urlsplit(f"//{request.host}").port or 0
    except ValueError:
        port = 0
    return f"qwen_vla_dashboard_{port}"


def _place(origin: str) -> str:
    """Host and port of an origin; of nonsense, one that no request has."""
    try:
        return urlsplit(origin).netloc.lower() or "none"
    except ValueError:
        return "none"


def _is_own_name(host: str) -> bool:
    """Whether a Host header names this computer itself, whatever the port (which a tunnel may change)."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
