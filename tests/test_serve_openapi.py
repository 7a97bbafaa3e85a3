"""The server against its own OpenAPI document: whatever is sent, it answers as described and never with a fault of its own."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import pytest
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from served_runs import ALTER, CHANGE, PREDICT, QUIET, digits_run

import streamcl
from streamcl.serving import Settings, application

schemathesis = pytest.importorskip("schemathesis")
OPERATIONS = ["POST /predict", "POST /adapt", "POST /feed", "POST /feedback", "POST /promote", "POST /rollback"]
OPERATIONS += ["GET /status", "GET /inputs", "GET /metrics", "GET /health", "GET /"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server in a thread of this process, and where it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCL_PREDICT_TOKEN", PREDICT)
        patch.setenv("STREAMCL_CHANGE_TOKEN", CHANGE)
        app, _ = application(digits_run(tmp_path_factory.mktemp("served") / "run"), Settings(threads=1, tell=QUIET.append))
    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    app.state.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    while not running.started:
        time.sleep(0.01)
    yield app
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def operations(server):
    schema = schemathesis.openapi.from_url(f"{server.state.url}/openapi.json")
    return {operation.label: operation for operation in (found.ok() for found in schema.get_all_operations())}


def test_the_document_describes_every_endpoint(operations):
    assert sorted(operations) == sorted(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_every_answer_is_as_the_document_says(operations, server, label, mode):
    checks = [
        schemathesis.checks.not_a_server_error,
        schemathesis.checks.status_code_conformance,
        schemathesis.checks.content_type_conformance,
        schemathesis.checks.response_schema_conformance,
    ]

    @settings(
        max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=[Phase.explicit, Phase.generate]
    )
    @given(case=operations[label].as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def answered(case):
        case.call_and_validate(headers=dict(ALTER), checks=checks)

    try:
        answered()
    except Exception as error:
        if mode == "negative" and type(error).__name__ in ("SkipTest", "Unsatisfiable", "OperationSchemaError"):
            pytest.skip("nothing about it can be wrong")
        raise
    assert server.state.server.service.writer.failed == 0


def test_the_examples_of_the_document_are_answered(server):
    service = server.state.server.service
    document = httpx.get(f"{server.state.url}/openapi.json").json()
    assert document["components"]["securitySchemes"].keys() == {"ask", "change"} and document["info"]["version"] == streamcl.__version__
    for path in ("/predict", "/adapt", "/feed", "/feedback", "/rollback"):
        for example in document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["examples"].values():
            answer = httpx.post(f"{server.state.url}{path}", json=example["value"], headers=ALTER)
            assert answer.status_code == 200, (path, answer.text)
    assert service.journal.samples and json.dumps(document)
