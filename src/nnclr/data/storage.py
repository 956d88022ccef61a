"""Large files on this machine or in object storage, read in part by many threads.

A file in object storage is read by ranges. When more than a few ranges of it were asked for, the whole of it is
fetched in the background into a cache of bounded size, and read from there.
"""

import fcntl
import glob
import hashlib
import io
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from nnclr.blotted import without_secrets
from nnclr.data.images import safe, shown
from nnclr.errors import DataError, InputError, first_line

MOST_BYTES = 16 << 30  # of the cache; what was used longest ago is removed first
_FEW = 8  # ranges of a remote file that are read before all of it is fetched
_CHUNK = 16 << 20  # bytes fetched at a time
_SPARE = 1 << 30  # bytes that stay free on the disk of the cache
_TRIES, _PAUSE = 3, 0.05  # for errors that may pass; seconds, doubled each time
_MOST_FILES = 200_000  # that a pattern may stand for
_AT_ONCE = threading.BoundedSemaphore(4)  # files that are being fetched
_NO_VERSION = ("name", "type", "url")  # of what a storage says of a file; a url may be signed anew each time


class NoSuchFileError(InputError):
    """A file does not exist, which may be as it should be."""


class File(Protocol):
    """A file that is read in part."""

    address: str  # path, or PROTOCOL://...
    name: str  # the same for people
    size: int
    stamp: str  # changes when it is written anew
    sha256: str | None  # what the whole of it must have, where that is known

    def read(self, offset: int, size: int) -> bytes:
        """So many bytes from there, fewer at the end of the file.

        Raises:
            OSError: if they cannot be had.
            DataError: if the file is not the one with its SHA-256.
        """
        ...

    def open(self) -> IO[bytes]:
        """The file as an object that can be read and sought in."""
        ...


class LocalFile:
    """A file of this machine."""

    sha256: str | None = None

    def __init__(self, path: str) -> None:
        self.address, self.name = path, shown(path)
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            raise NoSuchFileError(f"{self.name} does not exist") from None
        except OSError as error:
            raise InputError(f"{self.name} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{self.name} is no regular file")
        self.size, self.stamp = status.st_size, f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}"

    def read(self, offset: int, size: int) -> bytes:
        """See `File.read`."""
        return _patiently(lambda: _pread(self.address, offset, size))

    def open(self) -> IO[bytes]:
        """See `File.open`."""
        return open(self.address, "rb")


class RemoteFile:
    """A file of an fsspec file system."""

    sha256: str | None = None

    def __init__(self, system: Any, path: str, about: dict[str, Any]) -> None:
        self.system, self.path, self.address = system, path, str(system.unstrip_protocol(path))
        self.name = without_secrets(safe(self.address))
        if about.get("type") == "directory" or about.get("size") is None:
            raise InputError(f"{self.name} is no file, or its server does not say how long it is")
        self.size = int(about["size"])
        told = {key: str(value) for key, value in about.items() if key not in _NO_VERSION}
        self.stamp = f"{self.address} {self.size} {sorted(told.items())}"
        self._copy = cache_folder() / f"{hashlib.sha256(self.stamp.encode()).hexdigest()[:32]}.copy"
        self._few, self._reads, self._fetching, self._damage, self._dropped = _FEW, 0, False, "", False

    def read(self, offset: int, size: int) -> bytes:
        """See `File.read`."""
        with suppress(OSError):  # there is no copy, or it was removed meanwhile
            if os.stat(self._copy).st_size == self.size:
                content = _pread(str(self._copy), offset, size)
                with suppress(OSError):  # another's cache is read, too
                    os.utime(self._copy)  # what was used last is removed last
                return content
            self._copy.unlink()  # cut, as by a disk that lost its last writes
        if self._damage:
            raise DataError(self._damage)
        self._reads += 1
        if self._reads > self._few and not self._fetching:
            self._fetching = True
            threading.Thread(target=self._fetch, daemon=True).start()
        return self.range(offset, size)

    def open(self) -> IO[bytes]:
        """See `File.open`."""
        return io.BufferedReader(_Ranges(self), 1 << 16)

    def range(self, offset: int, size: int) -> bytes:
        """As `read`, but from the storage, whatever the cache holds."""
        end = min(offset + size, self.size)
        if end <= offset:
            return b""

        def fetched() -> bytes:
            try:
                content: bytes = self.system.cat_file(self.path, start=offset, end=end)
            except OSError:
                raise
            except Exception as error:  # each library of a storage has errors of its own
                raise OSError(first_line(error)) from error
            if len(content) == self.size:  # the server sends whole files only
                content = content[offset:end]
            if len(content) != end - offset:
                raise OSError(f"the storage sent {len(content)} bytes for {end - offset}")
            return content

        return _patiently(fetched)

    def drop_copy(self) -> None:
        """Remove the copy, which proved damaged; only once, so that a damaged file is not fetched again and again."""
        if not self._dropped:
            self._dropped = True
            with suppress(OSError):
                self._copy.unlink()

    def _fetch(self) -> None:
        """Fetch the whole file; where that fails, ranges are read as before, and it is tried less and less often."""
        try:
            with _AT_ONCE:
                self._copy.parent.mkdir(parents=True, exist_ok=True)
                if shutil.disk_usage(self._copy.parent).free > self.size + _SPARE:
                    self._write(self._copy.with_suffix(".part"))
                    prune(self._copy)
        except OSError:
            pass
        finally:
            if not os.path.exists(self._copy):
                self._few *= 2
            self._reads, self._fetching = 0, False

    def _write(self, unfinished: Path) -> None:
        with open(unfinished, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: another process fetches it
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(unfinished)):
                return  # it was another process's, which has just removed or renamed it
            try:
                if self._copy.exists():
                    return
                file.truncate(0)
                digest = hashlib.sha256()
                for chunk in chunks(self):
                    file.write(chunk)
                    digest.update(chunk)
                file.flush()
                os.fsync(file.fileno())
                if self.sha256 in (None, digest.hexdigest()):
                    unfinished.replace(self._copy)
                else:
                    self._damage = f"{self.name} is not the shard that its index describes: its SHA-256 differs"
            finally:
                unfinished.unlink(missing_ok=True)


class _Ranges(io.RawIOBase):
    """A remote file to read and seek in; its errors are `OSError`, and what may pass is tried again."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._file.size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        content = self._file.range(self._position, len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def in_passing(file: File) -> Callable[[int, int], bytes]:
    """A `read` for one thread that goes through a file from its beginning to its end, past every cache."""
    if not isinstance(file, RemoteFile):
        return file.read
    start, chunk = 0, b""

    def read(offset: int, size: int) -> bytes:
        nonlocal start, chunk
        if not start <= offset <= offset + size <= start + len(chunk):
            start, chunk = offset, file.range(offset, max(size, _CHUNK))
        return chunk[offset - start : offset - start + size]

    return read


def chunks(file: File) -> Iterator[bytes]:
    """A whole file, a piece at a time, past every cache.

    Raises:
        OSError: if a piece cannot be had.
    """
    read = in_passing(file)
    for start in range(0, file.size, _CHUNK):
        chunk = read(start, _CHUNK)
        if len(chunk) != min(_CHUNK, file.size - start):
            raise OSError(f"it ends at byte {start + len(chunk)} of {file.size}")
        yield chunk


def sha256_of(file: File) -> str:
    """SHA-256 of the whole file, hex, past every cache.

    Raises:
        OSError: if it cannot be read.
    """
    digest = hashlib.sha256()
    for chunk in chunks(file):
        digest.update(chunk)
    return digest.hexdigest()


def _pread(path: str, offset: int, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def _patiently(read: Callable[[], bytes]) -> bytes:
    for attempt in range(_TRIES):
        try:
            return read()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            if attempt == _TRIES - 1:
                raise
            time.sleep(_PAUSE * 2**attempt)
    raise AssertionError("the loop returns or raises")


def cache_folder() -> Path:
    """Where copies and indices are kept: $NNCLR_CACHE, or ~/.cache/nnclr."""
    return Path(os.environ.get("NNCLR_CACHE", str(Path.home() / ".cache" / "nnclr"))) / "shards"


def prune(keep: Path) -> None:
    """Remove what was used longest ago until the cache is small enough, and what killed processes left."""
    total = 0
    for status, file in sorted(((_status(file), file) for file in keep.parent.iterdir()), reverse=True):
        old = status[0] < time.time() - 86400
        total += status[1]
        if file != keep and (old if file.suffix == ".part" else total > MOST_BYTES):
            file.unlink(missing_ok=True)


def _status(file: Path) -> tuple[float, int]:
    try:
        status = file.stat()
    except OSError:  # removed meanwhile
        return 0.0, 0
    return status.st_mtime, status.st_size


# ---- names -------------------------------------------------------------------------------------------------


def is_remote(text: str) -> bool:
    """Whether a text is an address, `PROTOCOL://...`, and no path."""
    return re.match(r"[a-z][a-z0-9+.-]*(::|://)", text) is not None


def file_system(text: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it.

    Raises:
        InputError: if a library is not installed, or the address cannot be used; the message says what to do.
    """
    try:
        import fsspec
        from fsspec.registry import known_implementations
    except ImportError:
        raise InputError(f"{text} is read by fsspec; pip install 'nnclr[remote]'") from None
    protocol = text.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(text)
        return system, path
    except ImportError as error:
        known = known_implementations.get(protocol, {})
        library = known.get("class", "").partition(".")[0]
        needed = f"pip install {library}" if library and library != "fsspec" else first_line(error)
        raise InputError(f"{protocol}:// needs a library of its own that is not installed; {needed}") from error
    except Exception as error:  # each library of a storage has errors of its own
        raise InputError(f"{shown(text)} cannot be opened: {first_line(error)}") from error


def files(text: str) -> list[File]:
    """The files that a path or an address stands for, with `*`, `[..]`, `{000..099}` and `{a,b}` in it.

    Those of a `*` are sorted by name, those of braces in the order of the braces.

    Raises:
        InputError: if there is none, or one cannot be read.
    """
    if is_remote(text):
        return _remote_files(text)
    found = [text] if os.path.exists(text) else [name for part in braces(text) for name in _matches(part)]
    if not found:
        raise NoSuchFileError(f"no file is named {shown(text)}")
    return [LocalFile(name) for name in found]


def _matches(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]


def _remote_files(text: str) -> list[File]:
    names = braces(text)

    def find(name: str) -> list[File]:
        system, path = file_system(name)
        if not glob.has_magic(path):
            return [RemoteFile(system, path, system.info(path))]
        return [RemoteFile(system, *item) for item in sorted(system.glob(path, detail=True).items())]

    address = shown(text)
    try:
        with ThreadPoolExecutor(min(len(names), 16)) as pool:
            found = [file for some in pool.map(find, names) for file in some]
    except InputError:
        raise
    except FileNotFoundError as error:
        raise NoSuchFileError(f"{address} does not exist: {first_line(error)}") from error
    except Exception as error:  # each library of a storage has errors of its own
        raise InputError(f"{address} cannot be read: {first_line(error)}") from error
    if not found:
        raise NoSuchFileError(f"no file is named {address}")
    return found


def listed(texts: Sequence[str]) -> str:
    """Names of files for people."""
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return ", ".join(without_secrets(shown(text)) for text in texts[:3]) + more


def braces(text: str) -> list[str]:
    """`a{01..03}{x,y}` as the texts that it stands for, as a shell has it.

    Raises:
        InputError: if they are more than 200,000, or none.
    """
    match = re.search(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{}]*,[^{}]*))\}", text)
    if match is None:
        return [text]
    ends = braces(text[match.end() :])
    first, last, listed = match.groups()
    choices = listed.split(",") if listed is not None else range(int(first), int(last) + 1)
    if not 0 < len(choices) * len(ends) <= _MOST_FILES:
        raise InputError(f"{shown(text)} stands for {len(choices) * len(ends)} files; at most {_MOST_FILES} are read")
    head = text[: match.start()]
    return [f"{head}{str(choice).zfill(len(first or ''))}{end}" for choice in choices for end in ends]
