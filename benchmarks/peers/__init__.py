"""Who is measured: this project, and what people would use otherwise. One adapter each, started as a process of its own.

An adapter has ``load(folder, options)``, which returns what makes a picture of a ``Call``. One that loads files of another form
has ``export(folder, exported, options)`` too, which writes them, once for all runs with the options in its ``EXPORTED_FOR``.
Adapters import their packages in these functions, so that this table can be read without them. One that cannot live beside the
others has ``own_environment``: run_trt.py makes it a virtual one.
"""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

__all__ = ["CONSTRAINTS", "OURS", "PEERS", "Peer"]

CONSTRAINTS = Path(__file__).parent / "constraints"
"""A file of pins for each peer with an environment of its own, named after its module: all packages but torch, of which it has
this project's version."""


@dataclass(frozen=True)
class Peer:
    """An adapter: its module in ``benchmarks.peers``, and what it needs.

    Args:
        module: the adapter's.
        packages: what pip installs for it, by the module that is then there.
        devices: those that it runs on.
        own_environment: whether its packages do not get on with this project's.
        unwanted: packages that pip installs along and that are removed again, because they can keep it from being imported.
        same_output: whether it claims to compute what ``original full`` does; then its latents are held to that.
        settings: given to the adapter as they are.
        hint: what to install with pip, in words, where that is not the names of the packages.
    """

    module: str
    packages: tuple[tuple[str, str], ...]
    devices: tuple[str, ...] = ("cpu", "cuda")
    own_environment: bool = False
    unwanted: tuple[str, ...] = ()
    same_output: bool = True
    settings: tuple[tuple[str, str], ...] = ()
    hint: str = ""

    @property
    def to_install(self) -> list[str]:
        """The packages as pip is told them."""
        return [package for _, package in self.packages]

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed here."""
        return [package for module, package in self.packages if find_spec(module) is None]


OURS = Peer("ours", ())
_DIFFUSERS = (("diffusers", "diffusers"), ("transformers", "transformers"))
_OPTIMUM_ONNX = (("optimum", "optimum-onnx[onnxruntime]"), ("diffusers", "diffusers==0.36.0"), ("accelerate", "accelerate"))
_OPTIMUM_INTEL = (("optimum", "optimum-intel[openvino,diffusers]"), ("accelerate", "accelerate"))
# No picture needs torchvision; where it is built for another torch than the one at hand, transformers fails to import it.
_INTEL = Peer("optimum_openvino", _OPTIMUM_INTEL, ("cpu",), own_environment=True, unwanted=("torchvision",))

# On PyPI is an old one; wheels for each PyTorch and CUDA are at the address.
_STABLE_FAST = (("sfast", "stable-fast"),)
_WHEELS = "the wheel for this PyTorch and CUDA from https://github.com/chengzeyi/stable-fast/releases"

PEERS = {
    "diffusers": Peer("diffusers_eager", _DIFFUSERS),
    "diffusers-channels-last": Peer("diffusers_eager", _DIFFUSERS, ("cuda",), settings=(("memory_format", "channels_last"),)),
    "torch-compile": Peer("diffusers_compiled", _DIFFUSERS),
    "tensorrt-one-engine": Peer("one_engine", (("tensorrt", "tensorrt"),), ("cuda",), settings=(("engine", "tensorrt"),)),
    "tensorrt-rtx-one-engine": Peer(
        "one_engine", (("tensorrt_rtx", "tensorrt-rtx"),), ("cuda",), settings=(("engine", "tensorrt-rtx"),)
    ),
    "stable-fast": Peer("stable_fast", (*_DIFFUSERS, *_STABLE_FAST), ("cuda",), hint=_WHEELS),
    "deepcache": Peer("deepcache", (*_DIFFUSERS, ("DeepCache", "DeepCache")), same_output=False),
    "optimum-onnx": Peer("optimum_onnx", _OPTIMUM_ONNX, ("cpu",), own_environment=True),
    "openvino-f32": replace(_INTEL, settings=(("precision", "f32"),)),
    "openvino": replace(_INTEL, same_output=False),
}
"""By the names that ``--peers`` takes."""
