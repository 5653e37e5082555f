from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import linear, save
from mounts import IMAGES, Image, small_disk

from enginecache.files import fingerprint, mounts
from enginecache.files.fingerprint import Fingerprint
from enginecache.model import ModelSource
from enginecache.pipeline import model_memo
from enginecache.pipeline.model_memo import FileMemo
from enginecache.storage.blobs import Blobs
from enginecache.storage.folder import Root
from enginecache.storage.registry.database import Database
from enginecache.storage.registry.registry import Registry
from enginecache.storage.registry.schema import ensure_schema
from enginecache.storage.storage import BlobState, Storage


class CountingStore(Blobs):
    """Counts how often a whole blob is read."""

    reads = 0

    def read(self, digest):
        self.reads += 1
        return super().read(digest)


class Bench:
    """A memo with real parts, and what it read."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = Root.open(folder / "cache")
        self.database = Database(self.root.registry_path)
        ensure_schema(self.database, 0o600)
        self.registry = Registry(self.database)
        self.store = CountingStore(self.root)
        self.memo = FileMemo(self.registry)
        self.storage = self._storage()
        self.parsed = 0
        identify = model_memo.identify

        def counting(source):
            self.parsed += 1
            return identify(source)

        monkeypatch.setattr(model_memo, "identify", counting)

    def _storage(self) -> Storage:
        storage = Storage(self.root)
        storage.reader, storage.blobs = self.registry, self.store
        return storage

    def check(self, digest: str, size_bytes: int, *, force: bool = False) -> BlobState:
        return self.storage.check(SimpleNamespace(digest=digest, size_bytes=size_bytes), force=force)

    def after_a_boot(self) -> None:
        """Go on in the host's next boot."""
        self.registry = Registry(self.database, boot="the next")
        self.memo = FileMemo(self.registry)
        self.storage = self._storage()

    def put(self, data: bytes) -> str:
        source = self.root.tmp / "plan"
        source.write_bytes(data)
        staged = self.store.stage(source)
        self.store.publish(staged)
        source.unlink()
        return staged.digest


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path, monkeypatch)


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled at once, so that no test has to wait for it."""
    monkeypatch.setattr(fingerprint, "SETTLE_NS", 0)


@pytest.fixture(params=["inline", "external"])
def source(request, tmp_path):
    external = "weights.bin" if request.param == "external" else None
    return ModelSource.of(save(linear(), tmp_path / "model.onnx", external=external))


# Models


def test_a_settled_model_is_parsed_once(bench, source, settled):
    first = bench.memo.identify(source)
    assert bench.memo.identify(source) == first
    assert FileMemo(bench.registry).identify(source) == first
    assert bench.parsed == 1


def test_a_young_model_is_parsed_each_time_until_it_has_settled(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "SETTLE_NS", 3_600_000_000_000)
    source = ModelSource.of(save(linear(), tmp_path / "model.onnx", external="weights.bin"))
    first = bench.memo.identify(source)
    bench.memo.identify(source)
    assert bench.parsed == 2
    monkeypatch.setattr(fingerprint, "SETTLE_NS", 50_000_000)
    time.sleep(0.1)
    bench.memo.identify(source)
    assert bench.memo.identify(source).digest == first.digest
    assert bench.parsed == 3


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin"])
def test_a_changed_byte_is_seen_although_size_and_mtime_are_as_before(bench, tmp_path, settled, name):
    source = ModelSource.of(save(linear(), tmp_path / "model.onnx", external="weights.bin"))
    before = bench.memo.identify(source)
    path = tmp_path / name
    status = path.stat()
    time.sleep(0.02)
    data = bytearray(path.read_bytes())
    # The producer's name is at the model's start, and does not matter to its graph; of the weights, every byte does.
    index = data.index(b"gemm") if name == "model.onnx" else 100
    data[index] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert bench.memo.identify(source).digest != before.digest


def test_missing_external_data_is_an_error_and_not_remembered(bench, tmp_path, settled):
    source = ModelSource.of(save(linear(), tmp_path / "model.onnx", external="weights.bin"))
    bench.memo.identify(source)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ValueError, match=r"weights\.bin"):
        bench.memo.identify(source)


def test_one_file_under_two_names_with_other_weights_next_to_it_is_two_models(bench, tmp_path, settled):
    first = save(linear(seed=1), tmp_path / "a/model.onnx", external="weights.bin")
    second = save(linear(seed=2), tmp_path / "b/model.onnx", external="weights.bin")
    assert first.read_bytes() == second.read_bytes()
    second.unlink()
    second.hardlink_to(first)
    digests = {bench.memo.identify(ModelSource.of(path)).digest for path in (first, second, first)}
    assert len(digests) == 2


def test_a_copy_and_a_renamed_model_have_the_same_identity(bench, tmp_path, settled):
    path = save(linear(), tmp_path / "model.onnx")
    first = bench.memo.identify(ModelSource.of(path)).digest
    copy = shutil.copy(path, tmp_path / "copy.onnx")
    path.rename(tmp_path / "renamed.onnx")
    assert bench.memo.identify(ModelSource.of(copy)).digest == first
    assert bench.memo.identify(ModelSource.of(tmp_path / "renamed.onnx")).digest == first


def test_what_another_key_version_found_is_not_used(bench, source, settled, monkeypatch):
    bench.memo.identify(source)
    monkeypatch.setattr(model_memo, "KEY_VERSION", model_memo.KEY_VERSION + 1)
    bench.memo.identify(source)
    bench.memo.identify(source)
    assert bench.parsed == 2


def test_model_bytes_are_parsed_each_time(bench, settled):
    source = ModelSource.of(linear().SerializeToString())
    assert bench.memo.identify(source) == bench.memo.identify(source)
    assert bench.parsed == 2


def test_a_model_with_a_time_beyond_any_integer_is_parsed_once(bench, source, settled):
    os.utime(source.path, (2**33, 2**33 + 2**30))
    assert bench.memo.identify(source) == bench.memo.identify(source)
    assert bench.parsed == 1


# Blobs


def test_a_settled_blob_is_read_once(bench, settled):
    digest = bench.put(b"plan")
    assert [bench.check(digest, 4) for _ in range(3)] == [BlobState.INTACT] * 3
    assert bench.store.reads == 1


def test_a_check_can_be_forced(bench, settled):
    digest = bench.put(b"plan")
    bench.check(digest, 4)
    assert bench.check(digest, 4, force=True) is BlobState.INTACT
    assert bench.store.reads == 2


def test_a_young_blob_is_read_each_time(bench):
    digest = bench.put(b"plan")
    assert [bench.check(digest, 4) for _ in range(2)] == [BlobState.INTACT] * 2
    assert bench.store.reads == 2


def test_a_flipped_bit_is_seen_although_size_and_mtime_are_as_before(bench, settled):
    digest = bench.put(b"plan")
    bench.check(digest, 4)
    path = bench.store.path(digest)
    status = path.stat()
    time.sleep(0.02)
    path.chmod(0o600)
    path.write_bytes(b"plaN")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert bench.check(digest, 4) is BlobState.WRONG_DIGEST
    assert bench.check(digest, 4) is BlobState.WRONG_DIGEST


def test_a_verdict_on_one_blob_is_none_on_another(bench, settled):
    first, second = bench.put(b"plan"), bench.put(b"nalp")
    bench.check(first, 4)
    bench.store.path(first).rename(bench.store.path(second))
    bench.store.path(second).rename(bench.store.path(second))
    assert bench.check(second, 4) is BlobState.WRONG_DIGEST


def test_a_blob_that_is_missing_or_of_another_size_is_not_read(bench, settled):
    digest = bench.put(b"plan")
    assert bench.check(digest, 5) is BlobState.WRONG_SIZE
    bench.store.delete(digest)
    assert bench.check(digest, 4) is BlobState.MISSING
    assert bench.store.reads == 0


def test_a_memo_that_cannot_be_written_still_checks(bench, settled):
    digest = bench.put(b"plan")
    with bench.database.writing():
        assert bench.check(digest, 4) is BlobState.INTACT
    assert bench.check(digest, 4) is BlobState.INTACT
    assert bench.store.reads == 2


# Other file systems and other boots


@pytest.fixture(params=IMAGES)
def image(request, tmp_path):
    folder = tmp_path / "image"
    folder.mkdir()
    found = Image(request.param, folder)
    yield found
    found.detach()


def test_a_model_of_an_image_in_the_place_of_another_is_identified_anew(bench, image, settled):
    first, second = (linear(seed=seed).SerializeToString() for seed in (1, 2))
    path = image.replace("model.onnx", first)
    before = bench.memo.identify(ModelSource.of(path))
    assert bench.memo.identify(ModelSource.of(path)) == before
    assert bench.parsed == 1
    assert image.replace("model.onnx", second) == path
    after = bench.memo.identify(ModelSource.of(path))
    assert bench.parsed == 2
    assert after.digest != before.digest
    assert after.files[0].fingerprint[1:5] == before.files[0].fingerprint[1:5]  # all but the device and the mount
    image.replace("model.onnx", first)
    assert bench.memo.identify(ModelSource.of(path)).digest == before.digest


def test_external_data_of_an_image_in_the_place_of_another_is_hashed_anew(bench, image, tmp_path, settled):
    weights = []
    for seed in (1, 2):
        source = save(linear(seed=seed), tmp_path / f"{seed}/model.onnx", external="weights.bin")
        weights.append((source.parent / "weights.bin").read_bytes())
    (tmp_path / "1/weights.bin").unlink()
    model, mounted = tmp_path / "1/model.onnx", image.path / "weights.bin"
    image.replace("weights.bin", weights[0])
    # A bind mount of the file: a link may not lead out of the model's folder.
    (tmp_path / "1/weights.bin").touch()
    digests = set()
    for content in weights:
        image.replace("weights.bin", content)
        if subprocess.run(["mount", "--bind", mounted, tmp_path / "1/weights.bin"], check=False).returncode:
            pytest.skip("probe: a file cannot be mounted over another here")
        try:
            digests.add(bench.memo.identify(ModelSource.of(model)).digest)
            digests.add(bench.memo.identify(ModelSource.of(model)).digest)
        finally:
            subprocess.run(["umount", tmp_path / "1/weights.bin"], check=True)
    assert len(digests) == 2
    assert bench.parsed == 2


def test_two_mounts_of_one_folder_do_not_displace_each_other(bench, tmp_path, settled):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save(linear(), tmp_path / "a/model.onnx")
    if subprocess.run(["mount", "--bind", tmp_path / "a", tmp_path / "b"], check=False).returncode:
        pytest.skip("probe: this user may not mount")
    try:
        for _ in range(3):
            for name in ("a", "b"):
                bench.memo.identify(ModelSource.of(tmp_path / name / "model.onnx"))
    finally:
        subprocess.run(["umount", tmp_path / "b"], check=True)
    assert bench.parsed == 2


def test_nothing_is_believed_after_a_boot(bench, source, settled):
    digest = bench.put(b"plan")
    bench.memo.identify(source)
    bench.check(digest, 4)
    before = bench.memo.identify(source)
    bench.after_a_boot()
    assert bench.memo.identify(source) == before
    assert bench.check(digest, 4) is BlobState.INTACT
    assert (bench.parsed, bench.store.reads) == (2, 2)


def test_an_old_blob_with_the_times_of_the_right_one_is_found_out_after_a_boot(bench, settled):
    """As a power loss leaves it: overwritten in place, and the times not yet on the disk."""
    digest = bench.put(b"plan")
    assert bench.check(digest, 4) is BlobState.INTACT
    other = bench.store.path(digest)
    kept = other.stat()
    other.chmod(0o600)
    other.write_bytes(b"plaN")
    changed = Fingerprint.of_path(other)
    bench.registry.remember("blob", changed, {"digest": digest})  # as if the times were still the old ones
    assert bench.check(digest, 4) is BlobState.INTACT
    assert kept.st_size == changed.size_bytes
    bench.after_a_boot()
    assert bench.check(digest, 4) is BlobState.WRONG_DIGEST


@pytest.mark.parametrize("kernel", ["reported the mount", "did not"])
def test_without_the_mounts_number_a_file_in_memory_is_read_each_time(bench, tmp_path, settled, monkeypatch, kernel):
    with small_disk(1 << 20) as disk:
        source = ModelSource.of(save(linear(), disk / "model.onnx"))
        if kernel == "did not":
            monkeypatch.setattr(mounts, "_statx", None)
        elif not mounts.status_of(disk)[5]:
            pytest.skip("probe: the kernel gives mounts no unique number (Linux 6.8)")
        bench.memo.identify(source)
        bench.memo.identify(source)
    assert bench.parsed == (1 if kernel == "reported the mount" else 2)


def test_a_model_with_a_date_ahead_is_parsed_once(bench, source, settled):
    later = time.time() + 9 * 3600
    os.utime(source.path, (later, later))
    assert bench.memo.identify(source) == bench.memo.identify(source)
    assert bench.parsed == 1
