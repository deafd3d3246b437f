"""The address: `/v1/chat/completions`, `/v1/models` and `/health` over ChatLLMs, on FastAPI and uvicorn."""

import asyncio
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable
from contextlib import aclosing
from typing import Any, TypeVar, cast

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ..conversation.llm import ChatLLM, ContextOverflow
from ..conversation.pieces import Notice, Thought
from ..conversation.reply import Reply
from ..errors import ChatmagicError
from ..text import did_you_mean
from .line import Full, Line
from .protocol import NEUTRAL, Question, Written, error, event, thought
from .reach import check_reach, is_asked_here

T = TypeVar("T")
ASKER_LEFT = Response(status_code=499)
"""nginx's word for an asker that left; nobody hears it."""
LARGEST = 4 << 20
"""Bytes of a request, which is read before its key is looked at: more than any context here holds."""


def serve(llms: Iterable[ChatLLM], host: str = "127.0.0.1", port: int = 8484, key: str | None = None) -> None:
    """Answer at that address, port 0 being any that is free, until Ctrl-C. `llms` are made, if a generator makes them,
    once the address is held. Raises ChatmagicError for an address that is not to be had, and as `check_reach` does."""
    check_reach(host, key)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as problem:
        raise ChatmagicError(f"{host}:{port} is not to be had ({problem}): take another with --port") from None
    with listening:
        app = make_app(llms, key)
        here = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1"
        print(f"{here} answers as {', '.join(app.state.models)}; Ctrl-C ends it", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
        uvicorn.Server(config).run([listening])


def make_app(llms: Iterable[ChatLLM], key: str | None = None, longest: int = 32) -> FastAPI:
    """The application over these models, each by its name; `longest`: how many questions may wait in all.

    With a key, who asks must send it; without, only who asks this machine by its own name is answered, so that neither
    a forwarded port nor a page in a browser here (DNS rebinding) lets others in.
    """
    models, line = {llm.name: llm for llm in llms}, Line(longest)
    app = FastAPI(openapi_url=None, max_body_size=LARGEST)
    app.state.models = models

    def allowed(request: Request) -> None:
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and not secrets.compare_digest(sent.encode(), key.encode()):
            raise HTTPException(401, "a key is wanted here: send it as Authorization: Bearer KEY (api_key=, key=)")
        if not key and not is_asked_here(request.headers.get("host", "")):
            words = "only this machine is answered, as localhost; for others start it with CHATMAGIC_KEY set"
            raise HTTPException(403, words)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": line.length}

    @app.get("/v1/models", dependencies=[Depends(allowed)])
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(llm) for llm in models.values()]}

    @app.get("/v1/models/{name:path}", dependencies=[Depends(allowed)])
    async def retrieve_model(name: str) -> dict[str, Any]:
        return _described(find(name))

    @app.post("/v1/chat/completions", dependencies=[Depends(allowed)])
    async def complete(question: Question, request: Request) -> Response:
        llm, written = find(question.model), Written(question.model)
        messages = [said.message for said in question.messages]
        coming = line.answer(lambda write: llm.chat(messages, write, **question.options))
        if not question.stream:
            reply = await unless_left(request, _last(coming))
            return JSONResponse(written.whole(reply)) if reply else ASKER_LEFT
        first = await unless_left(request, anext(coming))  # what goes wrong before it has a status of its own
        if first is None:
            return ASKER_LEFT
        return Events(_written(first, coming, written, question.stream_options.include_usage))

    def find(name: str) -> ChatLLM:
        if name in models:
            return models[name]
        known = ", ".join(models)
        raise HTTPException(404, f"the model {name!r} does not exist here{did_you_mean(name, models)}; here is {known}")

    handlers: dict[type[Exception], Any] = {  # each takes its own kind alone
        RequestValidationError: _invalid,
        HTTPException: _http,
        Full: _full,
        ChatmagicError: _refused,
        Exception: _failed,
    }
    for kind, answer in handlers.items():
        app.add_exception_handler(kind, answer)
    return app


def _described(llm: ChatLLM) -> dict[str, Any]:
    """With `max_model_len` as vLLM has it: tokens that prompt and reply may have together."""
    return {"id": llm.name, "object": "model", "owned_by": "chatmagic", "max_model_len": llm.backend.context}


async def unless_left(request: Request, coming: Awaitable[T]) -> T | None:
    """What is coming; None, and it is cancelled, if the asker leaves before."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(coming), asyncio.ensure_future(left())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await tasks[0] if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def _last(pieces: AsyncGenerator[str, None]) -> Reply:
    async with aclosing(pieces):
        return cast(Reply, [piece async for piece in pieces][-1])


async def _written(
    first: str, rest: AsyncGenerator[str, None], written: Written, with_usage: bool
) -> AsyncIterator[str]:
    """The events of a reply, of which the first piece has come."""
    async with aclosing(rest):
        yield written.piece({"role": "assistant", "content": ""})
        piece = first
        try:
            while not isinstance(piece, Reply):
                if isinstance(piece, Thought):
                    yield written.piece(thought(piece))
                elif not isinstance(piece, Notice):  # what a notice tells, the reason of the end tells too
                    yield written.piece({"content": piece})
                piece = await anext(rest)
        except Exception as problem:  # after the head of the response, where no handler of the application can answer
            yield event(error(_words(problem), "server_error"))
            if not isinstance(problem, ChatmagicError):
                raise  # for the log
            return
        for last in written.end(piece.stats, with_usage):
            yield last


class Events(StreamingResponse):
    """A stream of events, closed however it ends."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        async with aclosing(cast("AsyncGenerator[str, None]", self.body_iterator)):
            await super().__call__(scope, receive, send)


def _answer(status: int, *words: Any, headers: dict[str, str] | None = None, **more: Any) -> JSONResponse:
    return JSONResponse(error(*words, **more), status, headers)


def _invalid(request: Request, problem: RequestValidationError) -> JSONResponse:
    found = problem.errors()[0]
    if found["type"] == "json_invalid":  # its place is one in the body
        return _answer(400, f"the body is no JSON: {found['ctx']['error']} at character {found['loc'][1]}")
    if found["loc"] == ("body",) and found["type"] == "missing":
        return _answer(400, "the body is empty: send a JSON object, with Content-Type: application/json")
    where = ".".join(map(str, found["loc"][1:]))
    said = f"{where}: {found['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    if found["type"] == "extra_forbidden":
        only = f"only {NEUTRAL[where]!r} is known of it" if where in NEUTRAL else "it is not known"
        near = did_you_mean(where, Question.model_fields)
        said = f"{where} is not supported here: {only}, and nothing is left out in silence{near}"
    return _answer(400, said, param=where or None)


def _http(request: Request, problem: HTTPException) -> JSONResponse:
    codes = {401: "invalid_api_key", 404: "model_not_found" if "model" in problem.detail else None}
    return _answer(problem.status_code, problem.detail, code=codes.get(problem.status_code))


def _full(request: Request, problem: Full) -> JSONResponse:
    headers = {"Retry-After": str(problem.seconds)}
    return _answer(429, str(problem), "rate_limit_error", "rate_limit_exceeded", headers=headers)


def _refused(request: Request, problem: ChatmagicError) -> JSONResponse:
    if isinstance(problem, ContextOverflow):
        return _answer(400, f"the context length is exceeded: {problem}", code="context_length_exceeded")
    return _answer(400, str(problem))


def _failed(request: Request, problem: Exception) -> JSONResponse:
    return _answer(500, _words(problem), "server_error")


def _words(problem: Exception) -> str:
    return str(problem) if isinstance(problem, ChatmagicError) else f"{type(problem).__name__}: {problem}"
