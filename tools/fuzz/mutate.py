"""Changes to files: of any bytes, and of the things that a format is made of, so that a change gets past its parser."""

from __future__ import annotations

import copy
import gzip
import json
import struct
import zlib
from random import Random
from typing import Any

import nibabel as nib
import numpy as np

NUMBERS = (0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 32767, -32768, 65535, 2**31 - 1, -(2**31), 2**63 - 1)
REALS = (0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, float("inf"), float("-inf"), float("nan"))
CODES = (4, 8, 16, 64, 512, 768, 1024, 1280, 1536, 2304)  # NIfTI's numbers of data types
PLACES = (352.0, 540.0, 544.0, -2.5, 1 / 3, 300.0, 3e38, 1e300)
TEXTS = ("", " ", "0", "1", "-1", "01", "1.0", "1e3", "nan", "²", "٣", "9" * 5000, "None", "a", "b", "é", "\x00", '"',
         "../a", "/a", "\ufeff", "\ud800", "\U0001f4a5", "train", "test", "left_out")
JSON_VALUES: tuple[Any, ...] = (*NUMBERS[:6], *REALS, *TEXTS, None, True, False, [], {}, [[]], {"": ""}, [1, 2], ["a"])


def change_bytes(data: bytes, rng: Random) -> bytes:
    """One to four changes anywhere: bytes set, removed, doubled, or replaced by a number with odd properties."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(result) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 32))
        kind = rng.randrange(5)
        if kind == 0 and start < len(result):
            result[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del result[start:start + length]
        elif kind == 2:
            result[start:start] = result[start:start + length]
        elif kind == 3:
            result[start:start + length] = rng.randbytes(length)
        else:
            width, code = rng.choice(((2, "h"), (4, "i"), (8, "q")))
            number = rng.choice(NUMBERS) & ((1 << 8 * width) - 1)
            result[start:start + width] = struct.pack(f"<{code.upper()}", number)
    return bytes(result)


def change_json(data: bytes, rng: Random) -> bytes:
    """A value somewhere inside replaced, removed or given another name; any bytes where that is no JSON."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return change_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 2))):
        content = _changed(content, rng)
    return json.dumps(content, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def _changed(content: Any, rng: Random) -> Any:
    """Goes down to some inner value and changes it."""
    inner = list(content) if isinstance(content, dict) else list(range(len(content))) \
        if isinstance(content, list) else []
    if not inner or rng.random() < 0.05:
        return copy.deepcopy(rng.choice(JSON_VALUES))
    name = rng.choice(inner)
    kind = rng.random()
    if kind < 0.1:
        del content[name]
    elif kind < 0.15 and isinstance(content, dict):
        content[rng.choice(TEXTS)] = content.pop(name)
    elif kind < 0.2 and isinstance(content, list):
        content.append(content[name])
    else:
        content[name] = _changed(content[name], rng)
    return content


def change_table(data: bytes, rng: Random) -> bytes:
    """A cell of a CSV table replaced, removed or added, or a line doubled, moved or removed."""
    table = [line.split(b",") for line in data.splitlines()]
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not table:
            break
        row = rng.randrange(len(table))
        cell, kind = rng.randrange(len(table[row]) or 1), rng.randrange(8)
        if kind < 3 and table[row]:
            table[row][cell] = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        elif kind == 3:
            del table[row][cell:cell + 1]
        elif kind == 4:
            table[row].insert(cell, rng.choice(TEXTS).encode("utf-8", "surrogatepass"))
        elif kind == 5:
            table.insert(rng.randrange(len(table)), list(table[row]))
        elif kind == 6:
            del table[row]
        else:
            rng.shuffle(table[row])
    mark, end = rng.choice((b"", b"", b"", b"\xef\xbb\xbf")), rng.choice((b"\n", b"\n", b"\r\n"))
    return mark + end.join(map(b",".join, table))


def change_nifti(data: bytes, rng: Random) -> bytes:
    """One to three fields of a NIfTI header set to a number with odd properties, or bytes anywhere."""
    if len(data) < 348 or rng.random() < 0.2:
        return change_bytes(data, rng)
    second = len(data) >= 540 and 540 in struct.unpack("<i", data[:4]) + struct.unpack(">i", data[:4])
    kind = nib.Nifti2Header if second else nib.Nifti1Header
    size = kind.template_dtype.itemsize
    order = ">" if data[0] == 0 else "<"
    header = np.frombuffer(data[:size], kind.template_dtype.newbyteorder(order)).copy()
    for _ in range(rng.randint(1, 3)):
        field = header[rng.choice(header.dtype.names)]
        if field.dtype.kind in "iu":
            limits = np.iinfo(field.dtype)
            new: Any = min(max(rng.choice(NUMBERS + CODES), int(limits.min)), int(limits.max))
        elif field.dtype.kind == "f":
            new = rng.choice(REALS + PLACES)
        else:
            new = rng.choice(TEXTS[:10]).encode()[:field.dtype.itemsize]
        with np.errstate(over="ignore"):
            field.flat[rng.randrange(field.size)] = new
    return header.tobytes() + data[size:]


def change_gzip(data: bytes, rng: Random) -> bytes:
    """Bytes anywhere, or what is inside a gzip file, which is whole again afterwards."""
    if rng.random() < 0.5:
        return change_bytes(data, rng)
    try:
        inside = gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return change_bytes(data, rng)
    return gzip.compress(change_nifti(inside, rng), 1, mtime=0)


def change_arrays(data: bytes, rng: Random) -> bytes:
    """The table at the head of a safetensors file, with its length corrected, or bytes anywhere."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8 or rng.random() < 0.3:
        return change_bytes(data, rng)
    head = change_json(data[8:8 + length], rng)
    if rng.random() < 0.3:
        old, new = rng.sample((b"F32", b"F64", b"BF16", b"F16", b"I64", b"BOOL", b"U8", b"F8_E4M3", b"U16", b"C64"), 2)
        head = head.replace(b'"%s"' % old, b'"%s"' % new)
    return len(head).to_bytes(8, "little") + head + data[8 + length:]
