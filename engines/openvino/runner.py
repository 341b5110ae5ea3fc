"""A segment in OpenVINO, which reads and writes the tensors' own memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from engines.base import DTYPES, Runner
from engines.bundle.manifest import Feature, Segment
from engines.errors import EngineError, EngineMemoryError, NeedsBuildError
from engines.openvino.models import Model, Models
from engines.openvino.waves import WAVE
from engines.support.records import one_line

__all__ = ["RequestRunner"]


class RequestRunner(Runner):
    """Each thread takes a request of the model for its text's length, and puts it back for the next call."""

    def __init__(self, segment: Segment, features: Mapping[str, Feature], models: Models) -> None:
        from openvino import Tensor

        super().__init__(segment, features)
        self._tensor: Any = Tensor
        self._models = models

    def _run_impl(self, inputs: dict[str, torch.Tensor], sizes: dict[str, int]) -> dict[str, torch.Tensor]:
        outputs = {
            name: torch.empty(shape, dtype=DTYPES[self.features[name].dtype]) for name, shape in self.output_shapes(sizes).items()
        }
        with _explaining(self.segment):
            model = self._models.of_length(sizes.get("tokens", 0))
            requests = model.request()
            taken = {name: inputs[name].detach().contiguous() for name in model.taken}
            self._infer(model, *requests, taken, outputs)
            model.put(requests)
        return outputs

    def _infer(
        self, model: Model, request: Any, waves: Any, taken: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]
    ) -> None:
        if waves is not None:
            self._bind(waves, {name: taken[name] for name in model.taken_by_waves})
            waves.infer(share_inputs=True, share_outputs=True)
            for number, wave in enumerate(waves.output_tensors):
                request.set_tensor(f"{WAVE}{number}", wave)
        self._bind(request, {name: taken[name] for name in model.taken_by_rest} | outputs)
        request.infer(share_inputs=True, share_outputs=True)
        for name, tensor in outputs.items():
            if tuple(request.get_tensor(name).shape) != tuple(tensor.shape):
                raise NeedsBuildError(f"segment {self.segment.name} made {name} of a wrong shape")

    def _bind(self, request: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            request.set_tensor(name, self._tensor(tensor.numpy(), shared_memory=True))


@contextmanager
def _explaining(segment: Segment) -> Iterator[None]:
    """Say which segment it is that fails, and whether for want of memory."""
    try:
        yield
    except EngineError:
        raise
    except MemoryError as error:
        raise EngineMemoryError(f"segment {segment.name}: there is no memory left to run it") from error
    except RuntimeError as error:  # OpenVINO's exceptions
        kind = EngineMemoryError if "bad_alloc" in str(error) or "allocate" in str(error) else NeedsBuildError
        raise kind(f"segment {segment.name}: OpenVINO fails: {one_line(error)}") from error
