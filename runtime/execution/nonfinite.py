"""Where numbers first stop being finite: segments run once more, each looked at, when a call has ended in infinities or NaN.

Nothing is looked at while a call runs as it should: on a GPU the host would wait for every answer.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from engines import Runner
from runtime.execution.loaded_bundle import LoadedBundle

__all__ = ["NonFinite", "is_finite", "watched"]


class NonFinite(Exception):
    """A segment's output holds a number that is not finite."""

    def __init__(self, segment: str) -> None:
        super().__init__(segment)
        self.segment = segment


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; waits for the device."""
    return bool(torch.isfinite(tensor).all())


class _WatchedRunner(Runner):
    """Runs another runner and looks at all that it makes."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner.segment, runner.features)
        self._runner, self.device = runner, runner.device

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As ``Runner.run``; raises NonFinite."""
        outputs = self._runner.run(inputs)
        for tensor in outputs.values():
            if tensor.is_floating_point() and not is_finite(tensor):
                raise NonFinite(self.segment.name)
        return outputs

    def _run_impl(self, inputs: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        raise NotImplementedError("the other runner checks its inputs itself")


class _WatchedRunners(Mapping[str, Runner]):
    """Runners by segment, watched; those of UNets that are swapped come and go."""

    def __init__(self, runners: Mapping[str, Runner]) -> None:
        self._runners = runners

    def __getitem__(self, segment: str) -> Runner:
        return _WatchedRunner(self._runners[segment])

    def __iter__(self) -> Iterator[str]:
        return iter(self._runners)

    def __len__(self) -> int:
        return len(self._runners)


def watched(network: LoadedBundle) -> LoadedBundle:
    """The same segments, which raise NonFinite when they make a number that is not finite."""
    return replace(network, runners=_WatchedRunners(network.runners))
