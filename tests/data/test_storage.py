import hashlib
import os
import sys
import time

import fsspec
import numpy as np
import pytest

from nnclr.data import storage
from nnclr.data.storage import LocalFile, RemoteFile, braces, cache_folder, files, in_passing, sha256_of
from nnclr.errors import DataError, InputError

CONTENT = np.random.default_rng(0).bytes(5000)


@pytest.fixture
def remote(monkeypatch, tmp_path):
    """A file system that counts what is fetched from it, with one file of 5,000 bytes, and a cache of its own."""
    monkeypatch.setenv("NNCLR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "_CHUNK", 700)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe("/bucket/x.tar", CONTENT)
    fetched = []
    real = type(memory).cat_file

    def cat_file(self, path, start=None, end=None, **settings):
        fetched.append((start, end))
        return real(self, path, start=start, end=end, **settings)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    yield memory, fetched
    memory.store.clear()


def copies():
    return sorted(file.suffix for file in cache_folder().iterdir()) if cache_folder().is_dir() else []


def until(condition):
    for _ in range(200):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came about")


def test_a_few_ranges_then_the_whole_file(remote):
    memory, fetched = remote
    (file,) = files("memory://bucket/x.tar")
    assert (file.name, file.size) == ("memory:///bucket/x.tar", 5000)
    chance = np.random.default_rng(1)
    for start in chance.integers(0, 4900, 8).tolist():
        assert file.read(start, 100) == CONTENT[start : start + 100]
    assert len(fetched) == 8
    assert copies() == []
    file.read(0, 1)
    until(lambda: copies() == [".copy"])
    fetched.clear()
    for start in chance.integers(0, 4900, 50).tolist():
        assert file.read(start, 100) == CONTENT[start : start + 100]
    assert file.read(4990, 100) == CONTENT[4990:]
    again = files("memory://bucket/x.tar")[0]  # another process finds the copy, too
    assert again.read(7, 9) == CONTENT[7:16]
    assert fetched == []
    memory.pipe("/bucket/x.tar", CONTENT[::-1])  # written anew: the copy is not taken for it
    assert files("memory://bucket/x.tar")[0].read(7, 9) == CONTENT[::-1][7:16]


def test_a_file_that_is_another_is_noticed_when_it_is_fetched(remote):
    file = files("memory://bucket/x.tar")[0]
    file.sha256 = "0" * 64

    def noticed():
        try:
            file.read(0, 9)
        except DataError as error:
            return "x.tar is not the shard that its index describes" in str(error)
        return False

    until(noticed)
    assert copies() == []
    right = files("memory://bucket/x.tar")[0]  # the control
    right.sha256 = sha256_of(right)
    for _ in range(10):
        right.read(0, 9)
    until(lambda: copies() == [".copy"])


def test_the_cache_is_bounded(remote, monkeypatch):
    memory, _ = remote
    monkeypatch.setattr(storage, "MOST_BYTES", 12_000)
    for name in "abcd":
        memory.pipe(f"/bucket/{name}.tar", CONTENT)
        file = files(f"memory://bucket/{name}.tar")[0]
        for _ in range(10):
            file.read(0, 9)
        until(lambda file=file: file._copy.exists() and not file._fetching)
    assert copies() == [".copy"] * 2
    assert files("memory://bucket/d.tar")[0]._copy.exists()  # the last one stays
    assert file.read(5, 5) == CONTENT[5:10]
    first = files("memory://bucket/a.tar")[0]
    assert first.read(5, 5) == CONTENT[5:10]  # removed, and read by ranges again


def test_a_full_disk_or_an_unwritable_cache_costs_only_speed(remote, monkeypatch, tmp_path):
    _, fetched = remote
    monkeypatch.setattr(storage, "_SPARE", 1 << 60)
    file = files("memory://bucket/x.tar")[0]
    for _ in range(20):
        assert file.read(3, 3) == CONTENT[3:6]
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("NNCLR_CACHE", str(tmp_path / "a file"))
    file = files("memory://bucket/x.tar")[0]
    for _ in range(20):
        assert file.read(3, 3) == CONTENT[3:6]
    assert len(fetched) == 40


def test_errors_that_pass_are_tried_again(remote, monkeypatch):
    memory, _ = remote
    monkeypatch.setattr(storage, "_PAUSE", 0.001)
    file = files("memory://bucket/x.tar")[0]
    real = type(memory).cat_file
    failures = [RuntimeError("throttled"), TimeoutError("slow")]

    def cat_file(self, *arguments, **settings):
        if failures:
            raise failures.pop()
        return real(self, *arguments, **settings)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    assert file.read(0, 5) == CONTENT[:5]
    failures += [RuntimeError("throttled")] * 3
    with pytest.raises(OSError, match="throttled"):
        file.read(0, 5)


def test_one_pass_fetches_each_byte_once(remote):
    _, fetched = remote
    file = files("memory://bucket/x.tar")[0]
    read = in_passing(file)
    assert b"".join(read(i, 50) for i in range(0, 5000, 50)) == CONTENT
    assert sum(end - start for start, end in fetched) == 5000
    assert len(fetched) == 8
    assert sha256_of(file) == hashlib.sha256(CONTENT).hexdigest()


def test_names_of_files(tmp_path, remote):
    memory, _ = remote
    for name in ("b.tar", "a.tar", "c.parquet", "x[1].tar"):
        (tmp_path / name).write_bytes(b"1")
        memory.pipe(f"/many/{name}", b"1")

    def names(text):
        return [file.name.rpartition("/")[2] for file in files(text)]

    for root in (str(tmp_path), "memory://many"):
        assert names(f"{root}/*.tar") == ["a.tar", "b.tar", "x[1].tar"]
        assert names(f"{root}/[ab].tar") == ["a.tar", "b.tar"]
        assert names(root + "/{b,a}.tar") == ["b.tar", "a.tar"]
    assert names(f"{tmp_path}/x[1].tar") == ["x[1].tar"]  # what exists is no pattern
    assert braces("s-{08..11}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]
    assert braces("{a,bb}{1..2}{x,}") == ["a1x", "a1", "a2x", "a2", "bb1x", "bb1", "bb2x", "bb2"]
    assert braces("{no}{3..}") == ["{no}{3..}"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nowhere/x.tar", "nowhere/x.tar does not exist"),
        ("nowhere/*.tar", r"no file is named nowhere/\*.tar"),
        ("x{3..1}.tar", "stands for 0 files"),
        ("x{0..999999999}.tar", "stands for 1000000000 files; at most 200000"),
        ("memory://bucket/no.tar", "memory://bucket/no.tar does not exist"),
        ("memory://bucket/no-*.tar", "no file is named"),
        ("memory://bucket", "is no file"),
        ("s3://bucket/x.tar", "s3:// needs a library of its own that is not installed; pip install s3fs"),
        ("https://host/x.tar", "https:// needs a library of its own"),
        ("nonsense://x.tar", "nonsense://x.tar cannot be opened: Protocol not known: nonsense"),
        ("/dev/null", "/dev/null is no regular file"),
    ],
)
def test_what_cannot_be_opened_is_named(remote, text, words):
    with pytest.raises(InputError, match=words):
        files(text)


def test_without_fsspec(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InputError, match=r"s3://b/x.tar is read by fsspec; pip install 'nnclr\[remote\]'"):
        files("s3://b/x.tar")


def test_a_file_that_vanishes(tmp_path):
    (tmp_path / "x").write_bytes(CONTENT)
    file = LocalFile(str(tmp_path / "x"))
    assert file.read(4999, 9) == CONTENT[-1:]
    (tmp_path / "x").unlink()
    with pytest.raises(FileNotFoundError):
        file.read(0, 1)


def kept_copy(file):
    for _ in range(10):
        file.read(0, 9)
    until(lambda: copies() == [".copy"] and not file._fetching)
    return file._copy


@pytest.mark.parametrize("key", ["blob_id", "xet_hash", "lfs", "last_commit", "Last-Modified", "Content-MD5", "ETag"])
def test_whatever_a_storage_says_of_a_version_counts(remote, key):
    memory, _ = remote
    about = {"name": "/x", "type": "file", "size": 9, "url": "https://host/x?signed=1", key: "one"}
    same = {"name": "x", "type": "other", "url": "https://host/x?signed=2"}
    stamp = RemoteFile(memory, "/x", about).stamp
    assert RemoteFile(memory, "/x", about | same).stamp == stamp
    assert RemoteFile(memory, "/x", about | {key: "two"}).stamp != stamp


def test_a_cut_copy_is_fetched_again(remote):
    _, fetched = remote
    file = files("memory://bucket/x.tar")[0]
    copy = kept_copy(file)
    os.truncate(copy, 3000)
    fetched.clear()
    assert file.read(2990, 100) == CONTENT[2990:3090]
    assert fetched == [(2990, 3090)]
    assert copies() == []
    assert kept_copy(file).read_bytes() == CONTENT


def test_a_copy_that_cannot_be_touched_is_read(remote, monkeypatch):
    _, fetched = remote
    file = files("memory://bucket/x.tar")[0]
    kept_copy(file)
    monkeypatch.setattr(os, "utime", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
    fetched.clear()
    assert file.read(5, 9) == CONTENT[5:14]
    assert fetched == []


def test_a_fetch_that_fails_leaves_nothing_and_is_tried_again(remote, monkeypatch):
    memory, _ = remote
    monkeypatch.setattr(storage, "_PAUSE", 0.001)
    file = files("memory://bucket/x.tar")[0]
    real, broken = type(memory).cat_file, [True]

    def cat_file(self, path, start=None, end=None):
        if broken and start >= 1400:
            raise TimeoutError("slow")
        return real(self, path, start=start, end=end)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    for _ in range(9):
        file.read(0, 9)
    until(lambda: not file._fetching)
    assert copies() == []
    broken.clear()
    for _ in range(17):  # after twice as many
        file.read(0, 9)
    until(lambda: copies() == [".copy"])


def test_a_server_that_ignores_ranges(remote, monkeypatch):
    memory, _ = remote
    monkeypatch.setattr(storage, "_PAUSE", 0.001)
    file = files("memory://bucket/x.tar")[0]
    sent = [CONTENT]
    monkeypatch.setattr(type(memory), "cat_file", lambda *_, **__: sent[0])
    assert file.read(7, 9) == CONTENT[7:16]
    assert file.range(4990, 100) == CONTENT[4990:]
    sent[0] = CONTENT[:100]
    with pytest.raises(OSError, match="the storage sent 100 bytes for 9"):
        file.read(7, 9)
