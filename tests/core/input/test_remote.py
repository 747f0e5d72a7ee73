"""URLs over their real protocols: an S3 server and web servers on this machine, with faults on demand; the bytes are theirs to count."""

from __future__ import annotations

import random
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from datetime import UTC
from pathlib import Path

import fsspec
import pytest

from mmfilter.core.input import remote
from mmfilter.core.input.remote import fetch, open_remote
from mmfilter.core.input.shards import expand, open_source
from mmfilter.core.input.source import InputOptions
from mmfilter.errors import MMFilterError, ShardError
from tests.conftest import good, write_tar
from tests.inputs import as_folder, as_llava, as_parquet, pairs
from tests.servers import CUT, Log, http_server, times

pytestmark = pytest.mark.slow  # servers, and clients that take their time


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small blocks, so that small files have many, and no waiting between tries."""
    monkeypatch.setattr("mmfilter.core.input.places.BLOCK", 64 << 10)
    monkeypatch.setattr(remote, "_PAUSES", (0.0, 0.0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def tar(tmp_path_factory) -> bytes:
    """A shard of 60 samples, some 300 KB."""
    return write_tar(
        tmp_path_factory.mktemp("tar") / "a.tar", [member for i in range(60) for member in good(f"k{i:02d}", i)]
    ).read_bytes()


def put(place: str, path: Path) -> str:
    """Copy a file or folder to s3://bucket/place; its URL."""
    url = f"s3://bucket/{place}"
    fsspec.filesystem("s3").put(str(path), url, recursive=path.is_dir())
    return url


def read(shard: str, **options) -> list[tuple]:
    return [
        (sample.key, sample.row, sample.offset, sample.nbytes, sample.members, sample.problem)
        for sample in open_source(shard, **options).samples()
    ]


def error_of(call, *args) -> str:
    with pytest.raises(MMFilterError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- every kind of input on S3 ---


def test_a_tar_on_s3_is_the_local_one_and_is_read_once(s3: Log, tmp_path, tar):
    local = tmp_path / "a.tar"
    local.write_bytes(tar)
    url = put("kinds/a.tar", local)
    s3.clear()
    assert read(url) == read(str(local))
    assert s3.nbytes("a.tar") == len(tar), "every byte once"
    assert [request.range for request in s3.gets("a.tar")][:2] == ["bytes=0-65535", "bytes=65536-131071"]


def test_patterns_on_s3(s3: Log, tmp_path, tar):
    (tmp_path / "set").mkdir()
    for name in ("1.tar", "0.tar", "note.txt"):
        (tmp_path / "set" / name).write_bytes(tar)
    put("patterns", tmp_path / "set")
    both = ["s3://bucket/patterns/0.tar", "s3://bucket/patterns/1.tar"]
    assert expand(["s3://bucket/patterns/*.tar"]) == both
    fsspec.filesystem("s3").invalidate_cache()
    s3.clear()
    assert expand(["s3://bucket/patterns/{0..1}.tar"]) == both
    assert [(request.method, request.path) for request in s3.requests] == [("HEAD", "/bucket/patterns/0.tar")], (
        "the first is looked at, no more"
    )


def test_other_inputs_on_s3_are_the_local_ones(s3: Log, tmp_path):
    found = pairs(12)
    folder, llava, parquet = (
        as_folder(tmp_path / "folder", found),
        as_llava(tmp_path / "llava/data.json", found),
        as_parquet(tmp_path / "rows.parquet", found),
    )
    assert [shard] == expand([put("folder", folder) + "/"]) if (shard := "s3://bucket/folder/") else None
    assert read(shard) == read(f"{folder}/")
    url = put("llava", tmp_path / "llava")
    options = InputOptions(images=f"{url}/images")
    assert read(f"{url}/data.json", options=options) == read(
        str(llava), options=InputOptions(images=str(tmp_path / "llava/images"))
    )
    assert read(put("rows.parquet", parquet)) == read(str(parquet))
    assert (
        len({open_source(name).stamp().etag for name in (shard, f"{url}/data.json", "s3://bucket/rows.parquet")}) == 3
    )


def test_an_image_that_is_not_there_is_a_bad_sample_but_a_store_that_fails_is_not(s3: Log, tmp_path):
    as_llava(tmp_path / "llava/data.json", pairs(8))
    (tmp_path / "llava/images/000000003.jpg").unlink()
    url = put("holes", tmp_path / "llava")
    options = InputOptions(images=f"{url}/images")
    assert [sample[5] for sample in read(f"{url}/data.json", options=options)] == [None] * 3 + [
        "no such file: '000000003.jpg'"
    ] + [None] * 4
    s3.fault = times(100, 501, "000000005.jpg")
    assert error_of(lambda: read(f"{url}/data.json", options=options)).startswith(
        f"shard '{url}/images/000000005.jpg' cannot be read: the server answers 501 ("
    ), "not a row without a score"


# --- plain HTTP ---


@pytest.mark.parametrize(("ranges", "sizes"), [(True, True), (False, True), (False, False)])
def test_web_servers_with_and_without_byte_ranges(tar, tmp_path, ranges, sizes):
    (tmp_path / "a.tar").write_bytes(tar)
    rows = as_parquet(tmp_path / "rows.parquet", pairs(9))
    with http_server(
        {"/a.tar": tar, "/rows.parquet": rows.read_bytes(), "/a.tar?x=[1]": tar}, ranges=ranges, sizes=sizes
    ) as web:
        assert expand([f"{web.url}/a.tar?x=[1]"]) == [f"{web.url}/a.tar?x=[1]"]
        assert read(f"{web.url}/a.tar") == read(str(tmp_path / "a.tar"))
        assert web.nbytes("a.tar") == len(tar) if ranges else web.nbytes("a.tar") <= 3 * len(tar)
        assert read(f"{web.url}/rows.parquet") == read(str(rows))
        assert open_source(f"{web.url}/a.tar").stamp().size == (len(tar) if sizes else None)
        if not ranges:
            said = (
                "comes from a server that gives whole files only, no byte ranges; download it, and score the local file"
            )
            assert error_of(remote.check_ranges, f"{web.url}/a.tar") == f"shard '{web.url}/a.tar' {said}"


def test_ranges_of_a_web_server(tar):
    asked = [(random.Random(i).randrange(len(tar) - 1000), 1000) for i in range(20)]
    with http_server({"/a.tar": tar}) as web:
        assert fetch([(f"{web.url}/a.tar", start, start + n) for start, n in asked]) == [
            tar[start : start + n] for start, n in asked
        ]
        assert web.nbytes() == 20 * 1000
        web.fault = times(9, 503)
        assert fetch([(f"{web.url}/a.tar", start, start + n) for start, n in asked[:8]]) == [
            tar[start : start + n] for start, n in asked[:8]
        ], "some come late"


def test_a_web_server_without_etags_is_told_by_its_times():
    info = {"name": "x", "size": 3, "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    assert remote.tag_of(info) == "Mon, 01 Jan 2024 00:00:00 GMT"


# --- what goes wrong ---


@pytest.mark.parametrize(
    "fault", [times(2, 503, after=1), times(2, CUT, after=2), times(1, 429), times(1, 500, method="HEAD")]
)
def test_what_passes_costs_nothing_but_time(tar, tmp_path, fault):
    (tmp_path / "a.tar").write_bytes(tar)
    with http_server({"/a.tar": tar}) as web:
        web.fault = fault
        assert read(f"{web.url}/a.tar") == read(str(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("status", "said"),
    [(CUT, "cannot be read: ClientPayloadError: Response payload is not completed"), (503, "answers 503")],
)
def test_what_does_not_pass_ends_the_shard(tar, status, said):
    with http_server({"/a.tar": tar}) as web:
        url = f"{web.url}/a.tar"
        web.fault = times(100, status, after=2)
        message = error_of(read, url)
        assert (
            message.startswith(f"shard {url!r} cannot be read: ")
            and said in message
            and message.endswith("; try again later")
        )
        assert len(web.gets()) == 2 + 3, "three tries of the third block"


def test_s3_clients_try_again_by_themselves(s3: Log, tmp_path, tar):
    (tmp_path / "a.tar").write_bytes(tar)
    url = put("again/a.tar", tmp_path / "a.tar")
    s3.fault = times(2, 503, "again/a.tar", after=1)
    assert read(url) == read(str(tmp_path / "a.tar"))


def test_what_a_web_server_refuses(tar):
    with http_server({"/a.tar": tar}) as web:
        assert error_of(expand, [f"{web.url}/b.tar"]) == f"shard '{web.url}/b.tar' does not exist; check the URL"
        for status, name in ((403, "Forbidden"), (401, "Unauthorized")):
            web.fault = lambda _, status=status: status
            assert (
                error_of(expand, [f"{web.url}/a.tar"])
                == f"shard '{web.url}/a.tar' is refused ({status}: {name}); check the credentials, and that they may read it"
            )
        web.fault = lambda _: 410
        assert (
            error_of(expand, [f"{web.url}/a.tar"])
            == f"shard '{web.url}/a.tar' cannot be read: the server answers 410 (Gone); try again later"
        )
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"  # where nobody listens
        message = error_of(expand, [f"{url}/a.tar"])
    assert message.startswith(f"shard '{url}/a.tar' cannot be reached (Cannot connect to host ")
    assert message.endswith("); check the host, and the network or proxy")


def test_tls_that_cannot_be_trusted(tmp_path, tar):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*own_certificate(tmp_path))
    with http_server({"/a.tar": tar}, tls=context) as web:
        message = error_of(expand, [f"{web.url}/a.tar"])
    assert message.startswith(f"shard '{web.url}/a.tar' cannot be reached over TLS (Cannot connect to host 127.0.0.1:")
    assert message.endswith("check the certificate, or write http:// where the server has none")
    with http_server({"/a.tar": tar}) as web:
        url = web.url.replace("http:", "https:") + "/a.tar"
        assert error_of(expand, [url]).startswith(f"shard {url!r} cannot be reached over TLS (")


def own_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate that nobody vouches for, and its key."""
    from datetime import datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([]), datetime.now(UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    signed = made.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1)).sign(key, hashes.SHA256())
    (folder / "cert").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key").write_bytes(secret)
    return folder / "cert", folder / "key"


def test_what_s3_refuses(s3: Log, monkeypatch):
    assert error_of(expand, ["s3://bucket/none.tar"]) == "shard 's3://bucket/none.tar' does not exist; check the URL"
    assert (
        error_of(expand, ["s3://bucket/none*.tar"])
        == "shard 's3://bucket/none*.tar' matches no file; check the bucket and the pattern"
    )
    assert (
        error_of(expand, ["s3://nobucket/a.tar"])
        == "shard 's3://nobucket/a.tar' is in a bucket that does not exist; check its name, and AWS_ENDPOINT_URL_S3 where the store is not Amazon's"
    )
    urllib.request.urlopen(
        urllib.request.Request(f"{s3.url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"}, method="POST")
    ).close()  # from now on keys are looked at
    try:
        assert error_of(expand, ["s3://bucket/none.tar"]) == (
            "shard 's3://bucket/none.tar' is refused (403: Forbidden); check the credentials, and that they may read it"
        )
        message = error_of(expand, ["s3://bucket/*.tar"])
        assert message.startswith(
            "shard 's3://bucket/*.tar' is refused (403: The AWS Access Key Id you provided does not exist"
        )
    finally:
        urllib.request.urlopen(
            urllib.request.Request(
                f"{s3.url}/moto-api/reset-auth", b"inf", {"Content-Type": "text/plain"}, method="POST"
            )
        ).close()


@pytest.mark.parametrize("url", ["s3://bucket/a.tar", "s3://bucket/*.tar"])
def test_s3_without_credentials(s3: Log, monkeypatch, url):
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    said = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; FSSPEC_S3_ANON=true for a public one"
    assert error_of(expand, [url]) == f"shard {url!r} needs credentials and there are none: {said}"


@pytest.mark.parametrize(
    ("url", "package", "message"),
    [
        ("s3://bucket/a.tar", "s3fs", "reading s3:// URLs needs an optional package: pip install 'mmfilter[s3]'"),
        ("gs://bucket/a.tar", "gcsfs", "reading gs:// URLs needs an optional package: pip install 'mmfilter[gs]'"),
        (
            "abfs://bucket/a.tar",
            "adlfs",
            "shard 'abfs://bucket/a.tar' needs a package that is not installed: Install adlfs to access Azure Datalake Gen2 and Azure Blob Storage",
        ),
        (
            "https://host/a.tar",
            "aiohttp",
            "reading https:// URLs needs an optional package: pip install 'mmfilter[http]'",
        ),
    ],
)
def test_packages_that_are_not_installed(url, package, message):
    program = (
        f"import sys; sys.modules[{package!r}] = None\nfrom mmfilter.core.input.shards import expand\n"
        f"try:\n    expand([{url!r}])\nexcept Exception as error:\n    print(error)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
        == message
    )


@pytest.mark.parametrize("pattern", ["a.tar", "*.tar"])
def test_a_store_that_says_nothing(s3: Log, monkeypatch, pattern):
    monkeypatch.setattr(remote, "_PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        message = error_of(expand, [f"s3://bucket/{pattern}"])
    assert (
        message
        == f"shard 's3://bucket/{pattern}' has not answered for half a minute; check the host, and the network or proxy"
    )


def test_credentials_are_not_waited_for(s3: Log, monkeypatch):
    """Without any, the cloud's own service for them is asked, which outside of the cloud may say nothing."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert "needs credentials and there are none" in error_of(expand, ["s3://bucket/a.tar"])
        assert time.monotonic() - started < 10


def test_a_protocol_that_nobody_knows():
    assert (
        error_of(expand, ["foo://a/b.tar"])
        == "shard 'foo://a/b.tar' has a protocol that fsspec does not know, 'foo'; it knows s3, gs, https, hf and others"
    )


def test_a_file_reads_like_a_local_one(tar):
    with http_server({"/a.tar": tar}) as web, open_remote(f"{web.url}/a.tar", 10_000) as file:
        at = random.Random(0)
        for _ in range(30):
            start, n = at.randrange(len(tar)), at.randrange(40_000)
            assert file.seek(start) == start
            assert file.read(n) == tar[start : start + n]
        assert file.seek(-5, 2) == len(tar) - 5 and file.read() == tar[-5:]


def test_a_shard_that_shrinks_while_it_is_read(tar):
    files = {"/a.tar": tar}
    with http_server(files) as web, open_remote(f"{web.url}/a.tar", 10_000) as file:
        file.read(10_000)
        files["/a.tar"] = tar[:15_000]
        with pytest.raises(ShardError) as caught:
            file.read(20_000)
    assert str(caught.value) == f"shard '{web.url}/a.tar' has become shorter while it was read; it ends at byte 15,000"


def test_in_parallel_keeps_the_order_and_stops_when_nobody_listens():
    begun = []

    def call(n: int) -> int:
        begun.append(n)
        return -n

    results = remote.in_parallel(call, range(1000), at_once=4)
    assert [next(results) for _ in range(5)] == [0, -1, -2, -3, -4]
    results.close()
    assert len(begun) < 20
