"""Files that are complete or not there."""
from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written(path: Path) -> Iterator[Any]:
    """A binary file that takes the place of ``path`` when the block ends well, and is gone when it does not."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    except OSError as error:
        error.filename = str(path)  # not a name that nobody has given
        raise
    try:
        with os.fdopen(handle, 'w+b') as file:
            yield file
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp's are the owner's only
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
