"""The HTML file: template, style, script and compressed data in one, under a policy that allows nothing else.

The Content-Security-Policy names the inline style and script by their SHA-256; the data is an inert block of base64
(gzip), and the script sets text by ``textContent`` only.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

__all__ = ["html"]

_SCRIPTS = ("graph.js", "layout.js", "canvas.js", "panels.js", "charts.js", "main.js")


def html(data: dict[str, Any]) -> str:
    """The page that shows ``data`` (see :func:`mlc.view.page.content.content`)."""
    style = _read("page.css")
    script = '"use strict";\n' + "\n".join(_read(name) for name in _SCRIPTS)
    packed = gzip.compress(json.dumps(data, separators=(",", ":")).encode(), 6, mtime=0)
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    return Template(_read("page.html")).substitute(
        title=escape(f"{data['title']} - mlc"), policy=escape(policy), style=style, script=script,
        data=base64.b64encode(packed).decode(),
    )  # fmt: skip


def _read(name: str) -> str:
    return (files("mlc.view.page") / name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
