"""The kernels that TensorRT-RTX compiled a segment to, read from its log: no GPU is needed to see them.

With a detailed profile the compiler logs, at the end of a build, a line for each kernel of the engine: its name, the tensors that
it reads and writes with their shapes and types, and the ONNX nodes that it computes. Bytes are counted from these: what every
kernel reads of activations and writes, without what caches save.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["CompiledKernels", "Kernel", "read_kernels"]

_BYTES = {"Half": 2, "BFloat16": 2, "Float": 4, "Int32": 4, "Int64": 8, "Bool": 1, "Int8": 1, "FP8": 1}
_SYNCHRONISATION = {"signal", "wait"}
_LINE = re.compile(
    r"Name: (?P<name>[^,]*), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>[^,]*),.*Metadata:(?P<nodes>.*)$"
)
_TENSOR = re.compile(r"Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_SCRATCH = re.compile(r"Total Activation Memory: (\d+) bytes")
_STEPS = re.compile(r"^(?:__myl_)?((?:[A-Z][a-z]+)+)_myl")
"""Kernels that the compiler generates are called by the steps in them, such as ``__myl_SiluGnor_myl0_4``."""


@dataclass(frozen=True)
class Kernel:
    """One kernel: its name, the compiler's kind, the bytes of activations read and written, and the ONNX nodes computed."""

    name: str
    kind: str
    read: int
    written: int
    nodes: frozenset[str]

    @property
    def steps(self) -> tuple[str, ...]:
        """The operations of a generated kernel, such as ("Silu", "Gnor"); empty for kernels with names of their own."""
        match = _STEPS.match(self.name)
        return tuple(re.findall(r"[A-Z][a-z]+", match.group(1))) if match else ()

    @property
    def is_fused_attention(self) -> bool:
        """Whether both products and the softmax of an attention are in it."""
        return "_mha" in self.name

    @property
    def is_fused_norm(self) -> bool:
        """Whether a whole group norm is in it, with its groups' mean and variance, scale and shift.

        ``Inor`` is less: the instance norm of an ONNX file's group norm, in single precision where there are casts round it, with
        casts, scale and shift in other kernels.
        """
        return "Gnor" in self.steps

    def only(self, *steps: str) -> bool:
        """Whether it does nothing but these steps (and reshaping, which moves nothing by itself)."""
        return bool(self.steps) and set(self.steps) <= {*steps, "Resh"} and bool(set(self.steps) & set(steps))


@dataclass(frozen=True)
class CompiledKernels:
    """The kernels of an engine in the order in which they run, and the bytes of memory that it works in."""

    kernels: tuple[Kernel, ...]
    scratch_bytes: int

    @property
    def bytes_moved(self) -> int:
        """Bytes of activations that the kernels read and write."""
        return sum(kernel.read + kernel.written for kernel in self.kernels)

    def computing(self, node: str) -> tuple[Kernel, ...]:
        """The kernels that compute an ONNX node from something: a fused one is a single kernel."""
        return tuple(kernel for kernel in self.kernels if node in kernel.nodes and kernel.read)


def read_kernels(messages: Iterable[str]) -> CompiledKernels:
    """The kernels of the engine whose build logged these messages.

    Raises:
        ValueError: there is no list of kernels among them.
    """
    kernels: list[Kernel] = []
    scratch, listed = 0, False
    for message in messages:
        if match := _SCRATCH.search(message):
            scratch = int(match.group(1))
        if message.startswith("Layers:"):
            listed = True
            kernels += [kernel for line in message.splitlines() if (kernel := _read_line(line.strip())) is not None]
    if not listed:
        raise ValueError("the compiler logged no list of kernels; it needs a logger of every severity and detailed profiling")
    return CompiledKernels(tuple(kernels), scratch)


def _read_line(line: str) -> Kernel | None:
    match = _LINE.match(line)
    if match is None or match["kind"] in _SYNCHRONISATION:
        return None
    return Kernel(
        match["name"], match["kind"], _size(match["inputs"]), _size(match["outputs"]), frozenset(_NODE.findall(match["nodes"]))
    )


def _size(tensors: str) -> int:
    """Bytes of the tensors in a kernel's line."""
    total = 0
    for dimensions, dtype in _TENSOR.findall(tensors):
        size = _BYTES.get(dtype, 4)
        for dimension in filter(None, map(str.strip, dimensions.split(","))):
            size *= int(dimension)
        total += size
    return total
