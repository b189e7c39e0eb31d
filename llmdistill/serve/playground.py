"""The page at `/`: ask the model, see each token coloured by the layer that it left at, and move the budget.

One file, with nothing loaded from anywhere else. Its content security policy names the one script and the one style that may run by their digests, so that text
which a model or a client wrote can never become either.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

PAGE = Path(__file__).with_name("playground.html")


def playground() -> Response:
    """The page with its headers."""
    page = PAGE.read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _digest(page, "script"),
        "style-src": _digest(page, "style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }
    return Response(page, headers=headers, media_type="text/html")


def _digest(page: str, tag: str) -> str:
    """What is between the tags, as a content security policy names it."""
    [content] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
