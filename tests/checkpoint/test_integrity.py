"""A digest against every kind of damage, at random places of random directories."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_jax.checkpoint import integrity

FILES = {"state/d/aa": b"x" * 5000, "state/manifest": b"m", "extras/metadata": b'{"at": 1}', "empty": b""}
UNLISTED = {"_CHECKPOINT_METADATA": b'{"commit": 1}', "commit_success.txt": b"ok"}


def make(directory, files):
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.fixture
def checkpoint(tmp_path):
    make(tmp_path, FILES)
    integrity.write_digest(tmp_path)
    make(tmp_path, UNLISTED)
    return tmp_path


def test_an_untouched_checkpoint_is_sound(checkpoint):
    assert integrity.problems(checkpoint) == []
    assert integrity.problems(checkpoint, quick=True) == []
    listed = json.loads((checkpoint / integrity.DIGEST_FILE).read_text())
    assert listed.keys() == FILES.keys()
    # The SHA-256 of the empty string, as published (FIPS 180 test vectors).
    assert listed["empty"]["sha256"] == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([n for n in FILES if FILES[n]]), at=st.integers(0, 4999), bit=st.integers(0, 7))
def test_one_flipped_bit_is_found_and_its_file_named(checkpoint, name, at, bit):
    data = bytearray(FILES[name])
    data[at % len(data)] ^= 1 << bit
    (checkpoint / name).write_bytes(data)
    assert integrity.problems(checkpoint) == [f"{name}: contents changed (SHA-256 differs)"]
    (checkpoint / name).write_bytes(FILES[name])
    assert integrity.problems(checkpoint) == []


@pytest.mark.parametrize("quick", [False, True])
def test_truncated_grown_missing_and_extra_files_are_named(checkpoint, quick):
    (checkpoint / "state/d/aa").write_bytes(b"x" * 4999)
    (checkpoint / "empty").write_bytes(b"y")
    (checkpoint / "state/manifest").unlink()
    (checkpoint / "state/d/bb").write_bytes(b"")
    (checkpoint / "commit_success.txt").unlink()
    assert sorted(integrity.problems(checkpoint, quick)) == [
        "commit_success.txt: missing",
        "empty: 1 bytes, expected 0",
        "state/d/aa: 4999 bytes, expected 5000",
        "state/d/bb: not part of it",
        "state/manifest: missing",
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": {"size": 1}}', "null", "\xff"])
def test_a_damaged_digest_is_damage(checkpoint, text):
    (checkpoint / integrity.DIGEST_FILE).write_bytes(text.encode("latin-1"))
    (problem,) = integrity.problems(checkpoint)
    assert problem.startswith(f"{integrity.DIGEST_FILE}: unreadable")


def test_a_missing_digest_is_damage(checkpoint):
    (checkpoint / integrity.DIGEST_FILE).unlink()
    assert integrity.problems(checkpoint) == [f"{integrity.DIGEST_FILE}: missing"]


def test_orbax_metadata_must_be_json(checkpoint):
    (checkpoint / "_CHECKPOINT_METADATA").write_bytes(b'{"commit": 1')
    assert integrity.problems(checkpoint) == ["_CHECKPOINT_METADATA: not a JSON object"]


def test_a_quick_check_skips_the_contents_of_large_files_only(tmp_path):
    files = {"large": b"a" * (integrity.SMALL + 1), "small": b"a" * integrity.SMALL}
    make(tmp_path, files)
    integrity.write_digest(tmp_path)
    make(tmp_path, UNLISTED)
    make(tmp_path, {name: b"b" + data[1:] for name, data in files.items()})
    assert integrity.problems(tmp_path, quick=True) == ["small: contents changed (SHA-256 differs)"]
    assert len(integrity.problems(tmp_path)) == 2


def test_contents_are_read_beyond_one_buffer(tmp_path):
    data = bytearray(3 << 20)
    make(tmp_path, {"big": data} | UNLISTED)
    integrity.write_digest(tmp_path)
    data[-1] = 1
    make(tmp_path, {"big": data})
    assert integrity.problems(tmp_path) == ["big: contents changed (SHA-256 differs)"]
