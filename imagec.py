#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""imagec: container images onto a host that has nothing but Python, every byte proved.

    python3 imagec.py pull alpine

One file, standard library only, CPython 3.6 or newer. Data flows one way,

    reference -> registry -> manifest -> blobs -> output

and so does this file: a room uses only the rooms above it (1 and 2 are free to all).
An annex, marked *, is what a pull to `layers`, `oci` or `archive` never enters.

     1  Limits and media types   every number and literal, with its unit and source
     2  Errors                   what can go wrong, as fields and as one sentence
     3  Names                    text -> value: references, digests, platforms
     4  Documents                bytes -> JSON value, strict; what libtrust signs
     5  Manifests                bytes -> value: manifests, indexes, configs
     6  Tar                      chunks -> members and their data, and back
     7  Proof                    chunks -> proved chunks, and what they unpack to
     8  Credentials              who we are to a registry
     9  Transport                one safe HTTP exchange; knows nothing of images
    10  Registry                 the distribution API of one host, token included
    11  Store                    what is on disk: on its way, there, read back
    12  Outputs                  the layouts others load
    13  Trees*                   layers -> one file tree -> a directory or a tar
    14  Keys*                    public keys, and the signatures they made
    15  Pull                     the steps from a reference to an output
    16  Verify*                  what a pull wrote, re-checked offline
    17  Look*                    the files of an image, of no more layers than it takes
    18  Serve*                   a read-only registry over what was pulled
    19  Push*                    what was pulled, into another registry, digests kept
    20  Self-test*               prove that this host can pull
    21  Command line             arguments, progress, exit statuses

Importing this module does nothing. Only `ImagecError` (with its subclasses) and the
`OSError` of the local disk come out of its public functions. It logs to
`logging.getLogger("imagec")`, but `main` to standard error. What is in `__all__`, and
nothing else, is promised.
"""

import gc
import sys

if __name__ == "__main__":
    gc.disable()  # for what is made down to the last line lives to the end
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        # The script's directory, or with -m the current one: whoever can write there
        # would choose what is imported below, and later.
        del sys.path[0]
    import signal
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a traceback says nothing here


def lacking(error):
    """What an ImportError of the standard library means, and the package that helps."""
    return "this Python (%s) has no module %s; %s" % (sys.executable, error.name, {
        "_ssl": "build it with libssl-dev (Debian) or openssl-devel (RHEL)",
        "zlib": "build it with zlib1g-dev (Debian) or zlib-devel (RHEL)",
        "_bz2": "build it with libbz2-dev (Debian) or bzip2-devel (RHEL)",
        "_lzma": "build it with liblzma-dev (Debian) or xz-devel (RHEL)",
    }.get(error.name, "install python3 (Debian) or python3-libs (RHEL)"))


try:
    import base64
    import collections.abc
    import contextlib
    import errno
    import functools
    import hashlib
    import http.client
    import io
    import ipaddress
    import itertools
    import json
    import marshal
    import os
    import random
    import re
    import select
    import selectors
    import socket
    import ssl
    import stat
    import struct
    import threading
    import time
    import types
    import urllib.parse
    import urllib.request
    import zlib
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit("imagec: " + lacking(error))

__version__ = "1.0.0"

__all__ = [  # in the order of the rooms; an annex's names in lines of their own
    "ImagecError", "UsageError", "InvalidReference", "InvalidDocument",
    "LimitExceeded", "TooLarge", "VerificationError", "DigestMismatch", "SizeMismatch",
    "Unsupported", "TransportError", "CertificateError", "UnsafeRedirect", "Timeout",
    "Cancelled", "RegistryError", "NotFound", "NoMatchingPlatform", "AccessDenied",
    "CredentialsError", "OutputError",
    "Digest", "Reference", "Platform", "Document", "PrettySignature",
    "Descriptor", "Manifest", "Index", "Layer", "Schema1Manifest", "decode_manifest",
    "ImageConfig", "proved", "Credentials", "Challenge", "fetch_token", "Registry",
    "Image", "Session", "pull",
    "Shelf", "new_server",
    "push",
    "main",
]

# --------------------------------------------------------------------------------------
# 1  Limits and media types: every number and literal, with its unit and source
# --------------------------------------------------------------------------------------

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30  # bytes

DOCUMENT_LIMIT = 4 * MIB  # bytes; distribution-spec and containers/image
TOKEN_LIMIT = 1 * MIB  # bytes of a token server's reply; containers/image
ERROR_BODY_LIMIT = 64 * KIB  # bytes; go-containerregistry
ERROR_TEXT_LIMIT = 300  # characters of a server's own words in a message
MESSAGE_LIMIT = 2000  # characters of a message, about a screen of a terminal
SECRET_FORMS_LIMIT = 500  # spellings of secrets; each new token adds one or two
TLS_RECORD = 16 * KIB  # bytes at most; RFC 8446, 5.1
HEADER_LIMIT = 64 * KIB  # bytes of one header value we parse; http.client's line limit
NUMBER_LIMIT = 32  # digits; 2**63 has 19. int() is quadratic on old Pythons
JSON_DEPTH_LIMIT = 100  # objects and arrays inside one another; real ones stay under 20
JSON_COUNT_LIMIT = 1 << 18  # of them all: an empty object may take 240 bytes
INTEGER_LIMIT = 1 << 53  # what every JSON implementation holds exactly (RFC 8259, 6)
LAYER_COUNT_LIMIT = 2048  # layers of an image; docker itself stops at 127
INDEX_COUNT_LIMIT = 16384  # entries of one index
PLATFORM_LIMIT = 255  # characters of each part of one: an index repeats them
INDEX_DEPTH_LIMIT = 8  # indexes inside indexes; two are seen in the field
DOCUMENT_COUNT_LIMIT = 1000  # manifests and indexes that one name leads to
DOCUMENT_BYTES_LIMIT = 64 * MIB  # of all of them
CONTENTS_LIMIT = 16 * MIB  # bytes of a layout's index.json: INDEX_COUNT_LIMIT entries
TAG_COUNT_LIMIT = 1000000  # tags of one repository
TAG_PAGE = 1000  # tags asked for at once; the most ECR gives
PAGE_COUNT_LIMIT = 10000  # pages of one list; some registries give 100 entries a page
PATH_LENGTH_LIMIT = 255  # characters of a repository; distribution/reference
NAME_LIMIT = 1024  # characters of all of a reference, or of a digest
PATH_MAX = 4096  # bytes of a path; Linux
RSA_BITS = 2048, 8192  # least and most of a modulus; crypto/tls takes no more
KEY_LIMIT = 64 * KIB  # bytes of a file with a public key; RSA of 8,192 bits has 1,400
SIGNATURE_COUNT_LIMIT = 64  # signatures of one image that are looked at
PATH_PARTS_LIMIT = 500  # directories of a path; os.makedirs calls itself for each

CHUNK = 256 * KIB  # bytes read from a socket or file at once
WRITE_BEHIND = 4 * MIB  # bytes of a file on its way that wait to be put on disk
INFLATE_SLICE = 64 * KIB  # bytes given to a decompressor at once: it copies the rest
XZ_MEMORY_LIMIT = 128 * MIB  # bytes; xz -9 needs 65 MiB
ZSTD_WINDOW_LOG = 27  # 128 MiB; the zstd program's own default
LAYER_SIZE_LIMIT = 64 * GIB  # bytes one layer may unpack to, unless told otherwise
TAR_BLOCK = 512  # bytes; POSIX.1-2001 pax
MEMBER_COUNT_LIMIT = 2000000  # members of an image's layers, unless told otherwise
MEMBER_NAMES_LIMIT = 256 * MIB  # bytes of their names, links and extended attributes
PAX_COUNT_LIMIT = 4096  # records of one pax header
TAR_EXTENSION_LIMIT = 1 * MIB  # bytes of one pax or long-name member; Go's archive/tar

IDLE_TIMEOUT = 60  # seconds without a byte
PATIENCE = 5  # silences at most until a blob begins: a cache may have to fetch it first
STALL_BYTES = 256 * KIB  # that a blob must bring in as long; a document, all of it
LOCK_TOLD = 5  # seconds until it is told that another process is waited for
LOCK_PATIENCE = 600  # seconds in which what it writes must grow
CANCEL_NOTICED = 0.5  # seconds at most until a thread that waits sees a cancel
CLEARING_UP = 1.0  # seconds that a second signal leaves
CONNECT_TIMEOUT = 10  # seconds to connect, and as many again for TLS; docker's for TLS
CONNECT_DELAY = 0.25  # seconds until the next address is tried, too (RFC 8305, 5)
IDLE_CONNECTIONS_LIMIT = 32  # kept for reuse; a process often has 1,024 descriptors
ATTEMPTS = 5  # per request, the first included; docker's
BACKOFF, BACKOFF_LIMIT = 0.5, 20.0  # seconds: doubled a try, capped
RETRY_AFTER_LIMIT = 60.0  # seconds; containers/image
PROGRESS_BYTES = 1 * MIB  # received since the last failure: the try was worth it
REDRAW_INTERVAL = 0.1  # seconds between two drawings of a live line
PROGRESS_INTERVAL = 10  # seconds between two lines of progress where none is live
REDIRECT_LIMIT = 10  # hops; Go's net/http
WARNING_LIMIT = 20  # that a registry may give; each is kept
NO_REFERRERS_API = 400, 401, 404, 405, 406, 501  # go-containerregistry; 401: Harbors
RETRIED_STATUSES = frozenset([408, 425, 429, 499, 500, 502, 503, 504, 509, 520, 521,
                              522, 523, 524, 525, 530])  # the last: of CDNs
TOKEN_LIFETIME = 60  # seconds when the server does not say; distribution's token spec

SERVE_THREADS = 256  # connections served at once
SERVE_TIMEOUT = 60  # seconds for a request's head, or that a client may take nothing
SERVE_IDLE = 1  # seconds a connection is kept idle while others wait for a place
HELPER_TIMEOUT = 30  # seconds for a credential helper; some ask a person or a cloud
JOBS = 4  # connections: as many images or layers are fetched at once
RANGE = 8 * MIB  # bytes asked for at once; the least that SOCI advises for ECR
RANGES_AFTER = 1  # second that a blob must have been coming on one connection
RANGES_LEFT = 32 * MIB  # bytes of it that must still be to come
RANGES_PACE = 64 * MIB  # bytes a second: where one connection has it, more are no use
USER_AGENT = "imagec/" + __version__

DOCKER_HUB = "docker.io"
DOCKER_HUB_API = "registry-1.docker.io"

DOCKER_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+json"
DOCKER_SCHEMA1_SIGNED = "application/vnd.docker.distribution.manifest.v1+prettyjws"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"

MANIFEST_SHAPES = {
    OCI_INDEX: "index", DOCKER_LIST: "index",
    OCI_MANIFEST: "image", DOCKER_MANIFEST: "image",
    DOCKER_SCHEMA1_SIGNED: "schema1", DOCKER_SCHEMA1: "schema1",
}
#: One header, comma-joined: where several are sent, proxies keep one, and a registry
#: that sees too few types answers schema1 without a word.
ACCEPT = ", ".join(MANIFEST_SHAPES)
SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json"  # cosign to 2
SIGSTORE_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"  # and from 3 on
OCI_EMPTY = "application/vnd.oci.empty.v1+json"  # what cosign 3.0 lists them by
SIGNATURE_ANNOTATION = "dev.cosignproject.cosign/signature"


# --------------------------------------------------------------------------------------
# 2  Errors: what can go wrong, as fields and as one sentence
# --------------------------------------------------------------------------------------

class Secrets:
    """What this process must not say, and how texts get rid of it.

    One for all that runs in a process: errors and log lines outlive those who made
    them. It is for what servers and libraries repeat, not for what they twist.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._forms = ()  # newest last; changed as a whole: reading takes no lock

    def add(self, *secrets):
        """Hides each of the texts `secrets` (None: nothing) from now on, as it is and
        percent-encoded; not those under four characters, which would blank out a lot.
        """
        forms = {form for secret in filter(None, secrets) for form in (
            secret, urllib.parse.quote(secret), urllib.parse.quote_plus(secret))}
        forms.update([re.sub("%..", lambda code: code.group().lower(), form)
                      for form in forms])
        # A URL's host comes in lowercase.
        forms.update([form.lower() for form in forms if len(form) < 256])
        forms = sorted(form for form in forms if len(form) > 3)
        with self._lock:
            older = [form for form in self._forms if form not in forms]
            self._forms = tuple(older + forms)[-SECRET_FORMS_LIMIT:]

    def hide(self, text):
        """`text` with `***` for each of them, and for the user and password in URLs."""
        text = re.sub("(?<=://)[^\\s/:@]*:[^\\s/]*@(?!sha[0-9]+:)", "***@", text)
        for form in sorted(self._forms, key=len, reverse=True):
            if form in text:  # a short one only where it stands alone
                alone = "(?<![A-Za-z0-9])%s(?![A-Za-z0-9])" if len(form) < 6 else "%s"
                text = re.sub(alone % re.escape(form), "***", text)
        return text


SECRETS = Secrets()


def hidden(value):
    """A JSON-able value without SECRETS in its texts."""
    if isinstance(value, str):
        return SECRETS.hide(value)
    if isinstance(value, dict):
        return {hidden(key): hidden(member) for key, member in value.items()}
    return list(map(hidden, value)) if isinstance(value, list) else value


def printable(text, limit=None):
    """`text` without SECRETS and with everything a terminal might obey escaped.

    That is what is not printable, bidi and surrogates included. Over `limit` characters
    the middle becomes `...`. Bytes are taken for a file's name.
    """
    text = SECRETS.hide(os.fsdecode(text) if isinstance(text, bytes) else str(text))
    if limit is not None and len(text) > limit:
        text = text[:limit - limit // 4] + "..." + text[-(limit // 4):]
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode()
                   for c in text)


class Log:
    """Tells what happens, without SECRETS: the last of its `listeners`, which `main`
    has, from its `level` on; else who listens to logging.getLogger("imagec").

    That is got only where somebody may: to import logging is a tenth of a start.
    """

    DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40  # as logging has them

    def __init__(self):
        self.listeners = []

    def _tell(self, level, text, *args):
        heard = self.listeners[-1:]  # it may end meanwhile
        least = heard[0].level if heard else self.WARNING
        if level < least and (heard or "logging" not in sys.modules):
            return
        text = printable(text % args if args else text, 2 * MESSAGE_LIMIT)
        if heard:
            heard[0].tell(level, text)
        else:
            import logging
            logging.getLogger("imagec").log(level, "%s", text)

    debug = functools.partialmethod(_tell, DEBUG)
    info = functools.partialmethod(_tell, INFO)
    warning = functools.partialmethod(_tell, WARNING)
    error = functools.partialmethod(_tell, ERROR)


log = Log()


class ImagecError(Exception):
    """The base of every error this module raises on purpose.

    `source` is where the offending thing came from (host and object), or None; `hint`
    is what to try, or None; `retryable` says that the same request may succeed later,
    `retry_after` how many seconds the server asked for, or None.
    """

    source = retry_after = None

    def __init__(self, message, hint=None, retryable=False):
        self.message = printable(message, MESSAGE_LIMIT)
        super().__init__(self.message)
        self.hint, self.retryable = hint, retryable

    def __reduce__(self):  # or no other process could be told
        return type(self).__new__, (type(self), *self.args), vars(self)

    def __str__(self):
        return printable("%s%s%s" % (
            self.message, ", from %s" % self.source if self.source else "",
            "; %s" % self.hint if self.hint else ""), 2 * MESSAGE_LIMIT)


@contextlib.contextmanager
def naming(source):
    """Errors raised inside learn that what they speak of came from `source`."""
    try:
        yield
    except ImagecError as error:
        # Those of the network name their URL themselves; the user's are of no host.
        if isinstance(error, (InvalidDocument, VerificationError, Unsupported,
                              NoMatchingPlatform)):
            error.source = error.source or source
        raise


class UsageError(ImagecError, ValueError):
    """The caller asked for something that makes no sense."""


class InvalidReference(UsageError):
    """A text that is no image reference, digest or platform."""


class InvalidDocument(ImagecError):
    """A document or stream that is malformed, or can be read in two ways."""


class LimitExceeded(InvalidDocument):
    """Something from outside is larger than we are willing to take."""


class TooLarge(LimitExceeded):
    """Something is larger than an option allows, which `hint` names: no one lied."""


class VerificationError(ImagecError):
    """What came is not what was promised."""


class DigestMismatch(VerificationError):
    """`expected` and `actual` are Digests, `what` names the object."""

    def __init__(self, what, expected, actual, hint=None):
        super().__init__("%s: expected digest %s, got %s" % (what, expected, actual),
                         hint)
        self.what, self.expected, self.actual = what, expected, actual


class SizeMismatch(VerificationError):
    """`expected` and `actual` are bytes; `actual` is a floor where reading stopped."""

    def __init__(self, what, expected, actual):
        super().__init__("%s: expected %d bytes, got %s%d" % (
            what, expected, "at least " if actual > expected else "", actual))
        self.what, self.expected, self.actual = what, expected, actual


class Unsupported(ImagecError):
    """Well-formed, but not something this host or program can handle."""


class TransportError(ImagecError):
    """No complete answer came."""


class CertificateError(TransportError):
    """A certificate, the server's or ours, is not accepted by the other side."""


class UnsafeRedirect(TransportError):
    """A server sent us to a URL we will not follow."""


class Timeout(TransportError):
    """An answer was too slow, or the whole command was."""


class Cancelled(TransportError):
    """Another part of the same work failed, or the user gave up."""


class RegistryError(ImagecError):
    """An error of a registry: `codes`; HTTP `status` and `url` (no query), or None."""

    def __init__(self, message, status=None, codes=(), url=None, hint=None):
        super().__init__(message, hint, status in RETRIED_STATUSES)
        self.status, self.codes, self.url = status, tuple(codes), url


class NotFound(RegistryError):
    """The repository, tag, manifest or blob is not there."""


class NoMatchingPlatform(NotFound):
    """There is no image for the Platform `wanted`, only for those `available`."""

    def __init__(self, wanted, available):
        names = printable(", ".join(sorted(set(map(str, available)))), 1000)
        super().__init__(
            "no image for platform %s; there is: %s" % (wanted, names or "none"),
            hint="choose with --platform" if names
            else "--format oci --platform all takes what it holds")


class AccessDenied(RegistryError):
    """The registry, its token server or a proxy does not let us."""


class CredentialsError(AccessDenied):
    """A source of credentials is broken."""


class OutputError(ImagecError):
    """The `path` cannot take what is pulled, or lacks what is to be read there."""

    def __init__(self, path, message, hint=None):
        super().__init__("%s: %s" % (path, message), hint)
        self.path = path


# --------------------------------------------------------------------------------------
# 3  Names: text -> value: references, digests, platforms
# --------------------------------------------------------------------------------------
# Grammar: github.com/distribution/reference. ASCII classes and fullmatch throughout:
# \d takes Arabic digits and $ a final newline.

_REPOSITORY = r"{0}(?:/{0})*".format(r"[a-z0-9]+(?:(?:\.|__|_|-+)[a-z0-9]+)*")
_HOST_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = r"(?:{0}(?:\.{0})*|\[[A-Fa-f0-9:]+\])(?::([0-9]{{1,5}}))?".format(_HOST_LABEL)
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_REFERENCE = re.compile(  # host, its port, repository, tag, digest
    "(%s)/(%s)(?::(%s))?(?:@(.+))?" % (_HOST, _REPOSITORY, _TAG), re.DOTALL)
_DIGEST_LENGTHS = {"sha256": 64, "sha384": 96, "sha512": 128}  # hex digits; go-digest
#: The grammar of OCI image-spec, descriptor.md.
_ANY_DIGEST = "[a-z0-9]+(?:[+._-][a-z0-9]+)*:[A-Za-z0-9=_-]+"


def shown(text, limit=None):
    """`text`, which was to be a name, for a message, less what may be a password."""
    return printable(re.sub("^.*@(?!sha[0-9]+:[^@]*$)", "***@", text, flags=re.DOTALL),
                     limit)


def value_type(fields, *defaults):
    """A base for a class of values: a named tuple. `defaults` are of its last fields.

    typing.NamedTuple would cost every start what typing costs.
    """
    base = collections.namedtuple("Value", fields)
    base.__new__.__defaults__ = defaults  # 3.6 has no other way
    return base


class Digest(value_type("algorithm hex")):
    """A digest (OCI image-spec, descriptor.md): `algorithm` and lowercase `hex`."""

    @classmethod
    def parse(cls, text: str) -> "Digest":
        """The Digest `text` (`sha256:<64 hex>`) spells. Raises InvalidReference."""
        algorithm, _, value = str(text).partition(":")
        length = _DIGEST_LENGTHS.get(algorithm)
        if not (length and re.fullmatch("[a-f0-9]{%d}" % length, value)):
            raise InvalidReference("invalid digest '%s': expected %s" % (
                shown(str(text), 150), "%d lowercase hex digits after %s:"
                % (length, algorithm) if length else "sha256:<64 hex digits>"))
        return cls(algorithm, value)

    @classmethod
    def of(cls, data, algorithm="sha256"):
        """The Digest of the bytes `data`."""
        return cls(algorithm, hashlib.new(algorithm, data).hexdigest())

    @property
    def tag(self):
        """The tag of what refers to it (distribution-spec, "Referrers Tag Schema")."""
        return "%.32s-%.64s" % self

    def require_known(self):
        """Itself; raises Unsupported where we cannot check its algorithm."""
        if self.algorithm not in _DIGEST_LENGTHS:
            raise Unsupported("digest %.150s is of another algorithm than %s"
                              % (str(self), ", ".join(_DIGEST_LENGTHS)))
        return self

    def check(self, data, what, hint=None):
        """Raises DigestMismatch unless `data` has this digest."""
        actual = Digest.of(data, self.algorithm)
        if actual != self:
            raise DigestMismatch(what, self, actual, hint)

    def __str__(self):
        return "%s:%s" % self


class Reference(value_type("host repository tag digest")):
    """An image's name: `host` (`docker.io` for Docker Hub), `repository`, `tag` or
    None, `digest` or None. With both, the digest decides and the tag is only a name.
    """

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """The Reference a user means by `text`, defaults filled in.

        Follows distribution/reference's ParseDockerRef; raises InvalidReference.
        """
        def refuse(why):
            raise InvalidReference("invalid reference '%s': %s"
                                   % (shown(text, 300), why))

        if re.fullmatch("(?:sha256:)?[a-f0-9]{64}", text):
            refuse("looks like an image ID, which no registry knows: name the image")
        if "://" in text:
            refuse("write it without docker:// or any other scheme")
        host, slash, rest = text.partition("/")
        if slash and host in (DOCKER_HUB, "index.docker.io"):
            host = DOCKER_HUB
        elif not slash or (host == host.lower() and host != "localhost"
                           and not set(".:") & set(host)):
            host, rest = DOCKER_HUB, text
        if host == DOCKER_HUB and "/" not in rest:
            rest = "library/" + rest
        name = rest.partition(":")[0]
        if name != name.lower():
            refuse("a repository must be lowercase")
        match = len(text) <= NAME_LIMIT and _REFERENCE.fullmatch(host + "/" + rest)
        if not match:
            refuse("expected [HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]")
        host, port, repository, tag, digest = match.groups()
        if len(repository) > PATH_LENGTH_LIMIT:
            refuse("repository longer than %d characters" % PATH_LENGTH_LIMIT)
        if (host, repository) == (DOCKER_HUB, "library/scratch"):
            refuse("'scratch' is a reserved name, there is no such image")
        if port and not 0 < int(port) < 65536:
            refuse("its port is not in 1..65535")
        if digest is not None:
            digest = Digest.parse(digest)
        elif tag is None:
            tag = "latest"
        return cls(host, repository, tag, digest)

    @property
    def tag_or_digest(self):
        """What to ask the registry for: the digest if there is one, else the tag."""
        return str(self.digest) if self.digest else self.tag

    @property
    def api_host(self):
        """The host that serves this reference's registry API."""
        return DOCKER_HUB_API if self.host == DOCKER_HUB else self.host

    @property
    def name(self):
        """Host and repository, without tag and digest."""
        return "%s/%s" % (self.host, self.repository)

    @classmethod
    def full(cls, text):
        """The reference `text` spelled in full; `text` where it is none."""
        with contextlib.suppress(InvalidReference):
            return str(cls.parse(text))
        return text

    def __str__(self):
        return "%s%s%s" % (self.name, ":" + self.tag if self.tag else "",
                           "@" + str(self.digest) if self.digest else "")


_OS_ALIASES = {"": "linux", "macos": "darwin"}
_ARCHITECTURES = {  # alias -> architecture, and the variant it implies
    "i386": "386", "i486": "386", "i586": "386", "i686": "386", "x86_64": "amd64",
    "x86-64": "amd64", "aarch64": "arm64", "arm64v8": "arm64", "armv8l": "arm/v8",
    "armhf": "arm/v7", "armv7l": "arm/v7", "arm32v7": "arm/v7", "armel": "arm/v6",
    "armv6l": "arm/v6", "arm32v6": "arm/v6", "arm32v5": "arm/v5", "armv5tel": "arm/v5",
    "armv5tejl": "arm/v5", "loongarch64": "loong64", "mips64el": "mips64le",
}
_VARIANTS = {  # of an architecture: spelling -> norm
    "amd64": {"v1": ""},
    "arm": {"": "v7", "5": "v5", "6": "v6", "7": "v7", "8": "v8"},
    "arm64": {"8": "", "v8": "", "v8.0": "", "9": "v9", "9.0": "v9", "v9.0": "v9"},
}


class Platform(value_type("os architecture variant os_version", "", "")):
    """What an image runs on (OCI image-spec, image-index.md); "" for an absent part.
    `os_version`, a build of Windows, is shown only: any will do.
    """

    @classmethod
    def normal(cls, os, architecture, variant="", os_version=""):
        """A Platform by containerd's norm: one spelling of aliases and of variants."""
        os, arch = os.lower(), architecture.lower()
        variant = variant.lower()
        if arch in _ARCHITECTURES:
            arch, _, implied = _ARCHITECTURES[arch].partition("/")
            variant = variant or implied
        variant = _VARIANTS.get(arch, {}).get(variant, variant)
        return cls(_OS_ALIASES.get(os, os), arch, variant, os_version)

    @classmethod
    def parse(cls, text: str) -> "Platform":
        """What `OS/ARCH[/VARIANT]`, `OS` or `ARCH` mean. Raises InvalidReference."""
        if not re.fullmatch(r"[\w.-]+(?:/[\w.-]+){0,2}", text, re.ASCII):
            raise InvalidReference("invalid platform '%s': expected OS/ARCH[/VARIANT], "
                                   "for example linux/arm64" % printable(text, 80))
        system = _OS_ALIASES.get(text.lower(), text.lower())
        if system in ("linux", "windows", "darwin", "freebsd"):
            return cls.host()._replace(os=system)
        return cls.normal(*text.split("/") if "/" in text else ("linux", text))

    @classmethod
    def host(cls) -> "Platform":
        """This host's architecture, with os linux: what runs containers here."""
        if hasattr(os, "uname"):
            machine = os.uname().machine.lower()
        else:
            import platform  # slow to import
            machine = platform.machine().lower()
        if struct.calcsize("P") == 4:  # a 32-bit Python runs 32-bit programs
            machine = {"x86_64": "386", "amd64": "386", "aarch64": "armv7l",
                       "arm64": "armv7l"}.get(machine, machine)
        return cls.normal("linux", machine or "amd64")

    def candidates(self):
        """The Platforms it can run, best first, in the order docker tries them."""
        version = re.fullmatch(r"v([0-9])(?:\.([0-9]))?", self.variant)
        major, minor = map(int, version.groups("0")) if version else (0, 0)
        chain, tail = [self.variant], []
        if self.architecture == "amd64":
            chain += ["v%d" % v if v > 1 else "" for v in range(major - 1, 0, -1)]
            tail = [("386", "")]
        elif self.architecture == "arm":
            chain += ["v%d" % v for v in range(major - 1, 4, -1)]
        elif self.architecture == "arm64":
            if major == 9:
                chain += ["v9.%d" % m if m else "v9" for m in range(minor - 1, -1, -1)]
            eighth = {9: min(minor + 5, 9), 8: minor - 1}.get(major, -1)
            chain += ["v8.%d" % m if m else "" for m in range(eighth, -1, -1)]
            tail = [("arm", "v%d" % v) for v in (8, 7, 6, 5)]
        ways = [(self.architecture, variant) for variant in chain] + tail
        return [self._replace(architecture=a, variant=v) for a, v in ways]

    def runs(self, other):
        """Whether it can run what is for another Platform."""
        return other[:3] in [way[:3] for way in self.candidates()]

    def __str__(self):
        text = "/".join(filter(None, (self.os, self.architecture, self.variant)))
        return text + (" (%s)" % self.os_version if self.os_version else "")


# --------------------------------------------------------------------------------------
# 4  Documents: bytes -> JSON value, strict; what libtrust signs
# --------------------------------------------------------------------------------------
# Two programs that read one document differently can be played against each other
# (CVE-2021-41190), so what Go's, Python's and others' parsers disagree on is refused.

def parse_json(raw, what, repeatable=False):
    """The value of the JSON text in the bytes `raw`; raises InvalidDocument.

    Refuses what json.loads lets pass: other encodings, duplicate keys, NaN and
    Infinity, numbers no other parser holds, and what is over JSON_DEPTH_LIMIT or
    JSON_COUNT_LIMIT. Where keys are `repeatable`, the last counts, and a warning tells.
    """
    def pairs(items):
        value = dict(items)
        if len(value) != len(items):
            if not repeatable:
                raise ValueError("a key stands twice in one object")
            log.warning("%s: a key stands twice in one object: the last counts", what)
        return value

    def integer(text):
        if len(text) > NUMBER_LIMIT:
            raise ValueError("a number of %d digits" % len(text))
        return int(text)

    def real(text):
        value = float(text)
        if not abs(value) < float("inf"):
            raise ValueError("%.40s is not a finite number" % text)
        return value

    try:
        if raw.count(b"{") + raw.count(b"[") > JSON_COUNT_LIMIT:
            raise ValueError("more than %d objects and arrays" % JSON_COUNT_LIMIT)
        # json.loads calls itself, on 3.12 and 3.13 beyond the stack of a musl thread.
        found = re.finditer(rb'"[^"]*"?|([{\[])|[]}]', raw.replace(
            b"\\\\", b"").replace(b'\\"', b""))
        if max(itertools.accumulate(
                1 if mark.group(1) else -(mark.group()[:1] != b'"') for mark in found),
                default=0) > JSON_DEPTH_LIMIT:  # deeper than all that walk it later
            raise RecursionError
        return json.loads(raw.decode("utf-8"), object_pairs_hook=pairs,
                          parse_int=integer, parse_float=real, parse_constant=real)
    except (ValueError, RecursionError) as error:
        reason = ("nested too deep" if isinstance(error, RecursionError)
                  else "not UTF-8" if isinstance(error, UnicodeDecodeError) else error)
        raise InvalidDocument(
            "%s is not valid JSON: %s" % (what, reason),
            "it looks like HTML: is that host a registry?"
            if raw.lstrip()[:1] == b"<" else None) from None


def canonical_json(value, sort_keys=True):
    """`value` as JSON, the same on every Python; half a surrogate pair is an escape."""
    return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"),
                      ensure_ascii=False).encode("utf-8", "backslashreplace")


class Document:
    """A JSON object whose members are read by name and type, never by luck.

    `value` is the dict, `where` its place in words. Null counts as absent. A key that
    differs from the one asked for only by case is refused: Go would read it.
    """

    def __init__(self, value, where):
        if type(value) is not dict:
            raise InvalidDocument("%s is not a JSON object" % where)
        self.value = value
        self.where = where
        self._folded = collections.Counter(key.casefold() for key in value)

    @classmethod
    def parse(cls, raw: bytes, what: str) -> "Document":
        """The Document in the bytes `raw`; raises InvalidDocument."""
        return cls(parse_json(raw, what), what)

    def get(self, name, kind, default=None):
        """Member `name`, of exactly the type `kind`; `default` where it is absent.

        For dict it is a Document. Raises InvalidDocument, as do all that follow.
        """
        if self._folded.get(name.casefold(), 0) != (name in self.value):
            raise InvalidDocument("%s has '%s' in another case: ambiguous"
                                  % (self.where, name))
        value = self.value.get(name)
        if value is None:
            return default
        if type(value) is not kind:
            raise InvalidDocument("%s: '%s' must be a JSON %s" % (
                self.where, name,
                {dict: "object", list: "array", str: "string", int: "integer",
                 bool: "boolean"}[kind]))
        if kind is str and re.search("[\ud800-\udfff]", value):  # JSON can spell it
            raise InvalidDocument("%s: '%s' is not valid Unicode" % (self.where, name))
        return Document(value, "%s.%s" % (self.where, name)) if kind is dict else value

    def need(self, name, kind):
        """Member `name`, which must be there."""
        value = self.get(name, kind)
        if value is None:
            raise InvalidDocument("%s has no '%s'" % (self.where, name))
        return value

    def size(self, name):
        """Member `name` as a number of bytes."""
        value = self.need(name, int)
        if not 0 <= value < INTEGER_LIMIT:
            raise InvalidDocument("%s: '%s' is %d: not a size"
                                  % (self.where, name, value))
        return value

    def digest(self, name):
        """Member `name` as a Digest; see as_digest."""
        return self.as_digest(self.need(name, str), "%s.%s" % (self.where, name))

    @staticmethod
    def as_digest(value, where):
        """`value` (anything) as a Digest; raises InvalidDocument naming `where`.

        It may be of an algorithm that we cannot check: see Digest.require_known.
        """
        algorithm, _, encoded = str(value).partition(":")
        if algorithm not in _DIGEST_LENGTHS and len(str(value)) <= NAME_LIMIT and (
                re.fullmatch(_ANY_DIGEST, str(value))):
            return Digest(algorithm, encoded)
        try:
            return Digest.parse(value)
        except InvalidReference as error:
            raise InvalidDocument("%s: %s" % (where, error.message)) from None

    def texts(self, name):
        """Member `name`, an object of texts, as a dict; empty where it is absent."""
        members = self.get(name, dict)
        texts = {key: text for key, text in (members.value if members else {}).items()
                 if text is not None}
        if not all(type(text) is str for text in texts.values()) or (
                re.search("[\ud800-\udfff]", "".join(texts.values()))):
            raise InvalidDocument("%s: '%s' must hold strings of valid Unicode"
                                  % (self.where, name))
        return texts

    def base64url(self, name):
        """Member `name` as bytes: base64url as libtrust reads it, lines, no padding."""
        text = re.sub("[\r\n ]", "", self.need(name, str)).rstrip("=")
        if not re.fullmatch("[A-Za-z0-9_-]*", text) or len(text) % 4 == 1:
            raise InvalidDocument("%s: '%s' is not base64url" % (self.where, name))
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))

    def children(self, name, limit):
        """Member `name`, an array of at most `limit` objects, as Documents.

        Where it is null or absent there are none: so Go, which wrote it, reads it.
        """
        values = self.get(name, list, [])
        if len(values) > limit:
            raise LimitExceeded("%s: '%s' has %d entries, more than the limit of %d"
                                % (self.where, name, len(values), limit))
        return [Document(value, "%s.%s[%d]" % (self.where, name, i))
                for i, value in enumerate(values)]


class PrettySignature(value_type("payload signed")):
    """A schema1 body taken apart: `payload` is what was signed and its digest covers.

    `signed` tells whether there were signatures. Whatever else the body holds is not
    covered by anything (CVE-2014-8179): parse the payload, never the body.
    """

    @classmethod
    def parse(cls, body: bytes, what: str = "manifest") -> "PrettySignature":
        """The PrettySignature in the bytes `body`; raises InvalidDocument.

        Source: docker/libtrust, jsonsign.go, ParsePrettySignature.
        """
        document = Document.parse(body, what)
        if document.get("signatures", list) is None:
            return cls(body, False)
        formats = set()
        for entry in document.children("signatures", LAYER_COUNT_LIMIT):
            protected = Document.parse(entry.base64url("protected"),
                                       entry.where + ".protected")
            formats.add((protected.size("formatLength"),
                         protected.base64url("formatTail")))
        if len(formats) != 1:
            raise InvalidDocument("%s: %s" % (
                what, "its signatures disagree on the payload" if formats else
                "no signatures in its list"))
        length, tail = formats.pop()
        if length > len(body):
            raise InvalidDocument("%s: formatLength %d is beyond its end"
                                  % (what, length))
        return cls(body[:length] + tail, True)


# --------------------------------------------------------------------------------------
# 5  Manifests: bytes -> value: manifests, indexes, configs
# --------------------------------------------------------------------------------------

class Descriptor(value_type("media_type digest size platform annotations artifact_type",
                            None, {}, "")):
    """A pointer to content (OCI image-spec, descriptor.md).

    `size` is in bytes, None where the manifest does not say (schema1); `platform` is
    None where there is none. Only in an entry of an index may the `digest` be of an
    algorithm that we cannot check: the other entries do not suffer by it.
    """

    @property
    def is_tar(self):
        """Whether a layer's type is a tar's, or none at all."""
        return not self.media_type or "tar" in self.media_type and not (
            self.media_type.endswith("+encrypted"))

    @classmethod
    def of(cls, document, **more):
        """The Descriptor of a Manifest or Index; `more` are other fields."""
        return cls(document.media_type, document.digest, len(document.raw), **more)

    @classmethod
    def of_referrer(cls, document):
        """The same for a list of referrers (distribution-spec, "Listing Referrers")."""
        said = json.loads(document.raw.decode("utf-8"))
        kind = said.get("artifactType") or (said.get("config") or {}).get("mediaType")
        return cls.of(document, annotations=document.annotations,
                      artifact_type=kind or "")

    @classmethod
    def from_document(cls, document):
        """The Descriptor a Document holds; raises InvalidDocument."""
        platform = document.get("platform", dict)
        return cls(document.get("mediaType", str, ""), document.digest("digest"),
                   document.size("size"), platform and _platform(platform),
                   document.texts("annotations"), document.get("artifactType", str, ""))

    def as_json(self):
        """The entry of an index it makes, JSON-able, without what is empty."""
        platform = self.platform and {name: part for name, part in zip(
            ("os", "architecture", "variant", "os.version"), self.platform) if part}
        members = {"mediaType": self.media_type, "digest": str(self.digest),
                   "size": self.size, "platform": platform,
                   "annotations": self.annotations, "artifactType": self.artifact_type}
        return {name: member for name, member in members.items() if member}


def _platform(document):
    """The Platform a Document speaks of; None where it does not: docker's rule."""
    parts = [_part(document, name) for name in (
        "os", "architecture", "variant", "os.version")]
    return Platform.normal(*parts) if any(parts) else None


def _part(document, name):
    part = document.get(name, str, "")
    if len(part) > PLATFORM_LIMIT:
        raise InvalidDocument("%s: '%s' is longer than the limit of %d characters"
                              % (document.where, name, PLATFORM_LIMIT))
    return part


class Manifest(value_type(
        "raw media_type digest config layers artifact_type subject annotations",
        "", None, {})):
    """A schema2 or OCI image manifest: `raw` bytes as received, and what they say.

    `config` and `layers` are Descriptors; `artifact_type` is "" for an image, else what
    it is; `subject` is the Digest of what it refers to, None for nothing.
    """


class Index(value_type("raw media_type digest manifests subject annotations",
                       None, {})):
    """A docker manifest list or OCI index of Descriptors, `manifests`. See Manifest."""

    artifact_type = ""  # see Manifest


class Layer(value_type("id blob diff_id v1_json throwaway size", False, None)):
    """One layer of an image.

    `id` is the v1 id for schema1, else the hex of the OCI chainID, "" for an artifact's
    blob; `blob` the Descriptor of what is transferred; `diff_id` is None for that, and
    for schema1 until it is unpacked; `v1_json` is its v1 image JSON, as text. A
    `throwaway` layer (schema1) changed nothing: modern formats leave it out. `size` is
    the sum of the sizes in its tar headers, in bytes, None where it was not unpacked.
    """

    @property
    def digest(self):
        """The blob's digest."""
        return self.blob.digest

    @property
    def blob_size(self):
        """The blob's size in bytes; None for schema1 before it was fetched."""
        return self.blob.size


class Schema1Manifest(value_type("raw media_type digest architecture layers")):
    """A docker schema1 manifest; `layers` oldest first, repeated entries taken out.

    `digest` covers the payload of its pretty signature, not `raw`.
    """

    artifact_type, subject, annotations = "", None, {}  # see Manifest


#: Member of a manifest -> the shape it is of.
_SHAPES = {"fsLayers": "schema1", "history": "schema1", "config": "image",
           "layers": "image", "manifests": "index"}


def decode_manifest(
        raw: bytes, content_type: "str | None" = None, digest: "Digest | None" = None,
        what: str = "manifest") -> "Manifest | Index | Schema1Manifest":
    """The Manifest, Index or Schema1Manifest in the bytes `raw`.

    `content_type` is the HTTP header, None where there was none; `digest` is what it
    must have, None to take the digest it has; `what` names it in errors. Header, the
    body's `mediaType`, and its shape decide of what kind it is: all that speak must
    agree. Raises DigestMismatch, InvalidDocument, Unsupported.
    """
    signature, payload = None, raw
    if digest and Digest.of(raw, digest.require_known().algorithm) != digest:
        # Only a pretty signature may have a digest that is not its body's.
        with contextlib.suppress(InvalidDocument):
            signature = PrettySignature.parse(raw)
            payload = signature.payload
        digest.check(payload, what)
    document = Document.parse(payload, what)
    media_type, shape = _media_type(document, content_type)
    if shape == "schema1":
        return _decode_schema1(raw, signature or PrettySignature.parse(raw, what),
                               digest, what)
    if signature:
        raise InvalidDocument("%s: signed, but not schema1" % what)
    digest = digest or Digest.of(raw)
    if shape == "image":
        return _decode_image(document, raw, media_type, digest)
    return Index(raw, media_type, digest, tuple(map(
        Descriptor.from_document, document.children("manifests", INDEX_COUNT_LIMIT))),
        *_about(document))


def _media_type(document, content_type):
    """(media type, shape) of a manifest; InvalidDocument where the signs disagree."""
    present = [key for key in _SHAPES
               if document.get(key, type(document.value.get(key))) is not None] or [
                   key for key in _SHAPES if key in document.value]
    if len({_SHAPES[key] for key in present}) != 1:
        raise InvalidDocument("%s %s" % (document.where, "is ambiguous: it has %s"
                              % " and ".join(sorted(present)) if present else
                              "is no manifest: it has neither layers nor manifests"))
    shape = _SHAPES[present[0]]
    header = (content_type or "").partition(";")[0].strip().lower()
    claimed = document.get("mediaType", str)
    if claimed and claimed not in MANIFEST_SHAPES:
        raise Unsupported("%s is of type %s: not an image"
                          % (document.where, printable(claimed, 100)))
    if claimed and header in MANIFEST_SHAPES and header != claimed:
        raise InvalidDocument("%s was sent as %s but calls itself %s"
                              % (document.where, header, claimed))
    media_type = claimed or header
    if media_type not in MANIFEST_SHAPES:  # neither speaks
        config = document.get("config", dict) if shape == "image" else None
        docker = config and config.get("mediaType", str) == DOCKER_CONFIG
        media_type = {"index": OCI_INDEX, "schema1": DOCKER_SCHEMA1}.get(
            shape, DOCKER_MANIFEST if docker else OCI_MANIFEST)
    if MANIFEST_SHAPES[media_type] != shape:
        raise InvalidDocument("%s claims to be %s but has the shape of a %s manifest"
                              % (document.where, media_type, shape))
    version = document.need("schemaVersion", int)
    if version != (1 if shape == "schema1" else 2):
        raise InvalidDocument("%s: schemaVersion is %d" % (document.where, version))
    return media_type, shape


#: Configs of images, with what old registries gave to real ones: moby's list.
_IMAGE_CONFIG = (
    r"application/(vnd\.oci\.image|vnd\.docker\.container|(octet-stream|json)\Z)"
    r"|text/html\Z|\Z")


def _decode_image(document, raw, media_type, digest):
    config = Descriptor.from_document(document.need("config", dict))
    layers = tuple(Descriptor.from_document(layer)
                   for layer in document.children("layers", LAYER_COUNT_LIMIT))
    for one in distinct((config,) + layers, document.where):
        one.require_known()
    kind = config.media_type
    image = re.match(_IMAGE_CONFIG, kind)
    if image and layers and (config.size < 3 or all(  # ORAS' {}; signatures, SBOMs
            re.search("json|xml|text/", layer.media_type) for layer in layers)):
        image, kind = None, layers[0].media_type
    return Manifest(raw, media_type, digest, config, layers,
                    "" if image else document.get("artifactType", str) or kind,
                    *_about(document))


def distinct(blobs, where):
    """{digest: Descriptor} of these; raises InvalidDocument where one has two sizes."""
    found = {}
    for blob in blobs:
        if found.setdefault(blob.digest, blob).size != blob.size:
            raise InvalidDocument("%s gives two sizes for %s" % (where, blob.digest))
    return found


def _about(document):
    """(Digest of the subject or None, annotations) of a manifest."""
    document.get("artifactType", str)  # an image's, too: see Descriptor.of_referrer
    subject = document.get("subject", dict)
    return subject and subject.digest("digest"), document.texts("annotations")


def _decode_schema1(raw, signature, digest, what):
    digest = digest or Digest.of(signature.payload)
    digest.check(signature.payload, what)
    document = Document.parse(signature.payload, what)
    if _media_type(document, None)[1] != "schema1":
        raise InvalidDocument("%s: its signed payload is no schema1 manifest" % what)
    blobs = document.children("fsLayers", LAYER_COUNT_LIMIT)
    history = document.children("history", LAYER_COUNT_LIMIT)
    if not blobs or len(blobs) != len(history):
        raise InvalidDocument("%s: %d layers and %d history entries; they must be as "
                              "many and not none" % (what, len(blobs), len(history)))
    return Schema1Manifest(
        raw, DOCKER_SCHEMA1_SIGNED if signature.signed else DOCKER_SCHEMA1, digest,
        _part(document, "architecture"), tuple(_schema1_layers(blobs, history, what)))


def _schema1_layers(blobs, history, what):
    """Yields Layers, oldest first: docker's checks (distribution/pull_v2_unix.go)."""
    seen, below = set(), None
    for blob, entry in zip(reversed(blobs), reversed(history)):
        text = entry.need("v1Compatibility", str)
        v1 = Document.parse(text.encode("utf-8"), entry.where + ".v1Compatibility")
        name = v1.need("id", str)
        if not re.fullmatch("[a-f0-9]{64}", name):
            raise InvalidDocument("%s: 'id' is not 64 lowercase hex digits" % v1.where)
        if name == below:
            continue  # an id stands twice in a row: docker keeps the older
        if name in seen:
            raise InvalidDocument("%s: layer id %s stands twice" % (what, name))
        if (v1.get("parent", str) or None) != below:
            raise InvalidDocument("%s: the parent of layer %s is not the layer below it"
                                  % (what, name))
        seen.add(name)
        below = name
        digest = blob.digest("blobSum").require_known()
        yield Layer(name, Descriptor(DOCKER_LAYER, digest, None), None, text,
                    v1.get("throwaway", bool, False))


def matching(index, platform):
    """The descriptors of `index` that fit the Platform, best first.

    docker's rule: its fallback order, then place in the index; an entry without a
    platform (a nested index, say) fits, but last. Attestations ("unknown/unknown")
    never fit. Index entries of other than manifest types are passed over.
    """
    order = {way[:3]: rank for rank, way in enumerate(platform.candidates())}

    def rank(entry):
        return order.get(entry.platform[:3]) if entry.platform else len(order)

    return sorted((entry for entry in index.manifests if entry.media_type
                   in MANIFEST_SHAPES and rank(entry) is not None), key=rank)


def walk(fetch, entries, above=(), platform=None, seen=None):
    """Yields the trails to what Descriptors lead to: `above`, and documents from there.

    Depth first; in an index, to what is `matching` a `platform` if one is given. Each
    document once, and none of `seen`, for indexes may share what is below them: a few
    kilobytes hold more ways than anyone can go. `fetch(Descriptor)` gives a document,
    decoded; None is passed over. Raises what `fetch` raises, and LimitExceeded beyond
    INDEX_DEPTH_LIMIT, DOCUMENT_COUNT_LIMIT and DOCUMENT_BYTES_LIMIT.
    """
    seen = set() if seen is None else seen  # of what Descriptors said
    waiting, count, size = [(above, entry) for entry in reversed(entries)], 0, 0
    while waiting:
        trail, entry = waiting.pop()
        if entry[:3] in seen:
            continue
        seen.add(entry[:3])
        count, size = count + 1, size + (
            entry.media_type in MANIFEST_SHAPES and entry.size)
        if count > DOCUMENT_COUNT_LIMIT or size > DOCUMENT_BYTES_LIMIT:
            raise LimitExceeded("one name leads to more than %d manifests and indexes, "
                                "or to more than %d bytes of them"
                                % (DOCUMENT_COUNT_LIMIT, DOCUMENT_BYTES_LIMIT))
        document = fetch(entry)
        if document is None:
            continue
        trail += (document,)
        yield trail
        if isinstance(document, Index):
            if len(trail) > INDEX_DEPTH_LIMIT:
                raise LimitExceeded("more than %d indexes inside one another"
                                    % INDEX_DEPTH_LIMIT)
            below = matching(document, platform) if platform else document.manifests
            waiting += [(trail, entry) for entry in reversed(below)]


def choose(fetch, document, platform):
    """The documents down to a Platform's image; see walk. Raises NoMatchingPlatform."""
    if not isinstance(document, Index):
        return (document,)
    for trail in walk(fetch, matching(document, platform), (document,), platform):
        found = trail[-1]
        # A signature that happens to stand there, of no platform, is not meant.
        if not isinstance(found, Index) and (not found.artifact_type or any(
                entry.platform and entry.digest == found.digest
                for entry in trail[-2].manifests)):
            return trail
    raise NoMatchingPlatform(platform, [
        entry.platform for entry in document.manifests
        if entry.platform and entry.platform.os != "unknown"])


class ImageConfig(value_type("raw value platform diff_ids")):
    """An image config (OCI image-spec, config.md): `raw` bytes, `value` the object, the
    Digests `diff_ids` of its unpacked layers, oldest first, `platform` what it is for.
    """

    @classmethod
    def parse(cls, raw: bytes, what: str = "config") -> "ImageConfig":
        """The ImageConfig in the bytes `raw`; raises InvalidDocument, Unsupported."""
        document = Document.parse(raw, what)
        rootfs = document.need("rootfs", dict)
        if rootfs.get("type", str, "layers") != "layers":
            raise InvalidDocument("%s: rootfs.type must be 'layers'" % what)
        diff_ids = tuple(
            Document.as_digest(value, "%s.rootfs.diff_ids[%d]" % (what, i))
            .require_known()
            for i, value in enumerate(rootfs.get("diff_ids", list, [])))
        return cls(raw, document.value, _platform(document) or Platform.normal("", ""),
                   diff_ids)


def blob_layers(blobs):
    """Descriptors as Layers of which nothing else is known."""
    return tuple(Layer("", blob, None, "") for blob in blobs)


def list_layers(manifest, config=None):
    """The Layers of an image, oldest first.

    `config` is its ImageConfig, None of schema1 and artifacts. Raises VerificationError
    where its diffIDs are not as many as the layers, or two are of one blob.
    """
    if config is None:
        return manifest.layers if isinstance(manifest, Schema1Manifest) else (
            blob_layers(manifest.layers))
    if len(config.diff_ids) != len(manifest.layers):
        raise VerificationError("config lists %d diffIDs, the manifest %d layers"
                                % (len(config.diff_ids), len(manifest.layers)))
    known, layers, chain = {}, [], None
    for blob, diff_id in zip(manifest.layers, config.diff_ids):
        if known.setdefault(blob.digest, diff_id) != diff_id:  # it is unpacked once
            raise VerificationError("config gives two diffIDs to one blob, %s"
                                    % str(blob.digest))
        parent, chain = chain, diff_id
        if parent:  # OCI image-spec, config.md, "Layer ChainID"
            chain = Digest.of(("%s %s" % (parent, diff_id)).encode("ascii"))
        top = len(layers) == len(manifest.layers) - 1
        # As `docker save` writes it: the top has the config, the rest next to nothing.
        v1 = dict(config.value if top else {"created": "1970-01-01T00:00:00Z"},
                  id=chain.hex, **{"parent": parent.hex} if parent else {})
        layers.append(Layer(chain.hex, blob, diff_id, canonical_json({
            key: member for key, member in v1.items()
            if key not in ("rootfs", "history")}).decode("utf-8")))
    return tuple(layers)


def _go_history(v1):
    """One entry of a config's history, from a v1 image, as Go writes it."""
    command = (v1.get("container_config") or {}).get("Cmd") or []
    created = re.sub(r"(\.[0-9]{0,9})[0-9]*", lambda match: match.group(1).rstrip("0."),
                     v1.get("created") or "0001-01-01T00:00:00Z")
    fields = (("created", re.sub("[+-]00:00$", "Z", created)),
              ("author", v1.get("author")),
              ("created_by", command if type(command) is str else " ".join(command)),
              ("comment", v1.get("comment")),
              ("empty_layer", v1.get("throwaway")))
    return {name: value for name, value in fields if value}


def modern_config(manifest, diff_ids):
    """The ImageConfig docker gives to a Schema1Manifest.

    `diff_ids` are those of its layers that are not throwaway, oldest first. Its digest
    is the image ID that containers/image computes, byte for byte
    (manifest/docker_schema1.go, ToSchema2Config), except for images of docker before
    1.8.3, whose members it re-encodes. Raises InvalidDocument.
    """
    text = re.sub(r'("[^"\\]*(?:\\.[^"\\]*)*")|\s+', r"\1", manifest.layers[-1].v1_json)
    decoder, members, at = json.JSONDecoder(), {}, 1  # key -> text: Go's RawMessage
    while text.startswith('"', at):
        key, colon = decoder.raw_decode(text, at)
        _, end = decoder.raw_decode(text, colon + 1)
        members[key] = text[colon + 1:end]
        at = end + 1
    write = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    members["rootfs"] = write(dict({"type": "layers"}, **(
        {"diff_ids": list(map(str, diff_ids))} if diff_ids else {})))
    try:
        members["history"] = write([_go_history(json.loads(layer.v1_json))
                                    for layer in manifest.layers])
    except (TypeError, AttributeError):
        raise InvalidDocument(
            "a v1Compatibility has members of the wrong type") from None
    text = "{%s}" % ",".join(
        "%s:%s" % (write(key), members[key]) for key in sorted(members) if key not in (
            "id", "parent", "Size", "parent_id", "layer_id", "throwaway"))
    # Go escapes these, too, which stand in strings only.
    text = re.sub("[<>&\u2028\u2029]", lambda match: "\\u%04x" % ord(match.group()),
                  text)
    return ImageConfig.parse(text.encode("utf-8", "backslashreplace"))


def modern_manifest(config, layers, kind=DOCKER_MANIFEST, config_kind=DOCKER_CONFIG):
    """A Manifest of an ImageConfig and layers' Descriptors, schema2 by default."""
    pointer = Descriptor(config_kind, Digest.of(config.raw), len(config.raw))
    first, *others = [{"mediaType": one.media_type, "size": one.size,
                       "digest": str(one.digest)} for one in (pointer, *layers)]
    raw = canonical_json({"schemaVersion": 2, "mediaType": kind, "config": first,
                          "layers": others}, sort_keys=False)
    return Manifest(raw, kind, Digest.of(raw), pointer, tuple(layers))


def with_layers(manifest, layers):
    """A Manifest like `manifest`, its layers' Descriptors replaced by `layers`."""
    document = json.loads(manifest.raw.decode("utf-8"))
    for member, old, layer in zip(document["layers"], manifest.layers, layers):
        if old.digest != layer.digest:  # what is said of the old bytes goes with them
            member.pop("data", None)
            member.pop("urls", None)
            for key in filter(re.compile(".*(zstd-chunked|stargz)").match,
                              old.annotations):
                del member["annotations"][key]
        member.update(mediaType=layer.media_type, size=layer.size,
                      digest=str(layer.digest))
    raw = canonical_json(document, sort_keys=False)
    return manifest._replace(raw=raw, digest=Digest.of(raw), layers=tuple(layers))


# --------------------------------------------------------------------------------------
# 6  Tar: chunks -> members and their data, and back
# --------------------------------------------------------------------------------------

class Entry(value_type("path kind size mode uid gid mtime link device xattrs where",
                       b"", None, (), None)):
    """One member of a layer's tar, extensions applied. Names are bytes, as in the tar.

    `kind` is file, dir, hardlink, symlink, char, block, fifo or unknown; `size` is
    logical, in bytes; `mtime` is in nanoseconds; `link` is the target of a link;
    `device` is (major, minor), or None; `where` a LayerStore has its data, or None.
    """

    @classmethod
    def loads(cls, record):
        """The Entry that `dumps` made these bytes of."""
        return cls._make(marshal.loads(record))

    def dumps(self):
        """It as bytes, which weigh a third of it; they never leave this process."""
        return marshal.dumps(tuple(self), 2)


#: name, mode, uid, gid, size, mtime, checksum, type, link, magic and version (not the
#: names of owner and group), device's two numbers, prefix: POSIX.1-2001, ustar.
_TAR_FIELDS = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
_GNU_MAGIC = b"ustar  \0"
_KINDS = {b"0": "file", b"\0": "file", b"7": "file", b"S": "file", b"1": "hardlink",
          b"2": "symlink", b"3": "char", b"4": "block", b"5": "dir", b"6": "fifo"}
_XATTR = b"SCHILY.xattr."  # pax key prefix; star's, used by Go and GNU tar
_TAR_SIZE = re.compile(rb" *[0-7]*[ \0]*\Z")
_PAX_RECORD = re.compile(rb"([0-9]{1,7}) ([^=]+)=")


@functools.lru_cache(maxsize=1024)  # modes and owners of many members are the same
def _tar_number(field):
    """A number in a header: octal as Go reads it, or GNU's base-256. ValueError."""
    if field[0] in (0x80, 0xff):
        number = int.from_bytes(field[1:], "big")
        return number - (field[0] & 1) * 256 ** (len(field) - 1)
    text = field.strip(b" \0").partition(b"\0")[0]
    if text and not text.isdigit():  # int() takes 1_0 and +1
        raise ValueError("a number that is not octal")
    return int(text or b"0", 8)


def _tar_sum(block):
    """The checksum of a header block, blanks for its own field."""
    total = 8 * ord(" ")
    for part in (block[:148], block[156:400], block[400:]):  # sum(part), but faster:
        total += (zlib.adler32(part) & 0xffff) - 1  # exact up to 256 bytes, RFC 1950
    return total


def _tar_entry(block):
    """(type, Entry) of a header block, without its extensions; raises ValueError."""
    (name, mode, uid, gid, size, mtime, checksum, kind, link, magic, major, minor,
     prefix) = _TAR_FIELDS.unpack(block)
    if checksum[0] & 0x80:
        raise ValueError("a checksum that is not octal")
    if _tar_sum(block) != _tar_number(checksum):
        raise ValueError("a checksum that is wrong")
    if not (size[0] & 0x80 or _TAR_SIZE.match(size)):
        raise ValueError("a size that is not octal")  # readers differ on the rest
    if kind == b"S" and magic != _GNU_MAGIC:
        raise ValueError("a sparse file of GNU tar in a header that is not GNU's")
    name = name.partition(b"\0")[0]
    if prefix[0]:
        if magic == _GNU_MAGIC:
            prefix = _gnu_prefix(prefix)
        elif magic[:6] != b"ustar\0":
            prefix = b""
        elif block[508:] == b"tar\0":  # star has two times behind it
            prefix = prefix[:131]
    prefix = prefix.partition(b"\0")[0]
    if prefix:
        name = prefix + b"/" + name
    return kind, Entry(
        name, _KINDS.get(kind, "unknown"), _tar_number(size),
        _tar_number(mode) & 0o7777, max(_tar_number(uid), 0), max(_tar_number(gid), 0),
        _tar_number(mtime) * 10 ** 9, link.partition(b"\0")[0],
        (_tar_number(major), _tar_number(minor)) if kind in b"34" else None)


def _gnu_prefix(field):
    """The prefix in a GNU header, as Go reads it, which before 1.8 wrote one there: if
    it begins with two times, each a number or empty, there is none.
    """
    try:
        for seconds in field[:12], field[12:24]:
            if seconds[0]:
                _tar_number(seconds)
        return b""
    except ValueError:
        return field if max(field.partition(b"\0")[0]) < 128 else b""


def _pax_number(text, key):
    """A value of a pax header as a number; raises ValueError."""
    if not re.fullmatch(rb"[0-9]{1,18}", text):
        raise ValueError("pax %s is not a number" % key.decode("ascii", "replace"))
    return int(text)


def _pax_records(data):
    """Yields (key, value) of "LENGTH KEY=VALUE\\n" records (pax); raises ValueError."""
    place = 0
    while place < len(data):
        match = _PAX_RECORD.match(data, place)
        end = place + int(match.group(1)) if match else 0
        if not match or end <= match.end() or data[end - 1:end] not in b"\n":
            raise ValueError("a malformed pax header")
        if end > len(data):
            raise ValueError("a pax header that is cut short")
        yield match.group(2), data[match.end():end - 1]
        place = end


def _pax_time(text):
    """A time in nanoseconds; 0 for what is none."""
    match = re.fullmatch(rb"(-?)([0-9]{1,18})(?:\.([0-9]*))?", text)
    if not match:
        return 0
    sign, seconds, rest = match.groups(b"")
    return int(sign + seconds + rest[:9].ljust(9, b"0"))


def _sparse_map(numbers, size, stored):
    """(bytes of a hole, bytes of data behind it) pairs of a file of `size` bytes, from
    its map of (offset, length) pairs; as many bytes are `stored`. Raises ValueError.
    """
    found, at = [], 0
    for offset, length in [*zip(numbers[::2], numbers[1::2]), (size, 0)]:
        if offset < at or length < 0:
            raise ValueError("a sparse map that makes no sense")
        found.append((offset - at, length))
        at = offset + length
    if stored != sum(length for _, length in found):
        raise ValueError("a sparse map that does not fit the data")
    return found


def drain(chunks):
    """Draws all there is, for what the drawing of it does."""
    for _ in chunks:
        pass


class Tar:
    """The members of a tar, drawn from its `chunks`, each with its data.

        for entry, data in Tar(chunks, what): ...

    `data` yields what is stored for the Entry, as bytes-likes, and for each hole of a
    sparse file how many bytes it is long, as an int; it need not be drawn. The tar is
    read to its end marker; what is behind stays in `chunks`. tarfile would end without
    a word at a broken header. So far, `size` is the sum of the logical sizes in the
    headers, in bytes, `members` counts, `offset` is how many bytes were read; `sparse`
    is whether the last member is. Members may not hold more than `limit` bytes, holes
    included. Raises InvalidDocument, LimitExceeded, TooLarge.
    """

    def __init__(self, chunks, what, limit=LAYER_SIZE_LIMIT):
        self._chunks, self.what, self._limit = iter(chunks), what, limit
        self.size = self.members = self.offset = 0
        self.sparse = False
        self._view = memoryview(b"")  # of the chunk that is being read
        self._end = 0  # the offset of the end of the member's data
        self._pax = {}  # extended header for the next member
        self._long = {}  # GNU long name (L) and link (K) for the next member

    def __iter__(self):
        zeros = 0
        try:  # what is called here raises ValueError for what is malformed
            while zeros < 2 and self._more():
                block = self._take(TAR_BLOCK)
                if not block.strip(b"\0"):
                    zeros += 1
                    continue
                if zeros:
                    raise ValueError("data after a zero block")
                kind, entry = _tar_entry(block)
                if entry.size < 0:
                    raise ValueError("a negative size")
                if kind in b"xXgLK":
                    self._extension(kind, entry.size)
                else:
                    yield self._member(kind, entry, block)
                    drain(self._draw(self._end - self.offset))
                    # `umoci insert` writes none behind the last.
                    drain(self._draw(-self.offset % TAR_BLOCK, whole=False))
            if self._pax or self._long:
                raise ValueError("an extended header of no member")
        except ValueError as error:
            if isinstance(error, ImagecError):  # a UsageError is one, too
                raise
            raise InvalidDocument("%s: not a valid tar after %d members: %s"
                                  % (self.what, self.members, error)) from None

    def _more(self):
        """Whether anything is left."""
        while not self._view:
            data = next(self._chunks, None)
            if data is None:
                return False
            self._view = memoryview(data)
        return True

    def _draw(self, count, whole=True):
        """Yields the next `count` bytes in pieces; fewer are an error if `whole`."""
        while count:
            if not self._more():
                if not whole:
                    return
                raise InvalidDocument("%s: the tar in it is cut short" % self.what)
            piece, self._view = self._view[:count], self._view[count:]
            count -= len(piece)
            self.offset += len(piece)
            yield piece

    def _take(self, count):
        if count > len(self._view):
            return b"".join(self._draw(count))
        data, self._view = bytes(self._view[:count]), self._view[count:]
        self.offset += count
        return data

    def _extension(self, kind, size):
        if size > TAR_EXTENSION_LIMIT:
            raise LimitExceeded("%s: a tar header of %d bytes, more than the limit of "
                                "%d" % (self.what, size, TAR_EXTENSION_LIMIT))
        if kind == b"X" or self._pax and kind in b"xg" or self._long and kind == b"g":
            raise ValueError("extended headers that readers disagree on")
        data = self._take(size + -size % TAR_BLOCK)[:size]
        if kind in b"LK":
            self._long[kind] = data.partition(b"\0")[0]
            if not self._long[kind]:
                raise ValueError("an empty long name, on which readers disagree")
            return
        if data.count(b"\n") > PAX_COUNT_LIMIT:
            raise LimitExceeded("%s: a pax header of more than %d lines"
                                % (self.what, PAX_COUNT_LIMIT))
        for key, value in _pax_records(data):
            if b"\0" in key or not value and key in (b"path", b"linkpath",
                                                     b"GNU.sparse.name"):
                raise ValueError("a pax record that readers disagree on")
            if kind == b"g":
                if key in (b"path", b"linkpath", b"size"):
                    raise ValueError("a global pax header that renames every member")
            else:
                self._pax[key] = value

    def _number(self, key, default):
        return default if key not in self._pax else _pax_number(self._pax[key], key)

    def _member(self, kind, entry, block):
        """(Entry, data) of a member proper: its logical size counts."""
        stored = size = entry.size
        inline = False  # whether a sparse map is in the data (GNU tar's 1.0)
        if self._pax or self._long:
            stored = size = self._number(b"size", size)
            size = self._number(b"GNU.sparse.realsize", size)
            inline = any(key.startswith(b"GNU.sparse.") for key in self._pax)
            if inline and (b"1", b"0", None) != tuple(map(self._pax.get, (
                    b"GNU.sparse.major", b"GNU.sparse.minor", b"GNU.sparse.size"))):
                raise ValueError("a sparse file whose map is of an unknown kind")
            entry = self._extended(entry)
            self._pax, self._long = {}, {}
        if kind == b"\0" and entry.path.endswith(b"/"):
            entry = entry._replace(kind="dir")
        if kind == b"S":
            size = _tar_number(block[483:495])
            if size < 0 or inline:  # of two maps readers take one or the other
                raise ValueError("a negative size" if size < 0 else "two sparse maps")
        if entry.kind not in ("file", "unknown"):
            stored = size = 0  # POSIX: no data follows, whatever the header says
        self.members += 1
        self.size += size
        if self.size > self._limit:  # which a sparse file reaches in a few bytes
            raise TooLarge("%s holds files of more than the limit of %d bytes"
                           % (self.what, self._limit),
                           hint="raise it with --max-layer-size")
        sparse = self._old_sparse(block) if kind == b"S" else None  # numbers of its map
        self._end = self.offset + stored
        if inline:
            sparse, stored = self._inline_sparse(stored)
        self.sparse = sparse is not None
        if abs(entry.mtime) >= 10 ** 9 << 40:  # more than any file system can hold
            entry = entry._replace(mtime=0)
        return entry if entry.size == size else entry._replace(size=size), (
            self._spread(_sparse_map(sparse, size, stored)) if self.sparse else
            self._draw(stored))

    def _extended(self, entry):
        """The Entry with what its extended headers say of it, but for its size."""
        pax, long = self._pax, self._long
        if b"L" in long and b"path" in pax or b"K" in long and b"linkpath" in pax:
            raise ValueError("a name by GNU's header and another by pax")
        return entry._replace(
            path=pax.get(b"GNU.sparse.name",
                         pax.get(b"path", long.get(b"L", entry.path))),
            link=pax.get(b"linkpath", long.get(b"K", entry.link)),
            uid=self._number(b"uid", entry.uid), gid=self._number(b"gid", entry.gid),
            mtime=_pax_time(pax[b"mtime"]) if b"mtime" in pax else entry.mtime,
            xattrs=tuple(sorted((key[len(_XATTR):], value) for key, value in pax.items()
                                if key.startswith(_XATTR) and value)))

    def _spread(self, sparse):
        """Yields the data of a sparse file, and the numbers of bytes between it."""
        for hole, length in sparse:
            if hole:
                yield hole
            yield from self._draw(length)

    def _old_sparse(self, block):
        """Old GNU sparse: four entries in the header, 21 in each block that follows.

        The first that begins with a NUL ends a table.
        """
        table, more, numbers = block[386:482], block[482], []
        while True:
            for at in range(0, len(table), 24):
                if not (table[at] and table[at + 12]):
                    if more:  # GNU tar would stop here, others read on
                        raise ValueError("a sparse map that ends before its end")
                    break
                numbers += map(_tar_number, (table[at:at + 12], table[at + 12:at + 24]))
            if len(numbers) > TAR_EXTENSION_LIMIT // 12:
                raise LimitExceeded("%s: a sparse file in too many pieces" % self.what)
            if not more:
                return numbers
            block = self._take(TAR_BLOCK)
            table, more = block[:504], block[504]

    def _inline_sparse(self, stored):
        """GNU sparse 1.0: (numbers of the map, bytes of data behind it).

        It stands before the data as decimal lines, padded to a block.
        """
        numbers, rest = [], b""
        while not numbers or len(numbers) <= 2 * numbers[0]:
            if stored < TAR_BLOCK or len(rest) > NUMBER_LIMIT or (
                    len(numbers) > TAR_EXTENSION_LIMIT // 8):
                raise ValueError("a sparse map that does not end")
            *lines, rest = (rest + self._take(TAR_BLOCK)).split(b"\n")
            stored -= TAR_BLOCK
            for line in lines:
                if not numbers or len(numbers) <= 2 * numbers[0]:
                    numbers.append(_pax_number(line, b"GNU.sparse.map"))
        return numbers[1:], stored


def tar_header(name, size, kind=b"0", mode=0o644, uid=0, gid=0, mtime=0, link=b"",
               device=None, xattrs=()):
    """The header blocks of one member: ustar, with a pax header where it does not fit.

    Written here because tarfile's differ between Pythons in the fields of devices, and
    an archive must not. `name` and `link` are bytes, `mtime` is in nanoseconds.
    """
    pax = {_XATTR + key: value for key, value in dict(xattrs).items()}
    major, minor = device or (0, 0)

    def fits(key, value, width):
        if len(value) > width:
            pax[key] = value
        return value[:width]

    def number(key, value, digits):
        if 0 <= value < 8 ** digits:
            return b"%0*o\0" % (digits, value)
        pax[key] = b"%d" % value
        return b"0" * digits + b"\0"

    block = _TAR_FIELDS.pack(
        fits(b"path", name, 100), number(b"mode", mode, 7), number(b"uid", uid, 7),
        number(b"gid", gid, 7), number(b"size", size, 11),
        number(b"mtime", mtime // 10 ** 9, 11), b" " * 8, kind,
        fits(b"linkpath", link, 100), b"ustar\00000",
        number(b"devmajor", major, 7), number(b"devminor", minor, 7), b"")
    block = block[:148] + b"%06o\0 " % _tar_sum(block) + block[156:]
    if mtime % 10 ** 9:
        pax[b"mtime"] = b"-"[:mtime < 0] + (
            b"%d.%09d" % divmod(abs(mtime), 10 ** 9)).rstrip(b"0")
    if not pax:
        return block
    records = []
    for key, value in sorted(pax.items()):  # it counts itself
        length = len(key) + len(value) + 3
        length += len(str(length + len(str(length))))
        records.append(b"%d %s=%s\n" % (length, key, value))
    records = b"".join(records)
    return (tar_header(b"././@PaxHeader", len(records), b"x") + records
            + bytes(-len(records) % TAR_BLOCK) + block)


# --------------------------------------------------------------------------------------
# 7  Proof: chunks -> proved chunks, and what they unpack to
# --------------------------------------------------------------------------------------
# A blob's bytes are drawn, not pushed: each step is a generator over the one before it,

#     received -> proved -> inflated -> Tar

# and raises when its turn has come. `check` is called where bytes come from, and for
# each chunk of what they unpack to; it raises where work should not go on.

def go_on():
    """A `check` that never raises, as others do where work should not go on."""


def begin(target):
    """A thread that calls `target()`; raises OSError where none is to be had."""
    thread = threading.Thread(target=target, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        raise OSError(errno.EAGAIN, "no thread is to be had: raise the limit of "
                      "processes (ulimit -u, pids.max)") from None
    return thread


def pieces(file, size=float("inf"), check=go_on):
    """Yields the next `size` bytes of a binary file, or what is left, in pieces."""
    while size:
        check()
        data = file.read(min(CHUNK, size))
        if not data:
            return
        size -= len(data)
        yield data


def waiting(file, check):
    """Yields what comes on a pipe or the like, in pieces; `check` may end the wait."""
    def more():
        check()
        with contextlib.suppress(OSError, ValueError):  # no descriptor, or Windows
            while not select.select([file], [], [], CANCEL_NOTICED)[0]:
                check()
        return file.read1(CHUNK)

    return iter(more, b"")


def proved(chunks: collections.abc.Iterable, digest: Digest, size: "int | None" = None,
           what: "str | None" = None) -> collections.abc.Iterator:
    """Yields `chunks` on; raises at their end unless they are the blob of the Digest.

    SizeMismatch as soon as there are too many bytes, or where there are too few;
    DigestMismatch. `size` is None where it is not known; `what` names it in errors.
    """
    what, received = what or "blob " + str(digest), 0
    hashing = hashlib.new(digest.require_known().algorithm)
    for data in chunks:
        received += len(data)
        if size is not None and received > size:
            raise SizeMismatch(what, size, received)
        hashing.update(data)
        yield data
    if size is not None and received != size:
        raise SizeMismatch(what, size, received)
    actual = Digest(digest.algorithm, hashing.hexdigest())
    if actual != digest:
        raise DigestMismatch(what, digest, actual)


def ahead(chunks):
    """Yields `chunks`, drawn a few ahead in a thread of its own: the only thread
    boundary inside a layer. It must be closed where it is not drawn to its end.

    zlib, hashlib and sockets release the interpreter lock, so that stages of one layer
    really run side by side; the short queue keeps memory flat.
    """
    import queue
    ready, error, given_up = queue.Queue(2), None, False

    def draw():
        nonlocal error
        try:
            for data in chunks:
                if given_up:
                    break
                ready.put(data)
        except BaseException as caught:  # carried to who draws from us
            if not given_up or isinstance(caught, VerificationError):
                error = caught
        ready.put(None)

    try:
        drawn, thread = iter(ready.get, None), begin(draw)
    except OSError:  # then here
        yield from chunks
        return
    try:
        yield from drawn
    finally:
        given_up = True
        drain(drawn)  # so that nobody waits for room
        thread.join()
        if error is not None:  # given up or not: what failed first, or a wrong digest
            raise error


class _Gzip:
    """zlib in the shape of bz2's and lzma's decompressors: one gzip member."""

    def __init__(self):
        self._inflate = zlib.decompressobj(16 + zlib.MAX_WBITS)

    def decompress(self, data, limit):
        inflate = self._inflate
        data = inflate.decompress(inflate.unconsumed_tail + data, limit)
        self.eof, self.unused_data = inflate.eof, inflate.unused_data
        self.needs_input = not inflate.unconsumed_tail
        return data


def _decompressor(name):
    """What unpacks one member or frame; raises ImportError."""
    if name == "gzip":
        return _Gzip()
    if name == "bzip2":
        import bz2
        return bz2.BZ2Decompressor()
    if name == "xz":
        import lzma
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_LIMIT)
    from compression import zstd
    return zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG})


_MAGIC = (  # what each codec begins with, six bytes at most
    rb"(?P<gzip>\x1f\x8b\x08)|(?P<bzip2>BZh)|(?P<xz>\xfd7zXZ\x00)"
    rb"|(?P<zstd>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)|(?P<tar>)")


def codec_of(file):
    """The codec of what stands next in a binary file, by name; "tar" for none."""
    head = file.read(6)
    file.seek(-len(head), os.SEEK_CUR)
    return re.match(_MAGIC, head).lastgroup


def could_unpack(file):
    """Whether some reader could unpack what stands next in a binary file."""
    if codec_of(file) != "tar":
        return True
    block = file.read(TAR_BLOCK)
    total = len(block) == TAR_BLOCK and _tar_sum(block)  # or, for some, of signed bytes
    return any(b"%o" % one in block[148:156] for one in (
        total, total - 256 * sum(byte > 127 for byte in block)) if one > 0)


def inflated(chunks, what):
    """Yields what a layer's blob unpacks to. Raises InvalidDocument, Unsupported."""
    chunks, head = iter(chunks), b""
    for data in chunks:
        head += data
        if len(head) > 5:
            break
    name = re.match(_MAGIC, head).lastgroup
    chunks = itertools.chain([head], chunks)
    try:
        member = None if name == "tar" else _decompressor(name)
    except ImportError as error:
        if name != "zstd":
            raise Unsupported("%s is compressed with %s" % (what, name),
                              lacking(error)) from None
        chunks, member = _zstd_program(chunks, what), None
    yield from chunks if member is None else _streams(chunks, name, member, what)


def _streams(chunks, name, member, what):
    """Yields what a stream of compressed members or frames holds, one after the other.

    Zeros after a member are padding (gzip and xz allow it); other bytes that begin no
    new member are an error, for another tool would read them otherwise.
    """
    for chunk in chunks:
        for at in range(0, len(chunk), INFLATE_SLICE):
            data = bytes(chunk[at:at + INFLATE_SLICE])
            while data is not None:
                if member is None:
                    data = data.lstrip(b"\0") if name in ("gzip", "xz") else data
                    if not data:
                        break
                    member = _decompressor(name)
                try:
                    made = member.decompress(data, CHUNK)
                except Exception as error:  # each codec has errors of its own
                    raise _codec_error(what, name, str(error)) from None
                if made:
                    yield made
                data = None if member.needs_input else b""
                if member.eof:
                    data, member = member.unused_data, None
    if member is not None:
        raise InvalidDocument("%s: truncated %s data" % (what, name))


def _codec_error(what, name, words):
    """The error a decompressor's words mean: `zstd --long` is no corruption."""
    if "emory" in words:  # xz has the same limit
        return Unsupported("%s takes more memory to unpack than the limit of %d bytes"
                           % (what, XZ_MEMORY_LIMIT))
    return InvalidDocument("%s: corrupt %s data: %s" % (what, name, words))


def _zstd_program(chunks, what):
    """Yields what the `zstd` program unpacks, where Python has no `compression.zstd`.

    It also unpacks gzip and xz behind a frame; the diffID decides.
    """
    import shutil
    import subprocess
    program = shutil.which("zstd")
    if program is None or not os.path.isabs(program):
        raise Unsupported("%s is compressed with zstd, which this Python cannot unpack"
                          % what, hint="install the zstd program, or use Python 3.14")
    errors = []

    def feed():
        try:
            for data in chunks:
                try:
                    process.stdin.write(data)
                except OSError:
                    break  # it has ended, and says why
        except BaseException as error:  # carried to who draws from us
            errors.append(error)
            process.kill()
        with contextlib.suppress(OSError):
            process.stdin.close()

    with subprocess.Popen(
            [program, "-dcq", "--memory=%dMB" % (1 << ZSTD_WINDOW_LOG - 20)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE) as process:
        feeder = begin(feed)
        try:
            yield from iter(lambda: process.stdout.read1(CHUNK), b"")
            feeder.join()
            words = process.stderr.read(ERROR_TEXT_LIMIT).decode("utf-8", "replace")
            if process.wait() and not errors:
                raise _codec_error(what, "zstd", words.strip() or "zstd failed")
        finally:
            process.kill()
            feeder.join()
            if errors:  # where we are given up, too: a wrong digest explains more
                raise errors[0]


class Unpacked(value_type("diff_id size")):
    """What a layer unpacks to: its `diff_id`, and the `size` of its Tar, in bytes."""


def limited(chunks, limit, what):
    """Yields `chunks` on; raises TooLarge beyond `limit` bytes."""
    count = 0
    for data in chunks:
        count += len(data)
        if count > limit:
            raise TooLarge("%s more than the limit of %d bytes" % (what, limit),
                           hint="raise it with --max-layer-size")
        yield data


def unpack(chunks, what="layer", limit=LAYER_SIZE_LIMIT, visit=drain, check=go_on,
           diff_id=None):
    """The Unpacked of the layer whose blob is `chunks`; memory stays flat.

    `visit(Tar)` draws its members. Raises InvalidDocument, TooLarge, Unsupported, and
    DigestMismatch unless it unpacks to `diff_id`, if that is known.
    """
    algorithm = diff_id.algorithm if diff_id else "sha256"
    hashing = hashlib.new(algorithm)

    def hashed(chunks):
        for data in chunks:
            check()  # here: few bytes may unpack to many
            hashing.update(data)
            yield data

    # Of a schema1 layer no size is known, and padding unpacks to nothing.
    chunks = limited(chunks, limit + limit // 8 + MIB, what + " takes")
    with contextlib.closing(inflated(chunks, what)) as plain, \
            contextlib.closing(ahead(plain)) as plain:
        plain = hashed(limited(plain, limit, what + " unpacks to"))
        tar = Tar(plain, what, limit)
        visit(tar)
        drain(plain)  # what is behind its end counts, too
    actual = Digest(algorithm, hashing.hexdigest())
    if diff_id not in (None, actual):
        raise DigestMismatch(what + " unpacked (diffID)", diff_id, actual,
                             "the config and the layer disagree")
    return Unpacked(actual, tar.size)


def prove(chunks, blob, unpack=None):
    """What `unpack(chunks, what)` makes of a blob, None without it.

    `chunks` come from a generator, which is closed in any case; they must be the blob
    of the Descriptor `blob`. A wrong blob digest is told before what it causes.
    """
    what = "layer " + str(blob.digest)
    with contextlib.closing(chunks):
        chunks = proved(chunks, blob.digest, blob.size, what)
        if unpack is None:
            drain(chunks)
            return None
        with contextlib.closing(ahead(chunks)) as chunks:
            try:
                return unpack(chunks, what)
            except ImagecError as error:
                if not isinstance(error, (LimitExceeded, TransportError)):
                    drain(chunks)  # a wrong digest, at their end, explains more
                raise


# --------------------------------------------------------------------------------------
# 8  Credentials: who we are to a registry
# --------------------------------------------------------------------------------------
# Found where docker and podman keep them. A secret is offered only to the very host its
# entry names (CVE-2021-41092: an entry fell back to another), and shown to nobody.

DOCKER_HUB_KEY = "https://index.docker.io/v1/"  # docker's own key for Docker Hub
_HUB_NAMES = (DOCKER_HUB, "index.docker.io", DOCKER_HUB_API)
_CONTROL = "[\0-\x1f\x7f\ud800-\udfff]"  # RFC 7617, and what is no UTF-8
#: In a password, against the RFC, line breaks are fit: a cloud's JSON key has them.
_NO_PASSWORD = "[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]"
_NO_TOKEN = "[^!-~]"
#: What a helper says when it simply has nothing (docker-credential-helpers, errors.go).
_HELPER_EMPTY = ("credentials not found in native keychain",
                 "no credentials server URL", "no credentials username")


class Credentials:
    """Who we are to one registry: a user name and password, an identity token (a
    refresh token for its token server), or a ready registry token. Each may be None.

    `source` says in words where they were found. No tuple, whose repr would show all.
    As a keyring, it gives itself for every host. Raises UsageError for what cannot be
    sent, such as NUL, or a token that is not ASCII.
    """

    __slots__ = "username", "password", "identity_token", "registry_token", "source"

    def __init__(self, username=None, password=None, identity_token=None,
                 registry_token=None, source="given"):
        self.username, self.password = username, password
        self.identity_token, self.registry_token = identity_token, registry_token
        self.source = source
        for what, value, unfit in (
                ("user name", username, _CONTROL), ("password", password, _NO_PASSWORD),
                ("identity token", identity_token, _NO_TOKEN),
                ("registry token", registry_token, _NO_TOKEN)):
            if value and re.search(unfit, value):
                raise UsageError("the %s, from %s, holds a character that cannot be "
                                 "sent, or a line break" % (what, source))
        SECRETS.add(password, identity_token, registry_token)

    def basic(self):
        """The value of an Authorization header (RFC 7617, UTF-8); None without both."""
        if not self.username or not self.password:
            return None
        return basic_header(self.username, self.password)

    def lookup(self, _host, _repository):
        """These Credentials, whatever the host; see Keyring.lookup."""
        return self

    def __str__(self):
        kind = ("a registry token" if self.registry_token else
                "an identity token" if self.identity_token else "a password"
                + " of several lines" * ("\n" in (self.password or "")))
        who = "user %s with %s" % (self.username, kind) if self.username else kind
        return "%s, from %s" % (who, self.source)


def basic_header(username, password):
    """The value of a Basic Authorization header (RFC 7617, UTF-8)."""
    pair = "%s:%s" % (username, password)
    code = base64.b64encode(pair.encode("utf-8")).decode("ascii")
    SECRETS.add(password, code.rstrip("="))
    return "Basic " + code


class Keyring:
    """The credential sources of this host, in the order they are asked.

    1. `given` Credentials, which are for the host of the first lookup and no other;
    2. `authfile`, or the file REGISTRY_AUTH_FILE names: nothing after it is asked;
    3. DOCKER_AUTH_CONFIG, the text of such a file;
    4. $DOCKER_CONFIG/config.json, else ~/.docker/config.json;
    5. podman's auth.json in its places; 6. ~/.dockercfg.

    With `anonymous` there are none. `check` raises where a helper should not be waited
    for. `sole` says in words what else is for one registry only, None for nothing.
    """

    def __init__(self, given=None, authfile=None, anonymous=False, check=go_on,
                 sole=None):
        self._given, self._authfile, self._anonymous = given, authfile, anonymous
        self._check = check
        self._sole = sole or given and "one user name and password"
        self._sole_host = None
        self._lock = threading.Lock()
        self._found = {}

    def lookup(self, host, repository=""):
        """The Credentials for a repository at `host[:port]`, None for none.

        Raises CredentialsError where a source is broken, UsageError where given
        credentials would be for two hosts.
        """
        host = DOCKER_HUB if host in _HUB_NAMES else host
        with self._lock:
            if self._given is not None:
                self.claim(host)
                return self._given
            if (host, repository) not in self._found:
                found = (_find_in_config(name, config, host, repository, self._check)
                         for name, config in self.sources() if config)
                self._found[host, repository] = next(filter(None, found), None)
            return self._found[host, repository]

    def claim(self, host):
        """`host` will be asked; UsageError where what is for one would be for two."""
        host = DOCKER_HUB if host in _HUB_NAMES else host
        if self._sole:
            self._sole_host = self._sole_host or host
            if host != self._sole_host:
                raise UsageError("%s, but two registries: %s and %s" % (
                    self._sole, self._sole_host, host), "pull from one at a time")

    def sources(self):
        """Yields (where, config) of each source, in order; config is a dict or None."""
        if self._anonymous:
            return
        env, join = os.environ.get, os.path.join
        only = self._authfile  # none where it is "", which is a file that is not there
        if only is None:
            only = env("REGISTRY_AUTH_FILE") or None
        if only is not None:
            yield only, _read_config(only, True)
            return
        name = "DOCKER_AUTH_CONFIG"
        if env(name):
            yield name, _read_config(name, raw=os.fsencode(env(name)))
        home = os.path.expanduser("~")
        runtime = env("XDG_RUNTIME_DIR")
        for path in (
                join(env("DOCKER_CONFIG") or join(home, ".docker"), "config.json"),
                join(runtime, "containers", "auth.json") if runtime else
                "/run/containers/%d/auth.json" % getattr(os, "getuid", int)(),
                join(env("XDG_CONFIG_HOME") or join(home, ".config"), "containers",
                     "auth.json"),
                join(home, ".dockercfg")):
            # Where no home is known ~ stays, a directory in the current one.
            if path[0] != "~" and os.path.isfile(path):
                config = _read_config(path)
                yield path, {"auths": config} if path.endswith("cfg") else config


def _read_config(path, named=False, raw=None):
    """A credentials file, or its text `raw`, as a dict; None where that cannot be."""
    try:
        if raw is None:
            with open(path, "rb") as file:
                raw = file.read(DOCUMENT_LIMIT)
        return Document(parse_json(raw, path, repeatable=True), path).value
    except (OSError, InvalidDocument) as error:
        text = "%s: %s" % (path or "''", getattr(error, "strerror", error))
        if named:
            raise CredentialsError("credentials not read: " + text) from None
        log.warning("credentials passed over: %s", text)
        return None


def _find_in_config(name, config, host, repository, check):
    """The Credentials in one file, if any; a helper it names rules out its entries."""
    keys = [DOCKER_HUB_KEY, *_HUB_NAMES] if host == DOCKER_HUB else [host]
    helpers, auths = (value if isinstance(value, dict) else {} for value in map(
        config.get, ("credHelpers", "auths")))
    named = [("credHelpers", helpers.get(key)) for key in keys]
    for where, helper in named + [("credsStore", config.get("credsStore"))]:
        if helper == "":  # for this host none, nor the store: docker's rule
            break
        if isinstance(helper, str):
            return _ask_helper(helper, keys[0], "%s (%s)" % (name, where), check)
    found = (_entry_credentials(auths[key], "%s (%s)" % (name, key))
             for key in _config_keys(auths, host, repository))
    return next(filter(None, found), None)


def _config_keys(auths, host, repository):
    """The keys of `auths` that are for this repository, most to least specific.

    As containers/image does it: host/namespace/.../repository, up to host; then what
    docker takes for a host: URLs, as for Docker Hub; HOST/, HOST/v1/, HOST/v2/.
    """
    names = _HUB_NAMES if host == DOCKER_HUB else (host,)
    parts = repository.split("/") if repository else []
    wanted = ["/".join([name] + parts[:count]) for count in range(len(parts), -1, -1)
              for name in names]
    return [key for key in wanted if key in auths] + [
        key for key in sorted(auths, key=lambda key: (key != DOCKER_HUB_KEY, key))
        if key not in wanted
        and re.sub("^https?://([^/]*).*|/(v[12]/)?$", r"\1", key) in names]


def _entry_credentials(entry, source):
    """The Credentials in one entry of `auths`, None where it has none (podman leaves
    such where it keeps the secret elsewhere)."""
    if not isinstance(entry, dict):
        return None
    values = {key: value for key, value in entry.items()
              if isinstance(value, str) and value}
    username, password = values.get("username"), values.get("password")
    if "auth" in values:
        text = re.sub("[\r\n]", "", values["auth"])  # base64 breaks lines at 76
        try:
            pair = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
            username, password = pair.decode("utf-8").rstrip("\0").split(":", 1)
        except ValueError:
            log.warning("%s: 'auth' is not base64 of user:password: passed over",
                        source)
    token, ready = values.get("identitytoken"), values.get("registrytoken")
    try:
        if username and password or token or ready:
            return Credentials(username, password, token, ready, source)
    except UsageError as error:
        log.warning("%s: passed over", error)
    return None


def _ask_helper(suffix, server, source, check):
    """What docker-credential-SUFFIX says of `server`; None where it has nothing."""
    import shutil
    program = "docker-credential-" + suffix
    path = re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", suffix) and shutil.which(program)
    if not path or not os.path.isabs(path):  # never one that lies in this directory
        raise CredentialsError("%s names the credential helper %s, which is not on the "
                               "PATH" % (source, printable(program, 80)),
                               hint="install it, or pull with --no-creds")
    status, output = _run_helper([path, "get"], server, program, check)
    if status:
        if output.decode("utf-8", "replace").strip() in _HELPER_EMPTY:
            return None
        raise CredentialsError("%s failed for %s (status %d)"
                               % (program, server, status),
                               hint="run it by hand, or pull with --no-creds")
    source = "%s, %s" % (source, program)
    try:
        answer = Document.parse(output, program)
        username, secret = (answer.get(key, str, "") for key in ("Username", "Secret"))
        if username == "<token>" and secret:
            return Credentials(identity_token=secret, source=source)
        return Credentials(username, secret, source=source) if secret else None
    except InvalidDocument:
        raise CredentialsError("%s gave an answer for %s that is not of its protocol"
                               % (program, server)) from None
    except UsageError as error:
        raise CredentialsError(error.message) from None


def _run_helper(command, text, program, check):
    """(exit status, output) of a helper, bounded in time and size."""
    import subprocess
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE)
    except OSError as error:
        raise CredentialsError("%s: cannot be run: %s" % (command[0], error.strerror),
                               hint="pull with --no-creds") from None
    output = []

    def talk():
        with process:
            with contextlib.suppress(OSError):
                process.stdin.write(text.encode("utf-8"))
                process.stdin.close()
            output.append(process.stdout.read(TOKEN_LIMIT))  # who says more is cut off

    end = time.monotonic() + HELPER_TIMEOUT
    try:
        # A thread: what the helper started may hold the pipe open after it is killed.
        reader = begin(talk)
        while reader.is_alive():
            check()
            left = end - time.monotonic()
            if left <= 0:
                raise CredentialsError("%s did not answer within %g seconds"
                                       % (program, HELPER_TIMEOUT))
            reader.join(min(left, CANCEL_NOTICED))
    finally:
        process.kill()
        process.wait()
    return process.returncode, output[0]


# --------------------------------------------------------------------------------------
# 9  Transport: one safe HTTP exchange; knows nothing of images
# --------------------------------------------------------------------------------------
# urllib.request gives proxies and request objects. Four of its habits are replaced
# here: it opens a connection for every request; it sends Authorization along redirects
# to any host, and follows some to ftp; a short body is no error (http.client,
# bpo-115997); and a socket's timeout is for each recv, so a byte a minute keeps a
# request alive for ever.

def host_name(host):
    """The name or address in `HOST[:PORT]`, in lower case, without brackets."""
    return re.match(r"\[?([^]]*(?=\])|[^:]*)", host).group(1).lower()


def loopback(host):
    """Whether `host[:port]` is this machine, by address or name (RFC 6761, 6.3)."""
    name = host_name(host)
    return name.rpartition(".")[2] == "localhost" or _address_rank(name) == _LOOPBACK


_PUBLIC, _PRIVATE, _LOOPBACK, _LINK_LOCAL = range(4)  # how near an address is
ANYWHERE = _LINK_LOCAL  # as near as an address may be

#: (how near, networks): the first that holds an address counts. IANA's special-purpose
#: address registries; Pythons differ in what they take for global. In the first row the
#: metadata services of clouds that are not link-local, too.
_NEARNESS = [(rank, [ipaddress.ip_network(text) for text in texts.split()])
             for rank, texts in (
    (_LINK_LOCAL, "169.254.0.0/16 224.0.0.0/4 fe80::/10 ff00::/8 100.100.100.200 "
                  "168.63.129.16 192.0.0.192 fd00:ec2::254 fd20:ce::254"),
    (_LOOPBACK, "127.0.0.0/8 0.0.0.0 ::/127"),
    (_PRIVATE, "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 172.16.0.0/12 192.0.0.0/24 "
               "192.0.2.0/24 192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 "
               "198.51.100.0/24 203.0.113.0/24 240.0.0.0/4 64:ff9b:1::/48"),
    (_PUBLIC, "0.0.0.0/0 ::/96 ::ffff:0:0/96 ::ffff:0:0:0/96 64:ff9b::/96 2001::/32"),
    (_PRIVATE, "2001::/23 2001:db8::/32 3fff::/20"),
    (_PUBLIC, "2000::/3"),
    (_PRIVATE, "::/0"))]
#: (network, where in its addresses an IPv4 address lies that they lead to, in bits from
#: the right, what it is xor-ed with): IPv4-compatible, -mapped and -translated, NAT64
#: (RFC 6052, RFC 8215), 6to4, Teredo's server and client.
_WRAPPINGS = [(ipaddress.ip_network(text), shift, mask) for text, shift, mask in (
    ("::/96", 0, 0), ("::ffff:0:0/96", 0, 0), ("::ffff:0:0:0/96", 0, 0),
    ("64:ff9b::/96", 0, 0), ("64:ff9b:1::/48", 0, 0), ("2002::/16", 80, 0),
    ("2001::/32", 64, 0), ("2001::/32", 0, 0xffffffff))]


def _address_rank(address):
    """How near an IP address, and what it leads to, is; None for what is none."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    inner = [ipaddress.IPv4Address(int(ip) >> shift & 0xffffffff ^ mask)
             for network, shift, mask in _WRAPPINGS if ip in network]
    return max(next(rank for rank, networks in _NEARNESS
                    if any(one in network for network in networks))
               for one in [ip] + inner)


#: Host and port of a URL from outside. No % in it: urllib.request unquotes a host, and
#: what comes out would stand in a CONNECT line.
_AUTHORITY = re.compile(r"(?:[A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")


def checked_url(url, base=None):
    """`url`, relative to `base` if given, taken apart; raises UnsafeRedirect.

    Servers choose these URLs, and parsers disagree on odd ones, so those are refused.
    Without the fragment, which is not sent: some parsers seek its # from the end.
    """
    shown = bare_url(url)
    # Some servers write UTF-8, which http.client reads as latin-1.
    url = re.sub("[\x80-\xff]", lambda match: "%%%02X" % ord(match.group()), url)
    try:
        # Looked at before urljoin, which drops tabs and newlines without a word.
        if len(url) > HEADER_LIMIT or re.search(r"[^!-\[\]-~]", url):
            raise ValueError
        parts = urllib.parse.urlsplit(url if base is None
                                      else urllib.parse.urljoin(base, url))
        if parts.scheme not in ("http", "https") or parts.port == 0 or (
                not _AUTHORITY.fullmatch(parts.netloc)):
            raise ValueError
    except ValueError:
        raise UnsafeRedirect(
            "expected a URL of http or https with a plain name or address and no odd "
            "characters, got %s%s" % (shown, base and ", from " + bare_url(base) or "")
        ) from None
    return parts._replace(fragment="")


def names_host(hosts, parts):
    """Whether a URL taken apart is of one of `hosts`: HOST (any port) or HOST:PORT."""
    place = authority(*origin(parts)[1:])
    return not {place, place.rpartition(":")[0]}.isdisjoint(map(str.lower, hosts))


def authority(host, port):
    """`HOST:PORT`, an IPv6 address in brackets."""
    return ("[%s]:%d" if ":" in host else "%s:%d") % (host, port)


def bare_url(url):
    """`url` fit for messages: no query or user information, which hold secrets."""
    return printable(re.match("[^?#]*", re.sub("//[^/]*@", "//", url)).group(), 200)


def origin(parts):
    """(scheme, host, port) of a taken-apart URL: what credentials are bound to."""
    return (parts.scheme, parts.hostname,
            parts.port or (443 if parts.scheme == "https" else 80))


class _Reply(http.client.HTTPResponse):
    def _read_status(self):
        """The final status line: http.client knows of 100 only (RFC 9110, 15.2)."""
        while True:
            found = super()._read_status()
            if found[1] == 101 or not 100 <= found[1] < 200:
                return found
            http.client.parse_headers(self.fp)

    def _read_and_discard_trailer(self):
        """The end of a chunked body: http.client takes trailers without end."""
        http.client.parse_headers(self.fp)


NO_ROOTS = "install the package ca-certificates, or name a CA with --cacert FILE"
_LENIENCE = "if that is right, allow it with %s"
_SOCKS_REPLIES = {1: "failed", 2: "does not allow it", 3: "cannot reach the network",
                  4: "cannot reach the host", 5: "was refused by the host",
                  6: "gave up waiting", 7: "cannot do it",
                  8: "cannot take that address"}


class _Kept(http.client.HTTPConnection):
    """A connection to where a request goes, which may carry others after it."""

    rank = None  # how near its peer's address is; None before there is a peer
    until = None  # monotonic seconds at which the headers must be in
    _late = None  # the error to raise next

    def __init__(self, transport, request):
        self.default_port = 443 if request.type == "https" else 80
        super().__init__(request.host)
        self._transport, self._request = transport, request
        self.key = request.type, request.host, request.proxy
        self.allowed = transport.idle_timeout  # seconds of silence

    def start(self, seconds):
        """An exchange begins, whose headers may take `seconds`; None: its body does, of
        which the first byte may take as long.
        """
        self._window, self._count = self._transport.clock(), 0
        self.until = seconds and self._window + seconds
        self.allowed = seconds or self.allowed

    def turns(self, most=float("inf"), what="next to nothing came"):
        """Yields seconds to wait for the next step, which may take `most` together.

        In short turns, so that a cancel is noticed in any case. Raises socket.timeout
        where there are none left, and what `check` of the Transport raises.
        """
        clock, now = self._transport.clock, self._transport.clock()
        end = min(self.until or now + self.allowed, now + most)
        while True:
            self._transport.check()
            left = end - clock()
            if left <= 0:
                raise socket.timeout("%s for %g seconds"
                                     % (what, min(most, self.allowed)))
            yield min(left, CANCEL_NOTICED)

    def in_turns(self, sock, step, most=float("inf")):
        """`step()` on a socket, of at most so many seconds."""
        for seconds in self.turns(most):
            sock.settimeout(seconds)
            with contextlib.suppress(socket.timeout):
                return step()

    def receive(self, sock, buffer):
        """How many bytes have come into `buffer`; socket.timeout where too few have."""
        if self._late:
            error, self._late = self._late, None
            raise error
        received = step = self.in_turns(sock, lambda: sock.recv_into(buffer))
        if len(buffer) > TLS_RECORD and isinstance(sock, ssl.SSLSocket):
            view = memoryview(buffer)
            sock.settimeout(0)
            try:  # for more that is there: SSL_read gives one record a call
                while step and received < len(view):
                    step = sock.recv_into(view[received:])
                    received += step
            except (BlockingIOError, ssl.SSLWantReadError):
                pass
            except OSError as error:
                self._late = error  # after what came before it
        if not received and self.until is not None:
            # http.client takes headers that end early for whole ones.
            raise ConnectionResetError("closed the connection before it had answered")
        self._count += received
        now = self._transport.clock()
        seconds = PATIENCE * self._transport.idle_timeout
        if now - self._window >= seconds:
            if self._count < STALL_BYTES:
                raise socket.timeout("next to nothing came for %g seconds" % seconds)
            self._window, self._count = now, 0
        return received

    def response_class(self, sock, *args, **kwargs):
        """What http.client reads a response with, from a socket with our patience."""
        reply = _Reply(sock, *args, **kwargs)
        wire = reply.fp.detach()
        wire.readinto = lambda buffer: self.receive(sock, buffer)
        reply.fp = io.BufferedReader(wire, TLS_RECORD)
        return reply

    def connect(self):
        request = self._request
        tls = request.type == "https" and self._transport.tls.begin(request.host)
        host, _, port = (request.proxy or authority(self.host, self.port)).rpartition(
            ":")
        self._reach(host.strip("[]"), int(port))
        if request.tunnel and request.tunnel[0] == "http":
            self._ask_for_tunnel()
        elif request.tunnel:
            self._ask_socks(*request.tunnel[1:])
        if tls:
            name = self.host if sys.version_info < (3, 7) else self.host.encode("ascii")
            self.sock = tls().wrap_socket(self.sock, server_hostname=name,
                                          do_handshake_on_connect=False)
            try:
                self.in_turns(self.sock, self.sock.do_handshake, CONNECT_TIMEOUT)
            except ssl.SSLError:  # "HTTP/" was taken for a record's head
                with contextlib.suppress(OSError):
                    rest = re.match(rb"1\.[01] [0-9]{3}[^\r\n]*", socket.socket.recv(
                        self.sock, KIB))
                    if rest:
                        raise TransportError("%s: TLS failed: it says HTTP/%s" % (
                            request.host, printable(rest.group().decode("latin"), 99)),
                            "it may speak plain http: --insecure-allow-http") from None
                raise

    def _reach(self, host, port):
        """Connects to an address of a host that is no nearer than allowed."""
        worked, turns = self._transport.worked, collections.defaultdict(itertools.count)
        local = host.lower().endswith(".localhost")  # not every resolver knows
        try:
            found = socket.getaddrinfo(  # of a text it would make IDNA, which is slow
                b"localhost" if local else host.encode("ascii"), port, 0,
                socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise TransportError(
                "cannot resolve host %s: %s" % (host, _reason(error)),
                "check the name, the DNS and the proxy settings",
                retryable=error.errno == getattr(socket, "EAI_AGAIN", None)) from error
        # The families in turn (RFC 8305, 4).
        found.sort(key=lambda target: next(turns[target[0]]))
        targets = [target for target in found
                   if _address_rank(target[4][0]) <= self._request.allowed]
        if found and not targets:
            raise UnsafeRedirect(
                "%s resolves to %s, which is nearer than the server that sent us there "
                "is, or than it was before" % (host, found[-1][4][0]))
        targets.sort(key=lambda target: target[4] != worked.get((host, port)))
        self.sock, target = self._race(targets)
        worked[host, port] = target
        # Who is behind a proxy is no neighbour of ours.
        self.rank = _PUBLIC if self._request.proxy else _address_rank(target[0])
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _race(self, targets):
        """(socket, address) of the first of getaddrinfo's `targets` that is connected.

        Each is begun CONNECT_DELAY after the one before, or as soon as that has failed.
        The first error is the one to tell: what cannot be reached at all comes last.
        """
        error = None
        with contextlib.ExitStack() as socks, selectors.DefaultSelector() as selector:
            begun = selector.get_map()
            for turn in self.turns(CONNECT_TIMEOUT, "no connection"):
                if targets:
                    *kind, _, address = targets.pop(0)
                    try:
                        sock = socks.enter_context(socket.socket(*kind))
                        sock.setblocking(False)
                        with contextlib.suppress(BlockingIOError):
                            sock.connect(address)
                        selector.register(sock, selectors.EVENT_WRITE, address)
                    except OSError as reason:
                        error = error or reason
                elif not begun:
                    raise error or OSError("the name has no address")
                turn = min(turn, CONNECT_DELAY) if targets else turn
                for key, _ in selector.select(turn) if begun else ():
                    selector.unregister(key.fileobj)
                    number = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not number:
                        return key.fileobj.dup(), key.data  # all others are closed
                    error = error or OSError(number, os.strerror(number))

    def send(self, data):
        """Sends all the bytes `data`; the time for what follows begins behind them."""
        data = memoryview(data)
        while data:
            data = data[self.in_turns(self.sock, lambda: self.sock.send(data)):]
        self.start(self.until and self.allowed)

    def _ask_for_tunnel(self):
        """RFC 7231, 4.3.6. http.client's differs from Python to Python."""
        place, login = authority(self.host, self.port), self._request.login
        self.send("".join(line + "\r\n" for line in (
            "CONNECT %s HTTP/1.1" % place, "Host: " + place,
            *(["Proxy-Authorization: " + login] if login else ()), "")).encode("ascii"))
        with contextlib.closing(self.response_class(self.sock,
                                                    method="CONNECT")) as reply:
            reply.begin()
        if reply.status == 407:
            raise proxy_denial(reply.headers, login)
        if reply.status != 200:
            raise TransportError("%s: the proxy does not connect: HTTP %d %s" % (
                place, reply.status, printable(reply.reason, 100)),
                retryable=500 <= reply.status < 510)

    def _ask_socks(self, user, password):
        """RFC 1928, 1929. It is sent the name, by socks5 as by socks5h, as Go does."""
        def talk(data, count):
            self.send(data)
            answer, got = memoryview(bytearray(count)), 0
            while got < count:
                got += self.receive(self.sock, answer[got:])  # raises at its end
            return bytes(answer)

        place = "SOCKS proxy " + self._request.proxy
        version, method = talk(b"\5\2\0\2" if user else b"\5\1\0", 2)
        if version != 5:
            raise TransportError("%s does not speak SOCKS5" % place)
        if method == 2 and user:
            user, password = user.encode("utf-8"), password.encode("utf-8")
            if talk(b"\1%c%s%c%s" % (len(user), user, len(password), password), 2)[1]:
                raise AccessDenied(
                    "%s does not take the user name and password" % place)
        elif method:
            raise AccessDenied("%s wants a user name and password" % place,
                               hint="put them in its URL")
        try:
            ip = ipaddress.ip_address(self.host)
            target = (b"\1" if ip.version == 4 else b"\4") + ip.packed
        except ValueError:
            name = self.host.encode("ascii")
            target = b"\3%c%s" % (len(name), name)
        _, status, _, kind = talk(b"\5\1\0" + target + struct.pack(">H", self.port), 4)
        if status:
            raise TransportError("%s: %s:%d: it %s" % (
                place, self.host, self.port, _SOCKS_REPLIES.get(status, "failed")),
                retryable=status not in (2, 7, 8))
        talk(b"", 2 + ({1: 4, 4: 16}.get(kind) or talk(b"", 1)[0]))


def proxy_denial(headers, login):
    """The AccessDenied for a proxy's 407, which names the schemes it takes."""
    kinds = {value.split(" ")[0].strip(",") for value in headers.get_all(
        "Proxy-Authenticate", [])}
    if kinds and "basic" not in map(str.lower, kinds):
        return AccessDenied(
            "the proxy wants authentication by %s, not a plain user name and password "
            "(HTTP 407)" % printable(" or ".join(sorted(kinds)), 60), 407,
            hint="a helper such as cntlm can stand between")
    return AccessDenied("the proxy %s user name and password (HTTP 407)" % (
        "does not take our" if login else "wants a"), 407, hint="they go into its URL")


def choose_proxy(request, given):
    """Has a request go through the proxy `given`, None: the environment's, if any;
    NO_PROXY understood the way Go does. The environment's is never used for loopback.

    It learns the `proxy` (HOST:PORT), the value `login` of a Proxy-Authorization
    header, and `tunnel`, where that connects us to the host: (scheme, user, password).
    """
    request.proxy = request.tunnel = request.login = None
    known = urllib.request.getproxies_environment()  # whose exceptions we know
    url = known.get(request.type) if given is None else given
    if url is None or given is None and loopback(request.host) or bypasses_proxy(
            urllib.parse.urlsplit(request.full_url), known.get("no", "")):
        return
    scheme, request.proxy, user, password = split_proxy(url)
    request.allowed = ANYWHERE  # it is the proxy that knows the address
    request.login = basic_header(user, password) if user else None
    if scheme != "http" or request.type == "https":
        request.tunnel = scheme, user, password
        return
    request.set_proxy(request.proxy, "http")
    if request.login:
        request.add_unredirected_header("Proxy-Authorization", request.login)


def split_proxy(url):
    """(scheme, HOST:PORT, user, password) of a proxy's URL; raises UsageError."""
    with contextlib.suppress(ValueError, LookupError):
        parts = urllib.parse.urlsplit(url if "://" in url else "http://" + url)
        login = [urllib.parse.unquote(text or "")
                 for text in (parts.username, parts.password)]
        SECRETS.add(login[1] or login[0])  # some proxies take a token for a user
        port = {"http": 80, "socks5": 1080, "socks5h": 1080}[parts.scheme]
        port = port if parts.port is None else parts.port
        if parts.hostname and port and not (
                parts.path.strip("/") or parts.query or parts.fragment) and (
                    max(len(word.encode("utf-8")) for word in login) < 256):
            name = parts.hostname.encode("idna").decode("ascii")
            return (parts.scheme, authority(name, port), *login)
    # Not shown: where a URL is malformed, who can tell which part is the password?
    if url.lower().startswith("https:"):
        raise UsageError("TLS to the proxy itself (https://) is not supported",
                         "most proxies take http:// and [USER:PASSWORD@]HOST:PORT, "
                         "too; https goes through it encrypted all the same")
    raise UsageError("the proxy's URL is not one we can use",
                     "expected http://, socks5:// or socks5h://, and then "
                     "[USER:PASSWORD@]HOST:PORT")


def bypasses_proxy(parts, no_proxy):
    """Whether the NO_PROXY list `no_proxy` has the host of a URL taken apart.

    Entries as in golang.org/x/net/http/httpproxy: `*`, a host with its subdomains,
    `.host` or `*.host` for these only, an IP address, each also with `:port`; CIDR.
    """
    _, name, port = origin(parts)
    name = name.rstrip(".")
    for entry in filter(None, re.split(r"[,\s]+", no_proxy.lower())):
        match = re.fullmatch(r"(\[.*\]|[^:/]+):([0-9]+)", entry)
        if match and int(match.group(2)) != port:
            continue
        entry = (match.group(1) if match else entry).strip("[]")
        if entry == "*" or name == entry:
            return True
        with contextlib.suppress(ValueError):  # of what is no address, or no network
            if ipaddress.ip_address(name) in ipaddress.ip_network(entry, strict=False):
                return True
        if name.endswith("." + re.sub(r"^\*?\.", "", entry)):
            return True
    return False


class Response(contextlib.AbstractContextManager):
    """An HTTP response whose body is still to be read.

    `url` is where it finally came from, `place` the same for messages; `length` that of
    the body as it is sent, in bytes, None if that is not told; `coded` whether it
    claims a Content-Encoding, which nobody asked for; `rank` how near its server is,
    `first_rank` how near the one that was asked first; see _address_rank.
    """

    def __init__(self, transport, connection, reply, request):
        self._transport, self._connection = transport, connection
        self._reply, self.url = reply, request.full_url
        self.place = bare_url(self.url)
        self.status, self.headers = reply.status, http.client.HTTPMessage()
        for name, value in reply.headers.items():  # RFC 7230, 3.2.4: folded ones
            self.headers[name] = re.sub(r"[\r\n]\s*", " ", value).strip()
        self.coded = self.headers.get("Content-Encoding", "").lower() not in (
            "", "identity")
        self.proxy, self.rank = request.proxy, connection.rank
        lengths = set(self.headers.get_all("Content-Length", []))
        coding = [c.lower() for c in self.headers.get_all("Transfer-Encoding", [])]
        if (len(lengths) > 1 or coding not in ([], ["chunked"]) or not all(
                re.fullmatch("[0-9]{1,18}", text) for text in lengths)):
            self._reply.close()
            raise TransportError("%s sent a response whose length is ambiguous"
                                 % self.place)
        if coding and lengths:  # RFC 9112, 6.3: the chunks count, and nothing after
            self._reply.will_close = True
        self.length = (0 if request.get_method() == "HEAD" else
                       None if coding or not lengths else int(*lengths))

    def chunks(self, size=CHUNK):
        """The body's bytes in pieces; raises TransportError where it ends early."""
        received = 0
        with self._transport.translating(self.url):
            while received != self.length:
                # Not readinto: it fills the buffer, and loses it all when it fails.
                data = self._reply.read1(size if self.length is None else
                                         min(size, self.length - received))
                if not data:
                    break
                self._connection.allowed = self._transport.idle_timeout
                received += len(data)
                yield data
        if self.length not in (None, received):
            raise TransportError("%s sent %d bytes of %d and ended"
                                 % (self.place, received, self.length),
                                 retryable=True)
        self.close(keep=True)

    def read(self, limit, what):
        """The whole body, up to `limit` bytes; raises LimitExceeded, TransportError.

        One that claims to be compressed, and begins as gzip does, is decompressed.
        """
        if self.length is not None and self.length > limit:
            raise LimitExceeded("%s is %d bytes, more than the limit of %d"
                                % (what, self.length, limit))
        body = self._whole(self.chunks(16 * KIB), limit, what)
        if self.coded and body.startswith(b"\x1f\x8b"):  # RFC 1952, 2.3.1
            body = self._whole(inflated([body], what), limit, what)
        return body

    def _whole(self, chunks, limit, what):
        body, seconds = bytearray(), PATIENCE * self._transport.idle_timeout
        end = self._transport.clock() + seconds
        for chunk in chunks:
            body += chunk
            if len(body) > limit:
                raise LimitExceeded("%s is more than the limit of %d bytes"
                                    % (what, limit))
            if self._transport.clock() > end:
                raise Timeout("%s: not there within %g seconds" % (self.place, seconds),
                              retryable=True)
        return bytes(body)

    def discard(self):
        """Reads a small rest, so that the connection can be reused, or closes it."""
        with self, contextlib.suppress(ImagecError):
            self.read(ERROR_BODY_LIMIT, "response")

    def close(self, keep=False):
        """Gives up the rest of the body and, unless `keep`, the connection with it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._reply.close()  # http.client lets go of one that ends its socket
            if keep and not self._reply.will_close:
                self._transport.keep(connection)
            else:
                connection.close()

    def __exit__(self, *_exc):
        self.close()


class TLSSettings:
    """What certificates are good enough, host by host; for arguments see Transport."""

    def __init__(self, skip_verify=False, cacert=None, client_pair=None):
        self._skip_verify, self._cacert = skip_verify, cacert
        self._client_pair = client_pair
        self._named = set()  # registries: they may see the client certificate
        #: Name of a host -> whether any certificate is taken; False: after a bad one.
        self._insecure = {}
        self._begun = functools.lru_cache(maxsize=None)(self._begin)
        self._by_need = roots_by_need()
        #: Whether to read all roots. Those by need may lack what somebody has put into
        #: the file that has all, or what SSL_CERT_FILE has.
        self.whole = not self._by_need

    def name(self, host, forgiving=False, registry=True):
        """The user named `host` (`HOST[:PORT]`).

        `skip_verify` is for such hosts only. Where `forgiving`, a bad certificate is
        taken, with a warning. Only a `registry` may see the client certificate.
        """
        if registry:
            self._named.add(host)
        if self._skip_verify or forgiving:
            self._insecure.setdefault(host_name(host), self._skip_verify)

    def relents(self, host, whole):
        """Whether to ask `host` again, whose certificate has turned out to be bad: for
        that was not by the `whole` of the system's roots, or for it is taken.
        """
        if not whole:
            self.whole = True
            return True
        taken = self._insecure.get(host_name(host))
        if taken is False:
            log.warning("the certificate of %s is not verified", host)
            self._insecure[host_name(host)] = True
        return taken is not None

    def begin(self, host):
        """A function that gives the TLS settings for one host, and waits until the
        system's roots are read; the same for others where they do for these, too.
        """
        verify = not self._insecure.get(host_name(host))
        roots, pairs = host_certificates(host)
        if self._cacert is not None:
            roots.append(self._cacert)
        if self._client_pair is not None and host in self._named:
            pairs.append(self._client_pair)
        return self._begun(self.whole, verify, tuple(roots), tuple(pairs))

    def rootless(self, host):
        """Whether no CA certificate that we have could speak for `host`."""
        return not (self._skip_verify or self._by_need
                    or self.begin(host)().cert_store_stats()["x509"])

    def _begin(self, whole, verify, roots, pairs):
        # As ssl.create_default_context, but without SSLKEYLOGFILE, which tells secrets.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if sys.version_info >= (3, 13):
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            if not roots:  # many a private CA is not to the letter of RFC 5280
                context.verify_flags |= ssl.VERIFY_X509_STRICT
        if hasattr(ssl, "TLSVersion"):
            context.minimum_version = ssl.TLSVersion.TLSv1_2
        else:  # 3.6, whose default takes TLS 1.0
            context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
        for path in roots:
            _load(context.load_verify_locations, path)
        for certificate, key in pairs:  # "": a password is not asked for on a terminal
            _load(context.load_cert_chain, certificate, key, "")
        if not verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif not whole:
            context.load_verify_locations(capath=os.pathsep.join(self._by_need))
        else:
            # Not by `begin`, whose threads Python does not wait for: libcrypto is
            # cleared up at the end.
            reading = threading.Thread(target=context.load_default_certs)
            with contextlib.suppress(RuntimeError):  # no more threads are to be had
                reading.start()
                return lambda: reading.join() or context
            reading.run()
        return lambda: context


class Transport:
    """Safe HTTP exchanges over kept connections; may be used by many threads.

    `timeout` bounds all of it (None: nothing does), `idle_timeout` each silence, in
    seconds. `skip_verify` takes any certificate of hosts that `tls.name` is told of;
    `cacert` is a PEM file of more roots; `client_pair` a certificate and a key file for
    the registries among them. `proxy` is a URL, None for the environment's. Servers may
    send us to `storage_hosts` (see names_host) wherever these are, and over http.
    """

    def __init__(self, timeout=None, idle_timeout=IDLE_TIMEOUT, skip_verify=False,
                 cacert=None, client_pair=None, proxy=None, storage_hosts=(),
                 clock=time.monotonic):
        self.clock = clock
        self.timeout, self.idle_timeout = timeout, idle_timeout
        self.deadline = float("inf") if timeout is None else clock() + timeout
        self.stop = None  # an exception, where all is to end by it
        self.watched = False  # whether the main thread looks at `stop` by itself
        self.tls = TLSSettings(skip_verify, cacert, client_pair)
        self.storage_hosts, self._proxy = storage_hosts, proxy
        self.worked = {}  # (host, port) -> the address that has answered last
        self._idle = []  # connections, newest last
        self._lock = threading.Lock()
        self.cancelled = threading.Event()  # set: every exchange under way is to end
        self.addheaders = [("User-Agent", USER_AGENT)]  # of a request, for the handler
        self._handler = urllib.request.AbstractHTTPHandler()
        self._handler.add_parent(self)

    def check(self):
        """Raises Cancelled, Timeout or `stop` where work should not go on."""
        if self.stop is not None:
            raise self.stop
        if self.cancelled.is_set():
            raise Cancelled("cancelled")
        if self.clock() >= self.deadline:
            raise Timeout("not done within %g seconds" % self.timeout,
                          hint="allow more with --timeout")

    def close(self):
        self.cancelled.set()
        self.keep()

    def retrying(self, action, attempts=None):
        """`action()`, in `attempts` (None: ATTEMPTS) tries where errors may pass."""
        for failures in itertools.count(1):
            try:
                return action()
            except ImagecError as error:
                self.back_off(error, failures, attempts)

    def back_off(self, error, failures, attempts=None):
        """Waits for the next try after so many `failures`, or raises the last one."""
        if not error.retryable:
            raise error
        if failures >= (attempts or ATTEMPTS):
            error.retryable = False  # for whoever has tries of its own around this
            raise error
        seconds = min(BACKOFF * 2 ** (failures - 1), BACKOFF_LIMIT)
        seconds *= random.uniform(0.8, 1.2)
        if error.retry_after is not None:
            seconds = min(error.retry_after, RETRY_AFTER_LIMIT)
        log.info("%s; trying again in %.1f s", error, seconds)
        self.wait(seconds)

    def wait(self, seconds):
        """Sleeps, but not beyond the deadline or a cancel."""
        self.cancelled.wait(max(0, min(seconds, self.deadline - self.clock())))
        self.check()

    def open(self, method, url, headers=None, data=None, trusting=ANYWHERE, stay=None,
             seconds=None):
        """The Response to one request, redirects followed.

        `trusting` is how near (see _address_rank) the server that chose this URL is;
        ANYWHERE: the user chose it. No redirect leads nearer than any server on the way
        is. Authorization stays with the origin it was meant for. Where `stay` is a list
        of hosts (see names_host), redirects stay on the URL's host, and Authorization
        also goes to https there, and to those of `stay`. The headers may take so many
        `seconds`, None: one silence. With `data`, which is bytes or yields them, no
        redirect is followed. Raises TransportError, and AccessDenied of a proxy.
        """
        headers = dict(headers or {}, **{"Accept-Encoding": "identity"})
        parts = first = checked_url(url)
        ranks, seen = [trusting], set()
        option = None if stay is None else "--token-host"  # would allow this URL's host
        while True:
            url = parts.geturl()
            if url in seen or len(seen) > REDIRECT_LIMIT:
                raise UnsafeRedirect("%s: redirects in a loop, or more than %d" % (
                    bare_url(url), REDIRECT_LIMIT))
            seen.add(url)
            request = urllib.request.Request(url, data, headers, method=method)
            request.allowed = trusting  # how near its address may be
            response = self._once(request, seconds or self.idle_timeout,
                                  option and "%s %s" % (option, parts.netloc))
            location = response.headers.get("Location")
            if (response.status not in (301, 302, 303, 307, 308) or location is None
                    or data is not None):
                response.first_rank = (ranks[1:] + [response.rank])[0]
                response.trusting = trusting
                return response
            response.discard()
            parts = checked_url(location, url)
            lent = stay is None and names_host(self.storage_hosts, parts)
            if not lent:
                check_redirect(response, parts, seen, stay is not None)
            if stay is not None and (names_host(stay, parts) or (
                    first.scheme, parts.scheme) == ("http", "https")):
                first = parts
            elsewhere = origin(parts) != origin(first)
            if (lent or elsewhere) and headers.pop("Authorization", None) and (
                    stay is not None):
                log.error("warning: no password sent to %s, where %s redirects: allow "
                          "it with --token-host %s", bare_url(parts.geturl()),
                          response.place, parts.netloc)  # with -q, too
            ranks.append(response.rank)
            trusting = ANYWHERE if lent else min(ranks)
            option = option or "--storage-host"

    def _once(self, request, seconds, option):
        """One exchange; `option` is what the user may allow the request's host with."""
        choose_proxy(request, self._proxy)
        url = request.full_url
        log.debug("%s %s", request.get_method(), bare_url(url))
        try:
            with self.translating(url):
                response = self._exchange(self._handler.do_request_(request), seconds)
                if response.status == 407 and request.proxy and not request.tunnel:
                    with response:
                        raise proxy_denial(response.headers, request.login)
        except (TransportError, AccessDenied) as error:
            if isinstance(error, UnsafeRedirect) and option:
                error.hint = _LENIENCE % option
            elif _distrusts(error.__cause__) and self.tls.rootless(request.host):
                error.message, error.hint = (
                    "%s: this host has no CA certificates to check a server's by"
                    % request.host, NO_ROOTS)
            elif _distrusts(error.__cause__) and option:
                error.hint += " and " + option
            if request.proxy and not isinstance(error, Cancelled):
                error.message += " (through the proxy %s)" % request.proxy
            raise
        log.debug("%d from %s", response.status, response.place)
        return response

    def _exchange(self, request, seconds):
        while True:
            connection, whole = self._take(request), self.tls.whole
            kept = connection.sock is not None
            try:
                connection.start(seconds)
                if not kept:
                    connection.connect()
                # Who hangs up on us meanwhile may say why: by an alert, or an answer.
                with contextlib.suppress(OSError):
                    connection.request(
                        request.get_method(), request.selector, request.data,
                        dict(request.unredirected_hdrs, **request.headers))
                reply = connection.getresponse()
                connection.start(None)
                if reply.status not in (200, 206):  # no blob begins
                    connection.allowed = self.idle_timeout
                return Response(self, connection, reply, request)
            except BaseException as error:
                connection.close()
                # A kept connection may have been closed by its server meanwhile: that
                # is no failed try, another connection tells. But none is sent to twice.
                if not (isinstance(error, ConnectionError) and kept
                        and request.data is None
                        or _distrusts(error) and self.tls.relents(request.host, whole)):
                    raise

    def _take(self, request):
        fresh = _Kept(self, request)
        with self._lock:
            for connection in [one for one in self._idle[::-1] if one.key == fresh.key]:
                self._idle.remove(connection)
                # One that can be read has been closed, or has sent what nobody asked.
                with selectors.DefaultSelector() as selector:
                    selector.register(connection.sock, selectors.EVENT_READ)
                    spoilt = selector.select(0)
                if connection.rank <= request.allowed and not spoilt:
                    return connection
                connection.close()
        return fresh

    def keep(self, *connection):
        with self._lock:
            self._idle += connection
            limit = 0 if self.cancelled.is_set() else IDLE_CONNECTIONS_LIMIT
            while len(self._idle) > limit:
                self._idle.pop(0).close()

    @contextlib.contextmanager
    def translating(self, url):
        """What sockets, ssl and http.client raise in it comes out as TransportError."""
        try:
            yield
        except ImagecError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.check()
            raise _transport_error(error, bare_url(url)) from error


def check_redirect(response, parts, seen, stay):
    """Raises UnsafeRedirect where a response must not lead to a URL taken apart.

    `seen` are the URLs on the way to it; `stay` tells that it must be of the same host.
    """
    if stay and parts.hostname != checked_url(response.url).hostname:
        raise UnsafeRedirect("%s redirects to another host, %s" % (
            response.place, parts._replace(path="", query="").geturl()))
    if parts.scheme != "https" and any(one.startswith("https:") for one in seen):
        raise UnsafeRedirect(
            "%s redirects from https to http" % response.place,
            None if stay else _LENIENCE % "--storage-host " + parts.netloc)


def roots_by_need():
    """The directories of the system's roots by their hashes: OpenSSL looks into them by
    need. Reading all roots, hundreds, takes longer than a handshake.
    """
    paths, found = ssl.get_default_verify_paths(), []
    for place in os.environ.get(paths.openssl_capath_env,
                                paths.openssl_capath).split(os.pathsep):
        with contextlib.suppress(OSError):
            found += [place] * any(re.fullmatch(r"[0-9a-f]{8}\.[0-9]", name)
                                   for name in os.listdir(place))
    return found


def host_certificates(host):
    """(CA files, (certificate, key) pairs) of the first directory there is for a host.

    podman's, then docker's, by its rules: *.crt are CAs; half a pair is a UsageError.
    """
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"),
                                                               ".config")
    hosts = [host, DOCKER_HUB] if host == DOCKER_HUB_API else [host]
    for directory in (os.path.join(base, owner, "certs.d", name)
                      for owner in ("containers", "docker") for base in (config, "/etc")
                      for name in hosts if base[0] != "~" and host[:1] != "."):
        try:
            paths = [os.path.join(directory, n) for n in sorted(os.listdir(directory))]
        except OSError:  # not there, or not for us
            continue
        pairs = []
        for path in paths:
            stem, kind = os.path.splitext(path)
            other = stem + {".cert": ".key", ".key": ".cert"}.get(kind, kind)
            if other not in paths:
                raise UsageError(
                    "%s has no %s beside it" % (path, os.path.basename(other)),
                    "a client certificate and its key go together")
            if kind == ".cert":
                pairs.append((path, other))
        return [path for path in paths if path.endswith(".crt")], pairs
    return [], []


def _load(load, path, *args):
    try:
        load(path, *args)
    except (OSError, ssl.SSLError) as error:
        raise UsageError("cannot read certificates or keys from %s: %s" % (
            path, _reason(error)), "--cacert, --cert, --key and certs.d want PEM "
            "files, keys not encrypted") from None


def _reason(error):
    """The words of an OSError, without the "[Errno N]" in front."""
    return printable(getattr(error, "strerror", None) or error or type(error).__name__,
                     ERROR_TEXT_LIMIT)


def _distrusts(error):
    """Whether it is the server's certificate that `error` is about."""
    # ssl.CertificateError is a ValueError of its own on 3.6, an SSLError later.
    return isinstance(error, ssl.CertificateError) or (
        isinstance(error, ssl.SSLError) and "CERTIFICATE_VERIFY" in str(error))


def _transport_error(error, url):
    host = urllib.parse.urlsplit(url).netloc or url
    if _distrusts(error):
        why = getattr(error, "verify_message", "") or error
        return CertificateError(
            "%s: its certificate is not to be trusted: %s" % (host, why),
            "check this host's clock, add its CA with --cacert FILE, or take any "
            "certificate with --insecure-skip-verify")
    if isinstance(error, http.client.HTTPException) and not isinstance(
            error, (http.client.RemoteDisconnected, http.client.IncompleteRead)):
        return TransportError("%s did not answer in HTTP: %s: %s" % (
            url, type(error).__name__, printable(error, 100)), retryable=True)
    if "alert" in str(error) and "CERTIFICATE" in str(error).upper():
        return CertificateError("%s wants a client certificate, or another one: %s" % (
            host, _reason(error)), "give it with --cert FILE --key FILE, or in certs.d")
    if isinstance(error, socket.timeout) or str(error).endswith("timed out"):
        return Timeout("%s: %s" % (url, _reason(error)), retryable=True)
    if isinstance(error, ssl.SSLError):
        ended = "eof" in str(error).lower()
        return TransportError(
            "%s: TLS failed: %s" % (host, _reason(error)), None if ended else
            "it may speak plain http: --insecure-allow-http", retryable=ended)
    return TransportError("%s: %s" % (url, _reason(error)), retryable=True)


def registry_error(response, what):
    """The RegistryError for a reply to `what`, in its words (spec, "Error Codes")."""
    import email.utils
    pairs = []
    with contextlib.suppress(ImagecError):
        body = response.read(ERROR_BODY_LIMIT, "error")
        pairs = [(e.get("code", str, "UNKNOWN"), e.get("message", str, ""))
                 for e in Document.parse(body, "error").children("errors", 100)]
    signed = Secrets()  # a store may repeat what its URL was signed with
    signed.add(*(value for name, value in urllib.parse.parse_qsl(
        urllib.parse.urlsplit(response.url).query)
        if re.search("(?i)sig|token|cred|key|policy|verify|state", name)))
    pairs = [tuple(map(signed.hide, map(SECRETS.hide, pair))) for pair in pairs]
    codes = [code for code, _ in pairs]
    words = "; ".join("%s: %s" % pair if pair[1] else pair[0] for pair in pairs)
    words = "HTTP %d" % response.status + (
        words and ", " + printable(words, ERROR_TEXT_LIMIT))
    denied = (AccessDenied, "access denied",
              "it may not exist, or need another user name and password (-u USER)")
    kind, meaning, hint = {
        401: denied, 403: denied, 404: (NotFound, "not found", None),
        429: (RegistryError, "too many requests", "wait, or log in with -u"),
    }.get(response.status, (RegistryError, "unexpected answer", None))
    if kind is not RegistryError and {"DENIED", "UNAUTHORIZED"} & set(codes):
        kind, meaning, hint = denied
    error = kind("%s: %s: %s" % (what, meaning, words), response.status, codes,
                 response.place, hint)
    error.source = response.place + (
        " (through the proxy %s)" % response.proxy if response.proxy else "")
    when = response.headers.get("Retry-After", "").strip()  # RFC 7231, 7.1.3
    if re.fullmatch("[0-9]{1,9}", when):
        error.retry_after = int(when)
    with contextlib.suppress(TypeError, ValueError, OverflowError, IndexError):  # junk
        error.retry_after = max(0, email.utils.mktime_tz(
            email.utils.parsedate_tz(when)) - time.time())
    for name in ("ratelimit-limit", "ratelimit-remaining", "docker-ratelimit-source"):
        if response.status == 429 and response.headers.get(name):  # Docker Hub
            error.message += ", %s: %s" % (name, printable(response.headers[name], 60))
    return error


# --------------------------------------------------------------------------------------
# 10  Registry: the distribution API of one host, token included
# --------------------------------------------------------------------------------------

_WRONG_PASSWORD = "check the user name and password, or where they come from"
#: A parameter, its value quoted or not; or a scheme, with a token68 behind it or not.
_AUTH = (r"""(?s)[\s,]*([!#$%&'*+.^_`|~0-9A-Za-z-]+)(?:"""
         r'''[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))(?=[\s,]|\Z)|'''
         r"([ \t]+(?:[A-Za-z0-9._~+/-]+=*(?=[ \t]*(?:,|\Z)))?|(?=,)|\Z))")


class Challenge(value_type("scheme parameters")):
    """A WWW-Authenticate header's challenge: lowercase `scheme`, dict `parameters`."""

    @classmethod
    def parse(cls, values: list) -> list:
        """The Challenges in the header's values, in order (RFC 7235, 2.1 and 4.1).

        Takes several to a header, several headers, each up to its first irregularity.
        """
        found = []
        for value in values:
            begun = len(found)
            match = len(value) <= HEADER_LIMIT and re.match(_AUTH, value)
            while match and (match.group(4) is not None or len(found) > begun):
                name, quoted, plain, scheme = match.groups()
                if scheme is not None:
                    found.append(cls(name.lower(), {}))
                else:
                    if quoted is not None:
                        plain = re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL)
                    found[-1].parameters.setdefault(name.lower(), plain)
                match = re.compile(_AUTH).match(value, match.end())
        return found

    @classmethod
    def choose(cls, challenges):
        """The one to answer, Bearer before Basic; None where we know neither."""
        return next((challenge for scheme in ("bearer", "basic")
                     for challenge in challenges if challenge.scheme == scheme), None)


class Token:
    """A bearer token, good until the monotonic time `expires`."""

    __slots__ = "value", "expires"

    def __init__(self, value, expires):
        SECRETS.add(value)
        self.value, self.expires = value, expires


def auth_url(challenge, repository, registry_url, actions="pull"):
    """The URL to GET a token from for `actions` in a repository, by a Bearer challenge.

    The scope (distribution, token scope) is ours, whatever the realm says: a registry
    must not widen what a token is good for. Those of the challenge that only read are
    asked for, too: there may be a proxy that changes names, and Azure's registry lists
    no tags by "pull". Raises InvalidDocument, UnsafeRedirect.
    """
    realm = challenge.parameters.get("realm")
    if not realm:
        raise InvalidDocument("%s asks for a token but names no realm to get it from"
                              % bare_url(registry_url))
    parts, home = checked_url(realm, registry_url), checked_url(registry_url)
    if (home.scheme, parts.scheme, parts.hostname) == ("https", "http", home.hostname):
        # It does not know of the proxy before it that speaks TLS.
        parts = parts._replace(scheme="https", netloc=re.sub(":80$", "", parts.netloc))
    if home.scheme == "https" != parts.scheme:
        raise UnsafeRedirect("%s asks to fetch a token without TLS, from %s"
                             % (bare_url(registry_url), bare_url(realm)))
    query = [pair for pair in urllib.parse.parse_qsl(
        parts.query, keep_blank_values=True) if pair[0] != "scope"]
    if challenge.parameters.get("service"):
        query.append(("service", challenge.parameters["service"]))
    scopes = re.findall(r"(?<!\S)repository:[^\s:]+:(?:pull|metadata_read)(?!\S)",
                        challenge.parameters.get("scope", ""))
    if repository:  # else the token says who we are, and no more
        scopes.insert(0, "repository:%s:%s" % (repository, actions))
    query += [("scope", scope) for scope in dict.fromkeys(scopes)]
    return parts._replace(query=urllib.parse.urlencode(query)).geturl()


def fetch_token(transport: Transport, url: str,
                credentials: "Credentials | None" = None, trusting: int = ANYWHERE,
                token_hosts: "list | tuple" = (), tries: "int | None" = None) -> Token:
    """The Token that the token server at `url` (see auth_url) gives.

    `credentials` (None: anonymous) go to its host, whoever chose that; an identity
    token by POST, as OAuth2 wants it, or by GET if it does not know that. `trusting`:
    see Transport.open. On its host the server may redirect to https, and, without the
    password unless it is one of the `token_hosts` (see names_host), to another port.
    It is asked in so many `tries`, see Transport.retrying.
    Raises RegistryError, TransportError, InvalidDocument. Source: distribution's specs.
    """
    basic = credentials.basic() if credentials else None

    def fetch():
        ways = [("GET", url, {"Authorization": basic} if basic else {}, None)]
        if credentials and credentials.identity_token:
            # As all that is sent it is added again, lest others crowd it out.
            SECRETS.add(credentials.identity_token)
            parts = urllib.parse.urlsplit(url)
            query = urllib.parse.parse_qs(parts.query)
            form = {"grant_type": "refresh_token", "client_id": "imagec",
                    "refresh_token": credentials.identity_token,
                    "service": "".join(query.get("service", [])),
                    "scope": " ".join(query.get("scope", []))}
            ways.insert(0, ("POST", parts._replace(query="").geturl(), {
                "Content-Type": "application/x-www-form-urlencoded"},
                urllib.parse.urlencode(form).encode("ascii")))
        for method, *request in ways:
            with transport.open(method, *request, trusting, token_hosts) as response:
                if response.status == 200:
                    return response.read(TOKEN_LIMIT, "token reply")
                if method == "GET" or response.status not in (404, 405):
                    raise registry_error(response, "token")

    started = transport.clock()
    with naming(bare_url(url)):
        document = Document.parse(transport.retrying(fetch, tries), "token reply")
        value = document.get("token", str) or document.get("access_token", str)
        if not re.fullmatch("[!-~]{1,%d}" % HEADER_LIMIT, value or ""):
            raise InvalidDocument("token reply holds no token of printable ASCII")
    lifetime = document.value.get("expires_in")
    if type(lifetime) is not int or lifetime <= 0:
        lifetime = TOKEN_LIFETIME
    return Token(value, started + lifetime)


class Endpoint:
    """A host (`HOST[:PORT]`) with the distribution API: its URL, and who we are there.

    `allow_http` lets it fall back to unverified https, the probe also to http; a
    loopback host may fall back to http without it. `credentials` is None or has
    `lookup(host, repository)`, as a Keyring; the `token_hosts` (see names_host) may be
    sent them though they are not the registry's own. `namespace` is the registry this
    one is a mirror of, which containerd's mirrors are told as `?ns=`.
    """

    url = None  # the base of the API, where it has been learnt
    rank = None  # how near its address is, see _address_rank
    challenge = None  # the Challenge to answer, where the registry has sent one
    withheld = None  # in words, why a token server did not get the password
    doubt = None  # why it may be no registry, in words
    ranges = True  # False once parts of a blob did not come as asked for
    actions = "pull"  # what its tokens are to allow

    def __init__(self, host, transport, credentials=None, allow_http=False,
                 token_hosts=(), namespace=None):
        self.host, self.transport = host, transport
        self._keyring, self._allow_http = credentials, allow_http
        self._token_hosts, self._namespace = token_hosts, namespace
        self._tries = 1 if namespace else None  # there is another place to ask, sooner
        transport.tls.name(host, allow_http)
        self._tokens, self._scopes, self._asking = {}, {}, {}  # by repository
        self._warned = set()
        self._lock = threading.Lock()

    def learn_registry_url(self) -> str:
        """The base URL of the API, `SCHEME://HOST/v2/`; found by a probe, once.

        Raises TransportError, RegistryError where no registry answers.
        """
        with self._lock:
            if self.url is None:
                self.url = self.transport.retrying(self._probe, self._tries)
            return self.url

    def _probe(self):
        first, lenient = None, self._allow_http or loopback(self.host)
        for scheme in ("https", "http") if lenient else ("https",):
            try:
                return self._probe_url("%s://%s/v2/" % (scheme, self.host))
            except RegistryError as error:
                # It answers HTTP: another scheme would only hide what it said, and this
                # answer would hide a certificate that was refused.
                raise first if isinstance(first, CertificateError) else error
            except TransportError as error:
                log.debug("%s by %s: %s", self.host, scheme, error)
                first = error if isinstance(error, UnsafeRedirect) else first or error
        if isinstance(first.__cause__, ConnectionRefusedError):
            first.retryable = False  # nothing listens there
        if lenient and "allow-http" in str(first.hint):
            first.hint = None  # it was
        raise first

    def _probe_url(self, url):
        with self.transport.open("GET", url) as response:  # not all know HEAD there
            if response.status in (403, 404, 405, 501):
                # Static files may have no more than manifests: those decide.
                self.doubt = ("its /v2/ answers HTTP %d, that of a registry 200 or 401"
                              % response.status)
            elif response.status not in (200, 401):
                raise registry_error(
                    response, self.host + " is out of order, or no registry")
            final, self.rank = checked_url(response.url), response.first_rank
            if final.hostname == checked_url(url).hostname:
                # http -> https, or another port
                url = "%s://%s/v2/" % (final.scheme, final.netloc)
                if response.status == 401:
                    with contextlib.suppress(AccessDenied):
                        # It may not be meant for what we ask next.
                        self._learn_challenge(response)
            response.discard()
        return url

    def _learn_challenge(self, response, repository=None):
        """Takes that of a 401; raises AccessDenied where we can answer none.

        Its scope is for one token, and that `repository`: at /v2/ ghcr.io names one
        that is made up, and a token server may deny all where one is denied.
        """
        challenge = Challenge.choose(Challenge.parse(
            response.headers.get_all("WWW-Authenticate", [])))
        if challenge is None:
            raise AccessDenied("%s wants authentication of a kind we do not know"
                               % self.host, status=401)
        scope = challenge.parameters.pop("scope", "")
        self.challenge, self._scopes[repository] = challenge, repository and scope

    def credentials(self, repository):
        """The Credentials for a repository there, None for none."""
        return self._keyring and self._keyring.lookup(
            checked_url(self.url).netloc, repository)

    def authorization(self, repository, refused=None):
        """The Authorization value for `repository`, None where none is asked for.

        A `refused` token is fetched anew. The keyring is asked if the registry asks.
        """
        challenge = self.challenge
        if challenge is None:
            return None
        credentials = self.credentials(repository)
        with self._asking.setdefault(repository, threading.Lock()):
            if credentials and credentials.registry_token:
                return "Bearer " + credentials.registry_token
            if challenge.scheme == "basic":
                # Without one nothing is sent: /v2/ may ask where reading is free.
                return credentials and credentials.basic()
            token = self._tokens.get(repository)
            if token is None or token.expires <= self.transport.clock() or (
                    refused == "Bearer " + token.value):
                token = self._fetch_token(challenge, repository, credentials)
                self._tokens[repository] = token
        return "Bearer " + token.value

    def _auth_url(self, challenge, repository):
        named = dict(challenge.parameters, scope=self._scopes.pop(repository, ""))
        return auth_url(challenge._replace(parameters=named), repository, self.url,
                        self.actions)

    def _fetch_token(self, challenge, repository, credentials):
        url = self._auth_url(challenge, repository)
        realm = checked_url(url)
        named = names_host(self._token_hosts, realm)
        if credentials and not (named or self._trusts(realm)):
            self.withheld = (
                "no password sent to %s, which is not a token server of %s: allow it "
                "with --token-host %s" % (bare_url(url), self.host, realm.netloc))
            credentials = None
        try:
            return fetch_token(self.transport, url, credentials,
                               ANYWHERE if named else self.rank, self._token_hosts,
                               self._tries)
        except AccessDenied as error:
            error.message += " (%s)" % printable(credentials or "anonymous", 200)
            error.hint = self.withheld or credentials and _WRONG_PASSWORD or error.hint
            raise

    def _trusts(self, realm):
        """Whether the password may go to this token server.

        A registry chooses the realm; one that is tampered with must not be able to send
        the password elsewhere. Trusted are, besides what the user named, the registry's
        own host and, over TLS, one in the same domain, as auth.docker.io is.
        """
        home = checked_url(self.url).hostname
        if realm.hostname == home:
            return True
        if realm.scheme != "https" or _address_rank(home) is not None:
            return False
        domain = home.partition(".")[2]
        # co.uk and the like are a suffix that strangers share.
        return ("." in domain and not re.fullmatch(r"[a-z]{2,3}\.[a-z]{2}", domain)
                and ("." + realm.hostname).endswith("." + domain))


def content_range(response):
    """(start, end, total or None) of what a 206 holds, else None (RFC 7233, 4.2)."""
    ranges = response.headers.get_all("Content-Range", [])
    match = response.status == 206 and len(ranges) == 1 and re.fullmatch(
        r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", ranges[0])
    if not match:
        return None
    start, last, total = match.groups()
    return int(start), int(last) + 1, None if total == "*" else int(total)


class Registry(Endpoint):
    """The pull part of one host's distribution API; for its arguments see Endpoint."""

    def _request(self, method, path, authorization, headers, data=None):
        url = self.url + urllib.parse.quote(path, safe="/:?=&%~+,;!@$'()*")
        if self._namespace and "ns=" not in path:
            url += "&?"["?" not in path] + "ns=" + urllib.parse.quote(
                self._namespace, "")
        if authorization:
            headers = dict(headers, Authorization=authorization)
        # The name may lead elsewhere by now, but not nearer than when it was learnt.
        # A cache may fetch all of a blob before it sends the first byte.
        seconds = PATIENCE * self.transport.idle_timeout if "/blobs/" in path else None
        response = self.transport.open(method, url, headers, data, self.rank,
                                       seconds=seconds)
        for value in response.headers.get_all("Warning", []):
            # RFC 7234, 5.5. Each is shown once, and not too many.
            warning = re.match(r'299 \S+ "((?:[^"\\]|\\.){1,400})"', value)
            if warning and warning.group(1) not in self._warned and (
                    len(self._warned) < WARNING_LIMIT):
                self._warned.add(warning.group(1))
                log.warning("%s says: %s", self.host, printable(warning.group(1)))
        return response

    def _exchange(self, method, path, repository, what, headers=None, expected=(200,),
                  data=None):
        """The Response to a request for `repository`, authorized as the registry asks.

        A 401 is answered once: with the token it asks for, or a fresh one.
        """
        home = origin(checked_url(self.learn_registry_url()))
        sent, headers = self.authorization(repository), headers or {}
        response = self._request(method, path, sent, headers, data)
        if response.status == 401 and origin(checked_url(response.url)) != home:
            response, sent = self._elsewhere(method, response, headers), None
        elif response.status == 401:
            with response:  # whose connection may serve for the token
                refusal = self._refusal(response, what, repository, sent)
                if not any(response.headers.get_all("WWW-Authenticate", [])):
                    raise refusal
                self._learn_challenge(response, repository)
            answer = self.authorization(repository, sent)
            # A token of the same text may be good again: Katello's.
            if answer == sent and self.challenge.scheme == "basic":
                raise refusal
            sent, response = answer, self._request(method, path, answer, headers, data)
        if response.status in expected:
            if self.withheld and self.withheld not in self._warned:
                self._warned.add(self.withheld)
                log.error("warning: %s", self.withheld)  # with -q, too
            return response
        with response:
            raise self._refusal(response, what, repository, sent)

    def _elsewhere(self, method, response, headers):
        """The Response where a redirect has led to a registry that wants a token of its
        own: an anonymous one, for who we are is no matter of that one's.
        """
        challenge = method in ("GET", "HEAD") and Challenge.choose(Challenge.parse(
            response.headers.get_all("WWW-Authenticate", [])))
        place = re.match("(.+)/(?:manifests|blobs|tags|referrers)/",
                         response.url.partition("/v2/")[2])
        if not (place and challenge and challenge.scheme == "bearer"):
            return response
        response.discard()
        token = fetch_token(self.transport, auth_url(
            challenge, place.group(1), response.url), None, response.rank)
        return self.transport.open(method, response.url, dict(
            headers, Authorization="Bearer " + token.value), trusting=response.rank)

    def _refusal(self, response, what, repository, sent):
        """The RegistryError for a response to what was `sent` as Authorization."""
        error = registry_error(response, what)
        if self.doubt:
            error.hint = "check the host name: " + self.doubt
        if self._namespace and response.status == 429:
            error.retryable = False  # a mirror: the next one is asked at once
        if isinstance(error, AccessDenied):
            who = None if self.withheld else self.credentials(repository)
            error.message += " (%s)" % printable(sent and who or "anonymous", 200)
            wrong = response.status == 401 and (sent or "").startswith("Basic")
            error.hint = self.withheld or wrong and _WRONG_PASSWORD or error.hint
        return error

    def learn_auth_url(self, repository: str, reference: str) -> "str | None":
        """The URL that gives a token to pull `reference` (a tag or digest), or None.

        None where no token is needed. The registry chooses its host: trust it or not.
        Raises NotFound where there is no image, AccessDenied where access is otherwise.
        """
        self.learn_registry_url()
        with self._request("HEAD", "%s/manifests/%s" % (repository, reference), None,
                           {"Accept": ACCEPT}) as response:
            if response.status == 200:
                return None
            if response.status != 401:
                raise registry_error(response, "%s:%s" % (repository, reference))
            self._learn_challenge(response, repository)
        if self.challenge.scheme != "bearer":
            raise AccessDenied("%s wants a user name and password, not a token"
                               % self.host)
        return self._auth_url(self.challenge, repository)

    def log_in(self, repository: str = "") -> None:
        """Raises AccessDenied where we are not who we say, as `docker login` does."""
        self._exchange("GET", "", repository, self.host).close()

    def _document(self, method, path, repository, what, *rest, tries=None, **headers):
        """(the Response, its whole body) for a document, tried until it comes."""
        def fetch():
            with self._exchange(method, path, repository, what, headers, *rest) as got:
                return got, got.read(DOCUMENT_LIMIT, what)

        return self.transport.retrying(fetch, tries)

    def head_manifest(self, repository: str, tag: str) -> "Digest | None":
        """The Digest a tag (or digest) stands for by the registry's word, or None.

        Cheaper than fetch_manifest, and no pull by Docker Hub's count. Raises the same.
        """
        what = "manifest %s:%s" % (repository, tag)
        response, _ = self._document("HEAD", "%s/manifests/%s" % (repository, tag),
                                     repository, what, Accept=ACCEPT)
        return self._claimed(response)

    @staticmethod
    def _claimed(response):
        """The Digest that a response's header claims, None where that is none."""
        with contextlib.suppress(InvalidReference):  # bare hex, say, or empty
            return Digest.parse(response.headers.get("Docker-Content-Digest", ""))
        return None

    def fetch_manifest(
            self, repository: str, reference: "str | Digest",
            size: "int | None" = None) -> "Manifest | Index | Schema1Manifest":
        """The manifest `reference` (a tag or digest) names, decoded.

        By digest that is checked, and its `size` if not None; by tag, a header that
        claims one must agree with the body. Raises InvalidReference of what is neither,
        NotFound, AccessDenied, Unsupported, VerificationError, InvalidDocument,
        TransportError.
        """
        digest = Digest.parse(reference) if ":" in reference else (  # as in no tag
            reference if isinstance(reference, Digest) else None)
        what = "manifest %s%s%s" % (repository, "@" if digest else ":", reference)
        with naming(self.host):
            response, raw = self._document(
                "GET", "%s/manifests/%s" % (repository, reference), repository, what,
                Accept=ACCEPT)
            if size is not None and len(raw) != size:
                raise SizeMismatch(what, size, len(raw))
            manifest = decode_manifest(raw, response.headers.get("Content-Type"),
                                       digest, what)
            # The header is no proof, but one that lies is a sign of tampering.
            claimed = self._claimed(response)
            if claimed is not None:
                claimed.check(PrettySignature.parse(raw).payload if isinstance(
                    manifest, Schema1Manifest) else raw, what,
                    "the registry's header and its body disagree")
        return manifest

    def fetch_blob(self, repository: str, descriptor: Descriptor,
                   what: str = "blob") -> bytes:
        """The document a Descriptor points to, proved; raises as fetch_manifest."""
        if (descriptor.size or 0) > DOCUMENT_LIMIT:
            raise LimitExceeded("%s is %d bytes, more than the limit of %d"
                                % (what, descriptor.size, DOCUMENT_LIMIT))
        with naming(self.host):
            _, raw = self._document("GET", "%s/blobs/%s" % (
                repository, str(descriptor.digest)), repository, what)
            return b"".join(proved([raw], descriptor.digest, descriptor.size, what))

    def open_blob(self, repository: str, descriptor: Descriptor, offset: int = 0,
                  end: "int | None" = None) -> Response:
        """A Response with the bytes of a Descriptor's blob from `offset` on, to `end`.

        To its end if `offset` is 0 or `end` None. The status is 206 where the server
        honours the offset, 200 where it sends all, 416 where it has nothing there. The
        URLs of a foreign layer are not followed: any manifest may name them
        (CVE-2020-15157), only old Windows images do.
        """
        headers, expected = {}, (200,)
        if offset:
            headers["Range"] = "bytes=%d-%s" % (offset, end and end - 1 or "")
            expected = 200, 206, 416
        digest = str(descriptor.digest)
        return self._exchange("GET", "%s/blobs/%s" % (repository, digest), repository,
                              "blob " + digest, headers, expected)

    def tags(self, repository: str, once: bool = False) -> collections.abc.Iterator:
        """Yields a repository's tags, page by page; `once`: the first, in one try only.

        Distribution-spec, "Listing Tags". What is no tag is passed over, and told.
        """
        for query in "?n=%d" % TAG_PAGE, "":
            path, count = "%s/tags/list%s" % (repository, query), 0
            for response, body in itertools.islice(self.pages(
                    path, repository, "tag list", int(once)), once or None):
                with naming(self.host):
                    tags = Document.parse(body, "tag list").get("tags", list, [])
                if query and not count and len(tags) == TAG_PAGE and (
                        "Link" not in response.headers):
                    break  # some end there without a word, as Gitea
                count += len(tags)
                if count > TAG_COUNT_LIMIT:
                    raise LimitExceeded("%s: more than %d tags"
                                        % (repository, TAG_COUNT_LIMIT))
                for tag in tags:
                    if type(tag) is str and re.fullmatch(_TAG, tag):
                        yield tag
                    else:
                        log.warning("%s: not a tag, passed over: %s", self.host,
                                    printable(tag, 80))
            else:
                return

    def pages(self, path, repository, what, tries=None, **headers):
        """Yields (Response, body) of each page of a repository's list at `path`."""
        seen = set()
        while path is not None:
            if path in seen or len(seen) == PAGE_COUNT_LIMIT:
                raise InvalidDocument("%s: the %s does not end" % (self.host, what))
            seen.add(path)
            with naming(self.host):
                response, body = self._document("GET", path, repository, "%s of %s" % (
                    what, repository), tries=tries, **headers)
            yield response, body
            link = re.search(_NEXT, ", ".join(
                response.headers.get_all("Link", []))[:HEADER_LIMIT])
            # Behind a proxy it may not know where it is: where to go on is believed.
            path, _, query = path.partition("?")
            path = link and "%s?%s" % (path, checked_url(
                link.group(1), response.url).query or query)


#: RFC 8288; what stands in quotes may hold anything.
_NEXT = r'''(?i)<([^<>]*)>(?:;[^<>;,"]*(?:"[^"]*")?)*?;\s*rel="?next"?(?![\w-])'''


def list_referrers(registry, repository, digest):
    """The Descriptors of what has the manifest of a Digest for its subject, as a
    Registry lists them (spec, "Listing Referrers"); none where it has no such list.
    """
    found, size = [], 0
    try:
        for response, body in registry.pages(
                "%s/referrers/%s" % (repository, digest), repository,
                "list of referrers", Accept=OCI_INDEX):
            page = decode_manifest(body, response.headers.get("Content-Type"))
            found += getattr(page, "manifests", ())
            size += len(body)
            if size > DOCUMENT_BYTES_LIMIT or len(found) > INDEX_COUNT_LIMIT:
                raise LimitExceeded("more than %d entries, or %d bytes" % (
                    INDEX_COUNT_LIMIT, DOCUMENT_BYTES_LIMIT))
    except (RegistryError, InvalidDocument, Unsupported) as error:
        if found:
            raise InvalidDocument("%s: the list of referrers breaks off: %s" % (
                registry.host, error.message)) from None
        # Some without such a list say 200 to everything.
        if getattr(error, "status", 404) not in NO_REFERRERS_API:
            raise
        if getattr(error, "status", 401) == 401:
            log.warning("taken for a registry without lists of referrers: %s", error)
    return found


class Source:
    """One repository: where it is at home, and mirrors of it that are tried first.

    `places` are (Registry, repository there) pairs, the home last. A mirror that fails,
    or lacks something, or serves what it should not, is left for good, and told of.
    """

    def __init__(self, places):
        self._places = list(places)
        self.home, self.repository = self._places[-1]
        self.transport = self.home.transport
        self._lock = threading.Lock()

    @property
    def registry_url(self):
        """The base URL of the home registry; a guess where only mirrors were asked."""
        return self.home.url or "https://%s/v2/" % self.home.host

    @property
    def host(self):
        return self._places[0][0].host

    def leave(self, place, error):
        """`place`, if any, has failed with `error`; whether another is left to try."""
        self.transport.check()
        with self._lock:
            if place in self._places[:-1]:
                log.warning("leaving the mirror %s: %s", place[0].host, error)
                self._places.remove(place)
        return place not in (None, (self.home, self.repository))

    def referrers(self, digest):
        """{tag: Descriptors} of what refers to the manifest of a Digest.

        What a registry lists goes by the tag under which clients keep it elsewhere.
        """
        def tagged(tag):
            try:
                found = self.seek(Registry.fetch_manifest, tag)
            except (AccessDenied, Unsupported) as error:
                # Artifactory says 403 of what is not there; or of a draft's type, say.
                log.warning("left out: %s", error)
                return None
            # GitLab takes such a tag for the digest.
            return None if found and found.digest == digest else found

        found = {digest.tag: self.seek(list_referrers, digest) or getattr(
            tagged(digest.tag), "manifests", ())}
        for suffix in ("sig", "att", "sbom"):  # cosign, SIGNATURE_SPEC.md
            tag = "%s.%s" % (digest.tag, suffix)
            one = tagged(tag)
            found[tag] = one and [Descriptor.of(one, artifact_type=one.artifact_type)]
        return {tag: entries for tag, entries in found.items() if entries}

    def manifest(self, reference):
        """What a Reference names, decoded; NotFound tells which tags are like it."""
        try:
            return self.ask(Registry.fetch_manifest,
                            reference.digest or reference.tag)[0]
        except NotFound as error:
            if reference.digest is None and error.hint is None:
                import difflib
                error.hint = "imagec.py tags %s lists what is there" % reference.name
                with contextlib.suppress(ImagecError):
                    near = difflib.get_close_matches(reference.tag, itertools.islice(
                        self.home.tags(self.repository, once=True), TAG_PAGE), 3, 0)
                    error.hint = near and "tags like it: " + ", ".join(near) or (
                        error.hint)
            raise

    def document(self, entry):
        """What a Descriptor leads to, decoded; None where it is not there."""
        return self.seek(Registry.fetch_manifest, entry.digest, entry.size)

    def blob(self, descriptor):
        """The bytes a Descriptor points to, checked; None where it is not there."""
        return self.seek(Registry.fetch_blob, descriptor)

    def seek(self, method, *arguments):
        """What the first place that has it gives, or None; no mirror is left for it."""
        for registry, repository in list(self._places):
            with contextlib.suppress(
                    NotFound if registry is self.home else ImagecError):
                found = method(registry, repository, *arguments)
                if found:
                    return found
        return None

    def ask(self, method, *arguments):
        """(what a method of Registry gives, the first place without an error)."""
        while True:
            registry, repository = place = self._places[0]
            try:
                return method(registry, repository, *arguments), place
            except ImagecError as error:
                if not self.leave(place, error):
                    raise

    def trusting(self, fetch, action):
        """What action(fetch()) gives of the first place that has what is good."""
        while True:
            place = self._places[0]
            found = fetch()
            try:
                return action(found)
            except (VerificationError, InvalidDocument, Unsupported, NotFound) as error:
                if not self.leave(place, error):
                    raise


# --------------------------------------------------------------------------------------
# 11  Store: what is on disk: on its way, there, read back
# --------------------------------------------------------------------------------------

PARTIAL = ".partial"  # suffix of what is not yet proved
MOVED = "another program has changed it meanwhile", "run it again"  # of an OutputError
NAME_ANNOTATION = "io.containerd.image.name"  # containerd and docker: the full name
TAG_ANNOTATION = "org.opencontainers.image.ref.name"  # OCI image-spec, annotations.md
ORIGIN_ANNOTATION = "io.github.imagec."  # and the name of a field of an Origin
#: In an archive beside index.json, and like it: what refers to the images. ctr wants to
#: unpack all that index.json names, skopeo without a name wants it to be one.
REFERRERS = "referrers.json"
_O_BINARY = getattr(os, "O_BINARY", 0)  # Windows
_O_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_O_NONBLOCK = getattr(os, "O_NONBLOCK", 0)


class Event(value_type("status id current total", "", None, None)):
    """Something to tell who watches: docker's event stream, as a value.

    `id` is the short name of a layer, or the tag or digest where an image begins, else
    ""; `current` and `total` are bytes, None where they mean nothing.
    """


@contextlib.contextmanager
def naming_file(path):
    """An OSError of a descriptor says which file it speaks of."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = path
        raise


class Partial(contextlib.AbstractContextManager):
    """A file on its way to the name `final`: written as FINAL.partial, locked.

    The lock makes a second pull of the same thing wait for the first instead of writing
    into its file. `wait(seconds)` is how to wait, and may raise. What stands there and
    is not ours alone is removed. Raises OutputError where it cannot be, and where
    another process holds for LOCK_PATIENCE seconds what does not grow or is not ours.
    """

    def __init__(self, final, wait=time.sleep, clock=time.monotonic):
        self.final, self.path = final, final + PARTIAL
        self._begun = 0  # bytes the system was told to put on disk
        size, told, begin = None, False, clock()
        grew = begin
        while not self._take():
            now = clock()
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(self.path)
                if status.st_size != size and ours_alone(self.path, status):
                    size, grew = status.st_size, now
            if now - grew >= LOCK_PATIENCE:
                raise OutputError(
                    self.path, "another process holds it, and for %d seconds it has "
                    "not grown, or is not ours alone" % LOCK_PATIENCE,
                    "end that process, or choose another place with -o")
            if not told and now - begin >= LOCK_TOLD:
                told = True
                log.warning("%s: waiting, for another process holds it", self.path)
            wait(0.1)

    def _take(self):
        """Whether it is open and locked now; if it is not ours alone, it is removed."""
        taken = False
        self._fd, new = self._open()
        try:
            status = os.fstat(self._fd)
            # Whoever held the lock may have renamed or removed the file meanwhile.
            with contextlib.suppress(FileNotFoundError):
                if _try_lock(self._fd) and (
                        os.path.samestat(status, os.lstat(self.path))):
                    taken = new or stat.S_ISREG(status.st_mode) and (
                        status.st_nlink == 1 and ours_alone(self.path, status))
                    if not taken:
                        self._remove()
        finally:
            if not taken:
                self.close()
        return taken

    def _open(self):
        """(descriptor, whether the file is a new one)."""
        flags = os.O_RDWR | _O_NOFOLLOW | _O_BINARY
        while True:
            with contextlib.suppress(FileExistsError):
                return os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
            try:
                return os.open(self.path, flags), False
            except OSError as error:
                # A link planted there must not choose where we write.
                if isinstance(error, PermissionError) or os.path.islink(self.path):
                    self._remove()
                elif not isinstance(error, FileNotFoundError):  # it was just moved on
                    raise

    def _remove(self):
        try:
            os.unlink(self.path)
        except PermissionError:
            raise OutputError(self.path, "is in the way: not a file of ours alone",
                              "choose another place with -o") from None

    def check_size(self, size):
        """Raises OutputError where its file system has no files of `size` bytes.

        Linux lets none seek to where nothing can be; others tell when it is written.
        """
        try:
            os.lseek(self._fd, size, os.SEEK_SET)
            os.lseek(self._fd, 0, os.SEEK_SET)
        except (OSError, OverflowError):
            raise OutputError(self.final, "no file can have %d bytes there" % size,
                              "--format oci keeps files smaller; or choose another "
                              "place with -o") from None

    def size(self):
        with naming_file(self.path):
            return os.fstat(self._fd).st_size

    def chunks(self):
        os.lseek(self._fd, 0, os.SEEK_SET)
        return iter(lambda: os.read(self._fd, CHUNK), b"")

    def skip(self, offset, size):
        """Keeps the `size` bytes it has from here on, which must be at `offset`."""
        if os.lseek(self._fd, 0, os.SEEK_CUR) != offset:
            raise OutputError(self.path, *MOVED)
        os.lseek(self._fd, size, os.SEEK_CUR)

    def truncate(self, whence=os.SEEK_SET):
        """Cuts it off at the start, or by os.SEEK_CUR where it has come to."""
        with naming_file(self.path):
            size = os.lseek(self._fd, 0, whence)
            if self.size() != size:  # not all file systems can
                os.ftruncate(self._fd, size)
        self._begun = size

    def write(self, data):
        view = memoryview(data)
        with naming_file(self.path):
            while len(view):
                view = view[os.write(self._fd, view):]

    def write_behind(self):
        """Has the system begin with what `commit` would have to wait for at the end.

        Linux takes the advice that dirty pages will not be needed as an order to write
        them; it keeps them in memory all the same.
        """
        end = os.lseek(self._fd, 0, os.SEEK_CUR)
        if end - self._begun >= WRITE_BEHIND and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._fd, self._begun, end - self._begun,
                                 os.POSIX_FADV_DONTNEED)
            self._begun = end

    def sync(self):
        with naming_file(self.path):
            os.fsync(self._fd)

    def commit(self, durable=True):
        """Gives it its final name; if `durable`, it is on disk before the name is."""
        if durable:
            self.sync()
        if os.name == "nt":
            self.close()  # Windows does not rename open files
        os.replace(self.path, self.final)
        if durable:
            sync_directory(os.path.dirname(self.final))

    def discard(self):
        if os.name == "nt":
            self.close()  # nor does it remove them
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    def close(self):
        """Leaves it as it is, for another run to go on with."""
        fd, self._fd = self._fd, None  # a signal must not have it closed twice
        with naming_file(self.path):
            if fd is not None:
                _try_lock(fd, "LOCK_UN")  # a process forked meanwhile holds it, too
                os.close(fd)

    def __exit__(self, *_exc):
        self.close()


def ours_alone(path, status):
    """Whether the file of that `status` is ours, and not for everybody to write to.

    A group's bit is not looked at: under a umask of 002 our own files have it, and then
    new ones would be no better. Nor are they on FAT, where a mount says whose all is.
    """
    def told(status):
        return status.st_uid, status.st_mode & stat.S_IWOTH

    if not hasattr(os, "geteuid") or told(status) == (os.geteuid(), 0):
        return True
    import tempfile
    # One with a name: not all file systems tell of a file that has none.
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path) or ".") as fresh:
        fresh = told(os.fstat(fresh.fileno()))
    return told(status) == fresh


def _try_lock(fd, how="LOCK_EX"):
    """Locks the file; False where another holds it. Where no locks are, True."""
    with contextlib.suppress(ImportError):  # Windows
        import fcntl
        try:
            fcntl.flock(fd, getattr(fcntl, how) | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def sync_directory(path):
    """Makes the names in a directory durable, where the system can."""
    with contextlib.suppress(OSError):
        fd = os.open(path or ".", os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_file(path, data, wait=time.sleep):
    """Puts the bytes `data` at `path`, whole or not at all. For `wait` see Partial."""
    with Partial(path, wait) as partial:
        partial.truncate()
        partial.write(data)
        partial.commit()


def remove_tree(path, check=go_on):
    """Removes a directory of ours, whatever modes an image gave to what is in it."""
    if os.path.islink(path):
        os.unlink(path)
        return
    found = [path] if os.path.lexists(path) else []
    for place in found:  # it grows; shutil calls itself for each level
        with contextlib.suppress(OSError):  # FAT has no modes
            os.chmod(place, 0o700)
        with os.scandir(place) as entries:
            for entry in list(entries):
                check()
                if entry.is_dir(follow_symlinks=False):
                    found.append(entry.path)
                else:
                    os.unlink(entry.path)
    for place in reversed(found):
        os.rmdir(place)


def existing_parent(path):
    """`path`, or the nearest directory above it that exists."""
    there = os.path.abspath(path)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    return there


def check_free(path, needed):
    """Raises OutputError where the disk of `path` cannot hold `needed` bytes more."""
    import shutil
    with contextlib.suppress(OSError):  # not all file systems tell
        disk = shutil.disk_usage(existing_parent(path))
        if disk.total and needed > disk.free:
            raise OutputError(path, "%d bytes are needed, %d are free" % (
                needed, disk.free), "free some space or choose another place with -o")


def keeps_names(path):
    """Whether the file system of `path` takes any name for itself alone.

    exFAT and NTFS have no ":", they and macOS know a name in any case of its letters.
    """
    import tempfile
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(
            dir=existing_parent(path)) as place:
        try:
            os.mkdir(os.path.join(place, "A:."))
        except OSError:
            return False
        return not os.path.exists(os.path.join(place, "a:."))
    return True  # it will be told when it is written to


def portable(name):
    """`name` as any file system takes it: percent-encoded (RFC 3986, 2.1) are ":", "%",
    capitals, a final ".", and what begins the names that Windows has for devices.
    """
    def encoded(found):
        return "%%%02x" % ord(found.group()[0]) + found.group()[1:]

    name = re.sub(r"[:%A-Z]|\.\Z", encoded, name)
    return re.sub(r"\A(con|prn|aux|nul|com[0-9]|lpt[0-9])(?=\.|\Z)", encoded, name)


def make_directory(base, *parts):
    """BASE/PARTS..., made where missing; `base`, the user's, alone may be a link."""
    os.makedirs(base, exist_ok=True)
    path = base
    for part in parts:
        path = os.path.join(path, part)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise OutputError(path, "is in the way: not a directory")
    return path


def private_directory(path):
    """Makes sure `path` is a directory of ours alone, not a link planted there."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    status = os.lstat(path)
    if not (stat.S_ISDIR(status.st_mode) and ours_alone(path, status)):
        raise OutputError(path, "is in the way: not a directory of ours alone")


def same_file(source, path, check):
    """Makes `path` the same file as the proved `source`: a hard link, else a copy."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    try:
        os.link(source, path)
    except OSError:  # no hard links here
        with naming_file(path), open(source, "rb") as file, open(path, "xb") as copy:
            for data in pieces(file, check=check):
                copy.write(data)
            copy.flush()
            os.fsync(copy.fileno())


def unchanged(path, status):
    """Whether the file at `path` is still the one, unchanged, of that `status`."""
    with contextlib.suppress(FileNotFoundError):
        now = os.lstat(path)
        return os.path.samestat(now, status) and (now.st_size, now.st_mtime_ns) == (
            status.st_size, status.st_mtime_ns)
    return False


class Region(value_type("path offset size")):
    """Where a blob's bytes are: `size` bytes of a file from `offset` on."""

    def open(self):
        """The file, at the first of them: a regular one, no link, not waited for."""
        file = open(self.path, "rb", opener=lambda path, flags: os.open(
            path, flags | _O_NOFOLLOW | _O_NONBLOCK))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise InvalidDocument("%s is not a regular file" % self.path)
        file.seek(self.offset)
        return file

    def pieces(self, check=go_on):
        with naming_file(self.path), self.open() as file:
            yield from pieces(file, self.size, check)


def regular(path):
    """The Region of the regular file at `path`, None where there is none."""
    with contextlib.suppress(OSError):  # another pull may just be renaming it
        status = os.lstat(path)
        if stat.S_ISREG(status.st_mode):
            return Region(path, 0, status.st_size)
    return None


class Reader:
    """The files of a layout or of `layers` trees in a directory, by their names in it.

    `path` is the user's choice and may be a link; below it none is followed. `check` is
    called as work goes on, and may raise; `unlisted(OSError)`, else who asks, hears of
    directories that cannot be listed. `asked` collects the names of files that were
    wanted; `beside` has the Regions of some that may not be here, by their names.
    """

    def __init__(self, path, check=go_on, unlisted=None):
        self.path, self.check, self._unlisted = path, check, unlisted
        self.asked, self.beside, self._names = set(), {}, None

    def names(self):
        """The names of all but directories, sorted; they are looked for once."""
        if self._names is not None:
            return self._names
        found, waiting = [], [(self.path, "")]
        while waiting:  # os.walk calls itself for each level before 3.12
            path, prefix = waiting.pop()
            try:
                with os.scandir(path) as entries:
                    for entry in entries:
                        self.check()
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append((entry.path, prefix + entry.name + "/"))
                        else:
                            found.append(prefix + entry.name)
            except OSError as error:
                if self._unlisted is None:
                    raise
                self._unlisted(error)
        self._names = sorted(found)
        return self._names

    def region(self, name):
        """The Region of a regular file; raises FileNotFoundError, InvalidDocument."""
        self.asked.add(name)
        try:
            return self._region(name)
        except FileNotFoundError:
            if name not in self.beside:
                raise
            return self.beside[name]

    def _region(self, name):
        path = self.path
        for part in name.split("/"):
            path = os.path.join(path, part)
            status = os.lstat(path)
            if not stat.S_ISDIR(status.st_mode):  # nor is a link followed on the way
                break
        if not stat.S_ISREG(status.st_mode) or (
                path != os.path.join(self.path, *name.split("/"))):
            raise InvalidDocument("%s is not a regular file" % name)
        return Region(path, 0, status.st_size)

    def read(self, name, limit=DOCUMENT_LIMIT):
        """The bytes of a document; raises as `region`, and LimitExceeded."""
        while True:
            self.check()
            region = self.region(name)
            if region.size > limit:
                raise LimitExceeded("%s is larger than the limit of %d bytes"
                                    % (name, limit))
            raw = b"".join(region.pieces())
            if region == self.region(name):  # no pull has just put another there
                return raw


def blob_name(digest):
    """A blob's name in a layout (OCI image-spec, image-layout.md)."""
    return "blobs/%s/%s" % digest


_FOLDER_LINK = rb"\.\./((?:[0-9a-f]{64}/)?[0-9A-Za-z_][0-9A-Za-z_.-]*)"


class TarReader(Reader):
    """The members of a layout that is a tar, by their names in it, without ./ in front.

    It is walked as layers are (see Tar): once, without a look at the data. `names` has
    them as often as they are there; directories end in "/". Where it is `docker`'s and
    no layout, a symlink to a regular member is that member, in the one form in which
    docker and podman write them. `regions` has the Region of each that is to be read,
    the member a link leads to, or None. Raises InvalidDocument where it is no tar, or
    goes on behind its end; OutputError where it has been replaced meanwhile.
    """

    def __init__(self, path, check=go_on):
        super().__init__(os.path.realpath(path), check)
        self._names, self.regions = [], {}
        self._status = os.lstat(self.path)
        with naming_file(self.path), Region(self.path, 0, 0).open() as file:
            codec = codec_of(file)
            if codec != "tar":
                raise Unsupported("compressed with " + codec, "unpack it first")
            tar, size = Tar(pieces(file, check=check), "tar", float("inf")), 0
            odd = None  # a name that other readers take for another
            for entry, _ in tar:
                size += len(entry.path) + len(entry.link)
                if tar.members > MEMBER_COUNT_LIMIT or size > MEMBER_NAMES_LIMIT:
                    raise LimitExceeded("more than %d members, or %d bytes of names" % (
                        MEMBER_COUNT_LIMIT, MEMBER_NAMES_LIMIT))
                text = entry.path.decode("utf-8", "backslashreplace")
                name = re.sub(r"\A(\./)+", "", text)  # of `tar -C DIR -cf FILE .`
                if entry.kind == "dir" and name in ("", "."):
                    continue
                if entry.kind == "dir" and not name.endswith("/"):
                    name += "/"
                elif entry.kind != "dir" and re.search(r"(\A|/)\.{0,2}(/|\Z)", name):
                    odd = odd or text
                link = entry.kind == "symlink" and name.count("/") == 1 and (
                    re.fullmatch(_FOLDER_LINK, entry.link))
                region = link.group(1).decode("ascii") if link else None
                if entry.kind == "file" and not tar.sparse:
                    region = Region(self.path, tar.offset, entry.size)
                self.regions[name] = None if name in self.regions else region
                self._names.append(name)
            file.seek(tar.offset)
            if any(data.strip(b"\0") for data in pieces(file, check=check)):
                raise InvalidDocument("there is more behind the end of the tar")
        if not tar.members:
            raise InvalidDocument("no tar, or an empty one")
        if odd and {"oci-layout", "manifest.json"}.intersection(self.regions):
            raise InvalidDocument("%s: expected a plain name" % printable(odd, 100))
        self.docker = "manifest.json" in self.regions and (
            "oci-layout" not in self.regions)

    def _region(self, name):
        if not unchanged(self.path, self._status):
            raise OutputError(self.path, *MOVED)
        if name not in self.regions:
            raise FileNotFoundError(errno.ENOENT, "not there", name)
        region = self.regions[name]
        if self.docker and type(region) is str:
            self.asked.add(region)
            region = self.regions.get(region)
        if type(region) is not Region:
            raise InvalidDocument("%s is not a regular file, or not the only one"
                                  % name)
        return region


READABLE = "what can be read is a layers tree, an OCI layout or an archive of images"


def open_place(path, check=go_on, unlisted=None, beside=()):
    """The Reader of what a pull has written to `path`; blobs of it may be at `beside`.

    Raises OutputError where there is nothing of an image; of a file InvalidDocument
    where it is no tar, Unsupported where it is a compressed one.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise OutputError(path or "''", "is not there") from None
    if stat.S_ISREG(mode):
        reader = TarReader(path, check)
        if reader.docker:
            log.warning("%s has no manifests: those of its images, and so their "
                        "digests, are made here", reader.path)
        elif "oci-layout" not in reader.names():
            raise OutputError(path, "no image is in it", READABLE)
    elif stat.S_ISDIR(mode):
        refuse_others(path)
        reader = Reader(path, check, unlisted)
    else:
        raise OutputError(path, "is neither a file nor a directory")
    for other in beside:
        reader.beside.update(
            (blob_name(digest), region) for found in stored_at(other, check)
            for document in found.documents
            for digest, region in found.regions(document, lenient))
    return reader


def refuse_others(path):
    """Raises OutputError where what is in a directory is another thing to others."""
    names = {}
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        names.update((entry.name, entry.is_dir(follow_symlinks=False))
                     for entry in entries)
    if names.get("manifest.json") is False and any(
            re.fullmatch("version|oci-layout|([a-z0-9]+-)?[0-9a-f]{64,128}", name)
            for name, directory in names.items() if not directory):
        with Region(os.path.join(path, "manifest.json"), 0, 0).open() as file:
            if file.read(KIB).lstrip()[:1] != b"[":  # docker's list, of an archive
                raise OutputError(path, "is no layout, or not only, but what skopeo "
                                  "and podman call dir:", READABLE)
    if {"index.json", "blobs"}.issubset(names) and "oci-layout" not in names:
        raise OutputError(path, "is a layout to others, but has no oci-layout")


class Origin(value_type("digest repository platforms indexes subject without",
                        (), None, ())):
    """Where an entry of a layout is from, as the pull that made it notes there.

    `digest` is what the reference stood for, `repository` its `HOST/NAME`, `platforms`
    what was pulled of it: "all", or which, comma-joined. `indexes` are kept, too: those
    that lead from there to the entry, or to all that an index made here lists, each
    behind what leads to it. An image made here (recompressed, once schema1) has none.
    `subject` is the Digest of what it came along with, None for what was asked for.
    `without` are the layers left out, for they are elsewhere.
    """

    def annotations(self):
        """The annotations that say so; `of` reads them back."""
        texts = self._replace(indexes=" ".join(map(str, self.indexes)),
                              without=" ".join(map(str, self.without)))
        return {ORIGIN_ANNOTATION + field: str(text)
                for field, text in zip(self._fields, texts) if text}

    @classmethod
    def of(cls, annotations):
        """The Origin noted in an entry's; None for none. Raises InvalidDocument."""
        digest, repository, platforms, *texts = [
            annotations.get(ORIGIN_ANNOTATION + field, "") for field in cls._fields]
        try:  # we write none of an algorithm unknown to us
            digest, indexes, subject, without = [
                tuple(map(Digest.parse, dict.fromkeys(text.split())))
                for text in (digest, *texts)]
        except InvalidReference as error:
            raise InvalidDocument(ORIGIN_ANNOTATION + "*: " + error.message) from None
        if indexes[:1] not in ((), digest):
            raise InvalidDocument("the indexes do not begin with the digest")
        return cls(digest[0], repository, platforms, indexes, (*subject, None)[0],
                   without) if digest else None


def names_in(annotations, archive=False):
    """(full name, tag) that an entry of a layout goes by, as texts, None for none."""
    name, tag = map(annotations.get, (NAME_ANNOTATION, TAG_ANNOTATION))
    if not re.fullmatch(_TAG, str(tag or "none")):
        name, tag = name or tag, None  # podman has the whole name there, ctr "@DIGEST"
    elif not archive and ORIGIN_ANNOTATION + "digest" in annotations and tag and (
            not str(name).endswith(":%s" % tag)):
        name = None  # umoci copies it from another entry; ctr goes by it, in archives
    if re.fullmatch("(sha256:)?[0-9a-f]{64}", str(name)):
        name = None  # an image's ID: Kubernetes gives it as one more name
    return name and Reference.full(str(name)), tag


def came_along(origin, *names):
    """Whether it is here for what it refers to, and goes by such a tag or none.

    By any other it could pass for an image, to those who know no such notes.
    """
    subject = origin and origin.subject
    return bool(subject) and all(name.rpartition(":")[2].startswith(subject.tag)
                                 for name in names if name is not None)


class Stored(value_type("reader tree name tag digest origin documents")):
    """What a name in a layout, an archive or a `layers` tree leads to.

    `name` is the full name, as text, None for none; then it may have a `tag`. `digest`
    is that of its entry, None in a tree, and `origin` the Origin noted there, None for
    none. `documents` yields, decoded, the indexes that lead to it, then it and what is
    below it, outermost first, less what an earlier name has yielded. `tree` is what the
    names of its files in the `reader` begin with, None in a layout.
    """

    @property
    def along(self):
        return came_along(self.origin, self.name, self.tag)

    @property
    def full(self):
        """Its name; where it has none, what it was pulled by if that is noted."""
        return self.name or self.origin and "%s@%s" % (
            self.origin.repository, self.origin.digest)

    @property
    def reference(self):
        """That as a Reference, None where it is none."""
        with contextlib.suppress(InvalidReference):
            return Reference.parse(self.full or "")

    @property
    def without(self):
        """The Digests of its layers that were left out, for they are elsewhere."""
        return self.origin.without if self.origin else ()

    def file_of(self, blob):
        """The name of the file that holds a Layer, or a config by its Descriptor."""
        if self.tree is None:
            return blob_name(blob.digest)
        return self.tree + ("%s/%s.tar" % (blob.id, blob.id)
                            if isinstance(blob, Layer) else "config.json")

    def blobs(self, document):
        """Yields (Descriptor, name of its file) of each blob of a document in it."""
        if isinstance(document, Manifest):
            yield document.config, self.file_of(document.config)
        if isinstance(document, Index):  # in one may be what is no manifest
            found = [entry for entry in document.manifests if self.tree is None
                     and entry.media_type not in ("", *MANIFEST_SHAPES)]
        else:
            found = document.layers if self.tree is None else (
                list_layers(document, self.config(document)))
        for one in found:
            yield getattr(one, "blob", one), self.file_of(one)

    def regions(self, document, noting):
        """Yields (Digest, Region) of each blob that is there; see `blobs`, `stored`."""
        with noting("%sconfig.json" % self.tree):
            for blob, name in self.blobs(document):
                absent = [FileNotFoundError] * (blob.digest in self.without)
                with noting(name), contextlib.suppress(*absent):
                    yield blob.digest, self.reader.region(name)

    def has(self, document):
        """Yields the Digests of the layers that are there, whole, or elsewhere."""
        there = {pair[0]: pair[1].size for pair in self.regions(document, lenient)}
        for one in document.layers if isinstance(document, Manifest) else ():
            if one.digest in self.without or there.get(one.digest) == one.size:
                yield one.digest

    def config(self, manifest):
        """The ImageConfig of an image in it; None of schema1 and of an artifact."""
        if isinstance(manifest, Manifest) and not manifest.artifact_type:
            return ImageConfig.parse(self.reader.read(self.file_of(manifest.config)))
        return None


def lenient(_name):
    """For `stored`: what is not there, or of no use, is passed over."""
    return contextlib.suppress(FileNotFoundError, Unsupported)


def forgiving(_name):
    """The same, and what is bad, too."""
    return contextlib.suppress(OSError, InvalidDocument, VerificationError, Unsupported)


def stored(reader, noting=naming):
    """Yields a Stored for each name of an image in what a pull has written.

    What is read is read inside of `noting(name of a file)`. Where that context manager
    keeps an error to itself, what would follow from the file is passed over.
    """
    if isinstance(reader, TarReader) or os.path.lexists(
            os.path.join(reader.path, "oci-layout")):
        docker = getattr(reader, "docker", False)
        yield from (_DockerLayout if docker else _Layout)(reader, noting).stored()
        return
    for tree, name, digest in _trees(reader):
        yield Stored(reader, tree, name, None, None, None,
                     _tree_documents(reader, noting, tree, digest))


def stored_at(path, check):
    """What `stored` gives of the place `path`; raises OutputError for nothing."""
    with naming(path):
        names = list(stored(open_place(path, check), lenient))
    if not names:
        raise OutputError(path, "no image is in it", READABLE)
    return names


def label(path):
    """The repository to which what has only a tag belongs: by the name of its place."""
    return re.sub("[^a-z0-9]+", "-", os.path.basename(
        os.path.abspath(path)).lower()).strip("-") or "image"


class _Layout:
    """What the names in an OCI layout lead to; see `stored`."""

    def __init__(self, reader, noting):
        self._reader, self._noting = reader, noting
        self._seen = set()  # what was drawn, see walk
        self._proved = set()  # (digest, size or Region) of blobs that may be large
        self._below = {}  # digest of an index -> those it lists; None: not read
        self._made = {}  # digest -> bytes of a manifest made here

    def stored(self, entries=None):
        """Yields a Stored for each entry, or for these that `_entries` gave."""
        archive = isinstance(self._reader, TarReader)
        entries = [(names_in(pair[0].annotations, archive), *pair)
                   for pair in (self._entries() if entries is None else entries)]
        # What is below a name is drawn by that: oras and zot list it once more.
        for names, entry, origin in sorted(entries, key=lambda one: not any(one[0])):
            if NAME_ANNOTATION in entry.annotations and not names[0]:
                origin = None  # it is of that other entry
            documents = self._documents(entry, origin.indexes if origin else ())
            yield Stored(self._reader, None, *names, entry.digest, origin, documents)

    def _entries(self):
        """Yields (Descriptor, Origin or None) of each entry of its index.json."""
        with self._noting("oci-layout"):
            Document.parse(self._reader.read("oci-layout"), "oci-layout").need(
                "imageLayoutVersion", str)
        for where, absent in (("index.json", ()), (REFERRERS, (FileNotFoundError,))):
            with self._noting(where), contextlib.suppress(*absent):
                index = Document.parse(self._reader.read(where, CONTENTS_LIMIT), where)
                for entry in index.children("manifests", INDEX_COUNT_LIMIT):
                    with self._noting(where):
                        entry = Descriptor.from_document(entry)
                        origin = Origin.of(entry.annotations)
                        if where == REFERRERS and not came_along(
                                origin, *names_in(entry.annotations, True)):
                            raise InvalidDocument(
                                "%s refers to nothing by its notes and names: images "
                                "belong in index.json" % str(entry.digest))
                        yield entry, origin

    def _documents(self, entry, way):
        with self._noting("index.json"):
            for digest in way:
                if digest not in self._below:
                    document = self._fetch(Descriptor("", digest, None))
                    self._below.setdefault(digest, document and set())
                    yield from [document] if document else ()
            for *_, document in walk(self._fetch, [entry], seen=self._seen):
                yield document
            if way and None not in map(self._below.get, way):
                led = set(way[:1])
                for digest in way:
                    self._reader.check()
                    led |= self._below[digest] if digest in led else set()
                if entry.digest not in led and not (
                        led.issuperset(self._below.get(entry.digest) or [None])):
                    raise VerificationError(
                        "%s does not lead to %s, but was noted to: did another program "
                        "change the image?" % (way[0], entry.digest))

    def _fetch(self, descriptor):
        digest, kind = descriptor.digest, descriptor.media_type
        with self._noting(blob_name(digest)):
            digest.require_known()
            if kind and kind not in MANIFEST_SHAPES:
                if descriptor[1:3] not in self._proved:
                    self._proved.add(descriptor[1:3])
                    drain(proved(self._reader.region(blob_name(digest)).pieces(
                        self._reader.check), digest, descriptor.size))
                raise Unsupported("it is of type %s" % printable(kind, 80))
            raw = self._made.get(digest) or self._reader.read(blob_name(digest))
            if descriptor.size not in (None, len(raw)):
                raise SizeMismatch("manifest", descriptor.size, len(raw))
            document = decode_manifest(raw, None, digest)
            if isinstance(document, Index):
                self._below[digest] = {entry.digest for entry in document.manifests}
            return document


class _DockerLayout(_Layout):
    """What the names in a docker-archive without manifests lead to: `docker save`
    before 25, podman and skopeo make it. A manifest of each image is made here.
    """

    def _entries(self):
        with self._noting("manifest.json"):
            images, regions = {"images": parse_json(self._reader.read(
                "manifest.json", CONTENTS_LIMIT), "manifest.json")}, set()
            for image in Document(images, "manifest.json").children(
                    "images", INDEX_COUNT_LIMIT):
                name = image.need("Config", str)
                with self._noting(name):
                    region = self._reader.region(name)
                    if region in regions:  # docker gives all tags at once
                        raise InvalidDocument("manifest.json has it twice")
                    regions.add(region)
                    made = self._manifest(name, image.get("Layers", list, []))
                    for tag in (image.get("RepoTags", list) or [""]) if made else ():
                        yield Descriptor(
                            OCI_MANIFEST, made.digest, len(made.raw), None,
                            {NAME_ANNOTATION: str(tag)} if tag else {}), None

    def _manifest(self, name, layers):
        """The Manifest made for a config and its layers; None where one is missing."""
        config = ImageConfig.parse(self._reader.read(name))
        if len(layers) != len(config.diff_ids):
            raise VerificationError("it lists %d diffIDs, manifest.json %d layers"
                                    % (len(config.diff_ids), len(layers)))
        blobs = []
        for digest, name in ((Digest.of(config.raw), name),
                             *zip(config.diff_ids, map(str, layers))):
            with self._noting(name):
                region, kind = self._reader.region(name), OCI_LAYER.replace("+gzip", "")
                with region.open() as file:
                    codec = codec_of(file)
                if codec != "tar":  # crane, kaniko, jib and bazel call it by its digest
                    packed = re.search(r"(?:\A|/)([0-9a-f]{64})\.tar\.\w+\Z", name)
                    if not packed:
                        raise Unsupported("compressed, and its digest is nowhere")
                    digest, kind = Digest("sha256", packed.group(1)), kind + "+" + codec
                if self._reader.regions.setdefault(blob_name(digest), region) != (
                        region) and (digest, region) not in self._proved:
                    if region in self._proved:  # or: each lie is hashed
                        raise InvalidDocument("is there by another digest, too")
                    self._proved.update([region, (digest, region)])
                    drain(proved(region.pieces(self._reader.check), digest))
                blobs.append(Descriptor(kind, digest, region.size))
        if len(blobs) <= len(layers):
            return None
        made = modern_manifest(config, blobs[1:], OCI_MANIFEST, OCI_CONFIG)
        self._made[made.digest] = made.raw
        return made


def held(names):
    """The documents and configs there are of these Stored, as bytes, up to a limit."""
    documents, room = [], DOCUMENT_BYTES_LIMIT
    for found in names:
        for document in () if found.tree else found.documents:  # that is another's
            documents.append(document.raw)
            if isinstance(document, Manifest):
                with forgiving(None):
                    documents.append(found.reader.read(found.file_of(document.config)))
            room -= sum(map(len, documents[-2:]))
            if room < 0:
                return documents
    return documents


def _trees(reader):
    """(prefix, full name, Digest) of each image in the `layers` format: see _tree_name.

    One may be in the directory of another: of GROUP:PROJECT in that of GROUP/PROJECT.
    What has no name is no tree where one that has is below it.
    """
    trees = sorted(name[:-len("manifest.json")] for name in reader.names()
                   if ("/" + name).endswith("/manifest.json"))
    trees = [(tree, *_tree_name(reader.path, tree)) for tree in trees]
    return [tree for tree, (below, name, _) in zip(trees, trees[1:] + trees[:1])
            if tree[1] or not (name and below.startswith(tree[0]))]


_TREE = r"/https?/([^/]+)/v2/(.+)/[^/]*\Z"  # see LayersOutput


def _tree_name(path, tree):
    """(full name, Digest) of a `layers` tree, as LayersOutput names its directory.

    The name is None where it is somewhere else, the Digest where it has a tag. Part of
    the name may be in `path`, but it begins as near to that as can be: a repository,
    too, may be called http/HOST/v2/NAME.
    """
    parts = os.path.abspath(os.path.join(path, tree)).split(os.sep)
    near = "/".join(["", *parts[-tree.count("/") - 3:]])
    found = re.search(_TREE, near, re.DOTALL) or (
        re.match(".*" + _TREE, "/".join(parts), re.DOTALL))
    tag, digest = parts[-1], None
    with contextlib.suppress(InvalidReference):
        digest = Digest.parse(tag.replace("-", ":", 1))
    return found and urllib.parse.unquote("%s/%s%s" % (  # see portable
        *found.groups(), "@" + str(digest) if digest else ":" + tag)), digest


def _tree_documents(reader, noting, tree, digest):
    """Yields the documents of a `layers` tree, outermost first."""
    found, above = {}, None
    with noting(tree + "manifest.json"):
        with contextlib.suppress(FileNotFoundError):
            for depth in range(INDEX_DEPTH_LIMIT):
                name = "index.%d.json" % depth if depth else "index.json"
                found[name] = reader.read(tree + name)
        found["manifest.json"] = reader.read(tree + "manifest.json")
        for name, raw in found.items():
            digests = [Digest.of(raw, algorithm) for algorithm in _DIGEST_LENGTHS]
            if above is not None and not (isinstance(above, Index) and any(
                    entry.digest in digests and entry.size == len(raw)
                    for entry in above.manifests)):
                raise VerificationError("the index does not lead to it")
            above = decode_manifest(raw, None, None if above else digest, name)
            yield above
        if isinstance(above, Index):
            raise InvalidDocument("it is an index, not an image")


class Fetched(value_type("blob region unpacked")):
    """A proved blob: its Descriptor with the size, its Region, its Unpacked or None."""


class Place(value_type("path regions", ())):
    """Where a blob goes to, the file `path`, unless it is there or one of `regions`."""

    def found(self):
        """The Regions that may be the blob; a guess, by their names."""
        return list(filter(None, self.regions + (regular(self.path),)))

    def there(self):
        """Bytes of the blob that are there, finished or not; a guess as well."""
        found = self.found() or filter(None, [regular(self.path + PARTIAL)])
        return next((region.size for region in found), 0)


class Download:
    """Fetches one blob from a Source to its Place; `run` does it.

    `unpack` looks into it, see prove, None where nobody has to; `durable` tells to put
    it on disk before it has its name. `notify(Event)` hears of progress. `share()` is
    how many connections there are for it just now. `rewrite(Fetched)` may give another
    instead: what was fetched never has its name then, by which others could take it.
    """

    def __init__(self, source, blob, place, unpack=None, notify=lambda event: None,
                 durable=True, share=lambda: 1, rewrite=lambda fetched: fetched):
        self._source, self._blob, self._place = source, blob, place
        self._unpack, self._notify, self._durable = unpack, notify, durable
        self._share, self._rewrite = share, rewrite
        self._check = source.transport.check
        self._origin = None  # of the source's places, the one it is fetched from
        self._resumed = False  # whether what an earlier try left is part of it
        self._coded = False  # whether the response claimed to be compressed besides
        self._decoded = False  # whether it was taken at its word
        self._otherwise = False  # whether that is taken the other way than at first

    def run(self):
        """The Fetched. Raises ImagecError and OSError, and leaves then no file there
        that was not there, but maybe PATH.partial to go on with.
        """
        path = self._place.path
        with naming_file(path), Partial(path, self._source.transport.wait) as partial:
            found = self._existing()
            if found:
                partial.discard()
                return self._rewrite(found)
            partial.check_size(self._blob.size or 0)
            try:
                unpacked = self._receive(partial)
            except (VerificationError, InvalidDocument) as error:
                if self._origin:
                    error.source = error.source or "%s/%s" % (
                        self._origin[0].host, self._origin[1])
                # A larger limit may go on with it.
                if not isinstance(error, TooLarge) or self._blob.size is None:
                    partial.discard()
                raise
            self._tell("Verifying Checksum")
            region = Region(partial.path, 0, partial.size())
            found = Fetched(self._blob._replace(size=region.size), region, unpacked)
            after = self._rewrite(found)
            if after is found:
                partial.commit(self._durable)
                after = found._replace(region=region._replace(path=partial.final))
            else:
                partial.discard()
        self._tell("Download complete")
        return after

    def _tell(self, status, current=None):
        self._notify(Event(status, self._blob.digest.hex[:12], current,
                           self._blob.size))

    def _existing(self):
        """The Fetched where a good blob is there already: a name proves nothing."""
        for region in self._place.found():
            self._tell("Verifying")
            try:
                unpacked = prove(region.pieces(self._check), self._blob, self._unpack)
            except FileNotFoundError:
                continue  # it has just been moved on
            except TooLarge:
                raise  # it would be no smaller if it were fetched again
            except (VerificationError, InvalidDocument) as error:
                log.warning("%s is corrupt, or another blob, and will be fetched "
                            "again: %s", region.path, error)
                continue
            self._tell("Already exists")
            return Fetched(self._blob._replace(size=region.size), region, unpacked)
        return None

    def _receive(self, partial):
        """The Unpacked of the blob or None, when it is all in `partial`."""
        again = False
        if self._blob.size is not None and partial.size() > self._blob.size:
            partial.truncate()
        while True:
            try:
                return prove(self._chunks(partial), self._blob, self._unpack)
            except (VerificationError, InvalidDocument) as error:
                # What an earlier try left may be to blame, once, or ranges, or how a
                # body that claims a Content-Encoding was read, or a mirror.
                if self._resumed and not again and not isinstance(error, TooLarge):
                    again = True
                    if self._origin:
                        self._origin[0].ranges = False
                elif self._coded and not self._otherwise:
                    self._otherwise = True
                elif self._source.leave(self._origin, error):
                    again = self._otherwise = False
                else:
                    raise
                log.info("%s; starting over", error)
                partial.truncate()

    def _chunks(self, partial):
        """Yields the blob: what an earlier run left, then what the registry sends."""
        received = 0
        for data in partial.chunks():  # hashed again, not believed
            self._check()
            received += len(data)
            yield data
        self._resumed = received > 0
        if received:
            self._tell("Resuming", received)
        failures = 0  # since the last try that was worth it
        while received != self._blob.size or not received:
            before = received
            try:
                for data in self._rest(received):
                    partial.write(data)
                    if self._durable:
                        partial.write_behind()
                    received += len(data)
                    self._tell("Downloading", received)
                    yield data
                return
            except ImagecError as error:
                if self._coded and isinstance(error, InvalidDocument):
                    raise  # it is no such stream; see _receive
                if isinstance(error, NoRanges):
                    log.debug("%s", error)  # one connection will do
                    continue
                failures = 1 if received - before >= PROGRESS_BYTES else failures + 1
                try:
                    self._source.transport.back_off(error, failures)
                except ImagecError:
                    if not self._source.leave(self._origin, error):
                        raise
                    failures = 0
                self._resumed = received > 0

    def _rest(self, offset):
        """Yields the blob from `offset` on, in one try."""
        response, self._origin = self._source.ask(
            Registry.open_blob, self._blob, 0 if self._decoded else offset)
        at = offset if self._continues(response, offset) else 0
        if response.status != 200 and at != offset:
            log.info("%s: cannot go on at byte %d (HTTP %d, Content-Range %s)",
                     response.place, offset, response.status,
                     printable(response.headers.get("Content-Range"), 60))
            response.discard()
            response, self._origin = self._source.ask(Registry.open_blob, self._blob)
        chunks, size = response.chunks(), self._blob.size
        self._coded = response.coded
        # Many servers claim what they do not do; the digest has the last word.
        raw = size in (None, at + (response.length or 0))
        self._decoded = self._coded and raw == self._otherwise
        if self._decoded:
            chunks, size = inflated(chunks, response.place), None
        begun, came = self._source.transport.clock(), 0
        with response:
            for chunk in chunks:
                known = max(0, offset - at)  # bytes of it that are here already
                at += len(chunk)
                came += len(chunk)
                if known < len(chunk):
                    yield chunk[known:]
                if size and at > offset and self._slow(response, begun, came, at):
                    break
            # Where there is no length, only the blob's size tells that it was cut.
            else:
                if response.length is None and at < (size or 0):
                    raise TransportError("%s ended at byte %d of %d" % (
                        response.place, at, size), retryable=True)
                return
        self._resumed = True
        yield from Ranges(self._source, self._blob, response, self._origin,
                          max(1, self._share()),
                          os.path.dirname(self._place.path)).chunks(at)

    def _continues(self, response, offset):
        """Whether a response holds exactly the bytes from `offset` on."""
        start, end, total = content_range(response) or (None, None, None)
        if start != offset:
            return False
        size = self._blob.size or total or end
        # What is compressed besides has no such size.
        return end == size and (total == size or total is None and not response.coded)

    def _slow(self, response, begun, came, at):
        """Whether more connections would sooner bring what comes from byte `at` on."""
        seconds = self._source.transport.clock() - begun
        left, share = self._blob.size - at, self._share()
        if not (seconds >= RANGES_AFTER and left > RANGES_LEFT and share > 1
                and came < RANGES_PACE * seconds and not response.coded
                and self._origin[0].ranges):
            return False
        with contextlib.suppress(OutputError):  # no room for what comes early
            check_free(self._place.path, left + 2 * share * RANGE)
            return True
        return False


class NoRanges(TransportError):
    """A range does not come as asked for: there are no others from that place."""


class Ranges:
    """The rest of a blob, in ranges that several connections fetch ahead.

    Registries and their CDNs pace each connection. `first` is the Response it has come
    by so far, from `place`, one of the Source's; up to `count` connections are used.
    What comes early waits for its turn in a file in `directory`, which has no name.
    """

    def __init__(self, source, blob, first, place, count, directory):
        self._source, self._blob, self._place = source, blob, place
        self._first, self._count, self._directory = first, count, directory
        self._url = None if first.url.startswith(place[0].url) else first.url
        self._over, self._lock = False, threading.Lock()

    def chunks(self, at):
        """Yields the blob from byte `at` on; raises NoRanges."""
        import concurrent.futures
        import tempfile
        slots, check = 2 * self._count, self._source.transport.check
        waiting, line = collections.deque(range(at, self._blob.size, RANGE)), []
        with tempfile.TemporaryFile(dir=self._directory) as self._file, \
                concurrent.futures.ThreadPoolExecutor(self._count) as executor:
            try:
                while waiting or line:
                    while waiting and len(line) < slots:
                        start = waiting.popleft()
                        slot = (start - at) // RANGE % slots * RANGE
                        end = min(start + RANGE, self._blob.size)
                        line.append((slot, end - start, executor.submit(
                            self._fetch, slot, start, end)))
                    slot, size, future = line.pop(0)
                    while not concurrent.futures.wait([future], CANCEL_NOTICED).done:
                        check()
                    future.result()
                    for offset in range(slot, slot + size, CHUNK):
                        with self._lock:
                            self._file.seek(offset)
                            data = self._file.read(min(CHUNK, slot + size - offset))
                        yield data
            except (ImagecError, OSError, RuntimeError) as error:  # the last: no thread
                check()
                self._place[0].ranges = False
                raise NoRanges("no ranges: %s" % error) from None
            finally:
                self._over = True

    def _fetch(self, slot, start, end):
        """Puts the bytes from `start` to before `end` into the file, at `slot`.

        Where it breaks off, and the try was worth it, the rest is asked for.
        """
        while start < end and not self._over:
            before = start
            try:
                for data in self._draw(start, end):
                    with self._lock:
                        self._file.seek(slot)
                        self._file.write(data)
                    start, slot = start + len(data), slot + len(data)
            except TransportError as error:
                if not error.retryable or start - before < PROGRESS_BYTES:
                    raise

    def _draw(self, start, end):
        """Yields the bytes from `start` to before `end`; raises TransportError."""
        with self._open(start, end) as response:
            tags = {tag for one in (self._first, response)  # RFC 7232, 2.3: strong ones
                    for tag in one.headers.get_all("ETag", []) if tag[:2] != "W/"}
            if content_range(response) != (start, end, self._blob.size) or (
                    response.coded or len(tags) > 1
                    or response.length not in (None, end - start)):
                raise TransportError("%s: asked for bytes %d-%d, got HTTP %d, %s" % (
                    response.place, start, end - 1, response.status, printable(
                        response.headers.get("Content-Range"), 60)))
            for data in response.chunks():
                start += len(data)
                if start > end or self._over:
                    break
                yield data
            if start != end and not self._over:
                raise TransportError("%s sent another length" % response.place)

    def _open(self, start, end):
        """The Response to a range, from where the first one came from in the end."""
        url = self._url
        if url is not None:
            response = self._source.transport.open(
                "GET", url, {"Range": "bytes=%d-%d" % (start, end - 1)},
                trusting=self._first.trusting)
            if response.status == 206:
                return response
            response.discard()  # it was good for a time
        registry, repository = self._place
        response = registry.open_blob(repository, self._blob, start, end)
        if url is not None:
            self._url = response.url
        return response


# --------------------------------------------------------------------------------------
# 12  Outputs: the layouts others load
# --------------------------------------------------------------------------------------
# An output never sees the network. It says where each blob goes, and is told when all
# are there; only then does it write what makes them an image. Bytes stay as they came.

class Image(value_type(
        "reference registry_url digest indexes manifest config platform "
        "layers below format path subject named signed without stored",
        (), None, None, None, True, (), (), None)):
    """An image: as its registry describes it, and at last as a pull has made it.

    `digest` is what the reference stands for: the outermost document's. `indexes` are
    the ones that led to `manifest`, outermost first; `config` is None for schema1 until
    its layers are unpacked; `platform` is what the image says it is for. `format` and
    `path` say how and where it was pulled to, else they are None.

    It may also be an artifact: then `layers` are all its blobs, its config too, as
    Layers without id, `platform` is None. Or a whole index: that is its `manifest`
    then, `below` are the documents below it, `layers` all blobs of these in that way,
    `platform` is "all", or which they are, comma-joined.

    `subject` is the Digest of what it came along with, for it refers to that; None for
    what was asked for. Where it is not `named`, another of that name is. `signed` is
    what proves that it is signed as the Session wants; see SignedBy. `without` are the
    Digests of the layers that are left out. `stored` is the Stored it was read from, at
    `path`: such a one may have None for a `reference`.
    """

    @property
    def wanted(self):
        """The layers that are not left out."""
        return [layer for layer in self.layers if layer.digest not in self.without]

    @property
    def image_id(self):
        """docker's image ID; None where there is no `config`."""
        return self.config and str(Digest.of(self.config.raw))

    def require_file_system(self):
        """Raises Unsupported unless it is an image all of whose layers are tars."""
        if self.manifest.artifact_type:
            raise Unsupported("%s is no container image, but an artifact of type %s" % (
                self.reference, printable(self.manifest.artifact_type, 100)),
                "pull --format files has its files, oci and archive all of it")
        for layer in self.layers:
            if not layer.blob.is_tar:
                raise Unsupported("layer %s of %s is of type %s, not a tar" % (
                    str(layer.digest), self.reference,
                    printable(layer.blob.media_type, 100)))

    @property
    def documents(self):
        """The documents a layout holds besides the layers, as (Digest, bytes) pairs."""
        found = [(one.digest, one.raw)
                 for one in (*self.indexes, self.manifest, *self.below)]
        if self.config is not None:
            found.append((self.manifest.config.digest, self.config.raw))
        return found


class _Stream:
    """A binary file in the shape of a Partial. It may take less than it is given, as
    pipes do; it is closed at the end where it is ours, which has a `path`.
    """

    def __init__(self, file, path=None):
        self._file, self._path = file, path

    def write(self, data):
        view = memoryview(data)
        with naming_file(self._path):
            while len(view):
                view = view[self._file.write(view):]

    def write_behind(self, _whence=None):
        """Nothing of a pipe has to be put on disk."""

    discard = truncate = write_behind

    def commit(self):
        self._file.flush()

    def close(self):
        if self._path is not None:
            self._file.close()


class Output:
    """A place for blobs by their digests, and a last step that makes them images.

    `tag` is the Reference to name the image by, None for the one it is pulled by;
    `stream` a binary file to write to instead of `path`.
    """

    unpacks = False  # whether layers are unpacked, and so their diffIDs checked
    verbatim = False  # whether schema1 and its throwaway layers are kept as they are
    platforms = False  # whether it can hold an index with all its platforms
    several = True  # whether it holds more than one image
    layout = False  # whether it has names to load by, and may have rewritten layers
    streams = False  # whether it is written in one go, and so maybe to a pipe
    images = True  # whether images go into it
    partly = False  # whether it can have what is below one path alone
    wait = staticmethod(time.sleep)  # how to wait for another pull; may raise
    check = staticmethod(go_on)  # raises where work should not go on
    max_files = MEMBER_COUNT_LIMIT  # of an image that is unpacked
    max_layer_size = LAYER_SIZE_LIMIT  # of what it unpacks
    recompress = None  # what zstd layers are rewritten to
    below = None  # the path of the directory that becomes the root
    sole = None  # the Reference that alone an archive may hold which is replaced

    def __init__(self, path, tag=None, stream=None):
        if stream is not None and not self.streams:
            raise UsageError("format %s does not go to standard output" % self.format)
        self.path, self._tag, self.stream = path, tag, stream
        self.near = {}  # digest -> Region, of what the same command has made elsewhere
        if stream is None:  # then a directory has to be there, or to be made
            there = existing_parent(os.path.dirname(os.path.abspath(path))
                                    if self.streams else path)
            if not (os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)):
                raise OutputError(
                    there, "no permission to write there" if os.path.isdir(there)
                    else "is there and is not a directory",
                    "choose another place with -o")

    def held(self, reference, registry_url):
        """The documents it has already of a Reference, as bytes, outermost first."""
        return []

    def accept(self, image):
        """Raises Unsupported where it cannot hold an Image; touches nothing."""
        if self.unpacks:
            image.require_file_system()

    def place(self, image, layer):
        """The Place of the blob of an Image's layer; touches nothing."""

    def elsewhere(self, image, bases):
        """The Digests of its layers that may be left out.

        `bases` has a list of its layers' digests for each image there is elsewhere.
        """
        known = {digest for base in bases for digest in base}
        return tuple(layer.digest for layer in image.layers if layer.digest in known)

    def find(self, images):
        """Looks which blobs of these Images are there already; touches nothing."""

    def open(self, images):
        """Makes the place for these Images, which are all that will come."""

    def visit(self, layer, tar):
        """Takes what it wants from the layer's Tar; see unpack."""
        drain(tar)

    def add(self, layer, fetched):
        """A layer's blob is there, proved; from any thread."""

    def close(self, images):
        """All blobs are there: makes them these Images, and gives the path of each."""

    def abandon(self):
        """The pull has failed: puts away what no later run can use."""

    def name_of(self, image):
        """The Reference an image is to be loaded by, None for one without a tag."""
        name = self._tag or image.reference
        if image.subject is not None:
            name = name._replace(tag=image.reference.tag)
        return name._replace(digest=None) if name.tag and image.named else None


ASIDE = ".new" + PARTIAL  # suffix of what is proved, but whose name is still another's


def _layer_path(folder, layer):
    return os.path.join(folder, layer.id, layer.id + ".tar")


class LayersOutput(Output):
    """DEST/SCHEME/HOST/v2/REPOSITORY/TAG/: a directory a layer, and the documents.

    `<id>/<id>.tar` is the blob as received, `<id>/<id>.json` its v1 image JSON,
    `manifest.json` and `config.json` the exact bytes, `index.json` (and `index.1.json`,
    ... where indexes nest) those of the index that led there. The manifest comes last:
    where it is, everything is. What is there is replaced only when all that is new is
    there too, whole and proved: until then it waits with the suffix ASIDE.
    """

    format = "layers"
    unpacks = verbatim = True

    def __init__(self, path, tag=None, stream=None):
        super().__init__(path, tag, stream)
        if os.path.lexists(os.path.join(path, "oci-layout")):
            raise OutputError(path, "is an OCI image layout: nobody would look for a "
                              "layers tree there", "choose another place with -o")
        refuse_others(path)
        self._plain = keeps_names(path)  # names can be as they are

    def _parts(self, reference, registry_url):
        url = urllib.parse.urlsplit(registry_url)
        name = "%s-%s" % reference.digest if reference.digest else reference.tag
        parts = [url.scheme, url.netloc, "v2", *reference.repository.split("/"), name]
        return parts if self._plain else list(map(portable, parts))

    def _folder(self, image):
        return os.path.join(self.path, *self._parts(image.reference,
                                                    image.registry_url))

    def held(self, reference, registry_url):
        # The registry may not have been probed yet, and then its scheme is a guess.
        _, *parts = self._parts(reference, registry_url)
        return [raw for scheme in ("https", "http") for raw in held(stored(Reader(
            os.path.join(self.path, scheme, *parts), self.check, lambda error: None),
            forgiving))]

    def place(self, image, layer):
        path = _layer_path(self._folder(image), layer)
        there = regular(path)
        return Place(path + ASIDE, (there,)) if there else Place(path)

    def open(self, images):
        self._added = {}  # digest -> path of its file, os.stat of it
        for image in images:
            below = self._parts(image.reference, image.registry_url)
            make_directory(self.path, *below)  # there may be no layer
            for layer in image.layers:
                make_directory(self.path, *below + [layer.id])

    def add(self, layer, fetched):
        path = fetched.region.path
        self._added[layer.digest] = path, os.lstat(path)

    def close(self, images):
        return [self._close(image, self._folder(image)) for image in images]

    def _close(self, image, folder):
        """The blobs and the documents of one image get their names."""
        documents = self._documents(image)
        with Partial(os.path.join(folder, "manifest.json"), self.wait) as partial:
            # Its lock is the lock of the tree; what may fail comes first.
            partial.truncate()
            partial.write(image.manifest.raw)
            moves = list(self._blobs_to_move(image, folder))
            for name, raw in documents.items():
                path = os.path.join(folder, *name.split("/"))
                write_file(path + ASIDE, raw, self.wait)
                moves.append((path + ASIDE, path))
            partial.sync()
            for source, path in moves:
                os.replace(source, path)
            for layer in image.layers:  # of a pull that failed, of another blob
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_layer_path(folder, layer) + ASIDE)
            for name in os.listdir(folder):  # of an image this name had before
                if re.fullmatch(r"(index(\.[0-9]+)?|config)\.json", name) and (
                        name not in documents):
                    os.unlink(os.path.join(folder, name))
            for directory in {os.path.dirname(path) for _, path in moves}:
                sync_directory(directory)
            partial.commit()
        return folder

    def _blobs_to_move(self, image, folder):
        """Yields (where it is, its name) of each blob that has not its name yet."""
        for layer in image.layers:
            path = _layer_path(folder, layer)
            # It may be where another layer or image has it.
            there, status = self._added[layer.digest]
            # Another pull of the same, or that image, may have moved it.
            places = path + ASIDE, path, there, there[:-len(ASIDE)]
            source = next((one for one in places if unchanged(one, status)), None)
            if source is None:  # or have put its own there
                region = next(filter(None, map(regular, places)), None)
                if region is None:
                    raise OutputError(path, *MOVED)
                drain(proved(region.pieces(self.check), layer.digest))
                source = region.path
            if source not in (path, path + ASIDE):
                same_file(source, path + ASIDE, self.check)
            if source != path:
                yield path + ASIDE, path

    def _documents(self, image):
        """{name in its folder: bytes} of all but its manifest."""
        documents = {"index.%d.json" % depth if depth else "index.json": index.raw
                     for depth, index in enumerate(image.indexes)}
        if isinstance(image.manifest, Manifest):
            documents["config.json"] = image.config.raw
        for layer in image.layers:
            documents["%s/%s.json" % (layer.id, layer.id)] = (
                layer.v1_json.encode("utf-8"))
        return documents


OCI_LAYOUT = b'{"imageLayoutVersion": "1.0.0"}'  # OCI image-spec, image-layout.md


def index_entry(image, name):
    """An image's entry in a layout's index.json; `name` is a Reference or None."""
    document, platform = image.manifest, image.platform
    annotations = Origin(
        image.digest, image.reference.name, str(platform or ""),
        tuple(index.digest for index in image.indexes), image.subject,
        image.without).annotations()
    if name is not None:
        annotations.update({NAME_ANNOTATION: str(name), TAG_ANNOTATION: name.tag})
    return Descriptor.of(
        document, annotations=annotations,
        platform=platform if isinstance(platform, Platform) else None).as_json()


def made_index(entries, origin=None):
    """An Index made here, of entries as JSON-able dicts; `origin` is noted in it."""
    raw = canonical_json({
        "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries,
        "annotations": {ORIGIN_ANNOTATION + "digest": str(origin)} if origin else {}})
    if len(raw) > DOCUMENT_LIMIT:
        raise LimitExceeded("an index of %d manifests is over %d bytes" % (
            len(entries), DOCUMENT_LIMIT))
    return decode_manifest(raw)


def contents(path, index):
    """`index`, JSON-able, as the bytes of the list of what a layout at `path` holds;
    raises OutputError where nobody would read it.
    """
    raw = canonical_json(index)
    try:
        if len(raw) > CONTENTS_LIMIT:
            raise LimitExceeded("its list would have %d bytes, more than the limit of "
                                "%d" % (len(raw), CONTENTS_LIMIT))
        Document.parse(raw, "its list").children("manifests", INDEX_COUNT_LIMIT)
    except InvalidDocument as error:
        raise OutputError(path, "cannot hold that too: " + error.message,
                          "choose another place with -o") from None
    return raw


def add_to_index(manifests, entries):
    """Puts `entries` into a layout's list of manifests, in place.

    An older entry of the same name stays, but nameless (as containers/image does it),
    and no entry stands twice. A tag that another image's entry goes by is not taken
    from it: the newcomer goes by its full name.
    """
    names = [names_in(old.get("annotations") or {})[0] for old in manifests]
    for entry in entries:
        own = entry.get("annotations", {})
        name = own.get(NAME_ANNOTATION)
        for number in reversed(range(len(manifests))):
            old = manifests[number]
            annotations = old.get("annotations") or {}
            if name and names[number] == name:
                names[number] = None
                for key in (NAME_ANNOTATION, TAG_ANNOTATION):
                    annotations.pop(key, None)
            elif name and annotations.get(TAG_ANNOTATION) == own[TAG_ANNOTATION]:
                own[TAG_ANNOTATION] = name
            if old.get("digest") == entry["digest"]:
                if not annotations.get(TAG_ANNOTATION):
                    del manifests[number], names[number]
                elif name is None:
                    break
        else:
            manifests.append(entry)
            names.append(name)


class OCIOutput(Output):
    """An OCI image layout directory, which collects the images pulled into it."""

    format = "oci"
    platforms = layout = True

    def __init__(self, path, tag=None, stream=None):
        super().__init__(path, tag, stream)
        self._lock, self._entries = threading.Lock(), collections.defaultdict(list)
        begun = {"blobs", "index.json" + PARTIAL, "oci-layout" + PARTIAL}
        # It is empty, or a layout that another pull is about to make.
        if not os.path.isdir(path) or begun.issuperset(os.listdir(path)):
            return
        try:
            version = Document.parse(Reader(path).read("oci-layout"),
                                     "oci-layout").need("imageLayoutVersion", str)
            self._read_index()
        except (OSError, InvalidDocument) as error:
            raise OutputError(path, "is there and is no OCI image layout: %s" % (
                error.message if isinstance(error, ImagecError) else error.strerror),
                "choose another place with -o") from None
        if not version.startswith("1."):
            raise OutputError(path, "is an OCI image layout of version %s, which this "
                              "program does not know" % printable(version, 20))
        refuse_others(path)

    def _read_index(self):
        try:
            raw = Reader(self.path).read("index.json", CONTENTS_LIMIT)
        except FileNotFoundError:
            return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
        index = Document.parse(raw, "index.json")
        for entry in index.children("manifests", INDEX_COUNT_LIMIT):
            entry.get("annotations", dict)
        # Null: `umoci init`.
        return dict(index.value, manifests=index.value.get("manifests") or [])

    def open(self, images):
        for algorithm in {"sha256"}.union(layer.digest.algorithm for image in images
                                          for layer in image.wanted):
            make_directory(self.path, "blobs", algorithm)
        marker = os.path.join(self.path, "oci-layout")
        if not os.path.exists(marker):
            write_file(marker, OCI_LAYOUT, self.wait)

    def held(self, reference, registry_url):
        layout = _Layout(Reader(self.path, self.check), forgiving)
        with self._lock:  # it is read once, for as many as are asked for
            for pair in () if self._entries else layout._entries():
                self._entries[names_in(pair[0].annotations)[0]].append(pair)
        return held(layout.stored(self._entries.get(
            str(self._tag or reference._replace(digest=None)), ())))

    def place(self, image, layer):
        return Place(os.path.join(self.path, blob_name(layer.digest)))

    def close(self, images):
        for digest, raw in (pair for image in images for pair in image.documents):
            make_directory(self.path, "blobs", digest.algorithm)
            write_file(os.path.join(self.path, blob_name(digest)), raw, self.wait)
        # Its lock is the lock of the index.
        with Partial(os.path.join(self.path, "index.json"), self.wait) as partial:
            index = self._read_index()
            add_to_index(index["manifests"], [
                index_entry(image, self.name_of(image)) for image in images])
            raw = contents(self.path, index)
            partial.truncate()
            partial.write(raw)
            partial.commit()
        return [self.path] * len(images)


class Spooled(Output):
    """What is written in one go, of blobs that wait for it in a spool.

    That is a directory of ours alone beside it; for a stream, with the temporary files.
    """

    streams = True

    def __init__(self, path, tag=None, stream=None):
        super().__init__(path.rstrip("/") or path, tag, stream)
        self._target, self._spool = None, self.path + PARTIAL + ".d"
        if stream is not None:
            return
        with contextlib.suppress(FileNotFoundError):
            there, above = os.lstat(self.path), os.stat(
                os.path.dirname(os.path.abspath(self.path)))
            if above.st_mode & stat.S_ISVTX and os.geteuid() not in (
                    0, there.st_uid, above.st_uid):
                raise OutputError(self.path, "is there already, and another user's",
                                  "choose another place with -o")
        self._check_free()

    def _check_free(self):
        """Raises OutputError where it must not replace what is there."""
        if os.path.isdir(self.path):
            raise OutputError(self.path, "is there and is a directory")

    def open(self, images):
        self._target, self._ours = None, False  # is the spool ours?
        if self.stream is not None:
            import tempfile
            self._target, self._spool = self.stream, tempfile.mkdtemp(prefix="imagec-")
        else:
            self._check_free()
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
            # Its lock is the lock of the spool too.
            self._target = Partial(self.path, self.wait)
            self._check_free()  # another pull may have been waited for
            private_directory(self._spool)
        self._ours = True
        make_directory(self._spool, "blobs")

    def place(self, image, layer):
        return Place(os.path.join(self._spool, "blobs", layer.digest.hex))

    def _write(self, data):
        self._target.write(data)
        self._target.write_behind()

    def _end(self, written=True):
        """All is `written`, or nothing was to be."""
        remove_tree(self._spool)
        (self._target.commit if written else self._target.discard)()
        self._target.close()

    def abandon(self):
        if self._target is not None:
            if self.stream is not None and self._ours:
                remove_tree(self._spool)
            self._target.close()


class ArchiveOutput(Spooled):
    """One tar that is an OCI image layout and a docker-archive at once.

    Blobs stand in it as they came, in the order of the layers, so that the same images
    give the same bytes. Each is moved from the spool into it when its turn has come: at
    no time is more on disk than the archive and the largest layer. What an unfinished
    archive has stays where it is in it, and what a finished one has is taken from it;
    one that is what would be written stays as it is.
    """

    format = "archive"
    layout = True

    def _check_free(self):
        super()._check_free()
        if self.sole and os.path.lexists(self.path):
            own, found = str(self._tag or self.sole._replace(digest=None)), ()
            with contextlib.suppress(ImagecError, OSError):
                found = {str(one.name or one.origin and one.origin.repository
                             or one.digest) for one in stored(open_place(
                                 self.path, self.check)) if not one.along}
            if own not in found or found - {own, self.sole.name}:
                raise OutputError(self.path, "holds %.300s, and is not replaced" % (
                    ", ".join(sorted(found)) or "no image"), "name a file with -o")

    def accept(self, image):
        try:
            image.require_file_system()
        except Unsupported as error:
            log.warning("docker cannot load what others can: %s", error.message)

    def find(self, images):
        self._order = {}  # digest -> the first layer that has it
        for layer in (layer for image in images for layer in image.wanted):
            self._order.setdefault(layer.digest, layer)
        self._old = os.path.realpath(self.path)  # a finished one
        self._found = []  # {digest: Region} of the unfinished one, then of the finished
        for path in (self.path + PARTIAL, self._old) if self.stream is None else ():
            self._found.append(dict(self._begun(path)))

    def elsewhere(self, image, bases):
        # docker knows a layer by those below it: above other ones it wants it again.
        digests = [layer.digest for layer in image.layers]
        found = max((os.path.commonprefix([digests, base]) for base in bases), key=len,
                    default=())
        above = set(digests[len(found):])
        return tuple(digest for digest in found if digest not in above)

    def _begun(self, path):
        """Yields (digest, Region) of the blobs an archive seems to begin with.

        What is rewritten on its way into it has another place there than it had.
        """
        with contextlib.suppress(OSError, InvalidDocument), Region(
                path, 0, 0).open() as file:
            at, end = len(_PROLOGUE), file.seek(0, os.SEEK_END)
            if not ours_alone(path, os.fstat(file.fileno())):
                return  # who may write to it may do so behind the proof
            for digest, layer in self._order.items():
                header = tar_header(blob_name(digest).encode(), layer.blob.size or 0)
                file.seek(at)
                region = Region(path, at + len(header), layer.blob.size or 0)
                at = _padded(region)
                if not region.size or at > end or file.read(len(header)) != header or (
                        self.recompress and codec_of(file) == "zstd"):
                    break
                file.seek(region.offset + region.size)
                if file.read(at - file.tell()).strip(b"\0"):
                    break
                yield digest, region

    def open(self, images):
        super().open(images)
        self.find(images)  # another pull may have been waited for
        for digest in self.near.keys() & self._order.keys():
            region = self.near[digest]._replace(
                path=os.path.join(self._spool, digest.hex + ".near"))
            with contextlib.suppress(FileNotFoundError):  # an earlier run's
                os.unlink(region.path)
            with contextlib.suppress(OSError):  # its own name may soon be another's
                os.link(self.near[digest].path, region.path)
                self._found.append({digest: region})
        if self.stream is None:
            self._target.check_size(sum(layer.blob.size or 0
                                        for layer in self._order.values()))
        self._fetched, self._lock = {}, threading.Lock()
        self._waiting = collections.deque(self._order)  # for their turn
        self._line = []  # the Fetched of those whose turn has come
        self._done = None  # the digests of what has been written, where any of it has
        self._status = self.stream is None and os.path.exists(self._old) and (
            os.stat(self._old))

    def place(self, image, layer):
        return super().place(image, layer)._replace(regions=tuple(
            found[layer.digest] for found in self._found if layer.digest in found))

    def add(self, layer, fetched):
        with self._lock:
            self._fetched[layer.digest] = fetched
            while self._waiting and self._waiting[0] in self._fetched:
                self._line.append(self._fetched[self._waiting.popleft()])
                # Of what the finished one has, nothing is moved before it has to be.
                if self._line[-1].region.path != self._old:
                    self._move()

    def _move(self):
        if self._done is None:
            self._done = set()
            self._write(_PROLOGUE)
        for blob, region, _ in self._line:
            if blob.digest not in self._done:  # two layers may have become one
                self._done.add(blob.digest)
                self._write(tar_header(blob_name(blob.digest).encode(), blob.size))
                if region.path == self.path + PARTIAL:
                    self._target.skip(region.offset, blob.size)
                else:
                    for data in region.pieces(self.check):
                        self._write(data)
                self._write(bytes(-blob.size % TAR_BLOCK))
            if region.path.startswith(self._spool):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(region.path)
        del self._line[:]

    def close(self, images):
        tail = self._tail(images)
        stays = (self._done is None and self._status and self._ends(tail)
                 and ours_alone(self._old, self._status)
                 and not os.path.islink(self.path))
        if not stays:
            self._move()
            self._target.truncate(os.SEEK_CUR)
            self._write(tail)
        if self._status and not unchanged(self._old, self._status):
            raise OutputError(self.path, *MOVED)
        self._end(not stays)
        self.near.update(self._begun(self._old))
        return [self.path] * len(images)

    def _ends(self, tail):
        """Whether the finished one has the bytes `tail` behind those in line."""
        region = self._line[-1].region if self._line else Region("", 0, len(_PROLOGUE))
        with open(self._old, "rb") as file:
            if file.read(len(_PROLOGUE)) != _PROLOGUE:
                return False
            file.seek(_padded(region))
            return file.read(len(tail) + 1) == tail

    def _tail(self, images):
        """What stands behind the layers of these."""
        images = [(image, self.name_of(image)) for image in images]
        documents = dict(pair for image, _ in images for pair in image.documents)
        blobs = {layer.digest for image, _ in images for layer in image.wanted}
        members = [(blob_name(digest), raw) for digest, raw in documents.items()
                   if digest not in blobs]  # of an artifact, say
        lists, repositories = {"index.json": [], REFERRERS: []}, {}
        for where, entries in lists.items():
            add_to_index(entries, [index_entry(*pair) for pair in images if (
                pair[0].subject is not None) == (where == REFERRERS)])
        images = [pair for pair in images if pair[0].subject is None and pair[0].config]
        for image, name in images:
            if name is not None and image.layers:  # what docker before 1.10 reads
                repositories.setdefault(name.name, {})[name.tag] = image.layers[-1].id
        members += [(name, contents(self.path, {
            "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}))
            for name, entries in lists.items() if entries or name == "index.json"]
        members.append(("manifest.json", _docker_manifest(images)))
        if repositories:
            members.append(("repositories", canonical_json(repositories)))
        return b"".join(_member(*member) for member in members) + bytes(2 * TAR_BLOCK)


def _docker_manifest(images):
    """manifest.json, what `docker load` reads (moby, image/tarexport)."""
    entries = {}
    for image, name in images:
        entry = entries.setdefault(image.manifest.digest, {
            "Config": blob_name(image.manifest.config.digest), "RepoTags": None,
            "Layers": [blob_name(layer.digest) for layer in image.layers]})
        if name is not None and str(name) not in (entry["RepoTags"] or ()):
            entry["RepoTags"] = (entry["RepoTags"] or []) + [str(name)]
    return canonical_json(list(entries.values())) + b"\n"


def _member(name, data):
    return tar_header(name.encode(), len(data)) + data + bytes(-len(data) % TAR_BLOCK)


def _padded(region):
    """Where a member ends whose data is a Region."""
    return region.offset + region.size + -region.size % TAR_BLOCK


_PROLOGUE = _member("oci-layout", OCI_LAYOUT) + b"".join(  # what an archive begins with
    tar_header(name, 0, b"5", 0o755) for name in (b"blobs/", b"blobs/sha256/"))


def recompress(fetched, path, rename=None, wait=time.sleep, check=go_on):
    """Writes a Fetched zstd layer as one gzip member: the Fetched of that.

    It goes to `path`, or where `rename(Descriptor)` says. The same layer gives the same
    bytes with the same zlib. Of any other layer it gives the same Fetched.
    """
    blob, region, _ = fetched
    digest = hashlib.sha256()
    with region.open() as file:
        if codec_of(file) != "zstd":
            return fetched

    def packed():
        deflate = zlib.compressobj(6, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        for data in inflated(region.pieces(check), region.path):
            check()  # here: few bytes may unpack to many
            yield deflate.compress(data)
        yield deflate.flush()

    with Partial(path, wait) as partial:
        partial.truncate()
        for data in packed():
            digest.update(data)
            partial.write(data)
        kind = OCI_LAYER if blob.media_type.startswith("application/vnd.oci") else (
            DOCKER_LAYER)
        blob = blob._replace(media_type=kind, size=partial.size(),
                             digest=Digest("sha256", digest.hexdigest()))
        partial.final = rename(blob) if rename else path
        partial.commit()
    return fetched._replace(blob=blob, region=Region(partial.final, 0, blob.size))


# --------------------------------------------------------------------------------------
# 13  Trees*: layers -> one file tree -> a directory or a tar
# --------------------------------------------------------------------------------------
# Policy first, mechanics after: the tree is worked out in memory from the members'
# headers (OCI image-spec, layer.md, "Applying Changesets"), as in a chroot. Only then
# is anything put in its place, and every parent of it is a directory we made: no link
# of an image is ever followed on the real file system, so none can lead out of it.

_WHITEOUT, _OPAQUE, _AUFS = b".wh.", b".wh..wh..opq", b".wh..wh."
_LINK_LIMIT = 40  # symlinks followed for one name; Linux's MAXSYMLINKS
_DETOUR_LIMIT = 2000000  # steps behind links, for a whole image
_RESTORED_XATTRS = (b"user.", b"security.capability", b"system.posix_acl_")
#: A directory that no layer speaks of.
_IMPLICIT = Entry(b"", "dir", 0, 0o755, 0, 0, 0).dumps()
#: (major, minor) of the character devices that give nobody a right: null, zero, full,
#: random, urandom, tty (Linux, admin-guide/devices.txt). Others are not made.
_HARMLESS_DEVICES = frozenset([(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0)])


class Census:
    """Counts an image's members, and directories they imply, from many threads."""

    def __init__(self, limit=MEMBER_COUNT_LIMIT):
        self._limit, self._lock = limit, threading.Lock()
        self._members = self._names = 0

    def add(self, members, names, what):
        """Counts `members` of a layer `what`, whose names take `names` bytes; negative
        numbers uncount. Raises TooLarge, LimitExceeded.
        """
        with self._lock:
            self._members += members
            self._names += names
        if self._members > self._limit:
            raise TooLarge("%s: with it the image has more than the limit of %d files"
                           % (what, self._limit), hint="raise it with --max-files")
        if self._names > MEMBER_NAMES_LIMIT:
            raise LimitExceeded(
                "%s: with it the names of the image's files take more than the limit "
                "of %d bytes" % (what, MEMBER_NAMES_LIMIT))


class LayerStore:
    """Keeps what one layer holds: its Entries in order, and its files' data on disk.

    Each file's data goes to a file of its own in `directory`. `records` are its Entries
    as bytes, for there may be millions. `census` counts them for the image. `shared`:
    the layer is there twice, so that several inodes have the same data.
    """

    shared = False

    def __init__(self, directory, census=None):
        os.makedirs(directory, exist_ok=True)
        self._directory, self._census = directory, census or Census()
        self.records, self._names = [], 0
        self._made = None  # the directory that was made last

    def visit(self, tar):
        """Keeps the members of a Tar, and none of an earlier try, which failed."""
        self._census.add(-len(self.records), -self._names, tar.what)
        self.records, self._names = [], 0
        for entry, data in tar:
            if b"\0" in entry.path + entry.link or not entry.link and (
                    entry.kind == "symlink"):
                raise InvalidDocument("%s: %s: a NUL byte in its name, or a link to "
                                      "nothing" % (tar.what, show(entry.path)))
            where = None
            if entry.kind == "file" and entry.size:
                with naming_file("%s of %s" % (show(entry.path), tar.what)):
                    where = self._keep(data)
            names = len(entry.path) + len(entry.link) + sum(
                len(key) + len(value) for key, value in entry.xattrs)
            self._names += names
            self._census.add(1, names, tar.what)
            self.records.append(Entry.dumps((*entry[:-1], where)))

    def path(self, number):
        """The file that holds the data of member `number`, and nothing else."""
        return os.path.join(self._directory, str(number // 1000), str(number))

    def _keep(self, data):
        """Keeps a file's data: where in the store it is."""
        number = len(self.records)
        path = self.path(number)
        if number // 1000 != self._made:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._made = number // 1000  # makedirs costs as much as a small file
        with open(path, "wb", buffering=0) as file:
            self.write(file, data)
        return number

    @staticmethod
    def write(file, data):
        """Writes a member's data, holes as such."""
        for piece in data:
            if type(piece) is int:  # a hole
                file.truncate(file.seek(piece, os.SEEK_CUR))
            else:
                while piece:  # without a buffer it may be written in part
                    piece = piece[file.write(piece):]


class LayerPack(LayerStore):
    """A LayerStore that keeps all data in one file, for making files costs most."""

    def visit(self, tar):
        path = self.path(None)
        with naming_file(path), open(path, "wb", buffering=CHUNK) as self._pack:
            super().visit(tar)

    def path(self, _number):
        """The file that holds the data, each member's where its entry says."""
        return os.path.join(self._directory, "data")

    def _keep(self, data):
        where = self._pack.tell()
        self.write(self._pack, data)
        return where


class Node:
    """An inode of the tree: its Entry as bytes, the LayerStore of its data, a
    directory's children. `kept` is the Entry itself, of an inode with hard links as
    they have made it; None of those that are looked at but a few times.
    """

    __slots__ = ("record", "store", "children", "kept")

    def __init__(self, record, store=None, children=None):
        self.record, self.store, self.children = record, store, children
        self.kept = None

    @property
    def entry(self):
        """Its Entry, made anew unless it is kept."""
        return self.kept or Entry.loads(self.record)


class Tree:
    """The file tree an image's layers make; `apply` them oldest first.

    `check` raises where work on it should not go on; `census` has counted the members;
    those of the kinds `unwanted` are left out.
    """

    def __init__(self, check=go_on, census=None, unwanted=("unknown",)):
        self.check, self._census = check, census or Census()
        self.root = Node(_IMPLICIT, children={})
        self._unwanted, self.left_out = unwanted, 0
        self._detours = 0  # steps taken behind links

    def apply(self, store):
        """Applies one layer, that of a LayerStore: whiteouts first, for they speak of
        the layers below wherever they stand.
        """
        if store.shared:  # it has been counted once
            self._census.add(len(store.records), 0, "a layer that is there again")
        # Not the parts of their paths are kept, which weigh twenty times as much.
        hidden = [record for record in store.records if _WHITEOUT in record
                  and is_whiteout(self._parts(Entry.loads(record).path))]
        own = {b"/".join(self._parts(entry.path)) for entry in map(
            Entry.loads, store.records if hidden else ()) if entry.kind == "dir"}
        for record in hidden:
            self._white_out(self._parts(Entry.loads(record).path), own)
        todo, passes = store.records, 0
        while todo:  # again, from the end, for links that stand before their targets
            late = [record for record in todo if not self._add(record, store)][::-1]
            passes += 1
            if len(late) == len(todo) or late and passes > _LINK_LIMIT:
                entry = Entry.loads(late[0])
                raise InvalidDocument("hard link %s to %s, which is not there"
                                      % (show(entry.path), show(entry.link)))
            todo = late
        for name in [n for n in self.root.children if n.startswith(_AUFS)]:
            del self.root.children[name]  # AUFS kept the data of hard links there

    def _parts(self, path):
        self.check()  # here: every member's name comes by, each time it is looked at
        return member_parts(path)

    def _white_out(self, parts, own):
        name = parts[-1]
        if name != _OPAQUE and name.startswith(_AUFS):
            return
        hidden = name[len(_WHITEOUT):]
        if hidden in (b"", b".", b".."):
            raise InvalidDocument("a whiteout of nothing: %s" % show(b"/".join(parts)))
        parent = self._directory(parts[:-1], own=own)
        if parent is not None and name != _OPAQUE:
            parent.children.pop(hidden, None)
        elif parent is not None and self._node(parts[:-1]) is parent:
            parent.children.clear()  # where a lower link leads is not meant

    def _node(self, parts):
        """The inode that `parts` name, the last of them not followed; None for none."""
        if not parts:
            return self.root
        parent = self._directory(parts[:-1])
        return parent and parent.children.get(parts[-1])

    def _directory(self, parts, make=False, own=()):
        """The directory `parts` names, None where there is none; see `lead`."""
        directory, _, left = self.lead(parts, make, own)
        return None if left else directory

    def lead(self, parts, make=False, own=()):
        """(directory, its path with a slash behind, parts left) to which `parts` lead.

        Links are followed inside the root as in a chroot. Nothing is left where a
        directory that is missing is to be made. A link that the layer replaces by a
        directory of its `own` leads nowhere.
        """
        todo = list(reversed(parts))
        trail, hops = [(self.root, b"")], 0
        while todo:
            part = todo.pop()
            self._detours += hops > 0
            if self._detours > _DETOUR_LIMIT:
                raise LimitExceeded("its links take more than %d steps to follow"
                                    % _DETOUR_LIMIT)
            if part == b"..":
                del trail[max(1, len(trail) - 1):]
                continue
            directory, above = trail[-1]
            node, path, entry = directory.children.get(part), above + part, None
            if node is not None and node.children is None:
                entry = node.kept = node.entry  # many names may lead here
            if entry and entry.kind == "symlink":
                if not hops and path in own:
                    return directory, above, [part] + todo[::-1]
                hops, target = hops + 1, entry.link
                self._detours += len(target) >> 8  # its slashes take time, too
                if hops > _LINK_LIMIT:
                    raise InvalidDocument("links in a loop at %s"
                                          % show(b"/".join(parts)))
                if target.startswith(b"/"):
                    del trail[1:]
                todo.extend(p for p in reversed(target.split(b"/")) if p not in (b"",
                                                                                b"."))
                continue
            if node is None or node.children is None:
                if not make:
                    return directory, above, [part] + todo[::-1]
                self._census.add(1, 0, show(path))
                node = directory.children[part] = Node(_IMPLICIT, children={})
            if len(path) > PATH_MAX:  # which every name below it would repeat
                raise LimitExceeded("%s: a directory whose path takes more than the "
                                    "limit of %d bytes" % (show(path), PATH_MAX))
            trail.append((node, path + b"/"))
        return (*trail[-1], [])

    def _add(self, record, store):
        """Puts a member in place; False for a hard link whose target is not there."""
        entry = Entry.loads(record)
        parts = self._parts(entry.path)
        if is_whiteout(parts):
            return True
        if entry.kind in self._unwanted:
            self.left_out += 1
            return True
        if not parts and entry.kind != "dir":
            raise InvalidDocument("unsafe member: the root as a " + entry.kind)
        parent = self._directory(parts[:-1], make=True)
        old = parent.children.get(parts[-1]) if parts else self.root
        if entry.kind == "hardlink":
            target = self._node(self._parts(entry.link))
            if target is None:
                return False
            if target.children is not None:
                raise InvalidDocument("a hard link to the directory %s"
                                      % show(entry.link))
            found = target.entry
            xattrs = found.xattrs if type(found.xattrs) is dict else dict(found.xattrs)
            xattrs.update(entry.xattrs)
            if len(xattrs) > PAX_COUNT_LIMIT:
                raise LimitExceeded("%s: over %d extended attributes"
                                    % (show(entry.path), PAX_COUNT_LIMIT))
            target.kept = found._replace(  # docker and podman: for the inode
                mode=entry.mode, uid=entry.uid, gid=entry.gid, mtime=entry.mtime,
                xattrs=xattrs)
            parent.children[parts[-1]] = target
        elif entry.kind == "dir" and old is not None and old.children is not None:
            old.record = record
        else:
            parent.children[parts[-1]] = Node(
                record, store, {} if entry.kind == "dir" else None)
        return True

    def walk(self, path=b"", node=None, last=False):
        """Yields (path, Node, the path by which the Node has come before, or None) of
        a `node` at `path` and everything below it, or below the root: by name, a
        directory first or `last`.
        """
        # Paths are made one at a time: those of a directory share what is above them.
        first, stack = {}, [(b"", path, node or self.root, last)]
        while stack:
            self.check()
            above, name, node, later = stack.pop()
            path = above + name
            if later and node.children:
                stack.append((above, name, node, False))
            elif path:
                yield path, node, b"".join(first.get(node, ())) or None
                if node.kept:
                    first.setdefault(node, (above, name))
            if node.children and later == last:
                above, below = path + b"/" if path else b"", node.children
                stack.extend([(above, name, below[name], last)
                              for name in sorted(below, reverse=True)])


def member_parts(path):
    """The names in a member's path."""
    parts = []
    for part in path.split(b"/"):
        if part == b"..":  # as umoci, docker and containerd: the root has no parent
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return tuple(parts)


def is_whiteout(parts):
    """Whether these name one, and nothing below a directory AUFS kept for itself."""
    return bool(parts) and parts[-1].startswith(_WHITEOUT) and not (
        len(parts) > 1 and parts[0].startswith(_AUFS))


def show(name):
    """A member's name for messages."""
    return repr(name.decode("utf-8", "backslashreplace"))[:200]


class TreeWriter:
    """Puts a Tree's files in place in a directory, with what rights we have.

    The data files are moved, not copied. What could not be done is counted in `undone`,
    a dict of words -> how often; if `modes`, it is an error where these cannot be set.
    """

    def __init__(self, tree, modes=True):
        self._tree, self._modes, self._root = tree, modes, os.geteuid() == 0
        self.undone = collections.Counter()
        self.at = b""  # the path of what is being made

    def write(self, directory):
        """Makes `directory` (which must not exist) the root of the tree, ours alone."""
        base = os.fsencode(directory)
        os.mkdir(base, 0o700)
        for self.at, node, first in self._tree.walk():
            path, place = self.at, base + b"/" + self.at  # join costs as much as lstat
            if os.path.lexists(place):
                raise Unsupported("%s: two names of the image are one on this file "
                                  "system" % show(path))
            entry = node.entry
            if node.children is not None:
                os.mkdir(place, 0o700)
            elif first and entry.kind != "symlink" and (  # systems differ on those
                    os.path.lexists(base + b"/" + first)):
                os.link(base + b"/" + first, place)
            elif self._make(entry, node.store, place):
                self._dress(place, entry)
            else:
                self.undone["device nodes not made"] += 1
        for self.at, node, _ in self._tree.walk(last=True):  # or they refuse children
            if node.children is not None:
                self._dress(os.path.join(base, self.at), node.entry)

    def finish(self, directory):
        """All is in its place: the root's own attributes open it to others."""
        self._dress(os.fsencode(directory), self._tree.root.entry)
        if self._tree.left_out:
            self.undone["members of unknown types left out"] = self._tree.left_out

    def _make(self, entry, store, place):
        """A file, link or device, still without its attributes; whether it was made."""
        if entry.where is not None and not store.shared:
            os.rename(store.path(entry.where), place)
        elif entry.where is not None:
            with open(store.path(entry.where), "rb") as file, open(place, "xb") as copy:
                for piece in pieces(file, check=self._tree.check):
                    copy.write(piece)
        elif entry.kind == "file":
            os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        elif entry.kind == "symlink":
            os.symlink(entry.link, place)
        elif entry.kind == "fifo":
            os.mkfifo(place, 0o600)
        elif self._root and entry.kind == "char" and entry.device in _HARMLESS_DEVICES:
            with contextlib.suppress(OSError):
                os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(*entry.device))
            return os.path.lexists(place)
        else:
            return False
        return True

    def _dress(self, place, entry):
        """Owner, then extended attributes, mode (chown takes setuid away) and times."""
        if self._root:
            self._try("owners not set", os.lchown, place, entry.uid, entry.gid)
        elif (entry.uid, entry.gid) != (os.geteuid(), os.getegid()):
            self.undone["owners not set"] += 1
        for name, value in dict(entry.xattrs).items():
            if not name.startswith(_RESTORED_XATTRS) or not hasattr(os, "setxattr"):
                self.undone["extended attributes not set"] += 1
            else:
                self._try("extended attributes not set", os.setxattr, place, name,
                          value, follow_symlinks=False)
        if entry.kind != "symlink":
            self._try("modes not set", os.chmod, place,
                      0o666 if entry.kind == "char" else entry.mode)
        self._try("times not set", os.utime, place, ns=(entry.mtime, entry.mtime),
                  follow_symlinks=False)

    def _try(self, undone, action, *args, **kwargs):
        try:
            action(*args, **kwargs)
        except (OSError, OverflowError):
            if self._modes and action is os.chmod:
                raise
            self.undone[undone] += 1


_TYPES = {kind: flag for flag, kind in _KINDS.items() if b"0" <= flag < b"7"}


def tree_tar(tree):
    """Yields a Tree of LayerPacks as one tar, as `docker export`."""
    def header(entry, name):
        return tar_header(name, entry.size, _TYPES[entry.kind], *entry[3:10])

    yield header(tree.root.entry, b"./")
    with contextlib.ExitStack() as stack:
        pack = None  # whose file is open: neighbours mostly are of one layer
        for path, node, first in tree.walk():
            entry = node.entry
            if first is not None:
                entry = entry._replace(kind="hardlink", size=0, link=first, xattrs=(),
                                       where=None)
            yield header(entry, path + b"/" * (entry.kind == "dir"))
            if entry.where is None:
                continue
            if node.store is not pack:
                stack.close()
                pack = node.store
                file = stack.enter_context(open(pack.path(None), "rb", buffering=0))
            file.seek(entry.where)
            yield from pieces(file, entry.size, tree.check)
            if file.tell() != entry.where + entry.size:
                raise OutputError(file.name, "has been tampered with")
            yield bytes(-entry.size % TAR_BLOCK)
    yield bytes(2 * TAR_BLOCK)


def tree_tar_size(tree):
    """The bytes of tree_tar at the least: holes are written as zeros."""
    size = 3 * TAR_BLOCK
    for path, node, first in tree.walk():
        entry = node.entry
        stored = entry.size if entry.where is not None and first is None else 0
        size += TAR_BLOCK + stored + -stored % TAR_BLOCK + (
            len(path) > 100 and TAR_BLOCK + len(path))  # a pax header
    return size


class RootfsOutput(Spooled):
    """The image's file system: a directory, or one flattened tar of it.

    Layers are unpacked side by side in the spool; Tree makes them one.
    """

    format = "rootfs"
    unpacks, several, partly = True, False, True

    def __init__(self, path, tag=None, stream=None):
        self._tar = stream is not None or path.lower().endswith(".tar")
        super().__init__(path, tag, stream)
        if not self._tar and os.name != "posix":
            raise Unsupported("format rootfs needs a POSIX file system",
                              "write a tar: -o FILE.tar --format rootfs")

    def _check_free(self):
        path = self.path
        if self._tar:
            super()._check_free()
        elif os.path.lexists(path) and not (
                os.path.isdir(path) and not os.path.islink(path)
                and not os.listdir(path)):
            raise OutputError(path, "is there already, and %s" % (
                "a link" if os.path.islink(path) else "not an empty directory"),
                "choose another place with -o")
        elif os.path.ismount(path) or os.path.lexists(path) and (
                os.path.samefile(path, os.curdir)):
            raise OutputError(path, "is a mount point or where you are: nothing can "
                              "take its place", "choose a new directory in it with -o")

    def accept(self, image):
        super().accept(image)
        if image.platform.os == "windows":
            raise Unsupported("%s is a windows image: its layers make no file system "
                              "here" % (image.reference,))

    def open(self, images):
        self._stores, self._census = {}, Census(self.max_files)
        super().open(images)
        self._target.truncate()
        self._clear()

    def _clear(self):
        for name in ("layers", "root"):
            remove_tree(os.path.join(self._spool, name), self.check)

    def visit(self, layer, tar):
        digest = layer.digest
        if digest not in self._stores:
            self._stores[digest] = (LayerPack if self._tar else LayerStore)(
                os.path.join(self._spool, "layers", digest.hex), self._census)
        self._stores[digest].visit(tar)

    def close(self, images):
        (self._write_tar if self._tar else self._write_directory)(self._tree(*images))
        self._end(self._tar)
        return [self.path]

    def _tree(self, image):
        tree, applied = Tree(self.check, self._census), set()
        for layer in image.layers:
            store = self._stores[layer.digest]
            store.shared = store in applied
            applied.add(store)
            with naming("layer %s" % str(layer.digest)):
                tree.apply(store)
        tree.root, _, left = tree.lead(member_parts(os.fsencode(self.below or "")))
        if left:
            raise NotFound("%s: there is no directory %s" % (
                image.reference, show(os.fsencode(self.below))))
        return tree

    def _write_directory(self, tree):
        writer = TreeWriter(tree, self.images)
        root = os.path.join(self._spool, "root")
        try:
            writer.write(root)
        except OSError as error:  # it is told where it would have come to be
            error.filename = os.path.join(self.path, os.fsdecode(writer.at))
            error.filename2 = None
            raise
        os.rename(root, self.path)  # an empty directory may be there
        writer.finish(self.path)
        sync_directory(os.path.dirname(os.path.abspath(self.path)))
        for words, count in sorted(writer.undone.items()):
            log.warning("%s: %s: %d", self.path, words, count)

    def _write_tar(self, tree):
        if self.stream is None:
            check_free(self.path, tree_tar_size(tree))
        pending = bytearray()
        for data in tree_tar(tree):  # headers are many and small
            pending.extend(data)
            if len(pending) >= CHUNK:
                self._write(bytes(pending))
                del pending[:]
        self._write(bytes(pending))

    def abandon(self):
        if self._target is not None:
            try:
                if self._ours:
                    self._clear()  # where time is up, the next run does
            finally:
                self._target.discard()
                super().abandon()


_TITLE = "org.opencontainers.image.title"  # OCI image-spec, annotations.md
_UNPACK = "io.deis.oras.content.unpack"  # ORAS: the blob is a directory, packed
_CHART_ENDINGS = {  # helm.sh/helm, pkg/registry
    "application/vnd.cncf.helm.chart.content.v1.tar+gzip": ".tgz",
    "application/vnd.cncf.helm.chart.provenance.v1.prov": ".tgz.prov"}
_ENDINGS = (  # by what is in a media type
    (r"\btar.gzip", ".tar.gz"), (r"\btar.zstd", ".tar.zst"), (r"\btar\b", ".tar"),
    ("json", ".json"), ("xml", ".xml"), ("yaml", ".yaml"), ("wasm", ".wasm"),
    ("^text/", ".txt"), ("", ""))


class FilesOutput(RootfsOutput):
    """The files of an artifact by their titles, in a directory or as one tar.

    A directory that ORAS has packed is unpacked by the rules of layers; a Helm chart
    goes by its config. All is ours, without setuid bits and extended attributes, and
    others may do what the umask says.
    """

    format = "files"
    unpacks = images = partly = False

    def accept(self, image):
        if image.platform is not None:
            raise Unsupported("%s is a container image" % (image.reference,),
                              "its files come with --format rootfs")
        self._names(image, fetched=False)  # what cannot be is told before the fetching

    def _names(self, image, fetched=True):
        """[(path, Descriptor)] of the files; raises InvalidDocument."""
        found = []
        for blob in image.manifest.layers or (image.manifest.config,):
            kind, name = blob.media_type, blob.annotations.get(_TITLE)
            if not name and kind in _CHART_ENDINGS:
                name = "chart"
                if fetched:
                    config = Document.parse(Reader(self._spool).read(
                        "blobs/" + image.manifest.config.digest.hex, DOCUMENT_LIMIT),
                        "config")
                    name = config.need("name", str) + "-" + config.need("version", str)
                name += _CHART_ENDINGS[kind]
            elif not name:
                name = "%s-%.12s" % blob.digest + next(
                    ending for word, ending in _ENDINGS if re.search(word, kind))
                if not fetched:
                    log.warning("%s: a file without name is %s", image.reference, name)
            parts = [part for part in name.split("/") if part not in ("", ".")]
            if not parts or name[0] == "/" or ".." in parts or len(name) > PATH_MAX or (
                    "\0" in name):
                raise InvalidDocument("%s: unsafe name of a file: %s" % (
                    image.reference, printable(name, 100)))
            found.append(("/".join(parts), blob))
        order = sorted(path + "/" for path, _ in found)
        for path, following in zip(order, order[1:]):
            if following.startswith(path):
                raise InvalidDocument("%s: two files of one name, or one in the other: "
                                      "%s" % (image.reference, printable(path, 100)))
        return found

    def _tree(self, image):
        tree, names = Tree(self.check, self._census), self._names(image)
        times = collections.Counter(blob.digest for _, blob in names)
        for name, blob in names:
            *above, last = name = tuple(name.encode("utf-8").split(b"/"))
            layer, = blob_layers([blob])
            path, shared = self.place(image, layer).path, times[blob.digest] > 1
            node = Node(Entry(b"", "file", blob.size, 0o644, 0, 0, 0, where=(
                0 if blob.size else None)).dumps(), types.SimpleNamespace(
                    path=lambda _number, path=path: path, shared=shared))
            if blob.annotations.get(_UNPACK, "").lower() == "true":
                node = self._directory(name, layer, path)
                self._stores[blob.digest].shared = shared
            tree._directory(above, make=True).children[last] = node
        own = (os.geteuid(), os.getegid()) if hasattr(os, "geteuid") else (0, 0)
        allowed, kept = 0o777, {}
        if not self._tar:  # as for any new file; an empty directory stays as it is
            allowed &= os.stat(make_directory(self._spool, "layers")).st_mode
            with contextlib.suppress(FileNotFoundError):
                kept[tree.root] = stat.S_IMODE(os.stat(self.path).st_mode)
        for _, node, _ in itertools.chain([(b"", tree.root, None)], tree.walk()):
            entry = node.entry
            entry = entry._replace(mode=kept.get(node, entry.mode & allowed),
                                   uid=own[0], gid=own[1], xattrs=())
            node.record, node.kept = entry.dumps(), node.kept and entry
        return tree

    def _directory(self, name, layer, path):
        """The Node of a directory in a blob; its members are called by its whole name,
        by the last part of it, or by none.
        """
        if layer.digest not in self._stores:
            unpack(Region(path, 0, layer.blob_size).pieces(), show(b"/".join(name)),
                   self.max_layer_size, lambda tar: self.visit(layer, tar),
                   check=self.check)
        # In a tar, devices would be others' to make.
        tree = Tree(self.check, self._census, ("char", "block", "unknown"))
        tree.apply(self._stores[layer.digest])
        if tree.left_out:
            log.warning("%s: devices and unknown types left out: %d",
                        show(b"/".join(name)), tree.left_out)
        found = tree._node(name), tree._node(name[-1:]), tree.root
        return next(node for node in found if node and node.children is not None)


# --------------------------------------------------------------------------------------
# 14  Keys*: public keys, and the signatures they made
# --------------------------------------------------------------------------------------
# Every number here is public: what the time it takes tells of them is no secret.

#: p, b, n, x, y of a curve y^2 = x^3 - 3x + b modulo p, of n points, a prime, too, with
#: the base (x, y): FIPS 186-4, D.1.2.3 and D.1.2.4.
_P256 = (2**256 - 2**224 + 2**192 + 2**96 - 1,
         0x5ac635d8aa3a93e7b3ebbd55769886bc651d06b0cc53b0f63bce3c3e27d2604b,
         0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551,
         0x6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296,
         0x4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5)
_P384 = (2**384 - 2**128 - 2**96 + 2**32 - 1,
         0xb3312fa7e23ee7e4988e056be3f82d19181d9c6efe814112 << 192
         | 0x0314088f5013875ac656398d8a2ed19d2a85c8edd3ec2aef,
         2**384 - 0x389cb27e0bc8d220a7e5f24db74f58851313e695333ad68d,
         0xaa87ca22be8b05378eb1c71ef320ad746e1d3b628ba79b98 << 192
         | 0x59f741e082542a385502f25dbf55296c3a545e3872760ab7,
         0x3617de4a96262c6f5d9e98bf9292dc29f8f41dbd289a147c << 192
         | 0xe9da3113b5f0b8c00a60b1ce1d7e819d7a431d7c90ea0e5f)
#: AlgorithmIdentifier of a key (RFC 5480, 3279, 8410), its DER in hex -> what it is of.
_KEY_KINDS = {
    "06072a8648ce3d020106082a8648ce3d030107": _P256,
    "06072a8648ce3d020106052b81040022": _P384,
    "06092a864886f70d0101010500": None,  # RSA
    "06072a8648ce3d020106052b81040023": "P-521", "06032b6570": "Ed25519",
}


class PublicKey(value_type("name curve numbers")):
    """A public key by the `name` of its file: `numbers` are its point on a `curve`, or
    RSA's modulus and exponent.
    """

    @classmethod
    def parse(cls, pem, name):
        """The PublicKey in the bytes `pem` (RFC 7468, 13); raises UsageError."""
        try:
            blocks = re.findall(
                "-----BEGIN ([A-Z0-9 ]+)-----\r?\n(.*?)-----END \\1-----",
                pem.decode("latin-1"), re.DOTALL)
            if [label for label, _ in blocks] != ["PUBLIC KEY"]:
                raise ValueError(" and ".join(label for label, _ in blocks) or "no PEM")
            info, = _der(_base64(re.sub("\r?\n", "", blocks[0][1])), 0x30)
            algorithm, bits = _der(info, 0x30, 0x03)
            curve = _KEY_KINDS.get(algorithm.hex(), algorithm.hex())
            if isinstance(curve, str):
                raise ValueError("a key of the kind %.40s" % curve)
            if bits[:1] != b"\0":
                raise ValueError("a key of odd bits")
            if curve:  # in its long form: SEC 1, 2.3.4
                p, b = curve[:2]
                x, y = numbers = _pair(bits[2:], p.bit_length() // 8)
                if bits[1:2] != b"\4" or max(x, y) >= p or (
                        y * y - x * x * x + 3 * x - b) % p:
                    raise ValueError("a point that is not on the curve")
            else:  # RFC 8017, A.1.1
                n, e = numbers = _pair(bits[1:])
                least, most = RSA_BITS
                if not (least <= n.bit_length() <= most and n & e & 1
                        and 1 < e < 1 << 32):
                    raise ValueError("RSA of %d bits, exponent %d" % (
                        n.bit_length(), e))
            return cls(name, curve, numbers)
        except ValueError as error:
            raise UsageError(
                "%s: expected one PEM PUBLIC KEY, ECDSA on P-256 or P-384 or RSA of %d "
                "to %d bits, got %s" % ((name,) + RSA_BITS + (error,))) from None

    def verifies(self, signature, message, jose=False):
        """Whether the bytes `signature` are this key's, of the bytes `message`.

        ECDSA's numbers come in DER (RFC 3279, 2.2.3), or, if `jose`, as they are (RFC
        7518, 3.4). RSA is PKCS #1 v1.5 with SHA-256 (RFC 8017, 8.2.2).
        """
        hashed = hashlib.sha256(message).digest()
        if self.curve:
            size = self.curve[0].bit_length() // 8
            try:
                pair = _pair(signature, size if jose else None)
            except ValueError:
                return False
            # Older cosigns took SHA-256 for P-384, too.
            return _verify(*self[1:], hashed, *pair) or size == 48 and _verify(
                *self[1:], hashlib.sha384(message).digest(), *pair)
        (n, e), size = self.numbers, len(signature)
        number = int.from_bytes(signature, "big")
        info = bytes.fromhex("3031300d060960864801650304020105000420") + hashed
        block = b"\0\1" + b"\xff" * (size - len(info) - 3) + b"\0" + info
        return size == -(-n.bit_length() // 8) and number < n and (
            pow(number, e, n) == int.from_bytes(block, "big"))


def _verify(curve, point, hashed, r, s):
    """Whether (r, s) signs a hash, no longer than n: FIPS 186-5, 6.4.2."""
    p, _, n, x, y = curve
    if not (0 < r < n and 0 < s < n):
        return False
    inverse = pow(s, n - 2, n)
    u, v = int.from_bytes(hashed, "big") * inverse % n, r * inverse % n
    base, point, total = (x, y, 1), point + (1,), (0, 1, 0)
    sums = (None, base, point, _add(curve, base, point))
    for bit in reversed(range(n.bit_length())):
        total = _add(curve, total, total)
        which = (u >> bit & 1) + 2 * (v >> bit & 1)
        total = _add(curve, total, sums[which]) if which else total
    # 1 / Z by Fermat; of infinity that is 0, and so no r.
    return total[0] * pow(total[2], p - 2, p) % p % n == r


def _add(curve, one, other):
    """The sum of any two points (X, Y, Z): x = X / Z, y = Y / Z; infinity is (0, 1, 0).

    Renes, Costello, Batina: Complete addition formulas for prime order curves, (1).
    """
    (x1, y1, z1), (x2, y2, z2), (p, b) = one, other, curve[:2]
    xx, yy, zz = x1 * x2 % p, y1 * y2 % p, z1 * z2 % p
    xy, xz, yz = x1 * y2 + x2 * y1, (x1 * z2 + x2 * z1) % p, y1 * z2 + y2 * z1
    t, u, v = 3 * (b * zz - xz) % p, 3 * (b * xz - xx - 3 * zz) % p, 3 * (xx - zz)
    return ((xy * (yy - t) - yz * u) % p, (v * u + (yy + t) * (yy - t)) % p,
            (yz * (yy + t) + v * xy) % p)


def _base64(text):
    """The bytes of a base64 text, the only one there is for them; raises ValueError."""
    with contextlib.suppress(ValueError):
        data = base64.b64decode(text.encode("ascii"))
        if base64.b64encode(data).decode("ascii") == text:
            return data
    raise ValueError("what is not base64")


def _der(data, *tags):
    """The contents of the values of these tags that `data` is in DER (X.690, 10.1)."""
    found = []
    for tag in tags:
        size, start = int.from_bytes(data[1:2], "big"), 2
        short = size < 0x80
        if not short:
            start += size & 0x7f
            size = int.from_bytes(data[2:start], "big")
        if data[:1] != bytes([tag]) or len(data) < start + size or not (
                short or size >= 0x80 and data[2]):  # in as few bytes as will do
            raise ValueError("what is not DER")
        found.append(data[start:start + size])
        data = data[start + size:]
    if data:
        raise ValueError("more than DER")
    return found


def _pair(data, size=None):
    """The two numbers, of `size` bytes or, none negative, a SEQUENCE in DER."""
    one, two = (data[:size], data[size:]) if size else _der(*_der(data, 0x30), 2, 2)
    x, y = int.from_bytes(one, "big"), int.from_bytes(two, "big")
    if (len(one), len(two)) != ((size, size) if size else (
            x.bit_length() // 8 + 1, y.bit_length() // 8 + 1)):
        raise ValueError("what is not two numbers of %s bytes" % (size or "as few"))
    return x, y


def _maker(keys, made, jose=False):
    """Which key made one of the (signature, message) pairs, or VerificationError."""
    for signature, message in made:
        for key in keys:
            if key.verifies(signature, message, jose):
                return key
    raise VerificationError("by none of the keys")


def _libtrust(keys, _layer, raw):
    """(key, digests signed, the name given or None) of a schema1 manifest: libtrust."""
    payload = PrettySignature.parse(raw).payload
    signed = b"." + base64.urlsafe_b64encode(payload).rstrip(b"=")
    made = ((entry.base64url("signature"),
             entry.need("protected", str).encode("utf-8") + signed)
            for entry in Document.parse(raw, "manifest").children(
                "signatures", SIGNATURE_COUNT_LIMIT))
    return _maker(keys, made, jose=True), [str(Digest.of(payload))], None


def _simple_signing(keys, layer, raw):
    """As _libtrust, cosign to 2: containers/image, containers-signature.5.md."""
    signature = _base64(re.sub(  # `cosign attach signature` takes what `base64` writes
        "\r?\n", "", layer.annotations.get(SIGNATURE_ANNOTATION, "")))
    key = _maker(keys, [(signature, raw)])
    critical = Document.parse(raw, "payload").need("critical", dict)
    if set(critical.value) != {"identity", "image", "type"} or (
            critical.need("type", str) != "cosign container image signature"):
        raise VerificationError("by %s, but it signs no image" % key.name)
    return (key, [str(critical.need("image", dict).digest("docker-manifest-digest"))],
            critical.need("identity", dict).need("docker-reference", str))


def _bundle(keys, _layer, raw):
    """As _libtrust, cosign from 3: DSSE (protocol.md) around an in-toto statement."""
    envelope = Document.parse(raw, "bundle").need("dsseEnvelope", dict)
    kind = envelope.need("payloadType", str).encode("utf-8")
    payload = _base64(envelope.need("payload", str))
    key = _maker(keys, [
        (_base64(entry.need("sig", str)),
         b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload))
        for entry in envelope.children("signatures", 1)])  # sigstore_bundle.proto
    statement = Document.parse(payload, "statement")
    if (kind, statement.need("_type", str), statement.need("predicateType", str)) != (
            b"application/vnd.in-toto+json", "https://in-toto.io/Statement/v1",
            "https://sigstore.dev/cosign/sign/v1"):
        raise VerificationError("by %s, but it signs no image" % key.name)
    return key, ["sha256:%s" % subject.need("digest", dict).get("sha256", str)
                 for subject in statement.children("subject", INDEX_COUNT_LIMIT)], None


#: Media type of a layer (or manifest) -> what reads the signatures that it holds.
SIGNATURE_FORMS = {DOCKER_SCHEMA1_SIGNED: _libtrust, SIMPLE_SIGNING: _simple_signing,
                   SIGSTORE_BUNDLE: _bundle}


def signer(keys, digest, layer, raw, name=None):
    """Which of the PublicKeys signed a Digest, by what a layer's blob `raw` holds.

    For `name` see SignedBy. Raises VerificationError, InvalidDocument: why not.
    """
    try:
        key, signed, reference = SIGNATURE_FORMS[layer.media_type](keys, layer, raw)
        if str(digest) not in signed:
            raise VerificationError("by %s, but of %s" % (
                key.name, ", ".join(signed) or "no image"))
        if name is not None and reference is None:
            raise VerificationError("by %s, but it names no image" % key.name)
        if name is not None and Reference.parse(reference).name != name:
            raise VerificationError("by %s, but as %s" % (key.name, reference))
    except ValueError as error:
        raise InvalidDocument("malformed: %s" % error) from None
    return key


class SignedBy:
    """The rule that an image is taken only if one of some keys has signed it.

    `paths` are files with public keys, any of which will do; `name` is the
    HOST/REPOSITORY that must be signed, too, None: any. Raises UsageError.
    """

    def __init__(self, paths, name=None):
        self._keys = []
        self._name = None if name is None else Reference.parse(str(name)).name
        if re.search("@|:[^/]*$", str(name or "")):
            raise UsageError("--verify-name %s: expected HOST/REPOSITORY, without a tag"
                             % printable(name, 100))
        for path in paths:
            try:
                with open(path, "rb") as file:
                    self._keys.append(PublicKey.parse(file.read(KEY_LIMIT), str(path)))
            except OSError as error:
                raise UsageError("the public key '%s' cannot be read: %s" % (
                    path, error.strerror), "it is named by --verify-key or in "
                    "IMAGEC_VERIFY_KEY") from None

    def prove(self, what, documents, place):
        """(name of the key, Digest, Descriptor of the signature) of each that will do.

        `documents` are what a name stands for and what leads from there down to an
        image. One of them must be signed: in what refers to it in `place`, a Source or
        the like; schema1 may be in itself, and then the Descriptor is None. Raises
        VerificationError where none is.
        """
        good, bad = [], collections.Counter()
        for document, entry, layer in itertools.islice(
                self._signatures(documents, place), SIGNATURE_COUNT_LIMIT):
            try:
                raw = place.blob(layer) if entry else document.raw
                if raw is None:
                    raise VerificationError("of which the registry has no bytes")
                key = signer(self._keys, document.digest, layer, raw, self._name)
                good.append((key.name, document.digest, entry))
                log.info("%s: signed by %s: %s", what, key.name, str(document.digest))
            except (VerificationError, InvalidDocument) as error:
                bad[str(error)] += 1
        if not good:
            raise VerificationError("%s: expected a signature by %s%s, found %s%s" % (
                what, " or ".join(key.name for key in self._keys),
                " of %s" % self._name * bool(self._name), "; ".join(
                    "%d %s" % (count, why) for why, count in bad.items()) or "none",
                "; no more are looked at" * (
                    sum(bad.values()) == SIGNATURE_COUNT_LIMIT)))
        return tuple(good)

    @staticmethod
    def _signatures(documents, place):
        """Yields (document, Descriptor of a signature's manifest, its layer)."""
        leading = set()
        for one in reversed(documents):
            if leading and leading.isdisjoint(
                    entry.digest for entry in getattr(one, "manifests", ())):
                continue  # who signed this did not sign what leads to the image
            leading.add(one.digest)
            if isinstance(one, Schema1Manifest) and one.media_type in SIGNATURE_FORMS:
                yield one, None, one
            for tag, entries in place.referrers(one.digest).items():
                entries = [entry for entry in entries if tag != one.digest.tag
                           or entry.artifact_type in (SIGSTORE_BUNDLE, OCI_EMPTY)]
                for entry in entries[:SIGNATURE_COUNT_LIMIT]:
                    found = place.document(entry)
                    # An image that has one among its layers would be kept, unsigned.
                    for layer in getattr(found, "artifact_type", "") and found.layers:
                        if layer.media_type in (SIMPLE_SIGNING, SIGSTORE_BUNDLE):
                            yield one, entry, layer


# --------------------------------------------------------------------------------------
# 15  Pull: the steps from a reference to an output
# --------------------------------------------------------------------------------------

#: What a directory has that a pull has made, as glob takes it -> its format.
LAYOUT_MARKS = {"http/*/v2": "layers", "https/*/v2": "layers", "oci-layout": "oci"}
LEFT_OUT = "left out, for %s lacks it: %s, of type %s"
#: Parameter of a Session -> the rule that an image must keep before it is fetched.
CHECKS = {"verify_keys": SignedBy}
OUTPUTS = {output.format: output for output in (
    LayersOutput, OCIOutput, ArchiveOutput, RootfsOutput, FilesOutput)}


class Session(contextlib.AbstractContextManager):
    """The registries one command talks to, and how; for a `with`, and one thread.

    `username` and `password` are for the registry of the first reference asked for, and
    no other; without them the Keyring's sources are asked, unless `no_creds`. Times are
    in seconds. `mirrors` are `HOST[:PORT][/PREFIX]` texts, tried in order before each
    registry. `storage_hosts` and `token_hosts` are `HOST[:PORT]` texts or URLs, for any
    port where they have none; the insecure options are for one registry, its mirrors
    and these. `recompress` is None or "gzip", to rewrite zstd layers: manifest and
    digests follow; `referrers`: what refers to an image comes along; `keep_going`: an
    image that fails does not end a pull, `failures` has it; layers that the references
    or paths `without` have are left out; `below` is the directory to be the root.
    Only what a key in the files `verify_keys` signed is taken (None: those named in
    IMAGEC_VERIFY_KEY; (): anything), as `verify_name` if that is not None. A layer may
    have `max_layer_size` bytes, `notify(Event)` hears of progress. For `token_hosts`,
    `insecure_allow_http` see Endpoint, for `authfile` Keyring, for others Transport.
    """

    def __init__(
            self, username: str = None, password: str = None, timeout: float = None,
            idle_timeout: float = IDLE_TIMEOUT, insecure_skip_verify: bool = False,
            insecure_allow_http: bool = False, cacert: str = None,
            client_pair: tuple = None, proxy: str = None, token_hosts: list = (),
            authfile: str = None, no_creds: bool = False, mirrors: list = (),
            jobs: int = JOBS, max_layer_size: int = LAYER_SIZE_LIMIT,
            max_files: int = MEMBER_COUNT_LIMIT, recompress: str = None,
            notify: collections.abc.Callable = None, storage_hosts: list = (),
            referrers: bool = False, verify_keys: list = None, verify_name: str = None,
            keep_going: bool = False, without: list = (), below: str = None):
        if (username is None) != (password is None):
            raise UsageError("a user name and a password go together")
        for what, limit in (("timeout", 1 if timeout is None else timeout),
                            ("max_layer_size", max_layer_size),
                            ("max_files", max_files), ("jobs", jobs)):
            if not limit > 0:  # nor NaN
                raise UsageError("%s %s: a limit must be over 0" % (what, limit))
        if str in map(type, (mirrors, token_hosts, storage_hosts, without)):
            raise UsageError("expected lists, not texts: mirrors, hosts, without")
        token_hosts, storage_hosts = map(_authorities, (token_hosts, storage_hosts))
        if recompress not in (None, "gzip"):
            raise UsageError("cannot recompress to %r: only to gzip" % recompress)
        #: The Credentials of the command line, None for none.
        self.given = None if username is None else Credentials(
            username, password, source="the command line")
        self._mirrors = [split_place(mirror, "mirror") for mirror in mirrors]
        self.transport = Transport(timeout, idle_timeout, insecure_skip_verify, cacert,
                                   client_pair, proxy, storage_hosts=storage_hosts)
        self._keyring = Keyring(
            self.given, authfile, no_creds, self.transport.check,
            "--insecure-skip-verify is for one registry" if insecure_skip_verify
            else insecure_allow_http and "--insecure-allow-http is for one registry")
        self._mirror_keyring = Keyring(None, authfile, no_creds, self.transport.check)
        for host in token_hosts + storage_hosts:
            self.transport.tls.name(host, insecure_allow_http, registry=False)
        self._allow_http, self._token_hosts = insecure_allow_http, token_hosts
        self.jobs, self.recompress, self.referrers = jobs, recompress, referrers
        self.without, self.below = without, below
        #: (text, error) pairs of what failed where the rest goes on, else None.
        self.failures = [] if keep_going else None
        self.max_layer_size, self.max_files = max_layer_size, max_files
        self.notify = lambda event: notify and notify(event._replace(
            status=SECRETS.hide(event.status), id=SECRETS.hide(event.id)))
        self._registries, self._sources = {}, {}
        #: What each image must be, see SignedBy; None: anything.
        self.rule = _rule(verify_keys, verify_name)

    def __exit__(self, *_exc):
        self.transport.close()

    @contextlib.contextmanager
    def trying(self, what):
        """An error inside, but of standard output, is one of `failures` if not None."""
        try:
            yield
        except (ImagecError, OSError) as error:
            if self.failures is None or getattr(error, "filename", what) is None:
                raise
            self.failures.append((str(what), error))

    def registry(self, host, namespace=None, kind=Registry):
        """The Registry at the API host `host`; where it is a mirror, of `namespace`."""
        if (host, namespace, kind) not in self._registries:
            self._registries[host, namespace, kind] = kind(
                host, self.transport,
                self._mirror_keyring if namespace else self._keyring,
                self._allow_http, self._token_hosts, namespace)
        return self._registries[host, namespace, kind]

    def credentials(self, reference: Reference) -> "Credentials | None":
        """The Credentials that would be used for a Reference, None for none."""
        return self._keyring.lookup(reference.host, reference.repository)

    def source(self, reference):
        """The Source of a reference's repository."""
        if reference.name not in self._sources:
            self._keyring.claim(reference.host)
            places = [
                (self.registry(host, reference.host), prefix + reference.repository)
                for host, prefix in self._mirrors]
            home = (self.registry(reference.api_host), reference.repository)
            self._sources[reference.name] = Source(places + [home])
        return self._sources[reference.name]

    def manifest(self, reference: Reference, held=()):
        """What `reference` names, decoded: a Manifest, Index or Schema1Manifest.

        `held` are documents there are already; where the first of them is still what
        the name stands for, it is not fetched again.
        """
        source = self.source(reference)
        if held:
            # Where the short way does not work, the long one tells why.
            with contextlib.suppress(RegistryError, InvalidDocument, VerificationError):
                digest = reference.digest or source.ask(
                    Registry.head_manifest, reference.tag)[0]
                if digest and decode_manifest(held[0], None, digest):  # sha512, too
                    return decode_manifest(held[0], None, reference.digest)
        return source.manifest(reference)

    def resolve(self, reference: Reference, platform=None, held=(), top=None) -> Image:
        """The Image of `reference` for `platform` (None: this host's; "all").

        "all" takes what is no index as it is. For `held` see manifest; `top` is what
        that gave, if known. Raises NoMatchingPlatform, Unsupported, as fetch_manifest.
        """
        if top is None:
            return self.trusting(reference, held, lambda top: self.resolve(
                reference, platform, held, top))

        def config_of(pointer):
            what, raw = "config " + str(pointer.digest), _held(pointer, held)
            if raw is None:
                raw, _ = source.ask(Registry.fetch_blob, pointer, what)
            return ImageConfig.parse(raw, what)

        def fetch(entry):
            if entry.media_type in MANIFEST_SHAPES:
                entry.digest.require_known()
                raw = _held(entry, held)
                if raw is not None:
                    return decode_manifest(raw, None, entry.digest)
                return source.ask(Registry.fetch_manifest, entry.digest, entry.size)[0]
            blob = entry.digest.algorithm in _DIGEST_LENGTHS and source.seek(
                Registry.open_blob, entry)
            if blob:
                blob.discard()
                others.append(entry)
            else:
                log.warning(LEFT_OUT, source.host, str(entry.digest),
                            printable(entry.media_type, 80))
            return None

        source, others = self.source(reference), []  # these are no manifests
        with naming(str(reference._replace(host=source.host))):
            image = image_of(reference, source.registry_url, top, platform, fetch,
                             config_of)
        wanted = platform or Platform.host()
        if image.platform and wanted != "all" and not wanted.runs(image.platform):
            log.error("warning: %s is for %s, not for %s",  # with -q, too
                      reference, image.platform, wanted)
        return image._replace(
            layers=image.layers + blob_layers(others),
            signed=self.prove(reference, image.indexes + (image.manifest,)))

    def prove(self, reference, documents):
        """What proves these to be signed, see SignedBy.prove; () if nothing has to."""
        return () if self.rule is None else self.rule.prove(
            reference, documents, self.source(reference))

    def trusting(self, reference, held, action):
        """What action(document), which proves it, gives for what `manifest` gives.

        A mirror is left where that fails: it may have another than is meant.
        """
        return self.source(reference).trusting(
            lambda: self.manifest(reference, held), action)

    def referring(self, images):
        """The Images of what refers to these, and to that again, each by its tag.

        What goes by the tag of a digest is an index made here; see Source.referrers.
        Raises LimitExceeded, and what Registry.fetch_manifest raises.
        """
        only = None if self.referrers else [
            entry.digest for image in images for *_, entry in image.signed if entry]
        return list({(one.reference, one.subject): one for found in in_parallel(self, [
            (image.reference, lambda image=image: self._referring_all(image, only))
            for image in images]) for one in found or ()}.values())

    def _referring_all(self, image, only):
        found, raws, seen = [image], [], set()
        for above, one in ((above, one) for above in found  # it grows
                           for one in (*above.indexes, above.manifest, *above.below)):
            if one.digest in seen:
                continue
            seen.add(one.digest)
            for more in self._referring(above, one.digest, only):
                found.append(more)
                raws += [raw for _, raw in more.documents]
                if len(raws) > DOCUMENT_COUNT_LIMIT or (
                        sum(map(len, raws)) > DOCUMENT_BYTES_LIMIT):
                    raise LimitExceeded("too much refers to %s" % (image.reference,))
        return found[1:]

    def _referring(self, above, digest, only):
        """Yields the Images of what refers to a document of the Image `above`."""
        def fetch(entry):
            one = entry.media_type in MANIFEST_SHAPES and source.document(entry)
            if isinstance(one, (Manifest, Index)):
                return one
            log.warning(LEFT_OUT, source.host, str(entry.digest),
                        printable(entry.media_type, 80))
            return None  # schema1 is in no layout

        source = self.source(above.reference)
        for tag, entries in source.referrers(digest).items():
            entries = [one for one in entries if only is None or one.digest in only]
            found = {one.digest: one for *_, one in walk(fetch, entries)}
            listed = [entry for entry in entries if entry.digest in found]
            if listed:
                top = found[listed[0].digest] if tag != digest.tag else made_index(
                    [entry.as_json() for entry in listed])
                yield image_of(
                    above.reference._replace(tag=tag, digest=None), above.registry_url,
                    top, "all", lambda entry: found.get(entry.digest)
                )._replace(subject=digest)

    def pull(self, references: list, output: "str | os.PathLike | Output",
             platform: "Platform | str | list | None" = None, format: str = None,
             tag: "Reference | str | None" = None) -> list:
        """Pulls `references` into one `output`; gives their Images. See pull."""
        if isinstance(references, (str, Reference)):
            raise UsageError("expected a list of references, not one")
        if not isinstance(output, Output):
            output = new_output(output, format, tag)
        return Puller(self, output).pull(
            [Reference.parse(str(one)) for one in references],
            None if platform is None else parse_platform(platform))


class Puller:
    """One pull of a Session into an Output."""

    def __init__(self, session, output):
        self._session, self._output = session, output
        # No longer than the command may take.
        output.wait, output.check = session.transport.wait, session.transport.check
        output.max_files, output.recompress = session.max_files, session.recompress
        output.max_layer_size, output.below = session.max_layer_size, session.below
        self._earlier = len(session.failures or ())  # failures, of pulls before it
        self._busy = set()  # digests of layers that are being fetched

    def pull(self, references, platform):
        """The Images; see Session.pull."""
        output = self._output
        # 1. What are they? A name that is wrong is told before anything is fetched.
        images = self.resolve(references, platform)
        # 2. Is there room for what is still to fetch?
        if output.stream is None:
            sizes = [0] + [size for size, _ in self.plan(images)]
            # One is on its way from the spool.
            check_free(output.path, sum(sizes) + max(sizes) * output.streams)
        try:
            # 3. A place for them, and into it their layers, each proved.
            images, fetched = self._fetch_all(images)
            if not images:
                return []
            # 4. Only now there is a config for what came without.
            modern = [_modernised(*one) for one in zip(images, fetched)]
            # 5. What makes them images to others.
            paths = output.close(images if output.verbatim else modern)
        except BaseException:
            output.abandon()
            raise
        return [after._replace(layers=tuple(
            layer._replace(blob=one.blob, **one.unpacked._asdict() if one.unpacked
                           else {}) for layer, one in zip(image.layers, layers)),
            format=output.format, path=path) for image, layers, after, path in zip(
                images, fetched, modern, paths) if image.subject is None]

    def resolve(self, references, platform):
        """The Images of the references as the output holds them; raises UsageError."""
        session, output = self._session, self._output
        several = isinstance(platform, list)
        for option, given, taken, formats in (
                ("--platform all", platform == "all", output.platforms, "oci"),
                ("more than one --platform", several, output.layout, "oci or archive"),
                ("--referrers", session.referrers, output.layout, "oci or archive"),
                ("--recompress", session.recompress, output.layout, "oci or archive"),
                ("--without", session.without, output.layout, "oci or archive"),
                ("--path", session.below is not None, output.partly, "rootfs")):
            if given and not taken:
                raise UsageError("%s does not go with --format %s"
                                 % (option, output.format), "add --format " + formats)
        if session.recompress and (
                session.referrers or session.without or output.platforms and (
                    several or platform == "all")):
            raise UsageError("--recompress makes another image: no index leads to it, "
                             "nothing refers to it, and nothing of it is elsewhere")
        if len(references) > 1 and not output.several:
            raise UsageError("format %s takes one image at a time" % output.format)
        for reference in references:  # in their order: the first has the password
            with session.trying(reference):
                session.source(reference)
        images = [image for found in in_parallel(session, [
            (reference, lambda reference=reference: self._resolve(reference, platform))
            for reference in references]) for image in found or ()]
        for image in images:
            name = output.layout and output.name_of(image)
            if name and name.host.startswith("["):
                log.warning("docker, podman and skopeo may not take the name %s, for "
                            "its IPv6 address: --tag gives another", str(name))
        if session.referrers or output.layout and not session.recompress and any(
                image.signed for image in images):
            along = session.referring(images)
            images = self._spared(images)
            log.info("along comes what refers to that: manifests: %d",
                     sum(len(image.below) or 1 for image in along))
            images += along
        if session.without:
            images = self._lessened(images, platform)
        return images if output.verbatim else [image._replace(layers=tuple(
            layer for layer in image.layers if not layer.throwaway))
            for image in images]

    def _lessened(self, images, platform):
        """`images` less the layers that are elsewhere: in what `without` names."""
        session, bases = self._session, []
        for text in session.without:
            if is_path(str(text)):
                path, output = os.path.expanduser(text), self._output
                bases += [list(found.has(document)) for found in stored_at(
                    path, session.transport.check) for document in found.documents]
                if output.streams and os.path.exists(output.path) and (
                        os.path.samefile(path, output.path)):
                    raise OutputError(path, "is what the update builds on",
                                      "choose another name with -o")
            else:
                bases += [[layer.digest for layer in document.layers] for one in (
                    self._images_of(Reference.parse(str(text)), platform))
                    for document in (one.manifest, *one.below)
                    if isinstance(document, Manifest)]
        configs = {one.config.digest for image in images for one in (
            image.manifest, *image.below) if isinstance(one, Manifest)}
        images = [image if isinstance(image.manifest, Schema1Manifest) else
                  image._replace(without=tuple(
                      digest for digest in self._output.elsewhere(image, bases)
                      if digest not in configs)) for image in images]
        for image in images:
            left = [layer.blob for layer in image.layers
                    if layer.digest in image.without]
            log.info("%s: layers left out, for they are elsewhere: %d of %d, bytes: %d",
                     image.reference, len(left), len(image.layers),
                     sum(blob.size for blob in distinct(left, "it").values()))
        return images

    def _resolve(self, reference, platform):
        """The Images of a reference, which the output takes."""
        images = self._images_of(reference, platform)
        for image in images:
            self._output.accept(image)
        return images

    def _images_of(self, reference, platform):
        session, output = self._session, self._output
        held = () if platform == "all" else output.held(
            reference, session.source(reference).registry_url)
        if not isinstance(platform, list):
            return [session.resolve(reference, platform, held)]

        def of_each(top):
            found = [session.resolve(reference, one, held, top) for one in (
                platform if isinstance(top, Index) else ["all"])]
            own = found[0].config and found[0].config.platform
            if not isinstance(top, Index) and own and own.architecture and not any(
                    one.runs(own) for one in platform):
                raise NoMatchingPlatform(platform[0], [own])
            return found

        images = session.trusting(reference, held, of_each)
        images = list({image.manifest.digest: image for image in images}.values())
        if len(images) > 1 and output.platforms:
            return [joined(images)]
        host = Platform.host().candidates()
        named = next((one for one in images if one.platform in host), images[0])
        for image in images:
            if image is not named:
                log.info("%s is the one for %s; the one for %s has its ID only, %s",
                         output.name_of(named) or reference, named.platform,
                         image.platform, image.image_id)
        return [image._replace(named=image is named) for image in images]

    def plan(self, images):
        """(bytes to fetch, bytes that are there) of each blob, each once."""
        output, sizes = self._output, {}
        output.find(images)
        for image, layer in ((one, layer) for one in images for layer in one.wanted):
            if layer.digest not in sizes:
                size = layer.blob.size or 0
                there = min(size, output.place(image, layer).there())
                sizes[layer.digest] = size - there, there
        return sizes.values()

    def _fetch_all(self, images):
        """(images, the Fetched of each one's layers), but for images that failed.

        They must not fail where they are to be a stream: there is no beginning again.
        """
        output = self._output
        while images:
            output.open(images)
            fetched = self._fetch(images, output.stream is None)
            if None not in fetched:
                return images, fetched
            output.abandon()  # it has no place for what did not come
            images = self._spared(images)
        return [], []

    def _spared(self, images):
        """Those of `images` that have not failed here, nor refer to one that has."""
        kept, there = [], {None}
        failed = dict((self._session.failures or [])[self._earlier:])
        for image in images:  # what refers to another comes behind it
            if str(image.reference) not in failed and image.subject in there:
                kept.append(image)
                there.update(digest for digest, _ in image.documents)
        return kept

    def _fetch(self, images, forgiving):
        """The Fetched of each layer of each of these Images; None for one that failed.

        Each blob comes once, whichever image it is of.
        """
        notify, wanted = self._session.notify, {}
        for image in images:
            notify(Event("Pulling from " + image.reference.repository,
                         image.reference.tag_or_digest))
        for image in images:
            # The largest first, for they decide when we are done.
            for layer in sorted(image.wanted,
                                key=lambda layer: -(layer.blob.size or 0)):
                if layer.digest not in wanted:
                    notify(Event("Pulling fs layer", layer.digest.hex[:12], None,
                                 layer.blob_size))
                wanted.setdefault(layer.digest, []).append((image, layer))
        for pairs in wanted.values():  # first who knows what it unpacks to
            pairs.sort(key=lambda pair: pair[1].diff_id is None)
        done = dict(zip(wanted, in_parallel(self._session, [
            (pairs[0][0].reference, lambda pairs=pairs: self._fetch_layer(pairs))
            for pairs in wanted.values()], forgiving)))
        return in_parallel(self._session, [
            (image.reference, lambda image=image: gathered(image, done, notify))
            for image in images], forgiving)

    def _fetch_layer(self, pairs):
        """The blob of these (Image, Layer) pairs, into its place: its Fetched."""
        session, output, (image, layer) = self._session, self._output, pairs[0]
        place = output.place(image, layer)
        look = functools.partial(
            unpack, limit=session.max_layer_size, diff_id=layer.diff_id,
            visit=lambda tar: output.visit(layer, tar), check=session.transport.check)

        def rewrite(fetched):
            # By its own name another layer may be there, and be moved on just now.
            return recompress(
                fetched, place.path + ".gzip", None if output.streams else (
                    lambda blob: output.place(image, layer._replace(blob=blob)).path),
                output.wait, output.check) if rewrites else fetched

        # An artifact's have no id; of schema1 only unpacking tells the diffID.
        rewrites = all(one.id for _, one in pairs) and session.recompress
        unpacks = output.unpacks or rewrites or any(
            one.id and one.diff_id is None for _, one in pairs)
        self._busy.add(layer.digest)
        try:
            fetched = Download(
                session.source(image.reference), layer.blob, place,
                look if unpacks else None, session.notify, not output.streams,
                lambda: session.jobs // len(self._busy), rewrite).run()
        finally:
            self._busy.discard(layer.digest)
        with fetched.region.open() as file:
            zstd = codec_of(file) == "zstd"
        if zstd and layer.id and output.format == "archive":
            log.warning("layer %s is compressed with zstd, which Docker before 23.0 "
                        "cannot load; --recompress gzip rewrites it", str(layer.digest))
        output.add(layer, fetched)
        return fetched


def gathered(image, done, notify):
    """The Fetched of an Image's layers, of what is `done`; None if any is not.

    Raises VerificationError where another image knew a blob by other facts.
    """
    fetched = [Fetched(layer.blob, None, None)
               if layer.digest in image.without else done[layer.digest]
               for layer in image.layers]
    if None in fetched:
        return None
    for number, (layer, one) in enumerate(zip(image.layers, fetched)):
        if one.unpacked and layer.diff_id not in (None, one.unpacked.diff_id):
            raise DigestMismatch("layer %s" % str(layer.digest), layer.diff_id,
                                 one.unpacked.diff_id)
        if one.blob.digest == layer.digest:
            if layer.blob.size not in (None, one.blob.size):
                raise SizeMismatch("layer %s" % str(layer.digest), layer.blob.size,
                                   one.blob.size)
            fetched[number] = one._replace(
                blob=layer.blob._replace(size=one.blob.size))
    notify(Event("Digest: %s" % str(image.digest)))
    return fetched


def in_parallel(session, actions, forgiving=True):
    """The results of (what it is for, action) pairs, in order.

    The first error ends the others and comes out; if `forgiving` and the Session keeps
    going, it only ends those for the same thing, whose results are None.
    """
    results, failed = [None] * len(actions), {}
    forgiving = forgiving and session.failures is not None
    todo = enumerate(actions)  # of which each thread draws

    def work():
        for number, (what, action) in todo:
            try:
                if what not in failed:
                    results[number] = action()
            except (ImagecError, OSError) as error:
                if not forgiving:
                    raise
                failed.setdefault(what, error)

    _in_threads(work, todo, min(session.jobs, len(actions)), session.transport)
    for what, _ in actions if failed else ():
        if what in failed:
            session.failures.append((str(what), failed.pop(what)))
    return results


def _in_threads(work, todo, count, transport):
    """Has `count` threads do `work()`, which draws `todo` to its end."""
    threads, ended, errors = [], threading.Semaphore(0), []

    def run():
        try:
            work()
        except BaseException as error:  # carried to who waits
            errors.append(error)
        ended.release()

    # What a signal raised inside of threading could leave its locks held for ever.
    transport.watched = True
    try:
        with contextlib.suppress(OSError):  # no more are to be had
            for _ in range(count):
                threads.append(begin(run))
        if not threads:
            work()
        for _ in threads:  # in short waits: a signal may come to another thread
            while not ended.acquire(timeout=CANCEL_NOTICED):
                transport.check()
            if errors:
                break
    finally:  # nothing is left to cancel where all went well
        transport.cancelled.set()
        drain(todo)
        for thread in threads:
            thread.join()
        transport.cancelled.clear()
        transport.watched = False
    if transport.stop is not None:  # it came after the last look
        raise transport.stop
    if errors:
        raise min(errors, key=lambda error: isinstance(error, Cancelled))


def _rule(keys, name):
    if keys is None and "IMAGEC_VERIFY_KEY" in os.environ:
        keys = os.environ["IMAGEC_VERIFY_KEY"].split(os.pathsep)
    keys = [keys] if isinstance(keys, (str, os.PathLike)) else keys
    if name is not None and not keys:
        raise UsageError("--verify-name, but no key", "add --verify-key")
    return CHECKS["verify_keys"](keys, name) if keys else None


def _authorities(hosts):
    """HOST[:PORT] of each of these texts and URLs; raises UsageError."""
    hosts = [re.sub("(?is)^https?://([^/?#]*).*", r"\1", host) for host in hosts]
    if not all(map(_AUTHORITY.fullmatch, hosts)):
        raise UsageError("a token or storage host is not HOST[:PORT] or a URL")
    return hosts


def split_place(text, what):
    """(host, path prefix) of `HOST[:PORT][/PREFIX]`; raises UsageError."""
    host, _, prefix = re.sub("^https?://", "", text).rstrip("/").partition("/")
    if not re.fullmatch(_HOST, host) or prefix and not re.fullmatch(_REPOSITORY,
                                                                    prefix):
        raise UsageError("not a %s: %s" % (what, shown(text, 100)),
                         "expected HOST[:PORT][/PREFIX]" + (
                             " and --tag NAME[:TAG]" * (what == "registry")))
    return host, prefix + "/" if prefix else ""


class Stock:
    """What a pull has written to a place, all of it read, and asked as a Source is.

    `names` has the Stored, with lists of documents, and the digest of a tree's last.
    """

    def __init__(self, reader, noting=lenient):
        self.reader, self.names = reader, []
        self.drawn = {}  # digest -> (the document of that, the Stored it is of)
        # Tag of a digest -> see `referrers`
        self._referring = collections.defaultdict(lambda: collections.defaultdict(list))
        for found in stored(reader, noting):
            documents = list(found.documents)
            found = found._replace(documents=documents, digest=found.digest or (
                documents or [found])[-1].digest)
            self.names.append(found)
            self.drawn.update((one.digest, (one, found)) for one in documents)
            tag = str(found.name or found.tag).rpartition(":")[2]
            for one in documents:
                about = {one.subject.tag: one.subject.tag} if one.subject else {}
                if one.digest == found.digest and "." in tag:  # cosign's
                    about[tag.partition(".")[0]] = tag
                for whose, name in about.items():
                    self._referring[whose][name].append(
                        Descriptor.of(one, artifact_type=one.artifact_type))

    def referrers(self, digest):
        """See Source.referrers."""
        return self._referring.get(digest.tag, {})

    def document(self, entry):
        """What a Descriptor leads to, decoded; None where it is not there."""
        return self.drawn.get(entry.digest, (None,))[0]

    def blob(self, descriptor):
        """The bytes a Descriptor points to, checked."""
        raw = self.reader.read(blob_name(descriptor.digest))
        descriptor.digest.check(raw, "blob")
        return raw


def picked(path, names, name, several=False):
    """Those of the Stored `names` at `path` that go by `name`, None: by any. That is a
    name, tag or digest, or the end of one; if not `several`, rather a whole name, or
    rather any than none. Raises UsageError for none, and for too many.
    """
    known = [(str(one.name or one.tag or one.digest or one.tree), one) for one in names]
    found = not several and [one for text, one in known if (
        one.full or one.tag if name is None else text == name)] or [
        one for text, one in known if name is None or any(
            re.search(r"(?:\A|[/:@])%s\Z" % re.escape(name), str(part))
            for part in (text, one.full, one.tag, one.digest, *(one.origin or ())[:1])
            if part)]
    if not found or found[1:] and not several:
        raise UsageError("%s holds %s" % (
            path, ", ".join(text for text, _ in known) or "no image"),
            "choose one with --image NAME" if known else None)
    return found


def stored_image(path, name=None, platform=None, check=go_on):
    """The Image at `path` for a Platform, or "all"; see image_of.

    For `name` see picked. Without a name `reference` is None. Raises OutputError, too.
    """
    def config_of(pointer):
        raw = reader.read(found.file_of(pointer))
        pointer.digest.check(raw, "config")
        return ImageConfig.parse(raw)

    def fetch(entry):
        # Else what fits less well would be taken for it.
        if platform != "all" and entry.digest not in digests:
            raise OutputError(path, "lacks " + blob_name(entry.digest),
                              "--platform chooses another" if len(there) > 1 else None)
        return dict(zip(digests, documents)).get(entry.digest)

    reader = open_place(path, check)
    found, = picked(path, [one for one in stored(reader, lenient) if not one.along],
                    name)
    documents = list(found.documents)
    if not documents:
        raise OutputError(path, "lacks " + blob_name(found.digest))
    digests = [one.digest for one in documents]
    at = digests.index(found.digest) if found.digest in digests else -1
    there = [one for one in documents[at:] if not (
        one.artifact_type or isinstance(one, Index))]
    if platform is None and len(there) == 1:  # another tool may have copied just it
        at = documents.index(there[0])
    image = image_of(found.reference, None, documents[at], platform, fetch, config_of)
    return image._replace(digest=digests[0], path=path, stored=found, indexes=tuple(
        one for one in documents[:at] if isinstance(one, Index)) + image.indexes)


def image_of(reference, registry_url, top, platform, fetch, config_of=None):
    """The Image that a document `top` leads to for a Platform, None for this host's.

    For "all" that is an index as a whole, if it is one. For `fetch` see walk;
    `config_of(Descriptor)` gives an ImageConfig, None: an artifact will do.
    """
    if platform == "all" and isinstance(top, Index):
        below = tuple(one for *_, one in walk(fetch, top.manifests, (top,)))
        if any(isinstance(one, Schema1Manifest) for one in below):
            raise Unsupported("a schema1 manifest in an index")
        blobs = distinct((blob for one in below if isinstance(one, Manifest)
                          for blob in (one.config,) + one.layers), "the index")
        return Image(reference, registry_url, top.digest, (), top, None, "all",
                     blob_layers(blobs.values()), below)
    wanted = platform if isinstance(platform, Platform) else Platform.host()
    *indexes, manifest = choose(fetch, top, wanted)
    about = reference, registry_url, top.digest, tuple(indexes), manifest
    if manifest.artifact_type or config_of is None:
        return Image(*about, None, None, blob_layers(
            (manifest.config,) + manifest.layers))
    config = config_of(manifest.config) if isinstance(manifest, Manifest) else None
    actual = config.platform if config else Platform.normal(
        "linux", manifest.architecture or "")
    named = indexes and any(entry.platform for entry in indexes[-1].manifests
                            if entry.digest == manifest.digest)
    if platform is wanted and actual.architecture and not (
            named or wanted.runs(actual)):
        raise NoMatchingPlatform(wanted, [actual])
    return Image(*about, config, actual if actual.architecture else wanted,
                 list_layers(manifest, config))


def joined(images):
    """Images of one index as one Image: an index made here, which lists just these."""
    manifests = {image.manifest.digest: image.manifest for image in images}
    entries = [next(entry for entry in json.loads(image.indexes[-1].raw.decode("utf-8"))
                    ["manifests"] if entry["digest"] == str(image.manifest.digest))
               for image in images]
    index = made_index(entries, images[0].digest)
    indexes = {one.digest: one for image in images for one in image.indexes}
    return image_of(
        images[0].reference, images[0].registry_url, index, "all",
        lambda entry: manifests[entry.digest])._replace(
            digest=images[0].digest, indexes=tuple(indexes.values()),
            signed=tuple(one for image in images for one in image.signed),
            platform=",".join(str(image.platform) for image in images))


def _held(descriptor, held):
    """The bytes a Descriptor points to, if they are among the documents `held`."""
    for raw in held:
        if len(raw) == descriptor.size and (
                Digest.of(raw, descriptor.digest.algorithm) == descriptor.digest):
            return raw
    return None


def _modernised(image, layers):
    """`image` with what only its layers tell; `layers` is the Fetched of each.

    A schema1 image gets the config and manifest docker would give it; one whose layers
    were rewritten, a manifest that says so.
    """
    if isinstance(image.manifest, Schema1Manifest):
        kept = [fetched for layer, fetched in zip(image.layers, layers)
                if not layer.throwaway]
        config = modern_config(image.manifest, [one.unpacked.diff_id for one in kept])
        manifest = modern_manifest(config, [one.blob for one in kept])
        return image._replace(indexes=(), manifest=manifest, config=config,
                              layers=list_layers(manifest, config))
    blobs = [fetched.blob for fetched in layers]
    if all(blob.digest == layer.digest for blob, layer in zip(blobs, image.layers)):
        return image
    manifest = with_layers(image.manifest, blobs)
    log.warning("%s was rewritten: its manifest is %s now, %s is only noted, and no "
                "index leads to it", image.reference, manifest.digest, image.digest)
    return image._replace(indexes=(), manifest=manifest, layers=tuple(
        layer._replace(blob=blob) for layer, blob in zip(image.layers, blobs)))


def pull(reference: "Reference | str", output: "str | os.PathLike",
         format: "str | None" = None, platform: "Platform | str | list | None" = None,
         tag: "Reference | str | None" = None,
         progress: "collections.abc.Callable | None" = None, **options) -> Image:
    """Pulls an image, every byte checked; gives the Image.

        imagec.pull("alpine:3.20", "alpine.tar", platform="linux/arm64")

    `output` is a path; `format` "layers", "oci", "archive", "rootfs" or "files", None
    for "archive" where that ends in .tar, else "layers"; `platform` None for this
    host's, "all", or a list; `tag` a name to load it by, None for its own;
    `progress(Event)` is told what happens, from several threads; `options` are
    Session's. Raises ImagecError, and OSError of the local disk.
    """
    with Session(notify=progress, **options) as session:
        images = session.pull([reference], output, platform, format, tag)
        for _, error in session.failures or ():
            raise error
        return images[0]


def parse_platform(text):
    """A Platform or "all"; of a list of several, a list. Raises UsageError."""
    texts = [text] if isinstance(text, (str, Platform)) else list(text)
    if not texts:
        raise UsageError("an empty list of platforms")
    if "all" in texts and texts[1:]:
        raise UsageError("--platform all goes alone")
    found = [one if one == "all" or isinstance(one, Platform) else Platform.parse(one)
             for one in texts]
    return found if texts[1:] else found[0]


def new_output(path, format=None, tag=None, stream=None, sole=None):
    """The Output for these; raises UsageError, OutputError, Unsupported.

    A `path` that is a pipe or device is written as a stream: it must not be replaced.
    With a `sole`, see Output, the path is a default, and no such thing may be there.
    """
    path = os.fsdecode(path)
    if not path or path == "-" and stream is None:
        raise UsageError("expected the path of a file or directory to write, got '%s'"
                         % path)
    if len(os.fsencode(path)) > PATH_MAX or path.count(os.sep) > PATH_PARTS_LIMIT:
        raise OutputError(path[:60] + "...", "is longer than %d bytes or deeper than "
                          "%d directories" % (PATH_MAX, PATH_PARTS_LIMIT))
    gone = os.path.islink(path) and not os.path.exists(path) and (
        "is a link to what is not there")
    try:
        os.path.abspath(path)
    except FileNotFoundError:
        gone = "the current directory is not there any more"
    if gone and stream is None:
        raise OutputError(path, gone, "choose another place with -o")
    if format is None and re.search(r"(?i)\.(tgz|tar\.\w+)\Z", path):
        raise UsageError("%s: archives are not compressed" % path,
                         "name it FILE.tar, or say which --format it is")
    name = format or ("archive" if path[-4:].lower() in ("-", ".tar") else "layers")
    if name not in OUTPUTS:
        raise UsageError("unknown format %r: expected one of %s"
                         % (name, ", ".join(OUTPUTS)))
    tag = None if tag is None else Reference.parse(str(tag))
    if tag and (tag.digest or not OUTPUTS[name].layout):
        raise UsageError("format %s keeps no such name: %s" % (name, str(tag)),
                         "--tag NAME[:TAG] goes with --format archive or oci")
    if stream is None and os.path.islink(path) and os.path.isfile(path):
        with contextlib.suppress(OSError):  # it may be closed
            if os.path.samestat(os.stat(path), os.fstat(1)):
                raise UsageError("%s is standard output" % path, "write -o -")
    if stream is None and OUTPUTS[name].streams and os.path.exists(path) and not (
            os.path.isfile(path) or os.path.isdir(path)):
        if sole:
            raise OutputError(path, "is no file", "name one with -o")
        stream = _Stream(open(path, "wb", buffering=0), path)
    elif stream is not None:
        stream = _Stream(stream)
    output = OUTPUTS[name](path, tag, stream)
    output.sole = sole
    return output


def planned(images, move, size, there, as_json):
    """What --dry-run prints: images by name, bytes to `move`, bytes there already."""
    if as_json:
        return [json.dumps({"images": images, "to_" + move: size, "present": there})]
    return images + ["to %s: %d bytes; already there: %d" % (move, size, there)]


def format_of(path):
    """The format of what a pull has made in a directory; None for none."""
    import glob
    return next((format for mark, format in LAYOUT_MARKS.items() if glob.glob(
        os.path.join(glob.escape(path), mark))), None)


def is_path(text):
    """Whether what a user wrote is a path, not a reference.

    A bare word names no directory: others may have put one of that name here.
    """
    return bool(re.match(r"[/~]|\.\.?(?:[/\\]|\Z)|[A-Za-z]:[/\\]", text)) or (
        text.lower().endswith(".tar") and os.path.isfile(text))


def named(text):
    """The Reference a user wrote where it cannot be a path; raises UsageError."""
    if is_path(text):
        raise UsageError("%s is a path, not a name in a registry" % shown(text, 300),
                         "ls, inspect and verify read it, push hands it on, and serve, "
                         "for pull, too")
    if re.fullmatch(r"localhost|(?:localhost|[^/@]+\.[^/@]+):[0-9]{2,5}", text):
        raise UsageError("%s is a registry" % text, "expected %s/REPOSITORY" % text)
    if text.lower().endswith(".tar"):
        log.info("there is no file %s here: taken for a name in a registry", text)
    return Reference.parse(text)


def asked(args, session, outermost=False):
    """The Image `args` name, in a registry or at a path, or its outermost document."""
    text = args.reference
    if is_path(text):
        log.info("reading what is at the path %s", text)
        if args.verify_keys:
            raise UsageError("--verify-key is for what comes from a registry",
                             "verify PATH --verify-key proves who signed what is here")
        with naming(text):
            image = stored_image(
                os.path.expanduser(text), args.image, "all" if outermost
                else args.platform, session.transport.check)
        return (image.indexes + (image.manifest,))[0] if outermost else image
    if args.image is not None:
        raise UsageError("--image goes with a path", "for one here write ./PATH")
    if os.path.isdir(text) and format_of(text):
        log.info("for what is in the directory here write ./%s", text)
    reference = named(text)
    if not outermost:
        return session.resolve(reference, args.platform)
    return session.trusting(reference, (), lambda document: (
        document, session.prove(reference, (document,)))[0])


# --------------------------------------------------------------------------------------
# 16  Verify*: what a pull wrote, re-checked offline
# --------------------------------------------------------------------------------------

class Audit:
    """Re-checks what a pull wrote to `path`; `faults` are what is wrong, a text each.

    `images` and `blobs` count what was looked at; `unchecked` says what was not looked
    into (no codec), `absent` what should have been, by its name, and why; `ignored`
    names the files that no image needs, `elsewhere` the blobs that a pull was to leave
    out. `reader` reads it; blobs not there may be at the paths `beside`. `check` is
    called as work goes on, and may raise. Raises OutputError where no image is there
    that can be checked.
    """

    def __init__(self, path, check=go_on, beside=()):
        self.faults, self.unchecked, self.absent, self.ignored = [], [], {}, []
        self.images, self.blobs, self.elsewhere = 0, 0, set()
        self._go_on = check
        self._seen = {}  # (name, size, whether a tar) -> Unpacked or None
        self._named = {None: None}  # full name, None for none -> digest of its entry
        self._noted = set()  # (digest, name) of each entry that a pull of ours noted
        self._images = {}  # digest -> (os, architecture) by its config, or None
        self._firsts = {}  # digest of an index -> what it has first: see _first_of
        # Digest of an entry, None for any -> hashes of what docker may be told of it.
        self._docker = collections.defaultdict(set)
        self._optional = {}  # digest -> whether all that lists it may lack it

        def unlisted(error):
            with self._noting(os.path.relpath(error.filename, path)):
                raise error

        with self._noting("content"):
            self.reader = open_place(path, check, unlisted, beside)
            for found in stored(self.reader, self._noting):
                self._check_stored(found)
            for name in map(blob_name, filter(self._optional.get, self._optional)):
                if name in self.absent:
                    self.unchecked.append("%s: %s" % (name, self.absent.pop(name)))
            if not (self.absent or self.elsewhere):  # what they lead to is no "extra"
                self._check_names(collections.Counter(self.reader.names()))
        if not (self.images or self.faults or self.absent):
            raise OutputError(path, "no image is in it", "; ".join(self.unchecked)
                              or READABLE)

    def _check_stored(self, found):
        """Checks what a name leads to.

        Who has not noted what was pulled may have left out some of an index's images,
        but not all (image-layout.md: "MAY be missing").
        """
        name = None if found.along else found.name
        self._noted.update([(found.digest, name)] if found.origin else ())
        names = {name}
        if name and re.fullmatch(_TAG, found.tag or ""):  # what others go by
            names.add("%s:%s" % (name.rpartition(":")[0], found.tag))
        for one in filter(None, names):
            if self._named.setdefault(one, found.digest) != found.digest:
                self.faults.append("index.json: %s stands for two images" % one)
        indexes, listed, way = [], set(), found.origin.indexes if found.origin else ()
        for document in found.documents:
            if isinstance(document, Index):
                indexes.insert(0, document)
                listed.update(entry.digest for entry in document.manifests
                              if document.digest not in way)
            else:
                self._image(found, document)
        for index in indexes:  # no reader takes what is no first
            first = self._firsts[index.digest] = self._first_of(index)
            self._docker[index.digest].update(*[
                self._docker[one] for way, one in first.items()
                if self._images.get(one) in _kin(way)])
        for digest in found.without:
            if self.absent.pop(blob_name(digest), None):
                self.elsewhere.add(digest)
        optional = found.origin is None and not listed.isdisjoint(self._images)
        for digest in listed:
            self._optional[digest] = optional and self._optional.get(digest, True)
        self._optional[found.digest] = False

    def _first_of(self, index):
        """{platform: digest} of what readers take from an Index: of each the first.

        What names none, as it may, is for that of its config, but comes last.
        """
        given, rest, first, named, kin = {}, {}, {}, set(), set()
        for one in index.manifests:
            way, own = one.platform, self._images.get(one.digest)
            if one.media_type not in MANIFEST_SHAPES or "unknown" in (way or ()):
                continue
            if way:  # Windows goes by its version, too
                given.setdefault(way[:3 + (way.os == "windows")], one.digest)
            else:
                rest[one.digest] = self._firsts.get(
                    one.digest, {own: one.digest} if own else {})
        for below in (given, *rest.values()):
            self._go_on()
            new = {way: below[way] for way in below if way[:2] not in kin
                   and named.isdisjoint(_kin(way))}
            first.update(new)
            named.update(way[:2] for way in new)
            kin.update(*map(_kin, new))
        return first

    @contextlib.contextmanager
    def _noting(self, name):
        """What is wrong inside becomes a fault of the file `name`."""
        try:
            yield
        except (TransportError, OutputError):
            raise  # of `check`; of no place at all
        except Unsupported as error:
            self.unchecked.append("%s: %s" % (name, error))
        except FileNotFoundError:
            self.absent[name] = "missing"
        except PermissionError:
            self.absent[name] = "no permission to read it"
        except ImagecError as error:
            self.faults.append("%s: %s" % (name, error))

    def _check_names(self, names):
        """An archive holds what its images need, once, and nothing else.

        Who loads one that holds more may take another image (one reads "./index.json"
        for "index.json"). A directory may hold what a pull has left.
        """
        reader, archive = self.reader, isinstance(self.reader, TarReader)
        if archive and "oci-layout" in reader.asked:
            self._check_docker(names)
        known = {"blobs/", "blobs/sha256/"}.union(reader.asked, (
            os.path.dirname(name) + "/" for name in reader.asked if "/" in name))
        if archive and reader.docker:  # what is there for docker before 1.10
            known.update(name for name in names if re.fullmatch(
                r"repositories|[0-9a-f]{64}/(VERSION|json|layer\.tar)?", name))
        for name, count in names.items():
            if count > 1:
                self.faults.append("%s: stands %d times" % (name, count))
            elif name not in known and archive:
                with contextlib.suppress(InvalidReference, InvalidDocument,
                                         VerificationError):
                    # Docker leaves v1 configs among the blobs.
                    drain(proved(reader.region(name).pieces(self._go_on), Digest.parse(
                        name.replace("blobs/", "", 1).replace("/", ":"))))
                    self.ignored.append(name)
                    continue
                self.faults.append(name + ": extra, nothing points to it")
            elif name not in known:
                self.ignored.append(name)

    def _image(self, found, manifest):
        self.images += 1
        config, layers = None, []
        where = (found.tree or "") + "manifest.json"
        if isinstance(manifest, Manifest):
            where = found.file_of(manifest.config)
            self._blob(manifest.config, where)
            if found.tree is None:
                layers = blob_layers(manifest.layers)
        elif found.tree is None:
            return self.faults.append(blob_name(manifest.digest)
                                      + ": is schema1: layouts hold none")
        with self._noting(where):
            config = found.config(manifest)
            layers = list_layers(manifest, config)
        self._images[manifest.digest] = config and config.platform[:2]
        if not (manifest.artifact_type or found.along):
            what = Digest.of(canonical_json([where, *map(found.file_of, layers)]))
            self._docker[manifest.digest] = {what}
            self._docker[None].add(what)
        for layer in layers:
            name = found.file_of(layer)
            tar = layer.blob.is_tar and not manifest.artifact_type
            if not (tar or manifest.artifact_type):
                self.unchecked.append("%s: what it unpacks to: it is of type %s" % (
                    name, printable(layer.blob.media_type, 80)))
            unpacked = self._blob(layer.blob, name, tar, layer.diff_id)
            if unpacked and layer.diff_id not in (None, unpacked.diff_id):
                self.faults.append("%s: unpacks to %s, the config says %s" % (
                    name, str(unpacked.diff_id), str(layer.diff_id)))
            if found.tree is not None:
                name = name[:-len("tar")] + "json"
                with self._noting(name):
                    if found.reader.read(name) != layer.v1_json.encode("utf-8"):
                        raise VerificationError("is not the layer's v1 JSON")

    def _blob(self, descriptor, name, tar=False, diff_id=None):
        """Checks one blob, only once; its Unpacked where it is a `tar` and good."""
        question = name, descriptor.size, tar, diff_id and diff_id.algorithm
        if question in self._seen:
            return self._seen[question]
        self._seen[question] = None
        self.blobs += 1
        with self._noting(name):
            region = self.reader.region(name)
            foreign = region is self.reader.beside.get(name)
            with naming(region.path if foreign else None):
                if descriptor.size not in (None, region.size):  # or: each lie is hashed
                    raise SizeMismatch("blob", descriptor.size, region.size)
                self._seen[question] = prove(
                    region.pieces(self._go_on), descriptor,
                    functools.partial(unpack, limit=float("inf"), diff_id=diff_id,
                                      check=self._go_on) if tar else None)
        return self._seen[question]

    def _check_docker(self, names):
        """What docker reads must say what index.json says; the blobs are checked.

        It need not say all where no pull of ours noted it: ctr names one platform. But
        of two by one name, docker takes the last.
        """
        for name in sorted({"manifest.json", "repositories"}.intersection(names)):
            with self._noting(name):
                value = parse_json(self.reader.read(name, CONTENTS_LIMIT), name)
                if name == "repositories":  # of docker before 1.10, with ids of its own
                    good = self._named.keys() >= {
                        Reference.full("%s:%s" % (repository, tag))
                        for repository, tags in Document(value, name).value.items()
                        if type(tags) is dict for tag in tags}
                else:
                    told = collections.defaultdict(set)  # name -> what has it
                    for one in Document({name: value}, name).children(
                            name, INDEX_COUNT_LIMIT):
                        what = Digest.of(canonical_json([
                            one.need("Config", str), *one.get("Layers", list, [])]))
                        for tag in [None, *map(str, one.get("RepoTags", list, []))]:
                            told[tag and Reference.full(tag)].add(what)
                    good = bool(told) == bool(self._docker[None]) and all(
                        self._docker[digest] & told[tag] for digest, tag in self._noted
                        if self._docker[digest]) and all(
                        whats <= self._docker[self._named.get(tag, "")]
                        and (tag is None or len(whats) == 1)
                        for tag, whats in told.items())
                if not good:
                    raise InvalidDocument("names other images than index.json")


def _kin(way):
    """The (os, architecture), "" for any, that may be those of a platform."""
    return set(itertools.product((way[0], ""), (way[1], "")))


def _prove_signed(stock, rule, name=None):
    """Has a SignedBy prove each image in a Stock, or those of a name: see picked.

    Raises VerificationError, and Unsupported for what was rewritten here.
    """
    tags = {digest.tag for digest in stock.drawn}
    indexes = [one for one, _ in stock.drawn.values() if isinstance(one, Index)]
    notes = {digest for digest, (one, _) in stock.drawn.items()
             if not _runs(stock.reader, one)}
    images = [found for found in stock.names
              if not _refers(stock, found, tags, notes)]
    if len(images) < len(stock.names):
        log.info("not asked who signed what refers to others here: %d",
                 len(stock.names) - len(images))
    if not images:
        raise VerificationError("there is no image to prove")
    done = set()  # one image may go by many names
    for found in picked(stock.reader.path, images, name, several=True):
        stock.reader.check()
        name = found.name or found.tag or found.tree or found.digest
        one = stock.document(found)
        if one is None:
            raise VerificationError("%s: there is no manifest" % (name,))
        if found.origin and found.origin.digest != (
                *found.origin.indexes, found.digest)[0]:
            raise Unsupported("%s was rewritten: it cannot be proved" % (name,))
        # Nobody signed an index that was made here: but what it lists.
        made = ORIGIN_ANNOTATION + "digest" in one.annotations
        for each in made and getattr(one, "manifests", ()) or [one]:
            if each.digest not in done:
                done.add(each.digest)
                rule.prove(name, indexes + [each], stock)


def _refers(stock, found, tags, notes):
    """Whether this only says something of what is here, too, by all its names.

    What is none of the `notes` never does: readers would run it.
    """
    names = [name.rpartition(":")[2].partition(".")[0]
             for name in (found.name, found.tag) if name]
    one = stock.document(found)
    listed = one.manifests if isinstance(one, Index) else [found]
    return notes.issuperset(each.digest for each in listed) and (
        tags.issuperset(names) if names else one.subject in stock.drawn)


def _runs(reader, one):
    """Whether some program would run a document.

    Most go by the type of its config, none by those of its layers.
    """
    reader.check()
    if not one.artifact_type:
        return True
    if one.media_type != DOCKER_MANIFEST and not re.match(
            _IMAGE_CONFIG, one.config.media_type):
        return False
    for name in {blob_name(layer.digest) for layer in one.layers}:
        with reader.region(name).open() as file:
            if could_unpack(file):
                return True
    return False


def _run_verify(args, session):
    if args.image is not None and session.rule is None:
        raise UsageError("--image goes with --verify-key",
                         "without that, verify looks at all there is")
    audit = Audit(args.path, session.transport.check, args.bases or ())
    if args.json:
        yield json.dumps(hidden({
            "path": args.path, "images": audit.images, "blobs": audit.blobs,
            "faults": audit.faults, "missing": sorted(audit.absent),
            "elsewhere": sorted(map(str, audit.elsewhere)),
            "not_checked": audit.unchecked, "not_looked_at": audit.ignored}))
    for text in audit.unchecked:  # with -q, too
        log.error("warning: not checked: %s", text)
    for text in audit.faults + list(map(": ".join, audit.absent.items())):
        log.error("%s: %s", args.path, text)
    if audit.faults:
        raise VerificationError("%s: faults: %d" % (args.path, len(audit.faults)))
    if audit.absent:
        raise OutputError(args.path, "is incomplete: files missing, or not to be read: "
                          "%d" % len(audit.absent),
                          "pull again, or run this as who may read them")
    if audit.elsewhere:
        raise OutputError(args.path, "is incomplete: blobs elsewhere: %d" % len(
            audit.elsewhere), "name what has them in --with PATH")
    if session.rule is not None:
        _prove_signed(Stock(audit.reader), session.rule, args.image)
    more = len(audit.ignored) - 1
    if audit.ignored:
        log.error("warning: %s: not looked at, for no image needs it: %s%s", args.path,
                  audit.ignored[0], " and %d more" % more * bool(more))
    if not args.json:
        yield printable("%s: good: images: %d, blobs or files: %d" % (
            args.path, audit.images, audit.blobs))


# --------------------------------------------------------------------------------------
# 17  Look*: the files of an image, of no more layers than it takes
# --------------------------------------------------------------------------------------
# Layers are drawn newest first, until one decides what is at a path. That can be told
# where each member stands behind its directories, as builders have it: else a link in a
# layer below could lead it anywhere, and all are drawn.

class _Headers(LayerPack):
    """A LayerPack without data, but for that of member number `wanted`, if any."""

    layer = wanted = None

    def _keep(self, data):
        number = len(self.records)
        if number == self.wanted:
            super()._keep(data)
        return number


class Look:
    """The files of an Image, whose layers are drawn into the directory `spool`."""

    def __init__(self, session, image, spool):
        image.require_file_system()
        self._session, self._image, self._spool = session, image, spool
        self._census, self._check = Census(session.max_files), session.transport.check
        self._waiting = [layer for layer in image.layers if not layer.throwaway]
        self._drawn = []  # their _Headers, oldest first
        self._hidden = set()  # the paths that these hide of layers below
        self._plain = True  # whether no link below changes where their members are

    def find(self, path):
        """(path, Node, Tree) of what the text `path` leads to; raises NotFound."""
        parts = member_parts(os.fsencode(path))
        way, tree = b"/".join(parts), None
        while tree is None or not self._decided(way):
            while not self._decided(way):
                self._drawn.insert(0, self._headers(self._waiting.pop()))
            tree = Tree(self._check, self._census)
            for headers in self._drawn:
                tree.apply(headers)
            directory, above, left = tree.lead(parts)
            way = (above + b"/".join(left)).rstrip(b"/")
        node = directory.children.get(left[0]) if left else directory
        if node is None or left[1:]:
            raise NotFound("%s: there is no file %s" % (
                self._image.reference or self._image.path, show(b"/" + way)))
        return way, node, tree

    def data(self, node):
        """Yields the data of a file's Node, once all of its layer is proved."""
        headers, where = node.store, node.entry.where
        if where is not None:
            headers.wanted = where
            self._draw(headers)
            with open(headers.path(None), "rb") as file:
                yield from pieces(file, check=self._check)

    def _draw(self, headers):
        """Draws the layer of these _Headers, and proves it."""
        session, layer = self._session, headers.layer
        look = functools.partial(
            unpack, limit=session.max_layer_size, visit=headers.visit,
            check=self._check, diff_id=layer.diff_id)
        found = self._image.stored
        if found is None:
            place = Place(os.path.join(self._spool, layer.digest.hex))
            Download(session.source(self._image.reference), layer.blob, place, look,
                     session.notify, durable=False).run()
        else:
            try:
                region = found.reader.region(found.file_of(layer))
            except FileNotFoundError:
                if layer.digest not in found.without:
                    raise
                raise OutputError(
                    self._image.path, "is an update: layer %s is elsewhere" % str(
                        layer.digest), "serve UPDATE BASE puts the two together"
                    ) from None
            prove(region.pieces(self._check), layer.blob, look)

    def _decided(self, way):
        """Whether no layer below those drawn has a say in what is there."""
        parts = way.split(b"/")
        return not self._waiting or self._plain and any(
            b"/".join(parts[:depth]) in self._hidden for depth in range(len(parts) + 1))

    def _headers(self, layer):
        """The _Headers of a layer; notes what it hides, and whether it is plain."""
        headers = _Headers(self._spool, self._census)
        headers.layer = layer
        self._draw(headers)
        made, there = {b""}, set()  # directories, and what else
        for entry in map(Entry.loads, headers.records):
            self._check()
            parts = member_parts(entry.path)
            path, above = b"/".join(parts), b"/".join(parts[:-1])
            self._plain &= above in made and (
                entry.kind != "hardlink"
                or b"/".join(member_parts(entry.link)) in there)
            if is_whiteout(parts):
                self._hidden.add(above if parts[-1] == _OPAQUE else b"/".join(
                    parts[:-1] + (parts[-1][len(_WHITEOUT):],)))
            elif entry.kind == "dir":
                made.add(path)
            elif entry.kind != "unknown":
                self._plain &= path not in made
                there.add(path)
        self._hidden |= there
        return headers


#: Kind of an Entry -> bits of a mode; a symlink's own mean nothing.
_FILE_TYPES = {"file": stat.S_IFREG, "dir": stat.S_IFDIR, "char": stat.S_IFCHR,
               "block": stat.S_IFBLK, "fifo": stat.S_IFIFO,
               "symlink": stat.S_IFLNK | 0o777}


@contextlib.contextmanager
def _looking(args, session):
    import tempfile
    if args.platform == "all":
        raise UsageError("%s is for one --platform" % args.command)
    image = asked(args, session)
    with tempfile.TemporaryDirectory(prefix="imagec-") as spool:
        yield Look(session, image, spool)


def _run_ls(args, session):
    with _looking(args, session) as look:
        path, node, tree = look.find(args.path)
        for path, node, _ in tree.walk(path, node):
            entry, seconds = node.entry, max(0, node.entry.mtime // 10 ** 9)
            path, target = (name.decode("utf-8", "backslashreplace")
                            for name in (path, entry.link))
            file = {
                "mode": stat.filemode(_FILE_TYPES[entry.kind] | entry.mode),
                "uid": entry.uid, "gid": entry.gid, "size": entry.size,
                "mtime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)),
                "path": "/" + path,
                "target": target if entry.kind == "symlink" else None}
            yield json.dumps(hidden(file)) if args.json else printable(
                "%(mode)s %(uid)d:%(gid)d %(size)d %(mtime)s %(path)s" % file
                + (" -> " + file["target"] if file["target"] else ""))


def _run_cat(args, session):
    with _looking(args, session) as look:
        path, node, _ = look.find(args.path)
        if node.entry.kind != "file":
            raise Unsupported("%s is a %s, not a file" % (
                show(b"/" + path), node.entry.kind.replace("dir", "directory")),
                "ls lists it, pull --format rootfs --path has what is below it")
        yield from look.data(node)


# --------------------------------------------------------------------------------------
# 18  Serve*: a read-only registry over what was pulled
# --------------------------------------------------------------------------------------
# The pull part of the OCI distribution-spec. A request names things in a table made
# when the server starts; no path is ever made of it.

_ROUTE = (r"/v2/(?:(?P<name>{0}(?:/{0})*)/(?:(?P<kind>manifests|blobs|referrers)/"
          r"(?P<what>[^/]+)|tags/list)|_catalog|)".format(
              r"[A-Za-z0-9._:\[\]-]+"))  # one way to match, or it takes ages
_FIELD = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\0\r\n]*\r?\n"  # RFC 7230, 3.2


class Shelf:
    """What a server has: documents by repository and tag or digest, blobs by digest.

    Made from what pulls wrote at `paths`; a name that two have is that of the first. A
    repository goes by the name it was pulled by (`docker.io/library/alpine`), by that
    without the host (`library/alpine`), and Docker Hub's own images by their short name
    (`alpine`). By its digest each has any document. `check` is called as it is made,
    and may raise. Raises OutputError, InvalidDocument, Unsupported.
    """

    def __init__(self, *paths, check=go_on):
        self.repositories = {}  # name -> tag -> digest, as text
        self.documents = {}  # digest, as text -> (bytes, media type)
        self.referrers = {}  # digest of a subject -> digest -> its entry in an index
        self.blobs = {}  # Digest -> Region
        self._good = {}  # Digest -> the file's identity when it was proved
        self._locks = collections.defaultdict(threading.Lock)  # Digest -> for its proof
        elsewhere = set()  # the Digests of what was left out
        paths = list(map(os.fsdecode, paths))
        for path in reversed(paths):
            with naming(path):
                elsewhere.update(self._fill(path, open_place(
                    path, check, lambda error: log.warning(
                        "passed over: %s: %s", error.filename, error.strerror))))
        if elsewhere.difference(self.blobs):
            log.warning("layers elsewhere, and so not served: %d; name what has them, "
                        "too", len(elsewhere.difference(self.blobs)))
        if paths and not self.repositories:
            raise OutputError(", ".join(paths), "holds nothing that could be served")

    def _fill(self, path, reader):
        """Takes what is at a path; yields the Digests of what was left out there."""
        @contextlib.contextmanager
        def noting(name):
            try:
                yield
            except (OSError, InvalidDocument, VerificationError, Unsupported,
                    InvalidReference) as error:
                log.warning("passed over: %s: %s", os.path.join(path, name),
                            _reason(error))

        for found in stored(reader, noting):
            names, tag, digest = [label(path)], found.tag, found.digest
            if found.full:
                with noting("the name of %s" % (found.digest or found.tree,)):
                    reference = Reference.parse(found.full)
                    names = self.names_of(reference.host, reference.repository)
                    tag = reference.tag or tag
            elif found.tree is not None:
                continue  # not where a pull puts it
            yield from found.without
            for document in found.documents:
                digest = found.digest or document.digest
                self.add((), None, document)
                self.blobs.update(found.regions(document, noting))
            if str(digest) in self.documents:
                self._name(names, tag, str(digest), "%s in %s" % (
                    found.full or digest, path))

    def add(self, names, tag, document):
        """Puts a document here by its digest and, if not None, by a tag of `names`."""
        digest = str(document.digest)
        self.documents[digest] = document.raw, document.media_type
        if document.subject is not None:
            entry = Descriptor.of_referrer(document).as_json()
            self.referrers.setdefault(str(document.subject), {})[digest] = entry
        self._name(names, tag, digest)

    def _name(self, names, tag, digest, what=None):
        for name in names:
            tags = self.repositories.setdefault(name, {})
            if tag is not None:
                if tags.get(tag, digest) != digest:
                    log.warning("%s:%s is that of %s", name, tag, what or digest)
                tags[tag] = digest

    @staticmethod
    def names_of(host, repository):
        """The names a repository is served by."""
        host = DOCKER_HUB if host == DOCKER_HUB_API else host
        names = ["%s/%s" % (host, repository), repository]
        if host == DOCKER_HUB and repository.startswith("library/"):
            names.append(repository[len("library/"):])
        return names

    def catalog(self):
        """The names a client can spell; of a registry with a port, those without it."""
        return sorted(name for name in self.repositories
                      if re.fullmatch(_REPOSITORY, name))

    def blob(self, digest):
        """The Region of a blob, proved; None where it is not there.

        What is on disk is hashed when it is first asked for, and again when its file
        has changed. Raises VerificationError, OSError.
        """
        region = self.blobs.get(digest)
        if region is None:
            return None
        with self._locks[digest]:  # once for all who ask meanwhile
            status = os.stat(region.path)
            identity = (status.st_dev, status.st_ino, status.st_size,
                        status.st_mtime_ns, status.st_ctime_ns)
            if self._good.get(digest) != identity:
                drain(proved(region.pieces(), digest, region.size))
                self._good[digest] = identity
        return region


def new_server(shelf: Shelf, address: tuple, credentials: "Credentials | None" = None,
               tls: "tuple | None" = None):
    """A threading HTTP server of a Shelf at (host, port); `serve_forever` runs it.

    `credentials` are those to ask for, None: none; `tls` is a (certificate, key) pair
    of PEM files, None: http. At most SERVE_THREADS connections are served at once,
    others take the place of idle ones. Raises UsageError, OSError.
    """
    import http.server
    import socketserver
    context = None
    if tls is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        _load(context.load_cert_chain, tls[0], tls[1], "")
    kind = type("Server", (_BoundedThreads, socketserver.ThreadingTCPServer), {
        "address_family": socket.AF_INET6 if ":" in address[0] else socket.AF_INET,
        "shelf": shelf, "credentials": credentials, "context": context,
        "places": SERVE_THREADS, "lock": threading.Lock(), "since": {}})  # see waits
    return kind(address, type(
        "Handler", (RegistryHandler, http.server.BaseHTTPRequestHandler), {}))


class _BoundedThreads:
    """A thread a connection, but not too many; put before socketserver's classes."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 512  # connections that may wait

    def get_request(self):
        try:
            if len(self.since) >= self.places:
                raise BlockingIOError
            request, client_address = super().get_request()
        except OSError:  # or there are no more descriptors
            self.end_waits(SERVE_IDLE, 1)
            time.sleep(0.01)
            raise  # serve_forever asks again, unless it is to end
        request.settimeout(SERVE_TIMEOUT)
        if self.context is not None:  # shaking hands comes later: it may be slow
            request = self.context.wrap_socket(request, server_side=True,
                                               do_handshake_on_connect=False)
        self.waits(request)
        return request, client_address

    def shutdown_request(self, request):
        with self.lock:
            self.since.pop(request, None)
        super().shutdown_request(request)

    def waits(self, connection, begins=True):
        """Notes since when a connection owes us a request's head; None: it does not."""
        with self.lock:
            self.since[connection] = time.monotonic() if begins else None

    def end_waits(self, patience, most=None):
        """Ends waits of over `patience` seconds, the longest first, `most` of them."""
        with self.lock:
            waits = [pair for pair in self.since.items() if pair[1] is not None]
            for connection, since in sorted(waits, key=lambda pair: pair[1])[:most]:
                if time.monotonic() - since > patience:
                    with contextlib.suppress(OSError):  # TLS wants no farewell here
                        socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def service_actions(self):
        """However a head drips, it has to come in time."""
        self.end_waits(SERVE_TIMEOUT)

    def handle_error(self, _request, client_address):
        log.debug("serving %s: %s", client_address[0], sys.exc_info()[1])


class RegistryHandler:
    """Answers one connection's requests; http.server's handler is put behind it."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = USER_AGENT, ""
    default_request_version = "HTTP/1.0"  # else what is no request gets no status line
    disable_nagle_algorithm = True

    def handle(self):
        """Answers a connection's requests; one that begins with TLS hears it is wrong.

        It may hold no line feed to wait for, and containerd tries http then.
        """
        if self.rfile.peek(1)[:1] == b"\x16":  # a handshake record (RFC 8446, 5.1)
            self.rfile.read1(HEADER_LIMIT)  # what is left unread would reset it all
            self.wfile.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        else:
            super().handle()

    def handle_one_request(self):
        self.server.waits(self.connection)
        super().handle_one_request()

    def parse_request(self):
        """Whether the head that came is good; answers it where not.

        One that a proxy before us may read in another way is not: what is a body to it
        would be a request to us (RFC 7230, 3.2.4 and 3.3.3).
        """
        file, lines = self.rfile, []
        self.rfile = types.SimpleNamespace(  # from 3.12.8 on email hides some folds
            close=file.close,
            readline=lambda *size: lines.append(file.readline(*size)) or lines[-1])
        good, self.rfile = super().parse_request(), file
        if not good:
            return False
        self.server.waits(self.connection, False)
        lengths = [v for k, v in self.headers.items() if k.lower() == "content-length"]
        if (lengths[1:] or list(map(str.lower, self.headers)).count("host") > 1
                or not all(re.fullmatch(_FIELD, one) for one in lines[:-1])
                or not all(re.fullmatch(r"[0-9]+[ \t]*", one) for one in lengths)):
            self.close_connection = True
            self.fail(400, "UNSUPPORTED", "malformed header fields")
            return False
        return True

    def log_message(self, format, *args):
        log.debug("serve: %s: %s", self.client_address[0], printable(format % args))

    def do_GET(self):
        self.answered = False  # whether the answer has begun
        if self.headers.get("Content-Length", "0") != "0" or (
                "Transfer-Encoding" in self.headers):
            self.close_connection = True  # a body is not the next request
        try:
            if self.allowed():
                self.answer(urllib.parse.urlsplit(self.path))
        except (VerificationError, InvalidDocument, OSError, ValueError) as error:
            if self.answered or isinstance(error, (ConnectionError, socket.timeout)):
                raise  # what has been sent cannot be taken back: the connection ends
            if isinstance(error, ValueError):
                return self.fail(400, "DIGEST_INVALID", "not a digest, or no URL")
            log.error("not served: %s: %s", printable(self.path, 200), error)
            self.fail(500, "UNKNOWN", "what is stored here is damaged")

    do_HEAD = do_GET

    def do_POST(self):
        self.close_connection = True  # before its body is taken for a request
        self.fail(405, "UNSUPPORTED", "this registry is read-only",
                  [("Allow", "GET, HEAD")])

    do_PUT = do_PATCH = do_DELETE = do_POST

    def allowed(self):
        """Whether the client may ask; answers it where not."""
        import hmac
        wanted = self.server.credentials
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        good = wanted is None or scheme.lower() == "basic" and hmac.compare_digest(
            given.strip().encode("utf-8", "surrogateescape"),
            wanted.basic().partition(" ")[2].encode("ascii"))
        if not good:
            self.fail(401, "UNAUTHORIZED", "authentication required",
                      [("WWW-Authenticate", 'Basic realm="imagec"')])
        return good

    def answer(self, url):
        match = re.fullmatch(_ROUTE, urllib.parse.unquote(url.path))
        query, shelf = dict(urllib.parse.parse_qsl(url.query)), self.server.shelf
        if not match:
            return self.fail(404, "NAME_INVALID", "no such place")
        name, kind, what = match.group("name", "kind", "what")
        if url.path.endswith("_catalog") and name is None:
            return self.page("repositories", shelf.catalog(), url.path, query, {})
        if name is None:
            return self.send(200, b"{}", "application/json")
        host = query.get("ns")  # of which it must be
        tags = shelf.repositories.get(
            shelf.names_of(host, name)[0] if host and not name.startswith(host + "/")
            else name)
        if tags is None:
            return self.fail(404, "NAME_UNKNOWN", "repository name not known")
        if kind == "blobs":
            return self.blob(Digest.parse(what))
        if kind == "referrers":  # all of them: to filter by type is optional
            found = shelf.referrers.get(str(Digest.parse(what)), {})
            return self.send(200, made_index(list(found.values())).raw, OCI_INDEX)
        if kind is None:
            return self.page("tags", sorted(tags), url.path, query, {"name": name})
        digest = tags.get(what, what)
        if digest not in shelf.documents:
            return self.fail(404, "MANIFEST_UNKNOWN", "manifest unknown")
        return self.send(200, *shelf.documents[digest],
                         headers=[("Docker-Content-Digest", digest)])

    def page(self, key, values, path, query, value):
        """Sends a list, or as much as is asked for (distribution-spec, "tags")."""
        values, extra = [v for v in values if v > query.get("last", "")], []
        if re.fullmatch("[0-9]{1,9}", query.get("n", "")):
            count = int(query["n"])
            if count and len(values) > count:
                more = dict(query, n=count, last=values[count - 1])  # an ns stays
                extra.append(("Link", '<%s?%s>; rel="next"' % (
                    path, urllib.parse.urlencode(more))))
            values = values[:count]
        body = json.dumps(dict(value, **{key: values})).encode("ascii")
        return self.send(200, body, "application/json", extra)

    def blob(self, digest):
        """Sends the blob of a digest, or the part of it that is asked for."""
        region = self.server.shelf.blob(digest)
        if region is None:
            return self.fail(404, "BLOB_UNKNOWN", "blob unknown to registry")
        headers = [("Docker-Content-Digest", str(digest)), ("Accept-Ranges", "bytes"),
                   ("Cache-Control", "max-age=31536000, immutable")]
        first, end, size = 0, region.size, region.size
        # RFC 7233, 3.1: any other range may be ignored; it means nothing to a HEAD.
        part = self.command == "GET" and re.fullmatch(
            "bytes=([0-9]{1,18})-([0-9]{0,18})", self.headers.get("Range", ""))
        if part:
            first, end = int(part.group(1)), min(int(part.group(2) or size) + 1, size)
            if first >= end:
                return self.fail(416, "SIZE_INVALID", "nothing of that range is there",
                                 [("Content-Range", "bytes */%d" % size)])
            headers.append(("Content-Range", "bytes %d-%d/%d" % (first, end - 1, size)))
        with region.open() as file:  # if gone, found out before the head
            self.head(206 if part else 200, end - first, "application/octet-stream",
                      headers)
            at = region.offset + first
            count = 0 if self.command == "HEAD" else end - first
            if isinstance(self.connection, ssl.SSLSocket):
                file.seek(at)
                for data in pieces(file, count):
                    self.wfile.write(data)
                    count -= len(data)
            elif count:
                count -= self.connection.sendfile(file, at, count) or 0
            if count:
                raise ConnectionAbortedError("the file has shrunk")

    def head(self, status, length, media_type, headers):
        self.answered = True
        self.send_response(status)
        for name, value in (
                *headers, ("Docker-Distribution-API-Version", "registry/2.0"),
                ("X-Content-Type-Options", "nosniff"), ("Content-Type", media_type),
                ("Content-Length", str(length)),
                *[("Connection", "close")] * self.close_connection):
            self.send_header(name, value)
        self.end_headers()

    def send(self, status, body, media_type, headers=()):
        self.head(status, len(body), media_type, headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status, code, message, headers=()):
        """Sends an error as the distribution-spec wants it."""
        body = json.dumps({"errors": [{"code": code, "message": message}]})
        self.send(status, body.encode("ascii"), "application/json", headers)


@contextlib.contextmanager
def serving(server):
    """Runs a server in a thread meanwhile."""
    thread = begin(lambda: server.serve_forever(0.05))
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _run_serve(args, session):
    host, _, port = args.listen.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise UsageError("--listen wants HOST:PORT, not %s" % shown(args.listen, 100))
    if (args.tls_cert is None) != (args.tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together")
    shelf = Shelf(*args.paths, check=session.transport.check)
    try:
        server = new_server(shelf, (host, int(port)), session.given,
                            args.tls_cert and (args.tls_cert, args.tls_key))
    except OSError as error:
        raise TransportError("cannot listen on %s: %s" % (
            args.listen, _reason(error))) from None
    with serving(server):
        yield printable("serving %s at %s://%s:%d/v2/: %s" % (
            ", ".join(args.paths), "https" if args.tls_cert else "http",
            "[%s]" % host if ":" in host else host, server.server_address[1],
            ", ".join(shelf.catalog())))
        while True:
            time.sleep(0.5)  # a signal may hit another thread and cut no sleep short
            session.transport.check()


# --------------------------------------------------------------------------------------
# 19  Push*: what was pulled, into another registry, digests kept
# --------------------------------------------------------------------------------------

class Target(Registry):
    """A Registry to push to (distribution-spec, "Push"); see Endpoint for the rest."""

    actions = "pull,push"
    doubted = False  # whether it has claimed to have a blob, and had none

    def has_blob(self, repository, blob):
        """Whether it says, and is believed, that it has the blob of a Descriptor."""
        path = "%s/blobs/%s" % (repository, str(blob.digest))
        with contextlib.suppress(NotFound):
            self._document("HEAD", path, repository, path)
            return not self.doubted
        return False

    def put_blob(self, repository, blob, region, notify, source=None):
        """Sends the blob of a Descriptor, which is in a Region, unless it is there.

        In parts where one request is too much; where it breaks off, from where the
        registry says it got. `source` may lend it: another repository there, or None.
        """
        name, size, check = blob.digest.hex[:12], region.size, self.transport.check
        mount = "?mount=%s&from=%s" % (str(blob.digest), source) if source else ""
        sending = functools.partial(self._sending, blob, region, notify)
        place, at, most, best, failures = None, 0, size, 0, 0
        while place or not self.has_blob(repository, blob):
            try:
                if place is None:
                    at, (place, _) = 0, self._step(
                        "POST", "%s/blobs/uploads/%s" % (repository, mount), repository)
                    if place:
                        drain(proved(region.pieces(check), blob.digest, blob.size,
                                     region.path))
                else:
                    at = 0
                    with contextlib.suppress(RegistryError):  # it may have lost it
                        place, at = self._step("GET", place, repository)
                    if not 0 < at <= size:
                        place = None
                        continue
                    if at - best >= PROGRESS_BYTES:
                        best, failures = at, 0
                while place:
                    end = min(size, at + most)
                    place, at = self._step("PUT" if end == size else "PATCH", place,
                                           repository, sending, at, end, blob)[0], end
                return notify(Event("Pushed", name))
            except ImagecError as error:
                status, lent, mount = getattr(error, "status", None), mount, ""
                if status == 413 and most > MIB:
                    most = max(MIB, most // 64)  # nginx takes no more by itself
                    error.retryable, error.retry_after = True, 0
                elif at and status in (400, 404, 416):  # or be wrong about it
                    place, error.retryable = None, True
                elif lent and not (place or error.retryable):  # but not to us
                    error.retryable, error.retry_after = True, 0
                failures += 1
                self.transport.back_off(error, failures)
        return notify(Event("Already exists", name))

    def _sending(self, blob, region, notify, at, end):
        """Yields the bytes of a blob from `at` to before `end`, which are in a Region.

        Where they cannot be read that is no OSError, or the connection would be blamed.
        """
        try:
            part = region._replace(offset=region.offset + at, size=end - at)
            for data in part.pieces(self.transport.check):
                yield data
                at += len(data)
                notify(Event("Pushing", blob.digest.hex[:12], at, region.size))
        except OSError as error:
            raise OutputError(region.path, _reason(error)) from None

    def _step(self, method, place, repository, draw=None, at=0, end=0, blob=None):
        """A step of an upload: (URL of the next, None after the last; bytes there)."""
        headers = {"Content-Type": "application/octet-stream",
                   "Content-Length": str(end - at)} if method != "GET" else {}
        if at < end and (at or method == "PATCH"):
            headers["Content-Range"] = "%d-%d" % (at, end - 1)
        if method == "PUT":
            query = "%s&digest=%s" % (place.query, str(blob.digest))
            place = place._replace(query=query.lstrip("&"))
        data = b"" if method == "POST" else draw and (lambda: draw(at, end))
        expected = {"PATCH": (202, 204),  # Pulp's
                    "PUT": (201,)}.get(method, (200, 201, 202, 204))
        with self._exchange(method, place, repository, "upload to " + repository,
                            headers, expected, data) as response:
            response.discard()
        if response.status == 201:
            return None, end
        home, there = checked_url(self.url), checked_url(response.url)
        place = checked_url(response.headers.get("Location", ""), response.url)
        if place.hostname == home.hostname == there.hostname:
            # Behind a proxy it may not know by what scheme and port it is asked.
            place = place._replace(scheme=home.scheme, netloc=home.netloc)
        elif not names_host(self.transport.storage_hosts, place):
            check_redirect(response, place, [self.url], there.hostname != home.hostname)
        last = re.fullmatch("0-([1-9][0-9]{0,17})", response.headers.get("Range", ""))
        return place, int(last.group(1)) + 1 if last else 0

    def _request(self, method, path, authorization, headers, data=None):
        if isinstance(path, str):
            return super()._request(method, path, authorization, headers, data)
        own = path.netloc == checked_url(self.url).netloc
        lent = not own and names_host(self.transport.storage_hosts, path)
        if authorization and not lent and self._trusts(path):
            headers = dict(headers, Authorization=authorization)
        try:
            return self.transport.open(
                method, path.geturl(), headers, data and data(), ANYWHERE if lent else
                self.rank, seconds=PATIENCE * self.transport.idle_timeout)
        except UnsafeRedirect as error:
            error.hint = None if own else _LENIENCE % "--storage-host " + path.netloc
            raise

    def put_manifest(self, repository, reference, document):
        """Puts a document there, by a tag or its Digest.

        Clients keep a list of what refers to its subject, by a tag, where the registry
        has none (distribution-spec, "Pushing Manifests with Subject"): it is added.
        """
        path = "%s/manifests/%s" % (repository, reference)
        response, _ = self._document(
            "PUT", path, repository, path, (200, 201, 202), document.raw,
            **{"Content-Type": document.media_type})
        claimed = self._claimed(response) or document.digest
        if claimed not in (document.digest,  # it may be of another algorithm
                           Digest.of(document.raw, claimed.algorithm)):
            raise DigestMismatch(path, document.digest, claimed)
        if document.subject is None or "OCI-Subject" in response.headers:
            return
        listed, tag = [], document.subject.tag
        with contextlib.suppress(NotFound):
            found = self.fetch_manifest(repository, tag)
            own = found.digest == document.subject  # as GitLab takes the tag
            if not (own or isinstance(found, Index)):
                raise Unsupported("%s:%s is no list of what refers to an image: it "
                                  "stays as it is" % (repository, tag))
            listed = [] if own else json.loads(found.raw.decode("utf-8")).get(
                "manifests") or []
        if str(document.digest) not in [entry["digest"] for entry in listed]:
            self.put_manifest(repository, tag, made_index(
                listed + [Descriptor.of_referrer(document).as_json()]))


class Pusher:
    """One push of a Session to `place`; for the other arguments see push."""

    def __init__(self, session, place, tag=None, partial=False):
        self._session, self._partial = session, partial
        self._check = session.transport.check
        if "://" in place:
            raise UsageError("not a registry: " + shown(place, 100), "expected "
                             "HOST[:PORT][/PREFIX], without what ends in ://")
        self._host, self._prefix = split_place(place, "registry")
        if re.match("localhost/|[^/]*[.:][^/]*/|.*@", tag or ""):
            raise UsageError("--tag names a host or digest: " + shown(tag, 300),
                             "expected NAME[:TAG], which goes below " + place)
        home = Reference.parse("%s/%s" % (self._host, "x" if tag is None else tag))
        if home.host != self._host:
            raise UsageError("not a registry: " + self._host,
                             "expected HOST:PORT, or a host's name with a dot")
        self._tag = tag and home
        self._target = session.registry(home.api_host, kind=Target)
        self._has = {}  # digest of a blob -> a repository there that has it
        self._may = {}  # the same -> one that has it if what is beside was pushed

    def plan(self, path, name, beside=()):
        """What `push` takes for each image at `path`, called `name`; see open_place."""
        @contextlib.contextmanager
        def noting(file):
            with self._session.trying(file), lenient(file):
                yield

        place, name = (None, "standard input") if name == "-" else (label(name), name)
        with naming(name):
            self._stock = Stock(open_place(path, self._check, beside=beside), noting)
        for base in beside:
            self._lend(stored_at(base, self._check))
        names = self._names(self._stock)
        subjects = {found.digest: subject for subject, found in names}
        known = {found.digest for _, found in names if found.full or found.tag}
        images = {one.digest for subject, one in names if not (subject or one.along)}
        if self._tag and len(images) > 1:
            raise UsageError("--tag names one image, %s holds more" % name)
        named, homes, plans = {}, {}, []
        for subject, found in names:
            digest = found.digest
            with self._session.trying(found.full or digest):
                if not digest or digest in known and not (found.full or found.tag) or (
                        self._tag and named and digest in images):
                    continue  # another name has it
                while subject and subject in subjects and subject not in homes:
                    self._check()
                    subject = subjects[subject]
                own = self._tag or found.reference
                tag = own and not (self._tag and named) and own.tag or found.tag
                home = own.repository if own else not found.full and (
                    homes.get(subject) or tag and place)
                if not home:
                    raise UsageError("%s: no name in a registry: %s" % (
                        name, found.full or digest),
                        "try %s--keep-going" % ("--tag, or " * (len(images) == 1)))
                homes.update((one.digest, home) for one in found.documents)
                there = Reference.parse("%s/%s%s%s" % (self._host, self._prefix, home, (
                    ":" + tag if tag else "@" + str(digest))))
                if named.setdefault(there, digest) != digest:
                    raise UsageError("%s: two images would both be %s" % (name, there))
        if not (named or self._session.failures):
            raise OutputError(name, "no image is in it", READABLE)
        below = {}  # many names may have one digest
        for there, one in named.items():
            with self._session.trying(there):
                key = there.repository, one
                below[key] = below.get(key) or self._below(name, there, one)
                plans.append((there, *below[key]))
        return plans

    def _lend(self, names):
        """Notes where the blobs of these Stored are, if they were pushed as well."""
        for found in names:
            for one in found.documents if found.reference else ():
                home = self._prefix + found.reference.repository
                self._may.update((one, home) for one, _ in found.regions(one, lenient))

    @staticmethod
    def _names(stock):
        """(Digest of what it refers to or None, Stored) of what is to go from a Stock.
        What refers to another comes last, and goes where that goes.
        """
        if any(found.origin.indexes if found.origin else found.tree is not None
               and found.documents[1:] for found in stock.names):
            log.warning("the index of one image is not pushed: --platform all keeps it")
        below = {one.digest for found in stock.names if found.full or found.tag
                 for one in found.documents}
        names = [(getattr(stock.document(found), "subject", None), found)
                 for found in stock.names]
        return sorted([(subject, found) for subject, found in names if subject
                       or found.full or found.tag or found.digest not in below],
                      key=lambda name: bool(name[0] or name[1].along))

    def _below(self, name, reference, digest):
        """The documents below a digest, each behind what it lists, images first, and
        (Descriptor, Region) pairs of the blobs of these.
        """
        found = {one.digest: one for *_, one in walk(
            self._stock.document, [Descriptor("", digest, 0)])}
        order = {}
        while len(order) < len(found):  # a level more each time: indexes may share
            order.update((key, one) for key, one in found.items() if not any(
                entry.digest in found and entry.digest not in order
                for entry in getattr(one, "manifests", ())))
        documents = sorted(order.values(), key=lambda one: isinstance(one, Index))
        listed, lacking, elsewhere, blobs = {digest}, set(), set(), {}
        for one in documents:
            self._check()
            listed.update(entry.digest for entry in getattr(one, "manifests", ())
                          if not self._partial)
            found = self._stock.drawn[one.digest][1]
            elsewhere.update(found.without)
            with contextlib.suppress(FileNotFoundError):  # no config, then no layers
                for blob, file in found.blobs(one):
                    try:
                        blobs[blob.digest] = blob, found.reader.region(file)
                    except FileNotFoundError:
                        if not self._target.has_blob(reference.repository, blob):
                            lacking.add(blob.digest)
        listed.difference_update(blobs, order)
        lacking = listed.union(lacking).difference(blobs)
        if lacking:
            raise OutputError(name, "%s: neither here nor in the registry: %s" % (
                reference, ", ".join(sorted(map(str, lacking)))),
                "name what it builds on in --with PATH" if lacking <= elsewhere else
                "pull again" + ", or push what is here of an index with --partial"
                * bool(listed - {digest}))
        return documents, sorted(blobs.values(), key=lambda pair: -pair[1].size)

    def sizes(self, reference, blobs):
        """Bytes of these blobs to send, and of those there, or asked for before."""
        repository = reference.repository
        size, there = sum(at.size for _, at in blobs), sum(
            at.size for one, at in blobs
            if one.digest in self._has or self._target.has_blob(repository, one))
        self._has.update((blob.digest, repository) for blob, _ in blobs)
        return size - there, there

    def push(self, reference, documents, blobs):
        """Sends the (Descriptor, Region) pairs `blobs`, then the documents, each behind
        what it lists: the References by which what went is there.
        """
        target, notify, top = self._target, self._session.notify, documents[-1]
        repository, tag = reference.repository, reference.tag
        notify(Event("Pushing to " + repository, reference.tag_or_digest))
        for blob, region in blobs:
            notify(Event("Preparing", blob.digest.hex[:12], None, region.size))
        lent = collections.ChainMap(self._has, self._may)
        in_parallel(self._session, [
            (reference, lambda pair=pair: target.put_blob(
                repository, *pair, notify, lent.get(pair[0].digest)))
            for pair in blobs])
        if str(reference) in dict(self._session.failures or ()):
            return []
        self._has.update((blob.digest, repository) for blob, _ in blobs)
        made = isinstance(top, Index) and documents[1:] and all(
            one.subject and one.subject.tag == tag for one in documents[:-1])
        for one in documents[:-1] if made else documents:  # each is put on that list
            name = one is top and tag or one.digest
            try:
                target.put_manifest(repository, name, one)
            except RegistryError as error:
                kept = [one for one in documents if not isinstance(one, Index)]
                if self._partial and isinstance(one, Index) and kept and (
                        error.status in (400, 404, 422)):
                    log.warning("an index that lacks images is not taken: %s", error)
                    return self.push(reference, kept, blobs) if len(kept) == 1 else [
                        reference._replace(tag=None, digest=one.digest) for one in kept]
                if "MANIFEST_BLOB_UNKNOWN" in error.codes and not target.doubted:
                    target.doubted = True
                    return self.push(reference, documents, blobs)
                with contextlib.suppress(ImagecError):  # of a tag that must not change
                    if error.status not in RETRIED_STATUSES and (
                            str(error.url).endswith("/" + str(name))) and (
                            target.head_manifest(repository, name) == one.digest):
                        continue
                if isinstance(one, Schema1Manifest):
                    error.hint = "push what pull -o FILE.tar makes of the image"
                raise
        notify(Event("Digest: %s" % str(top.digest)))
        return [] if made else [reference._replace(digest=top.digest)]


def push(path: "str | os.PathLike", place: str, tag: "str | None" = None,
         partial: bool = False, progress: "collections.abc.Callable | None" = None,
         beside: list = (), **options) -> list:
    """Pushes what a pull wrote to `path`: the References there, each with its digest.

    `place` is `HOST[:PORT][/PREFIX]`; `tag` the name there, `NAME[:TAG]`, of the only
    image, None for its own; if `partial`, indexes may lack images; `beside` are paths
    of what an update builds on. For `progress`, `options` and what it raises see pull.
    """
    with Session(notify=progress, **options) as session:
        pusher, path, there = Pusher(session, place, tag, partial), os.fspath(path), []
        for image in pusher.plan(path, path, beside):
            with session.trying(image[0]):
                there += pusher.push(*image)
        for _, error in session.failures or ():
            raise error
        return there


def _run_push(args, session):
    import tempfile
    pusher, path = Pusher(session, args.place, args.tag, args.partial), args.path
    with contextlib.suppress() if path != "-" else tempfile.TemporaryDirectory(
            prefix="imagec-stdin-") as spool:
        if spool is not None:
            path = os.path.join(spool, "archive")
            with open(path, "wb", buffering=0) as file:
                drain(map(_Stream(file, path).write, waiting(
                    open(0, "rb", closefd=False), session.transport.check)))
        for image in pusher.plan(path, args.path, args.bases or ()):
            with session.trying(image[0]):
                if args.dry_run:
                    name, documents, blobs = image
                    yield from planned(
                        [str(name._replace(digest=documents[-1].digest))], "send",
                        *pusher.sizes(name, blobs), args.json)
                    continue
                for one in pusher.push(*image):
                    told = {"reference": str(one), "digest": str(one.digest)}
                    yield json.dumps(told) if args.json else str(one)


# --------------------------------------------------------------------------------------
# 20  Self-test*: prove that this host can pull
# --------------------------------------------------------------------------------------

def test_shelf(directory):
    """A Shelf of one small image of our own files; its blobs are in `directory`."""
    shelf, host, text = Shelf(), Platform.host(), b"This came through imagec.\n"
    owner = {"uid": os.geteuid(), "gid": os.getegid()} if hasattr(os, "geteuid") else {}
    tar = b"".join(tar_header(name, 0, b"5", 0o755, **owner) for name in (
        b"./", b"etc/")) + tar_header(b"etc/imagec", len(text), **owner) + text.ljust(
            TAR_BLOCK, b"\0") + bytes(2 * TAR_BLOCK)
    deflate = zlib.compressobj(6, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    blob = deflate.compress(tar) + deflate.flush()
    config = ImageConfig.parse(canonical_json({
        "os": host.os, "architecture": host.architecture, "variant": host.variant,
        "rootfs": {"type": "layers", "diff_ids": [str(Digest.of(tar))]}}))
    for data in (blob, config.raw):
        path = os.path.join(directory, Digest.of(data).hex)
        write_file(path, data)
        shelf.blobs[Digest.of(data)] = Region(path, 0, len(data))
    manifest = modern_manifest(
        config, [Descriptor(DOCKER_LAYER, Digest.of(blob), len(blob))])
    shelf.add(["selftest/image"], "latest", manifest)
    return shelf


def describe_host(rootless):
    """Yields (what, what it is, whether it will do); `rootless`: no CA certificate."""
    import shutil
    yield "Python", "%d.%d.%d" % sys.version_info[:3], True
    yield "TLS", ssl.OPENSSL_VERSION, True
    codecs = ["gzip"]
    for name in ("bzip2", "xz", "zstd"):
        with contextlib.suppress(ImportError):
            _decompressor(name)
            codecs.append(name)
    if "zstd" not in codecs and shutil.which("zstd"):
        codecs.append("zstd (by the zstd program)")
    yield "layers in", ", ".join(codecs), True
    paths = ssl.get_default_verify_paths()
    yield "CA roots", "none: " + NO_ROOTS if rootless else (
        paths.cafile or paths.capath or "the system's, or --cacert's"), not rootless
    # Their URLs may hold passwords.
    yield "proxies for", ", ".join(sorted(
        urllib.request.getproxies_environment())) or "none", True
    yield "disk here", "%d MB free" % (shutil.disk_usage(".").free // 10 ** 6), True


def pull_test_image(directory):
    """Pulls the test image in every format, over loopback; yields what was good."""
    shelf = test_shelf(directory)
    # Nothing of this host's, proxies, credentials or keys, has a part in it.
    options = {"no_creds": True, "verify_keys": ()}
    with serving(new_server(shelf, ("127.0.0.1", 0))) as server:
        name = "127.0.0.1:%d/selftest/image" % server.server_address[1]
        for format in OUTPUTS:
            if not OUTPUTS[format].images or format == "rootfs" and os.name != "posix":
                continue
            path = os.path.join(directory, format) + ".tar" * (format == "archive")
            image = pull(name, path, format, **options)
            faults = format != "rootfs" and Audit(image.path).faults
            if faults:
                raise VerificationError("; ".join(faults))
            yield format
        layer, zeros = image.layers[0], os.path.join(directory, "zeros")
        write_file(zeros, bytes(layer.blob_size))
        shelf.blobs[layer.digest] = Region(zeros, 0, layer.blob_size)
        shelf.blob = shelf.blobs.get  # which proves nothing
        try:
            pull(name, os.path.join(directory, "tampered"), **options)
        except VerificationError:
            yield "a tampered copy is refused"
        else:
            raise VerificationError("a tampered layer was taken")


def describe_registry(reference, repository, session):
    """Yields (what, what it is, whether it is good enough) of a Reference's registry.

    Where it asks who we are, that is tried for a `repository`, "" for none.
    """
    registry = session.registry(reference.api_host)
    yield "registry", registry.learn_registry_url(), True
    if registry.doubt:
        raise Unsupported("%s may be no registry: %s" % (registry.host, registry.doubt),
                          "check the host name")
    challenge = registry.challenge
    yield "asks for", "%s %s" % (challenge.scheme, printable(challenge.parameters.get(
        "realm", ""), 200)) if challenge else "nothing", True
    who = challenge and session.credentials(reference)
    if challenge:
        yield "we would be", str(who or "anonymous"), True
        if who:
            registry.log_in(repository)
        yield "lets us in", (registry.withheld or "yes") if who else (
            "where no login is needed"), not registry.withheld


def _run_selftest(args, session):
    import tempfile

    def proofs():
        try:
            for done in pull_test_image(directory):
                yield "proved", done, True
        except ImagecError as error:  # of any kind: what it means is always the same
            raise Unsupported("this host cannot pull images: %s" % error) from error

    good, (server, _, repository) = True, (args.host or DOCKER_HUB_API).partition("/")
    place = args.host is not None and Reference.parse(
        args.host and args.host + "/any/thing" * (not repository))
    with tempfile.TemporaryDirectory(prefix="imagec-") as directory:
        for what, value, fine in itertools.chain(
                describe_host(session.transport.tls.rootless(server)), proofs(),
                describe_registry(place, place.repository if repository else "",
                                  session) if place else ()):
            yield "%-12s %s%s" % (what, printable(value), "" if fine else
                                  " -- not enough")
            good = good and fine
    if not good:
        raise Unsupported("this host cannot pull images: see above")
    yield "this host can pull images"


# --------------------------------------------------------------------------------------
# 21  Command line: arguments, progress, exit statuses
# --------------------------------------------------------------------------------------

#: Of an error's classes the first that is here, itself before its bases, counts.
EXIT_STATUSES = {
    ImagecError: 1, OSError: 1, ImportError: 1, MemoryError: 1, TooLarge: 1,
    UsageError: 2, VerificationError: 3, InvalidDocument: 3, NotFound: 4,
    AccessDenied: 5, KeyboardInterrupt: 130, SystemExit: 143}  # of SIGTERM, see _ending


class Progress:
    """Standard error: what is logged, and the Events it is called with.

    A layer that is done has a line, and the rest one: on a terminal, if `kind` is
    "auto", a live one, redrawn in place; else it comes from time to time.
    """

    DONE = ("Download complete", "Already exists", "Pushed")
    level = Log.INFO  # from which on it tells what is logged

    def __init__(self, stream, kind="none", clock=time.monotonic):
        self.kind, self._stream, self._clock = kind, stream, clock
        self._terminal = getattr(stream, "isatty", bool)() and (
            os.environ.get("TERM", "dumb") != "dumb")
        self._layers = {}  # of this image: id -> bytes there, in all, whether done
        self._received, self._began, self._due = 0, clock(), 0
        self._shown = ""  # the live line that is on the screen
        self._lock = threading.Lock()

    def tell(self, level, text):
        """Tells what is logged; the live line comes back with the next Event."""
        kind = {Log.DEBUG: "debug: ", Log.WARNING: "warning: "}.get(level, "")
        with self._lock:
            self._write(["imagec: " + encodable(kind + text, self._stream)])

    def __call__(self, event):
        """Tells of an Event of a pull."""
        with self._lock:
            now, live = self._clock(), self.kind == "auto" and self._terminal
            interval = REDRAW_INTERVAL if live else PROGRESS_INTERVAL
            line, rest = "%s%s" % (event.id and event.id + ": ", event.status), ""
            if re.match("Pulling from |Pushing to |Digest: ", event.status):
                self._layers, self._received = {}, 0
                self._began, self._due = now, now + interval
            else:
                self._count(event)
                if event.status == "Resuming":
                    line += " at " + human_size(event.current)
                elif event.status not in self.DONE:
                    line = ""
            if self._layers and (now >= self._due or live and line):
                rest, self._due = self._rest(now), now + interval
            if line or rest:  # else what was drawn last stands on
                self._write(list(filter(None, [line, "" if live else rest])),
                            rest if live else "")

    def _count(self, event):
        before, total, _ = self._layers.get(event.id, (0, None, False))
        total = event.total if total is None else total
        there = before if event.current is None else event.current
        done = event.status in self.DONE
        if event.status in ("Downloading", "Pushing"):
            self._received += max(0, there - before)
        self._layers[event.id] = total or there if done else there, total, done

    def _rest(self, now):
        """Layers done and all, bytes there and all, rate, time left; ASCII only."""
        there, totals, done = zip(*self._layers.values())
        rate = self._received / max(now - self._began, 0.001)
        text = "%d/%d %s" % (sum(done), len(done), human_size(sum(there)))
        known = None not in totals  # as they are in schema1
        if known:
            text += "/" + human_size(sum(totals))
        if rate:
            text += " %s/s" % human_size(rate)
        if rate and known:
            text += " %d:%02d left" % divmod((sum(totals) - sum(there)) / rate, 60)
        return text

    def _write(self, lines, live=""):
        """Lines in the place of the live one, and that, cut where it would wrap."""
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full
            width = 0
            with contextlib.suppress(OSError, ValueError):  # not all terminals tell
                width = live and os.get_terminal_size(self._stream.fileno()).columns
            self._stream.write("".join(
                ["\r\x1b[K" if self._shown else "", *(line + "\n" for line in lines),
                 live[:(width or 40) - 1]]))
            self._stream.flush()
            self._shown = live


def human_size(size):
    """Bytes as people read them, in powers of 1000 as docker does."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return "%.3g%s" % (size, unit)
        size /= 1000
    return "%.4gTB" % size


def image_json(image):
    """An Image as a JSON-able dict, as `pull --json` prints it."""
    return {
        "reference": str(image.reference), "digest": str(image.digest),
        "image_id": image.image_id, "platform": image.platform and SECRETS.hide(
            str(image.platform)),
        "format": image.format, "path": image.path,
        "without": list(map(str, image.without)),
        "layers": [layer_json(layer, size=layer.size) for layer in image.layers]}


def layer_json(layer, **more):
    """A Layer as a JSON-able dict."""
    return dict(id=layer.id or None, digest=str(layer.digest),
                diff_id=layer.diff_id and str(layer.diff_id), **more,
                blob_size=layer.blob_size)


def pinned(image):
    """`NAME:TAG@DIGEST`: an Image's reference with its digest, None if it has none."""
    return image.reference and str(image.reference._replace(digest=image.digest))


def _run_pull(args, session):
    references = list(map(named, args.references or ())) + read_list(
        args.from_file, session.trying, session.transport.check)
    if not (references or session.failures):
        raise UsageError("nothing to pull: name a REF, or a list with --from-file")
    if args.tag is not None and len(references) > 1:
        raise UsageError("--tag names one image, as NAME[:TAG]")
    stream = getattr(sys.stdout, "buffer", None) if args.output == "-" else None
    if args.output == "-" and (stream is None or sys.stdout.isatty()):
        raise UsageError("standard output is closed or a terminal: no image goes there",
                         "pipe it on, or name a file with -o")
    outputs = []
    for path, format, wanted, sole in destinations(args, references):
        with session.trying(sole or path):
            outputs.append((new_output(path, format, args.tag, stream, sole), wanted))
    near = {}
    for output, wanted in outputs:
        images, output.near = [], near
        with session.trying(output.sole or output.path):
            if args.dry_run:
                puller = Puller(session, output)
                found = puller.resolve(wanted, args.platform)
                yield from planned(
                    [pinned(image) for image in found if image.subject is None],
                    "fetch", *map(sum, zip((0, 0), *puller.plan(found))), args.json)
                continue
            images = session.pull(wanted, output, args.platform)
        for image in images:
            line = json.dumps(image_json(image)) if args.json else pinned(image)
            if stream is None:
                yield line
            elif args.json or not args.quiet:
                with contextlib.suppress(OSError):  # the image is out
                    print_result(line, sys.stderr)
        if images and stream is None:
            import shutil
            path = output.path
            if re.search(r"[^\w@%+=:,./\\-]", path):  # as a shell wants it
                path = "'%s'" % path.replace("'", "'\\''")
            programs = ["docker", "podman"] if output.format == "archive" and any(
                image.config for image in images) else []
            if images[1:] and any(image.without for image in images):
                del programs[1:]  # podman takes one image without its layers, no more
            programs = list(filter(shutil.which, programs))[:1] or programs
            if programs or output.path != args.output:
                log.info("%s%s%s", output.path, ": " if programs else "", " or ".join(
                    "%s load -i %s" % (name, path) for name in programs))


def destinations(args, references):
    """(path, format, References, the one it has the name of) of each output."""
    path, format, names = os.path.expanduser(args.output or ""), args.format, {}
    own = format != "layers" if args.output is None else (
        format in (None, "archive") and (path[-1:] in ("/", os.sep)
                                         or os.path.isdir(path)))
    kept = format_of(path) if own and os.path.isdir(path) else None
    if kept or not own:
        return [("images" if args.output is None else path, format or kept, references,
                 None)]
    platform = "+".join(str(parse_platform(one)).replace("/", "-")
                        for one in args.platforms or ())
    for one in references:
        name = os.path.join(path, "_".join(filter(None, (
            one.repository.rpartition("/")[2], "%.32s-%.12s" % one.digest
            if one.digest else one.tag, platform, args.without and "update")))
            + ".tar" * (format in (None, "archive")))
        if names.setdefault(name, one) != one:
            raise UsageError("%s and %s would both be %s; use -o FILE" % (
                names[name], one, name))
    return [(name, format or "archive", [one], one) for name, one in names.items()]


def read_list(path, trying, check):
    """The References in a file in UTF-8, one a line; "#" begins a comment. None: none.

    A line is read inside of `trying(where it stands)`; for `check` see waiting.
    """
    if path is None:
        return []
    if path == "-" and sys.stdin is None:
        raise UsageError("--from-file -, but standard input is closed")
    references, number, where = [], 0, "standard input" if path == "-" else path
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as file:
            text = b"".join(waiting(file, check))
            for number, line in enumerate(text.split(b"\n"), 1):
                # Windows puts U+FEFF before files, which some join.
                line = line.decode("utf-8").lstrip("\ufeff").partition("#")[0].strip()
                with trying("%s, line %d" % (where, number)):
                    references += [Reference.parse(line)] if line else []
    except ValueError as error:
        raise UsageError("%s, line %d: %s" % (where, number, error)) from None
    return references


def _run_layers(args, session):
    for layer in asked(args, session).layers:
        size = "-" if layer.blob.size is None else layer.blob.size
        yield json.dumps(layer_json(layer)) if args.json else (
            "%s %s %s" % (layer.id or "-", layer.digest, size))


def _run_inspect(args, session):
    outermost = args.raw and args.platform is None
    image = asked(args, session, outermost)
    if args.raw:
        yield image.raw if outermost else image.manifest.raw
    elif not args.config:
        yield json.dumps(hidden(dict(
            inspection(image), referrers=referrers_json(image, session))), indent=2)
    elif image.config is None:
        raise Unsupported("%s is schema1, an artifact or an index: it has no config"
                          % args.reference, "see what it has with inspect --raw")
    else:
        yield image.config.raw


def inspection(image):
    """An Image as a JSON-able dict, as `inspect` prints it; sizes are in bytes."""
    documents = {one.digest: one for one in (
        image.indexes + (image.manifest,) + image.below)}
    value = {
        "reference": pinned(image), "digest": str(image.digest),
        "media_type": documents[image.digest].media_type,
        "manifest_digest": str(image.manifest.digest),
        "image_id": image.image_id, "platform": image.platform and str(image.platform),
        "artifact_type": image.manifest.artifact_type or None,
        "total_size": total_size(documents.values()),
        "layers": list(map(layer_json, image.layers))}
    if image.config is not None:
        value.update((key, image.config.value[key]) for key in (
            "created", "author", "config") if image.config.value.get(key) is not None)
        value["history"] = list(history_json(image))
    if image.signed:
        value["signed_by"] = [{"key": key, "digest": str(digest)}
                              for key, digest, _ in image.signed]
    value["platforms"] = [
        {"platform": str(entry.platform), "digest": str(entry.digest),
         "size": entry.size, "total_size": total_size([documents.get(entry.digest)])}
        for index in documents.values() if isinstance(index, Index)
        for entry in index.manifests
        if entry.platform and entry.platform.os != "unknown"]
    return value


def referrers_json(image, session):
    """What refers to an image and to its indexes, None where that cannot be told."""
    documents = image.indexes + (image.manifest,)
    notes = "vnd.docker.reference.digest", "vnd.docker.reference.type"
    rows = [(*map(entry.annotations.get, notes), None, entry)  # by buildkit
            for one in documents if isinstance(one, Index)
            for entry in one.manifests if notes[0] in entry.annotations]
    try:
        if image.stored is None:
            place = session.source(image.reference)
            if place.home.url is None:  # it may be out of reach, and take its time
                raise Unsupported("only a mirror was asked, not %s itself"
                                  % place.home.host)
        else:
            place = Stock(image.stored.reader)
        rows += [(str(one.digest), entry.artifact_type, tag, entry)
                 for one in documents
                 for tag, entries in place.referrers(one.digest).items()
                 for entry in entries]
        return [{"subject": subject, "type": kind, "tag": tag,
                 "digest": str(entry.digest), "size": entry.size}
                for subject, kind, tag, entry in rows]
    except ImagecError as error:
        log.warning("what refers to it cannot be told: %s", error)
        return None


def total_size(documents):
    """Bytes of what the Manifests among these lead to, None where there is none."""
    sizes = {blob.digest: blob.size for one in documents if isinstance(one, Manifest)
             for blob in (one.config,) + one.layers}
    return sum(sizes.values()) if sizes else None


def history_json(image):
    """Yields the steps of an image's history, each with the layer it made, if any.

    `digest` and `size` are None where history and layers do not line up.
    """
    steps = image.config.value.get("history")
    steps = [one for one in steps if type(one) is dict] if type(steps) is list else []
    full = [step.get("empty_layer") is not True for step in steps]
    layers = iter(image.layers if sum(full) == len(image.layers) else ())
    for step, made in zip(steps, full):
        layer = next(layers, None) if made else None
        yield dict(step, digest=layer and str(layer.digest),
                   size=layer and layer.blob_size if made else 0)


def _run_digest(args, session):
    outermost = args.platform in (None, "all")
    found = asked(args, session, outermost)
    digest = str(found.digest if outermost else found.manifest.digest)
    yield json.dumps({"reference": args.reference, "digest": digest}) if (
        args.json) else digest


def _run_auth(args, session):
    host, _, repository = args.host.partition("/")
    if not re.fullmatch(_HOST, host):
        raise UsageError("not a registry: %s" % shown(args.host, 100),
                         "expected HOST[:PORT][/REPOSITORY], without what ends in ://")
    found = session.credentials(Reference(host, repository, None, None))
    yield json.dumps(hidden({
        "registry": args.host, "username": found and found.username,
        "source": found and found.source})) if args.json else printable("%s: %s" % (
            args.host, found or "anonymous, no source has credentials for it"))


#: A number in a tag, a mark of what comes before a release (PEP 440, semver.org), else.
_VERSION_PART = ("([0-9]+)|((?:alpha|beta|milestone|rc|cr|pre|preview|dev|snapshot"
                 "|nightly|canary)(?![a-z])|[abm](?=[0-9]))|([a-z]+)")


def version_key(tag):
    """What sorts tags by version: numbers as such, a pre-release before its release."""
    parts = [(2, int(number)) if number else (0, mark) if mark else (1, word)
             for number, mark, word in re.findall(
                 _VERSION_PART, re.sub("^v(?=[0-9])", "", tag.lower()))]
    return parts + [(1, "")], tag


def _run_tags(args, session):
    import fnmatch
    import heapq
    if args.newest is not None and args.newest < 1:
        raise UsageError("--newest %d: expected 1 or more" % args.newest)
    name = named(args.reference)._replace(digest=None)
    tags = (tag for tag in session.registry(name.api_host).tags(name.repository)
            if fnmatch.fnmatchcase(tag, args.match))
    if args.newest is not None:
        tags = heapq.nlargest(args.newest, (
            tag for tag in tags if re.match("(?!sha[0-9]+-).*[0-9]", tag)), version_key)
    for tag in tags:
        full = str(name._replace(tag=tag))
        yield json.dumps(hidden({"tag": tag, "reference": full})) if args.json else (
            SECRETS.hide(full if args.full else tag))


def print_result(result, stream):
    """A result: a text, or exact bytes, of which a terminal gets none it might obey."""
    if stream is None:  # closed
        return
    if isinstance(result, bytes):
        if hasattr(stream, "buffer") and not stream.isatty():  # Jupyter's has none
            stream.buffer.write(result)
            stream.buffer.flush()
            return
        lines = result.decode("utf-8", "surrogateescape").split("\n")
        result = "\n".join(map(printable, lines[:-1] + list(filter(None, lines[-1:]))))
    print(encodable(result, stream), file=stream, flush=True)


def encodable(text, stream):
    """`text` with what the stream cannot encode escaped."""
    encoding = getattr(stream, "encoding", None) or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


#: Command -> (function of the arguments and a Session that gives the results, help).
COMMANDS = {
    "pull": (_run_pull, "fetch images, every byte checked"),
    "layers": (_run_layers, "list an image's layers, oldest first: id, digest, bytes"),
    "ls": (_run_ls, "list the files of an image, those below a path"),
    "cat": (_run_cat, "print one file of an image"),
    "inspect": (_run_inspect, "say what an image is"),
    "digest": (_run_digest, "print the manifest's digest"),
    "auth": (_run_auth, "say which credentials would be used for a registry"),
    "serve": (_run_serve, "serve what was pulled as a read-only registry"),
    "push": (_run_push, "send what was pulled to a registry, digests kept"),
    "selftest": (_run_selftest, "prove that this host can pull"),
    "verify": (_run_verify, "re-check, offline, what a pull wrote"),
    "tags": (_run_tags, "list a repository's tags"),
}
_ANY = " ".join(COMMANDS)
_IMAGE = "layers ls cat inspect digest"
_PULLS, _SIGNED = "pull " + _IMAGE, "pull verify " + _IMAGE
_NETWORK = "push tags selftest " + _PULLS
_REF = "[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]"


class Row(value_type("flags attribute metavar commands explained default")):
    """An option of some commands, or an argument, which has no `flags`.

    `metavar` stands for its value: in lowercase, the choices; with "...", several; in
    "[]", an argument that may be missing; "" for a switch.
    """

    @classmethod
    def of(cls, words, commands, explained, default=None):
        """The Row of its names, the last that of an attribute, and its metavar."""
        *names, metavar = words.split()
        if metavar[0] == "-":
            names, metavar, default = names + [metavar], "", False
        return cls([name for name in names if name[0] == "-"], names[-1].strip(
            "-").replace("-", "_"), metavar, commands.split(" "), explained, default)

    def as_argparse(self):
        """What add_argument takes besides its name."""
        more = {"default": self.default, "help": self.explained}
        if not self.metavar:
            return dict(more, action="store_true")
        if self.default:
            more["help"] += "; default: %(default)s"
        if self.metavar.islower():
            more["choices"] = self.metavar.split("|")
        if self.flags:
            more.update(dest=self.attribute,
                        action="append" if "..." in self.metavar else "store")
        elif "..." in self.metavar:
            more["nargs"] = "*" if self.metavar[0] == "[" else "+"
        elif self.metavar[0] == "[":
            more["nargs"] = "?"
        return dict(more, metavar=self.metavar, type={
            "N": int, "BYTES": int, "SECONDS": float}.get(self.metavar, str))


OPTIONS = [Row.of(*row) for row in (
    ("references [REF...]", "pull", _REF),
    ("reference REF", _IMAGE, _REF + ", or a path: ./PATH, /PATH or FILE.tar"),
    ("reference REPO", "tags", "[HOST[:PORT]/]REPOSITORY"),
    ("path PATH", "verify push", "a layers tree, layout or archive; push: - is stdin"),
    ("paths PATH...", "serve", "what pulls wrote; a name that two have is the first's"),
    ("path PATH", "cat", "the file"), ("path [PATH]", "ls", "files below it", "/"),
    ("place HOST[:PORT][/PREFIX]", "push", "where to"),
    ("host HOST[:PORT][/REPOSITORY]", "auth", "which registry"),
    ("host [HOST[:PORT]]", "selftest", "a registry to look at too"),
    ("--from-file LIST", "pull", "references, one a line, # comments; - is stdin"),
    ("-o --output PATH", "pull", "FILE.tar, DIR/, -, a tree; default: NAME_TAG.tar"),
    ("--format " + "|".join(OUTPUTS), "pull", "default: what PATH says"),
    ("--recompress gzip", "pull", "rewrite zstd layers for old Docker; digests change"),
    ("--referrers", "pull", "take along what refers to it (to oci or archive)"),
    ("--without REF|PATH...", "pull", "leave out what this has (to oci or archive)"),
    ("--path below PATH", "pull", "take only what is below it (to rootfs)"),
    ("--tag NAME[:TAG]", "pull push", "the name to go by; default: its own"),
    ("--partial", "push", "push indexes that lack images, too"),
    ("--raw", "inspect", "the manifest's exact bytes"),
    ("--config", "inspect", "the config's exact bytes"),
    ("--match GLOB", "tags", "only these: * ? [] in it", "*"),
    ("--newest N", "tags", "the newest versions, newest first; none without a digit"),
    ("--full", "tags", "as REPOSITORY:TAG, which pull --from-file - takes"),
    ("--with bases PATH...", "verify push", "where blobs missing from PATH may be"),
    ("--listen HOST:PORT", "serve", "the address to serve at", "127.0.0.1:5000"),
    ("--tls-cert FILE", "serve", "PEM certificate: serve https, with"),
    ("--tls-key FILE", "serve", "its PEM key"),
    ("--max-layer-size BYTES", "pull ls cat", "refuse larger ones", LAYER_SIZE_LIMIT),
    ("--max-files N", "pull ls cat", "refuse to unpack more", MEMBER_COUNT_LIMIT),
    ("--keep-going", "pull push", "where one of several images fails, go on"),
    ("--dry-run", "pull push", "say what would be fetched or sent, and stop"),
    ("-j --jobs N", "pull push", "connections at once", JOBS),
    ("--progress auto|plain|none", "pull push", "a line redrawn, or lines", "auto"),
    ("--json", "pull push layers ls inspect digest auth verify tags", "as JSON"),
    ("--platform platforms OS/ARCH[/VARIANT]...", _PULLS, "default: this host's; "
     "several: to oci or archive; all: the whole index, to oci"),
    ("--image NAME", "verify " + _IMAGE, "which of several at a path"),
    ("--verify-key verify_keys FILE...", _SIGNED, "PEM; one of these must have signed"),
    ("--verify-name HOST/REPOSITORY", _SIGNED, "and under this name"),
    ("--no-verify-key", _SIGNED, "take it, whoever signed it"),
    ("--mirror mirrors HOST[:PORT][/PREFIX]...", _PULLS, "try there first"),
    ("-u --username USER", "auth serve " + _NETWORK, "password: IMAGEC_PASSWORD, or"),
    ("--password-stdin", "auth serve " + _NETWORK, "all of stdin; a terminal is asked"),
    ("--authfile FILE", "auth " + _NETWORK, "the only file of credentials looked into"),
    ("--no-creds", "auth " + _NETWORK, "use no credentials that lie around"),
    ("--token-host token_hosts HOST[:PORT]...", _NETWORK, "may be sent the password"),
    ("--storage-host storage_hosts HOST[:PORT]...", _NETWORK, "may be redirected to"),
    ("--cacert FILE", _NETWORK, "PEM roots to trust besides the system's"),
    ("--cert FILE", _NETWORK, "PEM client certificate, with"),
    ("--key FILE", _NETWORK, "its PEM key"),
    ("--proxy URL", _NETWORK, "http://, socks5:// or socks5h://"),
    ("--insecure-skip-verify", _NETWORK, "take any TLS certificate of the registry, "
     "its mirrors, token and storage hosts"),
    ("--insecure-allow-http", _NETWORK, "fall back to unverified https, then to http"),
    ("--timeout SECONDS", "verify serve " + _NETWORK, "for all; default: no limit"),
    ("-q --quiet", _ANY, "no progress, few warnings"),
    ("--debug", _ANY, "log each step; tracebacks of errors"))]


def parse_arguments(argv):
    """The arguments of a command line, by the attributes of all Rows; None for those of
    other commands. Raises UsageError; SystemExit where --help or --version told all.
    """
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UsageError(message, "see %s --help" % self.prog)

    command = argv[0] if argv and argv[0] in COMMANDS else ""
    about = COMMANDS[command][1] if command else (__doc__ or "").partition("\n")[0]
    prog, rows = ("imagec.py " + command).strip(), [
        row for row in OPTIONS if command in row.commands]
    parser = Parser(prog, " ".join([prog, "[options]" if command else "COMMAND ..."] + [
        row.metavar for row in rows if not row.flags]), about,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {"-h": "", "--help": ""}
    for row in rows:
        parser.add_argument(*row.flags or [row.attribute], **row.as_argparse())
        known.update((flag, row.metavar) for flag in row.flags)
    if not command:
        commands, known["--version"] = parser.add_argument_group("commands"), ""
        for name, (_, explained) in COMMANDS.items():
            commands.add_argument(name, nargs="*", help=explained)
        digest = "unknown"  # as where this comes from a pipe
        with contextlib.suppress(NameError, AttributeError, OSError):
            digest = "--version" in argv and Digest.of(__loader__.get_data(__file__))
        parser.add_argument("--version", action="version",
                            version="imagec %s %s" % (__version__, digest))
    args, rest = parser.parse_known_args(
        _in_order(argv[bool(command):], known, parser.error))
    if not command:
        parser.error("no such command: '%s'" % shown(argv[0], 100) if argv else
                     "no command: begin with imagec.py pull alpine")
    if rest:  # not shown, as below
        parser.error("more arguments than it takes: %d" % len(rest))
    return argparse.Namespace(command=command, **dict(
        dict.fromkeys(row.attribute for row in OPTIONS), **vars(args)))


def _in_order(argv, known, refuse):
    """The words of a command line as argparse should have them: options come first.

    By itself argparse takes beginnings of options for these, repeats what was typed
    behind one, maybe a password, and before 3.7 has no arguments between options.
    `known` has each option's metavar, "" for a switch; `refuse` raises.
    """
    options, words, todo = [], [], collections.deque(argv)
    while todo:
        text = todo.popleft()
        name, given, _ = text.partition("=")
        if text == "--":
            words += todo
            break
        if not re.match("-.", text):
            words.append(text)
            continue
        if text[:2] != "--":  # of -qj1 the -j: the first that takes a value
            name = next(("-" + one for one in text[1:] if known.get("-" + one, True)),
                        text[:2])
            given = known.get(name) and text.partition(name[1])[2]
        if name not in known:
            refuse("all on this host can read a password on the command line: give it "
                   "with --password-stdin or in IMAGEC_PASSWORD"
                   if re.match("-p|--pass|--creds", name) else "no such option: " + name
                   + "; options come behind the command" * ("--version" in known))
        if given and not known[name]:
            refuse("%s takes no value" % name)
        if known[name] and not given:
            if not todo or re.match("-.", todo[0]):
                refuse("%s: expected %s" % (name, known[name]))
            text += "=" * (text[:2] == "--") + todo.popleft()
        options.append(text)
    return options + ["--"] * bool(words) + words


def read_password(args):
    """The password for -u, which a terminal is asked for; None where there is no -u."""
    if args.username is None and not args.password_stdin:
        return None
    if args.username is None or ":" in args.username:
        raise UsageError("a password goes with -u USER, a name without a colon",
                         "the password comes from IMAGEC_PASSWORD or --password-stdin")
    password = not args.password_stdin and os.environ.get("IMAGEC_PASSWORD")
    if not password and sys.stdin is not None and sys.stdin.isatty():
        import getpass
        ended = types.SimpleNamespace(stop=None, watched=0)
        with contextlib.suppress(EOFError), _ending(ended):  # or it would stay dark
            password = getpass.getpass("Password of %s: " % printable(args.username))
    elif args.password_stdin:
        if sys.stdin is None or "-" in map(vars(args).get, ("from_file", "path")):
            raise UsageError("--password-stdin, but standard input is closed, or is "
                             "the list of --from-file, or what to push")
        password = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    password = re.sub("\r?\n\\Z", "", password or "")
    if not password:
        raise UsageError("no password for user %s, or an empty one" % args.username,
                         "give it in IMAGEC_PASSWORD or with --password-stdin")
    return password


def exit_status(error):
    """The exit status an error means; None for one that is a defect of ours."""
    return next(filter(None, map(EXIT_STATUSES.get, type(error).__mro__)), None)


def main(argv: "list | None" = None) -> int:
    """Runs the arguments `argv`; gives the exit status. None: sys.argv's, and exits."""
    if argv is None:  # what zipapp makes drops what comes back
        sys.exit(main(sys.argv[1:]))
    with contextlib.suppress(FileNotFoundError):  # in a bare chroot
        spare = 0
        while spare < 3:  # or a file would take a closed stream's place, and its output
            spare = os.open(os.devnull, os.O_RDWR)
        os.close(spare)
    argv, progress = list(argv), Progress(sys.stderr)
    args = types.SimpleNamespace(command="", debug=False)
    log.listeners.append(progress)
    try:
        try:
            args = parse_arguments(argv)
        except SystemExit:  # --help or --version told all
            return 0
        if args.debug or args.quiet:
            progress.level = Log.DEBUG if args.debug else Log.ERROR
        return _run(args, progress)
    except (ImagecError, OSError, ImportError, MemoryError, KeyboardInterrupt,
            SystemExit) as error:
        if isinstance(error, OSError):
            _forget(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return 1  # who read our output has had enough
        if args.debug:
            import traceback
            for line in traceback.format_exc().splitlines():
                log.debug("%s", line)
        log.error("%s", _local_words(error, args) if isinstance(error, OSError)
                  else lacking(error) if isinstance(error, ImportError)
                  else "out of memory" + "; less is wanted with -j1" * hasattr(
                      args, "jobs") if isinstance(error, MemoryError)
                  else str(error) or "interrupted" + "; run it again to go on" * (
                      args.command in ("pull", "push") and args.output != "-"))
        return exit_status(error)
    finally:
        log.listeners.remove(progress)
        _forget(sys.stderr)


def _run(args, progress):
    progress.kind = "none" if args.quiet else args.progress or "none"
    if (args.cert is None) != (args.key is None):
        raise UsageError("--cert and --key go together")
    code = Session.__init__.__code__  # which names what it takes
    options = {name: value for name, value in vars(args).items()
               if value is not None and name in code.co_varnames[:code.co_argcount]}
    if args.no_verify_key is not False:  # or no name means an image in a registry
        options.setdefault("verify_keys", ())
    if args.no_verify_key:
        if options["verify_keys"]:
            raise UsageError("--verify-key and --no-verify-key contradict one another")
        log.error("warning: --no-verify-key: what comes is taken, whoever signed it")
    args.platform = args.platforms and parse_platform(args.platforms)
    if isinstance(args.platform, list) and args.command != "pull":
        raise UsageError("%s takes one --platform" % args.command)
    with Session(password=read_password(args),
                 notify=None if progress.kind == "none" else progress,
                 client_pair=None if args.cert is None else (args.cert, args.key),
                 **options) as session, _ending(session.transport):
        for result in COMMANDS[args.command][0](args, session):
            print_result(result, sys.stdout)
        for what, error in session.failures or ():
            log.error("failed: %s: %s", what, _local_words(error, args) if isinstance(
                error, OSError) else error)
        if session.failures:
            log.error("failed: %d", len(session.failures))
            return exit_status(session.failures[0][1])
    return 0


@contextlib.contextmanager
def _ending(transport):
    """SIGTERM and Ctrl-C unwind the stack, so that nothing half-made stays behind."""
    import signal

    def end(number, _frame):
        if transport.stop is not None:
            return  # clearing up is cut short by _second_signal, not here
        # Raised in a finalizer, Python drops it: the next check finds it again.
        transport.stop = SystemExit("ended by SIGTERM") if (
            number == signal.SIGTERM) else KeyboardInterrupt()
        if not transport.watched:
            raise transport.stop

    def dropped(unraisable):
        if unraisable.exc_value is not transport.stop:
            hook(unraisable)

    hook, sys.unraisablehook = getattr(sys, "unraisablehook", None), dropped  # 3.8
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            before[signal.SIGTERM] = signal.signal(signal.SIGTERM, end)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                before[signal.SIGINT] = signal.signal(signal.SIGINT, end)
        with _second_signal(before):
            yield
    except Exception:  # as where a thread is just being started
        raise transport.stop or sys.exc_info()[1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


@contextlib.contextmanager
def _second_signal(numbers):
    """A second of these signals leaves CLEARING_UP seconds, no more.

    A thread hears of them: Python runs no handler while a system call does not return.
    """
    import signal
    if not numbers or os.name != "posix":
        yield
        return
    ours, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    done = threading.Event()

    def listen():
        heard = 0
        for number, in iter(lambda: os.read(ours, 1), b""):
            heard += number in numbers
            if heard > 1 and not done.wait(CLEARING_UP):
                os._exit(128 + number)

    thread = threading.Thread(target=listen, daemon=True)
    before = signal.set_wakeup_fd(wakeup)
    try:
        with contextlib.suppress(RuntimeError):  # none to be had: then just the first
            thread.start()
        yield
    finally:
        signal.set_wakeup_fd(before)
        done.set()
        os.close(wakeup)
        with contextlib.suppress(RuntimeError):
            thread.join()
        os.close(ours)


def _local_words(error, args):
    """An OSError of this host in words: which file, what is wrong, what to do."""
    name = error.filename2 or error.filename  # of a rename, where it was to lead
    place = "choose another place with " + (
        "-o" if args.command == "pull" and args.output != "-" else "TMPDIR")
    kind = errno.errorcode.get(error.errno)  # some are what a file system may not do
    hint = ("; free some space or " + place if kind in ("ENOSPC", "EDQUOT") else
            "; " + place if kind == "EFBIG" or args.command == "pull" and name and (
                kind in ("EROFS", "EPERM", "ENOSYS", "EINVAL")) else
            "; it is mounted there: write into it with -o -" if kind == "EBUSY" else "")
    if name is None and hint:
        name, hint = "standard output", ""
    return "%s%s%s" % ("" if name is None else (printable(name) or "''") + ": ",
                       _reason(error), hint)


def _forget(stream):
    """What it does not take is lost: Python flushes it at exit, and would complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, no file
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


if __name__ == "__main__":
    if hasattr(gc, "freeze"):  # 3.7
        gc.freeze()  # looking through all that takes 8 ms each time
    gc.enable()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
