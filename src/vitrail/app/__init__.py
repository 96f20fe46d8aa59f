"""The local web application: a server without torch, and the page it serves (built from `web/` into `static/`)."""

from vitrail.app.server import create_app, serve

__all__ = ["create_app", "serve"]
