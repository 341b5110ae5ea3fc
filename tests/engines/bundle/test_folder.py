import hashlib
import json

import pytest
from pydantic import ValidationError

from engines import Bundle, BundleError
from engines.bundle.folder import MANIFEST_NAME, describe_file
from engines.bundle.manifest import File


def edit(bundle, change):
    """Change the manifest on disk."""
    path = bundle.folder / MANIFEST_NAME
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.slow
def test_a_bundle_is_read_as_it_was_written(tiny):
    bundle = Bundle.open(str(tiny.bundle.folder))
    assert bundle.manifest == tiny.bundle.manifest
    bundle.check()
    assert bundle.manifest.segment("back").inputs == ("down.0.resnet", "down.0.sampler", "text")
    with pytest.raises(KeyError):
        bundle.manifest.segment("middle")


def test_files_are_described_by_path_hash_and_size(tmp_path):
    (tmp_path / "onnx").mkdir()
    path = tmp_path / "onnx" / "a.bin"
    path.write_bytes(b"abc")
    file = describe_file(tmp_path, path)
    assert (file.path, file.bytes, file.sha256) == ("onnx/a.bin", 3, hashlib.sha256(b"abc").hexdigest())


def test_missing_folder_and_missing_manifest_are_told_apart(tmp_path):
    with pytest.raises(BundleError, match=r"no bundle at .*nowhere \(no such folder\)\nmake one with: python -m exporter"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=rf"\(no {MANIFEST_NAME} in it\)"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "manifest.json/x"])
def test_paths_that_no_file_system_takes_are_no_bundles(tmp_path, name):
    with pytest.raises(BundleError, match=r"no bundle at .* \(no such folder\)"):
        Bundle.open(tmp_path / name)


def test_a_folder_with_a_blank_in_its_name_is_quoted_in_the_command(tmp_path):
    with pytest.raises(BundleError) as caught:
        Bundle.open(tmp_path / "my bundle")
    assert caught.value.__notes__[0].endswith(f"--out '{tmp_path / 'my bundle'}'")


@pytest.mark.parametrize("version", [0, 99, "1", None])
def test_another_manifest_version_is_refused(damageable, version):
    edit(damageable, lambda data: data.update(version=version))
    with pytest.raises(BundleError, match=rf"has manifest version {version}, this program reads 1\nrebuild it with"):
        Bundle.open(damageable.folder)


@pytest.mark.parametrize("text", ["{", "\ufeff\x00", "[1, 2]", "null"])
def test_a_manifest_that_is_no_object_is_refused(damageable, text):
    (damageable.folder / MANIFEST_NAME).write_text(text, "utf-8")
    with pytest.raises(BundleError, match=r"is damaged|has manifest version None"):
        Bundle.open(damageable.folder)


def test_a_manifest_that_is_no_text_is_refused(damageable):
    (damageable.folder / MANIFEST_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BundleError, match=r"is damaged"):
        Bundle.open(damageable.folder)


def test_a_bad_field_is_named(damageable):
    edit(damageable, lambda data: data["features"]["noise"].update(dtype="float8"))
    with pytest.raises(BundleError, match=r"is damaged: manifest.json, features.noise.dtype: Input should be"):
        Bundle.open(damageable.folder)


def test_an_unknown_field_is_refused(damageable):
    edit(damageable, lambda data: data.update(surprise=1))
    with pytest.raises(BundleError, match=r"surprise"):
        Bundle.open(damageable.folder)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("name", ["front.onnx.data", "torch/back.pt2"])
def test_damaged_files_are_named(damageable, damage, name):
    damage(damageable.folder / name)
    with pytest.raises(BundleError, match=rf"is damaged: {name} is not the file that was built\nrebuild it with"):
        damageable.check()


def test_a_missing_file_is_named(damageable):
    (damageable.folder / "front.onnx").unlink()
    with pytest.raises(BundleError, match=r"is damaged: front.onnx is missing\nrebuild it with"):
        damageable.check()


@pytest.mark.parametrize("path", ["/etc/passwd", "../other/front.onnx", "segments/../../front.onnx"])
def test_a_file_outside_the_bundle_is_refused(path):
    with pytest.raises(ValidationError, match="leads out of the bundle"):
        File(path=path, sha256="0", bytes=1)
