"""The JSON schema of the YAML, for editors: from the same tables by which a configuration is checked."""

from __future__ import annotations

from typing import Any

from streamcl.config import SECTIONS, section_types
from streamcl.plugins import KINDS, REQUIRED, Plugin, Type, plain, plugins, settings_names

_SIMPLE = {"none": "null", "bool": "boolean", "int": "integer", "float": "number", "str": "string", "path": "string"}


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12). Plug-ins are known by name, with their options; a name that is not there (a person's own file, or
    `timm:NAME`) may have any."""
    definitions: dict[str, Any] = {}
    for kind in KINDS:
        found = plugins(kind, [])
        definitions[kind] = _kind(kind, found)
        definitions |= {f"{kind}.{name}": _plugin(plugin) for name, plugin in found.items()}
    terms = [name.removeprefix("term.") for name in definitions if name.startswith("term.")]
    definitions["strategy"]["anyOf"][0]["examples"] += terms  # a term as the strategy runs on plain fine-tuning
    for name in sorted(settings_names()):
        definitions |= _settings(name)
    definitions |= {name: _section(name) for name in SECTIONS if name != "RunConfig"}
    root = _section("RunConfig")
    needed = root.pop("required")
    root["properties"]["extends"] = {
        "description": "YAML files that are merged under this one, in order; relative to this file",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A streamcl run",
        **root,
        "anyOf": [{"required": needed}, {"required": ["extends"]}],
        "$defs": definitions,
    }


def _type(type: Type) -> dict[str, Any]:
    match type.form:
        case "any":
            return {}
        case "literal":
            return {"enum": list(type.values)}
        case "list" | "sequence":
            return {"type": "array", "items": _type(type.parts[0])}
        case "tuple":
            return {"type": "array", "prefixItems": [_type(part) for part in type.parts], "items": False, "minItems": len(type.parts)}
        case "dict":
            return {"type": "object", "propertyNames": _type(type.parts[0]), "additionalProperties": _type(type.parts[1])}
        case "union":
            return {"anyOf": [_type(part) for part in type.parts]}
        case "plugin" | "settings":
            return {"$ref": f"#/$defs/{type.name}"}
    return {"type": _SIMPLE[type.form]}


def _kind(kind: str, found: dict[str, Plugin]) -> dict[str, Any]:
    """A bare name, or a mapping whose options follow from its name."""
    choices = []
    for name in found:
        named: dict[str, Any] = {"properties": {"name": {"const": name}}}
        if (kind, name) != ("memory", "faiss"):  # the one name that may be left out
            named["required"] = ["name"]
        choices.append({"if": named, "then": {"$ref": f"#/$defs/{kind}.{name}"}})
    mapping: dict[str, Any] = {"type": "object", "properties": {"name": {"type": "string", "examples": list(found)}}}
    if kind != "memory":
        mapping["required"] = ["name"]
    if choices:
        mapping["allOf"] = choices
    return {"description": f"A {kind}, by name or with options", "anyOf": [{"type": "string", "examples": list(found)}, mapping]}


def _plugin(plugin: Plugin) -> dict[str, Any]:
    properties: dict[str, Any] = {"name": {"const": plugin.name}}
    for option in plugin.options.values():
        properties[option.name] = _type(option.type) | ({} if option.default is REQUIRED else {"default": plain(option.default)})
    return {
        "description": plugin.summary,
        "type": "object",
        "properties": properties,
        "required": [option.name for option in plugin.options.values() if option.default is REQUIRED],
        "additionalProperties": False,
    }


def _section(name: str) -> dict[str, Any]:
    types = section_types(name)
    return {
        "description": SECTIONS[name].__doc__.partition("\n")[0],
        "type": "object",
        "properties": {key: _type(type) | ({} if default is REQUIRED else {"default": default}) for key, (type, default) in types.items()},
        "required": [key for key, (_, default) in types.items() if default is REQUIRED],
        "additionalProperties": False,
    }


def _settings(name: str) -> dict[str, Any]:
    """A type of streamcl.options, and those inside it; what has a name may be given by its name alone."""
    from pydantic import TypeAdapter

    from streamcl import options

    found = TypeAdapter(getattr(options, name)).json_schema(ref_template="#/$defs/{model}")
    inner = found.pop("$defs", {})
    return {key: _bare_name(value) for key, value in {**inner, name: found}.items()}


def _bare_name(found: dict[str, Any]) -> dict[str, Any]:
    names = found.get("properties", {}).get("name", {}).get("enum")
    return {"anyOf": [{"enum": names}, found]} if names else found
