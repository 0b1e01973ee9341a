"""The tokens in use in this process, and the one scan for them: files and comments are refused, lines of a log dropped.

A token is found as it stands, as Markdown, HTML, JSON or an address write it, in hexadecimal, and inside of base64. Not
here: where texts leave (the stores, github, the shells), and what environment others get (environment).
"""

from __future__ import annotations

import base64
import html
import os
import re
import sys
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import redirect_stderr, redirect_stdout
from itertools import count
from typing import Any, TextIO, cast

from merger.errors import Problem, UploadError
from merger.safety.environment import LEAST, OURS

_LINE_KEPT = 4096
_DECODED_BYTES = 4 << 20
"""What is larger is a tokenizer, copied or put together, and nothing that a template wrote."""

_HINT = "find out how it came there; if somebody may have read it before, take back the token and make a new one"

_ADDRESS_SAFE = bytes.maketrans(b"+/", b"-_")
_ENCODED = re.compile(
    rb"%([0-9A-Fa-f]{2})|&#0*([0-9]{1,3});|&#[xX]0*([0-9A-Fa-f]{1,2});|\\u00([0-9A-Fa-f]{2})|&(amp|lt|gt|quot|lowbar);"
    rb"|\\(?=[!-/:-@\[-`{-~])"
)

_kept: set[str] = set()
_held: dict[int, tuple[str, ...]] = {}
_numbers = count()


class LeakError(UploadError):
    """A token was about to leave."""


# ---- the tokens -----------------------------------------------------------------------------------------------------


def watch_for(*tokens: object) -> None:
    """Look out for these from now on, as far as they are texts that are long enough."""
    _kept.update(_texts(tokens))


def hold(owner: object, *tokens: object) -> None:
    """Look out for these for as long as their owner lives: a server must not remember what its visitors bring."""
    if found := _texts(tokens):
        number = next(_numbers)
        _held[number] = found
        weakref.finalize(owner, _held.pop, number, None).atexit = False


def take_out(environment: MutableMapping[str, str] = os.environ) -> None:
    """Remove our secrets from an environment once all have read them, so that nothing started from here gets them."""
    watch_for(*(environment.pop(name, None) for name in OURS))


def _texts(tokens: tuple[object, ...]) -> tuple[str, ...]:
    return tuple(token for token in tokens if isinstance(token, str) and len(token) >= LEAST)


def _in_use() -> set[str]:
    set_now = _texts(tuple(os.environ.get(name) for name in OURS))
    return {*_kept, *set_now, *(token for tokens in list(_held.values()) for token in tokens)}


# ---- the scan -------------------------------------------------------------------------------------------------------


def leaks(content: str | bytes) -> bool:
    """Whether a token in use stands in it."""
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    tokens = [token.encode("utf-8", "surrogatepass") for token in _in_use()]
    read = [raw]
    if tokens and len(raw) <= _DECODED_BYTES:
        read.append(_ENCODED.sub(_decode, raw))
    return any(form in text for text in read for token in tokens for form in _forms(token))


def _decode(found: re.Match[bytes]) -> bytes:
    """The letter that an address, HTML or JSON has written otherwise; nothing for Markdown's backslash."""
    percent, decimal, hexadecimal, escape, name = found.groups()
    if digits := percent or hexadecimal or escape:
        return bytes([int(digits, 16)])
    if decimal:
        return bytes([int(decimal) & 255])
    return html.unescape(found[0].decode()).encode() if name else b""


def _forms(token: bytes) -> Iterator[bytes]:
    """A token as it stands, in hexadecimal, and the part of it that is the same wherever base64 comes upon it."""
    yield from (token, token.hex().encode(), token.hex().upper().encode())
    for before in range(3):
        whole = base64.b64encode(bytes(before) + token)
        inner = whole[-(-8 * before // 6) : 8 * (before + len(token)) // 6]
        yield from (inner, inner.translate(_ADDRESS_SAFE))


def refuse_tokens(texts: Mapping[str, str | bytes]) -> None:
    """Let none of these leave with a token in it.

    Args:
        texts: what is about to leave, by what it is called.

    Raises:
        LeakError: for each that holds a token in use; it says which it is, and not the token.
    """
    found = [name for name, content in texts.items() if leaks(name) or leaks(content)]
    called = ("a file's name" if leaks(name) else name for name in found)
    if problems := [Problem(f"{name} holds a token in use: it does not leave", hint=_HINT) for name in called]:
        raise LeakError(problems)


def pass_pieces(name: str, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces of a file, up to the first one with which a token stands in it.

    Raises:
        LeakError: one does.
    """
    before = b""
    for piece in pieces:
        refuse_tokens({name: before + piece})
        yield piece
        before = (before + piece)[-_LINE_KEPT:]


# ---- logs -----------------------------------------------------------------------------------------------------------


class Sieve:
    """A stream of text that drops each line with a token in it.

    Args:
        stream: where all else goes.
        ends: whether a dropped line is an error, too.
    """

    def __init__(self, stream: TextIO, ends: bool = True) -> None:
        self._stream, self.ends, self.has_dropped = stream, ends, False
        self._line, self._is_open = "", False

    def write(self, text: str) -> int:
        """Pass it on line by line.

        Raises:
            LeakError: a line was dropped.
        """
        passed = [self._passed(piece) for piece in text.splitlines(keepends=True)]
        self.has_dropped |= not all(passed)
        if self.ends and not all(passed):
            self._end_line()
            raise _leak_dropped()
        return len(text)

    def _passed(self, piece: str) -> bool:
        """A line may come in several pieces; after one that is dropped so is its rest."""
        self._line = (self._line + piece)[-_LINE_KEPT - len(piece) :]
        is_good = not leaks(self._line)
        if is_good:
            self._stream.write(piece)
            self._is_open = True
        if piece.endswith(("\n", "\r")):
            self._is_open &= not is_good
            self._end_line()
        return is_good

    def _end_line(self) -> None:
        """Where some of a line was passed on and its end is not, end it."""
        if self._is_open:
            self._stream.write("\n")
        self._line, self._is_open = "", False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _leak_dropped() -> LeakError:
    return LeakError(Problem("a line of the log held a token that is in use here: it was dropped", hint=_HINT))


def sieve(stream: TextIO, ends: bool = True) -> TextIO:
    """The stream behind a sieve."""
    return cast("TextIO", Sieve(stream, ends))


def watch(run: Callable[[], int]) -> int:
    """The exit code of a command whose standard output and error go through one; a bug's traceback is no exception.

    A dropped line ends the command, and makes its exit code that of a refused upload.
    """
    out, err = Sieve(sys.stdout), Sieve(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = run()
        except LeakError as error:
            print(error, file=sys.stderr)
            code = error.exit_code
        except Exception:
            out.ends = err.ends = False
            traceback.print_exc()
            code = 1
        if (out.has_dropped or err.has_dropped) and code != LeakError.exit_code:
            print(_leak_dropped(), file=sys.stderr)
            code = LeakError.exit_code
    return code
