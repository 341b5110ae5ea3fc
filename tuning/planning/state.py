"""The measurements of a search, in a small file beside its result: the same search does not measure them again.

A search is a function of what it measures, so that one which was stopped comes to the same plan.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engines.support.files import write_text
from engines.support.records import one_line
from tuning.errors import TuningError

__all__ = ["State"]


class State:
    """Numbers by name, kept in a file as they come.

    Args:
        path: the file.
        settings: all that the numbers depend on.

    Raises:
        TuningError: the file holds a search with other settings, or is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        self.path = path
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._values = self._read()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, measure: Callable[[], float]) -> float:
        """The number of that name, measured if it is not there yet."""
        if name not in self._values:
            self._values[name] = measure()
            write_text(self.path, json.dumps({"settings": self._settings, "values": self._values}) + "\n")
        return self._values[name]

    def remove(self) -> None:
        """The search is done: nothing is left of it but its result."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, float]:
        if not self.path.exists():
            return {}
        try:
            there = json.loads(self.path.read_text("utf-8"))
            before, values = dict(there["settings"]), {name: float(value) for name, value in there["values"].items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise TuningError(
                f"{self.path} is no state of a search that can be read ({one_line(error, 100)}): delete it to start anew"
            ) from error
        for name, value in self._settings.items():
            if before.get(name) != value:
                raise TuningError(
                    f"{self.path} holds a search with {name} {one_line(before.get(name), 60)}, and this one has "
                    f"{one_line(value, 60)}: give the same to resume it, delete it to start anew, or choose another --out"
                )
        return values
