"""Reading shards: grouping, byte ranges, bad samples, bad shards, patterns."""

from __future__ import annotations

import gzip
import io
import os
import random
import subprocess
import tarfile
import threading
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from mmfilter.core.input.places import Stamp
from mmfilter.core.input.sample import MAX_MEMBER_BYTES, RawSample
from mmfilter.core.input.shards import expand, open_source, open_sources
from mmfilter.core.input.source import InputOptions
from mmfilter.errors import ShardError
from tests.conftest import picture


def tar_bytes(members: list[tuple[str, bytes]], *, format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def pairs(count: int, *, size: int = 700) -> list[tuple[str, bytes]]:
    rows = []
    for i in range(count):
        rows += [(f"{i:04d}.jpg", bytes([i]) * size), (f"{i:04d}.txt", f"caption {i}".encode())]
    return rows


@pytest.fixture
def write(tmp_path: Path):
    def write(content: bytes, name: str = "a.tar") -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


def read(shard: str, max_member_bytes: int = MAX_MEMBER_BYTES, **options) -> list[RawSample]:
    return list(open_source(shard, **options).samples(max_member_bytes))


def error_of(shard: str) -> str:
    with pytest.raises(ShardError) as caught:
        read(shard)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"shard {shard!r} ", "", 1)


# --- grouping ---


def test_samples_have_keys_members_and_rows(write):
    samples = read(write(tar_bytes(pairs(3))))
    assert [(s.key, s.row, s.problem) for s in samples] == [("0000", 0, None), ("0001", 1, None), ("0002", 2, None)]
    assert samples[1].members == {"jpg": b"\x01" * 700, "txt": b"caption 1"}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_of_webdataset(write, format):
    long = "folder/" + "x" * 90 + "/" + "y" * 90
    members = [
        ("img/0001.JPG", b"one"),
        ("img/0001.seg.PNG", b"two"),
        ("a.b/0002.jpg", b""),
        ("./0003.txt", b"3" * 512),
        ("README", b"no sample"),
        ("__meta__", b"no sample"),
        (".hidden.jpg", b"no sample"),
        ("0004.cls", b"4" * 513),
        ("0004.json", b"{}"),
        (long + ".jpg", b"5"),
        (long + ".txt", b"6"),
    ]
    if format == tarfile.PAX_FORMAT:
        members += [("grün/日本.jpg", b"7"), ("z" * 300 + ".jpg", b"8")]
    shard = write(tar_bytes(members, format=format))
    with open(shard, "rb") as file:
        samples = list(group_by_keys(tar_file_expander([{"url": shard, "stream": file}])))
    theirs = [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in samples]
    assert [(s.key, s.members) for s in read(shard)] == theirs
    assert len(theirs) == (7 if format == tarfile.PAX_FORMAT else 5)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_byte_ranges_cover_the_tar_and_are_tars(write, format):
    members = [(f"{'d' * 60}/{'e' * 60}/{name}", content) for name, content in pairs(4, size=512)]
    content = tar_bytes(members, format=format)
    samples = read(write(content))
    assert samples[0].offset == 0
    assert [s.offset + s.nbytes for s in samples[:-1]] == [s.offset for s in samples[1:]]
    assert not any(content[samples[-1].offset + samples[-1].nbytes :])
    for i, sample in enumerate(samples):
        cut = content[sample.offset : sample.offset + sample.nbytes] + bytes(1024)
        with tarfile.open(fileobj=io.BytesIO(cut)) as tar:
            assert {m.name: tar.extractfile(m).read() for m in tar} == dict(members[2 * i : 2 * i + 2])


def test_macos_files_are_ignored(write):
    samples = read(write(tar_bytes([("d/._1.jpg", b"x"), ("d/1.jpg", b"y"), ("d/.DS_Store", b"z"), ("d/1.txt", b"t")])))
    assert [(s.key, s.members) for s in samples] == [("d/1", {"jpg": b"y", "txt": b"t"})]


def test_global_pax_header_belongs_to_no_sample(write):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "hi"}) as tar:
        tar.addfile(tarfile.TarInfo("1.txt"), io.BytesIO())
    [sample] = read(write(buffer.getvalue()))
    assert (sample.key, sample.offset, sample.nbytes) == ("1", 1024, 512)


def test_directories_are_ignored_and_links_are_a_problem(write):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in [
            ("1.d", tarfile.DIRTYPE),
            ("1.jpg", tarfile.SYMTYPE),
            ("2.jpg", tarfile.LNKTYPE),
            ("3.jpg", tarfile.REGTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
    assert [(s.key, s.problem) for s in read(write(buffer.getvalue()))] == [
        ("1", "not a plain file: '1.jpg' is a symbolic link"),
        ("2", "not a plain file: '2.jpg' is a hard link (make the tar with --hard-dereference)"),
        ("3", None),
    ]


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_sparse_members_of_gnu_tar_are_a_problem(tmp_path, format):
    with open(tmp_path / "1.bin", "wb") as file:
        for start in range(0, 40_000_000, 1_000_000):
            file.seek(start)
            file.write(b"data")
    (tmp_path / "2.txt").write_text("after")
    subprocess.run(["tar", "-cSf", "a.tar", f"--format={format}", "1.bin", "2.txt"], cwd=tmp_path, check=True)
    first, second = read(str(tmp_path / "a.tar"))
    assert first.problem == "not a plain file: '1.bin' is a sparse file"
    assert (second.key, second.members, second.problem) == ("2", {"txt": b"after"}, None)


def test_unordered_members_become_rows_with_a_hint(write):
    samples = read(write(tar_bytes([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3"), ("b.txt", b"4")])))
    hint = "keys must be unique and the members of a sample adjacent (tar --sort=name)"
    assert [(s.key, s.row, list(s.members), s.problem) for s in samples] == [
        ("a", 0, ["jpg"], None),
        ("b", 1, ["jpg"], None),
        ("a", 2, ["txt"], f"duplicate key: 'a', first at row 0; {hint}"),
        ("b", 3, ["txt"], f"duplicate key: 'b', first at row 1; {hint}"),
    ]


def test_a_repeated_extension_begins_a_new_row(write):
    samples = read(write(tar_bytes([("a.jpg", b"1"), ("a.txt", b"2"), ("a.JPG", b"3"), ("a.txt", b"4")])))
    assert [s.members for s in samples] == [{"jpg": b"1", "txt": b"2"}, {"jpg": b"3", "txt": b"4"}]
    assert samples[0].problem is None
    assert samples[1].problem.startswith("duplicate key: 'a', first at row 0;")


def test_a_huge_member_is_not_read(write):
    shard = write(tar_bytes([("a.jpg", b"x" * 3_000_000), ("a.txt", b"t"), ("b.jpg", b"y"), ("b.txt", b"u")]))
    first, second = read(shard, max_member_bytes=1_000_000)
    assert first.problem == "member too large: 'a.jpg' has 3,000,000 bytes, the limit is 1,000,000"
    assert first.members == {}
    assert (second.members, second.problem) == ({"jpg": b"y", "txt": b"u"}, None)


def test_a_sample_of_many_large_members_is_not_held(write):
    shard = write(tar_bytes([(f"a.{i}", b"x" * 9_000) for i in range(50)] + [("b.txt", b"u")]))
    first, second = read(shard, max_member_bytes=10_000)
    assert first.problem == "sample too large: 40,000 bytes are passed at 'a.4'"
    assert len(first.members) == 4
    assert second.problem is None


def test_control_characters_in_a_key_are_a_problem(write):
    [sample] = read(write(tar_bytes([("a\nb.jpg", b"")])))
    assert sample.problem == r"bad key: 'a\nb' has control characters"


def test_a_name_that_is_no_utf8_is_escaped(write):
    content = bytearray(tar_bytes([("a?.txt", b"t")]))
    content[1] = 0xFF
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + sum(content[156:512]) + 8 * 32)
    [sample] = read(write(bytes(content)))
    assert (sample.key, sample.members) == ("a\\xff", {"txt": b"t"})


# --- streams ---


def test_stdin_is_read_from_a_pipe_that_cannot_seek():
    content = tar_bytes([*pairs(40, size=100_000), ("huge.jpg", b"h" * 5_000_000), ("z.txt", b"z")])
    receive, send = os.pipe()

    def feed():
        with os.fdopen(send, "wb") as file:
            file.write(content)

    thread = threading.Thread(target=feed)
    thread.start()
    with os.fdopen(receive, "rb") as file:
        samples = read("-", stdin=file, max_member_bytes=1_000_000)
    thread.join()
    assert len(samples) == 42
    assert samples[39].members == {"jpg": b"\x27" * 100_000, "txt": b"caption 39"}
    assert samples[40].problem.startswith("member too large: 'huge.jpg'")
    assert content[samples[41].offset :].startswith(b"z.txt")


def test_urls_are_read_through_fsspec():
    import fsspec

    with fsspec.open("memory://bucket/a.tar", "wb") as file:
        file.write(tar_bytes(pairs(2)))
    assert expand(["memory://bucket/*.tar"]) == ["memory:///bucket/a.tar"]
    assert [s.key for s in read("memory://bucket/a.tar")] == ["0000", "0001"]
    assert error_of("memory://bucket/b.tar") == "does not exist; check the URL"
    assert open_source("memory://bucket/a.tar").stamp().size == 10_240


# --- shards that end badly ---


@pytest.mark.parametrize(
    ("cut", "yielded", "message"),
    [
        (0, 0, "is empty (0 bytes); a tar without samples still has 1,024 bytes, fetch it again"),
        (100, 0, "is not a tar: it has only 100 bytes"),
        (512, 0, "is truncated, fetch it again: it ends inside member '0000.jpg', which begins at byte 0"),
        (2560, 0, "is truncated, fetch it again: no end-of-archive marker at byte 2,560"),
        (2600, 0, "is truncated, fetch it again: it ends inside the header at byte 2,560"),
        (3072 + 100, 1, "is truncated, fetch it again: it ends inside member '0001.jpg', which begins at byte 2,560"),
        (3072 + 700, 1, "is truncated, fetch it again: it ends inside member '0001.jpg', which begins at byte 2,560"),
        (5120, 1, "is truncated, fetch it again: no end-of-archive marker at byte 5,120"),
    ],
)
def test_a_truncated_shard_says_where(write, cut, yielded, message):
    shard = write(tar_bytes(pairs(2))[:cut])
    assert error_of(shard) == message
    keys = []
    with pytest.raises(ShardError):
        for sample in open_source(shard).samples():
            keys.append(sample.key)
    assert keys == ["0000", "0001"][:yielded]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("cut", [512, 1024])
def test_a_cut_after_a_long_name_is_inside_the_header(write, format, cut):
    content = tar_bytes([("n" * 200 + ".jpg", b"x")], format=format)
    assert error_of(write(content[:cut])).startswith("is truncated, fetch it again: it ends inside the header at byte")


def test_every_cut_of_a_shard_is_noticed(write):
    content = tar_bytes(pairs(3))
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512
    for cut in range(0, end + 1, 256):
        with pytest.raises(ShardError):
            read(write(content[:cut]))
    assert len(read(write(content[: end + 512]))) == 3, "one zero block ends a tar, if only just"


def test_a_damaged_header_says_where(write):
    content = bytearray(tar_bytes(pairs(2)))
    content[2560 + 10] ^= 1
    assert error_of(write(bytes(content))) == "is damaged, fetch it again: no valid tar header at byte 2,560"


def test_zeros_in_the_middle_are_no_end(write):
    content = bytearray(tar_bytes(pairs(2)))
    content[2560:3072] = bytes(512)
    message = "is damaged: data after the end-of-archive marker (join tars with tar --concatenate, not with cat) at byte 3,072"
    assert error_of(write(bytes(content))) == message


def test_concatenated_tars_are_refused(write):
    assert error_of(write(tar_bytes(pairs(1)) * 2)).endswith("not with cat) at byte 10,240")


def test_a_tar_without_samples_yields_nothing(write):
    assert read(write(tar_bytes([]))) == []
    assert read(write(tar_bytes([("README", b"x")]))) == []


def test_what_is_no_tar_is_refused(write, tmp_path):
    assert error_of(write(b"PK\x03\x04" * 1000)) == "is not a tar: it does not begin with a tar header"
    assert error_of(write(gzip.compress(tar_bytes(pairs(1))))) == (
        "is compressed with gzip; decompress it first with gunzip: samples are copied by their byte ranges"
    )
    assert error_of(str(tmp_path / "none.tar")) == "does not exist; check the path"


@pytest.mark.parametrize(
    "record", [b"x", b"9 path=a", b"99 path=a\n", b"0 path=a\n", b"-3 path=a\n", b"12 size=-1\n", b"11 size=1e9\n"]
)
def test_a_damaged_pax_header_is_refused(write, record):
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    content = info.tobuf() + record.ljust(512, b"\0") + tar_bytes(pairs(1))
    assert error_of(write(content)).startswith("is damaged, fetch it again: no valid pax header at byte")


def test_a_bomb_of_an_extension_header_is_not_read(write):
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 5_000_000_000
    assert error_of(write(info.tobuf() + bytes(5000))) == (
        "is damaged, fetch it again: an extension header of 5,000,000,000 bytes at byte 0"
    )


def test_damage_of_any_kind_is_a_shard_error_or_nothing():
    randomness = random.Random(0)
    whole = tar_bytes([*pairs(3), ("d" * 120 + "/" + "grün" * 20 + ".jpg", b"x" * 600)], format=tarfile.PAX_FORMAT)
    for _ in range(1500):
        content = bytearray(whole)
        at = randomness.randrange(len(content) - 512)
        header = at // 512 * 512
        content[at] = randomness.randrange(256)
        content[header + 148 : header + 156] = b"%06o\0 " % (
            sum(content[header : header + 148]) + sum(content[header + 156 : header + 512]) + 256
        )
        try:
            samples = read("-", stdin=io.BytesIO(content))
        except ShardError as error:
            assert "\n" not in str(error)
        else:
            assert all(0 < sample.nbytes <= len(content) - sample.offset for sample in samples)


# --- patterns and stamps ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ["00000.tar", "00001.tar", "00002.tar", "x[1].tar", "notes.txt"]:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "sub.tar").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["00001.tar"], ["00001.tar"]),
        (["0*.tar"], ["00000.tar", "00001.tar", "00002.tar"]),
        (["0000?.tar", "00001.tar"], ["00000.tar", "00001.tar", "00002.tar"]),
        (["0000[02].tar"], ["00000.tar", "00002.tar"]),
        (["{00002..00000}.tar"], ["00002.tar", "00001.tar", "00000.tar"]),
        (["0000{2,0}.tar", "00001.tar"], ["00002.tar", "00000.tar", "00001.tar"]),
        (["x[1].tar"], ["x[1].tar"]),
        (["*.tar"], ["00000.tar", "00001.tar", "00002.tar", "x[1].tar"]),
        (["file://{here}/00000.tar"], ["00000.tar"]),
    ],
)
def test_patterns_expand_to_absolute_paths(folder, patterns, names):
    assert expand([p.replace("{here}", str(folder)) for p in patterns]) == [str(folder / name) for name in names]


def test_urls_and_stdin_stay_as_they_are():
    import fsspec

    fsspec.filesystem("memory").pipe("/stay/0.tar", b"")
    assert expand(["memory://stay/{0..1}.tar"]) == ["memory://stay/0.tar", "memory://stay/1.tar"], (
        "the first is there, the other is met when it is read"
    )
    with pytest.raises(ShardError) as caught:
        expand(["memory://stay/{2..3}.tar"])
    assert str(caught.value) == "shard 'memory://stay/2.tar' does not exist; check the URL"
    assert expand(["-"]) == ["-"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["none.tar"], "shard 'none.tar' does not exist; check the path, or give a pattern such as 'data/*.tar'"),
        (
            ["{00001..00003}.tar"],
            "shard '00003.tar' does not exist; check the path, or give a pattern such as 'data/*.tar'",
        ),
        (["z*.tar"], "shard 'z*.tar' matches no file; check the folder and the pattern"),
        (["sub.tar"], "shard 'sub.tar' is a directory; name the shards in it: 'sub.tar/*.tar'"),
        (
            ["{0..1.tar"],
            "shard '{0..1.tar' has unbalanced braces; write a range as {00000..00099} and a choice as {a,b}",
        ),
        (["-", "00000.tar"], "shard '-' (stdin) must be the only shard; give the others in another run"),
        (
            ["pipe:cat 00000.tar"],
            "shard 'pipe:cat 00000.tar' is a command and would run a shell; run it yourself and pipe its output in: COMMAND | mmfilter score -, or allow it with --allow-pipe",
        ),
        (
            ["nosuch://a/*.tar"],
            "shard 'nosuch://a/*.tar' has a protocol that fsspec does not know, 'nosuch'; it knows s3, gs, https, hf and others",
        ),
    ],
)
def test_what_cannot_be_expanded_says_why(folder, patterns, message):
    with pytest.raises(ShardError) as caught:
        expand(patterns)
    assert str(caught.value) == message


def test_a_path_that_no_table_can_hold(folder):
    open(b"bad\xff.tar", "wb").close()
    open("good\u3000.tar", "wb").close()
    assert expand(["good*.tar"]) == [str(folder / "good\u3000.tar")]
    with pytest.raises(ShardError) as caught:
        expand(["bad*.tar"])
    assert str(caught.value).endswith(
        r"bad\udcff.tar' has a line break or bytes that are not UTF-8 in its path; rename it"
    )


def test_a_stamp_tells_change(write):
    shard = write(tar_bytes(pairs(1)))
    before = open_source(shard).stamp()
    assert (
        before
        == Stamp(10_240, os.stat(shard).st_mtime_ns)
        == Stamp.from_metadata({"size": 10_240, "mtime_ns": before.mtime_ns})
    )
    os.utime(shard, ns=(0, 5))
    assert open_source(shard).stamp() == Stamp(10_240, 5)
    assert open_source("-").stamp() == Stamp()
    os.unlink(shard)
    with pytest.raises(ShardError, match="cannot be found: No such file or directory"):
        open_source(shard).stamp()


# --- what kind a shard is ----------------------------------------------------------------------


def parquet_bytes() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [picture(0)], "caption": ["a cat"]}), file)
    return file.getvalue()


RECORDS = b'[{"image": "a.jpg", "conversations": []}]'
KINDS = {
    "a.tar": (tar_bytes(pairs(1)), "tar"),
    "a.parquet": (parquet_bytes(), "parquet"),
    "a.json": (RECORDS, "llava-json"),
    "a.jsonl": (RECORDS[1:-1], "llava-json"),
    "nothing-said": (tar_bytes(pairs(1)), "tar"),
    "no-extension": (parquet_bytes(), "parquet"),
    "records": (b"  \n" + RECORDS, "llava-json"),
    "lines": (b"\xef\xbb\xbf" + RECORDS[1:-1], "llava-json"),
    "a.tar.gz": (b"\x1f\x8b\x08" + bytes(500), "tar"),
    "contradicted.tar": (parquet_bytes(), "parquet"),
    "contradicted.parquet": (tar_bytes(pairs(1)), "tar"),
    "contradicted.json": (tar_bytes(pairs(1)), "tar"),
    "records.tar": (RECORDS, "llava-json"),
    "[begins like a list].tar": (tar_bytes([("[1].jpg", picture(0)), ("[1].txt", b"x")]), "tar"),
    "empty.tar": (b"", "tar"),
    "empty.parquet": (b"", "parquet"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_by_name_and_first_bytes(write, name):
    content, kind = KINDS[name]
    [source] = open_sources([write(content, name)])
    assert source.kind == kind and source.is_tar == (kind == "tar") and not source.once and not source.remote


def test_records_without_an_extension_are_read_by_what_they_are(write, tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(0))
    lists, lines = (
        [raw.problem for raw in open_source(write(content, name)).samples()]
        for name, content in (("records", RECORDS), ("lines", RECORDS[1:-1] + b"\n" + RECORDS[1:-1]))
    )
    assert lists == [None] and lines == [None, None]


def test_what_is_missing_is_of_the_kind_that_its_name_says(tmp_path):
    for name, kind in (("a.parquet", "parquet"), ("a.tar", "tar"), ("a", "tar")):
        assert open_source(str(tmp_path / name)).kind == kind


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("https://host/a.parquet?signature=x.tar", "parquet"),
        ("https://host/a.tar?name=a.parquet", "tar"),
        ("https://host/a.json#part.tar", "llava-json"),
        ("s3://bucket/a.PARQUET", "parquet"),
        ("s3://bucket/folder/", "folder"),
    ],
)
def test_the_query_of_a_url_is_not_an_extension_and_nothing_is_fetched(url, kind, monkeypatch):
    monkeypatch.setattr("mmfilter.core.input.places.read_start", lambda *_: pytest.fail("a request was made"))
    source = open_source(url)
    assert source.kind == kind and source.remote


def test_a_url_without_an_extension_is_looked_at():
    fsspec.filesystem("memory").pipe_file("/kinds/rows", parquet_bytes())
    assert open_source("memory://kinds/rows").kind == "parquet"


def test_streams_are_read_once_and_never_looked_at():
    piped = open_source("pipe:exit 1", InputOptions(allow_pipe=True))
    stdin = open_source("-", stdin=io.BytesIO(b"PAR1"))
    assert [(source.kind, source.once, source.is_tar) for source in (piped, stdin)] == [
        ("pipe", True, True),
        ("stdin", True, True),
    ]


def test_two_sources_of_one_path_are_one_shard(write):
    path = write(tar_bytes(pairs(1)))
    assert len({open_source(path), open_source(path)}) == 1
    assert repr(open_source(path)) == f"<tar {path!r}>"


def test_a_source_holds_what_would_be_written_among_its_files(write, tmp_path):
    tar, folder = open_source(write(tar_bytes(pairs(1)))), open_source(f"{tmp_path}/")
    assert tar.holds(tmp_path) and not tar.holds(tmp_path / "below")
    assert folder.holds(tmp_path / "below") and not folder.holds(tmp_path.parent)
    assert not open_source("s3://bucket/a.tar").holds("bucket") and not open_source("-").holds(".")
