"""Small files are whole, whoever reads or writes them; what cannot be read is told with a way out."""

import os

import pytest

from pairtune.errors import UserError
from pairtune.files import parse_object, read_json, read_object, write_text


@pytest.mark.parametrize("durable", [False, True])
def test_a_write_that_fails_leaves_the_old_text_and_nothing_beside_it(tmp_path, durable):
    path = tmp_path / "state.json"
    write_text(path, "old\n", durable=durable)
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new\n\ud800", durable=durable)
    assert path.read_text() == "old\n" and [*tmp_path.iterdir()] == [path]
    write_text(path, "newer, ü\n", durable=durable)
    assert path.read_bytes() == "newer, ü\n".encode() and [*tmp_path.iterdir()] == [path]


def test_a_file_has_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "shared", "")
        os.umask(0o077)
        write_text(tmp_path / "private", "")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("shared", "private")] == [0o644, 0o600]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_told_with_its_place_and_a_way_out(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for read in (read_json, read_object, lambda path, **way_out: parse_object(content, path, **way_out)):
        with pytest.raises(UserError, match=r"config\.json: cannot be read: .*; ask its author"):
            read(path, way_out="ask its author")


def test_an_object_is_keys_and_values_and_none_where_there_is_no_file(tmp_path):
    path = tmp_path / "config.json"
    assert read_object(path) == {}
    with pytest.raises(UserError, match=r"config\.json: is missing; put it back, or download it again"):
        read_json(path)
    path.write_text("[1]")
    assert read_json(path) == [1]
    for read in (read_object, lambda path: parse_object(b"[1]", path)):
        with pytest.raises(UserError, match=r"config\.json: must hold keys .* holds a list; download it again"):
            read(path)
    path.write_text('{"a": 1}')
    assert read_object(path) == parse_object(b'{"a": 1}', "there") == {"a": 1}
