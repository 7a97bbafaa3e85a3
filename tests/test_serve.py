"""The server: what it answers, what it refuses and leaves untouched, who may do what, and that it goes on where it was."""

from __future__ import annotations

import io
import json
import re
import shlex
import socket
import stat
import threading
import time
import wave
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from safetensors.torch import save
from served_runs import ALTER, ASK, CHANGE, PREDICT, as_json, b64, copied, digits, digits_run, npy, served

import streamcl
import streamcl.running
import streamcl.serving
from streamcl import feeding
from streamcl.deploying import online
from streamcl.errors import ConfigError, DiskError, RunError
from streamcl.plugins import find
from streamcl.serving import Settings, application
from streamcl.serving.journal import Journal, packed, unpacked
from streamcl.serving.tokens import tokens
from streamcl.stream import Batch


@pytest.fixture(autouse=True)
def given_tokens(monkeypatch):
    monkeypatch.setenv("STREAMCL_PREDICT_TOKEN", PREDICT)
    monkeypatch.setenv("STREAMCL_CHANGE_TOKEN", CHANGE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return digits_run(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return copied(trained, tmp_path / "run")


@pytest.fixture(scope="module")
def client(trained, tmp_path_factory):
    """One server for what leaves no trace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCL_PREDICT_TOKEN", PREDICT)
        patch.setenv("STREAMCL_CHANGE_TOKEN", CHANGE)
        with served(copied(trained, tmp_path_factory.mktemp("shared") / "run"), limits={"body": 100_000, "most": 64}) as client:
            yield client


def learned_all(client, seconds=20):
    """Wait until the writer has learned what was acknowledged."""
    until = time.monotonic() + seconds
    while client.service.unlearned and time.monotonic() < until:
        time.sleep(0.02)
    assert not client.service.unlearned


# -- answers -----------------------------------------------------------------------------------------------------------------------


def test_what_is_predicted_is_what_the_run_has_learned_and_nothing_is_learned_from_it(trained, client):
    images = digits(20)
    answer = client.post("/predict?scores=true", json=as_json(images), headers=ASK)
    assert answer.status_code == 200
    found, learned = answer.json(), streamcl.load(trained)
    assert found["predictions"] == learned.predict(images)
    assert torch.allclose(torch.tensor(found["scores"]), learned.scores(images), atol=1e-5)
    assert found["version"] == 0 and not {"made", "ids"} & found.keys() and found["classes"] == learned.classes
    assert len(found["confidences"]) == 20 and all(0 < one <= 1 for one in found["confidences"])
    status = client.get("/status", headers=ASK).json()
    assert status["server"]["acknowledged"] == 0 and status["batches"] == 0


def test_every_form_of_the_same_image_gets_the_same_answer(client):
    images = digits(3)
    plain = client.post("/predict?scores=1", json=as_json(images), headers=ASK).json()["scores"]
    files = []
    for image in images:
        scaled = np.round(image[0].numpy() * (255 / 16)).astype(np.uint8)  # 16 is the white of this stream
        file = io.BytesIO()
        Image.fromarray(scaled).save(file, "PNG")
        files.append(file.getvalue())
    archive = io.BytesIO()
    np.savez_compressed(archive, image=images.numpy())
    raw = {**ASK, "Content-Type": "application/octet-stream"}
    others = [
        client.post("/predict?scores=1", json={"inputs": images.tolist()}, headers=ASK),
        client.post("/predict?scores=1", json={"inputs": images[:, 0].tolist()}, headers=ASK),  # without the one channel
        client.post("/predict?scores=1", json={"inputs": {"npy": b64(npy(images))}}, headers=ASK),
        client.post("/predict?scores=1", json={"inputs": {"image": {"npy": b64(npy(images.long()))}}}, headers=ASK),
        client.post("/predict?scores=1", json={"inputs": {"image": {"images": [b64(one) for one in files]}}}, headers=ASK),
        client.post("/predict?scores=1", json={"inputs": {"images": [f"data:image/png;base64,{b64(one)}" for one in files]}}, headers=ASK),
        client.post("/predict?scores=1", content=npy(images), headers=raw),
        client.post("/predict?scores=1", content=archive.getvalue(), headers=raw),
        client.post("/predict?scores=1", content=npy(np.asfortranarray(images.numpy())), headers=raw),
        client.post("/predict?scores=1", files=[("image", ("a.png", one)) for one in files], headers=ASK),
        client.post("/predict?scores=1", files=[("image", ("a.npy", npy(images)))], headers=ASK),
    ]
    for number, other in enumerate(others):
        assert other.status_code == 200, (number, other.text)
        assert other.json()["scores"] == plain, number


def test_one_sample_is_answered_as_it_is_among_others(client):
    images = digits(30)
    together = client.post("/predict?scores=1", json=as_json(images), headers=ASK).json()["scores"]
    alone = [client.post("/predict?scores=1", json=as_json(one[None]), headers=ASK).json()["scores"][0] for one in images]
    assert np.allclose(together, alone, atol=1e-4)


def test_requests_that_come_together_are_answered_together(run):
    with served(run, limits={"wait": 0.2}) as client, ThreadPoolExecutor(8) as pool:
        before, calls = client.service.loop.predict, []
        client.service.loop.predict = lambda batch: calls.append(len(batch)) or before(batch)
        answers = list(pool.map(lambda k: client.post("/predict", json=as_json(digits(k + 1)), headers=ASK).json(), range(8)))
    assert [len(answer["predictions"]) for answer in answers] == list(range(1, 9))
    assert len(calls) < 8 and sum(calls) == 36
    assert [answer["predictions"] for answer in answers] == [answers[-1]["predictions"][: k + 1] for k in range(8)]


# -- refusals ----------------------------------------------------------------------------------------------------------------------


def zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", bytes(50_000_000))
    return file.getvalue()


def png(width, height) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (height, width), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


IMAGES = digits(2)
LYING = npy(IMAGES).replace(b"(2, 1, 8, 8)", b"(9, 1, 8, 8)")
BAD = {
    "no JSON": (b"{", 400, "no JSON"),
    "nested too deeply": (b"[" * 50_000, 400, "no JSON"),
    "no object": (b"[1]", 422, "JSON object"),
    "no inputs": (b"{}", 422, "no inputs"),
    "wrong shape": (json.dumps({"inputs": [[[1, 2], [3, 4]]]}), 422, "1 x 8 x 8"),
    "ragged": (json.dumps({"inputs": [[1, 2], [3]]}), 422, "different lengths"),
    "far too deep": (json.dumps({"inputs": [[[[[[[[[1]]]]]]]]]}), 422, "lists of numbers"),
    "decimal": (json.dumps({"inputs": (IMAGES + 0.5).tolist()}), 422, "whole numbers from 0 to 16"),
    "too bright": (json.dumps({"inputs": (IMAGES + 100).tolist()}), 422, "0 to 16"),
    "negative": (json.dumps({"inputs": (IMAGES.long() - 5).tolist()}), 422, "0 to 16"),
    "NaN": (json.dumps({"inputs": [float("nan")]}), 422, "finite"),
    "enormous": (b'{"inputs": [[[[' + b"9" * 5000 + b"]]]]}", 400, "no JSON"),
    "large": (b'{"inputs": [[[[' + b"9" * 100 + b"]]]]}", 422, "numbers"),
    "boolean": (json.dumps({"inputs": [[[[True] * 8] * 8]]}), 422, "lists of numbers"),
    "text": (json.dumps({"inputs": ["abc"]}), 422, "lists of numbers"),
    "empty": (json.dumps({"inputs": []}), 422, "empty"),
    "another modality": (json.dumps({"inputs": {"sound": [[1]]}}), 422, "no modality 'sound'"),
    "missing modality": (json.dumps({"inputs": {}}), 422, "this model takes image"),
    "no base64": (json.dumps({"inputs": {"npy": "%%%"}}), 422, "base64"),
    "no picture": (json.dumps({"inputs": {"images": [b64(b"abc")]}}), 422, "no picture"),
    "half a picture": (json.dumps({"inputs": {"images": [b64(png(8, 8)[:50])]}}), 422, "no picture"),
    "a picture too large": (json.dumps({"inputs": {"images": [b64(png(9, 9))]}}), 422, "9 x 9"),
    "too many": (json.dumps({"inputs": [[[[0] * 8] * 8]] * 65}), 413, "at most 64"),
    "too long": (json.dumps({"inputs": [0] * 60_000}), 413, "100000 bytes"),
    "ids of their own": (json.dumps(as_json(IMAGES, ids=[5, 6])), 422, "'ids', and only inputs, present may be in it: the server"),
    "an unknown key": (json.dumps(as_json(IMAGES, labels=["1", "2"])), 422, "'labels'"),
    "masks that are none": (json.dumps(as_json(IMAGES, present={"image": [1, 2]})), 422, "present"),
    "words in an array": (npy(np.array(["a"])), 422, "must be numbers"),
    "objects": (b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }" + b" " * 60 + b"\n", 422, "npy"),
    "a header that lies": (LYING, 422, "its header says"),
    "a zip that grows": (zip_bomb(), 413, "unpacks"),
    "half an array": (npy(IMAGES)[:-7], 422, "its header says"),
    "noise": (b"\x00\x01\x02", 422, "no .npy file"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", ["/predict", "/adapt"])
def test_bad_input_gets_one_sentence_and_the_model_is_untouched(client, path, name):
    content, status, sentence = BAD[name]
    raw = not isinstance(content, str) and content.lstrip()[:1] not in (b"{", b"[")
    kind = "application/octet-stream" if raw else "application/json"
    answer = client.post(path, content=content, headers={**ALTER, "Content-Type": kind})
    assert answer.status_code == status, answer.text
    why = answer.json()["error"]
    assert sentence in why and "\n" not in why and len(why) < 400, why
    assert client.service.journal.samples == 0 and client.service.loop.batches == 0


def test_an_unknown_field_of_a_form_is_named_before_its_content_is_looked_at(client):
    for path in ("/predict", "/feed"):
        answer = client.post(path, files=[("foto", ("a.png", png(8, 8)))], headers=ALTER)
        assert answer.status_code == 422 and answer.json()["error"] == "there is no modality 'foto': this model takes image"


@pytest.mark.parametrize(
    ("path", "body"),
    [("/feedback", {"ids": [0], "labels": ["1"], "correct": True}), ("/rollback", {"versoin": 1}), ("/promote", {"version": 3})],
)
def test_unknown_keys_of_orders_are_refused_by_name(client, path, body):
    answer = client.post(path, json=body, headers=ALTER)
    assert answer.status_code == 422 and repr(list(body)[-1]) in answer.json()["error"]
    assert client.service.journal.last == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Content-Type": "text/csv"}, 415), ({"Content-Encoding": "gzip"}, 415), ({"Content-Type": "multipart/form-data"}, 400)],
)
def test_bodies_of_other_kinds_are_refused(client, headers, status):
    answer = client.post("/predict", content=b"{}", headers={"Content-Type": "application/json", **ASK, **headers})
    assert answer.status_code == status and answer.json()["error"]


def test_a_body_of_unknown_length_is_cut_off_where_it_is_too_long(client):
    endless = (b" " * 10_000 for _ in range(1000))
    assert client.post("/predict", content=endless, headers={**ASK, "Content-Type": "application/json"}).status_code == 413


def test_an_unknown_path_says_what_there_is(client):
    answer = client.get("/nothing")
    assert answer.status_code == 404 and "POST /predict" in answer.json()["error"]
    assert client.get("/predict").status_code == 405


# -- tokens ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "predict", "adapt"),
    [
        (None, 401, 401),
        ("Bearer wrong", 401, 401),
        (f"Basic {PREDICT}", 401, 401),
        (f"Bearer {PREDICT}", 422, 403),
        (f"bearer {CHANGE}", 422, 422),
    ],
)
def test_each_token_opens_what_it_is_for(client, header, predict, adapt):
    headers = {"Authorization": header} if header else {}
    for path, status in (("/predict", predict), ("/adapt", adapt)):
        answer = client.post(path, json={}, headers=headers)
        assert answer.status_code == status
        assert (answer.headers.get("www-authenticate") == "Bearer") == (status == 401)
    for path in ("/feed", "/feedback", "/promote", "/rollback"):
        assert client.post(path, headers={"Authorization": f"Bearer {PREDICT}"}).status_code == 403
    assert client.get("/metrics").status_code == client.get("/status").status_code == 401
    assert client.get("/inputs", headers=ASK).status_code == 403
    assert client.get("/health").status_code == client.get("/").status_code == 200


def test_tokens_are_drawn_once_and_only_their_hashes_are_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("STREAMCL_PREDICT_TOKEN")
    monkeypatch.delenv("STREAMCL_CHANGE_TOKEN")
    known, drawn = tokens(tmp_path)
    assert drawn.keys() == {"predict", "change"} and drawn["predict"] != drawn["change"]
    file = tmp_path / "tokens.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not any(token in file.read_text() for token in drawn.values())
    again, nothing = tokens(tmp_path)
    assert again == known and not nothing
    assert again.allows(f"Bearer {drawn['change']}", change=True) and not again.allows(f"Bearer {drawn['predict']}", change=True)


def test_tokens_come_from_a_file_and_bad_ones_are_refused(tmp_path):
    file = tmp_path / "tokens"
    file.write_text(json.dumps({"predict": "p" * 20, "change": "c" * 20}))
    known, drawn = tokens(tmp_path, file)
    assert not drawn and known.allows(f"Bearer {'c' * 20}", change=True)
    for content in ("{}", "no", json.dumps({"predict": "p" * 20, "change": 3}), json.dumps({"predict": "short", "change": "c" * 20})):
        file.write_text(content)
        with pytest.raises(ConfigError):
            tokens(tmp_path, file)
    file.write_text(json.dumps({"predict": "c" * 20, "change": "c" * 20}))
    with pytest.raises(ConfigError, match="the same"):
        tokens(tmp_path, file)


# -- adapting ----------------------------------------------------------------------------------------------------------------------


def test_what_is_adapted_to_is_learned_in_its_order_as_the_loop_itself_would(run):
    parts = [digits(40, 40 * k) for k in range(6)]
    with served(run) as client:
        answers = []
        for part in parts:
            answers.append(client.post("/adapt", json=as_json(part), headers=ALTER).json())
            learned_all(client)
        version = client.get("/health").json()["version"]
        after = client.post("/predict?scores=1", json=as_json(digits(50)), headers=ASK).json()["scores"]
    assert [answer["ids"] for answer in answers] == [list(range(40 * k, 40 * k + 40)) for k in range(6)]
    assert all(answer["adapted"] for answer in answers)
    alone = online(streamcl.load(run), "tent", mode="shadow")
    for part in parts:
        alone.learn(streamcl.load(run).batch(part))
    assert alone.version == version
    assert torch.allclose(alone.predict(streamcl.load(run).batch(digits(50))).scores, torch.tensor(after), atol=1e-5)


def test_a_stopped_server_goes_on_where_it_was(run):
    with served(run) as client:
        for k in range(10):
            client.post("/adapt", json=as_json(digits(64, 64 * k)), headers=ALTER)
        learned_all(client)
        promoted = client.post("/promote", headers=ALTER).json()["version"]
        before = client.post("/predict?scores=1", json=as_json(digits(50)), headers=ASK).json()
        status = client.get("/status", headers=ASK).json()
    assert before["version"] == promoted > 0
    with served(run) as client:
        assert client.post("/predict?scores=1", json=as_json(digits(50)), headers=ASK).json() == before
        now = client.get("/status", headers=ASK).json()
        for name in ("version", "versions", "batches", "counts", "events"):
            assert now[name] == status[name], name
        assert now["server"]["acknowledged"] == 640 and now["server"]["replayed"] == 0
        assert client.post("/adapt", json=as_json(digits(3)), headers=ALTER).json()["ids"] == [640, 641, 642]


def test_what_was_acknowledged_and_not_learned_is_learned_after_a_restart(run):
    with served(run, limits={"update": 10_000, "idle": 1000.0}) as client:  # the writer waits for more
        client.post("/adapt", json=as_json(digits(30)), headers=ALTER)
        assert client.service.unlearned == 30 and client.service.writer.updates == 0
    with served(run) as client:
        learned_all(client)
        assert client.service.writer.updates == 1 and client.service.journal.samples == 30
        assert client.get("/status", headers=ASK).json()["counts"]["adapted"] == 30


def test_a_request_that_is_sent_again_under_its_key_is_learned_once(run):
    with served(run) as client:
        again = [client.post("/adapt", json=as_json(digits(4)), headers={**ALTER, "Idempotency-Key": "k1"}).json() for _ in range(3)]
        assert [answer["adapted"] for answer in again] == [True, False, False]
        assert all(answer["ids"] == [0, 1, 2, 3] for answer in again)
        other = client.post("/adapt", json=as_json(digits(5)), headers={**ALTER, "Idempotency-Key": "k1"})
        assert other.status_code == 422 and "4 samples before" in other.json()["error"]
    with served(run) as client:  # also after a restart
        assert not client.post("/adapt", json=as_json(digits(4)), headers={**ALTER, "Idempotency-Key": "k1"}).json()["adapted"]
        assert client.service.journal.samples == 4


def test_labels_that_come_late_are_scored(run):
    from sklearn.datasets import load_digits

    with served(run) as client:
        answer = client.post("/adapt", json=as_json(digits(50)), headers=ALTER).json()
        labels = [str(label) for label in load_digits().target[:50]]
        told = client.post("/feedback", json={"ids": answer["ids"], "labels": labels}, headers=ALTER).json()
        right = sum(a == b for a, b in zip(answer["predictions"], labels, strict=True))
        assert told["labelled"] == 50 and told["right"] == right
        assert told["compared"] == 50 and told["recent_accuracy_frozen"] == right / 50, "version 0 answered, which is the deployed model"
        again = client.post("/feedback", json={"ids": answer["ids"], "labels": labels}, headers=ALTER).json()
        assert again["labelled"] == again["compared"] == 50, "a label counts once"
        for bad in (
            {"ids": [0]},
            {"ids": [], "labels": []},
            {"ids": [50], "labels": ["1"]},
            {"ids": [0], "labels": ["cat"]},
            {"ids": ["0"], "labels": ["1"]},
            {"ids": [1, 1], "labels": ["1", "2"]},
        ):
            refused = client.post("/feedback", json=bad, headers=ALTER)
            assert refused.status_code == 422 and refused.json()["error"]


def test_without_samples_that_are_kept_labels_are_scored_and_not_compared(run):
    with served(run, remember=0) as client:
        answer = client.post("/adapt", json=as_json(digits(3)), headers=ALTER).json()
        told = client.post("/feedback", json={"ids": answer["ids"], "labels": ["0", "1", "2"]}, headers=ALTER).json()
        assert told["labelled"] == 3 and told["compared"] == 0


@pytest.mark.parametrize("mode", ["shadow", "inline"])
def test_after_a_kill_what_was_taken_in_counts_as_answered(run, tmp_path, mode):
    with served(run, mode=mode) as client:
        for k in range(2):
            client.post("/adapt", json=as_json(digits(64, 64 * k)), headers=ALTER)
        learned_all(client)
        client.service.writer.save()
        client.post("/adapt", json=as_json(digits(64, 128)), headers=ALTER)
        learned_all(client)
        killed = copied(run, tmp_path / "killed")  # as the disk is now
    with served(killed, mode=mode) as client:
        learned_all(client)
        status = client.get("/status", headers=ASK).json()
        assert client.service.writer.replayed == 1
        assert status["samples"] == status["server"]["acknowledged"] == status["server"]["learned"] == 192


def test_a_version_is_promoted_and_gone_back_from(run):
    with served(run) as client:
        images = as_json(digits(64))
        first = client.post("/predict?scores=1", json=images, headers=ASK).json()
        for k in range(3):
            client.post("/adapt", json=as_json(digits(64, 64 * k)), headers=ALTER)
        promoted = client.post("/promote", headers=ALTER).json()["version"]
        second = client.post("/predict?scores=1", json=images, headers=ASK).json()
        assert second["version"] == promoted and second["scores"] != first["scores"]
        assert client.post("/rollback", json={"version": 0}, headers=ALTER).json() == {"version": 0}
        third = client.post("/predict?scores=1", json=images, headers=ASK).json()
        assert third == first
        refused = client.post("/rollback", json={"version": 99}, headers=ALTER)
        assert refused.status_code == 409 and "no version 99" in refused.json()["error"]
        assert client.post("/rollback", json={"version": "x"}, headers=ALTER).status_code == 422
        assert client.service.writer.failed == 0


def test_inline_a_request_is_answered_by_the_model_that_it_adapts(run):
    with served(run, mode="inline", guard=False) as client:
        versions = [client.post("/adapt", json=as_json(digits(64, 64 * k)), headers=ALTER).json()["version"] for k in range(3)]
        assert versions == [0, 1, 2]
    with served(run, mode="inline", guard=False) as client:
        assert client.get("/health").json()["version"] == 3
        assert client.post("/adapt", json=as_json(digits(64, 192)), headers=ALTER).json()["version"] == 3


def test_a_method_that_changes_no_weights_is_served_inline(run):
    with served(run, strategy="source") as client:
        assert client.get("/status", headers=ASK).json()["mode"] == "inline"
        assert client.post("/adapt", json=as_json(digits(8)), headers=ALTER).json()["predictions"] == streamcl.load(run).predict(digits(8))


def test_the_adaptation_begins_anew_where_the_run_has_learned_more(run):
    with served(run) as client:
        client.post("/adapt", json=as_json(digits(64)), headers=ALTER)
        client.post("/promote", headers=ALTER)
        model = client.get("/health").json()["model"]
    with served(run, strategy={"name": "tent", "answer": "after"}) as client:
        health = client.get("/health").json()
        assert health["version"] == 0 and health["model"] != model
        events = client.get("/status", headers=ASK).json()["server"]["events"]
        assert [event["what"] for event in events] == ["begun anew"]


# -- limits ------------------------------------------------------------------------------------------------------------------------


def slowed(client, seconds):
    before = client.service.loop.predict
    client.service.loop.predict = lambda batch: time.sleep(seconds) or before(batch)


def test_a_full_queue_asks_to_come_again(run):
    with served(run, limits={"queue": 8, "batch": 4, "update": 1000, "idle": 1000.0}) as client, ThreadPoolExecutor(12) as pool:
        assert client.post("/adapt", json=as_json(digits(6)), headers=ALTER).status_code == 200
        full = client.post("/adapt", json=as_json(digits(3)), headers=ALTER)
        assert full.status_code == 429 and full.headers["retry-after"] and "--queue" in full.json()["error"]
        slowed(client, 0.3)
        answers = list(pool.map(lambda _: client.post("/predict", json=as_json(digits(2)), headers=ASK), range(12)))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert refused and all(answer.status_code == 503 and answer.headers["retry-after"] for answer in refused)
        assert client.post("/predict", json=as_json(digits(2)), headers=ASK).status_code == 200


def test_what_takes_too_long_is_given_up(run):
    with served(run, limits={"timeout": 0.2}) as client:
        slowed(client, 0.6)
        answer = client.post("/predict", json=as_json(digits(2)), headers=ASK)
        assert answer.status_code == 503 and answer.headers["retry-after"]


def test_a_request_that_makes_the_model_fail_costs_the_others_nothing(run):
    with served(run, limits={"wait": 0.2}) as client, ThreadPoolExecutor(4) as pool:
        before = client.service.loop.predict

        def picky(batch):
            if any(float(image.max()) == 0 for image in batch.inputs["image"]):
                raise RuntimeError("an image of nothing")
            return before(batch)

        client.service.loop.predict = picky
        bodies = [as_json(digits(2)), as_json(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)), as_json(digits(3)), as_json(digits(1))]
        answers = list(pool.map(lambda body: client.post("/predict", json=body, headers=ASK), bodies))
        assert [answer.status_code for answer in answers] == [200, 500, 200, 200]
        assert "nothing" not in answers[1].text  # the log says it, the answer does not


def test_a_batch_that_cannot_be_learned_is_counted_and_the_writer_goes_on(run):
    with served(run) as client:
        before = client.service.loop.learn

        def failing(batch):
            raise RuntimeError("no")

        client.service.loop.learn = failing
        client.post("/adapt", json=as_json(digits(64)), headers=ALTER)
        learned_all(client)
        client.service.loop.learn = before
        client.post("/adapt", json=as_json(digits(64)), headers=ALTER)
        learned_all(client)
        status = client.get("/status", headers=ASK).json()["server"]
        assert status["failed"] == 1 and status["updates"] == 1 and status["events"][0]["what"] == "failed"


def test_a_folder_has_one_server(run):
    with served(run), pytest.raises(RunError, match="in use"):
        application(run, Settings(threads=1))


@pytest.mark.parametrize("sync", [False, True])
def test_what_could_not_be_answered_is_not_learned(run, sync):
    with served(run, limits={"wait": 0.2, "sync": sync, "update": 1000, "idle": 1000.0}) as client, ThreadPoolExecutor(3) as pool:
        before = client.service.loop.predict

        def picky(batch):
            if any(float(image.max()) == 0 for image in batch.inputs["image"]):
                raise RuntimeError("an image of nothing")
            return before(batch)

        client.service.loop.predict = picky
        bodies = [as_json(digits(2)), as_json(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)), as_json(digits(3))]
        answers = list(pool.map(lambda body: client.post("/adapt", json=body, headers=ALTER), bodies))
        assert [answer.status_code for answer in answers] == [200, 500, 200]
        kept = Batch.cat([entry.batch() for entry in client.service.journal.after(0)])
        assert sorted(kept.ids.tolist()) == sorted(answers[0].json()["ids"] + answers[2].json()["ids"])
        assert client.service.unlearned == client.service.journal.samples == 5


def test_what_was_given_up_is_not_learned(run):
    with served(run, limits={"timeout": 0.2}) as client:
        slowed(client, 0.6)
        assert client.post("/adapt", json=as_json(digits(2)), headers=ALTER).status_code == 503
        until = time.monotonic() + 10
        while client.service.unlearned and time.monotonic() < until:
            time.sleep(0.02)
        assert client.service.unlearned == client.service.journal.samples == 0


def test_a_full_disk_is_told_and_nothing_is_learned(run, monkeypatch):
    with served(run) as client:
        full = DiskError("the disk is full")
        monkeypatch.setattr(client.service.journal, "adapt", lambda *given: (_ for _ in ()).throw(full))
        refused = client.post("/adapt", json=as_json(digits(2)), headers=ALTER)
        assert refused.status_code == 507 and refused.json() == {"error": "the disk is full"}
        assert client.service.unlearned == 0
        monkeypatch.undo()
        assert client.post("/adapt", json=as_json(digits(2)), headers=ALTER).json()["ids"] == [2, 3]


def test_figures_of_the_answers_are_those_of_the_newest(client):
    client.post("/predict", json=as_json(torch.zeros(64, 1, 8, 8, dtype=torch.uint8)), headers=ASK)  # 320 later they are forgotten
    for first in range(0, 320, 64):
        client.post("/predict", json=as_json(digits(64, first)), headers=ASK)
    scores = torch.cat(
        [
            torch.tensor(client.post("/predict?scores=1", json=as_json(digits(64, k)), headers=ASK).json()["scores"])
            for k in range(64, 320, 64)
        ]
    )
    probabilities = scores.double().softmax(dim=1)
    status = client.get("/status", headers=ASK).json()
    assert status["entropy"] == pytest.approx(float(-(probabilities * probabilities.log()).sum(dim=1).mean()), abs=1e-4)
    assert status["confidence"] == pytest.approx(float(probabilities.amax(dim=1).mean()), abs=1e-4)


def test_below_a_path_of_a_proxy_it_answers_the_same(run):
    app, _ = application(run, Settings(threads=1))
    with TestClient(app, root_path="/models/one") as client:
        for path in ("/predict", "/models/one/predict"):
            answer = client.post(path, json=as_json(digits(20)), headers=ASK)
            assert answer.json()["predictions"] == streamcl.load(run).predict(digits(20))


def test_the_journal_holds_what_safetensors_would_write():
    batch = Batch(
        {"image": torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4).transpose(1, 2), "words": ["a", "b"], "sound": torch.randn(2, 5)},
        None,
        torch.tensor([7, 8]),
        {"sound": torch.tensor([True, False])},
    )
    about, content = packed(batch)
    columns = {"inputs.image": batch.inputs["image"].contiguous(), "inputs.sound": batch.inputs["sound"]}
    assert content == save({**columns, "present.sound": batch.present["sound"], "ids": batch.ids})
    again = unpacked(content, about)
    assert list(again.inputs) == ["image", "words", "sound"] and again.inputs["words"] == ["a", "b"]
    assert torch.equal(again.inputs["image"], batch.inputs["image"]) and torch.equal(again.present["sound"], batch.present["sound"])


# -- deliveries --------------------------------------------------------------------------------------------------------------------


def test_labelled_samples_wait_on_disk_until_the_run_is_fed(run):
    with served(run) as client:
        kept = client.post("/feed", json=as_json(digits(30), labels=["ten"] * 30), headers=ALTER).json()
        assert kept["kept"] == kept["waiting"] == 30
        kept = client.post("/feed", json=as_json(digits(10, 30), labels=[7] * 10), headers=ALTER).json()
        assert kept["waiting"] == 40 and kept["parts"] == 2
        command = shlex.split(kept["command"])
        client.post("/feed", json=as_json(digits(5), labels=["ten"] * 5), headers=ALTER)  # too late for that command
        assert command[:3] == ["streamcl", "feed", str(run)]
        scores = feeding.feed(Path(command[2]), command[3])
        assert len(scores["matrix"]) == 2
        status = client.get("/status", headers=ASK).json()
        assert status["feed"]["waiting"] == 5
    assert "ten" in streamcl.load(run).classes
    with served(run) as client:  # the run has learned: the model is another one
        assert client.get("/health").json()["version"] == 0
        assert client.post("/predict", json=as_json(digits(4)), headers=ASK).status_code == 200


def test_a_run_on_a_test_time_stream_is_not_fed(run, monkeypatch):
    before = streamcl.running.load

    def at_test_time(*given):
        learned = before(*given)
        learned.info = replace(learned.info, test_time=True)
        return learned

    monkeypatch.setattr(streamcl.running, "load", at_test_time)
    with served(run) as client:
        refused = client.post("/feed", json=as_json(digits(2), labels=["1", "2"]), headers=ALTER)
        assert refused.status_code == 409 and "test-time stream" in refused.json()["error"]
        assert "feed" not in client.get("/status", headers=ASK).json() and not (run / "served" / "deliveries").exists()


@pytest.mark.parametrize("labels", [None, [], ["1"], ["1", ""], ["1", True], ["1", ["2"]], "12", {"a": 1}])
def test_labels_that_do_not_fit_are_refused(client, labels):
    answer = client.post("/feed", json=as_json(digits(2), labels=labels), headers=ALTER)
    assert answer.status_code == 422 and "label" in answer.json()["error"]
    assert not client.service.folder.joinpath("deliveries").exists()


def test_the_source_of_deliveries_joins_label_sets_of_different_classes(tmp_path):
    from streamcl.learned import plain_info
    from streamcl.stream import Modality, StreamInfo

    info = StreamInfo({"text": Modality("text"), "vector": Modality("vector", (2,))}, target="labels")
    about = np.array(json.dumps({"format": 1, "stream": plain_info(info)}))
    for number, (texts, rows, names) in enumerate([(["a"], [[1, 0]], ["x", "y"]), (["b", "c"], [[1, 1], [0, 0]], ["z", "x"])], 1):
        parts = {"inputs.text": np.array(texts), "inputs.vector": np.ones((len(texts), 2), np.float32)}
        np.savez(tmp_path / f"{number:08d}.npz", **parts, target=np.array(rows, dtype=np.int8), classes=np.array(names), about=about)
    data = find("source", "served").load()(path=tmp_path).load()
    assert data.class_names == ["x", "y", "z"] and data.train.targets.tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0]]
    assert data.train[torch.arange(3)].inputs["text"] == ["a", "b", "c"]


# -- what is seen from outside -----------------------------------------------------------------------------------------------------


def test_prometheus_finds_figures(run):
    with served(run) as client:
        client.post("/adapt", json=as_json(digits(64)), headers=ALTER)
        learned_all(client)
        client.post("/predict", json={}, headers=ASK)
        time.sleep(0.3)
        found = client.get("/metrics", headers=ASK)
    assert found.headers["content-type"].startswith("text/plain")
    for line in (
        'streamcl_requests_total{endpoint="adapt",status="200"} 1.0',
        'streamcl_requests_total{endpoint="predict",status="422"} 1.0',
        "streamcl_acknowledged_samples_total 64.0",
        'streamcl_loop_total{what="adapted"} 64.0',
        "streamcl_unlearned_samples 0.0",
    ):
        assert line in found.text, line
    assert re.search(r"^streamcl_entropy \d", found.text, re.MULTILINE)


def test_the_page_reads_only_what_the_status_has(run):
    page = (Path(streamcl.serving.__file__).parent / "page.html").read_text()
    with served(run) as client:
        client.post("/adapt", json=as_json(digits(64)), headers=ALTER)
        learned_all(client)
        client.post("/feed", json=as_json(digits(2), labels=["1", "2"]), headers=ALTER)
        time.sleep(0.3)
        status = client.get("/status", headers=ASK).json()
    status["counts"].setdefault("skipped", 0)  # of the methods that choose their samples
    reads = {"status": status, **{name: status[name] for name in ("counts", "guard", "feedback", "server")}}
    for what, there in reads.items():
        names = set(re.findall(rf"(?<![.\w]){what}\.(\w+)", page))
        assert names and names <= there.keys(), (what, names - there.keys())
    assert {"disagreement", "bypassing", "resumes_at", "prefers_frozen", "strikes", "cooling"} <= status["guard"].keys()


def test_inputs_are_kept_only_where_asked_for(run, client):
    client.post("/predict", json=as_json(digits(1)), headers=ASK)
    assert client.get("/inputs", headers=ALTER).json() == {"kept": 0, "inputs": []}
    with served(run, inputs=2) as keeping:
        for k in range(3):
            keeping.post("/predict", json=as_json(digits(1, k)), headers=ASK)
        found = keeping.get("/inputs", headers=ALTER).json()
        assert found["kept"] == 2 and len(found["inputs"]) == 2 and found["inputs"][0]["image"]["png"]


def test_a_sound_and_a_picture_come_as_files(tmp_path):
    from small_runs import SEEN_AND_HEARD, small_run

    from streamcl import running

    running.run(small_run("finetune", strategy={"epochs": 1}, **SEEN_AND_HEARD), out=tmp_path / "run")
    with served(tmp_path / "run", strategy="source") as client:
        modalities = client.service.learned.info.modalities
        image, sound = modalities["image"].shape, modalities["audio"].shape
        picture, wav = io.BytesIO(), io.BytesIO()
        Image.new("RGB" if image[0] == 3 else "L", (image[2], image[1])).save(picture, "PNG")
        with wave.open(wav, "wb") as file:
            file.setnchannels(2), file.setsampwidth(2), file.setframerate(8000)
            file.writeframes(np.zeros(2 * int(np.prod(sound)), dtype="<i2").tobytes())
        files = [("image", ("a.png", picture.getvalue())), ("audio", ("a.wav", wav.getvalue()))]
        answer = client.post("/predict", files=files, headers=ASK)
        assert answer.status_code == 200, answer.text
        by_json = {"inputs": {"image": {"images": [b64(picture.getvalue())]}, "audio": {"wav": [b64(wav.getvalue())]}}}
        assert client.post("/predict", json=by_json, headers=ASK).json() == answer.json()
        lacking = client.post("/predict", files=files[:1], headers=ASK)
        assert lacking.status_code == 422 and "audio is missing" in lacking.json()["error"]
        for broken in (wav.getvalue()[:60], b"abc"):
            refused = client.post("/predict", files=[files[0], ("audio", ("a.wav", broken))], headers=ASK)
            assert refused.status_code == 422 and "audio" in refused.json()["error"]
        uneven = client.post("/predict", files=[*files, files[0]], headers=ASK)
        assert uneven.status_code == 422 and "different lengths" in uneven.json()["error"]
        nan = {
            "inputs": {"image": {"images": [b64(picture.getvalue())]}, "audio": {"npy": b64(npy(np.full((1, *sound), np.nan, np.float32)))}}
        }
        assert "NaN" in client.post("/predict", json=nan, headers=ASK).json()["error"]
        by_mask = {**by_json, "present": {"audio": [False], "image": [True]}}
        assert client.post("/predict", json=by_mask, headers=ASK).status_code == 200


def test_the_journal_gives_back_what_was_kept(tmp_path):
    from streamcl.stream import Batch

    journal = Journal(tmp_path / "journal.db")
    batch = Batch({"text": ["a", "ü"], "vector": torch.randn(2, 3)}, None, torch.tensor([5, 6]), {"vector": torch.tensor([True, False])})
    journal.adapt(batch, [("key", 5, 2)])
    journal.order("rollback", {"version": None})
    journal.cut(1)
    journal.close()
    journal = Journal(tmp_path / "journal.db")
    adapt, rollback = journal.after(0)
    again = adapt.batch()
    assert again.inputs["text"] == batch.inputs["text"] and torch.equal(again.inputs["vector"], batch.inputs["vector"])
    assert again.ids.tolist() == [5, 6] and again.present["vector"].tolist() == [True, False] and list(again.inputs) == ["text", "vector"]
    assert rollback.order() == {"version": None} and journal.cuts == [1] and journal.known("key") == (5, 2)
    assert (journal.last, journal.samples, journal.next) == (2, 2, 7)
    journal.forget(1)
    assert [entry.number for entry in journal.after(0)] == [2]
    journal.fold()
    journal.close()


def test_a_server_that_cannot_listen_says_so(run, capsys):
    from streamcl import serving

    taken = socket.create_server(("127.0.0.1", 0))
    with pytest.raises(ConfigError, match="cannot listen"):
        serving.serve(run, "127.0.0.1", taken.getsockname()[1], Settings(threads=1))
    taken.close()
    assert threading.active_count() < 50
