"""GET /: the page that shows the instance at work. Its files are in the package, and nothing is asked of anybody else.

The files hold nothing of the instance, so that they need no key; what they show comes from /v1/events, which does.
"""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Scripts, styles and connections of this server alone; nothing inline, no frames, no forms that lead elsewhere.
POLICY = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
        "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    )
)  # fmt: skip
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Page:
    """Its files, in memory.

    Attributes:
        paths: where they are served: / and /page/NAME.
    """

    def __init__(self) -> None:
        files = sorted(one for one in FOLDER.iterdir() if one.suffix in TYPES)
        self._files = {
            "/" if one.name == "index.html" else f"/page/{one.name}": (TYPES[one.suffix], one.read_bytes())
            for one in files
        }
        self.paths = frozenset(self._files)

    async def serve(self, request: web.BaseRequest, headers: dict[str, str]) -> web.StreamResponse:
        """One of `paths`."""
        kind, body = self._files[request.path]
        return web.Response(body=body, headers={"Content-Type": kind, **HEADERS})
