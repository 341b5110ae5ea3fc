"""The interface as a page: addresses and their fields, as ``/openapi.json`` has them, without a script or another server."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

__all__ = ["HEADERS", "interface_page"]

HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
"""The headers of the page, by which a browser asks no server for anything."""
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.3rem .6rem;"
    "border-top:1px solid #ccc}code{font-family:ui-monospace,monospace}h2{margin-top:2.5rem}"
    "@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}a{color:#8bf}td,th{border-color:#444}}"
)


def interface_page(openapi: Mapping[str, Any]) -> str:
    """The page of an interface in OpenAPI's form, as HTML."""
    about = openapi["info"]
    title = escape(f"{about['title']} {about['version']}")
    parts = [
        _address(path, method, operation)
        for path, operations in openapi["paths"].items()
        for method, operation in operations.items()
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1><p>{escape(about['description'])}</p>"
        f'<p>For programs: <a href="openapi.json">openapi.json</a>.</p>{"".join(parts)}</body></html>'
    )


def _address(path: str, method: str, operation: Mapping[str, Any]) -> str:
    body = operation.get("requestBody")
    fields = _fields(body["content"]["application/json"]["schema"]) if body else ""
    return f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2><p>{escape(operation['summary'])}</p>{fields}"


def _fields(schema: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_kind(field))}</td>"
        f"<td>{_default(field, name in schema['required'])}</td><td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in schema["properties"].items()
    )
    return f"<table><tr><th>field</th><th>is</th><th>without it</th><th></th></tr>{rows}</table>"


def _kind(field: Mapping[str, Any]) -> str:
    """The kind of a field's value, in words."""
    if "enum" in field:
        return " or ".join(json.dumps(value) for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(map(_kind, field["anyOf"]))
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}"
    return str(field.get("type", "anything"))


def _default(field: Mapping[str, Any], required: bool) -> str:
    if required:
        return "refused"
    return f"<code>{escape(json.dumps(field['default']))}</code>" if "default" in field else ""
