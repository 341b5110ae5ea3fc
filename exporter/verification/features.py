"""Every feature of a UNet as diffusers' own modules make it, kept by hooks on them while it runs in one piece."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from engines.bundle.names import ATTENTION, BRANCH, TIME
from tuning.surgery.units import unit_modules

__all__ = ["kept_features"]

_RESNET = ".resnet"


@contextmanager
def kept_features(unet: nn.Module, features: dict[str, Tensor]) -> Iterator[None]:
    """Inside, a call of the UNet puts what its modules make into ``features``, branches and parts of transformers too."""
    with ExitStack() as stack:
        for name, path in (unit_modules(unet) | {TIME: "time_embedding"}).items():
            module = unet.get_submodule(path)
            if name.endswith(ATTENTION):
                for inside in _inner(module):
                    stack.callback(inside.register_forward_hook(_note(features, inside)).remove)
            stack.callback(module.register_forward_hook(_keep(features, name), with_kwargs=True).remove)
        yield
    features[TIME] = features[TIME][:1]  # the UNet repeats the one timestep for every row


def _keep(features: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        made = _tensor(output)
        features[name] = made
        if name.endswith((ATTENTION, _RESNET)):
            x = args[0] if args else kwargs["hidden_states"]
            shortcut: Any = getattr(module, "conv_shortcut", None)
            features[f"{name}{BRANCH}"] = made - (x if shortcut is None else shortcut(x))
        if name.endswith(ATTENTION):
            features.update(_parts(features, name, module, made))

    return hook


def _parts(features: dict[str, Tensor], name: str, transformer: nn.Module, made: Tensor) -> dict[str, Tensor]:
    """The features between the parts of a transformer, as pictures; none where the transformer is not cut."""
    inner = [_picture(features.pop(_noted(inside)), made) for inside in _inner(transformer)]
    if not inner:
        return {}
    first, own, cross = inner
    return {
        f"{name}.input": first,
        f"{name}.self{BRANCH}": own,
        f"{name}.self": own + first,
        f"{name}.cross{BRANCH}": cross,
        f"{name}.cross": cross + (own + first),
    }


def _inner(transformer: Any) -> list[nn.Module]:
    """The modules of a transformer that make its parts' features; none where it has no block with both attentions, or several."""
    blocks = transformer.transformer_blocks
    if len(blocks) != 1 or blocks[0].attn2 is None:
        return []
    return [transformer.proj_in, blocks[0].attn1, blocks[0].attn2]


def _note(features: dict[str, Tensor], inside: nn.Module) -> Callable[[nn.Module, object, object], None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        features[_noted(inside)] = _tensor(output)

    return hook


def _noted(inside: nn.Module) -> str:
    return f"module {id(inside)}"


def _picture(x: Tensor, like: Tensor) -> Tensor:
    """Tokens as a picture of the size of another; pictures as they are."""
    return x if x.ndim == 4 else x.transpose(1, 2).reshape(len(x), -1, *like.shape[2:])


def _tensor(output: Any) -> Tensor:
    tensor = output[0] if isinstance(output, tuple) else output
    assert isinstance(tensor, Tensor)
    return tensor
