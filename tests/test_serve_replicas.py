"""Several servers of one model: equal requests get equal answers at equal versions, and nothing that is not whole is served."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from served_runs import ALTER, ASK, CHANGE, PREDICT, as_json, copied, digits, digits_run, served

from streamcl.errors import ConfigError
from streamcl.serving import Settings, made


@pytest.fixture(autouse=True)
def given_tokens(monkeypatch):
    monkeypatch.setenv("STREAMCL_PREDICT_TOKEN", PREDICT)
    monkeypatch.setenv("STREAMCL_CHANGE_TOKEN", CHANGE)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return digits_run(tmp_path_factory.mktemp("trained") / "run")


def answer(client, count=50):
    return client.post("/predict?scores=1", json=as_json(digits(count)), headers=ASK).json()


def arrives(client, version, seconds=10.0):
    until = time.monotonic() + seconds
    while client.get("/health").json()["version"] != version and time.monotonic() < until:
        time.sleep(0.02)
    assert client.get("/health").json()["version"] == version


def test_followers_serve_each_version_as_it_is_published(run, tmp_path):
    deltas = tmp_path / "deltas"
    with served(copied(run, tmp_path / "a"), publish=deltas) as first, served(copied(run, tmp_path / "b"), follow=deltas) as second:
        assert answer(second) == answer(first)
        seen = set()
        for k in range(4):
            first.post("/adapt", json=as_json(digits(64, 64 * k)), headers=ALTER)
            version = first.post("/promote", headers=ALTER).json()["version"]
            arrives(second, version)
            assert answer(second) == answer(first) and answer(second)["version"] == version
            seen.add(json.dumps(answer(second)["scores"]))
        assert len(seen) == 4
        first.post("/rollback", json={"version": 0}, headers=ALTER)
        arrives(second, 0)
        assert answer(second) == answer(first)
        with served(copied(run, tmp_path / "c"), follow=deltas) as late:
            arrives(late, 0)
            assert answer(late) == answer(first)
        status = second.get("/status", headers=ASK).json()
        assert status["follows"] == str(deltas) and not status["server"]["events"]
    assert len(list(deltas.glob("*.safetensors"))) <= 8


def test_a_follower_changes_nothing_by_itself(run, tmp_path):
    deltas = tmp_path / "deltas"
    deltas.mkdir()
    with served(copied(run, tmp_path / "run"), follow=deltas) as client:
        for path in ("/adapt", "/promote", "/rollback", "/feed"):
            refused = client.post(path, json=as_json(digits(2), labels=["1", "2"]), headers=ALTER)
            assert refused.status_code == 409 and refused.json()["error"], path
        assert answer(client)["version"] == 0
        assert not (tmp_path / "run" / "served" / "journal.db").exists()


def test_a_delta_that_is_damaged_or_of_another_model_is_not_served(run, tmp_path):
    deltas = tmp_path / "deltas"
    with served(copied(run, tmp_path / "a"), publish=deltas) as first, served(copied(run, tmp_path / "b"), follow=deltas) as second:
        first.post("/adapt", json=as_json(digits(64)), headers=ALTER)
        first.post("/promote", headers=ALTER)
        arrives(second, 1)
        before, current = answer(second), json.loads((deltas / "current.json").read_text())
        damaged = bytearray((deltas / current["file"]).read_bytes())
        damaged[-1] ^= 1
        (deltas / "00000002-damaged.safetensors").write_bytes(damaged)
        for change, said in (
            ({"file": "00000002-damaged.safetensors", "sha256": "0" * 64}, "checksum"),
            ({"model": "another", "sha256": "1" * 64}, "another"),
        ):
            (deltas / "current.json").write_text(json.dumps({**current, "version": 2, **change}))
            until = time.monotonic() + 10
            while time.monotonic() < until:
                events = second.get("/status", headers=ASK).json()["server"]["events"]
                if any(said in event["why"] for event in events):
                    break
                time.sleep(0.05)
            assert said in events[-1]["why"]
            assert answer(second) == before
        (deltas / "current.json").write_text("{")
        time.sleep(0.5)
        assert answer(second) == before


def test_what_cannot_be_followed_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="not both"):
        made(run, Settings(publish=tmp_path / "a", follow=tmp_path / "b"))
    with pytest.raises(ConfigError, match="served inline"):
        made(run, Settings(strategy="source", publish=tmp_path / "a"))
