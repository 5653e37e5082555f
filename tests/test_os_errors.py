import errno
import os
import re
import resource
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from users import as_user

from enginecache.errors import printable
from enginecache.files.digest import SMALL_BYTES, StreamDigest, digest_of
from enginecache.files.os_errors import (
    FEW_INODES,
    can_start_threads,
    describe_os_error,
    free_inodes,
    is_out_of_descriptors,
    shell_path,
)
from enginecache.storage.registry.database import unavailable

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="probe: not root, so no other user can be")
USER = 54399
"""A user who runs nothing else: the limit counts all of a user's processes and threads."""

GIB = 1 << 30


def failed(number, path=None):
    return OSError(number, os.strerror(number), None if path is None else str(path))


def file_system(monkeypatch, *, free_bytes, inodes=1000, free_inodes=500):
    status = SimpleNamespace(f_bavail=free_bytes // 4096, f_frsize=4096, f_files=inodes, f_favail=free_inodes)
    monkeypatch.setattr(os, "statvfs", lambda _path: status)


def test_sentence_begins_with_what_was_tried_and_goes_on_with_why(tmp_path):
    what, fix = describe_os_error(failed(errno.EROFS), f"{tmp_path} cannot be written")
    assert what == f"{tmp_path} cannot be written: Read-only file system"
    assert "mount it for writing" in fix


def test_full_disk_is_no_space_where_bytes_are_out(monkeypatch, tmp_path):
    file_system(monkeypatch, free_bytes=4096)
    what, fix = describe_os_error(failed(errno.ENOSPC), "x", tmp_path)
    assert what == f"x: No space left on device: the file system of {tmp_path} is full (0.0 MiB are free)"
    assert "Free some room" in fix


def test_full_disk_is_no_inodes_where_bytes_are_left(monkeypatch, tmp_path):
    file_system(monkeypatch, free_bytes=GIB, free_inodes=FEW_INODES - 1)
    what, fix = describe_os_error(failed(errno.ENOSPC), "x", tmp_path)
    assert f"the file system of {tmp_path} has no inodes left (15 of 1000 are free)" in what
    assert "1024.0 MiB are free" in what
    assert "Delete files there" in fix


def test_file_system_that_counts_no_inodes_never_runs_out_of_them(monkeypatch, tmp_path):
    file_system(monkeypatch, free_bytes=GIB, inodes=0, free_inodes=0)  # btrfs
    assert free_inodes(tmp_path) is None
    assert "is full" in describe_os_error(failed(errno.ENOSPC), "x", tmp_path)[0]


def test_prune_is_advised_for_the_cache_alone(monkeypatch, tmp_path):
    file_system(monkeypatch, free_bytes=0)
    assert "prune" in describe_os_error(failed(errno.ENOSPC), "x", tmp_path, in_cache=True)[1]
    assert "enginecache prune" not in describe_os_error(failed(errno.ENOSPC), "x", tmp_path)[1]


def test_name_that_is_too_long_is_told_from_a_path_that_is(tmp_path):
    with pytest.raises(OSError, match="too long") as caught:
        (tmp_path / ("a" * 300)).stat()
    assert "a name in it has 300 bytes" in describe_os_error(caught.value, "x")[0]
    whole = tmp_path.joinpath(*["b" * 200] * 30)
    with pytest.raises(OSError, match="too long") as caught:
        whole.stat()
    assert f"the path has {len(str(whole))} bytes" in describe_os_error(caught.value, "x")[0]


def test_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError) as caught:
        (tmp_path / "file/x/y").stat()
    assert f"{tmp_path / 'file'} is a file, not a folder" in describe_os_error(caught.value, "x")[0]


def test_first_missing_part_of_a_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "a/b/c").read_bytes()
    assert f"there is no {tmp_path / 'a'}" in describe_os_error(caught.value, "x")[0]
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "link").read_bytes()
    assert "is a link to nowhere, which does not exist" in describe_os_error(caught.value, "x")[0]


CLOSED = """
import os, sys
from enginecache.files.os_errors import describe_os_error
closed = sys.argv[1]
os.mkdir(closed, 0o700)
os.mkdir(f"{closed}/in")
os.chmod(closed, int(sys.argv[2], 8))
if os.geteuid() == 0:
    os.setresuid(12345, 12345, 12345)
try:
    open(sys.argv[3].format(closed), "w")
except OSError as error:
    print(*describe_os_error(error, "x"), sep="\\n")
"""


@pytest.fixture
def open_folder():
    """A folder that another user may enter, which pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize(
    ("mode", "path", "what"), [("000", "{}/in/file", "may not enter"), ("555", "{}/x", "write to")]
)
def test_folder_that_is_closed_is_the_one_that_is_named(open_folder, mode, path, what):
    closed = open_folder / "closed"
    command = [sys.executable, "-c", CLOSED, str(closed), mode, path]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    closed.chmod(0o700)
    assert f"{what} {closed}" in said
    assert f"ls -ld {closed}" in said


def test_descriptors_that_ran_out_are_counted_and_the_advice_fits_the_limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        with pytest.raises(OSError, match="Too many open files") as caught:
            opened.extend(iter(lambda: os.open(os.devnull, os.O_RDONLY), None))
        assert is_out_of_descriptors()
        what, fix = describe_os_error(caught.value, "x")
        os.close(opened.pop())
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert what == "x: Too many open files: this process may open 64"
    assert "`ulimit -n 4096`" in fix
    assert not is_out_of_descriptors()


def test_name_with_a_nul_character_is_no_name():
    assert describe_os_error(ValueError("embedded null byte"), "x", "a\0b")[0] == (
        "x: embedded null byte: no file can have that name"
    )


def test_error_that_is_not_in_the_table_keeps_the_text_of_the_system():
    assert describe_os_error(failed(errno.EDOM), "x", otherwise="Do y.") == (f"x: {os.strerror(errno.EDOM)}", "Do y.")
    assert describe_os_error(OSError("odd"), "x", otherwise="Do y.") == ("x: odd", "Do y.")


@pytest.mark.parametrize("path", [None, "/nowhere/x", b"\xff", "a\0b", "x" * 5000, "{braces}", ""])
def test_every_error_has_one_line_of_cause_and_some_advice(path):
    for number, name in errno.errorcode.items():
        what, fix = describe_os_error(failed(number), "x", path, in_cache=True)
        assert what.startswith("x: "), name
        assert what != "x: ", name
        assert fix, name


AWKWARD = (
    "plain",
    "with space",
    "it's",
    'a"b',
    "$HOME",
    "`id`",
    "a;b&c|d",
    "*?[x]",
    "~",
    "back\\slash",
    "new\nline",
    "\x1b[31m",
    "é",
    "\udcff",
)


@pytest.mark.parametrize("name", [*AWKWARD, "-rf"])
@pytest.mark.parametrize("is_relative", [False, True])
def test_path_in_suggested_command_is_one_word_that_names_the_path(tmp_path, monkeypatch, name, is_relative):
    monkeypatch.chdir(tmp_path)
    path = Path(name) if is_relative else tmp_path / name
    (tmp_path / name).mkdir()
    (tmp_path / name / "inside").touch()
    word = shell_path(path)
    assert printable(word) == word  # a message shows it as it is
    ran = subprocess.run(["bash", "-c", f"ls {word}"], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "inside\n"


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ELOOP, errno.EEXIST, errno.EACCES])
def test_command_that_advice_suggests_runs_as_it_stands(monkeypatch, tmp_path, name, number):
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.setattr(os, "access", lambda path, *_, **__: Path(path) != folder)
    _, fix = describe_os_error(failed(number, folder / "x"), "x cannot be written")
    (command,) = (words for words in re.findall(r"`(?=df|namei|ls)(.+?)`(?= shows|\)|\.|,)", printable(fix)))
    assert shell_path(folder) in command or number in {errno.ELOOP, errno.EEXIST}
    ran = subprocess.run(["bash", "-nc", command], capture_output=True, check=False, timeout=60)
    assert ran.returncode == 0


@needs_root
def test_threads_that_the_limit_forbids_are_known_before_they_are_needed():
    def few():
        resource.setrlimit(resource.RLIMIT_NPROC, (4, 4))
        return can_start_threads(3), can_start_threads(4), can_start_threads(3)

    assert as_user(USER, USER, few) == (True, False, True)
    assert can_start_threads(4) is True


@needs_root
def test_digest_is_the_same_where_no_thread_may_be_started():
    data = bytes(range(256)) * (SMALL_BYTES // 100)

    def digests():
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        stream = StreamDigest()
        stream.write(data)
        return digest_of(data), stream.hexdigest()

    assert as_user(USER, USER, digests) == (digest_of(data),) * 2


def test_registry_that_lacks_an_inode_for_its_journal_says_so(monkeypatch, tmp_path):
    file_system(monkeypatch, free_bytes=GIB, free_inodes=0)
    error = unavailable(tmp_path / "registry.sqlite", sqlite3.OperationalError("unable to open database file"))
    assert "unable to open database file: No space left on device" in error.what
    assert "has no inodes left" in error.what
