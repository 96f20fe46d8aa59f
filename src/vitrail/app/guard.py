"""Who may talk to the server: hosts it knows, pages it served itself, holders of the token when it is not on loopback.

A page on the web can make a browser send requests to 127.0.0.1. It cannot choose the Host header (so a name rebound to
127.0.0.1 is caught by it), cannot forge Origin, and cannot read answers, since no CORS header is ever sent.
"""

import ipaddress
import secrets
from collections.abc import Iterable
from urllib.parse import urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["LOOPBACK_HOSTS", "Guard", "is_loopback"]

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
COOKIE = "vitrail_token"
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware: refuses unknown hosts, other origins and missing tokens, and adds the security headers."""

    def __init__(self, app: ASGIApp, allowed_hosts: Iterable[str], token: str | None) -> None:
        self.app = app
        self.allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self.token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        answer = self._refusal(Request(scope)) or self.app
        await answer(scope, receive, send_guarded)

    def _refusal(self, request: Request) -> Response | None:
        host = _host_name(request.headers.get("host", ""))
        if host not in self.allowed_hosts:
            known = ", ".join(sorted(self.allowed_hosts))
            return _refuse(403, f"This server does not answer to the host {host!r}. It answers to: {known}.")
        if not _same_origin(request):
            return _refuse(403, "Another site asked. This server answers only the page that it served itself.")
        return self._without_token(request) if self.token else None

    def _without_token(self, request: Request) -> Response | None:
        assert self.token is not None
        given = request.query_params.get("token", "")
        if given and secrets.compare_digest(given.encode(), self.token.encode()):
            return self._welcome(request) if request.url.path == "/" else None
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        held = request.cookies.get(COOKIE, "") or bearer
        if secrets.compare_digest(held.encode(), self.token.encode()):
            return None
        return _refuse(401, "The token is missing or wrong. Open the whole address that `vitrail open` printed.")

    def _welcome(self, request: Request) -> Response:
        """Move the token from the address bar, where it would be shared with a copied link, into a cookie."""
        rest = [(key, value) for key, value in request.query_params.multi_items() if key != "token"]
        answer = RedirectResponse("/?" + urlencode(rest) if rest else "/", status_code=303)
        answer.set_cookie(COOKIE, self.token or "", httponly=True, samesite="strict")
        return answer


def _refuse(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status)


def _host_name(header: str) -> str:
    """The host of a Host header, without port and brackets; "" for one that does not parse."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _same_origin(request: Request) -> bool:
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        # A link or a bookmark on another site may open the page itself, never its data.
        return request.url.path == "/" and request.headers.get("sec-fetch-mode") == "navigate"
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")
