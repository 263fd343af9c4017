"""The service's two pages for people: one to try it, and its OpenAPI description in Swagger UI.

All that they load comes from this service, and their Content-Security-Policy allows nothing else.
"""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")


def add_pages(app: FastAPI) -> None:
    """Adds `/`, a page to try the service, and `/docs`, its OpenAPI description."""
    # Addresses are relative, so that both work behind a proxy that adds a prefix.
    docs = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=f"{app.title}: the API",
        swagger_js_url="docs/files/swagger-ui-bundle.js",
        swagger_css_url="docs/files/swagger-ui.css",
        swagger_favicon_url="docs/files/favicon.png",
        swagger_ui_parameters={"validatorUrl": None},  # the default is a public validator
    )
    pages = {
        "/": (PAGE, "media-src blob:"),
        "/docs": (bytes(docs.body).decode(), "img-src 'self' data:"),
    }
    for path, (content, more) in pages.items():
        page = HTMLResponse(
            content, headers={"Content-Security-Policy": content_policy(content, more)}
        )
        app.add_route(path, page, methods=["GET"], include_in_schema=False)
    app.mount("/docs/files", StaticFiles(packages=[("fastapi_offline", "static")]))


def content_policy(page: str, more: str) -> str:
    """Returns a Content-Security-Policy: the page's inline parts, local files, and `more`."""
    sources = {}
    for tag in ("script", "style"):
        inline = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page, re.DOTALL)
        hashes = [
            base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            for text in inline
            if text
        ]
        sources[tag] = " ".join(["'self'", *(f"'sha256-{each}'" for each in hashes)])
    loads = (
        f"script-src {sources['script']}",
        f"style-src {sources['style']}",
        "connect-src 'self'",
        more,
    )
    return "; ".join(
        (
            "default-src 'none'",
            *loads,
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
