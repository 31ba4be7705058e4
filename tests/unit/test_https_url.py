"""Which URLs are read, and which addresses are public; the references are addresses, not the networks of the code."""

import ipaddress
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.errors import InputInvalid
from worker.https_url import HttpsUrl, is_public

REFUSED = [
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "169.254.170.2", "100.64.0.1", "100.100.100.200", "100.127.255.255", "198.18.0.1"),
    *("192.0.0.8", "192.0.0.192", "192.0.2.1", "198.51.100.1", "203.0.113.1", "192.88.99.1"),
    *("224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
    *(
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:8.8.8.8",
        "fe80::1",
        "fe80::1%1",
    ),
    *("fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::a00:1"),
    *("2001:db8::1", "2001::1", "2001:0:7f00:1::", "2001:10::1", "2001:20::1", "2002:7f00:1::", "2002:a00:1::1"),
    *("3fff::1", "5f00::1", "100::1", "4000::1", "::7f00:1"),
]
ALLOWED = ["1.1.1.1", "8.8.8.8", "93.184.215.14", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1"]
ALLOWED += ["192.169.0.1", "223.255.255.255", "2606:4700::1111", "2001:4860:4860::8888", "2a00:1450::1", "2400::1"]


@pytest.mark.parametrize("address", REFUSED)
def test_what_is_not_of_the_world_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ALLOWED)
def test_what_is_of_the_world_is_public(address: str) -> None:
    assert is_public(address)


@given(st.ip_addresses(v=4))
def test_no_ipv6_form_of_an_ipv4_address_is_public(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    for prefix, shift in (("::", 0), ("::ffff:0:0", 0), ("64:ff9b::", 0), ("2002::", 80), ("2001::", 0)):
        inside = ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) | number << shift)
        assert not is_public(str(inside))


@given(st.ip_addresses())
def test_a_public_address_is_none_of_the_kinds_that_python_knows(address: ipaddress.IPv4Address) -> None:
    kinds = ("is_private", "is_loopback", "is_link_local", "is_multicast", "is_reserved", "is_unspecified")
    if is_public(str(address)):
        assert [kind for kind in kinds if getattr(address, kind)] == []


# --- the form ---


@pytest.mark.parametrize(
    ("text", "host", "port", "target"),
    [
        ("https://pictures.example/a.png", "pictures.example", 443, "/a.png"),
        ("HTTPS://Pictures.Example", "pictures.example", 443, "/"),
        (
            "https://pictures.example:8443/a%20b.png?sig=x%2Fy%7E#part",
            "pictures.example",
            8443,
            "/a%20b.png?sig=x%2Fy%7E",
        ),
        ("https://pictures.example?x=1", "pictures.example", 443, "/?x=1"),
        ("https://my_bucket.s3.example/a@b:c", "my_bucket.s3.example", 443, "/a@b:c"),
        ("https://8.8.8.8/", "8.8.8.8", 443, "/"),
        ("https://[2606:4700::1111]:444/x", "2606:4700::1111", 444, "/x"),
        ("https://123.example/", "123.example", 443, "/"),
    ],
)
def test_the_parts_of_a_url(text: str, host: str, port: int, target: str) -> None:
    url = HttpsUrl.parse(text, "a.png")
    assert (url.host, url.port, url.target) == (host, port, target)
    assert HttpsUrl.parse(str(url), "a.png") == url


@pytest.mark.parametrize(
    "text",
    [
        *("http://pictures.example/", "https://", "https:///a", "https:pictures.example", "ftp://pictures.example/"),
        *("https://user@pictures.example/", "https://u:p@pictures.example/", "https://good.example\\@bad.example/"),
        *("https://2130706433/", "https://0x7f000001/", "https://0177.0.0.1/", "https://127.1/", "https://0x7f.0.0.1/"),
        *("https://1.2.3.4.5/", "https://example.1/", "https://999.1.1.1/", "https://1.2.3.0x4/"),
        *("https://pictures.example:0/", "https://pictures.example:65536/", "https://pictures.example:-1/"),
        *(
            "https://pictures.example:x/",
            "https://pictures.example:/",
            "https://pictures..example/",
            "https://.example/",
        ),
        *("https://pictures.example./", "https://-a.example/", "https://bücher.example/", "https://pictures.example/ü"),
        *(
            "https://pictures.example/a b",
            "https://pictures.example/a\r\nHost: x",
            "https://pictures.example/\n",
            " https://a/",
        ),
        *(
            "https://[::1",
            "https://[::1%25lo]/",
            "https://[:::]/",
            "https://[fe80::1%eth0]/",
            "https://%6c/",
            "https://a\t.b/",
        ),
        *(
            f"https://{'a' * 64}.example/",
            f"https://{'a.' * 130}example/",
            "https://①②⑦.0.0.1/",
            "https://127。0。0。1/",
        ),
    ],
)
def test_all_else_is_refused_with_the_file_and_without_the_url(text: str) -> None:
    with pytest.raises(InputInvalid, match=r"'a\.png'") as caught:
        HttpsUrl.parse(text, "a.png")
    assert "example" not in caught.value.message


@example("HTTPS://A#\x80")
@given(st.text() | st.from_regex(r"https://[^/]{0,30}/?", fullmatch=True))
def test_any_text_is_a_url_of_plain_parts_or_refused(text: str) -> None:
    try:
        url = HttpsUrl.parse(text, "a.png")
    except InputInvalid:
        return
    assert re.fullmatch(r"[a-z0-9._:-]+", url.host)
    assert re.fullmatch(r"/[!-~]*", url.target)
    assert 0 < url.port < 65536
    assert text.partition("#")[0].isascii()  # a fragment is never sent


@given(st.text() | st.from_regex(r"(https?:)?//[^/]{0,30}/?", fullmatch=True))
def test_any_redirect_leads_to_https_or_is_refused(location: str) -> None:
    start = HttpsUrl.parse("https://pictures.example/folder/a.png", "a.png")
    try:
        assert str(start.redirected(location, "a.png")).startswith("https://")
    except InputInvalid as error:
        assert "pictures.example" not in error.message


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("b.png", "https://pictures.example:8443/folder/b.png"),
        ("/b.png?x=1", "https://pictures.example:8443/b.png?x=1"),
        ("//other.example/b.png", "https://other.example/b.png"),
        ("https://other.example/b.png", "https://other.example/b.png"),
        ("", "https://pictures.example:8443/folder/a.png?sig=1"),
    ],
)
def test_a_redirect_is_taken_relative_to_where_it_stands(location: str, target: str) -> None:
    start = HttpsUrl.parse("https://pictures.example:8443/folder/a.png?sig=1", "a.png")
    assert str(start.redirected(location, "a.png")) == target


def test_a_url_is_printed_without_what_may_be_secret() -> None:
    assert "secret" not in repr(HttpsUrl.parse("https://pictures.example/a.png?sig=secret", "a.png"))
