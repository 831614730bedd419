#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests of imagec, in the order of its rooms; standard library only.

    python3 test_imagec.py                  all, side by side on the cores there are
    python3 test_imagec.py NamesTest ...    one room, as unittest runs it

Most talk to a registry double on loopback whose faults are data. Those that need a real
program (docker-registry, skopeo, umoci, podman, ...) are skipped where it is missing,
unless IMAGEC_TEST_NO_SKIP is set: then they fail.
"""

import atexit
import base64
import bz2
import collections
import contextlib
import copy
import functools
import gzip
import hashlib
import http.client
import http.server
import io
import itertools
import json
import lzma
import os
import random
import re
import shutil
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc
import unittest
import urllib.parse
import zlib
from email.message import Message
from unittest import mock

import imagec


# --------------------------------------------------------------------------------------
# Fixtures: images built in memory, and a registry double whose faults are data
# --------------------------------------------------------------------------------------

try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = None

# ------------------------------------------------------------------------------
# Certificates: every key here is public knowledge, and guards nothing.
# All are self-signed P-256 and their own CA; a client trusts TEST_CERT as cafile.
# ------------------------------------------------------------------------------

# localhost and 127.0.0.1, until 2126
TEST_CERT = """\
-----BEGIN CERTIFICATE-----
MIIBfzCCASWgAwIBAgIJAKRd+JGKWNTbMAoGCCqGSM49BAMCMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDAgFw0yMDAxMDEwMDAwMDBaGA8yMTI2MDEwMTAwMDAwMFowFDES
MBAGA1UEAwwJbG9jYWxob3N0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEP9IC
VfqLsw5+qPg5Y4/8mIzRmWMnn9sytv16WvL1nWhuVuYFRz58ppssPHIl2uoaaWOn
4GpszbpO0CrbmK5kCKNeMFwwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMC
AoQwHQYDVR0OBBYEFELrN7IAbqtb33WLQHMMbK+ajeKpMBoGA1UdEQQTMBGCCWxv
Y2FsaG9zdIcEfwAAATAKBggqhkjOPQQDAgNIADBFAiEA/Ig5vuCtrSRqLZo3NBDM
sN/XFInbo+ml/LMHJx9bGuUCIEvrAVbMJ/02PKUecuf2fXVR+8wmKCAsWL9zIL/J
uoIe
-----END CERTIFICATE-----
"""
TEST_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgfDLjV1FGjkXrmDnL
j7cB+rj0xUrmGIIwpBWzrEIa/RyhRANCAAQ/0gJV+ouzDn6o+Dljj/yYjNGZYyef
2zK2/Xpa8vWdaG5W5gVHPnymmyw8ciXa6hppY6fgamzNuk7QKtuYrmQI
-----END PRIVATE KEY-----
"""

# wrong.example, until 2126
WRONG_HOST_CERT = """\
-----BEGIN CERTIFICATE-----
MIIBhTCCASqgAwIBAgIIXi5uvrblcI0wCgYIKoZIzj0EAwIwGDEWMBQGA1UEAwwN
d3JvbmcuZXhhbXBsZTAgFw0yMDAxMDEwMDAwMDBaGA8yMTI2MDEwMTAwMDAwMFow
GDEWMBQGA1UEAwwNd3JvbmcuZXhhbXBsZTBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABJHhoh20i7uwt5g7ZkLIu90nap5sqs/zmnmoGBdAqGMVsPliMVXXJMoUQ6GP
n2uWytdnMnsb12hugFPIOnZ7tP6jXDBaMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0P
AQH/BAQDAgKEMB0GA1UdDgQWBBRRxs6PaQyJxOtHudJeqxD5BIekBTAYBgNVHREE
ETAPgg13cm9uZy5leGFtcGxlMAoGCCqGSM49BAMCA0kAMEYCIQD2A5VEYVLVY84F
GfoiIgwEx9Yqk/MIfBCg0g4NJMjymgIhAKG53z6KnaF9P3en5GMeH3AacEhX0Lug
fFCLgSFk30um
-----END CERTIFICATE-----
"""
WRONG_HOST_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQga7P3GJEW8Bk+b8NP
/klUYew6nupe+0wRk0sU1+h5DIKhRANCAASR4aIdtIu7sLeYO2ZCyLvdJ2qebKrP
85p5qBgXQKhjFbD5YjFV1yTKFEOhj59rlsrXZzJ7G9doboBTyDp2e7T+
-----END PRIVATE KEY-----
"""

# localhost and 127.0.0.1, ended in 2021
EXPIRED_CERT = """\
-----BEGIN CERTIFICATE-----
MIIBfTCCASOgAwIBAgIJAPJ9SFKookU8MAoGCCqGSM49BAMCMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDAeFw0yMDAxMDEwMDAwMDBaFw0yMTAxMDEwMDAwMDBaMBQxEjAQ
BgNVBAMMCWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABJfxtS8/
+VcwkJUfcYHArW+eiCNd2JRbHSquIfVecWEhRQ6hMrK113ktdNyZDV1RnU+zyUJs
dGDgQ0dEyEmEMMqjXjBcMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgKE
MB0GA1UdDgQWBBTmIsUm+6hFRnxBeoFcC9NHO2sR3jAaBgNVHREEEzARgglsb2Nh
bGhvc3SHBH8AAAEwCgYIKoZIzj0EAwIDSAAwRQIhAMqxMzCWECPconGAbieSDeI+
0mXsGIarQQazLYznV78OAiBKWCV1K1KTgClPs4XDW8+cVbVWt3Zk0JPIUxqf55GJ
qw==
-----END CERTIFICATE-----
"""
EXPIRED_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgyPcID0fkJ4M3cpKI
eFJTZMoo8LB0kgsqPucoSp62IXuhRANCAASX8bUvP/lXMJCVH3GBwK1vnogjXdiU
Wx0qriH1XnFhIUUOoTKytdd5LXTcmQ1dUZ1Ps8lCbHRg4ENHRMhJhDDK
-----END PRIVATE KEY-----
"""

# ------------------------------------------------------------------------------
# Image builder: tar_bytes, build_image, build_index
# ------------------------------------------------------------------------------

CREATED = "2020-01-01T00:00:00Z"

# The blob that stands in schema1 for a layer that changed nothing: an empty tar,
# gzipped by the first docker; its digest (a3ed95ca...) is known to every client.
EMPTY_LAYER = bytes.fromhex(
    "1f8b080000096e8800ff621805a360148c5800080000ffff2eafb5ef00040000"
)

# The public half of TEST_KEY; `kid` is its libtrust fingerprint, as clients check.
JWK = {
    "crv": "P-256",
    "kid": "6JRW:KSZO:5PDT:2UL4:XFVA:IJ32:EXSA:A6Y5:ESDW:SY4L:JGXE:7FU7",
    "kty": "EC",
    "x": "P9ICVfqLsw5-qPg5Y4_8mIzRmWMnn9sytv16WvL1nWg",
    "y": "blbmBUc-fKabLDxyJdrqGmljp-BqbM26TtAq25iuZAg",
}

_OCI = "application/vnd.oci.image."
_DOCKER = "application/vnd.docker."
MEDIA_TYPES = {
    "oci": {
        "manifest": _OCI + "manifest.v1+json",
        "index": _OCI + "index.v1+json",
        "config": _OCI + "config.v1+json",
        "layer": _OCI + "layer.v1.tar",
        "gzip": "+gzip",
        "zstd": "+zstd",
    },
    "docker": {
        "manifest": _DOCKER + "distribution.manifest.v2+json",
        "index": _DOCKER + "distribution.manifest.list.v2+json",
        "config": _DOCKER + "container.image.v1+json",
        "layer": _DOCKER + "image.rootfs.diff.tar",
        "gzip": ".gzip",
        "zstd": ".zstd",
    },
    "schema1": {"manifest": _DOCKER + "distribution.manifest.v1+json"},
    "schema1-signed": {"manifest": _DOCKER + "distribution.manifest.v1+prettyjws"},
}


class BuiltImage:
    """An image or index as a registry stores it; layers and diff_ids oldest first."""

    def __init__(self, manifest, media_type, digest=None, config=None):
        self.manifest = manifest
        self.media_type = media_type
        self.digest = digest or sha256(manifest)
        self.config = config
        self.blobs = {}
        self.layers = []
        self.diff_ids = []
        self.children = []  # the images of an index

    def descriptor(self, **extra):
        """What an index says of this image."""
        return _descriptor(self.media_type, self.manifest, digest=self.digest, **extra)


def sha256(data):
    """Return the digest `sha256:<hex>` of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def tar_bytes(members):
    """Build a tar from rows (name, content or None for a directory[, attributes])."""
    out = io.BytesIO()
    # Both the default format and the default encoding depend on the Python running.
    with tarfile.open(
        fileobj=out,
        mode="w",
        format=tarfile.PAX_FORMAT,
        encoding="utf-8",
        errors="surrogateescape",
    ) as tar:
        for name, content, *attributes in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            info.size = len(content or b"")
            for key, value in dict(*attributes).items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content or b""))
    return out.getvalue()


def gzip_bytes(data, level=6):
    """Compress to gzip; zlib's own header holds neither time nor Python version."""
    packer = zlib.compressobj(level, zlib.DEFLATED, 31)
    return packer.compress(data) + packer.flush()


def build_image(
    layers,
    kind="oci",
    platform=("linux", "amd64", None),
    compress=gzip_bytes,
    **config_extra
):
    """Build an image of kind oci, docker, schema1 or schema1-signed.

    `layers` are uncompressed tars, oldest first; None is a step without a layer.
    `compress` may be None; `config_extra` overrides members of the image config.
    """
    steps = [
        tar if tar is None or compress is None else compress(tar) for tar in layers
    ]
    diff_ids = [sha256(tar) for tar in layers if tar is not None]
    if kind.startswith("schema1"):
        image = _schema1(steps, kind, platform, config_extra)
    else:
        image = _schema2(steps, kind, platform, diff_ids, config_extra)
    packed = [blob for blob in steps if blob is not None]
    image.layers = [sha256(blob) for blob in packed]
    image.blobs.update(zip(image.layers, packed))
    image.diff_ids = diff_ids
    return image


def build_index(images_with_platforms, kind="oci", extra_entries=()):
    """Build an index over rows (image or index, platform triple or None)."""
    entries = []
    for image, platform in images_with_platforms:
        extra = {"platform": _platform(platform)} if platform else {}
        entries.append(image.descriptor(**extra))
    document = {
        "schemaVersion": 2,
        "mediaType": MEDIA_TYPES[kind]["index"],
        "manifests": entries + list(extra_entries),
    }
    index = BuiltImage(_json(document, 3), document["mediaType"])
    index.children = [image for image, _ in images_with_platforms]
    return index


def _json(document, indent=None):
    """Encode as Go does: compact, or indented by three as docker's manifests are."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(document, indent=indent, separators=separators).encode("ascii")


def _platform(platform):
    system, architecture, variant = platform
    members = {"architecture": architecture, "os": system, "variant": variant}
    return {key: value for key, value in members.items() if value is not None}


def _descriptor(media_type, data, digest=None, **extra):
    entry = {"mediaType": media_type, "size": len(data)}
    return dict(entry, digest=digest or sha256(data), **extra)


def _schema2(steps, kind, platform, diff_ids, extra):
    config = _image_config(steps, platform, diff_ids, extra)
    types = MEDIA_TYPES[kind]
    layers = [blob for blob in steps if blob is not None]
    document = {
        "schemaVersion": 2,
        "mediaType": types["manifest"],
        "config": _descriptor(types["config"], config),
        "layers": [_descriptor(_layer_type(types, blob), blob) for blob in layers],
    }
    image = BuiltImage(_json(document, 3), types["manifest"], config=config)
    image.blobs[sha256(config)] = config
    return image


def _layer_type(types, blob):
    """The media type that fits a layer's first bytes."""
    coding = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd"}.get(blob[:2])
    return types["layer"] + types.get(coding, "")


def _image_config(steps, platform, diff_ids, extra):
    history = []
    for number, blob in enumerate(steps):
        history.append({"created": CREATED, "created_by": _command(number, blob)})
        if blob is None:
            history[-1]["empty_layer"] = True
    document = dict(
        _platform(platform),
        created=CREATED,
        config={"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]},
        rootfs={"type": "layers", "diff_ids": diff_ids},
        history=history,
    )
    document.update(extra)
    return _json(document)


def _command(number, blob):
    return "/bin/sh -c #(nop) %s %d" % ("ENV" if blob is None else "ADD", number)


def _schema1(steps, kind, platform, extra):
    blobs = [EMPTY_LAYER if blob is None else blob for blob in steps]
    history = _v1_history(steps, platform, extra)
    document = {
        "schemaVersion": 1,
        "name": "library/fixture",
        "tag": "latest",
        "architecture": platform[1],
        "fsLayers": [{"blobSum": sha256(blob)} for blob in reversed(blobs)],
        "history": [
            {"v1Compatibility": _json(entry).decode("ascii") + "\n"}
            for entry in reversed(history)
        ],
    }
    payload = _json(document, 3)
    body = _sign(payload) if kind == "schema1-signed" else payload
    media_type = MEDIA_TYPES[kind]["manifest"]
    image = BuiltImage(body, media_type, digest=sha256(payload))
    image.blobs.update((sha256(blob), blob) for blob in blobs)
    return image


def _v1_history(steps, platform, extra):
    """The v1 images of a schema1 manifest, oldest first, each naming its parent."""
    history, parent = [], None
    for number, blob in enumerate(steps):
        seed = "%s %d %s" % (parent, number, sha256(blob or EMPTY_LAYER))
        entry = {"id": hashlib.sha256(seed.encode("ascii")).hexdigest()}
        if parent:
            entry["parent"] = parent
        entry["created"] = CREATED
        entry["container_config"] = {"Cmd": [_command(number, blob)]}
        if blob is None:
            entry["throwaway"] = True
        history.append(entry)
        parent = entry["id"]
    if history:
        history[-1].update(_platform(platform), docker_version="1.12.6")
        history[-1]["config"] = {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"]}
        history[-1].update(extra)
    return history


def _sign(payload):
    """Append libtrust's `signatures` before the closing brace of a JSON document.

    The signature is arbitrary bytes: registries have long stopped checking it.
    """
    tail = b"\n}"
    length = len(payload) - len(tail)
    protected = {
        "formatLength": length,
        "formatTail": _base64url(tail),
        "time": CREATED,
    }
    signature = {
        "header": {"jwk": JWK, "alg": "ES256"},
        "signature": _base64url(hashlib.sha512(payload).digest()),
        "protected": _base64url(_json(protected)),
    }
    # The new member's text, without the brace that opens its document.
    return payload[:length] + b"," + _json({"signatures": [signature]}, 3)[1:]


def _base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


# ------------------------------------------------------------------------------
# Wire: Request, Reply and Server, which know HTTP and nothing of registries
# ------------------------------------------------------------------------------

BLOCK = 1 << 16  # bytes handed to the kernel at a time


class Request(collections.namedtuple("Request", "method path headers body")):
    """A request as it came: `path` is the target as sent, query and all."""

    __slots__ = ()

    @property
    def route(self):
        """The decoded path alone, also of the absolute form sent to proxies."""
        path = re.sub(r"^https?://[^/?]*", "", self.path).partition("?")[0]
        return urllib.parse.unquote(path)

    @property
    def query(self):
        """The query as {name: [values]}."""
        return urllib.parse.parse_qs(self.path.partition("?")[2])


class Reply:
    """What answers one request: bytes, their pace, and how the connection ends."""

    def __init__(self, code, body=b"", headers=()):
        self.code = code
        self.headers = Message()
        self.whole = body  # what the fault no_range falls back on
        self.more = ()  # blocks that follow the body
        self.raw = None  # bytes sent in place of status line and headers
        self.chunk = None  # size of the chunks; None = no transfer coding
        self.pause = 0  # seconds before the first byte
        self.pace = None  # (phase it starts at, seconds, bytes at a time)
        self.cut = None  # (phase, bytes or fraction of it) where sending stops
        self.ending = "keep"  # or close, fin (close without TLS farewell), reset
        self.is_blob = False  # counted in sent_blob_bytes
        self.is_challenge = False  # faults wait for the reply behind it
        self.fill(body)
        for name, value in dict(headers).items():
            self.put(name, value)

    def put(self, name, value):
        """Set a header, given as content_type or Content-Type.

        None removes it, a list makes several.
        """
        name = name.replace("_", "-").title()
        del self.headers[name]
        values = value if isinstance(value, (list, tuple)) else [value]
        for one in values:
            if one is not None:
                self.headers[name] = one

    def fill(self, body):
        """Set the body, with the Content-Length that fits."""
        self.body = body
        self.put("Content-Length", str(len(body)))

    def head(self):
        """The status line and headers, as sent."""
        if self.raw is not None:
            return self.raw
        reason = http.client.responses.get(self.code, "Unknown")
        lines = ["HTTP/1.1 %d %s" % (self.code, reason)]
        lines += ["%s: %s" % pair for pair in self.headers.items()]
        return "\r\n".join(lines + ["", ""]).encode("latin-1")

    def pieces(self, bare):
        """Yield (seconds to wait, bytes to send); `bare` leaves out the body."""
        blocks = self._blocks(bare)
        if self.cut:
            blocks = _cut(blocks, self._cut_offset())
        if self.pace:
            phase, seconds, size = self.pace
            return _drip(blocks, self._span(phase)[0], seconds, size)
        return ((0, block) for block in blocks)

    def _blocks(self, bare):
        body = itertools.chain(_split(self.body, BLOCK), self.more)
        if self.chunk:
            body = _chunked(body, self.chunk)
        if bare:
            body = iter(())
        # Head and body in one packet: apart they cost a delayed ACK.
        yield self.head() + next(body, b"")
        for block in body:
            yield block

    def _span(self, phase):
        """The offset and length of a phase within the reply."""
        head = self.head()
        status_line = head.find(b"\n") + 1
        return {
            "status": (0, status_line),
            "headers": (status_line, len(head) - status_line),
            "body": (len(head), len(self.body)),
        }[phase]

    def _cut_offset(self):
        phase, amount = self.cut
        start, length = self._span(phase)
        if isinstance(amount, float):
            return start + int(length * amount)
        return start + (amount if amount >= 0 else length + amount)


def _split(data, size):
    return (data[at : at + size] for at in range(0, len(data), size))


def _chunked(blocks, size):
    for block in blocks:
        for piece in _split(block, size):
            yield b"%x\r\n%s\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def _cut(blocks, limit):
    """Let `limit` bytes through."""
    for block in blocks:
        yield block[:limit]
        limit -= len(block)
        if limit <= 0:
            return


def _drip(blocks, start, seconds, size):
    """Send up to `start` at once, then `size` bytes at a time."""
    for block in blocks:
        yield 0, block[:start]
        for piece in _split(block[start:], size):
            yield seconds, piece
        start = max(0, start - len(block))


class Fault:
    """An action, the requests it strikes, and how often it has."""

    def __init__(self, match, action, times, challenged):
        self.match = match
        self.actions = action if isinstance(action, list) else [action]
        self.times = times  # None = for ever
        self.challenged = challenged
        self.used = 0
        self._early = any(getattr(one, "early", False) for one in self.actions)

    def fits(self, subject, reply):
        """Is this fault due for "METHOD path", or for a bare connection (None)?"""
        if self.times is not None and self.used >= self.times:
            return False
        if self._early or subject is None:
            return self._early and subject is None
        if reply.is_challenge and not self.challenged:
            return False
        return re.search(self.match, subject) is not None


class Server:
    """HTTP/1.1 on a raw socket, since http.server can neither lie nor reset.

    Subclasses answer requests; faults then spoil the answers.
    """

    def __init__(self, tls=False):
        self.requests = []
        self.connections = 0
        self.sent_blob_bytes = 0
        self.faults = []
        self._tls = _tls_context(tls) if tls else None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._live = {}  # socket: thread
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(128)
        self.host = "127.0.0.1:%d" % self._listener.getsockname()[1]
        self.url = ("https://" if tls else "http://") + self.host
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def answer(self, request):
        """Return the true Reply to a Request."""
        raise NotImplementedError

    def fault(self, match, action, times=1, challenged=False):
        """Spoil the next `times` replies to a "METHOD path" that `match` finds.

        The first fault still due is the one that strikes; a list of actions strikes
        as one. A 401 that asks for a token is passed over unless `challenged`.
        """
        self.faults.append(Fault(match, action, times, challenged))
        return self.faults[-1]

    def close(self):
        """Stop at once, whatever the connections are doing."""
        if self._closing.is_set():
            return
        self._closing.set()
        # Closing a listening socket does not wake its accept() everywhere.
        socket.create_connection(self._listener.getsockname(), timeout=1).close()
        self._acceptor.join()
        self._listener.close()
        live = list(self._live.items())
        for sock, _ in live:
            with contextlib.suppress(OSError):
                # SSLSocket.shutdown would pull the TLS state from under its reader.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for _, thread in live:
            thread.join(1)

    def _accept(self):
        while not self._closing.is_set():
            with contextlib.suppress(OSError):
                sock = self._listener.accept()[0]
                if self._closing.is_set():
                    sock.close()
                else:
                    self._admit(sock)

    def _admit(self, sock):
        self.connections += 1
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Small, or sent_blob_bytes would count what only the kernel has taken.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BLOCK)
        early = self._strike(None, Reply(200))
        if self._tls and early is None:
            # Wrapped here and shaken later, so that close() sees one socket only.
            sock = self._tls.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False
            )
        thread = threading.Thread(target=self._serve, args=(sock, early), daemon=True)
        self._live[sock] = thread
        thread.start()

    def _serve(self, sock, early):
        # Clients under test hang up at any moment; that is no news here.
        with contextlib.suppress(OSError, http.client.HTTPException):
            with sock, sock.makefile("rb") as stream:
                if early is not None:
                    if early.raw:
                        # Unread bytes would turn the closing FIN into a reset.
                        sock.recv(BLOCK)
                    self._send(sock, early, bare=True)
                else:
                    if self._tls:
                        sock.do_handshake()
                    while self._exchange(sock, stream):
                        pass
        self._live.pop(sock, None)

    def _exchange(self, sock, stream):
        """Answer one request; tell whether the connection can carry another."""
        request = _read_request(stream)
        if request is None:
            return False
        self.requests.append(request)
        reply = self.answer(request)
        reply = self._strike("%s %s" % request[:2], reply) or reply
        wants_close = request.headers.get("Connection", "").lower() == "close"
        if wants_close and reply.ending == "keep":
            reply.put("Connection", "close")
            reply.ending = "close"
        self._send(sock, reply, bare=request.method == "HEAD")
        return reply.ending == "keep"

    def _strike(self, subject, reply):
        """Return the reply as spoiled by the first fault due, None without one."""
        with self._lock:
            due = next((f for f in self.faults if f.fits(subject, reply)), None)
            if due is None:
                return None
            due.used += 1
        for action in due.actions:
            reply = action(reply)
        return reply

    def _send(self, sock, reply, bare):
        self._closing.wait(reply.pause)
        head_left = len(reply.head())
        for pause, piece in reply.pieces(bare):
            if pause:
                self._closing.wait(pause)
            if reply.is_blob:
                # Counted first: whoever has the bytes must find them counted.
                with self._lock:
                    self.sent_blob_bytes += max(0, len(piece) - head_left)
            head_left = max(0, head_left - len(piece))
            if piece:
                sock.sendall(piece)
        self._end(sock, reply.ending)

    def _end(self, sock, ending):
        if ending == "reset":
            # A reset discards what the client's side has not acknowledged.
            for _ in range(250):
                self._closing.wait(0.002)
                if not _is_undelivered(sock):
                    break
            linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        elif ending == "close" and self._tls:
            # Without a timeout this would wait for the client's farewell as well.
            sock.settimeout(0)
            with contextlib.suppress(OSError):
                sock.unwrap()


def _read_request(stream):
    """Return the next request, None at the end of the connection."""
    # A TLS hello may look like a line of three words, and then wait for its answer.
    if not re.match(b"[A-Z]", stream.peek(1)):
        return None
    words = stream.readline(BLOCK).decode("latin-1").split()
    if len(words) != 3:
        return None
    headers = http.client.parse_headers(stream)
    body = stream.read(int(headers.get("Content-Length", 0)))
    return Request(words[0], words[1], headers, body)


def _is_undelivered(sock):
    """Are sent bytes still on their way, as far as the system can tell?"""
    try:
        # Linux can tell what is unsent from what only waits for a delayed ACK.
        question = 0x894B if sys.platform == "linux" else termios.TIOCOUTQ
        return fcntl is not None and any(fcntl.ioctl(sock, question, bytes(4)))
    except OSError:
        return False


@functools.lru_cache(maxsize=None)
def _tls_context(kind):
    """The server side of TLS for kind True, "expired" or "wrong-host"."""
    pem = {
        True: TEST_CERT + TEST_KEY,
        "expired": EXPIRED_CERT + EXPIRED_KEY,
        "wrong-host": WRONG_HOST_CERT + WRONG_HOST_KEY,
    }[kind]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        # The ssl module takes a key from a file only.
        path = os.path.join(folder, "pair.pem")
        with open(path, "w") as file:
            file.write(pem)
        context.load_cert_chain(path)
    return context


# ------------------------------------------------------------------------------
# Faults: each takes the true Reply and returns the one to send
# An amount is a number of bytes (negative: from the end) or a fraction of the whole.
# ------------------------------------------------------------------------------


def status(code, headers=(), body=b""):
    """Answer `code` instead."""
    return lambda reply: Reply(code, body, headers)


def body(data, **headers):
    """Answer 200 with `data`; of the true headers only Content-Type remains."""

    def change(reply):
        spoiled = Reply(200, data, {"Content-Type": reply.headers["Content-Type"]})
        return _with_headers(spoiled, headers)

    return change


def headers(**changed):
    """Replace headers of the true reply, or remove those given as None."""
    return lambda reply: _with_headers(reply, changed)


def redirect(location, code=307):
    """Point elsewhere; None leaves the Location out."""
    return lambda reply: Reply(code, headers={"Location": location})


def flip(offset=-1):
    """Flip one bit of the body about to be sent."""

    def change(reply):
        spoiled = bytearray(reply.body)
        spoiled[offset] ^= 1
        reply.body = bytes(spoiled)
        return reply

    return change


def truncate(amount=0.5):
    """Close cleanly in mid-body; truncate(1.0) closes an idle connection unannounced.

    Over TLS there is no close_notify, as when an attacker cuts the connection.
    """
    return lambda reply: _set(reply, cut=("body", amount), ending="fin")


def reset(amount=0.5, phase="body"):
    """Send RST in mid-phase: accept, status, headers or body.

    At accept it strikes the next connection, before TLS and whatever the match.
    """
    cut = ("status", 0) if phase == "accept" else (phase, amount)
    return _at(phase, lambda reply: _set(reply, cut=cut, ending="reset"))


def extra(count, lie=False):
    """Add zero bytes to the true body; with `lie` past its Content-Length.

    The connection stays open after a lie, its next reply out of step.
    """

    def change(reply):
        if lie:
            reply.more = [bytes(count)]
        else:
            reply.fill(reply.body + bytes(count))
        return reply

    return change


def endless(chunk=bytes(BLOCK), interval=0, limit=1 << 30, framing="chunked"):
    """Let the true body be followed by `chunk` again and again, up to `limit` bytes.

    `framing` is chunked, length (all of it declared) or close. With an interval all
    of the body comes at the pace of one chunk.
    """

    def change(reply):
        count = limit // len(chunk)
        reply.more = itertools.repeat(chunk, count)
        if interval:
            reply.pace = ("body", interval, len(chunk))
        if framing == "chunked":
            return chunked(BLOCK)(reply)
        if framing == "close":
            return close_delimited()(reply)
        reply.put("Content-Length", str(len(reply.body) + count * len(chunk)))
        return reply

    return change


def chunked(size=4096):
    """Send the true body with chunked transfer coding."""

    def change(reply):
        reply.chunk = size
        return headers(content_length=None, transfer_encoding="chunked")(reply)

    return change


def close_delimited():
    """Send the true body without a length; only the end of the connection ends it."""

    def change(reply):
        reply.ending = "close"
        return headers(content_length=None, connection="close")(reply)

    return change


def no_range():
    """Answer 200 with the whole blob to a request for a part."""

    def change(reply):
        reply.code = 200
        reply.fill(reply.whole)
        return headers(content_range=None, accept_ranges=None)(reply)

    return change


def partial(content_range, start):
    """Answer 206 with this Content-Range and the blob from `start` on."""

    def change(reply):
        reply.code = 206
        reply.fill(reply.whole[start:])
        return headers(content_range=content_range)(reply)

    return change


def delay(seconds):
    """Wait, then send the true reply."""
    return lambda reply: _set(reply, pause=seconds)


def drip(interval, chunk=1, phase="body"):
    """Send `chunk` bytes each interval, from status, headers or body on."""
    return lambda reply: _set(reply, pace=(phase, interval, chunk))


def garbage(data, phase="request"):
    """Send raw bytes in place of an HTTP reply, then close.

    With phase "accept" they answer the first bytes of a connection, also of TLS.
    """
    return _at(phase, lambda reply: _set(Reply(200), raw=data, ending="fin"))


def hang(seconds=60, phase="request"):
    """Close without an answer after some time; phase "accept" stalls TLS too."""
    return _at(
        phase, lambda reply: _set(Reply(200), raw=b"", ending="fin", pause=seconds)
    )


def _at(phase, change):
    change.early = phase == "accept"
    return change


def _set(reply, **attributes):
    for name, value in attributes.items():
        setattr(reply, name, value)
    return reply


def _with_headers(reply, changed):
    for name, value in changed.items():
        reply.put(name, value)
    return reply


# ------------------------------------------------------------------------------
# Registry: FakeRegistry, also a token server and a CDN, and RegistryCase
# ------------------------------------------------------------------------------

# One word in every secret, so that a leak is found by searching for it.
PASSWORD = "S3CR3T"
SIGNATURE = "S3CR3T-SIG"
IDENTITY_TOKEN = "S3CR3T-IDENTITY"


class FakeRegistry(Server):
    """A registry of the distribution API; all attributes may be changed live."""

    service = "fixture"
    token_field = "token"  # or access_token, both
    expires_in = 300  # seconds, None = not said; only token_uses ends a token
    token_uses = None  # requests a token is good for, None = any number
    challenge = None  # WWW-Authenticate: a str, or a list for several headers
    version_header = True
    redirect_blobs_to = None  # base URL of the FakeRegistry that serves /cdn/
    page_size = None  # most tags in one reply

    # {token: scopes}, of all registries: one may trust the tokens of another.
    tokens = {}

    def __init__(
        self, auth=None, tls=False, users=None, realm=None, anonymous=True, blobs=None
    ):
        self.auth = auth  # or basic, bearer
        self.users = {"alice": PASSWORD} if users is None else users
        self.realm = realm  # token URL; None = its own
        self.anonymous = anonymous  # gives tokens without credentials
        self.blobs = {} if blobs is None else blobs  # {digest: bytes}
        self.repositories = {}  # {name: {tag or digest: (bytes, media type, digest)}}
        self._uses = collections.Counter()
        super().__init__(tls)

    def add(self, repository, tag, image):
        """Store an image or index with all that it refers to; return its digest."""
        for child in image.children:
            self.add(repository, None, child)
        for blob in image.blobs.values():
            self.add_blob(repository, blob)
        return self.add_manifest(
            repository, tag, image.manifest, image.media_type, image.digest
        )

    def add_blob(self, repository, data):
        """Store a blob; return its digest."""
        self.repositories.setdefault(repository, {})
        self.blobs[sha256(data)] = data
        return sha256(data)

    def add_manifest(self, repository, tag, data, media_type, digest=None):
        """Store a manifest by digest, and by tag unless that is None."""
        digest = digest or sha256(data)
        entries = self.repositories.setdefault(repository, {})
        for reference in {tag, digest} - {None}:
            entries[reference] = (data, media_type, digest)
        return digest

    def answer(self, request):
        """Refuse or route a request; what no route knows is 404."""
        reply = self._refusal(request) or self._routed(request)
        if self.version_header and request.route.startswith("/v2/"):
            reply.put("Docker-Distribution-Api-Version", "registry/2.0")
        return reply

    def _routed(self, request):
        for pattern, method in self._routes:
            found = re.fullmatch(pattern, "%s %s" % (request.method, request.route))
            if found:
                return method(self, request, *found.groups())
        return _error(404, "UNSUPPORTED", "no such endpoint")

    def _ping(self, request):
        return Reply(200, b"{}", {"Content-Type": "application/json"})

    def _manifest(self, request, repository, reference):
        entry = self.repositories.get(repository, {}).get(reference)
        if entry is None:
            return _error(404, "MANIFEST_UNKNOWN", "manifest unknown")
        data, media_type, digest = entry
        return Reply(
            200, data, {"Content-Type": media_type, "Docker-Content-Digest": digest}
        )

    def _blob(self, request, repository, digest):
        if repository not in self.repositories or digest not in self.blobs:
            return _error(404, "BLOB_UNKNOWN", "blob unknown to registry")
        if self.redirect_blobs_to:
            place = (self.redirect_blobs_to, digest, SIGNATURE)
            return Reply(307, headers={"Location": "%s/cdn/%s?sig=%s" % place})
        reply = self._content(request, digest)
        reply.put("Docker-Content-Digest", digest)
        return reply

    def _cdn(self, request, digest):
        # Object stores refuse two kinds of credentials in one request.
        if "Authorization" in request.headers:
            return _error(400, "INVALID", "only one auth mechanism allowed")
        if request.query.get("sig") != [SIGNATURE]:
            return _error(403, "DENIED", "signature does not match")
        if digest not in self.blobs:
            return _error(404, "BLOB_UNKNOWN", "no such key")
        return self._content(request, digest)

    def _content(self, request, digest):
        """Reply with a blob or the range of it that is asked for."""
        data = self.blobs[digest]
        size = len(data)
        kind = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        reply = Reply(200, data, kind)
        reply.is_blob = True
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if wanted:
            start = int(wanted.group(1))
            end = min(int(wanted.group(2) or size), size - 1)
            if start > end:
                return Reply(416, headers={"Content-Range": "bytes */%d" % size})
            reply.code = 206
            reply.fill(data[start : end + 1])
            reply.put("Content-Range", "bytes %d-%d/%d" % (start, end, size))
        return reply

    def _tags(self, request, repository):
        if repository not in self.repositories:
            return _error(404, "NAME_UNKNOWN", "repository name not known to registry")
        last = request.query.get("last", [""])[0]
        # A digest has a colon, a tag cannot.
        names = (name for name in self.repositories[repository] if ":" not in name)
        tags = sorted(name for name in names if name > last)
        asked = [int(count) for count in request.query.get("n", [])]
        size = min(asked + [self.page_size or len(tags), len(tags)])
        reply = _json_reply({"name": repository, "tags": tags[:size]})
        if 0 < size < len(tags):
            more = urllib.parse.urlencode([("last", tags[size - 1]), ("n", size)])
            link = '</v2/%s/tags/list?%s>; rel="next"' % (repository, more)
            reply.put("Link", link)
        return reply

    def _token(self, request):
        if self.auth != "bearer" or self.realm:
            return _error(404, "UNSUPPORTED", "not a token server")
        form = request.query
        if request.method == "POST":
            form = urllib.parse.parse_qs(request.body.decode("ascii"))
        if not self._trusts(request, form):
            return _error(401, "UNAUTHORIZED", "incorrect username or password")
        token = "S3CR3T-TOKEN-" + os.urandom(16).hex()
        self.tokens[token] = " ".join(form.get("scope", [])).split()
        both = ("token", "access_token")
        fields = both if self.token_field == "both" else (self.token_field,)
        document = {field: token for field in fields}
        if self.expires_in is not None:
            document["expires_in"] = self.expires_in
        return _json_reply(document)

    def _trusts(self, request, form):
        """May whoever asks for a token have one?"""
        first = {name: values[0] for name, values in form.items()}
        if request.method == "POST" and first.get("grant_type") == "refresh_token":
            return first.get("refresh_token") == IDENTITY_TOKEN
        if request.method == "POST":
            user = (first.get("username"), first.get("password"))
            return first.get("grant_type") == "password" and user in self.users.items()
        if "Authorization" in request.headers:
            return self._knows(*_credentials(request))
        return self.anonymous

    def _refusal(self, request):
        """The 401 due to a request, None if it is welcome."""
        if not self.auth or not request.route.startswith("/v2/"):
            return None
        found = re.match("/v2/(.+)/(?:manifests|blobs|tags)/", request.route)
        repository = found.group(1) if found else None
        scheme, secret = _credentials(request)
        if self.auth == "basic" and self._knows(scheme, secret):
            return None
        if self.auth == "bearer" and self._grants(scheme, secret, repository):
            return None
        reply = _error(401, "UNAUTHORIZED", "authentication required")
        reply.put("WWW-Authenticate", self.challenge or self._challenge(repository))
        # At /v2/ the challenge is all the answer there is to spoil.
        reply.is_challenge = repository is not None
        return reply

    def _challenge(self, repository):
        if self.auth == "basic":
            return 'Basic realm="%s"' % self.service
        realm = self.realm or self.url + "/token"
        text = 'Bearer realm="%s",service="%s"' % (realm, self.service)
        return text + (',scope="repository:%s:pull"' % repository if repository else "")

    def _knows(self, scheme, secret):
        pairs = (("%s:%s" % pair).encode("utf-8") for pair in self.users.items())
        known = [base64.b64encode(pair).decode("ascii") for pair in pairs]
        return scheme == "basic" and secret in known

    def _grants(self, scheme, token, repository):
        """Does the token let its bearer pull from the repository (None = ping)?"""
        if scheme != "bearer" or token not in self.tokens:
            return False
        with self._lock:
            self._uses[token] += 1
            if self.token_uses is not None and self._uses[token] > self.token_uses:
                return False
        resources = [scope.rpartition(":") for scope in self.tokens[token]]
        return repository is None or any(
            resource == "repository:" + repository and "pull" in actions.split(",")
            for resource, _, actions in resources
        )

    _routes = (
        ("(?:GET|HEAD) /v2/", _ping),
        ("(?:GET|HEAD) /v2/(.+)/manifests/([^/]+)", _manifest),
        ("(?:GET|HEAD) /v2/(.+)/blobs/([^/]+)", _blob),
        ("(?:GET|HEAD) /v2/(.+)/tags/list", _tags),
        ("(?:GET|HEAD) /cdn/([^/]+)", _cdn),
        ("(?:GET|POST) /token", _token),
    )


def _credentials(request):
    """The scheme, in lower case, and the secret of an Authorization header."""
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower(), secret


def _json_reply(document, code=200):
    return Reply(code, _json(document), {"Content-Type": "application/json"})


def _error(code, name, message):
    return _json_reply({"errors": [{"code": name, "message": message}]}, code)


class RegistryCase(unittest.TestCase):
    """A test with registries of its own, none of whose faults may stay unused."""

    def registry(self, **options):
        """Start a FakeRegistry that ends with the test."""
        registry = FakeRegistry(**options)
        self.addCleanup(self._end_registry, registry)
        return registry

    def _end_registry(self, registry):
        registry.close()
        unused = [f.match for f in registry.faults if f.times and not f.used]
        self.assertEqual(unused, [], "faults that were never used")


# --------------------------------------------------------------------------------------
# Fixtures: programs that are not ours
# --------------------------------------------------------------------------------------

REAL_USER = "alice"
REAL_PASSWORD = "S3CR3T-alice"
REAL_IDENTITY_TOKEN = "IDENTITY-alice"
HTPASSWD = "alice:$2y$05$iDvtX8u8w5YZoCLdJ05Lju5JHv5DI7R3BLLUsGlllgBJcffhe47cy\n"

REAL_CERT = """\
-----BEGIN CERTIFICATE-----
MIIBkzCCATmgAwIBAgIITFSbKtuhBqIwCgYIKoZIzj0EAwIwFDESMBAGA1UEAwwJ
bG9jYWxob3N0MCAXDTIwMDEwMTAwMDAwMFoYDzIxOTkxMjMxMjM1OTU5WjAUMRIw
EAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAREdbcD
tnvXiWAt13Gs2RsqwPxfA7F9rkKmVXP1A5CT2UYwmR2lP1qFq3JbH0Jeq4U/kDSI
gugffW/wGl0cixyko3MwcTAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIC
hDATBgNVHSUEDDAKBggrBgEFBQcDATAdBgNVHQ4EFgQUew567fG6n7MFEUWrxFtv
kU54HwUwGgYDVR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMAoGCCqGSM49BAMCA0gA
MEUCIGX4brYwysohCRSZHyI0ELeEAcvzw9fuCJCe7sRSLLvzAiEA+WoLvth8ctKF
P6pBqbi59KrLy7mB3SE08eBwthWmmJs=
-----END CERTIFICATE-----
"""
REAL_KEY = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIJYXMR6QzZzia+9JVFZVTCROYfw76rGM9WkGdMoYX1fDoAoGCCqGSM49
AwEHoUQDQgAERHW3A7Z714lgLddxrNkbKsD8XwOxfa5CplVz9QOQk9lGMJkdpT9a
hatyWx9CXquFP5A0iILoH31v8BpdHIscpA==
-----END EC PRIVATE KEY-----
"""
TOKEN_CERT = """\
-----BEGIN CERTIFICATE-----
MIIC9DCCAdygAwIBAgIITFSbKtuhBqMwDQYJKoZIhvcNAQELBQAwFzEVMBMGA1UE
AwwMdG9rZW4tc2lnbmVyMCAXDTIwMDEwMTAwMDAwMFoYDzIxOTkxMjMxMjM1OTU5
WjAXMRUwEwYDVQQDDAx0b2tlbi1zaWduZXIwggEiMA0GCSqGSIb3DQEBAQUAA4IB
DwAwggEKAoIBAQCYsdazKFWAGM4Nu8Ys8HvRJLWC2P036R9XeuwNjVzg/pxuTWs0
JfLUOF0heDKYwLKl7FhNyn8nWr6uNVkZ3b+m8DYM41VXs9gRjI20KkGUsPtU3LWC
CGO9lTQc76uW/0NKUHt8j7NG38adsuv1xD9RF9TCZWZDQJ05EOetksgXw7W81CHr
je1IuOTDOhpXhaO0FofQCIqLXNgoJKwB2ij0M6B0amJBUP3cf2wOiDXr3SzZH0rD
c5SHSAzt69NlWRYJW437oUSwblhry+Wh3NVdyNPQFVtoq+QRvBw/n/gf1YqVQRsg
3mTGcLKevXtu+D16PktilWB1Lupj5wQx+7Z7AgMBAAGjQjBAMA8GA1UdEwEB/wQF
MAMBAf8wDgYDVR0PAQH/BAQDAgKEMB0GA1UdDgQWBBSMtoXUscG4waLOf3tSBe7l
wa4mwjANBgkqhkiG9w0BAQsFAAOCAQEAXTgWa3ZpM9uYbxNyok8PjMUAFFjj0KRV
DQrR6BcZf2qrwBgG2xY2I6uRNNtCZw4zlkzeRgdS1pBJy+nyJ1TWky+KkX/HT9Zz
CCLxfemuq3JViLF6UPsr/ACRtBRHTDMhUYPYnu5XyuUoze5cdx6Tzq2Xlrv9d9nm
2BHbjw1WgiJQDVLmyMcHhkoiMUyQCI8Nu6cOGueBzo0gOlI9oPaamgHsLbhANZL/
GN9qJ+7AYuGoQk8NtkW9Z2dK0cUETyaRFIhZESoZhBG+78cLg7LUigNHdWZv1M2b
nyrWDEUD32ufhhK6mUbgY//EjCVp3x3PEZNpVrBaZX6v9qO5MCBHfw==
-----END CERTIFICATE-----
"""
TOKEN_N = int(
    "98b1d6b328558018ce0dbbc62cf07bd124b582d8fd37e91f577aec0d8d5ce0fe9c6e4d6b3425f2d4"
    "385d21783298c0b2a5ec584dca7f275abeae355919ddbfa6f0360ce35557b3d8118c8db42a4194b0"
    "fb54dcb5820863bd95341cefab96ff434a507b7c8fb346dfc69db2ebf5c43f5117d4c2656643409d"
    "3910e7ad92c817c3b5bcd421eb8ded48b8e4c33a1a5785a3b41687d0088a8b5cd82824ac01da28f4"
    "33a0746a624150fddc7f6c0e8835ebdd2cd91f4ac3739487480cedebd3655916095b8dfba144b06e"
    "586bcbe5a1dcd55dc8d3d0155b68abe411bc1c3f9ff81fd58a95411b20de64c670b29ebd7b6ef83d"
    "7a3e4b629560752eea63e70431fbb67b", 16)
TOKEN_D = int(
    "2008a7273cddfb1ab917ce7dfbed93bc43bc44b02b2770a3dfa16d2646b2e68ce3da8c29626e57ac"
    "480ad9bbb2b9b32b877db6e4d307ac04f09df19938c0f9b5170defd43d9241aba1badffb9d25d700"
    "ee29568849b862dc6211e5c42e366665029131e6e6ead0829fd373b6e6ff7ddd1067d5449a989f54"
    "9ca53c4580d6b38d4b7c58fb32c62bba36ee083582ed3db0821eb674b0b00eef85bf595287e679b5"
    "78c864e911d61055ac95a4633631582e3481bf01e9884c78c0471246045e583c5844a79a33be576e"
    "a8148ce91a7b096af731ff371eb0fa6790f5dc5852e381a72587220ebd9546f6d4bc53e05f73a61d"
    "c95c21f58327bb7a5440238d90198589", 16)


def needs(*programs):
    """Skip the decorated test or class unless every program is on the PATH.

    With IMAGEC_TEST_NO_SKIP set nothing is skipped: what lacks its program fails.
    """
    missing = [name for name in programs if shutil.which(name) is None]
    if os.environ.get("IMAGEC_TEST_NO_SKIP"):
        return lambda decorated: decorated
    return unittest.skipUnless(
        not missing, "needs %s: not on this machine" % ", ".join(missing))


def _real_base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _rs256(message):
    """RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017, 8.2), so that no openssl is needed."""
    info = bytes.fromhex("3031300d060960864801650304020105000420")
    info += hashlib.sha256(message).digest()
    size = (TOKEN_N.bit_length() + 7) // 8
    padded = b"\0\1" + b"\xff" * (size - len(info) - 3) + b"\0" + info
    number = pow(int.from_bytes(padded, "big"), TOKEN_D, TOKEN_N)
    return number.to_bytes(size, "big")


def make_jwt(claims):
    """Return `claims` as a JWT that a registry trusting TOKEN_CERT accepts."""
    # x5c and not kid: registry 2.x and 3.x compute a key's id differently.
    header = {"typ": "JWT", "alg": "RS256",
              "x5c": ["".join(TOKEN_CERT.split("\n")[1:-2])]}
    parts = [_real_base64url(json.dumps(part).encode("utf-8")) for part in (header, claims)]
    parts.append(_real_base64url(_rs256(".".join(parts).encode("ascii"))))
    return ".".join(parts)


class _ThreadingServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64


class _TokenHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body go out in two writes; Nagle would hold back the second one.
    disable_nagle_algorithm = True
    timeout = 30

    def log_message(self, *args):
        pass

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        owner = self.server.owner
        owner.requests.append((self.command, self.path, dict(self.headers), body))
        address = urllib.parse.urlsplit(self.path)
        if address.path != "/token":
            return self._reply(404, {"errors": [{"code": "NOT_FOUND"}]})
        query = address.query if self.command == "GET" else body.decode("utf-8")
        fields = urllib.parse.parse_qs(query)
        try:
            user = self._user(fields)
        except ValueError:
            return self._reply(401, {"errors": [{"code": "UNAUTHORIZED"}]})
        self._reply(200, owner.answer(user, fields))

    do_POST = do_GET

    def _user(self, fields):
        """The authenticated user's name, None if anonymous; ValueError if wrong."""
        header = self.headers.get("Authorization")
        if header is None and "grant_type" not in fields:
            return None
        if header is not None:
            scheme, _, value = header.partition(" ")
            given = base64.b64decode(value).decode("utf-8")
            right = (scheme.lower(), given) == ("basic", REAL_USER + ":" + REAL_PASSWORD)
        elif fields["grant_type"] == ["refresh_token"]:
            right = fields.get("refresh_token") == [REAL_IDENTITY_TOKEN]
        else:
            names = ("grant_type", "username", "password")
            given = [fields.get(name) for name in names]
            right = given == [["password"], [REAL_USER], [REAL_PASSWORD]]
        if not right:
            raise ValueError("wrong credentials")
        return REAL_USER

    def _reply(self, status, value):
        data = json.dumps(value).encode("utf-8")
        self.send_response(status)
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="token server"')
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class TokenServer:
    """GET and POST /token: anonymous may pull outside private/, alice may do all.

    A test may change `token_field` ("token", "access_token" or "both"), `expires_in`
    (what the reply says; None: nothing) and `valid_for` (seconds until the token truly
    expires; registries grant up to 60 more) at any time, and read `requests`: a list
    of (method, path with query, headers, body).
    """
    SERVICE = "registry.test"
    ISSUER = "issuer.test"

    def __init__(self):
        self.token_field = "both"
        self.expires_in = 300
        self.valid_for = 300
        self.requests = []
        self._server = _ThreadingServer(("127.0.0.1", 0), _TokenHandler)
        self._server.owner = self
        self.host = "127.0.0.1:%d" % self._server.server_address[1]
        self.url = "http://%s/token" % self.host
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.daemon = True
        self._thread.start()

    def close(self):
        """Stop listening; may be called twice."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, user, fields):
        """The JSON reply to an authenticated request for `fields` (as of parse_qs)."""
        scopes = " ".join(fields.get("scope", [])).split()
        service = fields.get("service", [self.SERVICE])[0]
        token = self.token(user, scopes, service)
        names = ["token", "access_token"]
        if self.token_field != "both":
            names = [self.token_field]
        reply = {name: token for name in names}
        if self.expires_in is not None:
            reply["expires_in"] = self.expires_in
        return reply

    def token(self, user, scopes, service=SERVICE):
        """A JWT with those of `scopes` ("type:name:action,action") `user` may have."""
        now = int(time.time())
        return make_jwt({
            "iss": self.ISSUER, "aud": service, "sub": user or "",
            "iat": now, "nbf": now - 60, "exp": now + self.valid_for,
            "jti": _real_base64url(os.urandom(12)),
            "access": [self._access(user, scope) for scope in scopes]})

    @staticmethod
    def _access(user, scope):
        # A repository's name may hold a colon of its own ("host:port/name").
        rest, _, actions = scope.rpartition(":")
        kind, _, name = rest.partition(":")
        asked = actions.split(",")
        if user is None:
            public = kind == "repository" and not name.startswith("private/")
            asked = [action for action in asked if public and action == "pull"]
        return {"type": kind, "name": name, "actions": asked}


def _free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class DockerRegistry:
    """The real docker-registry on 127.0.0.1, schema 1 enabled, stored below `root`.

    `auth` is None, "htpasswd" or "token". What was stored stays after close(), so that
    another registry with the same `root` serves it under other conditions. `env_extra`
    may override any setting (REGISTRY_STORAGE_DELETE_ENABLED=true).
    """
    # A watchdog waits for the end of its standard input, which comes even when the
    # test process is killed and can run no cleanup.
    COMMAND = ('exec 3<&0; (read _ <&3; kill $$) & '
               'exec docker-registry serve "$1" 3<&- </dev/null')

    def __init__(self, root, auth=None, tls=False, env_extra=None):
        if auth not in (None, "htpasswd", "token"):
            raise ValueError("auth: %r" % (auth,))
        self.auth = auth
        self.tls = tls
        self.storage = os.path.join(str(root), "storage")
        self.directory = tempfile.mkdtemp(prefix="registry-", dir=str(root))
        self.token_server = TokenServer() if auth == "token" else None
        self._process = None
        atexit.register(self.close)
        try:
            self._start(env_extra or {})
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self):
        """Stop the registry and its token server; may be called twice."""
        atexit.unregister(self.close)
        self._stop()
        if self.token_server is not None:
            self.token_server.close()

    def log_text(self):
        """What docker-registry has printed so far."""
        with open(self._path("log"), "rb") as file:
            return file.read().decode("utf-8", "replace")

    def request(self, path, headers=None, method="GET"):
        """Return (status, headers, body) of one request, without any proxy."""
        if self.tls:
            context = ssl.create_default_context(cadata=REAL_CERT)
            connection = http.client.HTTPSConnection(
                self.host, timeout=10, context=context)
        else:
            connection = http.client.HTTPConnection(self.host, timeout=10)
        try:
            connection.request(method, path, headers=headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def _start(self, env_extra):
        for _ in range(3):
            self._spawn(env_extra)
            if self._answers():
                return
            self._stop()
            # Another program may have taken the free port in the meantime.
            if "address already in use" not in self.log_text():
                break
        raise RuntimeError("docker-registry does not answer:\n" + self.log_text())

    def _spawn(self, env_extra):
        self.host = "127.0.0.1:%d" % _free_port()
        self.url = "%s://%s" % ("https" if self.tls else "http", self.host)
        # Any REGISTRY_* variable would override our configuration; the exporter
        # (version 3) would look for a collector.
        env = {name: value for name, value in os.environ.items()
               if not name.startswith("REGISTRY_")}
        env["OTEL_TRACES_EXPORTER"] = "none"
        env.update(env_extra)
        with open(self._path("log"), "wb") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", self.COMMAND, "sh", self._configure()],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env=env)

    def _stop(self):
        process, self._process = self._process, None
        if process is None:
            return
        process.stdin.close()
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _answers(self):
        deadline = time.monotonic() + 10
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                if self.request("/v2/")[0] in (200, 401):
                    return True
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.01)
        return False

    def _path(self, name, text=None):
        """The path of a file of ours, written first if `text` is given."""
        path = os.path.join(self.directory, name)
        if text is not None:
            with open(path, "w") as file:
                file.write(text)
        return path

    def _configure(self):
        http_part = {"addr": self.host, "secret": "not secret"}
        if self.tls:
            http_part["tls"] = {"certificate": self._path("cert.pem", REAL_CERT),
                                "key": self._path("key.pem", REAL_KEY)}
        config = {
            "version": "0.1",
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": self.storage},
                "maintenance": {"uploadpurging": {"enabled": False}}},
            "http": http_part,
            "compatibility": {"schema1": {
                "enabled": True,
                "signingkeyfile": self._path("schema1.pem", REAL_KEY)}}}
        if self.auth is not None:
            config["auth"] = {self.auth: self._auth_options()}
        # JSON is YAML, and needs no thought about quoting.
        return self._path("config.yml", json.dumps(config, indent=1))

    def _auth_options(self):
        if self.auth == "htpasswd":
            return {"realm": "registry.test",
                    "path": self._path("htpasswd", HTPASSWD)}
        return {"realm": self.token_server.url,
                "service": TokenServer.SERVICE, "issuer": TokenServer.ISSUER,
                "rootcertbundle": self._path("token.pem", TOKEN_CERT)}


def _skopeo(*arguments):
    done = subprocess.run(
        ["skopeo", "--insecure-policy"] + list(arguments), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120,
        env=dict(os.environ, NO_PROXY="*", no_proxy="*"))
    if done.returncode:
        raise AssertionError("skopeo %s: exit code %d\n%s" % (
            " ".join(arguments), done.returncode,
            done.stderr.decode("utf-8", "replace")))
    return done.stdout


def skopeo_copy(source, destination, *options):
    """Copy an image with skopeo; both sides may be insecure registries."""
    _skopeo("copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false",
            *(options + (source, destination)))


def _creds(creds):
    return () if creds is None else ("--creds", creds)


def skopeo_inspect(ref, *options, creds=None):
    """What `skopeo inspect` says of `ref`, as a dict; creds: "user:password"."""
    options = _creds(creds) + options
    return json.loads(_skopeo(
        "inspect", "--tls-verify=false", *(options + (ref,))).decode("utf-8"))


def skopeo_raw(ref, *options, creds=None):
    """The manifest of `ref` byte by byte, as its registry serves it to skopeo."""
    options = _creds(creds) + options
    return _skopeo("inspect", "--raw", "--tls-verify=false", *(options + (ref,)))


def _write_blob(layout, media_type, data):
    digest = hashlib.sha256(data).hexdigest()
    with open(os.path.join(layout, "blobs", "sha256", digest), "wb") as file:
        file.write(data)
    return {"mediaType": media_type, "digest": "sha256:" + digest, "size": len(data)}


def _write_json(layout, kind, value):
    return _write_blob(layout, "application/vnd.oci.image.%s.v1+json" % kind,
                       json.dumps(value, sort_keys=True).encode("utf-8"))


def _gzip(data):
    # Without a fixed time equal layers would have different digests.
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as file:
        file.write(data)
    return out.getvalue()


def oci_layout(path, layers, config_extra=None, platform="linux/amd64"):
    """Write an OCI image layout with tag `latest` to the new directory `path`.

    `layers` are uncompressed tar files (bytes); `config_extra` replaces members of
    the image's configuration; `platform` is "os/architecture[/variant]".
    """
    path = str(path)
    os.makedirs(os.path.join(path, "blobs", "sha256"))
    config = dict(zip(("os", "architecture", "variant"), platform.split("/")))
    diff_ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    created = "2001-02-03T04:05:06Z"
    config.update(created=created, config={},
                  rootfs={"type": "layers", "diff_ids": diff_ids},
                  # Conversion to schema 1 needs one entry for each layer.
                  history=[{"created": created, "created_by": "layer %d" % number}
                           for number in range(len(layers))])
    config.update(config_extra or {})
    manifest = {"schemaVersion": 2, "config": _write_json(path, "config", config),
                "layers": [_write_blob(
                    path, "application/vnd.oci.image.layer.v1.tar+gzip", _gzip(layer))
                    for layer in layers]}
    entry = _write_json(path, "manifest", manifest)
    entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    with open(os.path.join(path, "index.json"), "w") as file:
        json.dump({"schemaVersion": 2, "manifests": [entry]}, file)
    with open(os.path.join(path, "oci-layout"), "w") as file:
        json.dump({"imageLayoutVersion": "1.0.0"}, file)
    return path


def seed(registry, repository, layers):
    """Push `layers` (tar bytes) as tags v2s1, v2s2, oci and zstd of `repository`."""
    creds = ()
    if registry.auth is not None:
        creds = ("--dest-creds", REAL_USER + ":" + REAL_PASSWORD)
    tag_at = "docker://%s/%s:" % (registry.host, repository)
    with tempfile.TemporaryDirectory() as directory:
        plain = "oci:%s:latest" % oci_layout(os.path.join(directory, "gzip"), layers)
        for name in ("v2s1", "v2s2", "oci"):
            skopeo_copy(plain, tag_at + name, "--format", name, *creds)
        # On the way to a registry skopeo would rather reuse the gzip blobs it knows to
        # be there than compress anew; a fresh directory offers it nothing to reuse.
        zstd = "oci:%s:latest" % os.path.join(directory, "zstd")
        skopeo_copy(plain, zstd, "--dest-compress-format", "zstd")
        skopeo_copy(zstd, tag_at + "zstd", "--preserve-digests", *creds)


# --------------------------------------------------------------------------------------
# Names to Verification
# --------------------------------------------------------------------------------------

# ------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------

SEED = 20140612  # of every random choice: a failure repeats itself


class TableCase(unittest.TestCase):
    """A test whose rows are data, each row a subTest named by its first cell."""

    def each(self, table, check):
        """Run `check` on every row of a table that has some."""
        self.assertTrue(table, "an empty table proves nothing")
        for row in table:
            with self.subTest(row[0]):
                check(*row)

    def refused(self, kind, words, call, *args):
        """Return the error, of exactly that kind and with those words, of a call."""
        with self.assertRaises(kind) as caught:
            call(*args)
        self.assertIs(type(caught.exception), kind)
        self.assertIn(words, str(caught.exception))
        self.assertTrue(str(caught.exception).isprintable())  # T07
        return caught.exception

    def none_stray(self, call, cases):
        """Call with each (name, argument); no error but ImagecError may come out."""
        strays = []
        for name, argument in cases:
            try:
                outcome(call, argument)
            except Exception as error:
                strays.append((name, repr(error)))
        self.assertEqual(strays, [])


def outcome(call, *args, **options):
    """What a call returns, or the error it raises; none but ImagecError may."""
    try:
        return call(*args, **options)
    except imagec.ImagecError as error:
        return str(error) and error


def mutated(data, choices, cut=False):
    """Data with a random byte changed, and cut at a random place if wanted."""
    mutant = bytearray(data)
    mutant[choices.randrange(len(data))] = choices.randrange(256)
    return bytes(mutant[:choices.randrange(len(data) + 1)] if cut else mutant)


def json_bytes(value):
    """A value as JSON, lone surrogates and all."""
    return json.dumps(value).encode("ascii")


def compact_table(*rows):
    """Rows written as one text each, cells apart by blanks; `-` is an empty cell."""
    return tuple(
        tuple("" if cell == "-" else cell for cell in row.split()) for row in rows
    )


# ------------------------------------------------------------------------------
# 3  Names
# ------------------------------------------------------------------------------

HEX64 = "0123456789abcdef" * 4
SHA256_A = "sha256:" + HEX64
SHA512_A = "sha512:" + HEX64 * 2
ARABIC_DIGITS = "\u0661\u0662\u0663"
LONG_TAG = "t" * 128

# Expected values are those of distribution/reference's ParseDockerRef.
GOOD_REFERENCES = (
    # text, host, repository, tag, digest
    ("ubuntu", "docker.io", "library/ubuntu", "latest", None),
    ("ubuntu:22.04", "docker.io", "library/ubuntu", "22.04", None),
    ("docker.io/ubuntu", "docker.io", "library/ubuntu", "latest", None),
    ("index.docker.io/ubuntu:1", "docker.io", "library/ubuntu", "1", None),
    ("docker.io/me/app", "docker.io", "me/app", "latest", None),
    # the API's own host is an ordinary one
    ("registry-1.docker.io/ubuntu", "registry-1.docker.io", "ubuntu", "latest", None),
    ("me/app", "docker.io", "me/app", "latest", None),
    ("me/team/app:v1", "docker.io", "me/team/app", "v1", None),
    ("localhost/app", "localhost", "app", "latest", None),
    ("localhost:5000/app:1", "localhost:5000", "app", "1", None),
    # without a slash there is no host, whatever it looks like
    ("localhost:5000", "docker.io", "library/localhost", "5000", None),
    ("example.com", "docker.io", "library/example.com", "latest", None),
    ("example.com/app", "example.com", "app", "latest", None),
    ("example.com:443/a/b", "example.com:443", "a/b", "latest", None),
    ("myhost/app", "docker.io", "myhost/app", "latest", None),
    ("myhost:5000/app", "myhost:5000", "app", "latest", None),
    ("127.0.0.1:5000/a", "127.0.0.1:5000", "a", "latest", None),
    ("[::1]:5000/a:1", "[::1]:5000", "a", "1", None),
    ("[fd00::1]/a", "[fd00::1]", "a", "latest", None),
    # an uppercase letter makes it a host
    ("Foo/bar", "Foo", "bar", "latest", None),
    ("FOO.com/bar:Tag", "FOO.com", "bar", "Tag", None),
    ("a__b/c", "docker.io", "a__b/c", "latest", None),
    ("a--b", "docker.io", "library/a--b", "latest", None),
    ("a---b.c_d", "docker.io", "library/a---b.c_d", "latest", None),
    ("app:" + LONG_TAG, "docker.io", "library/app", LONG_TAG, None),
    ("app:_x.Y-z", "docker.io", "library/app", "_x.Y-z", None),
    ("app@" + SHA256_A, "docker.io", "library/app", None, SHA256_A),
    ("app@" + SHA512_A, "docker.io", "library/app", None, SHA512_A),
    ("app:1@" + SHA256_A, "docker.io", "library/app", "1", SHA256_A),
    ("gcr.io/p/i:tag@" + SHA256_A, "gcr.io", "p/i", "tag", SHA256_A),
    # only the bare string looks like an image ID
    (HEX64 + ":x", "docker.io", "library/" + HEX64, "x", None),
    ("me/" + HEX64, "docker.io", "me/" + HEX64, "latest", None),
    ("h.io/scratch", "h.io", "scratch", "latest", None),
    ("h.io:1/a", "h.io:1", "a", "latest", None),
    ("h.io:65535/a", "h.io:65535", "a", "latest", None),
    # T05: 255 characters of repository, the host not counted
    ("h.io/" + "a" * 255, "h.io", "a" * 255, "latest", None),
    ("a" * 247, "docker.io", "library/" + "a" * 247, "latest", None),
)

BAD_REFERENCES = (
    # text, words of the message
    ("", "expected [HOST[:PORT]/]REPOSITORY"),
    ("::1/a", "expected"),
    ("foo/Bar", "lowercase"),
    ("UPPER", "lowercase"),
    ("a/SUM_B@" + SHA256_A, "lowercase"),
    ("a___b/c", "expected"),
    ("a..b", "expected"),
    ("a.-b", "expected"),
    ("-a/b", "expected"),
    ("a-", "expected"),
    ("app//b", "expected"),
    ("/app", "expected"),
    ("app/", "expected"),
    ("a b", "expected"),
    ("a/b:", "expected"),
    ("a:b:c", "expected"),
    (":tag", "expected"),
    ("a:-tag", "expected"),
    ("a:.tag", "expected"),
    ("http://x/y", "expected"),
    ("app:" + LONG_TAG + "t", "expected"),
    ("app@", "expected"),
    ("app@sha256:" + HEX64.upper(), "invalid digest"),
    ("app@sha256:" + HEX64[:32], "invalid digest"),
    ("app@sha512:" + HEX64, "invalid digest"),
    ("app@md5:" + HEX64[:32], "invalid digest"),
    ("app@" + SHA256_A + "@" + SHA256_A, "invalid digest"),
    (HEX64, "looks like an image ID"),
    ("scratch", "reserved"),
    ("scratch:1", "reserved"),
    ("docker.io/library/scratch", "reserved"),
    ("h.io./a", "expected"),
    ("-h.io/a", "expected"),
    ("h_o.io/a", "expected"),
    ("[::1%25eth0]/a", "expected"),
    ("[::ffff:127.0.0.1]/a", "expected"),
    # T02: `$` takes a final newline, \d and int() other scripts' digits
    ("ubuntu\n", "expected"),
    ("ubuntu:22.04\n", "expected"),
    ("h.io:80\n/a", "expected"),
    ("app@" + SHA256_A + "\n", "invalid digest"),
    ("app@sha256:" + HEX64[:61] + ARABIC_DIGITS, "invalid digest"),
    ("app:" + ARABIC_DIGITS, "expected"),
    ("h.io:8" + ARABIC_DIGITS + "/a", "expected"),
    ("h.io:8_0/a", "expected"),
    ("h.io:+80/a", "expected"),
    # T05
    ("host/../x", "expected"),
    ("h.io/../x", "expected"),
    ("h.io/a/./x", "expected"),
    ("host/a?b#c", "expected"),
    ("h.io/a%2f..", "expected"),
    ("h.io/a\\b", "expected"),
    ("user:pw@host/x", "expected"),
    ("user@h.io/x", "expected"),
    ("h.io/x y", "expected"),
    ("h.io/x\r\nHost: evil", "lowercase"),
    ("h.io\r\n/x", "expected"),
    ("h.io/x\0", "expected"),
    ("h.io/\u00e9", "expected"),
    ("h.io/\u0131", "expected"),
    ("h.io/\u212a", "lowercase"),  # the Kelvin sign, whose lower case is k
    ("h.io/\ud800", "expected"),
    ("h.io/\x1b]0;x\x07", "expected"),
    ("h.io:0/x", "port"),
    ("h.io:99999/x", "port"),
    ("h.io:65536/x", "port"),
    ("h.io:1000443/x", "port"),
    ("h.io:" + "9" * 900 + "/x", "port"),
    ("h.io/" + "a" * 256, "longer than 255"),
    ("a" * 248, "longer than 255"),
    ("h.io/a:" + "t" * 5000, "longer than 1024"),
)

REFERENCE_PARTS = (
    # text, tag_or_digest, api_host, name, str
    ("ubuntu", "latest", "registry-1.docker.io", "docker.io/library/ubuntu",
     "docker.io/library/ubuntu:latest"),
    ("h.io:5/a:1", "1", "h.io:5", "h.io:5/a", "h.io:5/a:1"),
    ("h.io/a@" + SHA256_A, SHA256_A, "h.io", "h.io/a", "h.io/a@" + SHA256_A),
    # the digest decides, the tag stays for the name
    ("h.io/a:1@" + SHA256_A, SHA256_A, "h.io", "h.io/a", "h.io/a:1@" + SHA256_A),
)

GOOD_DIGESTS = (
    # text, algorithm, hex
    (SHA256_A, "sha256", HEX64),
    ("sha384:" + HEX64 + HEX64[:32], "sha384", HEX64 + HEX64[:32]),
    (SHA512_A, "sha512", HEX64 * 2),
)

BAD_DIGESTS = (
    # T01, T02, T14
    ("", "expected sha256:"),
    ("../x", "expected sha256:"),
    (HEX64, "expected sha256:"),
    ("md5:" + HEX64[:32], "expected sha256:"),
    ("sha1:" + HEX64[:40], "expected sha256:"),
    ("SHA256:" + HEX64, "expected sha256:"),
    ("sha256+b64u:" + HEX64, "expected sha256:"),
    (" " + SHA256_A, "expected sha256:"),
    (":" + HEX64, "expected sha256:"),
    (None, "expected sha256:"),
    (5, "expected sha256:"),
    (["sha256", HEX64], "expected sha256:"),
    ("sha256:", "expected 64 lowercase"),
    ("sha256:../../../x", "expected 64 lowercase"),
    ("sha256:" + HEX64[:63], "expected 64 lowercase"),
    (SHA256_A + "0", "expected 64 lowercase"),
    (SHA256_A + "\n", "expected 64 lowercase"),
    (SHA256_A + "\0", "expected 64 lowercase"),
    ("sha256:\n" + HEX64[1:], "expected 64 lowercase"),
    ("sha256:" + HEX64[:60] + "/../", "expected 64 lowercase"),
    ("sha256:" + HEX64[:60] + "\\..\\", "expected 64 lowercase"),
    ("sha256:" + HEX64.upper(), "expected 64 lowercase"),
    ("sha256:" + HEX64[:61] + ARABIC_DIGITS, "expected 64 lowercase"),
    ("sha256:" + HEX64[:61] + "\uff11\uff12\uff13", "expected 64 lowercase"),
    ("sha384:" + HEX64, "expected 96 lowercase"),
    ("sha512:" + HEX64, "expected 128 lowercase"),
)

# containerd/platforms, normalize
GOOD_PLATFORMS = compact_table(
    # text, os, architecture, variant
    "linux/amd64 linux amd64 -",
    "LINUX/AMD64 linux amd64 -",
    "linux/x86_64 linux amd64 -",
    "linux/x86-64 linux amd64 -",
    "linux/amd64/v1 linux amd64 -",
    "linux/amd64/v3 linux amd64 v3",
    "linux/i386 linux 386 -",
    "linux/i686 linux 386 -",
    "macos/arm64 darwin arm64 -",
    "linux/aarch64 linux arm64 -",
    "linux/arm64/8 linux arm64 -",
    "linux/arm64/v8 linux arm64 -",
    "linux/arm64/v8.0 linux arm64 -",
    "linux/arm64/v8.2 linux arm64 v8.2",
    "linux/arm64/9 linux arm64 v9",
    "linux/arm64/9.0 linux arm64 v9",
    "linux/arm64/v9.0 linux arm64 v9",
    "linux/arm64/v9.2 linux arm64 v9.2",
    "linux/armhf linux arm v7",
    "linux/armel linux arm v6",
    "linux/arm linux arm v7",
    "linux/arm/5 linux arm v5",
    "linux/arm/6 linux arm v6",
    "linux/arm/7 linux arm v7",
    "linux/arm/8 linux arm v8",
    "linux/arm/V6 linux arm v6",
    "linux/loongarch64 linux loong64 -",
    "windows/amd64 windows amd64 -",
    # one word that is no system is an architecture
    "s390x linux s390x -",
    "aarch64 linux arm64 -",
    "armhf linux arm v7",
)

BAD_PLATFORMS = tuple(
    (text, "expected OS/ARCH")
    for text in (
        "", "/", "linux/", "/amd64", "linux//v7", "linux/amd64/v2/x", "linux amd64",
        "linux/amd64\n", "linux/amd64\0", "linux/\uff41rm", "linux,amd64", "linux/a:b",
        "\x1b[2J",
    )
)

PLATFORM_TEXTS = (
    # platform, str
    (("linux", "amd64"), "linux/amd64"),
    (("linux", "arm", "v7"), "linux/arm/v7"),
    (("windows", "amd64", "", "10.0.17763.1"), "windows/amd64 (10.0.17763.1)"),
)

# The order in which docker tries them: containerd/platforms, platformVector.
CANDIDATES = compact_table(
    # platform, then architecture/variant, best first
    "linux/amd64 amd64 386",
    "linux/amd64/v1 amd64 386",
    "linux/amd64/v2 amd64/v2 amd64 386",
    "linux/amd64/v4 amd64/v4 amd64/v3 amd64/v2 amd64 386",
    "linux/386 386",
    "linux/arm/v8 arm/v8 arm/v7 arm/v6 arm/v5",
    "linux/arm arm/v7 arm/v6 arm/v5",
    "linux/arm/v6 arm/v6 arm/v5",
    "linux/arm/v5 arm/v5",
    "linux/arm64 arm64 arm/v8 arm/v7 arm/v6 arm/v5",
    "linux/arm64/v8.2 arm64/v8.2 arm64/v8.1 arm64 arm/v8 arm/v7 arm/v6 arm/v5",
    "linux/arm64/v9 arm64/v9 arm64/v8.5 arm64/v8.4 arm64/v8.3 arm64/v8.2 arm64/v8.1"
    " arm64 arm/v8 arm/v7 arm/v6 arm/v5",
    "linux/arm64/v9.2 arm64/v9.2 arm64/v9.1 arm64/v9 arm64/v8.7 arm64/v8.6 arm64/v8.5"
    " arm64/v8.4 arm64/v8.3 arm64/v8.2 arm64/v8.1 arm64 arm/v8 arm/v7 arm/v6 arm/v5",
    "linux/arm64/v9.6 arm64/v9.6 arm64/v9.5 arm64/v9.4 arm64/v9.3 arm64/v9.2 arm64/v9.1"
    " arm64/v9 arm64/v8.9 arm64/v8.8 arm64/v8.7 arm64/v8.6 arm64/v8.5 arm64/v8.4"
    " arm64/v8.3 arm64/v8.2 arm64/v8.1 arm64 arm/v8 arm/v7 arm/v6 arm/v5",
    "linux/s390x s390x",
    "windows/amd64 amd64 386",
    "linux/riscv64/rva20u64 riscv64/rva20u64",
)

HOSTS = (
    # uname's machine, bytes of a pointer, platform
    ("x86_64", 8, "linux/amd64"),
    ("AMD64", 8, "linux/amd64"),
    ("x86_64", 4, "linux/386"),
    ("i686", 4, "linux/386"),
    ("aarch64", 8, "linux/arm64"),
    ("arm64", 8, "linux/arm64"),
    ("aarch64", 4, "linux/arm/v7"),
    ("armv8l", 4, "linux/arm/v8"),
    ("armv7l", 4, "linux/arm/v7"),
    ("armv6l", 4, "linux/arm/v6"),
    ("armv5tel", 4, "linux/arm/v5"),
    ("ppc64le", 8, "linux/ppc64le"),
    ("s390x", 8, "linux/s390x"),
    ("riscv64", 8, "linux/riscv64"),
    ("loongarch64", 8, "linux/loong64"),
    ("mips64", 8, "linux/mips64"),
    ("", 8, "linux/amd64"),
)


class NamesTest(TableCase):
    """Text becomes a value, or an InvalidReference."""

    def test_good_references(self):
        self.each(GOOD_REFERENCES, self._good_reference)

    def _good_reference(self, text, host, repository, tag, digest):
        found = imagec.Reference.parse(text)
        self.assertEqual(found[:3], (host, repository, tag))
        self.assertEqual(found.digest and str(found.digest), digest)
        self.assertEqual(imagec.Reference.parse(str(found)), found)

    def test_bad_references(self):
        self.each(BAD_REFERENCES, self._bad_reference)

    def _bad_reference(self, text, words):
        self.refused(imagec.InvalidReference, words, imagec.Reference.parse, text)

    def test_reference_parts(self):
        self.each(REFERENCE_PARTS, self._reference_parts)

    def _reference_parts(self, text, *parts):
        found = imagec.Reference.parse(text)
        named = (found.tag_or_digest, found.api_host, found.name, str(found))
        self.assertEqual(named, parts)

    def test_any_reference_reads_or_is_refused(self):
        pieces = ["a", "B", ".", "_", "-", "/", ":", "@", "[", "]", "1", "\n", " "]
        pieces += [SHA256_A, "docker.io", "sha256", "\u0661", "\ud800"]
        choices = random.Random(SEED)
        for _ in range(2000):
            text = "".join(choices.choices(pieces, k=choices.randrange(9)))
            found = outcome(imagec.Reference.parse, text)
            if isinstance(found, imagec.Reference):
                self.assertEqual(imagec.Reference.parse(str(found)), found, text)

    def test_good_digests(self):
        self.each(GOOD_DIGESTS, self._good_digest)

    def _good_digest(self, text, algorithm, digits):
        found = imagec.Digest.parse(text)
        self.assertEqual((found, str(found)), ((algorithm, digits), text))

    def test_bad_digests(self):
        self.each(BAD_DIGESTS, self._bad_digest)

    def _bad_digest(self, text, words):
        self.refused(imagec.InvalidReference, words, imagec.Digest.parse, text)

    def test_digest_of_bytes(self):
        digest = imagec.Digest.of(b"")
        self.assertEqual(str(digest), sha256(b""))
        self.assertEqual(len(imagec.Digest.of(b"", "sha512").hex), 128)
        digest.check(b"", "nothing")
        error = self.refused(
            imagec.DigestMismatch, "thing: expected", digest.check, b"x", "thing"
        )
        self.assertEqual(error.what, "thing")
        self.assertEqual((error.expected, error.actual), (digest, digest.of(b"x")))

    def test_good_platforms(self):
        self.each(GOOD_PLATFORMS, self._good_platform)

    def _good_platform(self, text, *parts):
        found = imagec.Platform.parse(text)
        self.assertEqual(found, parts + ("",))
        self.assertEqual(imagec.Platform.normal(*found), found)
        self.assertEqual(imagec.Platform.parse(str(found)), found)

    def test_bad_platforms(self):
        self.each(BAD_PLATFORMS, self._bad_platform)

    def _bad_platform(self, text, words):
        self.refused(imagec.InvalidReference, words, imagec.Platform.parse, text)

    def test_a_system_alone_means_this_architecture(self):
        for text, system in (("linux", "linux"), ("Windows", "windows"),
                             ("macos", "darwin")):
            expected = imagec.Platform.host()._replace(os=system)
            self.assertEqual(imagec.Platform.parse(text), expected)

    def test_platform_texts(self):
        self.each(PLATFORM_TEXTS, self._platform_text)

    def _platform_text(self, parts, text):
        self.assertEqual(str(imagec.Platform(*parts)), text)

    def test_candidates(self):
        self.each(CANDIDATES, self._candidates)

    def _candidates(self, text, *expected):
        found = imagec.Platform.parse(text).candidates()
        names = tuple("/".join(filter(None, each[1:3])) for each in found)
        self.assertEqual(names, expected)

    def test_host(self):
        self.each(HOSTS, self._host)

    def _host(self, machine, pointer, expected):
        with mock.patch("platform.machine", return_value=machine), \
                mock.patch("struct.calcsize", return_value=pointer):
            self.assertEqual(str(imagec.Platform.host()), expected)


# ------------------------------------------------------------------------------
# 4  Documents
# ------------------------------------------------------------------------------

JSON_READ = (
    # text, value
    (b"{}", {}),
    (b' \r\n\t{"a": [1, -2, 1.5, null, true]}\n', {"a": [1, -2, 1.5, None, True]}),
    (b"[" + b"9" * 32 + b"]", [10 ** 32 - 1]),
    ('"\u00e9\U0001f433"'.encode("utf-8"), "\u00e9\U0001f433"),
    (b'"\\ud83d\\udc33"', "\U0001f433"),
    (b'{"a": {"x": 1}, "b": {"x": 1}}', {"a": {"x": 1}, "b": {"x": 1}}),
    (b"[" * 50 + b"]" * 50, json.loads("[" * 50 + "]" * 50)),
)

JSON_REFUSED = (
    # name, text, words
    ("empty", b"", "not valid JSON"),
    ("blank", b" \n", "not valid JSON"),
    ("cut short", b'{"a": 1', "not valid JSON"),
    # T35: Python keeps the last, others the first
    ("key twice", b'{"a": 1, "a": 1}', "a key stands twice"),
    ("key twice, escaped", b'{"a": 1, "\\u0061": 2}', "a key stands twice"),
    ("key twice, inside", b'[{"x": {"a": 1, "b": 2, "a": 3}}]', "a key stands twice"),
    # T36
    ("NaN", b"[NaN]", "NaN is not JSON"),
    ("Infinity", b'{"a": Infinity}', "Infinity is not JSON"),
    ("-Infinity", b"-Infinity", "-Infinity is not JSON"),
    ("1e999", b"[1e999]", "out of range"),
    ("-1e999", b"[-1e999]", "out of range"),
    ("leading zero", b"[01]", "not valid JSON"),
    ("plus sign", b"[+1]", "not valid JSON"),
    ("underscore", b"[1_0]", "not valid JSON"),
    ("Arabic digits", '[1\u0661]'.encode("utf-8"), "not valid JSON"),
    # T37: json.loads would guess the encoding
    ("UTF-8 mark", b"\xef\xbb\xbf{}", "not valid JSON"),
    ("UTF-16", "{}".encode("utf-16"), "not UTF-8"),
    ("UTF-16 without mark", "{}".encode("utf-16-le"), "not valid JSON"),
    ("UTF-32", "{}".encode("utf-32"), "not UTF-8"),
    ("Latin-1", b'{"a": "\xe9"}', "not UTF-8"),
    ("overlong UTF-8", b'"\xc0\xaf"', "not UTF-8"),
    ("UTF-8 surrogate", b'"\xed\xa0\x80"', "not UTF-8"),
    ("two documents", b"{}{}", "not valid JSON"),
    ("trailing text", b"{} x", "not valid JSON"),
    ("trailing NUL", b"{}\0", "not valid JSON"),
    ("comment", b"{} // x", "not valid JSON"),
    ("trailing comma", b"[1,]", "not valid JSON"),
    ("control character", b'"a\nb"', "not valid JSON"),
    ("terminal escape", b'{"\x1b]0;x\x07', "not valid JSON"),
    # T54
    ("deep arrays", b"[" * 100000, "nested too deep"),
    ("deep objects", b'{"a":' * 100000, "nested too deep"),
    # T55: had it been converted, the number would not be in the message
    ("33 digits", b"[" + b"9" * 33 + b"]", "a number of 33 digits"),
    ("200000 digits", b"[" + b"7" * 200000 + b"]", "a number of 200000 digits"),
)

HTML_BODIES = (
    # text, whether the hint is given
    (b"<html><body>Sign in</body></html>", True),
    (b"\n <!DOCTYPE html>", True),
    (b'<?xml version="1.0"?><Error/>', True),
    (b"not found", False),
    (b"", False),
)

# Calls on a Document: text, method, arguments, value.
MEMBERS_READ = (
    ('{"a": "x"}', "get", ("a", str), "x"),
    ('{"a": null}', "get", ("a", str), None),
    ('{"a": null}', "get", ("a", str, "d"), "d"),
    ('{}', "get", ("a", list, [1]), [1]),
    ('{"a": false}', "get", ("a", bool, True), False),
    ('{"a": ""}', "need", ("a", str), ""),
    ('{"a": 0}', "need", ("a", int), 0),
    ('{"a": "\\ud83d\\udc33"}', "get", ("a", str), "\U0001f433"),
    ('{"a": 0}', "size", ("a",), 0),
    ('{"a": 9007199254740991}', "size", ("a",), 2 ** 53 - 1),
    ('{"a": -0}', "size", ("a",), 0),
    ('{"a": "%s"}' % SHA256_A, "digest", ("a",), ("sha256", HEX64)),
    ('{"a": null}', "child", ("a",), None),
    ('{"a": []}', "children", ("a", 0), []),
    # keys nobody asks for may be anything
    ('{"b": 1, "B": 2, "a": 3}', "get", ("a", int), 3),
)

# Calls on a Document: text, method, arguments, words.
MEMBERS_REFUSED = (
    ('{}', "need", ("a", str), "has no 'a'"),
    ('{"a": null}', "need", ("a", str), "has no 'a'"),
    ('{"a": 5}', "get", ("a", str), "must be a JSON string"),
    ('{"a": "5"}', "get", ("a", int), "must be a JSON integer"),
    ('{"a": {}}', "get", ("a", list), "must be a JSON array"),
    ('{"a": []}', "child", ("a",), "must be a JSON object"),
    ('{"a": 1}', "get", ("a", bool), "must be a JSON boolean"),
    # T36
    ('{"a": true}', "size", ("a",), "must be a JSON integer"),
    ('{"a": 1.0}', "size", ("a",), "must be a JSON integer"),
    ('{"a": 1e3}', "size", ("a",), "must be a JSON integer"),
    ('{"a": "5"}', "size", ("a",), "must be a JSON integer"),
    ('{"a": null}', "size", ("a",), "has no 'a'"),
    ('{"a": -1}', "size", ("a",), "not a size"),
    ('{"a": 9007199254740992}', "size", ("a",), "not a size"),
    ('{"a": %d}' % 2 ** 70, "size", ("a",), "not a size"),
    ('{"a": 5}', "digest", ("a",), "must be a JSON string"),
    ('{"a": "sha256:../x"}', "digest", ("a",), "doc.a: invalid digest"),
    ('{"a": [{}, 5]}', "children", ("a", 2), "doc.a[1] is not a JSON object"),
    ('{"a": [null]}', "children", ("a", 2), "doc.a[0] is not a JSON object"),
    # T13
    ('{"a": "\\ud800"}', "get", ("a", str), "not valid Unicode"),
    ('{"a": "x\\udc33\\ud83d"}', "get", ("a", str), "not valid Unicode"),
    # T35: Go reads keys in any case, and folds these two characters as well
    ('{"Size": 1}', "get", ("size", int), "in another case"),
    ('{"size": 1, "SIZE": 2}', "get", ("size", int), "in another case"),
    ('{"Size": 1, "size": 2}', "get", ("size", int), "in another case"),
    ('{"Size": null}', "get", ("size", int), "in another case"),
    ('{"\u017fize": 1}', "get", ("size", int), "in another case"),
    ('{"\u212aind": 1}', "get", ("kind", int), "in another case"),
)


class DocumentsTest(TableCase):
    """Bytes become a JSON value that every parser agrees on, or an InvalidDocument."""

    def test_json_read(self):
        self.each(JSON_READ, self._json_read)

    def _json_read(self, raw, value):
        self.assertEqual(imagec.parse_json(raw, "doc"), value)

    def test_json_refused(self):
        self.each(JSON_REFUSED, self._json_refused)

    def _json_refused(self, name, raw, words):
        error = self.refused(
            imagec.InvalidDocument, words, imagec.parse_json, raw, "doc"
        )
        self.assertLess(len(str(error)), 200)

    def test_html_is_hinted_at(self):
        self.each(HTML_BODIES, self._html)

    def _html(self, raw, hinted):
        error = self.refused(
            imagec.InvalidDocument, "doc is not", imagec.parse_json, raw, "doc"
        )
        self.assertEqual("is that host a registry" in str(error), hinted)

    def test_any_mutation_reads_or_is_refused(self):
        choices = random.Random(SEED)
        text = b'{"a": [1, -2.5e3, "\\u00e9\\n", null], "b": {"c": true}}'
        for _ in range(2000):
            outcome(imagec.parse_json, mutated(text, choices, cut=True), "doc")

    def test_members_read(self):
        self.each(MEMBERS_READ, self._member_read)

    def _member_read(self, text, method, args, value):
        document = imagec.Document.parse(text.encode("utf-8"), "doc")
        self.assertEqual(getattr(document, method)(*args), value)

    def test_members_refused(self):
        self.each(MEMBERS_REFUSED, self._member_refused)

    def _member_refused(self, text, method, args, words):
        document = imagec.Document.parse(text.encode("utf-8"), "doc")
        self.refused(imagec.InvalidDocument, words, getattr(document, method), *args)

    def test_a_document_is_an_object(self):
        for text in (b"[]", b"null", b"5", b'"{}"', b"true"):
            self.refused(
                imagec.InvalidDocument, "not a JSON object",
                imagec.Document.parse, text, "doc",
            )

    def test_children_are_counted_first(self):
        document = imagec.Document.parse(b'{"a": [1, 2, 3]}', "doc")
        self.refused(
            imagec.LimitExceeded, "3 entries, more than the limit of 2",
            document.children, "a", 2,
        )

    def test_canonical_json(self):
        value = {"b": [1, {"d": None, "c": "\u00e9"}], "a": "<&>"}
        text = '{"a":"<&>","b":[1,{"c":"\u00e9","d":null}]}'
        self.assertEqual(imagec.canonical_json(value), text.encode("utf-8"))


# ------------------------------------------------------------------------------
# 5  Signatures
# ------------------------------------------------------------------------------

# moby v24, distribution/fixtures/validate_manifest/good_manifest, deflated.
SIGNED_MANIFEST = zlib.decompress(base64.b85decode("".join("""
c-rk(S#R4$5Pr|E5ZIR%h~mAM<eRO-rzAU6d?YH2y(q0skqSx4k`4d&E-59J6DK`T6fGJ-0J+~ByL0T!@ZnXX(e
Mg2F;j7F^1^1R7dGJQ8cxO3xRsY!nTve2Gcie$HSe-K(cYS)6yusfl%^;*n8?+{mPVEHyp|SI&B%rp7bjxnwsH7
}3UI%N&9frQB$Ls6T1gcXfhY?FHaeh67zt1u8|EvmgIN270LFYEOn^1RSV_nTLK*<$3$73fD3ye1;%&4)zWzho0
UQ%X{n(e>M+PE<fr8w}1Tm?x6iOLJp)%A*g2b_8v6QhufCmKmM#<0HRnK47HcxC(X8GzHCNE$so6baOrA=&Ead{
6T&+3sEjyw@#0w^IyGo%f02FHXz#bGR<@PU%RCye{C(F93haDWXZI2J}=K{-+*@Ab%=iQJ@Rt&d^~5K!1T$+=N8
DFHK7C`bij&~U5+iJ<c+iX~EzXikyz4fGu>1BhyUDmO0N>jNSHX%qNOz=jBi6o&}CVZf)H`;fd}vu9~3Y-;jaKq
1K?g_OmN0L6vkI`9ccMj(PQ6;e0@kboFrfu-aKv49(<F*mVua{OH7wR?;0*lBh?JIIQ%%Gi3Jpvo8kSR4yp%e1q
p6ZuT9v3JGhRP}1NEQOjxrM9U9W04eQ8_nkBOR&lFE%-Fc%V=g);jna`Bo68<XIWu%McG1!<!Vc8Ff-|w8`tYWs
>~MFNf%ElTGJ{9A4cAewCPSUsf}o^WB$|6X*T<%(dxAuA4Vg`QeWNb?N|4A42M%OHh*7EoM*{=YPRfK1MS={wq1
OY<+nB+x9t|zNy~gS%WR#Z8|l6&U6r|Q+d{~sPPI=S=n1u}b#98{Ny8xBo7+S`iJu5*l8WKs@zE`HrfyxXEY{_%
mV<Bj8~7=geq_)lJ^pu@vE8cH1-I%|wP?0hlh|~=tbxehS3KZxlzz9Ve7B(gBLx@{h$-TTzf^#?(;5jM`J6JMgl
ic-XNdX%^C{*45*oM@xt>Q^V6ZzgP=Tge{V2eHssIm8uNtvUOh`mEK*TWvg!;<$Ha9b9E+KZ)gc~jphXJ5e01R|
20_Qd#aV=c8R2*P8(==?_*!l8?{+n-Dwf<3ke>Z(Li~m+k|3cji*t5#HH6IstoQg`*x4sG{Mz}CJ;ucupH+Q#Rf
fcUuMOAfAn{J}_UVlZtwYnk?4i9*EaMq1NLb}Hxq33%c-g6anaJai44o^==xI669ke&8BVQ>GSANCK<E<?26Aul
OiSNcxt1=_NrwC30ER?EAS@xgs3$QQ{~G+mtQk5{eBD}p+K=}-0~SoRknI(tDyt^EF7adUBWYmU!ox!_TAlEC4Z
L#3Ook7-_7d$Noy>tC;w?>*D-_*|hUlKQKy6IBj+^&;C-R4UFZwiMm_AX+sCrAm*_B6yg5#O;Z%=467?z2Q-7HW
+r{WtT6GOSN3?UN3v6elr@kGoJ;~5k4;#<I|I%d6_l`+0{PECEVS%)0^d4l~AURjaeN{B|a*zF5mXvU(i(VkL}>
5w;T*raX5XyP*XV3-M15Qac2kis4Z`H?Mdqhhzpn;-ek6Sv%Bm^;BF9sW$*m#uHVj<z55Idx|xm7o+sg}$KL>pv
4cw
""".split())))
SIGNED_DIGEST = "02fee8c3220ba806531f606525eceb83f4feb654f62b207191b1c9209188dedd"
SIGNED_IDS = (  # oldest first
    "535020c3e8add9d6bb06e5ac15a261e73d9b213d62fb2c14d752b8e189b2b912",
    "af340544ed62de0680f441c71fa1a80cb084678fed42bae393e543faea3a572c",
)

PAYLOAD = b'{\n   "a": 1\n}'
PAYLOAD_END = len(PAYLOAD) - 2


def url64(data):
    """Base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def protected(**members):
    """A signature entry whose protected header has the members; a tail as bytes."""
    if isinstance(members.get("formatTail"), bytes):
        members["formatTail"] = url64(members["formatTail"])
    return {"protected": url64(json_bytes(members)), "signature": "", "header": {}}


def pretty(payload, signatures=None, injected=b""):
    """A payload with signatures let in before its last brace, and what comes first."""
    if signatures is None:
        signatures = [protected(formatLength=len(payload) - 2, formatTail=b"\n}")]
    members = injected + b'"signatures": ' + json_bytes(signatures)
    return payload[:-2] + b"," + members + payload[-2:]


def length_and_tail(length, tail):
    """A list of one signature."""
    return [protected(formatLength=length, formatTail=tail)]


SIGNATURES_READ = (
    # name, signatures, payload
    ("as usual", length_and_tail(PAYLOAD_END, b"\n}"), PAYLOAD),
    ("twice the same", length_and_tail(PAYLOAD_END, b"\n}") * 2, PAYLOAD),
    ("nothing of the body", length_and_tail(0, b"{}"), b"{}"),
    ("an empty tail", length_and_tail(3, b""), PAYLOAD[:3]),
    ("padded", length_and_tail(PAYLOAD_END, "Cn0="), PAYLOAD),
    # libtrust breaks long lines
    ("line breaks", length_and_tail(PAYLOAD_END, "C\nn 0\n"), PAYLOAD),
    ("url alphabet", length_and_tail(0, "-_-_"), b"\xfb\xff\xbf"),
)

# T32
SIGNATURES_REFUSED = (
    # name, signatures, words
    ("no list", {}, "must be a JSON array"),
    ("text", "x", "must be a JSON array"),
    ("empty list", [], "no signatures in its list"),
    ("a number", [5], "is not a JSON object"),
    ("null entry", [None], "is not a JSON object"),
    ("no protected", [{}], "has no 'protected'"),
    ("protected is a number", [{"protected": 5}], "must be a JSON string"),
    ("junk characters", [{"protected": "!!!!"}], "is not base64url"),
    ("standard alphabet", [{"protected": "+/+/"}], "is not base64url"),
    ("not ASCII", [{"protected": "\u0661\u0661"}], "is not base64url"),
    ("one character over", [{"protected": "abcde"}], "is not base64url"),
    ("protected is no JSON", [{"protected": url64(b"x")}], "is not valid JSON"),
    ("protected is no object", [{"protected": url64(b"[]")}], "not a JSON object"),
    ("key twice", [{"protected": url64(b'{"formatLength":1,"formatLength":1}')}],
     "a key stands twice"),
    ("no length", [protected(formatTail=b"\n}")], "has no 'formatLength'"),
    ("null length", length_and_tail(None, b"\n}"), "has no 'formatLength'"),
    ("negative length", length_and_tail(-1, b"\n}"), "not a size"),
    ("true length", length_and_tail(True, b"\n}"), "must be a JSON integer"),
    ("fraction", length_and_tail(1.0, b"\n}"), "must be a JSON integer"),
    ("text length", length_and_tail("5", b"\n}"), "must be a JSON integer"),
    ("huge length", length_and_tail(2 ** 60, b"\n}"), "not a size"),
    ("beyond the end", length_and_tail(100000, b"\n}"), "is beyond its end"),
    ("length in another case", [protected(formatlength=5, formatTail=b"")],
     "in another case"),
    ("no tail", [protected(formatLength=5)], "has no 'formatTail'"),
    ("tail is a number", length_and_tail(5, 5), "must be a JSON string"),
    ("tail is no base64", length_and_tail(5, "a*c"), "is not base64url"),
    ("lengths disagree",
     length_and_tail(5, b"\n}") + length_and_tail(6, b"\n}"), "disagree"),
    ("tails disagree",
     length_and_tail(5, b"\n}") + length_and_tail(5, b"}"), "disagree"),
    ("the second is bad", length_and_tail(5, b"\n}") + [{}], "has no 'protected'"),
)


class SignaturesTest(TableCase):
    """A body comes apart into what its digest covers, and the rest."""

    def test_known_answer(self):
        found = imagec.PrettySignature.parse(SIGNED_MANIFEST)
        self.assertTrue(found.signed)
        self.assertEqual(sha256(found.payload), "sha256:" + SIGNED_DIGEST)

    def test_unsigned(self):
        for raw in (b"{}", b'{"signatures": null}', b'{"a": [1]}\n'):
            found = imagec.PrettySignature.parse(raw)
            self.assertEqual(found, (raw, False))

    def test_signatures_read(self):
        self.each(SIGNATURES_READ, self._read)

    def _read(self, name, signatures, payload):
        found = imagec.PrettySignature.parse(pretty(PAYLOAD, signatures))
        self.assertEqual(found, (payload, True))

    def test_the_whole_body_is_the_longest_payload(self):
        body = pretty(PAYLOAD, length_and_tail(100, b""))
        body = pretty(PAYLOAD, length_and_tail(len(body), b""))
        length = len(body)
        self.assertEqual(imagec.PrettySignature.parse(body), (body, True))
        body = pretty(PAYLOAD, length_and_tail(length + 1, b""))
        self.assertEqual(len(body), length)
        self.refused(
            imagec.InvalidDocument, "beyond its end", imagec.PrettySignature.parse, body
        )

    def test_signatures_refused(self):
        self.each(SIGNATURES_REFUSED, self._refused)

    def _refused(self, name, signatures, words):
        body = pretty(PAYLOAD, signatures)
        self.refused(
            imagec.InvalidDocument, words, imagec.PrettySignature.parse, body
        )

    def test_signatures_in_another_case(self):
        body = pretty(PAYLOAD).replace(b'"signatures"', b'"Signatures"')
        self.refused(
            imagec.InvalidDocument, "in another case",
            imagec.PrettySignature.parse, body,
        )

    def test_any_mutation_reads_or_is_refused(self):
        choices = random.Random(SEED)
        body = pretty(PAYLOAD)
        for length in range(len(body)):
            outcome(imagec.PrettySignature.parse, mutated(body, choices))
            outcome(imagec.PrettySignature.parse, body[:length])


# ------------------------------------------------------------------------------
# 6  Manifests
# ------------------------------------------------------------------------------

# What rows write instead of the media types.
MANIFEST_TYPES = {
    "oci": MEDIA_TYPES["oci"]["manifest"],
    "oci index": MEDIA_TYPES["oci"]["index"],
    "docker": MEDIA_TYPES["docker"]["manifest"],
    "docker list": MEDIA_TYPES["docker"]["index"],
    "schema1": MEDIA_TYPES["schema1"]["manifest"],
    "signed": MEDIA_TYPES["schema1-signed"]["manifest"],
}

SUM_A, SUM_B, SUM_C = ("sha256:" + digit * 64 for digit in "abc")
IMAGE_DOC = {
    "schemaVersion": 2,
    "config": {"mediaType": MEDIA_TYPES["oci"]["config"], "digest": SUM_A, "size": 7},
    "layers": [{"mediaType": "", "digest": SUM_B, "size": 8, "urls": ["https://h/x"],
                "annotations": {"k": "v"}}],
    "annotations": {"k": "v"},
}
DOCKER_DOC = dict(
    IMAGE_DOC,
    config=dict(IMAGE_DOC["config"], mediaType=MEDIA_TYPES["docker"]["config"]),
)
INDEX_DOC = {
    "schemaVersion": 2,
    "manifests": [
        {"mediaType": MANIFEST_TYPES["oci"], "digest": SUM_A, "size": 7,
         "platform": {"os": "linux", "architecture": "arm64", "variant": "v8",
                      "os.version": "", "os.features": ["x"]}},
        {"mediaType": MANIFEST_TYPES["oci index"], "digest": SUM_B, "size": 8},
    ],
}
V1_DOC = {"id": "a" * 64, "parent": "b" * 64, "throwaway": True, "os": "linux"}
SCHEMA1_DOC = {
    "schemaVersion": 1,
    "name": "library/x",
    "tag": "1",
    "architecture": "amd64",
    "fsLayers": [{"blobSum": SUM_A}, {"blobSum": SUM_B}],
    "history": [
        {"v1Compatibility": json.dumps(V1_DOC)},
        {"v1Compatibility": json.dumps({"id": "b" * 64})},
    ],
}
CONFIG_DOC = {
    "os": "linux",
    "architecture": "amd64",
    "variant": "v1",
    "created": CREATED,
    "author": "a",
    "config": {"Env": ["A=b"]},
    "container_config": {"Cmd": None},
    "rootfs": {"type": "layers", "diff_ids": [SUM_C]},
    "history": [
        {"created": CREATED, "created_by": "x", "author": "a", "comment": "c"},
        {"created_by": "y", "empty_layer": True},
    ],
}
PRETTY_DOC = dict(SCHEMA1_DOC, signatures=length_and_tail(0, json_bytes(SCHEMA1_DOC)))
DOCUMENTS = (
    ("image", IMAGE_DOC), ("index", INDEX_DOC), ("schema1", SCHEMA1_DOC),
    ("signed", PRETTY_DOC), ("config", CONFIG_DOC),
)

TYPES_DECIDED = (
    # Content-Type, mediaType, document, kind
    ("oci", "oci", IMAGE_DOC, "oci"),
    ("oci", None, IMAGE_DOC, "oci"),
    ("oci", None, DOCKER_DOC, "oci"),
    ("docker", "docker", DOCKER_DOC, "docker"),
    ("docker", "docker", IMAGE_DOC, "docker"),
    ("docker", None, IMAGE_DOC, "docker"),
    ("oci index", "oci index", INDEX_DOC, "oci index"),
    ("oci index", None, INDEX_DOC, "oci index"),
    ("docker list", "docker list", INDEX_DOC, "docker list"),
    ("docker list", None, INDEX_DOC, "docker list"),
    ("schema1", None, SCHEMA1_DOC, "schema1"),
    ("schema1", "schema1", SCHEMA1_DOC, "schema1"),
    ("signed", None, PRETTY_DOC, "signed"),
    # the signatures tell the two apart, whatever the header
    ("signed", None, SCHEMA1_DOC, "schema1"),
    ("schema1", None, PRETTY_DOC, "signed"),
    # parameters and case do not count
    ("DOCKER; charset=utf-8", None, IMAGE_DOC, "docker"),
    (" docker ;q=1", None, IMAGE_DOC, "docker"),
    # a header that names no manifest does not speak
    (None, "oci", IMAGE_DOC, "oci"),
    (None, "docker list", INDEX_DOC, "docker list"),
    ("", "docker", IMAGE_DOC, "docker"),
    ("application/json", "docker", IMAGE_DOC, "docker"),
    ("application/octet-stream", "oci index", INDEX_DOC, "oci index"),
    ("text/plain", None, IMAGE_DOC, "oci"),
    (None, None, IMAGE_DOC, "oci"),
    (None, None, DOCKER_DOC, "docker"),
    (None, None, INDEX_DOC, "oci index"),
    (None, None, SCHEMA1_DOC, "schema1"),
    (None, None, PRETTY_DOC, "signed"),
    # members of another kind that are null are not there
    (None, None, dict(IMAGE_DOC, manifests=None), "oci"),
    ("docker list", None, dict(INDEX_DOC, layers=None, config=None), "docker list"),
)

# T34, CVE-2021-41190: all that two clients could read as two things.
AMBIGUOUS = (
    # name, Content-Type, mediaType, document, words
    ("image and index", "oci", "oci", dict(IMAGE_DOC, **INDEX_DOC), "ambiguous"),
    ("image and index, as index", "oci index", "oci index",
     dict(IMAGE_DOC, **INDEX_DOC), "ambiguous"),
    ("index with layers", "oci index", None, dict(INDEX_DOC, layers=[]), "ambiguous"),
    ("index with config", "oci index", None, dict(INDEX_DOC, config={}), "ambiguous"),
    ("image with manifests", "oci", None, dict(IMAGE_DOC, manifests=[]), "ambiguous"),
    ("image with fsLayers", "docker", None, dict(IMAGE_DOC, fsLayers=[]), "ambiguous"),
    ("image with history", "oci", None, dict(IMAGE_DOC, history=[]), "ambiguous"),
    ("schema1 with layers", "schema1", None, dict(SCHEMA1_DOC, layers=[]), "ambiguous"),
    ("schema1 with config", "signed", None, dict(PRETTY_DOC, config={}), "ambiguous"),
    ("schema1 with index", None, None, dict(SCHEMA1_DOC, manifests=[]), "ambiguous"),
    ("everything", None, None, dict(SCHEMA1_DOC, **dict(IMAGE_DOC, **INDEX_DOC)),
     "ambiguous"),
    ("index with fsLayers", None, None, {"schemaVersion": 2, "manifests": [],
                                       "fsLayers": []}, "ambiguous"),
    ("index called image", "oci", "oci", INDEX_DOC, "has the shape of"),
    ("image called index", "oci index", "oci index", IMAGE_DOC, "has the shape of"),
    ("image called index by header", "oci index", None, IMAGE_DOC, "has the shape of"),
    ("index called image by header", "docker", None, INDEX_DOC, "has the shape of"),
    ("image called schema1", "signed", None, IMAGE_DOC, "has the shape of"),
    ("schema1 called image", "oci", None, SCHEMA1_DOC, "has the shape of"),
    ("schema1 called index", None, "oci index", SCHEMA1_DOC, "has the shape of"),
    ("two names for one shape", "docker", "oci", IMAGE_DOC, "calls itself"),
    ("two names for an index", "oci index", "docker list", INDEX_DOC, "calls itself"),
    ("header index, body image", "oci index", "oci", IMAGE_DOC, "calls itself"),
    ("header image, body index", "oci", "oci index", INDEX_DOC, "calls itself"),
    ("image of version 1", "oci", "oci", dict(IMAGE_DOC, schemaVersion=1),
     "schemaVersion is 1"),
    ("index of version 1", None, None, dict(INDEX_DOC, schemaVersion=1),
     "schemaVersion is 1"),
    ("schema1 of version 2", None, None, dict(SCHEMA1_DOC, schemaVersion=2),
     "schemaVersion is 2"),
    ("no version", None, None, dict(IMAGE_DOC, schemaVersion=None),
     "has no 'schemaVersion'"),
    ("version as text", None, None, dict(IMAGE_DOC, schemaVersion="2"),
     "must be a JSON integer"),
    ("no shape", "oci", "oci", {"schemaVersion": 2}, "is no manifest"),
    ("empty object", None, None, {}, "is no manifest"),
    # T35
    ("Layers beside layers", None, None, dict(IMAGE_DOC, Layers=[]), "in another case"),
    ("Manifests beside layers", None, None, dict(IMAGE_DOC, Manifests=[]),
     "in another case"),
    ("FSLAYERS beside manifests", None, None, dict(INDEX_DOC, FSLAYERS=[]),
     "in another case"),
    ("MediaType", None, None, dict(IMAGE_DOC, MediaType=MANIFEST_TYPES["oci index"]),
     "in another case"),
    ("long s", None, None, dict(INDEX_DOC, **{"layer\u017f": []}), "in another case"),
    ("schemaversion", None, None, dict(IMAGE_DOC, schemaversion=1), "in another case"),
)

OTHER_TYPES = (
    "application/vnd.oci.artifact.manifest.v1+json",
    "application/vnd.docker.plugin.v1+json",
    "text/html",
    "\x1b[2J",
)

# Values put in place of a member: document, path, value, words.
MEMBER_FAULTS = (
    ("image", ("config",), None, "has no 'config'"),
    ("image", ("config",), [], "'config' must be a JSON object"),
    ("image", ("layers",), None, "has no 'layers'"),
    ("image", ("layers",), {}, "'layers' must be a JSON array"),
    ("image", ("layers", 0), None, "manifest.layers[0] is not a JSON object"),
    ("image", ("config", "digest"), None, "manifest.config has no 'digest'"),
    ("image", ("config", "digest"), 5, "must be a JSON string"),
    # T01, T02, T14, T40
    ("image", ("layers", 0, "digest"), "sha256:../../x", "layers[0].digest: invalid"),
    ("image", ("layers", 0, "digest"), "", "layers[0].digest: invalid"),
    ("image", ("layers", 0, "digest"), SUM_A + "\n", "layers[0].digest: invalid"),
    ("image", ("layers", 0, "digest"), SUM_A.upper(), "layers[0].digest: invalid"),
    ("image", ("layers", 0, "digest"), "md5:" + "0" * 32, "layers[0].digest: invalid"),
    ("image", ("layers", 0, "digest"), "sha1:" + "0" * 40, "layers[0].digest: invalid"),
    ("index", ("manifests", 1, "digest"), "x", "manifests[1].digest: invalid"),
    ("schema1", ("fsLayers", 0, "blobSum"), "../x", "fsLayers[0].blobSum: invalid"),
    # T36
    ("image", ("layers", 0, "size"), None, "manifest.layers[0] has no 'size'"),
    ("image", ("layers", 0, "size"), True, "must be a JSON integer"),
    ("image", ("layers", 0, "size"), 1.0, "must be a JSON integer"),
    ("image", ("layers", 0, "size"), "5", "must be a JSON integer"),
    ("image", ("layers", 0, "size"), -1, "not a size"),
    ("image", ("layers", 0, "size"), 2 ** 53, "not a size"),
    ("image", ("layers", 0, "size"), 2 ** 70, "not a size"),
    ("image", ("config", "size"), -1, "not a size"),
    ("index", ("manifests", 0, "size"), -1, "not a size"),
    ("image", ("layers", 0, "urls"), "x", "must be a JSON array"),
    ("image", ("layers", 0, "urls"), [5], "'urls' must be strings"),
    ("image", ("layers", 0, "annotations"), [], "must be a JSON object"),
    ("image", ("layers", 0, "mediaType"), 5, "must be a JSON string"),
    ("image", ("layers", 0, "mediaType"), "\ud800", "not valid Unicode"),  # T13
    ("index", ("manifests",), "x", "must be a JSON array"),
    ("index", ("manifests", 0, "platform"), "linux", "must be a JSON object"),
    ("index", ("manifests", 0, "platform", "os"), 5, "must be a JSON string"),
    ("index", ("manifests", 0, "platform", "variant"), [], "must be a JSON string"),
    ("schema1", ("name",), 5, "must be a JSON string"),
    ("schema1", ("fsLayers",), None, "has no 'fsLayers'"),
    ("schema1", ("history",), None, "has no 'history'"),
    ("schema1", ("history", 0), "{}", "is not a JSON object"),
    ("schema1", ("history", 0, "v1Compatibility"), {}, "must be a JSON string"),
    ("schema1", ("history", 0, "v1Compatibility"), "", "is not valid JSON"),
    ("schema1", ("history", 0, "v1Compatibility"), "[]", "is not a JSON object"),
    ("schema1", ("history", 0, "v1Compatibility"), "[" * 99999, "nested too deep"),
    ("schema1", ("history", 0, "v1Compatibility"), '{"id":"","id":""}', "twice"),
)

# schema1 histories, newest first: each entry an id and a parent, a letter for 64.
CHAINS_READ = (
    # name, entries, what is left, oldest first
    ("one", ["a"], "a"),
    ("three", ["cb", "ba", "a"], "abc"),
    # docker drops the newer of neighbours with one id, and never sees its parent
    ("twice in a row", ["cb", "bf", "ba", "a"], "abc"),
    ("three in a row", ["ba", "bf", "bb", "ba", "a"], "ab"),
    ("the base twice", ["ab", "a"], "a"),
)
CHAINS_REFUSED = (
    # name, entries, words; T03, T33
    ("no entries", [], "must be as many and not none"),
    ("base with a parent", ["ba", "ac"], "base layer names a parent"),
    ("wrong parent", ["cb", "bf", "a"], "does not name the layer below"),
    ("no parent", ["cb", "b", "a"], "does not name the layer below"),
    ("own parent", ["bb", "a"], "does not name the layer below"),
    ("twice, apart", ["ba", "cb", "ba", "a"], "stands twice"),
    ("a loop", ["ab", "ba", "a"], "stands twice"),
)

# Signed payloads of a body that is a good schema1 manifest without them.
PAYLOADS_REFUSED = (
    (b"", "is not valid JSON"),
    (b"[]", "is not a JSON object"),
    (b"{}", "is no manifest"),
    (json_bytes(IMAGE_DOC), "no schema1 manifest"),
    (json_bytes(dict(SCHEMA1_DOC, layers=[])), "ambiguous"),
    (json_bytes(dict(SCHEMA1_DOC, schemaVersion=2)), "of the payload is not 1"),
)

# T03: what names a layer is 64 lowercase hex digits.
V1_FAULTS = (
    # v1Compatibility, words
    ({}, "has no 'id'"),
    ({"id": None}, "has no 'id'"),
    ({"id": ""}, "'id' is not 64"),
    ({"id": 5}, "must be a JSON string"),
    ({"id": "../../etc/cron.d/x"}, "'id' is not 64"),
    ({"id": "/" + "a" * 63}, "'id' is not 64"),
    ({"id": "a" * 63}, "'id' is not 64"),
    ({"id": "a" * 65}, "'id' is not 64"),
    ({"id": "A" * 64}, "'id' is not 64"),
    ({"id": "a" * 63 + "\n"}, "'id' is not 64"),
    ({"id": "a" * 64 + "\n"}, "'id' is not 64"),
    ({"id": "\u0661" * 64}, "'id' is not 64"),
    ({"id": "sha256:" + "a" * 57}, "'id' is not 64"),
    ({"id": "a" * 64, "parent": "../x"}, "'parent' is not 64"),
    ({"id": "a" * 64, "parent": "B" * 64}, "'parent' is not 64"),
    ({"id": "a" * 64, "parent": 0}, "must be a JSON string"),
    ({"id": "a" * 64, "throwaway": "yes"}, "must be a JSON boolean"),
    ({"id": "a" * 64, "ID": "b" * 64}, "in another case"),
    ({"id": "a" * 64, "Parent": "b" * 64}, "in another case"),
)

CONFIG_TYPES = (
    # config media type, whether it is an image's
    (MEDIA_TYPES["oci"]["config"], True),
    (MEDIA_TYPES["docker"]["config"], True),
    # old registries gave these to real images
    ("application/octet-stream", True),
    ("application/json", True),
    ("text/html", True),
    ("", True),
    ("application/vnd.docker.plugin.v1+json", False),
    ("application/vnd.oci.empty.v1+json", False),
    ("application/vnd.docker.ai.model.config.v0.1+json", False),
    ("application/vnd.cncf.helm.config.v1+json", False),
    ("application/vnd.wasm.config.v0+json", False),
    ("\x1b]0;x\x07", False),
)


def entry_platform(text):
    """The platform of an index entry: `-` is none at all, `{}` an empty one."""
    if text == "-":
        return {}
    parts = [] if text == "{}" else text.split("/")
    names = ("os", "architecture", "variant", "os.version")
    return {"platform": {name: part for name, part in zip(names, parts) if part}}


MATCHING = (
    # name, platform wanted, platforms of the entries, places of those that fit
    ("exact", "linux/arm64", "linux/amd64 linux/arm64 linux/arm/v7", [1, 2]),
    ("none", "linux/s390x", "linux/amd64 linux/arm64", []),
    ("other system", "linux/amd64", "windows/amd64 freebsd/amd64", []),
    ("aliases", "linux/amd64", "linux/x86_64 linux/amd64/v1 Linux/AMD64", [0, 1, 2]),
    ("docker's order", "linux/arm64",
     "linux/arm/v5 linux/arm/v7 linux/arm64/v8 linux/arm linux/arm/v8",
     [2, 4, 1, 3, 0]),
    ("arm v6", "linux/arm/v6", "linux/arm/v7 linux/arm/v5 linux/arm/v6", [2, 1]),
    ("amd64 levels", "linux/amd64/v3",
     "linux/386 linux/amd64 linux/amd64/v4 linux/amd64/v2", [3, 1, 0]),
    ("plain amd64", "linux/amd64", "linux/amd64/v2 linux/386 linux/amd64", [2, 1]),
    # T43: the first of equals, the same every time
    ("equals", "linux/amd64", "linux/amd64 linux/amd64 linux/amd64", [0, 1, 2]),
    ("attestations", "linux/amd64",
     "unknown/unknown linux/amd64 unknown/unknown", [1]),
    ("no platform", "linux/arm64", "- linux/arm64 - linux/arm/v5", [1, 3, 0, 2]),
    ("no platform at all", "linux/s390x", "- -", [0, 1]),
    # docker takes an empty platform for none: moby, toOCIPlatform
    ("empty platform", "linux/amd64", "{} linux/amd64", [1, 0]),
    # an absent system is this host's
    ("no system", "linux/amd64", "/amd64 linux/amd64", [0, 1]),
    ("no entries", "linux/amd64", "", []),
    # regclient compares three parts of a Windows version
    ("any build", "windows/amd64", "windows/amd64//10.0.1.1 windows/amd64", [0, 1]),
    ("build", "windows/amd64//10.0.17763.9",
     "windows/amd64//10.0.20348.1 windows/amd64//10.0.17763.1"
     " windows/amd64//10.0.17763.2 windows/amd64 windows/amd64//10.0.1776.3", [1, 2]),
)

# What a member may turn into.
ODD_VALUES = (
    None, True, -1, 5, 1.5, 2 ** 53, "", "x", "\ud800", "\x1b[2J", SUM_A, [], [None],
    [[]], {}, {"\ud800": "\ud800"},
)

# The httpd image of containers/image's fixtures: diffIDs, then chainIDs.
HTTPD_DIFF_IDS = (
    "142a601d97936307e75220c35dde0348971a9584c21e7cb42e1f7004005432ab",
    "90fcc66ad3be9f1757f954b750deb37032f208428aa12599fcb02182b9065a9c",
    "5a8624bb7e76d1e6829f9c64c43185e02bc07f97a2189eb048609a8914e72c56",
)
HTTPD_CHAIN_IDS = (
    "142a601d97936307e75220c35dde0348971a9584c21e7cb42e1f7004005432ab",
    "39cc9bc61f1d680287d64dbbb72e88b7aca7ee3c0f1939c2ea75d0b8753badd9",
    "66c05cb57dcb0902897832378391f1054c62054ad30034535b32223a3e114575",
)

CONFIGS_REFUSED = (
    # members changed, words
    ({"rootfs": None}, "has no 'rootfs'"),
    ({"rootfs": []}, "'rootfs' must be a JSON object"),
    ({"rootfs": {"type": "base", "diff_ids": []}}, "must be 'layers'"),
    ({"rootfs": {"diff_ids": "x"}}, "must be a JSON array"),
    ({"rootfs": {"diff_ids": [5]}}, "rootfs.diff_ids[0]: invalid digest"),
    ({"rootfs": {"diff_ids": [SUM_C, "../x"]}}, "rootfs.diff_ids[1]: invalid digest"),
    ({"rootfs": {"diff_ids": [SUM_C[7:]]}}, "rootfs.diff_ids[0]: invalid digest"),
    ({"rootfs": {"Diff_ids": []}}, "in another case"),
    ({"RootFS": {}}, "in another case"),
    ({"os": 5}, "must be a JSON string"),
    ({"architecture": "\ud800"}, "not valid Unicode"),
)


def type_header(text):
    """A Content-Type header written with the names of MANIFEST_TYPES."""
    name = (text or "").partition(";")[0].strip()
    kind = MANIFEST_TYPES.get(name.lower())
    if kind is None:
        return text
    return text.replace(name, kind.upper() if name.isupper() else kind)


def typed(document, media_type):
    """The JSON of a document that calls itself `media_type`, a name or None."""
    if media_type is not None:
        document = dict(document, mediaType=MANIFEST_TYPES[media_type])
    return json_bytes(document)


def planted(value, path, odd):
    """A copy of nested JSON with one place in it taken by something else."""
    if not path:
        return odd
    value = copy.copy(value)
    value[path[0]] = planted(value[path[0]], path[1:], odd)
    return value


def json_places(value, path=()):
    """The path of everything in nested JSON."""
    yield path
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, member in pairs:
            yield from json_places(member, path + (key,))


def odd_documents(document):
    """A document with each of its places in turn taken by each odd value."""
    for path in json_places(document):
        for odd in ODD_VALUES:
            yield (path, odd), planted(document, path, odd)


def schema1_document(entries):
    """A schema1 manifest of v1Compatibility values, newest first, blobs numbered."""
    sums = ["sha256:%064x" % number for number in range(len(entries))]
    return dict(
        SCHEMA1_DOC,
        fsLayers=[{"blobSum": each} for each in sums],
        history=[{"v1Compatibility": json.dumps(entry)} for entry in entries],
    )


def schema1_chain(entries):
    """A schema1 manifest of entries written as id and parent, a letter for 64."""
    names = ("id", "parent")
    return json_bytes(schema1_document(
        [{name: letter * 64 for name, letter in zip(names, entry)} for entry in entries]
    ))


def put_to_use(raw):
    """Decode a manifest or config and do with it all that these rooms can do."""
    document = imagec.parse_json(raw, "doc")
    if isinstance(document, dict) and "rootfs" in document:
        manifest = imagec.decode_manifest(json_bytes(IMAGE_DOC))
        return imagec.list_layers(manifest, imagec.ImageConfig.parse(raw))
    manifest = imagec.decode_manifest(raw)
    if isinstance(manifest, imagec.Index):
        wanted = imagec.Platform.parse("linux/arm64")
        found = [each.platform for each in manifest.manifests if each.platform]
        str(imagec.NoMatchingPlatform(wanted, found))
        return imagec.matching(manifest, wanted)
    if isinstance(manifest, imagec.Manifest):
        manifest.require_image()
        config = imagec.ImageConfig.parse(json_bytes(CONFIG_DOC))
        return imagec.list_layers(manifest, config)
    return imagec.list_layers(manifest)


class ManifestsTest(TableCase):
    """Bytes become one kind of manifest, or an InvalidDocument."""

    def test_types_decided(self):
        self.each(TYPES_DECIDED, self._type_decided)

    def _type_decided(self, header, media_type, document, kind):
        raw = typed(document, media_type)
        found = imagec.decode_manifest(raw, type_header(header))
        self.assertEqual(found.media_type, MANIFEST_TYPES[kind])
        self.assertEqual(found.raw, raw)

    def test_ambiguous(self):
        self.each(AMBIGUOUS, self._ambiguous)

    def _ambiguous(self, name, header, media_type, document, words):
        raw, header = typed(document, media_type), type_header(header)
        self.refused(
            imagec.InvalidDocument, words, imagec.decode_manifest, raw, header
        )
        digest = imagec.Digest.of(raw)
        self.refused(
            imagec.InvalidDocument, words, imagec.decode_manifest, raw, header, digest
        )

    def test_other_types_are_unsupported(self):
        for media_type in OTHER_TYPES:
            raw = json_bytes(dict(IMAGE_DOC, mediaType=media_type))
            self.refused(
                imagec.Unsupported, "not an image", imagec.decode_manifest, raw
            )

    def test_member_faults(self):
        self.each(MEMBER_FAULTS, self._member_fault)

    def _member_fault(self, name, path, odd, words):
        with self.subTest(path=path, odd=odd):
            raw = json_bytes(planted(dict(DOCUMENTS)[name], path, odd))
            self.refused(imagec.InvalidDocument, words, imagec.decode_manifest, raw)

    def test_image(self):
        raw = json_bytes(IMAGE_DOC)
        found = imagec.decode_manifest(raw)
        self.assertEqual(found.config[:3], (MEDIA_TYPES["oci"]["config"],
                                            imagec.Digest.parse(SUM_A), 7))
        layer, = found.layers
        self.assertEqual((str(layer.digest), layer.size), (SUM_B, 8))
        self.assertEqual((layer.platform, layer.urls), (None, ("https://h/x",)))
        self.assertEqual(layer.annotations, {"k": "v"})

    def test_index(self):
        found = imagec.decode_manifest(json_bytes(INDEX_DOC))
        first, nested = found.manifests
        self.assertEqual(first.platform, ("linux", "arm64", "", ""))
        self.assertEqual(nested.platform, None)
        self.assertEqual(nested.media_type, MANIFEST_TYPES["oci index"])

    def test_built_images(self):
        layers = [tar_bytes([("a", b"1")]), None, tar_bytes([("b", b"2")])]
        for kind in ("oci", "docker", "schema1", "schema1-signed"):
            with self.subTest(kind):
                self._built(kind, build_image(layers, kind=kind))

    def _built(self, kind, image):
        digest = imagec.Digest.parse(image.digest)
        found = imagec.decode_manifest(image.manifest, image.media_type, digest)
        self.assertEqual(found.media_type, image.media_type)
        self.assertEqual((found.raw, found.digest), (image.manifest, digest))
        config = image.config and imagec.ImageConfig.parse(image.config)
        listed = imagec.list_layers(found, config)
        blobs = [str(layer.blob.digest) for layer in listed]
        if kind.startswith("schema1"):
            blobs.remove(sha256(EMPTY_LAYER))
        else:
            diff_ids = [str(layer.diff_id) for layer in listed]
            self.assertEqual(diff_ids, image.diff_ids)
        self.assertEqual(blobs, image.layers)

    def test_digest_decides(self):
        for algorithm in ("sha256", "sha384", "sha512"):
            raw = json_bytes(IMAGE_DOC)
            digest = imagec.Digest.of(raw, algorithm)
            self.assertEqual(imagec.decode_manifest(raw, None, digest).digest, digest)

    def test_wrong_digest(self):
        # T20: another valid manifest, or bytes that are none, are the wrong bytes first
        right = json_bytes(IMAGE_DOC)
        digest = imagec.Digest.of(right)
        for raw in (json_bytes(DOCKER_DOC), right + b"\n", b"<html>", b"",
                    SIGNED_MANIFEST, pretty(PAYLOAD)):
            error = self.refused(
                imagec.DigestMismatch, str(digest), imagec.decode_manifest, raw, None,
                digest, "thing",
            )
            self.assertEqual((error.what, error.expected), ("thing", digest))

    def test_counts(self):
        for document, name, limit in (
            (IMAGE_DOC, "layers", "LAYER_COUNT_LIMIT"),
            (SCHEMA1_DOC, "history", "LAYER_COUNT_LIMIT"),
            (INDEX_DOC, "manifests", "INDEX_COUNT_LIMIT"),
        ):
            raw = json_bytes(dict(document, **{name: document[name][:1] * 4}))
            with self.subTest(name), mock.patch.object(imagec, limit, 3):
                self.refused(
                    imagec.LimitExceeded, "limit of 3", imagec.decode_manifest, raw
                )

    def test_as_many_layers_as_the_limit(self):
        layers = IMAGE_DOC["layers"] * imagec.LAYER_COUNT_LIMIT
        found = imagec.decode_manifest(json_bytes(dict(IMAGE_DOC, layers=layers)))
        self.assertEqual(len(found.layers), len(layers))

    def test_one_digest_has_one_size(self):
        layer = IMAGE_DOC["layers"][0]
        other = dict(layer, digest=SUM_C)
        raw = json_bytes(dict(IMAGE_DOC, layers=[layer, other, layer]))
        found = [str(each.digest) for each in imagec.decode_manifest(raw).layers]
        self.assertEqual(found, [SUM_B, SUM_C, SUM_B])
        # T44
        raw = json_bytes(dict(IMAGE_DOC, layers=[layer, other, dict(layer, size=9)]))
        words = "two sizes for " + SUM_B
        self.refused(imagec.InvalidDocument, words, imagec.decode_manifest, raw)

    def test_config_types(self):
        self.each(CONFIG_TYPES, self._config_type)

    def _config_type(self, media_type, image):
        raw = json_bytes(planted(IMAGE_DOC, ("config", "mediaType"), media_type))
        found = imagec.decode_manifest(raw)
        if image:
            found.require_image()
        else:
            self.refused(
                imagec.Unsupported, "not a container image", found.require_image
            )


class Schema1Test(TableCase):
    """What docker checked of a schema1 manifest, and what its digest covers."""

    def test_known_answer(self):
        digest = imagec.Digest("sha256", SIGNED_DIGEST)
        for wanted in (None, digest):
            found = imagec.decode_manifest(SIGNED_MANIFEST, None, wanted)
            self.assertEqual(found.digest, digest)
            self.assertEqual(found.media_type, MANIFEST_TYPES["signed"])
            self.assertEqual((found.name, found.tag, found.architecture),
                             ("library/hello-world", "latest", "amd64"))
            self.assertEqual(tuple(layer.id for layer in found.layers), SIGNED_IDS)

    def test_layers_listed(self):
        layers = imagec.list_layers(imagec.decode_manifest(SIGNED_MANIFEST))
        newest = json.loads(SIGNED_MANIFEST.decode("ascii"))["history"][0]
        self.assertEqual(layers[1].v1_json, newest["v1Compatibility"])
        self.assertEqual(str(layers[1].blob.digest), sha256(EMPTY_LAYER))
        self.assertEqual([layer.diff_id for layer in layers], [None, None])
        self.assertEqual([layer.blob.size for layer in layers], [None, None])

    def test_the_body_has_no_digest(self):
        # Two digests for one manifest would be two names.
        digest = imagec.Digest.of(SIGNED_MANIFEST)
        self.refused(
            imagec.DigestMismatch, SIGNED_DIGEST, imagec.decode_manifest,
            SIGNED_MANIFEST, None, digest,
        )

    def test_a_flipped_byte_of_the_payload(self):
        digest = imagec.Digest("sha256", SIGNED_DIGEST)
        raw = SIGNED_MANIFEST.replace(b"hello-world", b"hello-wurld", 1)
        self.refused(
            imagec.DigestMismatch, SIGNED_DIGEST, imagec.decode_manifest, raw, None,
            digest,
        )

    def test_what_no_digest_covers_is_not_read(self):
        # T31, CVE-2014-8179
        document = {k: v for k, v in SCHEMA1_DOC.items() if k not in ("name", "tag")}
        payload = json.dumps(document, indent=1).encode("ascii")
        raw = pretty(payload, injected=b'"name": "evil", "tag": "evil", ')
        for digest in (None, imagec.Digest.of(payload)):
            found = imagec.decode_manifest(raw, None, digest)
            self.assertEqual((found.name, found.tag, len(found.layers)), ("", "", 2))
            self.assertEqual(found.digest, imagec.Digest.of(payload))

    def test_members_that_change_the_kind(self):
        payload = json.dumps(SCHEMA1_DOC, indent=1).encode("ascii")
        raw = pretty(payload, injected=b'"layers": [], ')
        self.refused(imagec.InvalidDocument, "ambiguous", imagec.decode_manifest, raw)
        found = imagec.decode_manifest(raw, None, imagec.Digest.of(payload))
        self.assertEqual(len(found.layers), 2)

    def test_members_injected_twice(self):
        payload = json.dumps(SCHEMA1_DOC, indent=1).encode("ascii")
        raw = pretty(payload, injected=b'"fsLayers": [], ')
        self.refused(imagec.InvalidDocument, "twice", imagec.decode_manifest, raw)
        with self.assertRaises(imagec.VerificationError):
            imagec.decode_manifest(raw, None, imagec.Digest.of(payload))

    def test_only_schema1_is_signed(self):
        payload = json.dumps(IMAGE_DOC, indent=1).encode("ascii")
        self.refused(
            imagec.InvalidDocument, "signed, but not schema1", imagec.decode_manifest,
            pretty(payload), None, imagec.Digest.of(payload),
        )

    def test_payloads_refused(self):
        self.each(PAYLOADS_REFUSED, self._payload_refused)

    def _payload_refused(self, payload, words):
        raw = json_bytes(dict(SCHEMA1_DOC, signatures=length_and_tail(0, payload)))
        self.refused(imagec.InvalidDocument, words, imagec.decode_manifest, raw)

    def test_chains_read(self):
        self.each(CHAINS_READ, self._chain_read)

    def _chain_read(self, name, entries, expected):
        found = imagec.decode_manifest(schema1_chain(entries))
        self.assertEqual("".join(layer.id[0] for layer in found.layers), expected)
        # Of neighbours the older stays, and its blob with it.
        kept = [max(i for i, entry in enumerate(entries) if entry[0] == letter)
                for letter in expected]
        blobs = [int(layer.blob.digest.hex, 16) for layer in found.layers]
        for blob, place, letter in zip(blobs, kept, expected):
            self.assertEqual(entries[blob][0], letter)
            self.assertEqual(blob, place)

    def test_chains_refused(self):
        self.each(CHAINS_REFUSED, self._chain_refused)

    def _chain_refused(self, name, entries, words):
        raw = schema1_chain(entries)
        self.refused(imagec.InvalidDocument, words, imagec.decode_manifest, raw)

    def test_as_many_layers_as_history(self):
        for name in ("fsLayers", "history"):
            raw = json_bytes(dict(SCHEMA1_DOC, **{name: SCHEMA1_DOC[name][:1]}))
            self.refused(
                imagec.InvalidDocument, "must be as many", imagec.decode_manifest, raw
            )

    def test_v1_faults(self):
        self.each(V1_FAULTS, self._v1_fault)

    def _v1_fault(self, entry, words):
        raw = json_bytes(schema1_document([entry]))
        self.refused(imagec.InvalidDocument, words, imagec.decode_manifest, raw)

    def test_throwaway_and_shared_blobs(self):
        document = dict(SCHEMA1_DOC, fsLayers=[{"blobSum": SUM_A}] * 2)
        found = imagec.decode_manifest(json_bytes(document))
        self.assertEqual([layer.throwaway for layer in found.layers], [False, True])
        blobs = [str(layer.blob.digest) for layer in found.layers]
        self.assertEqual(blobs, [SUM_A, SUM_A])

    def test_an_empty_parent_is_none(self):
        document = schema1_document([{"id": "a" * 64, "parent": ""}])
        self.assertEqual(len(imagec.decode_manifest(json_bytes(document)).layers), 1)

    def test_any_v1_value_reads_or_is_refused(self):
        self.none_stray(put_to_use, (
            (name, json_bytes(schema1_document([entry])))
            for name, entry in odd_documents(V1_DOC)
        ))


class AnyManifestTest(TableCase):
    """Whatever the bytes, no error but ImagecError."""

    def test_any_value(self):
        self.each(DOCUMENTS, self._any_value)

    def _any_value(self, name, document):
        self.none_stray(put_to_use, (
            (place, json_bytes(odd)) for place, odd in odd_documents(document)
        ))

    def test_any_truncation(self):
        self.each(DOCUMENTS, self._any_truncation)

    def _any_truncation(self, name, document):
        raw = json_bytes(document)
        self.assertNotIsInstance(outcome(put_to_use, raw), Exception)
        for length in range(len(raw)):
            found = outcome(put_to_use, raw[:length])
            self.assertIsInstance(found, imagec.InvalidDocument, length)

    def test_any_mutation(self):
        self.each(DOCUMENTS, self._any_mutation)

    def _any_mutation(self, name, document):
        choices = random.Random(SEED)
        mutants = [mutated(json_bytes(document), choices) for _ in range(300)]
        self.none_stray(put_to_use, zip(mutants, mutants))

    def test_any_depth(self):
        # T54: what just fits on the stack when read has to be written too
        raw = json_bytes(dict(CONFIG_DOC, x="@"))
        limit = self._depth_limit()
        self.none_stray(put_to_use, (
            (depth, raw.replace(b'"@"', b"[" * depth + b"]" * depth))
            for depth in range(limit - 50, limit + 1)
        ))

    def _depth_limit(self):
        """The least depth of JSON that is refused, found by halving."""
        good, bad = 1, 200000
        while bad - good > 1:
            depth = (good + bad) // 2
            found = outcome(imagec.parse_json, b"[" * depth + b"]" * depth, "doc")
            good, bad = (good, depth) if isinstance(found, Exception) else (depth, bad)
        return bad


class MatchingTest(TableCase):
    """Of an index, what fits a platform, best first."""

    def test_matching(self):
        self.each(MATCHING, self._matching)

    def _matching(self, name, wanted, platforms, places):
        entries = [
            dict(entry_platform(text), size=place, digest=SUM_A,
                 mediaType=MANIFEST_TYPES["oci"])
            for place, text in enumerate(platforms.split())
        ]
        raw = json_bytes(dict(INDEX_DOC, manifests=entries))
        platform = imagec.Platform.normal(*wanted.split("/"))
        found = imagec.matching(imagec.decode_manifest(raw), platform)
        self.assertEqual([entry.size for entry in found], places)

    def test_only_manifests_match(self):
        platform = entry_platform("linux/amd64")
        kinds = ["application/vnd.example", "", MANIFEST_TYPES["docker"],
                 MANIFEST_TYPES["oci index"]]
        entries = [
            dict(platform, size=place, digest=SUM_A, mediaType=kind)
            for place, kind in enumerate(kinds)
        ]
        index = imagec.decode_manifest(json_bytes(dict(INDEX_DOC, manifests=entries)))
        found = imagec.matching(index, imagec.Platform.parse("linux/amd64"))
        self.assertEqual([entry.size for entry in found], [2, 3])


class LayersTest(TableCase):
    """A manifest and its config become layers with names of their own."""

    def _listed(self, count=1, **members):
        layers = [{"digest": "sha256:%064x" % i, "size": i} for i in range(count)]
        manifest = imagec.decode_manifest(json_bytes(dict(IMAGE_DOC, layers=layers)))
        config = imagec.ImageConfig.parse(json_bytes(dict(CONFIG_DOC, **members)))
        return imagec.list_layers(manifest, config)

    def _httpd(self, **members):
        diff_ids = ["sha256:" + digits for digits in HTTPD_DIFF_IDS]
        rootfs = {"type": "layers", "diff_ids": diff_ids}
        return self._listed(3, rootfs=rootfs, **members)

    def test_known_chain(self):
        found = self._httpd()
        self.assertEqual(tuple(layer.id for layer in found), HTTPD_CHAIN_IDS)
        self.assertEqual(tuple(each.diff_id.hex for each in found), HTTPD_DIFF_IDS)
        self.assertEqual([layer.blob.size for layer in found], [0, 1, 2])

    def test_each_names_its_parent(self):
        images = [json.loads(layer.v1_json) for layer in self._httpd()]
        self.assertEqual(tuple(image["id"] for image in images), HTTPD_CHAIN_IDS)
        parents = tuple(image.get("parent") for image in images)
        self.assertEqual(parents, (None,) + HTTPD_CHAIN_IDS[:2])

    def test_the_newest_has_the_config(self):
        history = [
            {"created": "1", "created_by": "a"},
            {"empty_layer": True},
            {"created": "2", "created_by": "b"},
            {"author": "me", "comment": "c"},
        ]
        images = [json.loads(each.v1_json) for each in self._httpd(history=history)]
        self.assertEqual([image["created"] for image in images], ["1", "2", CREATED])
        commands = [image["container_config"]["Cmd"] for image in images]
        self.assertEqual(commands, [["a"], ["b"], None])
        self.assertEqual([image.get("config") for image in images],
                         [None, None, CONFIG_DOC["config"]])
        self.assertEqual((images[2]["author"], images[2]["comment"]), ("me", "c"))
        self.assertEqual([image["os"] for image in images], ["linux"] * 3)
        self.assertFalse({"rootfs", "history"} & set(images[2]))

    def test_history_that_does_not_fit(self):
        for history in (None, [], [{"created": "1"}], [5, None], {}, "abc", 5, True):
            with self.subTest(history):
                found = self._httpd(history=history)
                first = json.loads(found[0].v1_json)
                self.assertEqual(first["created"], "1970-01-01T00:00:00Z")

    def test_as_many_diff_ids_as_layers(self):
        # T26
        for count in (0, 2, 3):
            with self.assertRaises(imagec.VerificationError) as caught:
                self._listed(count)
            self.assertEqual(str(caught.exception),
                             "config lists 1 diffIDs, the manifest %d layers" % count)

    def test_no_layers(self):
        for rootfs in ({}, {"diff_ids": None}, {"type": "layers", "diff_ids": []}):
            self.assertEqual(self._listed(0, rootfs=rootfs), ())

    def test_configs_refused(self):
        self.each(CONFIGS_REFUSED, self._config_refused)

    def _config_refused(self, members, words):
        raw = json_bytes(dict(CONFIG_DOC, **members))
        self.refused(imagec.InvalidDocument, words, imagec.ImageConfig.parse, raw)

    def test_config_platform(self):
        config = imagec.ImageConfig.parse(json_bytes(CONFIG_DOC))
        self.assertEqual(config.platform, ("linux", "amd64", "", ""))
        self.assertEqual(config.value, CONFIG_DOC)

    def test_lone_surrogates(self):
        # T13: Go reads them as U+FFFD
        for members in ({"author": "\ud800"}, {"config": {"Labels": {"\udfff": ""}}}):
            outcome(self._httpd, **members)


# ------------------------------------------------------------------------------
# 7  Verification
# ------------------------------------------------------------------------------

# Tars are written here field by field: tarfile refuses to make most of these.
TAR_END = bytes(1024)
GNU_MAGIC = (257, b"ustar  \0")
CHECKSUM = slice(148, 156)


def tar_header(size=0, kind=b"0", name=b"f", patches=()):
    """A ustar header; `size` may be the field itself, patches are (offset, bytes)."""
    size = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(name.ljust(100, b"\0"))
    block += b"0000644\0" + b"0000000\0" * 2 + size + b"00000000000\0" + b" " * 8 + kind
    block = block.ljust(257, b"\0") + b"ustar\00000"
    block = block.ljust(512, b"\0")
    for offset, data in patches:
        block[offset:offset + len(data)] = data
    block[CHECKSUM] = b"%06o\0 " % sum(block)
    return bytes(block)


def in_blocks(data):
    """Data padded to whole blocks."""
    return data + bytes(-len(data) % 512)


def tar_member(content=b"", size=None, **header):
    """A header and its content; the header may claim another size."""
    size = len(content) if size is None else size
    return tar_header(size, **header) + in_blocks(content)


def pax_records(*pairs):
    """Pax records, each with its own length in front."""
    records = b""
    for key, value in pairs:
        text = b" %s=%s\n" % (key, value)
        length = next(n for n in itertools.count(len(text) + 1)
                      if len(b"%d" % n) + len(text) == n)
        records += b"%d%s" % (length, text)
    return records


def pax(*pairs, kind=b"x"):
    """An extended header for the next member, or with kind g for all."""
    return tar_member(pax_records(*pairs), kind=kind)


def old_sparse(content, size, more=0):
    """An old GNU sparse file of that logical size, its map going on in more blocks."""
    first, rest = b"%011o\0%011o\0" % (0, len(content)), b"%011o\0%011o\0" % (size, 0)
    patches = [GNU_MAGIC, (386, first + rest * 3), (482, bytes([more > 0])),
               (483, b"%011o\0" % size)]
    header = tar_header(len(content), kind=b"S", patches=patches)
    for left in reversed(range(more)):
        header += rest * 21 + bytes([left > 0]) + bytes(7)
    return header + in_blocks(content)


def pax_sparse(version, content, size):
    """A sparse file as GNU tar writes it in pax: all of it one hole and one extent."""
    offset = size - len(content)
    extent = [(b"GNU.sparse.offset", b"%d" % offset),
              (b"GNU.sparse.numbytes", b"%d" % len(content))]
    if version == "0.0":
        keys = [(b"GNU.sparse.size", b"%d" % size), (b"GNU.sparse.numblocks", b"1")]
        return pax(*keys + extent) + tar_member(content)
    if version == "0.1":
        keys = [(b"GNU.sparse.name", b"f"), (b"GNU.sparse.size", b"%d" % size),
                (b"GNU.sparse.numblocks", b"1"),
                (b"GNU.sparse.map", b"%d,%d" % (offset, len(content)))]
        return pax(*keys) + tar_member(content)
    keys = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.name", b"f"), (b"GNU.sparse.realsize", b"%d" % size)]
    stored_map = in_blocks(b"1\n%d\n%d\n" % (offset, len(content)))
    return pax(*keys) + tar_member(stored_map + content)


NOISE = bytes(random.Random(SEED).choices(range(256), k=600))
TAR_TEXT = b"hello, world\n" * 50  # 650 bytes: two blocks
A_FILE = tar_member(TAR_TEXT)

GOOD_TARS = (
    # name, bytes, size, members
    ("nothing", b"", 0, 0),
    ("an end", TAR_END, 0, 0),
    ("zeros", bytes(10240), 0, 0),
    ("zeros, not in blocks", bytes(1500), 0, 0),
    ("a file", A_FILE + TAR_END, 650, 1),
    ("files", A_FILE * 3 + TAR_END, 1950, 3),
    # Go's archive/tar takes both of these
    ("no end", A_FILE, 650, 1),
    ("half an end", A_FILE + bytes(512), 650, 1),
    ("padded", A_FILE + bytes(10240 - len(A_FILE)), 650, 1),
    ("an empty file", tar_member() + TAR_END, 0, 1),
    ("old type", tar_member(TAR_TEXT, kind=b"\0") + TAR_END, 650, 1),
    ("contiguous", tar_member(TAR_TEXT, kind=b"7") + TAR_END, 650, 1),
    ("size without NUL", tar_header(b"000000001212") + in_blocks(TAR_TEXT), 650, 1),
    ("size with blanks", tar_header(b"       1212 ") + in_blocks(TAR_TEXT), 650, 1),
    ("blank size", tar_header(b" " * 12), 0, 1),
    ("NULs for a size", tar_header(bytes(12), kind=b"5"), 0, 1),
    ("base-256 size",
     tar_header(b"\x80" + bytes(9) + b"\2\x8a") + in_blocks(TAR_TEXT), 650, 1),
    # POSIX: nothing follows these, whatever size they claim
    ("hard link with a size", tar_header(650, kind=b"1") + A_FILE, 650, 2),
    ("symbolic link with a size", tar_header(650, kind=b"2") + A_FILE, 650, 2),
    ("device with a size", tar_header(650, kind=b"3") + A_FILE, 650, 2),
    ("directory with a size", tar_header(650, kind=b"5") + A_FILE, 650, 2),
    ("fifo with a size", tar_header(650, kind=b"6") + A_FILE, 650, 2),
    ("old directory", tar_header(650, kind=b"\0", name=b"d/") + A_FILE, 650, 2),
    # what the whole name says, not what a short field keeps of it
    ("old type, pax name", pax((b"path", b"d/f"))
     + tar_member(TAR_TEXT, kind=b"\0", name=b"d/"), 650, 1),
    ("old type, long name", tar_member(b"d/f\0", kind=b"L")
     + tar_member(TAR_TEXT, kind=b"\0", name=b"d/"), 650, 1),
    ("old directory, pax name", pax((b"path", b"d/"))
     + tar_header(650, kind=b"\0") + A_FILE, 650, 2),
    ("old directory, long name", tar_member(b"d/\0", kind=b"L")
     + tar_header(650, kind=b"\0") + A_FILE, 650, 2),
    ("pax size", pax((b"size", b"650")) + tar_header(0) + in_blocks(TAR_TEXT), 650, 1),
    ("pax size over base-256",
     pax((b"size", b"650")) + tar_header(b"\x80" + b"\x7f" * 11) + in_blocks(TAR_TEXT),
     650, 1),
    ("pax size once", pax((b"size", b"650")) + tar_header(0) + in_blocks(TAR_TEXT)
     + tar_member(b"x"), 651, 2),
    ("pax size twice", pax((b"size", b"9"), (b"size", b"650")) + A_FILE, 650, 1),
    ("pax value with odd bytes", pax((b"path", b"a=\n\0\xff")) + A_FILE, 650, 1),
    ("pax of Solaris", pax((b"path", b"x"), kind=b"X") + A_FILE, 650, 1),
    ("empty pax", tar_member(kind=b"x") + A_FILE, 650, 1),
    ("global pax", pax((b"comment", b"0" * 40), kind=b"g") + A_FILE * 2, 1300, 2),
    ("GNU long name", tar_member(b"n" * 600 + b"\0", kind=b"L") + A_FILE, 650, 1),
    ("GNU long link", tar_member(b"n" * 600 + b"\0", kind=b"K")
     + tar_header(kind=b"2") + A_FILE, 650, 2),
    ("GNU long name and link",
     tar_member(b"n\0", kind=b"L") + tar_member(b"k\0", kind=b"K") + A_FILE, 650, 1),
    ("old sparse", old_sparse(TAR_TEXT, 100000) + A_FILE, 100650, 2),
    ("old sparse, one more block", old_sparse(TAR_TEXT, 100000, 1) + A_FILE, 100650, 2),
    ("old sparse, three more", old_sparse(TAR_TEXT, 100000, 3) + A_FILE, 100650, 2),
    ("old sparse, a hole", old_sparse(b"", 1 << 30, 2) + A_FILE, (1 << 30) + 650, 2),
    ("pax sparse 0.0", pax_sparse("0.0", TAR_TEXT, 100000) + A_FILE, 100650, 2),
    ("pax sparse 0.1", pax_sparse("0.1", TAR_TEXT, 100000) + A_FILE, 100650, 2),
    ("pax sparse 1.0", pax_sparse("1.0", TAR_TEXT, 100000) + A_FILE, 100650, 2),
    # T27: bytes after the end are hashed, and are no members
    ("second tar", A_FILE + TAR_END + A_FILE + TAR_END, 650, 1),
    ("junk after the end", A_FILE + TAR_END + b"junk", 650, 1),
)

# Rows that tarfile cannot vouch for: it reads no empty file, gives up at an empty pax
# header, and tells an old directory by its short name.
NOT_FOR_TARFILE = ("nothing", "empty pax", "old type, pax name", "old type, long name",
                   "old directory, pax name", "old directory, long name")


def with_flipped_checksum(block):
    """A header block whose checksum is off by one."""
    return block[:154] + bytes([block[154] ^ 1]) + block[155:]


BAD_TARS = (
    # name, bytes, words
    ("text", b"not a tar at all", "cut short"),
    ("more text", b"not a tar at all " * 40, "not a valid tar after 0 members"),
    # T30
    ("XML", b"<Error><Code>NoSuchKey</Code></Error>".ljust(600), "after 0 members"),
    ("a gzip inside", gzip_bytes(NOISE), "after 0 members"),
    # T29: tarfile ends here without a word
    ("second checksum", A_FILE + with_flipped_checksum(A_FILE[:512]) + A_FILE[512:],
     "after 1 members"),
    ("second header", A_FILE + b"x" * 512, "after 1 members"),
    ("shifted by one", A_FILE + b"\0" + A_FILE, "after 1 members"),
    ("data after a zero block", A_FILE + bytes(512) + A_FILE, "after a zero block"),
    ("half a header", A_FILE + A_FILE[:300], "cut short"),
    ("one byte of zeros", A_FILE + b"\0", "cut short"),
    ("cut in content", A_FILE[:-600], "cut short"),
    ("cut in padding", A_FILE[:-1], "cut short"),
    ("header alone", A_FILE[:512], "cut short"),
    ("cut in a long name", tar_member(b"n" * 600, kind=b"L")[:-1], "cut short"),
    ("cut in a sparse map", old_sparse(b"", 9, 2)[:-512], "cut short"),
    ("size too large", tar_header(1 << 30) + A_FILE, "cut short"),
    ("size too small", tar_header(5) + in_blocks(TAR_TEXT) + A_FILE, "after 1 members"),
    # T153
    ("negative base-256 size", tar_header(b"\xff" * 12) + A_FILE, "negative size"),
    ("least base-256 size", tar_header(b"\xff" + bytes(11)) + A_FILE, "negative size"),
    ("negative octal size", tar_header(b"-0000000010\0") + A_FILE, "after 0 members"),
    ("negative size of a link", tar_header(b"\xff" * 12, kind=b"1"), "negative size"),
    ("negative size of pax", tar_header(b"\xff" * 12, kind=b"x"), "negative size"),
    ("negative sparse size", tar_header(0, kind=b"S", patches=[
        GNU_MAGIC, (483, b"\xff" * 12)]), "negative size"),
    ("not octal", tar_header(b"00000000018\0"), "after 0 members"),
    ("hexadecimal", tar_header(b"0000000000a\0"), "after 0 members"),
    # T02: what int() takes and no other tar does
    ("underscore", tar_header(b"0000000_001\0") + bytes(512), "after 0 members"),
    ("plus sign", tar_header(b"+0000000001\0") + bytes(512), "after 0 members"),
    ("prefix", tar_header(b"0o000000001\0") + bytes(512), "after 0 members"),
    # Python reads 0, Go's archive/tar 1
    ("NUL first", tar_header(b"\0" + b"0000000001\0") + bytes(512), "after 0 members"),
    ("pax size -1", pax((b"size", b"-1")) + A_FILE, "is not a number"),
    ("pax size +5", pax((b"size", b"+5")) + A_FILE, "is not a number"),
    ("pax size 1_0", pax((b"size", b"1_0")) + A_FILE, "is not a number"),
    ("pax size with blank", pax((b"size", b" 650")) + A_FILE, "is not a number"),
    ("pax size empty", pax((b"size", b"")) + A_FILE, "is not a number"),
    ("pax size with NUL", pax((b"size", b"650\0")) + A_FILE, "is not a number"),
    ("pax size 6.5e2", pax((b"size", b"6.5e2")) + A_FILE, "is not a number"),
    ("pax size, Arabic digits",
     pax((b"size", "\u0661".encode("utf-8"))) + A_FILE, "is not a number"),
    ("pax size of 19 digits", pax((b"size", b"9" * 19)) + A_FILE, "is not a number"),
    ("pax size too large", pax((b"size", b"9" * 10)) + A_FILE, "cut short"),
    ("pax realsize", pax((b"GNU.sparse.realsize", b"-1")) + A_FILE, "is not a number"),
    ("global size", pax((b"size", b"5"), kind=b"g") + A_FILE, "renames every member"),
    ("global path", pax((b"path", b"x"), kind=b"g") + A_FILE, "renames every member"),
    ("global link", pax((b"linkpath", b"x"), kind=b"g") + A_FILE, "renames every"),
    ("pax without equals", tar_member(b"4 a\n", kind=b"x") + A_FILE, "malformed pax"),
    ("pax without length", tar_member(b"a=b\n", kind=b"x") + A_FILE, "malformed pax"),
    ("pax of length 0", tar_member(b"0 a=b\n", kind=b"x") + A_FILE, "malformed pax"),
    ("pax of length 1", tar_member(b"1 a=b\n", kind=b"x") + A_FILE, "malformed pax"),
    ("pax negative", tar_member(b"-6 a=b\n", kind=b"x") + A_FILE, "malformed pax"),
    ("pax too short", tar_member(b"5 a=b\n", kind=b"x") + A_FILE, "malformed pax"),
    ("pax, no newline", tar_member(b"5 a=b6 c=d\n", kind=b"x") + A_FILE, "malformed"),
    ("pax too long", tar_member(b"9 a=b\n", kind=b"x") + A_FILE, "pax"),
    ("pax of many digits", tar_member(b"9" * 400 + b" a=\n", kind=b"x"), "malformed"),
    ("pax, then junk", tar_member(b"6 a=b\njunk", kind=b"x") + A_FILE, "malformed pax"),
    ("NULs for pax", tar_member(bytes(10), kind=b"x") + A_FILE, "malformed pax"),
    # T158: an extension of nothing
    ("pax at the end", A_FILE + pax((b"path", b"x")), "cut short"),
    ("long name at the end", A_FILE + tar_member(b"n\0", kind=b"L"), "cut short"),
    ("pax before the end", A_FILE + pax((b"path", b"x")) + TAR_END, "after 1 members"),
    ("long name before the end", A_FILE + tar_member(b"n\0", kind=b"L") + TAR_END,
     "after 1 members"),
    # Go takes the last, tarfile the first
    ("two pax headers", pax((b"size", b"650")) + pax((b"size", b"900")) + A_FILE,
     "after 0 members"),
)

# T67
TAR_BOMBS = (
    # name, bytes: what each asks for is over the limit of 1 MiB
    ("long name of 8 GiB", tar_header(b"%012o" % (8 << 30), kind=b"L")),
    ("long link", tar_header((1 << 20) + 1, kind=b"K")),
    ("pax", tar_header((1 << 20) + 1, kind=b"x")),
    ("global pax", tar_header((1 << 20) + 1, kind=b"g")),
    ("pax of Solaris", tar_header((1 << 20) + 1, kind=b"X")),
)


def pieces(data, sizes):
    """Data cut into pieces of those sizes, over and over."""
    start = 0
    for size in sizes:
        if start >= len(data):
            return
        yield data[start:start + size]
        start += size


def feedings(data):
    """Ways to hand data over: whole, by the byte if it is short, in random pieces."""
    yield [data]
    if len(data) <= 2048:
        yield pieces(data, itertools.repeat(1))
    choices = random.Random(SEED)
    for most in (7, 700, 70000):
        if most <= len(data) <= 1000 * most:
            yield pieces(data, iter(lambda: choices.randrange(most + 1), None))


def walked(parts):
    """A TarWalker that has seen all the parts."""
    walker = imagec.TarWalker("layer")
    for part in parts:
        walker.update(part)
    walker.finish()
    return walker


def unpacked(parts, **options):
    """What a LayerVerifier says of a blob."""
    verifier = imagec.LayerVerifier("layer 1", **options)
    try:
        for part in parts:
            verifier.update(part)
        return verifier.finish()
    finally:
        verifier.abort()


def peak_memory(call):
    """The most bytes that were allocated at once while a call ran."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


BLOB_SIZES = [0] + [1 << power for power in range(17)]


class VerificationTest(TableCase):
    """A blob is its digest and its size, not a byte less or more."""

    def _verifier(self, data, size=None):
        return imagec.BlobVerifier(imagec.Digest.of(data), size, "blob")

    def _each_feeding(self):
        for size in BLOB_SIZES:
            data = bytes(range(256)) * (size // 256) + bytes(range(size % 256))
            for chunk in {1, 3, 4096, max(size, 1)}:
                if chunk * 4096 >= size:
                    yield data, chunk

    def test_exact(self):
        for data, chunk in self._each_feeding():
            for size in (len(data), None):
                verifier = self._verifier(data, size)
                for part in pieces(data, itertools.repeat(chunk)):
                    verifier.update(part)
                verifier.finish()
                self.assertEqual(verifier.received, len(data))

    def test_one_byte_short(self):
        for data, chunk in self._each_feeding():
            verifier = self._verifier(data, len(data) + 1)
            for part in pieces(data, itertools.repeat(chunk)):
                verifier.update(part)
            error = self.refused(
                imagec.SizeMismatch,
                "blob: expected %d bytes, got %d" % (len(data) + 1, len(data)),
                verifier.finish,
            )
            self.assertEqual((error.expected, error.actual), (len(data) + 1, len(data)))

    def test_one_byte_over(self):
        # T24: refused by the piece that goes over, not at the end
        for data, chunk in self._each_feeding():
            verifier = self._verifier(data, len(data))
            taken = 0
            with self.assertRaises(imagec.SizeMismatch) as caught:
                for part in pieces(data + b"x" * 100000, itertools.repeat(chunk)):
                    taken += len(part)
                    verifier.update(part)
            self.assertIn("got at least", str(caught.exception))
            self.assertTrue(len(data) < taken <= len(data) + chunk)
            self.assertEqual(verifier.received, taken)

    def test_wrong_digest(self):
        for size in (None, 5):
            verifier = self._verifier(b"right", size)
            verifier.update(b"wrong")
            error = self.refused(
                imagec.DigestMismatch, "expected digest " + sha256(b"right"),
                verifier.finish,
            )
            self.assertIn("got " + sha256(b"wrong"), str(error))
            self.assertEqual(error.actual, imagec.Digest.of(b"wrong"))

    def test_short_without_a_size(self):
        # T22: schema1 gives no sizes, the digest has to tell
        verifier = self._verifier(b"right")
        verifier.update(b"righ")
        self.refused(imagec.DigestMismatch, "blob: expected", verifier.finish)

    def test_other_algorithms(self):
        for algorithm in ("sha384", "sha512"):
            verifier = imagec.BlobVerifier(imagec.Digest.of(b"x", algorithm), 1)
            verifier.update(memoryview(b"x"))
            verifier.finish()

    def test_named_by_its_digest(self):
        verifier = imagec.BlobVerifier(imagec.Digest.of(b"x"), 2)
        self.refused(imagec.SizeMismatch, "blob " + sha256(b"x"), verifier.finish)


class TarWalkerTest(TableCase):
    """The sizes in a tar add up, or the tar is refused."""

    def test_good_tars(self):
        self.each(GOOD_TARS, self._good_tar)

    def _good_tar(self, name, data, size, members):
        for parts in feedings(data):
            walker = walked(parts)
            self.assertEqual((walker.size, walker.members), (size, members))

    def test_tarfile_agrees(self):
        rows = [row for row in GOOD_TARS if row[0] not in NOT_FOR_TARFILE]
        self.each(rows, self._tarfile_agrees)

    def _tarfile_agrees(self, name, data, size, members):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            infos = tar.getmembers()
        self.assertEqual(sum(info.size for info in infos if info.isreg()), size)
        self.assertEqual(len(infos), members)

    def test_tars_of_tarfile(self):
        choices = random.Random(SEED)
        for number in range(60):
            data, expected = self._written(choices)
            with self.subTest(number):
                chunk = choices.randrange(1, 3000)
                walker = walked(pieces(data, itertools.repeat(chunk)))
                self.assertEqual((walker.size, walker.members), expected)

    def _written(self, choices):
        """A tar of random members, and the sum and number of them by tarfile's word."""
        out = io.BytesIO()
        kind = choices.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
        with tarfile.open(fileobj=out, mode="w", format=kind, encoding="utf-8",
                          errors="surrogateescape") as tar:
            for _ in range(choices.randrange(9)):
                self._write(tar, choices)
            infos = tar.getmembers()
        size = sum(info.size for info in infos if info.isreg())
        return out.getvalue(), (size, len(infos))

    def _write(self, tar, choices):
        alphabet = "a/\u00e9\u96ea\udce9 "
        letters = "".join(choices.choices(alphabet, k=choices.randrange(300)))
        info = tarfile.TarInfo("n" + letters)
        info.linkname = letters
        info.uid = choices.choice([0, 1 << 40])
        info.type = choices.choice([tarfile.REGTYPE] * 3 + [
            tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE])
        content = bytes(choices.choice([0, 1, 511, 512, 513, 5000]))
        if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            info.name = info.name.rstrip("/")
            info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

    def test_bad_tars(self):
        self.each(BAD_TARS, self._bad_tar)

    def _bad_tar(self, name, data, words):
        for parts in feedings(data):
            self.refused(imagec.InvalidDocument, words, walked, parts)

    def test_bombs(self):
        self.each(TAR_BOMBS, self._bomb)

    def _bomb(self, name, data):
        self.refused(imagec.LimitExceeded, "limit of 1048576", walked, [data])

    def test_as_long_as_the_limit(self):
        data = tar_member(bytes(1 << 20), kind=b"L") + A_FILE
        self.assertEqual(walked([data]).size, 650)

    def test_pax_headers_take_no_memory(self):
        # T67: a member may not be led by headers without end
        def walk():
            for number in range(24):
                walker.update(pax((b"key%d" % number, b"v" * 1000000)))

        walker = imagec.TarWalker("layer")
        self.assertLess(peak_memory(lambda: outcome(walk)), 8 << 20)

    def test_many_pax_records(self):
        # T67: a copy of what is left for each took seconds
        data = tar_member(b"6 a=b\n" * 130000, kind=b"x") + A_FILE
        start = time.process_time()
        self.assertEqual(walked([data]).size, 650)
        self.assertLess(time.process_time() - start, 1.0)

    def test_many_members(self):
        # T68
        self.assertEqual(walked([tar_header() * 2000]).members, 2000)

    def test_any_mutation(self):
        choices = random.Random(SEED)
        data = (pax((b"size", b"650")) + A_FILE + old_sparse(b"x", 900, 1)
                + pax_sparse("1.0", b"x", 900) + tar_member(b"n\0", kind=b"L") + A_FILE)
        mutants = [self._mutant(data, choices) for _ in range(600)]
        self.none_stray(walked, ((mutant, [mutant]) for mutant in mutants))

    def _mutant(self, data, choices):
        """A tar with one telling byte changed, its checksum right, and cut."""
        mutant = bytearray(data)
        start = choices.randrange(0, len(data), 512)
        place = start + choices.choice([0, 124, 130, 135, 156, 257, 386, 482, 483, 504])
        mutant[place] = choices.randrange(256)
        mutant[start:start + 512] = self._summed(mutant[start:start + 512])
        return bytes(mutant[:choices.randrange(len(data))])

    def _summed(self, block):
        """A block with the checksum that makes it a header."""
        block[CHECKSUM] = b" " * 8
        block[CHECKSUM] = b"%06o\0 " % sum(block)
        return block


def zstd_frame(data):
    """Data as a zstd frame of stored blocks (RFC 8878, 3.1.1)."""
    blocks = [data[i:i + 65536] for i in range(0, len(data), 65536)] or [b""]
    frame = b"\x28\xb5\x2f\xfd" + b"\x00\x38"  # no checksum, a window of 128 KiB
    for number, block in enumerate(blocks, 1):
        head = len(block) << 3 | (number == len(blocks))
        frame += struct.pack("<I", head)[:3] + block
    return frame


def named_gzip(data):
    """A gzip with the optional header fields."""
    out = io.BytesIO()
    with gzip.GzipFile("name.tar", "wb", fileobj=out, mtime=1) as stream:
        stream.write(data)
    return out.getvalue()


def greedy_xz(data):
    """An xz whose header asks for a dictionary of 1.5 GiB."""
    blob = bytearray(lzma.compress(data))
    # After the stream header of 12 bytes come size, flags, filter and its properties.
    end = 12 + (blob[12] + 1) * 4
    blob[16] = 37
    blob[end - 4:end] = struct.pack("<I", zlib.crc32(bytes(blob[12:end - 4])))
    return bytes(blob)


LAYER_TAR = tar_bytes([("etc", None), ("etc/motd", TAR_TEXT), ("bin", NOISE[:200])])
HEAD_TAR, TAIL_TAR = LAYER_TAR[:700], LAYER_TAR[700:]
EMPTY_GZIP = gzip_bytes(b"")
SKIPPABLE_FRAME = b"\x5f\x2a\x4d\x18" + b"\3\0\0\0" + b"xyz"

# Each unpacks to LAYER_TAR.
LAYER_BLOBS = (
    ("tar", LAYER_TAR),
    ("gzip", gzip_bytes(LAYER_TAR)),
    ("gzip, stored", gzip_bytes(LAYER_TAR, 0)),
    ("gzip, named", named_gzip(LAYER_TAR)),
    ("gzip, members", gzip_bytes(HEAD_TAR) + gzip_bytes(TAIL_TAR)),
    ("gzip, empty members",
     EMPTY_GZIP + gzip_bytes(HEAD_TAR) + EMPTY_GZIP * 3 + gzip_bytes(TAIL_TAR)
     + EMPTY_GZIP),
    ("gzip, padded", gzip_bytes(LAYER_TAR) + bytes(700)),
    ("gzip, padded between", gzip_bytes(HEAD_TAR) + bytes(5) + gzip_bytes(TAIL_TAR)),
    ("bzip2", bz2.compress(LAYER_TAR)),
    ("bzip2, streams", bz2.compress(HEAD_TAR) + bz2.compress(TAIL_TAR)),
    ("xz", lzma.compress(LAYER_TAR)),
    ("xz, streams", lzma.compress(HEAD_TAR) + lzma.compress(TAIL_TAR)),
    ("xz, padded", lzma.compress(LAYER_TAR) + bytes(8)),
)
ZSTD_BLOBS = (
    ("zstd", zstd_frame(LAYER_TAR)),
    ("zstd, frames", zstd_frame(HEAD_TAR) + zstd_frame(b"") + zstd_frame(TAIL_TAR)),
    ("zstd, skippable", SKIPPABLE_FRAME + zstd_frame(LAYER_TAR) + SKIPPABLE_FRAME),
)

BAD_LAYERS = (
    # name, blob, words
    # T27: junk that one tool ignores and another reads
    ("gzip, junk", gzip_bytes(LAYER_TAR) + b"junk", "corrupt gzip data"),
    ("gzip, zeros, junk", gzip_bytes(LAYER_TAR) + bytes(9) + b"junk", "corrupt gzip"),
    ("gzip, a byte of junk", gzip_bytes(LAYER_TAR) + b"\x1f", "truncated gzip data"),
    ("gzip, tar", gzip_bytes(HEAD_TAR) + TAIL_TAR, "corrupt gzip data"),
    ("gzip, bzip2", gzip_bytes(HEAD_TAR) + bz2.compress(TAIL_TAR), "corrupt gzip data"),
    ("bzip2, zeros", bz2.compress(LAYER_TAR) + bytes(8), "corrupt bzip2 data"),
    ("bzip2, junk", bz2.compress(LAYER_TAR) + b"junk", "corrupt bzip2 data"),
    ("xz, junk", lzma.compress(LAYER_TAR) + b"junk" * 9, "corrupt xz data"),
    # T28
    ("gzip, no trailer", gzip_bytes(LAYER_TAR)[:-8], "truncated gzip data"),
    ("gzip, a byte short", gzip_bytes(LAYER_TAR)[:-1], "truncated gzip data"),
    ("gzip, half", gzip_bytes(LAYER_TAR)[:100], "truncated gzip data"),
    ("gzip, magic alone", b"\x1f\x8b\x08", "truncated gzip data"),
    ("gzip, second cut", gzip_bytes(HEAD_TAR) + gzip_bytes(TAIL_TAR)[:-1], "truncated"),
    ("bzip2, a byte short", bz2.compress(LAYER_TAR)[:-1], "truncated bzip2 data"),
    ("bzip2, magic alone", b"BZh", "truncated bzip2 data"),
    ("xz, a byte short", lzma.compress(LAYER_TAR)[:-1], "truncated xz data"),
    ("xz, magic alone", b"\xfd7zXZ\0", "truncated xz data"),
    ("gzip, crc", gzip_bytes(LAYER_TAR)[:-8] + b"\0" * 8, "corrupt gzip data"),
    ("gzip, length", gzip_bytes(LAYER_TAR)[:-4] + b"\0" * 4, "corrupt gzip data"),
    ("gzip, data", gzip_bytes(LAYER_TAR)[:20] + b"\xff" * 400, " gzip data"),
    ("bzip2, data", bz2.compress(LAYER_TAR)[:20] + b"\xff" * 400, " bzip2 data"),
    ("xz, data", lzma.compress(LAYER_TAR)[:20] + b"\xff" * 400, " xz data"),
    ("xz, greedy", greedy_xz(LAYER_TAR), "corrupt xz data"),  # T51
    ("gzip of text", gzip_bytes(b"x" * 600), "not a valid tar after 0 members"),
    ("gzip of gzip", gzip_bytes(gzip_bytes(NOISE)), "after 0 members"),  # T50
    ("gzip of half a tar", gzip_bytes(LAYER_TAR[:700]), "the tar in it is cut short"),
    ("XML", b'<?xml version="1.0"?><Error/>', "cut short"),  # T30
    ("one byte", b"x", "cut short"),
)
BAD_ZSTD_LAYERS = (
    ("zstd, junk", zstd_frame(LAYER_TAR) + b"junkjunk", "corrupt zstd data"),
    ("zstd, zeros", zstd_frame(LAYER_TAR) + bytes(8), "corrupt zstd data"),
    ("zstd, a byte short", zstd_frame(LAYER_TAR)[:-1], " zstd data"),
    ("zstd, half", zstd_frame(LAYER_TAR)[:100], " zstd data"),
    ("zstd, magic alone", b"\x28\xb5\x2f\xfd", " zstd data"),
    ("zstd, first frame of two", zstd_frame(HEAD_TAR), "the tar in it is cut short"),
    ("zstd, bad block", zstd_frame(LAYER_TAR)[:6] + b"\xff" * 9, "corrupt zstd data"),
    ("zstd of text", zstd_frame(b"x" * 600), "not a valid tar after 0 members"),
    # T27: the program would unpack this too, and docker would not
    ("zstd, gzip", zstd_frame(HEAD_TAR) + gzip_bytes(TAIL_TAR), "corrupt zstd data"),
)

EMPTY_LAYERS = (
    # name, blob, bytes of tar
    ("docker's", EMPTY_LAYER, 1024),
    ("tar", TAR_END, 1024),
    ("gzip", gzip_bytes(TAR_END), 1024),
)

# A decompressor gives no more than this at once, and may end just there.
EDGE_SIZES = [
    imagec.CHUNK * times + extra for times in (1, 2) for extra in (-512, 0, 512)
]

CAN_ZSTD = shutil.which("zstd") or imagec._has_zstd_module()
needs_zstd = unittest.skipUnless(CAN_ZSTD, "no compression.zstd and no zstd program")


class LayerVerifierTest(TableCase):
    """A layer unpacks to one diffID, however its bytes come."""

    def test_layers(self):
        self.each(LAYER_BLOBS, self._layer)

    @needs_zstd
    def test_zstd_layers(self):
        self.each(ZSTD_BLOBS, self._layer)

    def _layer(self, name, blob):
        expected = (imagec.Digest.of(LAYER_TAR), 850, len(LAYER_TAR))
        for parts in feedings(blob):
            self.assertEqual(unpacked(parts), expected)

    def test_bad_layers(self):
        self.each(BAD_LAYERS, self._bad_layer)

    @needs_zstd
    def test_bad_zstd_layers(self):
        self.each(BAD_ZSTD_LAYERS, self._bad_layer)

    def _bad_layer(self, name, blob, words):
        for parts in feedings(blob):
            error = self.refused(imagec.InvalidDocument, words, unpacked, parts)
            self.assertIn("layer 1", str(error))

    def test_empty_layers(self):
        self.each(EMPTY_LAYERS, self._empty_layer)

    def _empty_layer(self, name, blob, count):
        digest = imagec.Digest.parse(imagec.EMPTY_LAYER_DIFF_ID)
        for parts in feedings(blob):
            self.assertEqual(unpacked(parts), (digest, 0, count))

    def test_a_blob_of_no_bytes(self):
        # docker takes it for an empty tar
        for parts in ([], [b""], [b"", b""]):
            self.assertEqual(unpacked(parts), (imagec.Digest.of(b""), 0, 0))

    def test_edges_of_the_buffers(self):
        for size in EDGE_SIZES:
            tar = tar_member(bytes(size - 512))
            expected = (imagec.Digest.of(tar), size - 512, size)
            for pack in (bytes, gzip_bytes, bz2.compress, lzma.compress):
                with self.subTest(size, pack=pack.__name__):
                    self.assertEqual(unpacked([pack(tar)]), expected)

    def test_random_content(self):
        tar = tar_bytes([("a", random.Random(SEED).getrandbits(8 * 300000)
                          .to_bytes(300000, "big"))])
        expected = (imagec.Digest.of(tar), 300000, len(tar))
        for pack in (bytes, gzip_bytes, bz2.compress):
            for parts in feedings(pack(tar)):
                self.assertEqual(unpacked(parts), expected)

    def test_the_verdict_waits(self):
        # SUM_A wrong blob digest explains more, and comes first.
        verifier = imagec.LayerVerifier("layer 1")
        for part in (b"\x1f\x8b\x08junkjunkjunk", b"more", gzip_bytes(LAYER_TAR)):
            verifier.update(part)
        self.refused(imagec.InvalidDocument, "corrupt gzip data", verifier.finish)

    def test_limit(self):
        length = len(LAYER_TAR)
        for name, blob in LAYER_BLOBS + (ZSTD_BLOBS if CAN_ZSTD else ()):
            with self.subTest(name):
                self.assertEqual(unpacked([blob], limit=length).bytes, length)
                error = self.refused(
                    imagec.LimitExceeded, "layer 1 unpacks to more than the limit",
                    lambda: unpacked([blob], limit=length - 1),
                )
                self.assertIn("%d bytes" % (length - 1), str(error))

    def test_the_limit_stops_at_once(self):
        verifier = imagec.LayerVerifier("layer 1", limit=1000)
        with self.assertRaises(imagec.LimitExceeded):
            verifier.update(gzip_bytes(LAYER_TAR))
        verifier.abort()

    def test_a_bomb_takes_no_memory(self):
        # T50: a thousandfold
        tar = tar_header(16 << 20) + bytes(16 << 20)
        blob = gzip_bytes(tar)
        self.assertGreater(len(tar), 900 * len(blob))
        expected = (imagec.Digest.of(tar), 16 << 20, len(tar))
        del tar
        found = []
        peak = peak_memory(lambda: found.append(unpacked([blob])))
        self.assertEqual(found, [expected])
        self.assertLess(peak, 8 << 20)

    def test_empty_members_take_no_time(self):
        # T66: 100000 of them are unpacked; the bytes looked at grow with the blob only
        looked_at = []
        decompress = imagec._Gzip.decompress

        def counted(member, data, limit):
            looked_at[-1] += len(data)
            return decompress(member, data, limit)

        with mock.patch.object(imagec._Gzip, "decompress", counted):
            for count in (10000, 20000):
                looked_at.append(0)
                self.assertEqual(unpacked([EMPTY_GZIP * count]).bytes, 0)
        self.assertLess(looked_at[1], 2.5 * looked_at[0])

    def test_without_zstd(self):
        with mock.patch("shutil.which", return_value=None), \
                mock.patch.object(imagec, "_has_zstd_module", return_value=False):
            for name, blob in ZSTD_BLOBS:
                for parts in feedings(blob):
                    self.refused(
                        imagec.Unsupported, "layer 1 is compressed with zstd", unpacked,
                        parts,
                    )

    def test_a_relative_zstd_is_not_run(self):
        # Windows looks for programs in the current directory.
        with mock.patch("shutil.which", return_value="zstd"), \
                mock.patch.object(imagec, "_has_zstd_module", return_value=False):
            self.refused(
                imagec.Unsupported, "zstd", unpacked, [zstd_frame(LAYER_TAR)]
            )

    def test_without_a_codec(self):
        # Pythons are built without them where the libraries were missing.
        for name, blob in (("bz2", bz2.compress(LAYER_TAR)),
                           ("lzma", lzma.compress(LAYER_TAR))):
            with self.subTest(name), mock.patch.dict(sys.modules, {name: None}):
                self.refused(imagec.Unsupported, "layer 1", unpacked, [blob])

    def test_abort(self):
        blobs = LAYER_BLOBS + (ZSTD_BLOBS if CAN_ZSTD else ())
        threads = threading.active_count()
        for name, blob in blobs:
            for length in (0, 3, 100, len(blob)):
                verifier = imagec.LayerVerifier("layer 1")
                verifier.update(blob[:length])
                verifier.abort()
                verifier.abort()
        self.assertLessEqual(threading.active_count(), threads)

    def test_any_mutation(self):
        choices = random.Random(SEED)
        for name, blob in LAYER_BLOBS:
            mutants = [mutated(blob, choices, cut=number % 2) for number in range(40)]
            self.none_stray(unpacked, ((mutant, [mutant]) for mutant in mutants))


# --------------------------------------------------------------------------------------
# Running them all
# --------------------------------------------------------------------------------------

class Tally(unittest.TextTestResult):
    """What a worker found, in a form that passes between processes."""

    def found(self):
        """(tests run, bad ones as (name, text), skipped ones as (name, reason))."""
        bad = self.failures + self.errors + [
            (test, "unexpected success") for test in self.unexpectedSuccesses]
        return (self.testsRun, [(str(test), text) for test, text in bad],
                [(str(test), reason) for test, reason in self.skipped])


def run_class(name):
    """Runs one test class in this process: (name, seconds, found)."""
    started = time.time()
    suite = unittest.defaultTestLoader.loadTestsFromName(name, sys.modules["__main__"])
    result = Tally(unittest.runner._WritelnDecorator(io.StringIO()), False, 0)
    suite.run(result)
    return name, time.time() - started, result.found()


def run_side_by_side(names):
    """Runs test classes in a few processes; whether all went well.

    More processes than cores, for many tests wait for clocks and sockets.
    """
    import multiprocessing
    context = multiprocessing.get_context("fork")
    started, ran, bad, skipped = time.time(), 0, [], []
    with context.Pool((os.cpu_count() or 1) + 1, maxtasksperchild=None) as pool:
        for name, seconds, (count, faults, skips) in pool.imap_unordered(
                run_class, names, chunksize=1):
            ran, bad, skipped = ran + count, bad + faults, skipped + skips
            if os.environ.get("IMAGEC_TEST_TIMES"):
                print("%6.2f s %4d %s" % (seconds, count, name))
    for test, text in bad:
        print("=" * 70, test, "-" * 70, text, sep="\n")
    for reason, count in sorted(collections.Counter(
            reason for _, reason in skipped).items()):
        print("skipped %d: %s" % (count, reason))
    print("Ran %d tests in %.1f s on Python %s" % (
        ran, time.time() - started, sys.version.split()[0]))
    print("%d passed, %d failed, %d skipped" % (ran - len(bad) - len(skipped), len(bad),
                                                len(skipped)))
    return not bad and ran > 0


def main():
    """Runs what is named on the command line, or everything."""
    if len(sys.argv) > 1 or not hasattr(os, "fork"):
        return unittest.main()
    names = [name for name, value in globals().items()
             if isinstance(value, type) and issubclass(value, unittest.TestCase)
             and unittest.defaultTestLoader.getTestCaseNames(value)]
    # The slowest first, as measured; the rest in the order of the file.
    names.sort(key=lambda name: SLOW_CLASSES.index(name) if name in SLOW_CLASSES
               else len(SLOW_CLASSES))
    sys.exit(0 if run_side_by_side(names) else 1)


SLOW_CLASSES = ()

if __name__ == "__main__":
    main()
