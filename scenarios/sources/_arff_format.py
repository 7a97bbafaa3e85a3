"""The ARFF format: attributes with their types, and rows that are dense or sparse."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from streamcl.errors import DataError

from ._listed import Refused

_NAME = re.compile(r"""@attribute\s+('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s{]+)\s*(.+)""", re.IGNORECASE | re.DOTALL)
_FIELD = re.compile(r"""\s*('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^,]*?)\s*(?:,|$)""")
_SPARSE = re.compile(r"""\s*(\d+)\s+('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^,\s]+)\s*(?:,|$)""")


@dataclass
class Attribute:
    """`values` are those of a nominal attribute; `kind` is number, nominal, or other (text and dates)."""

    name: str
    kind: str
    values: tuple[str, ...] | None = None


@dataclass
class Relation:
    """The rows of a file, a column for each attribute: numbers (NaN where missing), or places among the values (-1)."""

    file: str
    attributes: list[Attribute]
    columns: list[np.ndarray]
    lines: np.ndarray  # in which line each row stands


def read_arff(file: str, data: bytes, refused: Refused) -> Relation:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # Weka writes in the platform's encoding, and some of the published files are older than UTF-8
    lines = text.splitlines()
    attributes: list[Attribute] = []
    begin = None
    for number, line in enumerate(lines, 1):
        word = line.strip().lower()
        if word.startswith("@attribute"):
            attributes.append(_attribute(line.strip(), f"{file}, line {number}"))
        elif word.startswith("@data"):
            begin = number
            break
        elif word and not word.startswith(("%", "@relation")):
            raise DataError(f"{file}, line {number}: @relation, @attribute or @data is expected before the rows")
    if begin is None or not attributes:
        raise DataError(f"{file}: this is no ARFF file: it has no {'@attribute' if not attributes else '@data'}")
    names = [attribute.name for attribute in attributes]
    twice = [name for position, name in enumerate(names) if name in names[:position]] if len(set(names)) < len(names) else []
    if twice:
        raise DataError(f"{file}: two attributes are called {twice[0]!r}")
    defaults = ["0" if attribute.values is None else attribute.values[0] for attribute in attributes]
    rows: list[list[str]] = []
    kept: list[int] = []
    for number, line in enumerate(lines[begin:], begin + 1):
        written = line.strip()
        if not written or written.startswith("%"):
            continue
        try:
            rows.append(_sparse(written, defaults) if written.startswith("{") else _dense(written, len(attributes)))
            kept.append(number)
        except ValueError as error:
            refused.add("row that cannot be read", f"{file}, line {number}: {error}")
    rows, kept = _check_values(file, attributes, rows, kept, refused)
    columns = [_column(attribute, [row[place] for row in rows]) for place, attribute in enumerate(attributes)]
    return Relation(file, attributes, columns, np.array(kept, dtype=np.int64))


def _attribute(line: str, where: str) -> Attribute:
    match = _NAME.fullmatch(line)
    if match is None:
        raise DataError(f"{where}: @attribute needs a name and a type")
    name, kind = _unquoted(match.group(1)), match.group(2).strip()
    if kind.startswith("{"):
        inside, closed, _ = kind[1:].rpartition("}")
        values = tuple(_fields(inside)) if closed else ()
        if not values:
            raise DataError(f"{where}: the values of {name!r} are expected as {{a, b, ...}}")
        return Attribute(name, "nominal", values)
    word = kind.split()[0].lower()
    if word in ("numeric", "real", "integer"):
        return Attribute(name, "number")
    if word in ("string", "date"):
        return Attribute(name, "other")
    raise DataError(f"{where}: {kind!r} is no type of ARFF that is read: numeric, real, integer, string, date and {{a, b, ...}} are")


def _fields(written: str) -> list[str]:
    if "'" not in written and '"' not in written:
        return [field.strip() for field in written.split(",")]
    found, place = [], 0
    while place <= len(written):
        match = _FIELD.match(written, place)
        if match is None:
            raise ValueError("a quote is not closed")
        found.append(_unquoted(match.group(1)))
        if match.end() >= len(written) and not written[: match.end()].endswith(","):
            break
        place = match.end()
    return found


def _dense(written: str, width: int) -> list[str]:
    fields = _fields(written)
    if len(fields) != width:
        raise ValueError(f"there are {len(fields)} values and {width} attributes")
    return fields


def _sparse(written: str, defaults: list[str]) -> list[str]:
    if not written.endswith("}"):
        raise ValueError("a sparse row must end with }")
    row, inside, place = list(defaults), written[1:-1].strip(), 0
    while place < len(inside):
        match = _SPARSE.match(inside, place)
        if match is None or match.end() == place:
            raise ValueError(f"{inside[place : place + 20]!r} is no pair of an attribute's number and its value")
        if int(match.group(1)) >= len(row):
            raise ValueError(f"attribute {match.group(1)} is named, and they run from 0 to {len(row) - 1}")
        row[int(match.group(1))] = _unquoted(match.group(2))
        place = match.end()
    return row


def _check_values(
    file: str, attributes: list[Attribute], rows: list[list[str]], kept: list[int], refused: Refused
) -> tuple[list[list[str]], list[int]]:
    """Leave out the rows with a value that its attribute cannot take; nearly always there is none, so columns are looked at first."""
    wrong: dict[int, str] = {}
    for place, attribute in enumerate(attributes):
        column = [row[place] for row in rows]
        if attribute.values is not None:
            allowed = {*attribute.values, "?"}
            if not set(column) <= allowed:
                wrong |= {
                    row: f"{value!r} is no value of {attribute.name!r}: it takes {', '.join(attribute.values[:8])}"
                    for row, value in enumerate(column)
                    if value not in allowed
                }
        elif attribute.kind == "number":
            try:
                np.array(column, dtype=np.float64)
            except ValueError:
                wrong |= {row: f"{value!r} in {attribute.name!r} is no number" for row, value in enumerate(column) if not _is_number(value)}
    for row in sorted(wrong):
        refused.add("row that cannot be read", f"{file}, line {kept[row]}: {wrong[row]}")
    if not wrong:
        return rows, kept
    good = [row for row in range(len(rows)) if row not in wrong]
    return [rows[row] for row in good], [kept[row] for row in good]


def _column(attribute: Attribute, values: list[str]) -> np.ndarray:
    if attribute.values is not None:
        code = {value: place for place, value in enumerate(attribute.values)} | {"?": -1}
        return np.array([code[value] for value in values], dtype=np.int64)
    if attribute.kind == "other":
        return np.zeros(len(values))
    try:
        return np.array(values, dtype=np.float64)
    except ValueError:
        return np.array([np.nan if value == "?" else float(value) for value in values])


def _is_number(value: str) -> bool:
    if value == "?":
        return True
    try:
        float(value)
    except ValueError:
        return False
    return True


def _unquoted(written: str) -> str:
    if len(written) >= 2 and written[0] == written[-1] and written[0] in "'\"":
        return re.sub(r"\\(.)", r"\1", written[1:-1])
    return written
