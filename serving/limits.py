"""The bounds of one request, and of how many may wait."""

from dataclasses import dataclass

from runtime import Request, RequestError

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """The bounds of a service; each is an option of ``unet-heirloom serve``.

    What a bundle or engine takes is bounded by these themselves, and memory by ``runtime``: see ``Pipeline.prepare``.
    """

    pixels: int = 2**20
    """Of a picture that is made."""
    images: int = 8
    """Pictures of one request."""
    steps: int = 150
    """Denoising steps."""
    prompt: int = 2000
    """Characters of a prompt, and of a negative one."""
    body: int = 16 * 2**20
    """Bytes of a request."""
    picture_bytes: int = 8 * 2**20
    """Of a picture or mask that is given, as a file."""
    picture_pixels: int = 2**22
    """Of a picture or mask that is given, unpacked."""
    seconds: float = 300.0
    """From a request's arrival to its last picture; waiting counts."""
    body_seconds: float = 30.0
    """That a request's body may take to arrive."""
    queue: int = 64
    """Pictures that wait for each bundle."""
    batch: int = 8
    """Pictures that are made at once, where engine and memory allow it."""
    batch_wait: float = 0.005
    """Seconds that a picture waits for others of its kind while nothing runs."""

    def check(self, request: Request) -> None:
        """Raise RequestError where a request asks for more; what it leaves to the bundle is checked by ``check_size`` later."""
        if request.images > self.images:
            raise RequestError(f"{request.images} pictures are asked for; this service makes {self.images} at most for a request")
        if request.steps > self.steps:
            raise RequestError(f"steps = {request.steps}; this service takes {self.steps} at most")
        longest = max(map(len, (*request.prompts, *request.negative_prompts)), default=0)
        if longest > self.prompt:
            raise RequestError(f"a prompt has {longest} characters; this service takes {self.prompt} at most")
        if request.height is not None and request.width is not None:
            self.check_size(request.height, request.width)
        for name, side in (("height", request.height), ("width", request.width)):
            if side is not None and side > self.pixels:
                raise RequestError(f"{name} = {str(side)[:20]}; this service makes pictures of {self.pixels} pixels at most")

    def check_size(self, height: int, width: int) -> None:
        """Raise RequestError for a picture of more pixels than may be made."""
        if height * width > self.pixels:
            size = f"{str(height)[:20]}x{str(width)[:20]}"
            raise RequestError(f"size {size} (height x width): this service makes pictures of {self.pixels} pixels at most")
