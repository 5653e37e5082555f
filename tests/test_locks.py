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

import filelock
import pytest
from waiting import LIMIT_S

from enginecache.errors import LockTimeoutError, StoreError
from enginecache.storage import locks as local
from enginecache.storage.folder import Root
from enginecache.storage.locks import FileLocks, Holder, Waiting, describe_age, describe_holder

SPAWN = multiprocessing.get_context("spawn")
HELD_S = 10 * LIMIT_S


def open_locks(folder: Path) -> FileLocks:
    return FileLocks(Root.open(folder / "cache"))


@pytest.fixture
def opener(tmp_path: Path) -> Callable[[], FileLocks]:
    """Opens the same locks, again for each call; can be sent to another process."""
    return functools.partial(open_locks, tmp_path)


@pytest.fixture
def locks(opener: Callable[[], FileLocks]) -> FileLocks:
    return opener()


def add_one(opener: Callable[[], FileLocks], counter: Path, times: int) -> None:
    """Read, wait, write: without exclusion, counts are lost."""
    locks = opener()
    for _ in range(times):
        with locks.hold("key", None):
            count = int(counter.read_text())
            time.sleep(0.002)
            counter.write_text(str(count + 1))


def hold_and_say(opener: Callable[[], FileLocks], said: object, *, has_child: bool) -> None:
    with opener().hold("key", None):
        child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({HELD_S})"]) if has_child else None
        said.send(child and child.pid)  # type: ignore[attr-defined]
        time.sleep(HELD_S)


@contextlib.contextmanager
def held_by_a_process(opener: Callable[[], FileLocks], *, has_child: bool = False) -> Iterator[int]:
    """Another process holds the lock ``key``; its process id. It is killed in the end, and then its child."""
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=hold_and_say, args=(opener, there), kwargs={"has_child": has_child})
    process.start()
    child = None
    try:
        assert here.poll(LIMIT_S)
        child = here.recv()
        yield process.pid
    finally:
        process.kill()
        process.join()
        if child is not None:
            os.kill(child, signal.SIGKILL)
        here.close()
        there.close()


def is_free(locks: FileLocks, name: str = "key") -> bool:
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


def test_a_killed_holder_frees_the_lock(opener, locks):
    with held_by_a_process(opener) as pid:
        assert not is_free(locks)
        os.kill(pid, signal.SIGKILL)
        with locks.hold("key", LIMIT_S):
            pass


def test_a_child_that_outlives_the_holder_does_not_inherit_the_lock(opener, locks):
    with held_by_a_process(opener, has_child=True) as pid:
        os.kill(pid, signal.SIGKILL)
        with locks.hold("key", LIMIT_S):
            pass


def test_a_forked_child_does_not_keep_the_lock_from_others(opener, locks):
    with locks.hold("key", 0):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(HELD_S,))
        child.start()
    assert is_free(opener())
    child.kill()
    child.join()


def test_time_out_names_the_holder_and_what_to_do(opener, locks):
    with held_by_a_process(opener) as pid:
        started = time.monotonic()
        with pytest.raises(LockTimeoutError) as caught, locks.hold("key", 0.3):
            pass
        assert time.monotonic() - started >= 0.3
    assert f"process {pid} on {platform.node()}" in caught.value.what
    assert "timed out after 0.3 s" in caught.value.what
    assert "--timeout" in caught.value.fix
    assert caught.value.exit_code == 5


def test_a_time_out_of_zero_tries_once(opener, locks):
    heard: list[Waiting] = []
    with held_by_a_process(opener):
        with pytest.raises(LockTimeoutError), locks.hold("key", 0, heard.append):
            pass
        assert heard == []  # a process that waits reports it
    assert is_free(locks)


def test_a_waiter_hears_of_the_holder_and_not_more_often_than_each_second(opener, locks):
    heard: list[Waiting] = []

    def hear(waiting: Waiting) -> None:
        heard.append(waiting)
        if len(heard) == 2:
            raise KeyboardInterrupt

    with held_by_a_process(opener) as pid, pytest.raises(KeyboardInterrupt), locks.hold("key", None, hear):
        pass
    assert heard[0].waited_seconds == 0.0
    assert heard[1].waited_seconds >= 1.0
    assert {(waiting.holder.host, waiting.holder.pid) for waiting in heard} == {(platform.node(), pid)}


def test_who_need_not_wait_hears_nothing(locks):
    heard: list[Waiting] = []
    with locks.hold("key", None, heard.append):
        pass
    assert heard == []


def test_a_waiter_goes_on_after_the_release_and_not_before(opener, locks):
    is_released = threading.Event()

    def hold_for_a_moment() -> None:
        with opener().hold("key", None):
            held.set()
            time.sleep(0.3)
            is_released.set()

    held = threading.Event()
    thread = threading.Thread(target=hold_for_a_moment)
    thread.start()
    held.wait()
    with locks.hold("key", LIMIT_S):
        assert is_released.is_set()
    thread.join()


def test_an_error_of_the_callback_is_the_callers_own(opener, locks):
    def fail(_: Waiting) -> None:
        raise BrokenPipeError("the terminal was closed")

    with held_by_a_process(opener), pytest.raises(BrokenPipeError), locks.hold("key", None, fail):
        pass
    assert is_free(locks)


# Files


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root.open(tmp_path / "cache")


def test_the_lock_file_stays_and_the_note_goes(root):
    locks = FileLocks(root)
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
        with FileLocks(root).hold("key", 0):
            assert {stat.S_IMODE(path.stat().st_mode) for path in root.locks.iterdir()} == {0o660}
    finally:
        os.umask(before)


@pytest.mark.parametrize("note", ["", "no json", "[]", "{}", '{"host": 1}', '{"host":"h","pid":"x","since":0}', "\xff"])
def test_a_note_that_cannot_be_read_is_another_process(root, note):
    (root.locks / "key.holder").write_text(note, encoding="latin-1")
    assert FileLocks(root).holder("key") is None
    assert describe_holder(None) == "another process"


def test_a_holder_is_described_by_its_process_and_its_age():
    assert describe_holder(Holder("pod-7", 12, 0.0)) == "process 12 on pod-7"
    assert describe_age(None) == ""
    assert describe_age(Holder("pod-7", 12, time.time() - 90)) == ", which began 90 s ago"
    assert describe_age(Holder("pod-7", 12, time.time() + 90)) == ", which began 0 s ago"


class Clock:
    """Time that passes only while somebody sleeps."""

    time = staticmethod(time.time)

    def __init__(self) -> None:
        self.now_s = 0.0
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.sleeps.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(local, "time", clock)
    return clock


def test_a_waiter_hears_of_the_holder_at_once_and_then_each_second(root, clock):
    heard: list[Waiting] = []
    with FileLocks(root).hold("key", 0):
        with pytest.raises(LockTimeoutError), FileLocks(root).hold("key", 2.7, heard.append):
            pass
        assert heard[0].waited_seconds == 0.0
        assert [waiting.waited_seconds for waiting in heard] == pytest.approx([0.0, 1.0, 2.0], abs=0.11)
        assert clock.now_s == pytest.approx(2.7)


def test_a_waiter_hears_of_the_holder_though_its_first_try_took_longer_than_its_time_out(root, clock, monkeypatch):
    heard: list[Waiting] = []
    acquire = filelock.FileLock.acquire

    def acquire_slowly(lock, **arguments):
        clock.now_s += 5.0
        return acquire(lock, **arguments)

    with FileLocks(root).hold("key", 0):
        monkeypatch.setattr(filelock.FileLock, "acquire", acquire_slowly)
        with pytest.raises(LockTimeoutError), FileLocks(root).hold("key", 0.1, heard.append):
            pass
    assert [waiting.waited_seconds for waiting in heard] == [0.0]


def test_a_waiter_goes_on_within_a_moment_after_the_release(root, clock, monkeypatch):
    held = contextlib.ExitStack()
    held.enter_context(FileLocks(root).hold("key", 0))
    sleep = clock.sleep

    def sleep_and_release(seconds: float) -> None:
        sleep(seconds)
        if len(clock.sleeps) == 5:
            held.close()

    monkeypatch.setattr(clock, "sleep", sleep_and_release)
    with FileLocks(root).hold("key", None):
        assert len(clock.sleeps) == 5  # and not once more after the release
    assert max(clock.sleeps) <= 0.1


def test_a_note_that_cannot_be_written_or_removed_does_not_keep_the_lock(root):
    locks = FileLocks(root)
    (root.locks / "key.holder").mkdir()
    with locks.hold("key", 0):
        pass
    assert is_free(FileLocks(root))


def test_a_lock_that_cannot_be_made_is_a_store_error_with_the_way_out(root):
    root.locks.rmdir()
    root.locks.touch()
    with pytest.raises(StoreError, match=r"key\.lock cannot be taken") as caught, FileLocks(root).hold("key", 0):
        pass
    assert "--dir" in caught.value.fix


@pytest.mark.skipif(os.geteuid() == 0, reason="probe: permissions do not bind the root user")
def test_a_read_only_folder_is_a_store_error(root):
    root.locks.chmod(0o500)
    with pytest.raises(StoreError, match="cannot be taken"), FileLocks(root).hold("key", 0):
        pass


def test_a_symbolic_link_in_place_of_a_lock_is_refused(root, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("content")
    (root.locks / "key.lock").symlink_to(victim)
    with pytest.raises(StoreError, match="cannot be taken"), FileLocks(root).hold("key", 0):
        pass
    assert victim.read_text() == "content"
