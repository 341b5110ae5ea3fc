"""The files that an ONNX file takes its weights from, found before ONNX Runtime opens any of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["external_files"]


def external_files(path: Path) -> frozenset[str]:
    """Names of the files that tensors refer to, anywhere in the model, relative to its folder as they stand there.

    Raises:
        ValueError: the file is no ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"it is no ONNX model ({error})") from error
    return frozenset(_locations(model))


def _locations(message: Any) -> Iterator[str]:
    """Yield every file that this message, or one inside it, names for a tensor's data."""
    for field, value in message.ListFields():
        if field.name == "external_data":
            yield from (entry.value for entry in value if entry.key == "location")
        elif field.type == field.TYPE_MESSAGE:
            for inner in value if _is_list(value) else [value]:
                yield from _locations(inner)


def _is_list(value: Any) -> bool:
    return not hasattr(value, "ListFields")
