"""Who may ask, and who may change: two bearer tokens, of which only the hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from streamcl.errors import ConfigError
from streamcl.writing import write_atomically

PREDICT, CHANGE = "STREAMCL_PREDICT_TOKEN", "STREAMCL_CHANGE_TOKEN"  # the environment variables that hold them
ROLES = {"predict": PREDICT, "change": CHANGE}
SHORTEST = 16  # characters


@dataclass(frozen=True)
class Tokens:
    """SHA-256 of the token for asking and of the one for changing. Whoever may change may ask."""

    predict: bytes
    change: bytes

    def allows(self, header: str | None, change: bool) -> bool:
        """Whether an Authorization header is good for this. It takes as long for a wrong token as for the right one."""
        kind, _, given = (header or "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        changes, asks = hmac.compare_digest(digest, self.change), hmac.compare_digest(digest, self.predict)
        return kind.lower() == "bearer" and (changes or (asks and not change))

    def known(self, header: str | None) -> bool:
        return self.allows(header, change=False)


def tokens(folder: Path, file: Path | None = None) -> tuple[Tokens, dict[str, str]]:
    """The tokens, and those of them that were drawn just now, which nobody will be shown again.

    From `file` (JSON: {"predict": ..., "change": ...}), else from the environment, else those drawn before for this folder.
    """
    given = _from_file(file) if file is not None else {role: os.environ[name] for role, name in ROLES.items() if os.environ.get(name)}
    for role, token in given.items():
        if len(token) < SHORTEST:
            raise ConfigError(f"the token for {role} has {len(token)} characters: at least {SHORTEST} are needed")
    kept_in = folder / "tokens.json"
    kept: dict[str, str] = json.loads(kept_in.read_text(encoding="utf-8")) if kept_in.is_file() else {}
    drawn = {role: secrets.token_urlsafe(32) for role in ROLES if role not in given and role not in kept}
    if drawn:
        aside = kept_in.with_name(f".{kept_in.name}.writing")
        aside.touch(mode=0o600)  # before it holds anything
        write_atomically(kept_in, json.dumps({**kept, **{role: _hash(token).hex() for role, token in drawn.items()}}))
    hashes = {
        role: _hash(given[role]) if role in given else _hash(drawn[role]) if role in drawn else bytes.fromhex(kept[role]) for role in ROLES
    }
    if hashes["predict"] == hashes["change"]:
        raise ConfigError("the tokens for asking and for changing the model are the same: give two")
    return Tokens(hashes["predict"], hashes["change"]), drawn


def _from_file(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: the tokens cannot be read: {error}") from None
    if not isinstance(found, dict) or found.keys() != ROLES.keys() or not all(isinstance(token, str) for token in found.values()):
        raise ConfigError(f'{file} must hold the two tokens: {{"predict": "...", "change": "..."}}')
    return found


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.strip().encode()).digest()
