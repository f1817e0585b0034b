"""What every request must pass before it reaches the page's code.

Host          is the address that we serve, or localhost: no other site's name may lead here (DNS rebinding)
Origin        is our own, where the browser sends one: no other site's script may ask (CSRF)
token         ``X-Token`` of every request to /api; it is in the URL's fragment, which is never sent or logged
size          a body is at most ``BODY`` bytes
rate          ``RATE`` requests a second from each address, bursts of ``BURST``
headers       only our own scripts and styles, no framing, no guessing of types, no cache, no referrer
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefenv.errors import ConfigError

BODY = 16 * 1024
RATE, BURST = 400.0, 1200.0  # twenty people behind one address, and then some
PEERS = 1024  # addresses whose rate is remembered
LOCAL = ("127.0.0.1", "localhost", "[::1]")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Bucket:
    """A token bucket for each name: ``rate`` a second, ``burst`` at once.

    Args:
        rate: Takes allowed each second.
        burst: Takes allowed at once.
        clock: Seconds, for tests.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self.rate, self.burst, self.clock = rate, burst, clock
        self.levels: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> bool:
        """Whether this name may go on now."""
        now = self.clock()
        level, since = self.levels.pop(name, (self.burst, now))
        level = min(self.burst, level + self.rate * (now - since))
        self.levels[name] = (level - 1 if level >= 1 else level, now)
        while len(self.levels) > PEERS:
            del self.levels[next(iter(self.levels))]  # the one seen longest ago
        return level >= 1


def secret(path: Path) -> str:
    """The token kept at ``path``, made at the first call, readable by the owner alone.

    It stays through restarts, so that a page which was left open goes on.
    """
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(32))
            with contextlib.suppress(FileExistsError):
                os.link(draft, path)  # whole or not at all, and never over another one
            draft.unlink()
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot keep the page's token at {path}: {error}") from None
    if len(token) < 32:
        raise ConfigError(f"{path} holds no token: remove it, and the next start makes a new one")
    return token


class Guard:
    """The ASGI application ``app`` behind all these checks.

    Args:
        app: What is guarded.
        token: What ``X-Token`` must be.
        exposed: Whether addresses of other interfaces of this machine are served too.
        bucket: The rate limit.
    """

    def __init__(self, app: Any, token: str, exposed: bool = False, bucket: Bucket | None = None):
        self.app, self.exposed, self._token = app, exposed, token.encode()
        self.bucket = bucket or Bucket(RATE, BURST)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # we have no web sockets
            await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        status, reason = self.verdict(scope)
        if reason:
            await refuse(guarded, status, reason)
            return
        await self.app(scope, receive, guarded)

    def verdict(self, scope: dict[str, Any]) -> tuple[int, str]:
        """Status and reason of a refusal; the reason is empty where the request may pass."""
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in (b"host", b"origin", b"x-token", b"content-length") and name in headers:
                return 400, f"two {name.decode()} headers"
            headers[name] = value
        if not self.bucket.take((scope.get("client") or ("",))[0]):
            return 429, "too many requests"
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if host not in self.hosts(scope["server"]):
            return 421, "this server does not go by this name"
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower() != f"http://{host}":
            return 403, "this page may not ask here"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > BODY:
            return 413, f"a body has at most {BODY} bytes"
        token = headers.get(b"x-token", b"")
        if scope["path"].startswith("/api") and not hmac.compare_digest(token, self._token):
            return 401, "wrong token: open the page by its whole link"
        return 200, ""

    def hosts(self, server: tuple[str, int]) -> set[str]:
        """The names that we go by, with the port; ``server`` is the address that was connected to."""
        address, port = server
        names = set(LOCAL)
        if self.exposed:
            names |= {f"[{address}]" if ":" in address else address}
        return {f"{name}:{port}" for name in names}


async def refuse(send: Any, status: int, reason: str) -> None:
    """Answer with a plain text."""
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})
