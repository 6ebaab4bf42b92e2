"""``/docs`` and ``/redoc`` from files of this machine: no page loads anything from elsewhere."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles

ASSETS = "/docs/assets"

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; "
    "worker-src 'self' blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; frame-ancestors 'none'"
}


def add_pages(api: FastAPI) -> None:
    """Add the documentation pages, their assets, and the redirection from ``/``."""
    package = find_spec("fastapi_offline")
    assert package is not None
    assert package.origin is not None
    # Before /docs, so that a request for an asset is not taken for a page.
    api.mount(ASSETS, StaticFiles(directory=Path(package.origin).parent / "static"), name="assets")
    icon = f"{ASSETS}/favicon.png"

    @api.get("/", include_in_schema=False)
    async def root(request: Request) -> RedirectResponse:
        return RedirectResponse(_below(request, "/docs"))

    @api.get("/docs", include_in_schema=False)
    async def swagger(request: Request) -> HTMLResponse:
        page = get_swagger_ui_html(
            openapi_url=_below(request, "/openapi.json"),
            title=f"{api.title}: HTTP interface",
            swagger_js_url=_below(request, f"{ASSETS}/swagger-ui-bundle.js"),
            swagger_css_url=_below(request, f"{ASSETS}/swagger-ui.css"),
            swagger_favicon_url=_below(request, icon),
            # Otherwise the page asks a validator on the internet about the document.
            swagger_ui_parameters={"validatorUrl": None, "displayRequestDuration": True},
        )
        return HTMLResponse(page.body, headers=_HEADERS)

    @api.get("/redoc", include_in_schema=False)
    async def redoc(request: Request) -> HTMLResponse:
        page = get_redoc_html(
            openapi_url=_below(request, "/openapi.json"),
            title=f"{api.title}: HTTP interface",
            redoc_js_url=_below(request, f"{ASSETS}/redoc.standalone.js"),
            redoc_favicon_url=_below(request, icon),
            with_google_fonts=False,
        )
        return HTMLResponse(page.body, headers=_HEADERS)


def _below(request: Request, path: str) -> str:
    return f"{request.scope.get('root_path', '').rstrip('/')}{path}"
