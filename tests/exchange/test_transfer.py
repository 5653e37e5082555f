"""Bundles: the same bytes for the same engines, all or nothing, and nothing hostile gets in."""

import dataclasses
import io
import json
import os
import tarfile

import blake3
import pytest
from fakes import FakeBuilder, fake_cache
from foreign_files import rtx_plan
from models import linear, save

from enginecache.errors import BundleError, IntegrityError, InvalidInputError, NotCachedError, OptionError, StoreError
from enginecache.exchange.bundle import INDEX_NAME, bundle_index, member_header, member_name
from enginecache.exchange.transfer import export_bundle, import_bundle
from enginecache.files.canonical import canonical_json, key_digest

ASKS = [{"dims": {"batch": (1, 2, 4)}}, {"dims": {"batch": (1, 2, 8)}}, {"dims": {"batch": (1, 2, 16)}}]


def records(cache):
    return [used.record for used in cache.entries()]


def exported(cache, path):
    return export_bundle(cache._storage, records(cache), path)


def imported(cache, path):
    return import_bundle(cache._storage, path, cache.make)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For what takes long to make, and no test changes."""
    return tmp_path_factory.mktemp("transfer")


@pytest.fixture(scope="module")
def asked(folder):
    """The model."""
    return save(linear(), folder / "model.onnx")


@pytest.fixture(scope="module")
def source(folder, asked):
    """A cache with three engines."""
    cache = fake_cache(folder / "source")
    for ask in ASKS:
        cache.get(asked, **ask)
    return cache


@pytest.fixture(scope="module")
def bundle(source, folder):
    return exported(source, folder / "bundle.tar").path


@pytest.fixture
def target(open_cache, tmp_path):
    """An empty cache."""
    return open_cache(folder=tmp_path / "target")


@pytest.fixture
def copy(bundle, open_cache, tmp_path):
    """A cache with the same engines, to be changed."""
    cache = open_cache(folder=tmp_path / "copy")
    imported(cache, bundle)
    return cache


def test_bundle_carries_engines_to_another_folder(bundle, source, target, asked):
    result = imported(target, bundle)
    assert (len(result.taken), result.present, result.kept) == (3, (), ())
    for ask in ASKS:
        here, there = (cache.get(asked, **ask, offline=True) for cache in (source, target))
        assert there.outcome == "hit"
        assert there.path.read_bytes() == here.path.read_bytes()
        assert there.record == here.record


def test_bundle_is_the_same_bytes_whoever_exports_it(bundle, source, copy, tmp_path):
    again = export_bundle(source._storage, records(source)[::-1] * 2, tmp_path / "again.tar")
    carried = exported(copy, tmp_path / "carried.tar")
    assert bundle.read_bytes() == again.path.read_bytes() == carried.path.read_bytes()
    assert again.size_bytes == bundle.stat().st_size


def test_bundle_is_a_plain_tar_file_with_its_index_first(bundle, source):
    with tarfile.open(bundle, "r:") as tar:
        members = tar.getmembers()
        index = json.load(tar.extractfile(members[0]))
    assert members[0].name == INDEX_NAME
    assert [member.name for member in members[1:]] == sorted(member_name(record.digest) for record in records(source))
    assert {(m.mode, m.uid, m.gid, m.mtime, m.uname, m.gname) for m in members} == {(0o444, 0, 0, 0, "", "")}
    assert [one["key"] for one in index["entries"]] == sorted(record.key for record in records(source))


def test_engines_that_share_a_plan_are_carried_once(copy, target, tmp_path):
    (first, second, _) = records(copy)
    shared = dataclasses.replace(second, digest=first.digest, size_bytes=first.size_bytes, seal=None)
    copy._storage.registry.restore([shared])
    copy._storage.write_record(first.digest)
    copy.remove(next(record for record in records(copy) if record.digest != first.digest))
    path = exported(copy, tmp_path / "b.tar").path
    with tarfile.open(path, "r:") as tar:
        assert len(tar.getmembers()) == 2
    assert len(imported(target, path).taken) == 2
    copy.verify(repair=True)


def test_result_of_a_check_travels_and_a_pin_stays(copy, target, tmp_path):
    (first, *_) = records(copy)
    copy._storage.record_check(first, '{"verdict":"passed"}')
    copy.pin(first.key)
    imported(target, exported(copy, tmp_path / "b.tar").path)
    carried = target.find(first.key)
    assert (carried.check_json, carried.is_pinned) == ('{"verdict":"passed"}', False)


def test_second_import_takes_nothing_and_changes_nothing(bundle, copy):
    before = {path: path.stat().st_ino for path in copy.root.engines.glob("*/*")}
    result = imported(copy, bundle)
    assert (result.taken, len(result.present), result.kept) == ((), 3, ())
    assert {path: path.stat().st_ino for path in copy.root.engines.glob("*/*")} == before


def test_engine_that_is_stored_is_never_replaced(bundle, open_cache, tmp_path, asked):
    other = open_cache(folder=tmp_path / "other", builder=FakeBuilder(size_bytes=100))
    mine = other.get(asked, **ASKS[0])
    result = imported(other, bundle)
    assert [record.key for record in result.kept] == [mine.key]
    assert len(result.taken) == 2
    assert other.get(asked, **ASKS[0], offline=True).digest == mine.digest


def test_import_above_the_limit_keeps_what_it_took_and_warns(bundle, open_cache, tmp_path):
    small = open_cache(folder=tmp_path / "small", max_size_bytes=5000)
    result = small.import_bundle(bundle)
    assert len(result.taken) == len(records(small)) == 3
    (warning,) = result.warnings
    assert "above its limit" in warning


def test_damaged_engine_is_set_aside_and_taken_from_the_bundle(bundle, copy, asked):
    path = copy.get(asked, **ASKS[0], offline=True).path
    path.chmod(0o600)
    path.write_bytes(b"X" * path.stat().st_size)
    result = imported(copy, bundle)
    assert (len(result.taken), len(result.present)) == (1, 2)
    assert copy.get(asked, **ASKS[0], offline=True).outcome == "hit"


def test_imported_engines_are_recorded_for_a_repair(copy):
    copy.root.registry_path.unlink()
    assert type(copy).verify_folder(copy.config, repair=True).findings
    assert len(records(copy)) == 3


def test_damaged_engine_is_not_exported(copy, tmp_path, asked):
    path = copy.get(asked, **ASKS[0]).path
    found = records(copy)
    path.chmod(0o600)
    path.write_bytes(b"X" * path.stat().st_size)
    with pytest.raises(IntegrityError, match="set aside"):
        export_bundle(copy._storage, found, tmp_path / "b.tar")
    assert [p.name for p in tmp_path.iterdir() if "tar" in p.name or p.name.startswith(".")] == []
    with pytest.raises(NotCachedError):
        export_bundle(copy._storage, found, tmp_path / "b.tar")


def test_only_a_bundle_or_an_empty_file_is_replaced(copy, tmp_path):
    (tmp_path / "text").write_text("mine")
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(tmp_path / "text")
    for name in ("text", "", "none/b.tar", "copy/b.tar", "copy/engines/b.tar", "link"):
        with pytest.raises(OptionError, match="-o"):
            exported(copy, tmp_path / name)
    assert (tmp_path / "text").read_text() == "mine"
    assert exported(copy, tmp_path / "empty").size_bytes == exported(copy, tmp_path / "empty").size_bytes
    with pytest.raises(OptionError, match="no engine"):
        export_bundle(copy._storage, [], tmp_path / "b.tar")


# Hostile bundles


def everything(cache):
    """All that is in a cache folder, but for what only a use or a look changes."""
    root = cache.root.path
    return {
        str(path.relative_to(root)): (path.lstat().st_mode, path.lstat().st_size)
        for path in root.rglob("*")
        if path.name != "reserve" and "registry" not in path.name and path.parent.name != "locks"
    }


def refused(target, path, data, words=".", error=BundleError):
    path.write_bytes(data)
    before = everything(target)
    with pytest.raises(error, match=words) as raised:
        imported(target, path)
    assert everything(target) == before
    assert raised.value.fix
    return raised.value


@pytest.fixture(scope="module")
def closed(folder):
    """A cache that no bundle gets into."""
    cache = fake_cache(folder / "closed")
    cache.make()
    yield cache
    assert cache.verify(deep=True).is_clean
    assert records(cache) == []


@pytest.fixture(scope="module")
def parts(bundle):
    """The index and the plans of the bundle."""
    with tarfile.open(bundle, "r:") as tar:
        return [(member, tar.extractfile(member).read()) for member in tar.getmembers()]


def packed(parts, **ways):
    """A tar file as Python's own module writes it, members in this order."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:", format=ways.get("format", tarfile.GNU_FORMAT)) as tar:
        for member, data in parts:
            tar.addfile(member, None if data is None else io.BytesIO(data))
    return target.getvalue()


def member(name, **values):
    info = tarfile.TarInfo(name)
    info.mode = 0o444
    for field, value in values.items():
        setattr(info, field, value)
    return info


def test_every_truncation_is_refused(bundle, closed, tmp_path):
    data = bundle.read_bytes()
    for size in (0, 1, 511, 512, 700, 4096, 8192, len(data) - 1024, len(data) - 1):
        error = InvalidInputError if size < 512 else BundleError
        refused(closed, tmp_path / "cut.tar", data[:size], ".", error)


@pytest.mark.parametrize("step", [509, pytest.param(3, marks=pytest.mark.reliability)])
def test_every_flipped_byte_is_refused(step, bundle, closed, tmp_path):
    data = bundle.read_bytes()
    for at in range(0, len(data), step):
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        refused(closed, tmp_path / "flipped.tar", flipped, ".", (BundleError, InvalidInputError))


def test_trailing_bytes_and_further_members_are_refused(bundle, parts, closed, tmp_path):
    data = bundle.read_bytes()
    refused(closed, tmp_path / "b.tar", data + b"\0", "follow its end")
    refused(closed, tmp_path / "b.tar", data + data, "follow its end")
    extra = [*parts, (member("extra", size=3), b"abc")]
    refused(closed, tmp_path / "b.tar", packed(extra), "follow its end")


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("/etc/passwd", {}, "a file '/etc/passwd'"),
        ("../../outside", {}, "a file '../../outside'"),
        ("engines/x", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}, "a symbolic link"),
        ("engines/x", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd", "size": 0}, "a hard link"),
        ("engines/x", {"type": tarfile.CHRTYPE, "size": 0}, "a device"),
        ("engines/x", {"type": tarfile.BLKTYPE, "size": 0}, "a device"),
        ("engines/x", {"type": tarfile.FIFOTYPE, "size": 0}, "a pipe"),
        ("engines/x", {"type": tarfile.DIRTYPE, "size": 0}, "a folder"),
        ("engines/x", {"type": b"S"}, "member of type b'S'"),
        ("", {"size": 1 << 60}, "of 1152921504606846976 bytes"),
        ("", {"mode": 0o4755}, "where engines/"),
        ("", {"mtime": 7}, "where engines/"),
    ],
)
def test_hostile_member_is_refused_and_named(name, values, words, bundle, parts, closed, tmp_path):
    data = bytearray(bundle.read_bytes())
    at = 512 + len(parts[0][1]) + -len(parts[0][1]) % 512
    info = member(name or parts[1][0].name, **{"size": parts[1][0].size, **values})
    data[at : at + 512] = info.tobuf(tarfile.GNU_FORMAT)[:512]
    refused(closed, tmp_path / "b.tar", bytes(data), words)
    assert not (tmp_path / "outside").exists()


def test_member_that_is_there_twice_or_in_another_order_is_refused(parts, closed, tmp_path):
    index, one, two, three = parts
    for order in ([index, one, one, two, three], [index, two, one, three], [one, index, two, three], [index, one, two]):
        refused(closed, tmp_path / "b.tar", packed(order), ".", (BundleError, InvalidInputError))


@pytest.mark.parametrize("way", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_extended_headers_are_not_read(way, parts, closed, tmp_path):
    (index, data), *rest = parts
    index.pax_headers = {"path": "../../outside", "size": "1"}
    data = packed([(index, data), *rest], format=way)
    refused(closed, tmp_path / "b.tar", data, ".", (BundleError, InvalidInputError))


@pytest.mark.parametrize("head", [b"\x1f\x8b\x08", b"BZh9", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0"])
def test_compressed_bundle_is_not_decompressed(head, closed, tmp_path):
    error = refused(closed, tmp_path / "b.tar.gz", head + bytes(5000), "decompress it first", InvalidInputError)
    assert "not a bundle" in error.what


def rewritten(records, *, plans=None, index=None):
    """A bundle whose index says this."""
    index = bundle_index(records) if index is None else index
    target = io.BytesIO()
    target.write(member_header(INDEX_NAME, len(index)) + index + bytes(-len(index) % 512))
    for digest, data in sorted((plans or {}).items()):
        target.write(member_header(member_name(digest), len(data)) + data + bytes(-len(data) % 512))
    target.write(bytes(1024))
    return target.getvalue()


@pytest.fixture(scope="module")
def plans(source):
    return {record.digest: source.path(record).read_bytes() for record in records(source)}


def edited_index(found, edit, *, is_sealed=True):
    """An index that was edited; by somebody who knows of its seal, or not."""
    body = json.loads(bundle_index(found))
    seal = body.pop("blake3")
    edit(body)
    if is_sealed:
        seal = blake3.blake3(canonical_json(body).encode()).hexdigest()
    return (canonical_json({**body, "blake3": seal}) + "\n").encode()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda body: body["entries"][0].update(key="0" * 64), "its key is not that of its text"),
        (lambda body: body["entries"][0].update(key_json="{}"), "its key is not that of its text"),
        (lambda body: body["entries"][0].update(digest=body["entries"][1]["digest"]), "index is not as it was"),
        (lambda body: body["entries"][0].update(backend="tensorrt"), "tensorrt"),
        (lambda body: body["entries"][0].update(digest="../../etc/passwd"), "digest is"),
        (lambda body: body["entries"][0].update(size_bytes=1), "index is not as it was"),
        (lambda body: body["entries"][0].update(extra=1), "not one"),
        (lambda body: body["entries"][0].update(is_pinned=True), "not as it was written"),
        (lambda body: body["entries"][0].update(seal="0" * 64), "does not belong"),
        (lambda body: body["entries"].append(body["entries"][0]), "not as it was written"),
        (lambda body: body["entries"].reverse(), "not as it was written"),
        (lambda body: body["plans"].pop(), "not as it was written"),
        (lambda body: body["plans"][0].update(size_bytes=1 << 60), "not as it was written"),
        (lambda body: body["entries"][0].update(created_at="0001-01-01T00:00:00+00:00"), "created_at is"),
        (lambda body: body["entries"][0].update(created_at="9999-12-31T23:59:59+00:00"), "created_at is"),
        (lambda body: body["entries"][0].update(model_name="\ud800"), "model_name is"),
        (lambda body: body["entries"][0].update(build_seconds=10**400), "build_seconds is"),
        (lambda body: body.update(more=1), "not as it was written"),
        (lambda body: body.update(entries=[]), "no engines"),
        (lambda body: body.update(entries=7), "not one"),
        (lambda body: body.update(entries=[7, "x", None]), "not one"),
        (lambda body: body.pop("bundle"), "cannot be read"),
    ],
)
def test_edited_index_is_refused(edit, words, source, plans, closed, tmp_path):
    data = rewritten(records(source), plans=plans, index=edited_index(records(source), edit))
    refused(closed, tmp_path / "b.tar", data, words)


@pytest.mark.parametrize(
    "edit",
    [
        {"tensorrt_version": "1.7.1.117"},
        {"model_digest": "0" * 64},
        {"model_name": "another.onnx"},
        {"compute_capabilities": ["9.0"]},
        {"created_at": "2026-01-01T00:00:00+00:00"},
        {"check_json": '{"verdict":"passed"}'},
    ],
    ids=str,
)
def test_edited_record_without_a_new_seal_is_refused(edit, source, plans, closed, tmp_path):
    index = edited_index(records(source), lambda body: body["entries"][0].update(edit), is_sealed=False)
    data = rewritten(records(source), plans=plans, index=index)
    refused(closed, tmp_path / "b.tar", data, "not as it was written")


@pytest.mark.parametrize("index", [b"[]", b"nonsense", b"[" * 100_000, b'{"bundle": NaN}', b"\xff"])
def test_index_that_is_no_json_object_is_refused(index, closed, tmp_path):
    refused(closed, tmp_path / "b.tar", rewritten([], index=index), "index")


def test_huge_index_is_refused_unread(closed, tmp_path):
    header = member_header(INDEX_NAME, 1 << 40)
    refused(closed, tmp_path / "b.tar", header + bytes(5000), "header of its index")


def test_damaged_bundle_makes_no_cache(bundle, tmp_path):
    data = bytearray(bundle.read_bytes())
    data[-2000] ^= 1
    (tmp_path / "b.tar").write_bytes(data)
    for path, error in ((tmp_path / "b.tar", BundleError), (__file__, InvalidInputError)):
        with pytest.raises(error):
            imported(fake_cache(tmp_path / "new"), path)
        assert not (tmp_path / "new").exists()
    new = fake_cache(tmp_path / "new")
    assert len(imported(new, bundle).taken) == 3
    assert new.verify(deep=True).is_clean


def test_bundle_of_a_newer_format_says_so(source, plans, closed, tmp_path):
    index = edited_index(records(source), lambda body: body.update(bundle=2))
    data = rewritten(records(source), plans=plans, index=index)
    refused(closed, tmp_path / "b.tar", data, "newer enginecache", InvalidInputError)


def test_keys_of_another_version_are_refused(source, plans, closed, tmp_path):
    (first, *_) = records(source)
    old = dataclasses.replace(first, key_version=99, key=key_digest(99, first.key_json), seal=None)
    data = rewritten([old], plans={old.digest: plans[old.digest]})
    refused(closed, tmp_path / "b.tar", data, "version 99", InvalidInputError)


@pytest.mark.parametrize(
    "values",
    [
        {"profiles": [5]},
        {"profiles": [{"x": {"min": [1], "opt": [1], "max": [1, 2], "kind": "shape"}}]},
        {"target": {}},
        {"target": {"compute_capabilities": 89, "and_later": False, "device": None}},
        {"options": 5},
        {"options": {}},
        {"environment": ["x"]},
        {"conversion": "fp16"},
        {"toolchain": 5},
        {"adopted": True},
        {"more": 1},
    ],
)
def test_key_of_another_form_is_refused(values, source, plans, closed, tmp_path):
    """Nobody could ask for it, and everybody who asks for its model would meet it."""
    (first, *_) = records(source)
    text = canonical_json({**first.fields, **values})
    odd = dataclasses.replace(first, key_json=text, key=key_digest(first.key_version, text), seal=None)
    refused(
        closed, tmp_path / "b.tar", rewritten([odd], plans={odd.digest: plans[odd.digest]}), "its key is not one of"
    )


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (rtx_plan("1.6.1.120"), "built by 1.6.1.120"),
        (rtx_plan(mask=1), "for compute capability 7.5"),
        (rtx_plan(size=500)[:-1], "of 500 bytes"),
        (b"ftrt" + rtx_plan()[4:], "a plan of tensorrt, and not"),
    ],
)
def test_record_that_contradicts_the_header_of_its_plan_is_refused(plan, words, source, closed, tmp_path):
    (first, *_) = records(source)
    digest = blake3.blake3(plan).hexdigest()
    false = dataclasses.replace(first, digest=digest, size_bytes=len(plan), seal=None)
    refused(closed, tmp_path / "b.tar", rewritten([false], plans={digest: plan}), words)


def test_what_is_no_file_is_refused(closed, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "", "none"):
        with pytest.raises(InvalidInputError):
            imported(closed, tmp_path / name)


def test_bundle_that_does_not_fit_is_refused_before_it_is_read(bundle, target, monkeypatch):
    from enginecache.storage import space

    monkeypatch.setattr(space, "free_bytes", lambda _: 100)
    with pytest.raises(StoreError, match="too little room to import"):
        imported(target, bundle)


def test_import_that_dies_before_its_rows_are_there_leaves_none_of_them(bundle, target, monkeypatch):
    registry = target._storage.registry

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry, "restore", fail)
        with pytest.raises(KeyboardInterrupt):
            imported(target, bundle)
    assert records(target) == []
    assert list(target.root.engines.glob("*/*.engine")) == []
    assert list(target.root.tmp.iterdir()) == []
    assert len(imported(target, bundle).taken) == 3


def test_two_imports_at_once_take_each_engine_once(bundle, tmp_path, target):
    import threading

    results = []
    threads = [
        threading.Thread(target=lambda: results.append(imported(fake_cache(tmp_path / "target"), bundle)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(result.taken) for result in results) == [0, 0, 0, 3]
    assert all(len(result.taken) + len(result.present) == 3 for result in results)
