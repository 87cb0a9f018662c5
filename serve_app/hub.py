"""Files of one revision of a model repository, from the Hugging Face hub or a mirror of it.

``HF_ENDPOINT`` names the mirror and ``HF_TOKEN`` (or the token of ``hf auth login``) who asks, as everywhere
else. huggingface_hub itself throws away what it has when its process ends. Model files are large: what has
arrived stays in a file here, and the next attempt goes on behind it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class HubError(Exception):
    """The hub did not give the file. The message says why and what to do about it."""


class Hub:
    """One ``repository`` (``owner/name``) at one ``revision`` (a commit).

    Raises ``HubError`` if the client of the hub is not installed.
    """

    def __init__(self, repository: str, revision: str) -> None:
        try:
            from huggingface_hub import constants
            from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
        except ImportError as error:
            raise HubError(
                "Fetching weights needs the package huggingface-hub. "
                "Install it: pip install 'voice-clone-tts[models]'."
            ) from error
        self.repository = repository
        self.revision = revision
        self.endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
        self._headers = build_hf_headers(library_name="voice-clone-tts")
        # Compressed on the way, half a file could not be gone on with.
        self._headers["Accept-Encoding"] = "identity"

    def size_bytes(self, path: str) -> int | None:
        """Size of the file at ``path``, None if the hub does not say. Raises ``HubError``."""
        from huggingface_hub import get_hf_file_metadata

        with self._errors_as_sentences(path):
            return get_hf_file_metadata(self._url(path), headers=self._headers, endpoint=self.endpoint).size

    def fetch(self, path: str, part: Path, size_bytes: int | None) -> None:
        """Bring ``part`` to ``size_bytes`` with the content of ``path``, going on from what it holds already.

        Shows progress on standard error. Raises ``HubError``; ``part`` then holds what has arrived so far.
        """
        import httpx2
        from huggingface_hub.file_download import http_get

        with part.open("ab") as file, self._errors_as_sentences(path):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise HubError(f"{part} is being fetched by another process. Wait for that one.") from error
            # Without a size nobody could tell whether there is anything to go on with.
            if size_bytes is None or file.tell() > size_bytes:
                file.truncate(0)
                file.seek(0)
            while True:
                had_bytes = file.tell()
                try:
                    http_get(
                        self._url(path),
                        file,
                        resume_size=had_bytes,
                        headers=self._headers,
                        expected_size=size_bytes,
                        displayed_filename=path,
                    )
                    break
                except httpx2.TransportError:
                    # http_get goes on by itself after some ways of losing a connection, not after all.
                    if file.tell() == had_bytes:
                        raise
            file.flush()
            os.fsync(file.fileno())

    def _url(self, path: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repository, path, revision=self.revision, endpoint=self.endpoint)

    @contextmanager
    def _errors_as_sentences(self, path: str) -> Iterator[None]:
        import httpx2
        from huggingface_hub import errors

        page = f"{self.endpoint}/{self.repository}"
        again = "Run the command again: it goes on from what has arrived."
        try:
            yield
        except errors.GatedRepoError as error:
            raise HubError(
                f"{page} gives its files only to those it let in. Ask for access on that page, then set "
                "HF_TOKEN to a token of the account that has it."
            ) from error
        except (errors.RevisionNotFoundError, errors.RemoteEntryNotFoundError) as error:
            raise HubError(
                f"{page} has no {path} at revision {self.revision}. "
                "If HF_ENDPOINT is a mirror, try without it."
            ) from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403, 404):
                raise HubError(
                    f"{page} is not shown to you (status {status}): it is private, or not there. "
                    "Check HF_TOKEN, and HF_ENDPOINT if it is a mirror."
                ) from error
            raise HubError(f"{self.endpoint} answered with status {status}. {again}") from error
        except errors.OfflineModeIsEnabled as error:
            raise HubError(
                "HF_HUB_OFFLINE forbids any download. Unset it, or copy the files here."
            ) from error
        except httpx2.TransportError as error:
            reason = str(error) or type(error).__name__
            raise HubError(f"The connection to {self.endpoint} failed ({reason}). {again}") from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise HubError(f"The disk is full. Make room. {again}") from error
            raise HubError(f"{path} could not be fetched: {error}. {again}") from error
