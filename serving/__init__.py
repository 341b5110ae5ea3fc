"""Pictures for others: a page, an HTTP service, many GPUs. All that these do lives in ``runtime``."""

from typing import TYPE_CHECKING

from engines.lazy import lazy_names

if TYPE_CHECKING:
    from serving.errors import ServingError
    from serving.http.app import make_app
    from serving.limits import Limits
    from serving.queueing.service import Service
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "serving.errors": ("ServingError",),
            "serving.http.app": ("make_app",),
            "serving.limits": ("Limits",),
            "serving.queueing.service": ("Service",),
        },
    )

__all__ = ["Limits", "Service", "ServingError", "make_app"]
