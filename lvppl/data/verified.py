"""Files of public data sets: found or downloaded, and verified before they are used."""

from __future__ import annotations

import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pooch

from lvppl.errors import ProgramError

__all__ = ["VerifiedFile"]

_TIMEOUT = 30  # seconds without an answer


@dataclass(frozen=True)
class VerifiedFile:
    """A file of a public data set, known by the digest of its content.

    Of a gzipped file that is what is inside: mirrors compress anew, the content stays.

    :ivar str folder: of the data set, below ``$LVPPL_DATA`` and the cache folder.
    :ivar str name: the file's; ending in ``.gz`` if it is gzipped.
    :ivar str sha256: hexadecimal digest of the bytes, decompressed if it is gzipped.
    :ivar mirrors: addresses of folders that hold the file, each ending in a slash.
    """

    folder: str
    name: str
    sha256: str
    mirrors: Sequence[str]

    def read(self) -> bytes:
        """The content, decompressed: from ``$LVPPL_DATA``, from the cache, or from a mirror.

        :raises ProgramError: if a file is found but is damaged or another one (it is never replaced
            silently), or if there is none and none can be downloaded.
        """
        for place in self.places():
            path = place / self.name
            if path.is_file():
                return self._verified(path.read_bytes(), str(path), "delete it")
        return self._download(self.places()[-1])

    def places(self) -> list[Path]:
        """Folders that are looked in, in order; the last is the cache, and is written to."""
        cache = Path(pooch.os_cache("lvppl")) / self.folder
        named = os.environ.get("LVPPL_DATA")
        return [Path(named).expanduser() / self.folder, cache] if named else [cache]

    def _verified(self, content: bytes, origin: str, remedy: str) -> bytes:
        if self.name.endswith(".gz"):
            try:
                content = gzip.decompress(content)
            except (OSError, EOFError, zlib.error) as error:
                raise ProgramError(
                    f"{origin} is not a whole gzip file ({error}): {remedy}."
                ) from error
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.sha256:
            raise ProgramError(
                f"{origin} has the wrong digest: the sha256 of its content is "
                f"{digest}, but {self.sha256} was expected. It is another file, or a damaged one: "
                f"{remedy}."
            )
        return content

    def _download(self, cache: Path) -> bytes:
        failures = []
        for mirror in self.mirrors:
            try:
                return self._fetch(mirror + self.name, cache)
            except (OSError, ProgramError) as error:  # what `requests` raises is an OSError
                failures.append(f"{mirror}: {error}")
        looked = " and ".join(str(place) for place in self.places())
        raise ProgramError(
            f"{self.name} is neither in {looked}, nor could it be downloaded "
            f"({'; '.join(failures)}): put the file there, or point LVPPL_DATA at a folder that "
            f"holds {Path(self.folder) / self.name}."
        )

    def _fetch(self, address: str, cache: Path) -> bytes:
        """Only a verified file gets its name in the cache, and gets it in one step."""
        cache.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=self.name, suffix=".partial", dir=cache)
        os.close(handle)
        try:
            pooch.HTTPDownloader(timeout=_TIMEOUT)(address, partial, None)
            content = self._verified(Path(partial).read_bytes(), address, "try again later")
            os.replace(partial, cache / self.name)
            return content
        finally:
            Path(partial).unlink(missing_ok=True)
