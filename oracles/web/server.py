"""The page's server: three fixed files, and four small questions and answers in JSON.

    POST /api/next    {annotator}                               -> {question}
    POST /api/answer  {annotator, question, answer, seconds}    -> {kept, question}, the next one
    POST /api/undo    {annotator}                               -> {undone, question}, the one taken back
    POST /api/state   {annotator, seen}                         -> ``Board.state``

An answer that was acknowledged is on the disk. Every request passes ``security.Guard`` first. A refusal is a plain
text with a status: 400 not understood, 404 never asked, 409 too late, 413 too long, 429 too fast.
"""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from oracles.web.board import Board
from oracles.web.questions import Question, Questions, Refused
from oracles.web.security import BODY, Bucket, Guard
from prefenv.errors import ConfigError, FeedbackError

FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
FOLDER = Path(__file__).parent / "page"
NAMES = 256  # annotators of one session
PER_PERSON, AT_ONCE = 40.0, 120.0  # answers a second, and in a burst: a person is slower


class Api:
    """What the page may ask.

    Args:
        questions: Who is asked what.
        board: The state to show.
    """

    def __init__(self, questions: Questions, board: Board):
        self.questions, self.board = questions, board
        self.names: set[str] = set(questions.standing)
        self.bucket = Bucket(PER_PERSON, AT_ONCE)

    def next(self, annotator: str, body: dict[str, Any]) -> dict[str, Any]:
        """The question of an annotator, None where there is none."""
        return {"question": self._shown(self.questions.next(annotator))}

    def leave(self, annotator: str, body: dict[str, Any]) -> dict[str, Any]:
        """Who renames himself does not come back under the old name: his question is free."""
        self.questions.leave(annotator)
        return {}

    def answer(self, annotator: str, body: dict[str, Any]) -> dict[str, Any]:
        """Keep an answer; returns the next question."""
        name, seconds = body.get("question"), body.get("seconds")
        if not (isinstance(name, str) and name.isascii() and len(name) <= 64):
            raise Refused(400, "question must be the id of a question")
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if seconds is not None and not (number and 0 <= seconds < math.inf):
            raise Refused(400, "seconds must be a number from 0, or null")
        kept = self.questions.answer(annotator, name, body.get("answer"), seconds)  # type: ignore
        return {"kept": kept, **self.next(annotator, {})}

    def undo(self, annotator: str, body: dict[str, Any]) -> dict[str, Any]:
        """Take the last answer back."""
        undone = self.questions.undo(annotator)
        return {"undone": undone is not None, **self.next(annotator, {})}

    def state(self, annotator: str, body: dict[str, Any]) -> dict[str, Any]:
        """The state to show."""
        seen = body.get("seen", 0)
        return self.board.state(annotator, seen if type(seen) is int else 0)

    def _shown(self, question: Question | None) -> dict[str, Any] | None:
        if question is None:
            return None
        samples = [self.board.store.sample(s).x for s in question.samples]
        points = [self.board.points(x) for x in samples]
        return {"id": question.id, "samples": points, "extent": self.board.extent}

    def annotator(self, body: dict[str, Any]) -> str:
        """Who asks.

        Raises:
            Refused: No name, or too many, or too fast.
        """
        name = body.get("annotator")
        if not (isinstance(name, str) and name.isprintable() and 0 < len(name.strip()) <= 40):
            raise Refused(400, "annotator must be a name of 1 to 40 letters")
        name = name.strip()
        if name not in self.names:
            if len(self.names) >= NAMES:
                raise Refused(403, f"no more than {NAMES} annotators")
            self.names.add(name)
        if not self.bucket.take(name):
            raise Refused(429, "too fast; wait a moment")
        return name


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        Refused: It is too long, or no JSON object.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > BODY:
            raise Refused(413, f"a body has at most {BODY} bytes")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is no JSON") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body is no JSON object")
    return value


def make_app(api: Api, token: str, exposed: bool = False) -> Guard:
    """The whole ASGI application."""

    def endpoint(call: Callable[[str, dict[str, Any]], dict[str, Any]]) -> Any:
        async def respond(request: Request) -> Response:
            try:
                body = await read_object(request)
                annotator = api.annotator(body)
                return JSONResponse(await run_in_threadpool(call, annotator, body))
            except Refused as error:
                return PlainTextResponse(str(error), error.status)
            except ClientDisconnect:
                return PlainTextResponse("gone", 400)
            except (
                FeedbackError
            ) as error:  # a full disk, say: not acknowledged, the page asks again
                return PlainTextResponse(str(error), 503)

        return respond

    def file(name: str) -> Any:
        async def respond(request: Request) -> Response:
            return FileResponse(FOLDER / name)

        return respond

    calls = {
        "next": api.next, "leave": api.leave, "answer": api.answer, "undo": api.undo, "state": api.state,
    }  # fmt: skip
    routes = [Route(f"/api/{n}", endpoint(call), methods=["POST"]) for n, call in calls.items()]
    routes += [Route(path, file(name), methods=["GET"]) for path, name in FILES.items()]
    app = Starlette(routes=routes)
    app.router.redirect_slashes = False
    return Guard(app, token, exposed)


class Server:
    """An application served from a thread of its own.

    Args:
        app: The ASGI application.
        host: Address of the interface.
        port: Port; 0 = any that is free.

    Raises:
        ConfigError: The port cannot be had.
    """

    def __init__(self, app: Any, host: str, port: int):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot serve the page at {host}:{port} ({error}); is it open already? port=0 takes a free one"
            ) from None
        self.port = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app, lifespan="off", ws="none", log_level="warning", access_log=False,
            server_header=False, limit_concurrency=512, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), daemon=True, name="prefenv-web"
        )
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.005)

    def stop(self) -> None:
        """Finish what is under way, and stop."""
        self._server.should_exit = True
        self._thread.join(5)
        self._socket.close()
