from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from records import publish

from enginecache.errors import RegistryError, SchemaError
from enginecache.files.fingerprint import Fingerprint
from enginecache.storage.registry import schema
from enginecache.storage.registry.database import Database
from enginecache.storage.registry.registry import Registry


@pytest.fixture
def database(tmp_path: Path) -> Database:
    database = Database(tmp_path / "registry.sqlite")
    schema.ensure_schema(database, 0o600)
    return database


def alter(database: Database, *statements: str) -> None:
    connection = sqlite3.connect(database.path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def test_ensure_schema_is_idempotent(database):
    before = Fingerprint.of_path(database.path)
    schema.ensure_schema(database, 0o600)
    assert Fingerprint.of_path(database.path) == before
    assert schema.upgrade(database) == schema.current_revision(database) == schema.HEAD


def test_opening_a_current_registry_loads_no_alembic(database):
    code = """
import sys
from pathlib import Path
from enginecache.storage.registry.database import Database
from enginecache.storage.registry.schema import ensure_schema
from enginecache.storage.registry.registry import Registry
database = Database(Path(sys.argv[1]))
ensure_schema(database, 0o600)
assert Registry(database).entries() == []
sys.exit("alembic was loaded" if "alembic" in sys.modules else 0)
"""
    subprocess.run([sys.executable, "-c", code, str(database.path)], check=True)


def test_no_registry_has_no_revision_and_asking_makes_none(tmp_path):
    assert schema.current_revision(Database(tmp_path / "registry.sqlite")) is None
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_is_a_registry_whose_making_was_interrupted(tmp_path):
    database = Database(tmp_path / "registry.sqlite")
    database.path.touch()
    assert schema.current_revision(database) is None
    schema.ensure_schema(database, 0o600)
    schema.check(database)


@pytest.mark.parametrize("mode", [0o600, 0o660])
@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_the_file_has_its_mode_under_any_umask(tmp_path, mode, umask):
    before = os.umask(umask)
    try:
        schema.ensure_schema(Database(tmp_path / "registry.sqlite"), mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "registry.sqlite").stat().st_mode) == mode


def test_making_the_file_keeps_the_lock_that_another_thread_has_on_it(tmp_path):
    path = tmp_path / "registry.sqlite"
    path.touch()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    schema._create_file(path, 0o600)
    code = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN IMMEDIATE')"
    other = subprocess.run([sys.executable, "-c", code, str(path)], check=False, capture_output=True, text=True)
    holder.close()
    assert "database is locked" in other.stderr


def test_a_newer_schema_that_says_this_release_cannot_read_it_is_refused(database):
    alter(
        database,
        "UPDATE alembic_version SET version_num = '0099'",
        f"UPDATE schema_info SET oldest_reader = {schema.READER + 1}",
    )
    with pytest.raises(SchemaError, match="schema 0099, which a newer enginecache wrote") as caught:
        schema.ensure_schema(database, 0o600)
    assert caught.value.exit_code == 6
    assert "Upgrade enginecache" in caught.value.fix


def test_a_newer_schema_that_this_release_can_read_is_used_and_not_changed(database):
    alter(
        database,
        "UPDATE alembic_version SET version_num = '0099'",
        "ALTER TABLE entries ADD COLUMN signature TEXT",
        "CREATE TABLE signatures (id INTEGER PRIMARY KEY)",
    )
    schema.ensure_schema(database, 0o600)
    record = publish(Registry(database), "a")
    assert Registry(database).find(record.key) == record
    assert schema.current_revision(database) == "0099"


def test_a_current_schema_without_its_oldest_reader_is_refused(database):
    alter(database, "DELETE FROM schema_info")
    with pytest.raises(RegistryError, match="does not say who can read it"):
        schema.ensure_schema(database, 0o600)


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE pins",
        "ALTER TABLE pins ADD COLUMN why TEXT",
        "ALTER TABLE entries DROP COLUMN driver_version",
        "DROP INDEX ix_entries_digest",
    ],
)
def test_tables_that_drifted_from_the_code_are_found(database, statement):
    schema.check(database)
    alter(database, statement)
    with pytest.raises(SchemaError, match="differs from what this release expects") as caught:
        schema.check(database)
    assert "enginecache db upgrade" in caught.value.fix


def test_check_changes_nothing(database):
    before = Fingerprint.of_path(database.path)
    schema.check(database)
    assert Fingerprint.of_path(database.path) == before


def test_alembic_says_nothing_on_standard_output(tmp_path, capfd):
    database = Database(tmp_path / "registry.sqlite")
    schema.ensure_schema(database, 0o600)
    schema.check(database)
    assert capfd.readouterr() == ("", "")


def test_a_release_that_runs_from_an_archive_says_that_its_scripts_must_be_files(tmp_path, monkeypatch):
    module = SimpleNamespace(__file__=str(tmp_path / "app.pyz/enginecache/migrations/__init__.py"))
    monkeypatch.setattr(schema, "import_module", lambda _name: module)
    with pytest.raises(SchemaError, match=r"imported from an archive.*app\.pyz") as caught:
        schema.ensure_schema(Database(tmp_path / "registry.sqlite"), 0o600)
    assert "pip" in caught.value.fix


def test_a_file_that_is_no_database_is_an_error_and_is_left_alone(tmp_path):
    path = tmp_path / "registry.sqlite"
    data = b"not a database, but long enough for one" * 100
    path.write_bytes(data)
    with pytest.raises(RegistryError, match="unavailable") as caught:
        schema.ensure_schema(Database(path), 0o600)
    assert "verify --repair" in caught.value.fix
    assert path.read_bytes() == data


def test_a_folder_in_place_of_the_file_is_an_error(tmp_path):
    (tmp_path / "registry.sqlite").mkdir()
    with pytest.raises(RegistryError, match="unavailable"):
        schema.ensure_schema(Database(tmp_path / "registry.sqlite"), 0o600)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(RegistryError, match="No such file"):
        schema.ensure_schema(Database(tmp_path / "absent/registry.sqlite"), 0o600)


@pytest.mark.skipif(os.geteuid() == 0, reason="probe: permissions do not bind the root user")
def test_a_file_that_may_not_be_read_is_an_error(database):
    database.path.chmod(0o000)
    with pytest.raises(RegistryError, match="unavailable"):
        schema.ensure_schema(database, 0o600)


@pytest.mark.parametrize("name", ["50% off", "a?b=c", "#1", "with space", "a%3Fb", "ünï", "semi;colon", "a&b", "'\""])
def test_any_name_of_a_folder_works(tmp_path, name):
    database = Database(tmp_path / name / "registry.sqlite")
    database.path.parent.mkdir()
    schema.ensure_schema(database, 0o600)
    publish(Registry(database), "a")
    schema.check(database)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert database.path.stat().st_size > 0


def put_into_wal_mode(database: Database) -> sqlite3.Connection:
    """Change the journal as another program would, and write to the log: a connection that keeps it open."""
    connection = sqlite3.connect(database.path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"INSERT INTO pins VALUES ('{'7' * 64}', '2026-11-01 12:00:00')")
    return connection


def journal_of(database: Database) -> str:
    connection = sqlite3.connect(database.path)
    (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    connection.close()
    return str(mode)


def test_a_registry_in_wal_mode_is_taken_out_of_it_with_all_its_rows(database, tmp_path):
    other = put_into_wal_mode(database)
    saved = tmp_path / "saved"
    saved.mkdir()
    for path in tmp_path.glob("registry.sqlite*"):
        shutil.copy(path, saved)
    other.close()
    left = Database(saved / "registry.sqlite")  # as after a crash of that program: the row is in the log alone
    assert (saved / "registry.sqlite-wal").stat().st_size > 0
    schema.ensure_schema(left, 0o600)
    publish(Registry(left), "a")
    assert [path.name for path in sorted(saved.iterdir())] == ["registry.sqlite", "registry.sqlite-journal"]
    assert journal_of(left) != "wal"
    with left.looking() as connection:
        assert connection.execute("SELECT key FROM pins").fetchall() == [("7" * 64,)]


def test_a_registry_that_another_program_has_open_in_wal_mode_is_unavailable_until_it_is_closed(database):
    other = put_into_wal_mode(database)
    with pytest.raises(RegistryError, match="locked") as caught:
        publish(Registry(database), "a")
    assert "Another process holds it" in caught.value.fix
    other.close()
    publish(Registry(database), "a")
    assert journal_of(database) != "wal"


@pytest.mark.parametrize("way", ["reading", "writing"])
def test_the_pragmas_are_in_force(database, way):
    with getattr(database, way)() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("foreign_keys", "synchronous", "journal_mode")
        }
    assert found == {"foreign_keys": 1, "synchronous": 2, "journal_mode": "truncate"}
