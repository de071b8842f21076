"""The page over HTTP: to this machine alone, with nothing from other hosts, and no files but what visitors uploaded."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmclip.demo.session import Session

__all__ = ["HOST", "PORT", "build_app", "listen", "require_gradio", "serve"]

HOST = "127.0.0.1"
PORT = 7860
SLACK = 1_000_000  # bytes of a request besides an upload

# The browser asks no other host, whatever Gradio's page refers to, and nobody shows the page inside another.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)

HEADERS = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]

Asgi = Callable[..., Any]


def require_gradio() -> None:
    """Raise ValueError where Gradio is not installed."""
    if find_spec("gradio") is None:
        raise ValueError("the demo needs Gradio: pip install 'ssmclip[demo]'")


def listen(port: int = PORT) -> socket.socket:
    """Return a socket of this machine that nobody else has. port: 0 for any. Raises ValueError for one in use."""
    if not 0 <= port <= 65535:
        raise ValueError(f"the port must be from 0 to 65535 (got {port})")
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise ValueError(f"port {port} cannot be used ({reason}): give another, or 0 for any") from error


def build_app(session: Session, uploads: Path) -> Asgi:
    """Return the page as an application. uploads: a folder for what visitors upload, and nothing else."""
    os.environ |= {"GRADIO_TEMP_DIR": str(uploads.resolve()), "GRADIO_ANALYTICS_ENABLED": "False"}
    # Gradio reads both when it is imported or builds a page.
    import fastapi
    import gradio
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from ssmclip.demo.page import build_page
    from ssmclip.demo.shown import CSS

    page = build_page(session).queue(api_open=False, max_size=32)
    _confine(page)
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        "/",
        server_name=HOST,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=session.limits.bytes,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=gradio.themes.Default(),  # its fonts come with Gradio
        css=CSS,
    )
    # A page elsewhere could otherwise reach this one under a name of its own (DNS rebinding).
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return _guarded(app, session.limits.bytes + SLACK)


def _confine(page: Any) -> None:
    """Have Gradio read nothing that a request names but what was uploaded.

    Of a page that is mounted, and not launched, it takes any file for an upload, copies it and serves the copy; and it
    downloads addresses.
    """
    page.has_launched = page.is_running = True
    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = partial(_no_address, block.async_move_resource_to_block_cache)


async def _no_address(move: Callable[..., Any], source: str | Path | None) -> str | None:
    if source is not None and "://" in str(source):
        raise ValueError("a picture must be uploaded: addresses are not read")
    return await move(source)


def serve(app: Asgi, listening: socket.socket) -> None:
    """Answer requests until the process is stopped. Raises KeyboardInterrupt then, for SIGTERM too."""
    import uvicorn

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the caller removes the uploads
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run(sockets=[listening])


class _TooLong(Exception):
    """A request has more bytes than are taken."""


def _guarded(app: Asgi, most: int) -> Asgi:
    """Return an application that refuses requests of more than so many bytes, and sends POLICY with every answer."""

    async def guarded(scope: dict[str, Any], receive: Asgi, send: Asgi) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > most:
            return await _refuse(receive, send, most)
        taken, too_long, answered = 0, False, False

        async def counted() -> dict[str, Any]:
            nonlocal taken, too_long
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                too_long = True
                raise _TooLong
            return message

        async def with_policy(message: dict[str, Any]) -> None:
            nonlocal answered
            if too_long and not answered:
                return  # the application's own words for what counted() raised
            if message["type"] == "http.response.start":
                answered = True
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        with suppress(_TooLong):
            await app(scope, counted, with_policy)
        if too_long and not answered:
            await _refuse(receive, send, most)

    return guarded


async def _refuse(receive: Asgi, send: Asgi, most: int) -> None:
    """Answer a request that is too long, when all of it has come: who is still sending would not read the answer."""
    while (message := await receive())["type"] == "http.request" and message.get("more_body"):
        pass
    body = f"a request must have at most {most:,} bytes: save a smaller picture".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})
