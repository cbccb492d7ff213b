"""The demos' page, served on this machine for the tests of a module."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def served() -> Iterator[str]:
    """Address of the page, on a free port."""
    from demos import app
    from demos.page import start

    blocks = app.build()
    try:
        yield start(blocks, None, block=False)
    finally:
        blocks.close()
