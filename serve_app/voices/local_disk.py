"""What a local directory needs beside obstore: durability, and sweeping what obstore does not list."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Final

#: obstore writes beside the target under such a name before it moves the file into place.
_STAGING: Final = re.compile(r".*#\d+", re.ASCII)


def flush(root: Path, key: str) -> None:
    """Wait until the file, and the names that lead to it, are on the disk."""
    path = root / key
    for entry in [path, *path.parents]:
        try:
            handle = os.open(entry, os.O_RDONLY)
        except FileNotFoundError:
            return  # deleted meanwhile: nothing is owed any more
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in {
                errno.EINVAL,
                errno.ENOTSUP,
            }:  # some network mounts cannot, for directories
                raise
        finally:
            os.close(handle)
        if entry == root:
            return


def sweep_directory(root: Path, before: float) -> list[str]:
    """Remove half-written files of killed processes and empty directories, which obstore does not list."""
    removed = []
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            path = Path(directory, name)
            if _STAGING.fullmatch(name):
                with suppress(FileNotFoundError):
                    if path.stat().st_mtime <= before:
                        path.unlink()
                        removed.append(path.relative_to(root).as_posix())
        with suppress(OSError):  # not empty, or in use
            place = Path(directory)
            if place != root and place.stat().st_mtime <= before:
                place.rmdir()
    return removed
