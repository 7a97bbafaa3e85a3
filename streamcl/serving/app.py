"""The HTTP side of the server: who may ask, what a body holds, and what is answered. Every refusal is a status and one sentence."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamcl import __version__
from streamcl.errors import ConfigError, DataError, DiskError, StreamclError
from streamcl.serving import described
from streamcl.serving.deliveries import Deliveries
from streamcl.serving.inputs import FORM, JSON, NUMPY, Body, Decoder, Refused, Uploaded, json_object
from streamcl.serving.service import RETRY, Answer, Service
from streamcl.serving.tokens import Tokens
from streamcl.stream import Batch

try:
    import prometheus_client
    from fastapi import FastAPI, Request, Response
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.types import Receive, Scope, Send
except ModuleNotFoundError as error:
    raise ConfigError(f"streamcl serve needs {error.name}, which is not installed: pip install 'streamcl[serve]'") from None

PAGE = Path(__file__).with_name("page.html")
LARGE = 32 << 10  # bytes of a body from which it is read by another thread
BODIES = 16  # bodies of the largest size that may be in memory at once
LONGEST_KEY = 200
ABOUT = "A model that answers, and adapts to what it is asked. The page at `/` shows what it does."
PAGE_RULES = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; form-action 'none'"
)
ENCODE = json.JSONEncoder(allow_nan=False).encode
DIRECT = ("/predict", "/adapt")  # what is asked all the time

Work = Callable[[Request], Awaitable[Any]]


class Server:
    """The endpoints over one service."""

    def __init__(self, service: Service, tokens: Tokens, deliveries: Deliveries | None = None) -> None:
        self.service, self.tokens, self.deliveries = service, tokens, deliveries
        self.decoder = Decoder(service.learned, service.limits.most)
        self.bodies = 0  # bytes that are being read or worked on
        self.registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "streamcl_requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=self.registry
        )
        self.seconds = prometheus_client.Histogram(
            "streamcl_request_seconds",
            "Seconds until a request was answered.",
            ["endpoint"],
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
            registry=self.registry,
        )
        self.registry.register(Figures(service))

    # -- the endpoints ------------------------------------------------------------------------------------------------------------

    async def predict(self, request: Request) -> dict[str, Any]:
        batch = await self._batch(request)
        return self._told(await self.service.ask(batch, adapts=False, gone=request.is_disconnected), request)

    async def adapt(self, request: Request) -> dict[str, Any]:
        self.service.check_writable()
        key = request.headers.get("idempotency-key")
        if key is not None and not 0 < len(key) <= LONGEST_KEY:
            raise Refused(422, f"an Idempotency-Key has 1 to {LONGEST_KEY} characters")
        batch = await self._batch(request)
        return self._told(await self.service.ask(batch, adapts=True, key=key, gone=request.is_disconnected), request)

    async def feed(self, request: Request) -> dict[str, Any]:
        if self.service.learned.info.test_time:
            raise Refused(409, "this run serves a test-time stream and learns from no labels: nothing can be fed to it")
        if self.deliveries is None:
            raise Refused(
                409, "only a run can be fed, and by the server that adapts: this one serves an exported model, or follows another"
            )
        body = await self._body(request, labels=True)
        labels = body.other.get("labels")
        if not isinstance(labels, list):
            raise Refused(422, "labels are missing: one for each sample")
        batch = self.decoder.batch(body)
        return await asyncio.to_thread(self.deliveries.add, batch, labels)

    async def feedback(self, request: Request) -> dict[str, Any]:
        self.service.check_writable()
        given = json_object(await self._read(request), ("ids", "labels"))
        ids, labels = given.get("ids"), given.get("labels")
        if not isinstance(ids, list) or not isinstance(labels, list) or len(ids) != len(labels) or not ids:
            raise Refused(422, 'give {"ids": [...], "labels": [...]}, a label for each id that /adapt has answered with')
        if len(ids) > self.service.limits.most:
            raise Refused(413, f"at most {self.service.limits.most} labels are taken at once")
        learned = self.service.learned
        if learned.info.target != "class":
            raise Refused(422, f"this model learned {learned.info.target}, and labels that come late are understood for classes only")
        taken_in = 0 if self.service.journal is None else self.service.journal.next
        if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < taken_in for one in ids):
            raise Refused(422, f"ids must be those that /adapt has answered with: whole numbers from 0 to below {taken_in}")
        if len(set(ids)) != len(ids):
            raise Refused(422, "an id came twice: give each sample one label")
        numbers = {name: number for number, name in enumerate(learned.classes)}
        unknown = [label for label in labels if not isinstance(label, (str, int)) or str(label) not in numbers]
        if unknown:
            raise Refused(422, f"{str(unknown[0])[:80]!r} is no class of this model: what is new comes by /feed")
        return await self._ordered("feedback", {"ids": ids, "targets": [numbers[str(label)] for label in labels]})

    async def promote(self, request: Request) -> dict[str, Any]:
        self.service.check_writable()
        content = await self._read(request)
        if content.strip():
            json_object(content, ())
        return await self._ordered("promote", {})

    async def rollback(self, request: Request) -> dict[str, Any]:
        self.service.check_writable()
        content = await self._read(request)
        version = json_object(content, ("version",)).get("version") if content.strip() else None
        if version is not None and (not isinstance(version, int) or isinstance(version, bool) or not 0 <= version < 2**53):
            raise Refused(422, 'version must be the number of one: {"version": 3}, or nothing for the one before')
        return await self._ordered("rollback", {"version": version})

    async def status(self, request: Request) -> dict[str, Any]:
        found: dict[str, Any] = finite(await self.service.status())
        if self.deliveries is not None:
            parts, samples = await asyncio.to_thread(self.deliveries.waiting)
            found["feed"] = {"waiting": samples, "parts": len(parts), "command": self.deliveries.command(parts) if parts else None}
        return found

    async def inputs(self, request: Request) -> dict[str, Any]:
        """The newest inputs, where the server was started to keep some: nobody sees them who may not change the model."""
        return {"kept": self.service.inputs.maxlen, "inputs": [shown(batch, answer) for batch, answer in self.service.inputs]}

    async def health(self, request: Request) -> dict[str, Any]:
        service = self.service
        return {"status": "stopping" if service.closing else "ok", "model": service.model, "version": service.loop.version}

    async def metrics(self, request: Request) -> Response:
        await self.service.status()
        return Response(prometheus_client.generate_latest(self.registry), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def page(self, request: Request) -> Response:
        return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": PAGE_RULES})

    # -- what they share ----------------------------------------------------------------------------------------------------------

    def endpoint(self, work: Work, may: str | None) -> Callable[[Request], Awaitable[Response]]:
        """What is common to all: tokens, refusals, figures. `may` is what the token must be good for."""
        name = work.__name__

        seconds, counts = self.seconds.labels(name), functools.cache(partial(self.requests.labels, name))

        async def handled(request: Request) -> Response:
            started = time.perf_counter()
            response = await self._handled(work, may, request)
            counts(response.status_code).inc()
            seconds.observe(time.perf_counter() - started)
            return response

        return handled

    async def _handled(self, work: Work, may: str | None, request: Request) -> Response:
        held = [0]
        request.state.held = held
        try:
            if may is not None and not self.tokens.allows(request.headers.get("authorization"), change=may == "change"):
                if may == "change" and self.tokens.known(request.headers.get("authorization")):
                    raise Refused(403, "this token is for asking: changing the model needs the other one")
                raise Refused(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})
            outcome = await work(request)
            return outcome if isinstance(outcome, Response) else answered(200, outcome)
        except Refused as refusal:
            return answered(refusal.status, {"error": refusal.why}, refusal.headers)
        except ClientDisconnect:
            return answered(400, {"error": "the body ended before its end"})
        except DiskError as error:
            return answered(507, {"error": str(error)})
        except DataError as error:
            return answered(422, {"error": str(error)})
        except StreamclError as error:
            return answered(409, {"error": str(error)})
        except Exception as error:
            self.service.tell(" ".join(f"{request.url.path}: {type(error).__name__}: {error}".split()))
            return answered(500, {"error": "this is a fault of the server; its log says more"})
        finally:
            self.bodies -= held[0]

    async def _batch(self, request: Request) -> Batch:
        return self.decoder.batch(await self._body(request))

    async def _body(self, request: Request, labels: bool = False) -> Body:
        """The decoded body, by its type; with `labels` where those may come along."""
        kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        if kind not in (JSON, FORM, *NUMPY):
            raise Refused(415, f"send {JSON}, {FORM} or {', '.join(NUMPY)}")
        content = await self._read(request)
        if kind == FORM:
            return self.decoder.form(await self._parts(request, content), labels)
        parse = partial(self.decoder.json, labels=labels) if kind == JSON else self.decoder.numpy
        return await asyncio.to_thread(parse, content) if len(content) > LARGE else parse(content)

    async def _read(self, request: Request) -> bytes:
        """The body, as long as it is not longer and does not take longer than it may."""
        limits = self.service.limits
        too_long = Refused(413, f"the body is longer than {limits.body} bytes (--body): send less at a time")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:18]) > limits.body:
            raise too_long
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise Refused(415, "send it as it is, not compressed")
        pieces: list[bytes] = []
        total, held = 0, request.state.held
        try:
            async with asyncio.timeout(limits.timeout):
                async for piece in request.stream():
                    total += len(piece)
                    held[0] += len(piece)
                    self.bodies += len(piece)
                    if total > limits.body:
                        raise too_long
                    if self.bodies > BODIES * limits.body:
                        raise Refused(503, "too many large requests at once: send it again in a moment", RETRY)
                    pieces.append(piece)
        except TimeoutError:
            raise Refused(408, f"the body took longer than {limits.timeout:g} s to arrive") from None
        return b"".join(pieces)

    async def _parts(self, request: Request, content: bytes) -> list[Uploaded]:
        """The parts of a form."""

        async def whole() -> dict[str, Any]:
            return {"type": "http.request", "body": content, "more_body": False}

        most = self.service.limits.most * max(1, len(self.decoder.modalities))
        try:
            form = await Request(request.scope, whole).form(max_files=most, max_fields=most, max_part_size=self.service.limits.body)
        except HTTPException as error:
            raise Refused(400, f"the form cannot be read: {error.detail}") from None
        except Exception as error:  # a broken form makes the parser raise nearly anything
            raise Refused(400, f"the form cannot be read: {error}") from None
        parts = []
        for name, value in form.multi_items():
            if isinstance(value, str):
                parts.append(Uploaded(name, None, value.encode()))
            else:
                parts.append(Uploaded(name, value.filename, await value.read()))
        await form.close()
        return parts

    def _told(self, answer: Answer, request: Request) -> dict[str, Any]:
        """An answer as JSON."""
        found: dict[str, Any] = {
            "predictions": answer.predictions,
            "version": answer.version,
            "model": self.service.model,
        }
        if answer.confidences is not None:
            found["confidences"] = [rounded(value) for value in answer.confidences]
        if answer.first is not None:
            found["ids"] = list(range(answer.first, answer.first + len(answer.predictions)))
            found["adapted"] = not answer.again
            found["made"] = answer.made
        if request.scope["query_string"] and request.query_params.get("scores", "").lower() in ("true", "1"):
            found["scores"] = [[rounded(value) for value in row] for row in answer.scores.reshape(len(answer.predictions), -1).tolist()]
            if self.service.learned.classes:
                found["classes"] = list(self.service.learned.classes)
        return found

    async def _ordered(self, kind: Any, about: dict[str, Any]) -> dict[str, Any]:
        outcome = await self.service.order(kind, about)
        if outcome is None:
            raise Refused(503, "it is kept and will be done, and the writer has not come to it yet: /status shows when", RETRY)
        return dict(outcome)


class Application(FastAPI):
    """FastAPI, but for the paths in `direct`: all that it does for each request takes as long as a small model."""

    direct: dict[str, Callable[[Request], Awaitable[Response]]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        plain = scope["type"] == "http" and scope["method"] == "POST" and not scope.get("root_path")
        handled = self.direct.get(scope["path"]) if plain else None
        if handled is None:
            await super().__call__(scope, receive, send)
        else:
            response = await handled(Request(scope, receive))
            await response(scope, receive, send)


def make_app(service: Service, tokens: Tokens, deliveries: Deliveries | None = None) -> FastAPI:
    """The ASGI application; the service starts and closes with it."""
    server = Server(service, tokens, deliveries)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    app = Application(title="streamcl", version=__version__, description=ABOUT, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.direct = {}
    app.state.server = server
    routes: list[tuple[str, str, Work, str | None]] = [
        ("POST", "/predict", server.predict, "predict"),
        ("POST", "/adapt", server.adapt, "change"),
        ("POST", "/feed", server.feed, "change"),
        ("POST", "/feedback", server.feedback, "change"),
        ("POST", "/promote", server.promote, "change"),
        ("POST", "/rollback", server.rollback, "change"),
        ("GET", "/status", server.status, "predict"),
        ("GET", "/inputs", server.inputs, "change"),
        ("GET", "/metrics", server.metrics, "predict"),
        ("GET", "/health", server.health, None),
        ("GET", "/", server.page, None),
    ]
    for method, path, work, may in routes:
        told = described.operation(work.__name__, may, service.learned, service.limits)
        handled = server.endpoint(work, may)
        app.add_api_route(path, handled, methods=[method], response_model=None, **told)
        if path in DIRECT:
            app.direct[path] = handled

    async def unknown(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
        there = ", ".join(f"{method} {path}" for method, path, _, _ in routes)
        return answered(status, {"error": f"there is {there}"}, headers)

    app.add_exception_handler(HTTPException, unknown)
    plain = app.openapi
    app.openapi = lambda: described.completed(plain())  # type: ignore[method-assign]
    return app


class Figures:
    """What Prometheus reads of the loop and the queues."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Any:
        service, status, certainty = self.service, self.service._status, self.service.certainty()
        totals = {
            "samples": ("Samples that were answered.", status["samples"]),
            "batches": ("Batches that the model which adapts has seen.", status["batches"]),
            "acknowledged_samples": ("Samples that were taken in to be learned from.", service.journal.samples if service.journal else 0),
            "failed": ("Journal entries that could not be learned.", service.writer.failed if service.writer else 0),
            "dropped": ("Requests whose clients hung up.", service.dropped),
        }
        for name, (help, value) in totals.items():
            yield CounterMetricFamily(f"streamcl_{name}", help, value=float(value))
        counts = CounterMetricFamily("streamcl_loop", "What the loop counts: updates, samples adapted to, interventions.", labels=["what"])
        for what, count in status["counts"].items():
            counts.add_metric([what], float(count))
        yield counts
        now = {
            "version": ("The version of the model that is served.", service.loop.version),
            "queued_samples": ("Samples that wait to be answered.", service.queued),
            "unlearned_samples": ("Samples that wait for the writer.", service.unlearned),
            "entropy": ("Mean entropy of the newest answers, in nats.", certainty["entropy"]),
            "confidence": ("Mean confidence of the newest answers.", certainty["confidence"]),
            **{f"guard_{name}": (f"The guard's {name}.", value) for name, value in (status["guard"] or {}).items()},
        }
        for name, (help, value) in now.items():
            if isinstance(value, (int, float)):
                yield GaugeMetricFamily(f"streamcl_{name}", help, value=float(value))


def answered(status: int, content: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(ENCODE(content), status, headers, media_type=JSON)


def finite(tree: Any) -> Any:
    """Figures as JSON can hold them: one that is not a number yet is null."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def rounded(value: float) -> float | None:
    """As JSON can hold it."""
    return round(value, 6) if math.isfinite(value) else None


def shown(batch: Batch, answer: Answer) -> dict[str, Any]:
    """One kept input for the page: pictures as PNG, text as it is, the rest by its shape."""
    found: dict[str, Any] = {"prediction": answer.predictions[0], "version": answer.version, "ids": answer.first}
    for name, values in batch.inputs.items():
        first = values[0]
        if isinstance(first, torch.Tensor) and first.dim() == 3 and first.shape[0] in (1, 3):
            found[name] = {"png": picture(first)}
        else:
            found[name] = {"text": first[:500] if isinstance(first, str) else " x ".join(map(str, first.shape)) or str(first.item())}
    return found


def picture(values: torch.Tensor) -> str:
    from PIL import Image

    pixels = values.float()
    low, high = float(pixels.min()), float(pixels.max())
    scaled = ((pixels - low) * (255 / (high - low) if high > low else 0)).byte().numpy()
    content = io.BytesIO()
    Image.fromarray(scaled[0] if len(scaled) == 1 else np.ascontiguousarray(scaled.transpose(1, 2, 0))).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()
