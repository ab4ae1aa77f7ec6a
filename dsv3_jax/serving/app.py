"""The ASGI application: the protocol's routes, health and metrics, over one engine."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from dsv3_jax.data.tokenizers import Tokenizer
from dsv3_jax.generation.engine import Engine
from dsv3_jax.generation.requests import QueueFull
from dsv3_jax.generation.requests import Request as EngineRequest
from dsv3_jax.generation.sampling import RequestError
from dsv3_jax.generation.text import Piece
from dsv3_jax.serving import protocol
from dsv3_jax.serving.chat import make_chat

MAX_BODY = 8 << 20  # Bytes of a request.


def _error(status: int, message: str, code: str | None = None, **headers: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status, headers=headers)


class _Refused(Exception):
    def __init__(self, response: Response):
        self.response = response


class Server:
    """Answers HTTP requests from one engine.

    Args:
      engine: its thread runs while the application does.
      tokenizer: of the model.
      model: the name under which it is served.
      tokenizer_file: a tokenizer.json, beside which the chat template is.
      prefix: tokens before every prompt that is text.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        model: str,
        *,
        tokenizer_file: Path | None = None,
        prefix: Sequence[int] = (),
    ):
        self.engine, self.tokenizer, self.model, self.prefix = engine, tokenizer, model, tuple(prefix)
        self.chat = make_chat(tokenizer, tokenizer_file, prefix)
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        del app
        self.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.engine.stop)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, None)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, self.chat)

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        del request
        model = {"id": self.model, "object": "model", "created": 0, "owned_by": "dsv3"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        """GET /health: 200, or 503 once the engine has stopped."""
        del request
        if self.engine.error is not None:
            return _error(503, f"the engine has stopped: {self.engine.error}")
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics, in Prometheus's text format."""
        del request
        return PlainTextResponse(metrics_text(self.engine), media_type="text/plain; version=0.0.4")

    async def _answer(self, request: Request, chat: Any) -> Response:
        try:
            call = self._parse(await self._body(request), chat)
            events: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
            handles = self._submit(call, events)
        except _Refused as refused:
            return refused.response
        except ClientDisconnect:
            return Response(status_code=499)
        answer = protocol.Answer(call, self.model, self.tokenizer)
        if call.stream:
            return StreamingResponse(
                self._stream(call, answer, handles, events),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
            )
        return await self._whole(request, call, answer, handles, events)

    async def _body(self, request: Request) -> Any:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise _Refused(_error(413, f"the body is larger than {MAX_BODY} bytes"))
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _Refused(_error(400, f"the body is not JSON: {error}")) from error

    def _parse(self, body: Any, chat: Any) -> protocol.Call:
        name = body.get("model", self.model) if isinstance(body, dict) else self.model
        if name != self.model:
            message = f"model is {name!r}, but this server has {self.model!r}"
            raise _Refused(_error(404, message, "model_not_found"))
        try:
            return protocol.parse(
                body,
                chat=chat,
                tokenizer=self.tokenizer,
                prefix=self.prefix,
                max_tokens=self.engine.limits.max_tokens,
            )
        except RequestError as error:
            raise _Refused(_error(400, str(error))) from error

    def _submit(self, call: protocol.Call, events: asyncio.Queue) -> list[EngineRequest]:
        """Queues every job, or none."""
        loop = asyncio.get_running_loop()

        def deliver_to(index: int):
            def deliver(piece: Piece) -> None:
                with contextlib.suppress(RuntimeError):  # The server has shut down.
                    loop.call_soon_threadsafe(events.put_nowait, (index, piece))

            return deliver

        handles: list[EngineRequest] = []
        try:
            for index, job in enumerate(call.jobs):
                handles.append(self.engine.submit(job.prompt, job.params, deliver_to(index)))
            return handles
        except BaseException as error:
            for handle in handles:
                handle.cancel()
            if isinstance(error, QueueFull):
                response = _error(429, f"{error}; try again later", "queue_full", **{"Retry-After": "1"})
            elif isinstance(error, RequestError):
                response = _error(400, str(error), "context_length_exceeded")
            elif isinstance(error, RuntimeError):
                response = _error(503, str(error))
            else:
                raise
            raise _Refused(response) from error

    async def _stream(self, call, answer, handles, events) -> AsyncIterator[str]:
        def event(content: Any) -> str:
            return f"data: {json.dumps(content)}\n\n"

        try:
            left = len(handles)
            for index in range(left):
                if opening := answer.opening(index):
                    yield event(opening)
            while left:
                index, piece = await events.get()
                if piece.finish_reason in ("error", "cancelled"):
                    yield event({"error": {"message": _why(piece), "type": "server_error"}})
                    return
                left -= piece.finish_reason is not None
                # A token may leave nothing to show yet: half a character, or what may become a stop string.
                if piece.text or piece.finish_reason or call.log_probs:
                    yield event(answer.piece(index, piece))
                else:
                    answer.piece(index, piece)
            if call.usage:
                yield event(answer.closing())
            yield "data: [DONE]\n\n"
        finally:  # Also when the client has gone.
            for handle in handles:
                handle.cancel()

    async def _whole(self, request: Request, call, answer, handles, events) -> Response:
        async def collect() -> list[list[Piece]]:
            pieces: list[list[Piece]] = [[] for _ in handles]
            left = len(handles)
            while left:
                index, piece = await events.get()
                pieces[index].append(piece)
                left -= piece.finish_reason is not None
            return pieces

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        del call
        collecting, watching = asyncio.create_task(collect()), asyncio.create_task(gone())
        try:
            await asyncio.wait({collecting, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=499)  # Nobody is there to read it.
            pieces = collecting.result()
            for part in pieces:
                if part[-1].finish_reason in ("error", "cancelled"):
                    return _error(500, _why(part[-1]))
            return JSONResponse(answer.whole(pieces))
        finally:
            for task in (collecting, watching):
                task.cancel()
            for handle in handles:
                handle.cancel()


def _why(piece: Piece) -> str:
    if piece.finish_reason == "cancelled":
        return "the server is shutting down"
    return "the model's logits are not finite: its weights or its cache hold NaN or infinity"


def metrics_text(engine: Engine) -> str:
    """The engine's counters and gauges for Prometheus."""
    c = engine.counters
    lines = []

    def add(name: str, kind: str, meaning: str, *values: tuple[str, float | int]) -> None:
        lines.extend([f"# HELP dsv3_{name} {meaning}", f"# TYPE dsv3_{name} {kind}"])
        lines.extend(f"dsv3_{name}{labels} {value}" for labels, value in values)

    outcomes = ("completed", "cancelled", "failed", "rejected")
    by_outcome = [(f'{{outcome="{name}"}}', getattr(c, name)) for name in outcomes]
    add("requests_total", "counter", "Texts by how they ended.", *by_outcome)
    add("prompt_tokens_total", "counter", "Tokens read.", ("", c.prompt_tokens))
    add("generated_tokens_total", "counter", "Tokens generated.", ("", c.tokens))
    add("steps_total", "counter", "Decoding steps.", ("", c.steps))
    seconds = "Seconds from request to first token, summed over the requests that have one."
    add("first_token_seconds_total", "counter", seconds, ("", c.first_token_seconds))
    if engine.drafts:
        accepted = [(f'{{position="{j + 1}"}}', count) for j, count in enumerate(c.accepted)]
        add("draft_steps_total", "counter", "Steps of sequences that drafted.", ("", c.drafts))
        add("drafts_accepted_total", "counter", "Drafts accepted, by position.", *accepted)
    add("requests_running", "gauge", "Texts under way.", ("", engine.running))
    add("requests_waiting", "gauge", "Texts in the queue.", ("", engine.waiting))
    add("cache_pages", "gauge", "Pages of the cache.", ("", engine.pages.count))
    add("cache_pages_free", "gauge", "Pages that no text has.", ("", engine.pages.free))
    return "\n".join(lines) + "\n"
