"""The server in OpenAPI: for each endpoint what it takes, with examples of this very model's inputs, and what it answers."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from streamcl.learned import Learned
from streamcl.stream import Modality

if TYPE_CHECKING:
    from streamcl.serving.service import Limits

LISTED = 4096  # numbers of a sample up to which an example lists them
REFUSALS = {
    400: "The body is broken.",
    401: "The bearer token is missing or wrong.",
    403: "The token is for asking, and this changes the model.",
    404: "There is no such endpoint.",
    405: "There is no such method here.",
    408: "The body took too long to arrive.",
    409: "Not here, or not now.",
    413: "Too much at once.",
    415: "The body is of a type that is not read, or compressed.",
    422: "The body does not fit the model.",
    429: "Too much waits to be learned: come again after Retry-After seconds.",
    500: "A fault of the server.",
    503: "Too much waits, or the server stops: come again after Retry-After seconds.",
    507: "The disk is full.",
}
SCHEMES = {
    "ask": {"type": "http", "scheme": "bearer", "description": "The token for asking, or the one for changing the model."},
    "change": {"type": "http", "scheme": "bearer", "description": "The token for changing the model."},
}
COUNT = {"type": "integer", "minimum": 0}
TEXT = {"type": "string"}


def operation(name: str, may: str | None, learned: Learned, limits: Limits) -> dict[str, Any]:
    """How FastAPI is told of an endpoint: keyword arguments of `add_api_route`."""
    summary, refused, success, extra = OPERATIONS[name](learned, limits)
    statuses = {*refused, *((401,) if may else ()), *((403,) if may == "change" else ()), 500}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Refusal"}}}
    responses: dict[int | str, dict[str, Any]] = {200: {"description": "Done.", "content": success}}
    responses |= {status: {"description": REFUSALS[status], "content": error} for status in sorted(statuses)}
    security: list[dict[str, list[str]]] = [{"ask": []}] if may == "predict" else [{"change": []}] if may == "change" else []
    return {
        "summary": summary,
        "responses": responses,
        "openapi_extra": {"security": security, **extra},
        "name": name,
        "operation_id": name,
    }


def completed(schema: dict[str, Any]) -> dict[str, Any]:
    """The document with the parts that all operations share."""
    components = schema.setdefault("components", {})
    components["securitySchemes"] = SCHEMES
    components.setdefault("schemas", {})["Refusal"] = {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "string", "description": "One sentence: what is wrong, and what would be right."}},
    }
    return schema


# -- the endpoints -----------------------------------------------------------------------------------------------------------------

Described = tuple[str, tuple[int, ...], dict[str, Any], dict[str, Any]]
BODY = (400, 408, 413, 415, 422, 503)


def _predict(learned: Learned, limits: Limits) -> Described:
    return "Answer, and learn nothing.", BODY, _json(_answer(learned)), {"requestBody": body(learned), "parameters": [SCORES]}


def _adapt(learned: Learned, limits: Limits) -> Described:
    extra = {"requestBody": body(learned), "parameters": [SCORES, KEY]}
    return "Answer, and adapt to what was asked.", (*BODY, 409, 429, 507), _json(_answer(learned, adapts=True)), extra


def _feed(learned: Learned, limits: Limits) -> Described:
    kept = _object({"kept": COUNT, "waiting": COUNT, "parts": COUNT, "command": TEXT})
    return "Keep labelled samples for the run's next task.", (*BODY, 409, 507), _json(kept), {"requestBody": body(learned, labels=True)}


def _feedback(learned: Learned, limits: Limits) -> Described:
    given = _object({"ids": {"type": "array", "items": COUNT, "minItems": 1}, "labels": {"type": "array", "items": TEXT, "minItems": 1}})
    example = {"ids": [0], "labels": learned.classes[:1]}
    told = _json({"type": "object"})
    return "Labels that come late, for samples that /adapt has answered.", (*BODY, 409, 507), told, {"requestBody": _body(given, example)}


def _promote(learned: Learned, limits: Limits) -> Described:
    return "Serve the model that has been adapting, as a new version.", (*BODY, 409, 507), _json(_object({"version": COUNT})), {}


def _rollback(learned: Learned, limits: Limits) -> Described:
    given = {"type": "object", "properties": {"version": {"type": ["integer", "null"], "minimum": 0}}, "additionalProperties": False}
    extra = {"requestBody": {**_body(given, {"version": 0}), "required": False}}
    return "Serve an earlier version, by default the one before.", (*BODY, 409, 507), _json(_object({"version": COUNT})), extra


def _status(learned: Learned, limits: Limits) -> Described:
    return "What the loop and the server have done so far.", (), _json({"type": "object"}), {}


def _inputs(learned: Learned, limits: Limits) -> Described:
    return "The newest inputs, where the server keeps some.", (), _json({"type": "object"}), {}


def _metrics(learned: Learned, limits: Limits) -> Described:
    return "Figures for Prometheus.", (), {"text/plain": {"schema": TEXT}}, {}


def _health(learned: Learned, limits: Limits) -> Described:
    return "Whether the server is there.", (), _json(_object({"status": TEXT, "model": TEXT, "version": COUNT})), {}


def _page(learned: Learned, limits: Limits) -> Described:
    return "A page that shows the figures.", (), {"text/html": {"schema": TEXT}}, {}


OPERATIONS = {
    "predict": _predict,
    "adapt": _adapt,
    "feed": _feed,
    "feedback": _feedback,
    "promote": _promote,
    "rollback": _rollback,
    "status": _status,
    "inputs": _inputs,
    "metrics": _metrics,
    "health": _health,
    "page": _page,
}
SCORES = {
    "name": "scores",
    "in": "query",
    "description": "Also tell the score of every class.",
    "schema": {"type": "string", "enum": ["true", "false"]},
}
KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "A request that is sent again under its key is answered again and not learned again.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[!-~]+$"},
}


# -- bodies and answers ------------------------------------------------------------------------------------------------------------


def body(learned: Learned, labels: bool = False) -> dict[str, Any]:
    """The three kinds of body, with examples."""
    modalities = {n: m for n, m in learned.info.modalities.items() if not learned.info.asks or n in learned.info.asks}
    given: dict[str, Any] = {
        "inputs": _object({name: values(modality) for name, modality in modalities.items()}),
        "present": {
            "type": "object",
            "properties": {name: {"type": "array", "items": {"type": "boolean"}} for name in modalities},
            "additionalProperties": False,
        },
    }
    example: dict[str, Any] = {"inputs": {name: sample(modality) for name, modality in modalities.items()}}
    form: dict[str, Any] = {
        name: {"type": "array", "items": {"type": "string"} if modality.kind == "text" else {"type": "string", "format": "binary"}}
        for name, modality in modalities.items()
    }
    if labels:
        del given["present"]
        one, label = _label(learned)
        given["labels"] = {"type": "array", "items": one, "minItems": 1}
        example["labels"] = [label]
        form["labels"] = {"type": "array", "items": TEXT}
    needed = [name for name in given if name != "present"]
    schema = {"type": "object", "required": needed, "properties": given, "additionalProperties": False}
    content: dict[str, Any] = {
        "application/json": {"schema": schema, "examples": {"one sample": {"value": example}}},
        "multipart/form-data": {"schema": {"type": "object", "properties": form}},
    }
    if not labels:
        content["application/octet-stream"] = {"schema": {"type": "string", "format": "binary", "description": "An .npy or .npz file."}}
    return {"required": True, "content": content}


def values(modality: Modality) -> dict[str, Any]:
    """The schema of one modality's values, for all samples."""
    if modality.kind == "text":
        return {"type": "array", "items": TEXT, "minItems": 1}
    number: dict[str, Any] = (
        {"type": "number"} if modality.high is None else {"type": "integer", "minimum": 0, "maximum": int(modality.high)}
    )
    nested = number
    for length in reversed(modality.shape):
        nested = {"type": "array", "items": nested, "minItems": length, "maxItems": length}
    forms: list[dict[str, Any]] = [{"type": "array", "items": nested, "minItems": 1}]
    forms.append(_object({"npy": {**TEXT, "description": "base64 of an .npy file"}}))
    if modality.kind in ("image", "audio"):
        name, what = ("images", "a picture") if modality.kind == "image" else ("wav", "a WAV file")
        forms.append(_object({name: {"type": "array", "items": {**TEXT, "description": f"base64 of {what}"}, "minItems": 1}}))
    return {"anyOf": forms}


def sample(modality: Modality) -> Any:
    """One sample of zeros."""
    if modality.kind == "text":
        return ["a few words"]
    array = np.zeros((1, *modality.shape), dtype=np.float32 if modality.high is None else np.uint8)
    if math.prod(modality.shape) <= LISTED:
        return array.tolist()
    file = io.BytesIO()
    np.save(file, array)
    return {"npy": base64.b64encode(file.getvalue()).decode()}


def _label(learned: Learned) -> tuple[dict[str, Any], Any]:
    target, first = learned.info.target, learned.classes[:1]
    if target == "labels":
        return {"type": "array", "items": TEXT}, first
    return ({"type": "number"}, 0.5) if target == "value" else (TEXT, first[0] if first else "a")


def _answer(learned: Learned, adapts: bool = False) -> dict[str, Any]:
    prediction = {"class": TEXT, "labels": {"type": "array", "items": TEXT}}.get(learned.info.target, {})
    number = {"type": ["number", "null"]}
    properties: dict[str, Any] = {
        "predictions": {"type": "array", "items": prediction},
        "version": {**COUNT, "description": "of the model that answered; 0 is the model as it was deployed"},
        "model": {**TEXT, "description": "which model the versions are of"},
    }
    required = [*properties, *(("ids", "adapted", "made") if adapts else ())]
    if adapts:
        properties["made"] = {
            "type": "string",
            "enum": ["before", "after"],
            "description": "whether it was made before or after an update on this batch",
        }
        properties["ids"] = {"type": "array", "items": COUNT, "description": "for /feedback"}
        properties["adapted"] = {"type": "boolean", "description": "false where it was sent again under its key"}
    properties["confidences"] = {"type": "array", "items": number}
    properties["scores"] = {"type": "array", "items": {"type": "array", "items": number}}
    properties["classes"] = {"type": "array", "items": TEXT, "description": "whose scores they are, in their order"}
    return {"type": "object", "required": required, "properties": properties}


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": dict(properties), "additionalProperties": False}


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": dict(schema)}}


def _body(schema: Mapping[str, Any], example: Any) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": dict(schema), "examples": {"one": {"value": example}}}}}
