"""The body limit, over an application that reads its body as FastAPI does."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI, Request, UploadFile

from serve_app.ingress.guards import BodyLimit
from serve_app.ingress.problems import install_error_handlers


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application that takes 1000 bytes of JSON and 5000 of a form."""
    api = FastAPI()
    install_error_handlers(api)
    api.add_middleware(BodyLimit, json_bytes=1000, form_bytes=5000)

    @api.post("/json")
    async def take_json(body: dict[str, str]) -> int:
        return len(body["text"])

    @api.post("/form")
    async def take_form(file: UploadFile) -> int:
        return len(await file.read())

    @api.post("/raw")
    async def take_raw(request: Request) -> int:
        return len(await request.body())

    transport = httpx.ASGITransport(app=api)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def pieces(total: int) -> AsyncIterator[bytes]:
    """A body without a declared length."""
    for _ in range(total // 100):
        yield b"a" * 100


async def test_bodies_within_the_limit_pass(client: httpx.AsyncClient) -> None:
    assert (await client.post("/json", json={"text": "a" * 900})).json() == 900
    assert (await client.post("/form", files={"file": b"a" * 4000})).json() == 4000
    assert (await client.post("/raw", content=pieces(1000))).json() == 1000


async def test_declared_length_is_refused_unread(client: httpx.AsyncClient) -> None:
    assert (await client.post("/json", json={"text": "a" * 1001})).status_code == 413
    assert (await client.post("/form", files={"file": b"a" * 6000})).status_code == 413


@pytest.mark.parametrize("path", ["/json", "/raw"])
async def test_undeclared_length_is_refused_as_it_comes(client: httpx.AsyncClient, path: str) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 100
            yield b"a" * 100

    answer = await client.post(path, content=endless(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert read < 2000


async def test_form_without_a_length_is_refused_as_it_comes(client: httpx.AsyncClient) -> None:
    async def form() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        async for piece in pieces(9000):
            yield piece
        yield b"\r\n--x--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = await client.post("/form", content=form(), headers=headers)
    assert answer.status_code == 413
