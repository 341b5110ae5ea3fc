"""Pictures for others: a page, an HTTP service, many GPUs. All that these do lives in ``runtime``."""
