"""Adds two pages to the service: one to try it, and its OpenAPI description in Swagger UI.

They load only files of this service; their Content-Security-Policy allows nothing else.
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
    # Addresses are relative, so both work behind a proxy that adds a prefix.
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
        policy = {"Content-Security-Policy": content_policy(content, more)}
        page = HTMLResponse(content, headers=policy)
        app.add_route(path, page, methods=["GET"], include_in_schema=False)
    # fastapi_offline ships Swagger UI, which FastAPI would load from a public server.
    app.mount("/docs/files", StaticFiles(packages=[("fastapi_offline", "static")]))


def content_policy(page: str, more: str) -> str:
    """Returns a Content-Security-Policy: the page's inline parts, local files, and `more`."""
    # A browser runs only inline parts whose hash is listed.
    loads = ["default-src 'none'"]
    for tag in ("script", "style"):
        sources = ["'self'"]
        for inline in re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
            if inline:  # a tag that loads a file is empty
                sources.append(f"'sha256-{digest}'")
        loads.append(f"{tag}-src {' '.join(sources)}")
    ends = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return "; ".join((*loads, "connect-src 'self'", more, ends))
