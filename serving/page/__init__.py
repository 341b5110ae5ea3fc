"""The page: prompt in, picture out, and what the plan computes and inherits while it runs."""

from serving.page.app import make_page, mount_page

__all__ = ["make_page", "mount_page"]
