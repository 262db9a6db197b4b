"""The page's files, read once: what is served at which path, and what a browser may do with it."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "page"
START = "index.html"
MEDIA_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}

# Only the page's own files run, and it talks to no other server: what a model writes cannot make it.
SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


@dataclass(frozen=True)
class PageFile:
    """One file as it is sent."""

    content: bytes
    headers: dict[str, str]

    @property
    def tag(self) -> str:
        """What tells this content from another, for browsers that have it already."""
        return self.headers["etag"]


@cache
def page_files() -> dict[str, PageFile]:
    """Every file by its path on the server: `/` is the page, what it needs lies under `/page/`."""
    files = {}
    for file in sorted(FOLDER.iterdir()):
        content = file.read_bytes()
        headers = {
            "content-type": f"{MEDIA_TYPES[file.suffix]}; charset=utf-8",
            "content-security-policy": SECURITY_POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            # Asked for again each time, answered with the tag alone: a new version is there at once, as a whole.
            "cache-control": "no-cache",
            "etag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        }
        files["/" if file.name == START else f"/page/{file.name}"] = PageFile(content, headers)
    return files
