"""One script per data set. config is imported before any of them imports torch, see there."""
import config  # noqa: F401
