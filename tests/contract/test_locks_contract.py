"""What every lock does. A new implementation joins by a line in ``LOCKS``; what only files show comes last."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import platform
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from enginecache.errors import LockTimeoutError, StoreError
from enginecache.locks.base import Holder, KeyLocks, Waiting
from enginecache.locks.local import LocalKeyLocks, describe_age, describe_holder
from enginecache.store.root import Root

SPAWN = multiprocessing.get_context("spawn")


def open_local(folder: Path) -> KeyLocks:
    return LocalKeyLocks(Root.open(folder / "cache"))


LOCKS: dict[str, Callable[[Path], KeyLocks]] = {"local": open_local}


@pytest.fixture(params=LOCKS)
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], KeyLocks]:
    """Opens the same locks, again for each call; can be sent to another process."""
    return functools.partial(LOCKS[request.param], tmp_path)


@pytest.fixture
def locks(opener: Callable[[], KeyLocks]) -> KeyLocks:
    return opener()


def add_one(opener: Callable[[], KeyLocks], counter: Path, times: int) -> None:
    """Read, wait, write: without exclusion, counts are lost."""
    locks = opener()
    for _ in range(times):
        with locks.hold("key", None):
            count = int(counter.read_text())
            time.sleep(0.002)
            counter.write_text(str(count + 1))


def hold_and_say(opener: Callable[[], KeyLocks], said: object, child_seconds: float = 0.0) -> None:
    with opener().hold("key", None):
        if child_seconds:
            subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({child_seconds})"])
        said.send("held")  # type: ignore[attr-defined]
        time.sleep(60)


@contextlib.contextmanager
def held_by_a_process(opener: Callable[[], KeyLocks], child_seconds: float = 0.0) -> Iterator[int]:
    """Another process holds the lock ``key``; its process id. It is killed in the end."""
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=hold_and_say, args=(opener, there, child_seconds))
    process.start()
    try:
        assert here.poll(30)
        yield process.pid
    finally:
        process.kill()
        process.join()
        here.close()
        there.close()


def is_free(locks: KeyLocks, name: str = "key") -> bool:
    try:
        with locks.hold(name, 0):
            return True
    except LockTimeoutError:
        return False


def test_threads_exclude_each_other(opener, tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    threads = [threading.Thread(target=add_one, args=(opener, counter, 5)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "20"


def test_processes_exclude_each_other(opener, tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    workers = [SPAWN.Process(target=add_one, args=(opener, counter, 10)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert counter.read_text() == "40"


def test_one_object_used_by_many_threads_excludes_too(locks):
    inside = []
    worst = []

    def enter() -> None:
        with locks.hold("key", None):
            inside.append(1)
            worst.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == [1] * 6


def test_other_names_are_other_locks(locks):
    with locks.hold("key", 0), locks.hold("other", 0):
        pass


def test_a_lock_is_free_after_it_was_held_also_after_an_error(locks):
    with pytest.raises(KeyError), locks.hold("key", 0):
        raise KeyError
    with locks.hold("key", 0):
        pass
    assert is_free(locks)


def test_a_killed_holder_frees_the_lock_at_once(opener, locks):
    with held_by_a_process(opener) as pid:
        assert not is_free(locks)
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        with locks.hold("key", 10):
            assert time.monotonic() - started < 1.0


def test_a_child_that_outlives_the_holder_does_not_inherit_the_lock(opener, locks):
    with held_by_a_process(opener, child_seconds=6) as pid:
        os.kill(pid, signal.SIGKILL)
        with locks.hold("key", 2):
            pass


def test_a_forked_child_does_not_keep_the_lock_from_others(opener, locks):
    with locks.hold("key", 0):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
        child.start()
    assert is_free(opener())
    child.kill()
    child.join()


def test_time_out_names_the_holder_and_what_to_do(opener, locks):
    with held_by_a_process(opener) as pid:
        started = time.monotonic()
        with pytest.raises(LockTimeoutError) as caught, locks.hold("key", 0.3):
            pass
        assert 0.3 <= time.monotonic() - started < 2.0
    assert f"process {pid} on {platform.node()}" in caught.value.what
    assert "timed out after 0.3 s" in caught.value.what
    assert "--timeout" in caught.value.fix
    assert caught.value.exit_code == 5


def test_a_time_out_of_zero_tries_once(opener, locks):
    with held_by_a_process(opener):
        started = time.monotonic()
        assert not is_free(locks)
        assert time.monotonic() - started < 0.5
    assert is_free(locks)


def test_a_waiter_hears_of_the_holder_at_once_and_then_about_each_second(opener, locks):
    heard: list[Waiting] = []
    with held_by_a_process(opener) as pid, pytest.raises(LockTimeoutError), locks.hold("key", 2.7, heard.append):
        pass
    assert [round(waiting.waited_seconds, 0) for waiting in heard] == [0, 1, 2]
    assert heard[0].waited_seconds < 0.5
    assert {(waiting.holder.host, waiting.holder.pid) for waiting in heard} == {(platform.node(), pid)}


def test_who_need_not_wait_hears_nothing(locks):
    heard: list[Waiting] = []
    with locks.hold("key", None, heard.append):
        pass
    assert heard == []


def test_a_waiter_goes_on_soon_after_the_release(opener, locks):
    released = []

    def hold_for_a_moment() -> None:
        with opener().hold("key", None):
            held.set()
            time.sleep(0.3)
            released.append(time.monotonic())

    held = threading.Event()
    thread = threading.Thread(target=hold_for_a_moment)
    thread.start()
    held.wait()
    with locks.hold("key", None):
        assert 0.0 <= time.monotonic() - released[0] < 0.5
    thread.join()


def test_an_error_of_the_callback_is_the_callers_own(opener, locks):
    def fail(_: Waiting) -> None:
        raise BrokenPipeError("the terminal is gone")

    with held_by_a_process(opener), pytest.raises(BrokenPipeError), locks.hold("key", None, fail):
        pass
    assert is_free(locks)


# Files


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root.open(tmp_path / "cache")


def test_the_lock_file_stays_and_the_note_goes(root):
    locks = LocalKeyLocks(root)
    inodes = set()
    for _ in range(2):
        with locks.hold("key", 0):
            assert sorted(path.name for path in root.locks.iterdir()) == ["key.holder", "key.lock"]
            assert locks.holder("key").pid == os.getpid()
        inodes.add((root.locks / "key.lock").stat().st_ino)
        assert [path.name for path in root.locks.iterdir()] == ["key.lock"]
        assert locks.holder("key") is None
    assert len(inodes) == 1
    assert list(root.tmp.iterdir()) == []


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_shared_roots_locks_are_for_the_group(tmp_path, umask):
    root = Root.open(tmp_path / "shared", "group")
    before = os.umask(umask)
    try:
        with LocalKeyLocks(root).hold("key", 0):
            assert {stat.S_IMODE(path.stat().st_mode) for path in root.locks.iterdir()} == {0o660}
    finally:
        os.umask(before)


@pytest.mark.parametrize("note", ["", "no json", "[]", "{}", '{"host": 1}', '{"host":"h","pid":"x","since":0}', "\xff"])
def test_a_note_that_cannot_be_read_is_another_process(root, note):
    (root.locks / "key.holder").write_text(note, encoding="latin-1")
    assert LocalKeyLocks(root).holder("key") is None
    assert describe_holder(None) == "another process"


def test_a_holder_is_described_by_its_process_and_its_age():
    assert describe_holder(Holder("pod-7", 12, 0.0)) == "process 12 on pod-7"
    assert describe_age(None) == ""
    assert describe_age(Holder("pod-7", 12, time.time() - 90)) == ", which began 90 s ago"
    assert describe_age(Holder("pod-7", 12, time.time() + 90)) == ", which began 0 s ago"


def test_a_note_that_cannot_be_written_or_removed_does_not_keep_the_lock(root):
    locks = LocalKeyLocks(root)
    (root.locks / "key.holder").mkdir()
    with locks.hold("key", 0):
        pass
    assert is_free(LocalKeyLocks(root))


def test_a_lock_that_cannot_be_made_is_a_store_error_with_the_way_out(root):
    root.locks.rmdir()
    root.locks.touch()
    with pytest.raises(StoreError, match=r"key\.lock cannot be taken") as caught, LocalKeyLocks(root).hold("key", 0):
        pass
    assert "--dir" in caught.value.fix


@pytest.mark.skipif(os.geteuid() == 0, reason="probe: permissions do not bind the root user")
def test_a_read_only_folder_is_a_store_error(root):
    root.locks.chmod(0o500)
    with pytest.raises(StoreError, match="cannot be taken"), LocalKeyLocks(root).hold("key", 0):
        pass


def test_a_symbolic_link_in_place_of_a_lock_is_refused(root, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("content")
    (root.locks / "key.lock").symlink_to(victim)
    with pytest.raises(StoreError, match="cannot be taken"), LocalKeyLocks(root).hold("key", 0):
        pass
    assert victim.read_text() == "content"
