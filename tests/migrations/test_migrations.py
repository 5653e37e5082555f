from __future__ import annotations

import functools
import multiprocessing
import shutil
import signal
import sqlite3
import textwrap
import threading
from importlib import import_module
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from records import EPOCH, attempt, entry, publish

from enginecache.errors import RegistryError, SchemaError
from enginecache.files.fingerprint import Fingerprint
from enginecache.storage.registry import schema
from enginecache.storage.registry.database import Database
from enginecache.storage.registry.registry import Registry

FROZEN = Path(__file__).parent / "data"
SCRIPTS = Path(str(import_module("enginecache.migrations").__file__)).parent


@pytest.fixture(params=schema.KNOWN)
def frozen(request, tmp_path: Path) -> Database:
    """A copy of the registry that the release of each revision wrote."""
    return Database(Path(shutil.copy(FROZEN / f"registry-{request.param}.sqlite", tmp_path / "registry.sqlite")))


@pytest.fixture
def next_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes this release one that has a further script, with the given body of ``upgrade``."""

    def add(body: str) -> None:
        scripts = tmp_path / "a % folder/migrations"
        shutil.copytree(SCRIPTS, scripts, ignore=shutil.ignore_patterns("__pycache__"))
        header = (
            f'import sqlalchemy as sa\nfrom alembic import op\nrevision = "next"\ndown_revision = "{schema.HEAD}"\n'
        )
        text = f"{header}\ndef upgrade():\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        (scripts / "versions/next.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr(import_module("enginecache.migrations"), "__file__", str(scripts / "__init__.py"))
        monkeypatch.setattr(schema, "KNOWN", (*schema.KNOWN, "next"))
        monkeypatch.setattr(schema, "HEAD", "next")

    return add


def dump(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    try:
        return list(connection.iterdump())
    finally:
        connection.close()


def test_head_is_the_newest_script_and_the_only_one():
    scripts = ScriptDirectory(str(SCRIPTS))
    assert scripts.get_heads() == [schema.HEAD]
    assert [script.revision for script in scripts.walk_revisions()][::-1] == list(schema.KNOWN)


def test_every_script_names_an_oldest_reader_that_this_release_is():
    for script in ScriptDirectory(str(SCRIPTS)).walk_revisions():
        assert script.module.OLDEST_READER <= schema.READER


def test_every_revision_has_a_frozen_registry():
    names = [path.name for path in sorted(FROZEN.glob("*.sqlite"))]
    assert names == [f"registry-{revision}.sqlite" for revision in schema.KNOWN]


def test_scripts_make_the_tables_that_the_code_has(tmp_path):
    database = Database(tmp_path / "registry.sqlite")
    schema.ensure_schema(database, 0o600)
    schema.check(database)


def test_a_frozen_registry_opens_and_has_the_tables_that_the_code_has(frozen):
    schema.ensure_schema(frozen, 0o600)
    assert schema.current_revision(frozen) == schema.HEAD
    schema.check(frozen)


def test_a_frozen_registry_serves_its_rows(frozen):
    schema.ensure_schema(frozen, 0o600)
    registry = Registry(frozen, boot="frozen")
    first = entry("a", device_name="NVIDIA H100 80GB HBM3", driver_version="580.65.06", is_pinned=True)
    second = entry("b", digest=first.digest, timing_cache_digest="7" * 64, check_json="{}")
    assert {record.key: record for record in registry.entries()} == {first.key: first, second.key: second}
    assert first.created_at > EPOCH
    states = {build.id: (build.state, build.reason) for build in registry.builds()}
    assert states[attempt("c", 2).id] == ("failed", "TensorRT refused it")
    assert states[attempt("d").id] == ("running", "")
    (miss,) = registry.misses()
    assert (miss.key, miss.reason, miss.count, miss.differing) == (entry("c").key, "corrupt", 2, ())
    found = registry.recall("blob", Fingerprint(2**64 - 1, 2**64 - 2, 1000, 1, 2, 2**64 - 3))
    assert found == {"digest": first.digest}


def test_a_frozen_registry_takes_new_rows(frozen):
    schema.ensure_schema(frozen, 0o600)
    registry = Registry(frozen, boot="frozen")
    publish(registry, "a", 9)
    assert not registry.remove(entry("a").key)
    assert publish(registry, "c", 3, digest=entry("c").digest).key == entry("c").key
    assert registry.find(entry("c").key).is_pinned
    assert registry.totals().blobs == 3


def test_an_older_registry_is_upgraded_when_it_is_opened_with_its_rows(frozen, next_release):
    next_release('op.add_column("pins", sa.Column("why", sa.Text()))')
    schema.ensure_schema(frozen, 0o600)
    assert schema.current_revision(frozen) == "next"
    assert len(Registry(frozen).entries()) == 2


def test_a_failing_upgrade_changes_nothing(frozen, next_release):
    before = dump(frozen.path)
    next_release(
        """
        op.add_column("pins", sa.Column("why", sa.Text()))
        op.execute("DELETE FROM entries")
        op.create_table("another", sa.Column("id", sa.Integer, primary_key=True))
        op.execute("INSERT INTO no_such_table VALUES (1)")
        """
    )
    with pytest.raises(RegistryError, match="no_such_table"):
        schema.ensure_schema(frozen, 0o600)
    assert dump(frozen.path) == before


def test_a_failing_first_schema_leaves_an_empty_registry(tmp_path, next_release):
    database = Database(tmp_path / "registry.sqlite")
    next_release('raise RuntimeError("in the middle")')
    with pytest.raises(RuntimeError):
        schema.ensure_schema(database, 0o600)
    assert dump(database.path) == ["BEGIN TRANSACTION;", "COMMIT;"]
    assert schema.current_revision(database) is None


def test_an_upgrade_may_alter_a_table_that_others_name(frozen, next_release):
    next_release(
        """
        with op.batch_alter_table("blobs", recreate="always") as batch:
            batch.add_column(sa.Column("signature", sa.Text()))
        """
    )
    schema.ensure_schema(frozen, 0o600)
    assert len(Registry(frozen).entries()) == 2
    with pytest.raises(RegistryError, match="FOREIGN KEY"), frozen.writing() as connection:
        connection.exec_driver_sql("UPDATE entries SET digest = 'none'")


def test_an_upgrade_that_would_break_a_reference_changes_nothing(frozen, next_release):
    before = dump(frozen.path)
    next_release('op.execute("DELETE FROM models")')
    with pytest.raises(RegistryError, match="would name none of models"):
        schema.ensure_schema(frozen, 0o600)
    assert dump(frozen.path) == before


def test_an_upgrade_that_a_newer_release_overtook_is_a_schema_error(frozen):
    connection = sqlite3.connect(frozen.path)
    connection.execute("UPDATE alembic_version SET version_num = '0009'")
    connection.commit()
    connection.close()
    with pytest.raises(SchemaError, match="0009") as caught:
        schema.upgrade(frozen)
    assert "Upgrade enginecache" in caught.value.fix


def open_and_publish(path: Path, name: str) -> None:
    database = Database(path)
    schema.ensure_schema(database, 0o600)
    publish(Registry(database), name)


def test_four_processes_make_one_registry_at_once_and_all_work(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    path = tmp_path / "registry.sqlite"
    workers = [spawn.Process(target=open_and_publish, args=(path, name)) for name in "abcd"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    schema.check(Database(path))
    assert Registry(Database(path)).totals().entries == 4


@pytest.mark.parametrize("folders", [1, 8])
def test_eight_threads_make_registries_at_once_and_all_work(tmp_path, folders):
    failures = []
    start = threading.Barrier(8)

    def open_one(number: int) -> None:
        try:
            start.wait()
            open_and_publish(tmp_path / f"registry-{number % folders}.sqlite", "abcdefgh"[number])
        except Exception as error:  # noqa: BLE001  whatever it is, the test shows it
            failures.append(error)

    threads = [threading.Thread(target=functools.partial(open_one, number)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    databases = [Database(path) for path in sorted(tmp_path.glob("*.sqlite"))]
    assert [Registry(database).totals().entries for database in databases] == [8 // folders] * folders
    for database in databases:
        schema.check(database)


FORK = multiprocessing.get_context("fork")
"""A child that has what ``next_release`` changed; no thread runs in these tests when it is started."""

DIES_IN_THE_MIDDLE = """
    import os, signal
    op.add_column("pins", sa.Column("why", sa.Text()))
    op.create_table("filler", sa.Column("data", sa.Text()))
    for _ in range(4000):
        op.execute("INSERT INTO filler VALUES (hex(randomblob(1000)))")
    if os.environ.get("DIES"):
        os.kill(os.getpid(), signal.SIGKILL)
    op.drop_table("filler")
    """


def test_an_upgrade_that_was_killed_is_rolled_back_whole_and_done_by_the_next(frozen, next_release, monkeypatch):
    before = dump(frozen.path)
    size = frozen.path.stat().st_size
    next_release(DIES_IN_THE_MIDDLE)
    monkeypatch.setenv("DIES", "1")
    child = FORK.Process(target=schema.ensure_schema, args=(frozen, 0o600))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    # It was no easy death: more than SQLite's cache holds had reached the file.
    assert frozen.path.stat().st_size > size + (1 << 20)
    monkeypatch.delenv("DIES")
    assert dump(frozen.path) == before
    schema.ensure_schema(frozen, 0o600)
    assert schema.current_revision(frozen) == "next"
    assert len(Registry(frozen).entries()) == 2


def test_of_processes_that_upgrade_one_registry_at_once_one_does_it_and_all_work(frozen, next_release, tmp_path):
    next_release(
        f"""
        op.add_column("pins", sa.Column("why", sa.Text()))
        with open({str(tmp_path / "ran")!r}, "a") as ran:
            ran.write("x")
        import time
        time.sleep(0.2)
        """
    )
    start = FORK.Barrier(4)

    def open_at_once(name: str) -> None:
        start.wait()
        open_and_publish(frozen.path, name)

    children = [FORK.Process(target=open_at_once, args=(name,)) for name in "wxyz"]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert (tmp_path / "ran").read_text() == "x"
    assert len(Registry(frozen).entries()) == 6


def test_a_newer_schema_is_refused_and_left_as_it_is(frozen, next_release):
    next_release('op.execute("UPDATE schema_info SET oldest_reader = 2")')
    schema.ensure_schema(frozen, 0o600)
    before = dump(frozen.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "KNOWN", schema.KNOWN[:-1])
        patch.setattr(schema, "HEAD", schema.KNOWN[-1])
        with pytest.raises(SchemaError, match="newer enginecache") as caught:
            schema.ensure_schema(frozen, 0o600)
    assert caught.value.exit_code == 6
    assert dump(frozen.path) == before
