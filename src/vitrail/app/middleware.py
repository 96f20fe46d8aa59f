"""Access control: known hosts, pages that the server sent itself, and the token when it is not on loopback; and the
refusal of answers from a study that is another by now.

A page on the web can make a browser send requests to 127.0.0.1. It cannot choose the Host header (so a name rebound to
127.0.0.1 is caught by it), cannot forge Origin, and cannot read answers, since no CORS header is ever sent.
"""

import ipaddress
import secrets
from collections.abc import Callable, Iterable
from urllib.parse import urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitrail.app.answers import refusal

__all__ = ["ALL_ADDRESSES", "HEADERS", "LOOPBACK_HOSTS", "AccessMiddleware", "ChangedStudyMiddleware", "is_loopback"]

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
ALL_ADDRESSES = ("0.0.0.0", "::")  # noqa: S104
"""Hosts that stand for every address of a machine."""

FROM_STUDY = ("/api/", "/thumb/", "/photo/")
COOKIE = "vitrail_token_{port}"
"""With the port that a visitor asks: a browser sends a machine's cookies to all of its ports."""
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
    """Whether a host can be reached from this machine only.

    Args:
        host: A name or an IP address, without port and brackets.

    Returns:
        True for localhost and loopback addresses.
    """
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class AccessMiddleware:
    """ASGI middleware: refuses unknown hosts, other origins and missing tokens, and adds the security headers."""

    def __init__(self, app: ASGIApp, allowed_hosts: Iterable[str], token: str | None) -> None:
        """Wrap an application.

        Args:
            app: The application behind it.
            allowed_hosts: Names in the Host header that are answered. With a token, one of `ALL_ADDRESSES` among them
                allows every IP address: a name that is rebound is never one.
            token: A secret that every visitor must have, or None.
        """
        self.app = app
        self.allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self.token = token
        self.allows_addresses = token is not None and not self.allowed_hosts.isdisjoint(ALL_ADDRESSES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        response = self._refusal(Request(scope)) or self.app
        await response(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        host = _host_name(request.headers.get("host", ""))
        if host not in self.allowed_hosts and not (self.allows_addresses and _is_address(host)):
            names = ", ".join(sorted(self.allowed_hosts))
            return refusal(403, f"This server does not answer to the host {host!r}. It answers to: {names}.")
        if not _same_origin(request):
            return refusal(403, "Another site asked. This server answers only the page that it served itself.")
        return self._check_token(request) if self.token else None

    def _check_token(self, request: Request) -> Response | None:
        assert self.token is not None
        from_address = request.query_params.get("token", "")
        if from_address and secrets.compare_digest(from_address.encode(), self.token.encode()):
            return self._move_token_to_cookie(request) if request.url.path == "/" else None
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        token = request.cookies.get(_cookie_name(request), "") or bearer
        if secrets.compare_digest(token.encode(), self.token.encode()):
            return None
        return refusal(401, "The token is missing or wrong. Open the whole address that `vitrail open` printed.")

    def _move_token_to_cookie(self, request: Request) -> Response:
        """Take the token out of the address bar, where it would be shared with a copied link."""
        rest = [(key, value) for key, value in request.query_params.multi_items() if key != "token"]
        response = RedirectResponse("/?" + urlencode(rest) if rest else "/", status_code=303)
        response.set_cookie(_cookie_name(request), self.token or "", httponly=True, samesite="strict")
        return response


class ChangedStudyMiddleware:
    """ASGI middleware: refuses every answer that was read from a study which is no longer the one that was opened.

    It looks when an answer is ready, for the study may have changed while it was being read.
    """

    def __init__(self, app: ASGIApp, reason: Callable[[], str]) -> None:
        """Wrap an application.

        Args:
            app: The application behind it.
            reason: Says in a sentence what has changed; empty while nothing has.
        """
        self.app = app
        self.reason = reason

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(FROM_STUDY):
            await self.app(scope, receive, send)
            return
        is_refused = False

        async def send_unless_changed(message: Message) -> None:
            nonlocal is_refused
            if message["type"] == "http.response.start" and (sentence := self.reason()):
                is_refused = True
                await refusal(409, sentence)(scope, receive, send)
            if not is_refused:
                await send(message)

        await self.app(scope, receive, send_unless_changed)


def _host_name(header: str) -> str:
    """The host of a Host header, without port and brackets; "" for one that does not parse."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _cookie_name(request: Request) -> str:
    """The cookie of this server among all of its machine; of an address without a port that of port 80 or 443."""
    try:
        port = urlsplit(f"//{request.headers.get('host', '')}").port
    except ValueError:
        port = None
    return COOKIE.format(port=port or {"https": 443}.get(request.url.scheme, 80))


def _same_origin(request: Request) -> bool:
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        # A link or a bookmark on another site may open the page itself, never its data.
        return request.url.path == "/" and request.headers.get("sec-fetch-mode") == "navigate"
    origin = request.headers.get("origin")
    if origin is None:
        return True
    try:
        return urlsplit(origin).netloc == request.headers.get("host")
    except ValueError:  # brackets that do not close: no browser sends it
        return False
