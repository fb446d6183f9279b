"""Hostile files: whole ones of a tree, and one to three damages of them, all drawn from one seeded generator.

A tree is what a folder holds: bytes by relative path, or something that is no plain file. A damage changes a tree in
place and says in words what it did. Both the benchmark and the property test draw from here.
"""

import hashlib
import json
import os
import random
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

WEIGHTS = "adapter_model.safetensors"
# Bytes of a file whose meaning is looked at no more; of a sparse file, which takes no room on a disk.
LARGE = 1024**2
# Bytes of rows that are not made a hundred times as many: honest rows take their time.
MANY = 20_000
SPARSE = (200 * 1024**2, 10 * 1024**3, 2**42)


class Special(NamedTuple):
    """What stands in the place of a plain file."""

    kind: Literal["link", "fifo", "socket", "folder", "sparse"]
    value: str | int = 0
    head: bytes = b""


Tree = dict[str, bytes | Special]


@dataclass(frozen=True)
class Raw:
    """A piece of JSON that is written as it stands."""

    text: str


@dataclass
class Case:
    """A tree with damages.

    Args:
        kind: of the tree.
        tree: the damaged files.
        damages: what was done, in words.
        must_refuse: whether no reader may take the file at `where`.
        where: path of the file that was damaged, where `must_refuse`.
    """

    kind: str
    tree: Tree
    damages: list[str] = field(default_factory=list)
    must_refuse: bool = False
    where: str = ""


def write_tree(tree: Tree, folder: Path) -> None:
    """Make a folder of a tree; what the file system cannot hold is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, node in tree.items():
        path = folder / name
        with suppress(OSError, ValueError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(node, bytes):
                path.write_bytes(node)
            elif node.kind == "link":
                path.symlink_to(str(node.value))
            elif node.kind == "fifo":
                os.mkfifo(path)
            elif node.kind == "folder":
                path.mkdir()
            elif node.kind == "socket":
                with socket.socket(socket.AF_UNIX) as listening:
                    listening.bind(str(path))
            else:
                path.write_bytes(node.head)
                os.truncate(path, max(int(node.value), len(node.head)))


# JSON


def encode(value: Any) -> bytes:
    """JSON, with pieces that are none."""
    pieces: dict[str, str] = {}

    def marked(raw: Raw) -> str:
        pieces[marker := f"raw-{len(pieces)}-{id(raw)}"] = raw.text
        return marker

    text = json.dumps(value, default=marked)
    for marker, piece in pieces.items():
        text = text.replace(f'"{marker}"', piece)
    return text.encode("utf-8", "surrogatepass")


def _nested(rng: random.Random) -> Raw:
    depth = rng.choice((5, 90, 200, 400, 900, 3000, 100_000))
    opening, closing = rng.choice((("[", "]"), ('{"a": ', "}")))
    return Raw(opening * depth + "1" + closing * depth)


def _wide(rng: random.Random) -> Raw:
    number = rng.choice((1000, 10_000, 100_000, 100_000, 1_000_000))
    piece = rng.choice(("0", "[]", "{}", '"ab"', "1e5", '{"a":[]}', "[[[]]]"))
    return Raw("[" + ",".join([piece] * number) + "]")


def _many_keys(rng: random.Random) -> Raw:
    number = rng.choice((1000, 10_000, 100_000, 100_000, 1_000_000))
    last = ',"0":1' if rng.random() < 0.3 else ""
    return Raw('{"' + '":1,"'.join(map(str, range(number))) + '":1' + last + "}")


# Expressions that make a backtracking engine explode, or its compiler; and plain ones.
EXPRESSIONS: tuple[Callable[[random.Random], str], ...] = (
    lambda rng: "(a+)+$",
    lambda rng: "(.*)*x",
    lambda rng: f"(.*a){{{rng.choice((5, 25, 1000))}}}",
    lambda rng: "(?:(?:.+.+)+)+_",
    lambda rng: ".*" * rng.choice((3, 20, 500)) + "x",
    lambda rng: "(" * rng.choice((50, 2000)) + "a" + ")*" * 50,
    lambda rng: "(?:" * 300 + "." + "*)" * 300,
    lambda rng: "((a{1,1000}){1,1000}){1,1000}",
    lambda rng: "(.|[a-z]|\\w)*Z",
    lambda rng: "|".join(f"layers.{n}.q_proj" for n in range(rng.choice((10, 1000, 8000)))),
    lambda rng: "[" + "a-z" * 5000 + "]",
    lambda rng: "(?P<a>.)(?P=a)" * 40,
    lambda rng: "(?i:ſ|k)+" * 30,
    lambda rng: "(?=(.*))\\1{50}",
    lambda rng: "x{4294967295}",
    lambda rng: "x" * rng.choice((999, 100_000, 300_000)),
    lambda rng: ".*q_proj",
    lambda rng: "(",
    lambda rng: "\\",
    lambda rng: "[:alpha:]",
    lambda rng: "(?e)a{e<=3}",
    lambda rng: "(?(1)a|b)",
    lambda rng: "(?R)",
)
_TEXTS = (
    "", " ", "\0", "a\nb", "../../etc/passwd", "/etc/passwd", "..", ".", "-x", "con", "a" * 10_000, "a/b", "a\\b",
    "\u202egnp", "ａdapter", "аdapter", "ﬁ", "\U0001f600", "\x1b[31m", "layers.*", "*", "NaN", "Infinity", "true",
    "file:///etc/passwd", "s3://x/y", "~root", "$HOME", "%s%n", "{}", "q_proj", "all-linear", "0-999999", "5-3",
    "0-9,0-9", "1" * 400, "LORA", "float32", "auto", "arrow", "norm", "none", "adapter_model.bin", "model.safetensors",
)  # fmt: skip
_NUMBERS = (
    "0", "-0.0", "-1", "1", "2", "7", "2147483648", "9223372036854775807", "9223372036854775808",
    "-9223372036854775809",
    "18446744073709551616", "1e308", "1e309", "-1e999", "NaN", "Infinity", "-Infinity", "1e-400", "0.1",
    "1" + "0" * 400,
    "1" * 5000, "1000000", "1000000000", "1000000001", "true", "null",
)  # fmt: skip


def hostile_value(rng: random.Random) -> Any:
    """A value that has no business where it is put."""
    draw = rng.random()
    if draw < 0.3:
        return Raw(rng.choice(_NUMBERS))
    if draw < 0.6:
        return rng.choice(_TEXTS)
    if draw < 0.7:
        return rng.choice(EXPRESSIONS)(rng)
    if draw < 0.9:
        return rng.choice((None, True, False, [], {}, [[]], [None], [1, "a"], {"": None}, {"a": {}}, [{}], ["q_proj"]))
    if draw < 0.93:
        return Raw(rng.choice((r'"\ud800"', r'"a\udfffb"', '"\\ud83d\\ude00"', r'"\u0000"')))
    if draw < 0.995:
        return _nested(rng)
    return rng.choice((_wide, _many_keys))(rng)


def _containers(value: Any, depth: int = 0) -> list[Any]:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value, *(each for entry in inner for each in _containers(entry, depth + 1))] if inner else []


def damage_document(document: Any, rng: random.Random) -> tuple[bytes, str, bool]:
    """A document with one value changed, as JSON; what was done, and whether nobody may take it."""
    changed, words, twin = _changed(document, rng)
    data = encode(changed)
    if twin:
        marker, key = twin
        data = data.replace(json.dumps(marker).encode(), json.dumps(key).encode())
    return data, words, bool(twin)


def _changed(document: Any, rng: random.Random) -> tuple[Any, str, tuple[str, str] | None]:
    """The changed document, what was done, and a key that is to be written as another, which stands twice then."""
    places = _containers(document)
    if not places or rng.random() < 0.03:
        return hostile_value(rng), "another document", None
    place = rng.choice(places[: rng.choice((1, 5, len(places)))])
    key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    draw = rng.random()
    if draw < 0.6:
        place[key] = hostile_value(rng)
        return document, f"another value of {key!r}", None
    if draw < 0.75:
        del place[key]
        return document, f"without {key!r}", None
    if isinstance(place, list):
        place.insert(key, rng.choice((place[key], hostile_value(rng))))
        return document, f"one more before {key}", None
    if draw < 0.85:
        place[rng.choice((*_TEXTS, "__proto__", "__class__"))] = hostile_value(rng)
        return document, "one more key", None
    if draw < 0.9:
        place[str(key) + rng.choice((" ", "\u200b", "A", "\0"))] = place.pop(key)
        return document, f"{key!r} by another name", None
    marker = f"twice-{rng.getrandbits(32)}"
    place[key], place[marker] = place[key], rng.choice((place[key], None, "x", 3))
    return document, f"{key!r} twice", (marker, key)


# Bytes


def damage_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Bytes with something changed, blind to what they mean."""
    at = rng.randrange(len(data) + 1)
    size = min(rng.choice((1, 2, 8, 64, 1000)), len(data))
    cases: tuple[tuple[str, Callable[[], bytes]], ...] = (
        ("cut off", lambda: data[:at]),
        ("empty", lambda: b""),
        ("bits turned", lambda: _turned(data, rng)),
        ("bytes put in", lambda: data[:at] + rng.randbytes(size) + data[at:]),
        ("bytes left out", lambda: data[:at] + data[at + size :]),
        ("a piece twice", lambda: data[: at + size] + data[at:]),
        ("bytes behind it", lambda: data + rng.choice((b"\0", b" ", b"{}", b"\n", rng.randbytes(64)))),
        ("zeros", lambda: data[:at] + bytes(size) + data[at + size :]),
        ("other bytes", lambda: rng.randbytes(rng.choice((1, 9, 100, 5000)))),
        ("a pickle", lambda: b"\x80\x04\x95" + data[3:]),
        ("a zip", lambda: b"PK\x03\x04" + data[4:]),
        ("a mark before it", lambda: rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\n")) + data),
        ("UTF-16", lambda: data.decode("latin-1").encode("utf-16")),
    )
    words, make = rng.choice(cases)
    return make(), words


def _turned(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20)) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


# safetensors


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the body of a whole file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_safetensors(header: Any, body: bytes) -> bytes:
    """A file of a header and a body, whatever they say."""
    text = encode(header)
    return len(text).to_bytes(8, "little") + text + body


def damage_safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str, bool]:
    """A safetensors file that lies in one place."""
    header, body = split_safetensors(data)
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return *damage_bytes(data, rng), False
    name = rng.choice(names)
    entry = header[name]
    begin, end = entry["data_offsets"]
    draw = rng.randrange(20)
    if draw == 0:
        text = encode(header)
        size = rng.choice(
            (0, 1, len(text) - 1, len(text) + 1, len(text) + len(body), 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1)
        )
        return size.to_bytes(8, "little") + text + body, f"a header of {size} bytes", True
    if draw in (1, 2, 3):
        pair = rng.choice((
            [begin, end + 4], [begin + 4, end], [end, begin], [0, end - begin], [begin, begin], [-4, end],
            [begin, 2**62],
            [begin, 2**64], [begin - 8, end - 8], [0, len(body)], [len(body), len(body) + end - begin], [begin],
            [begin, end, end], [float(begin), float(end)], [str(begin), str(end)], None, {}, [True, end], [[], []],
        ))  # fmt: skip
        entry["data_offsets"] = pair
        # `True` is 1; a place that is right by chance harms nobody.
        return join_safetensors(header, body), f"offsets {pair}", pair != [begin, end]
    if draw in (4, 5):
        dtype = rng.choice((
            "F64", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "I64", "C64",
            "", None, 1, "float32", "f32", [], "U64", "U16",
        ))  # fmt: skip
        entry["dtype"] = dtype
        widths = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F16": 2, "BF16": 2, "U16": 2, "F4": 0.5, "F6_E2M3": 0.75}
        if rng.random() < 0.6 and isinstance(dtype, str):
            numbers = (end - begin) // 4
            header, body = _resized(header, body, name, int(numbers * widths.get(dtype, 1)))
        return join_safetensors(header, body), f"dtype {dtype}", False
    if draw in (6, 7):
        shape = entry["shape"]
        entry["shape"] = rng.choice((
            [], [0], [*shape, 1], shape[::-1], [shape[0] * shape[-1]], [-1, -shape[-1]], [2**32, 2**32], [2**64 - 1, 2],
            [0, 2**60], [2**63, 2], [1.0, 2.0], "2", None, [shape[0], None], [1] * 70, [1] * 70_000, [shape[0] + 1, 8],
        ))  # fmt: skip
        return join_safetensors(header, body), f"shape {str(entry['shape'])[:60]}", False
    if draw == 8:
        entry["shape"] = [0, *entry["shape"][1:]]
        header, body = _resized(header, body, name, 0)
        return join_safetensors(header, body), "an empty tensor", False
    if draw in (9, 10):
        twin = dict(entry)
        if rng.random() < 0.5:
            twin["data_offsets"] = [0, end - begin]
        one, more = encode({name: twin})[1:-1], encode(header)[1:-1]
        text = b"{" + b",".join(rng.choice(((one, more), (more, one)))) + b"}"
        return len(text).to_bytes(8, "little") + text + body, f"{name} twice", True
    if draw == 11:
        other = rng.choice((
            name.upper(), name + " ", name.replace(".weight", ".default.weight"),
            name.removeprefix("base_model.model."),
            "", "..", "a" * 5000, name.replace("lora_A", "lora_embedding_A"), name.replace(".", "\0"), "\u202e" + name,
            name.replace("q_proj", "ｑ_proj"), name.replace("lora_", "module.lora_"), "__metadata__", "x.alpha",
            "base_model.model." * 300 + name, "base_model.model.lm_head.weight", "base_model.model." + name,
        ))  # fmt: skip
        header[other] = header.pop(name)
        return join_safetensors(header, body), f"{name} as {other[:40]!r}", False
    if draw == 12:
        number = rng.choice((3, 100, 100, 3000, 3000, 100_000, 1_000_000) if rng.random() < 0.05 else (3, 100))
        shape = rng.choice(([0], [0, 32], []))
        like = rng.choice(("x{}", "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"))
        end = f'":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}'
        extra = ",".join(f'"{like.format(10 + each)}{end}' for each in range(number))
        text = b"{" + extra.encode() + b"," + encode(header)[1:]
        return len(text).to_bytes(8, "little") + text + body, f"{number} more tensors", False
    if draw == 13:
        header["__metadata__"] = rng.choice(({"format": 1}, [], "pt", None, {"a": {"b": 1}}, {"format": "tf"}, 3))
        return join_safetensors(header, body), "other metadata", False
    if draw in (14, 15):
        number = struct.pack("<f", rng.choice((float("nan"), float("inf"), float("-inf"))))
        at = rng.randrange(0, max(4, len(body)), 4)
        return (
            join_safetensors(header, body[:at] + number + body[at + 4 :]),
            "a number that is none",
            entry["dtype"] == "F32",
        )
    if draw == 16:
        return data + rng.randbytes(rng.choice((1, 4, 1000))), "bytes behind the last tensor", True
    if draw == 17:
        return data[: -rng.randrange(1, max(2, len(body)))], "cut off in the body", True
    if draw == 18:
        text = encode(header)
        text += b" " * rng.choice((8, 1000, 5_000_000))
        return len(text).to_bytes(8, "little") + text + body, f"a padded header of {len(text)} bytes", False
    text, words, is_bad = damage_document(header, rng)
    return len(text).to_bytes(8, "little") + text + body, f"in the header {words}", is_bad


def _resized(header: dict[str, Any], body: bytes, name: str, size: int) -> tuple[dict[str, Any], bytes]:
    """The file with another number of bytes for one tensor, all others moved along."""
    begin, end = header[name]["data_offsets"]
    moved = size - (end - begin)
    for other, entry in header.items():
        if other != "__metadata__":
            low, high = entry["data_offsets"]
            entry["data_offsets"] = [low + moved * (low >= end), high + moved * (high >= end)]
    header[name]["data_offsets"] = [begin, begin + size]
    return header, body[:begin] + body[begin:end][:size].ljust(max(size, 0), b"\1") + body[end:]


# Trees


def damage_tree(case: Case, rng: random.Random) -> str:
    """Put something that is no plain file into a tree, or a file under another name."""
    tree = case.tree
    path = rng.choice(list(tree))
    above, _, name = path.rpartition("/")
    node = tree[path]
    draw = rng.randrange(12)
    if draw == 0:
        del tree[path]
        return f"without {path}"
    if draw == 1:
        tree[path] = Special(
            "link", rng.choice(("/etc/passwd", "/dev/zero", name, "..", "/", "nowhere", "/proc/self/mem"))
        )
        return f"{path} a link to {tree[path].value}"  # type: ignore[union-attr]
    if draw in (2, 3, 4):
        kind = ("fifo", "socket", "folder")[draw - 2]
        tree[path] = Special(kind)  # type: ignore[arg-type]
        return f"{path} a {kind}"
    if draw == 5:
        head = node if isinstance(node, bytes) and rng.random() < 0.7 else b""
        tree[path] = Special("sparse", rng.choice(SPARSE), head)
        return f"{path} sparse, {tree[path].value} bytes"  # type: ignore[union-attr]
    if draw in (6, 7):
        parts = path.split("/")
        at = rng.randrange(len(parts))
        parts[at] = rng.choice((
            parts[at].upper(), parts[at] + ".", parts[at] + " ", "." + parts[at], "-" + parts[at], "n" * 200, "a\nb",
            "\udcff",
            "ａ", "\u202e" + parts[at], parts[at] + "\u0301", "a\\b", "$(x)", "*", "\x1b[31m",
        ))  # fmt: skip
        old = "/".join(path.split("/")[: at + 1])
        for other in [other for other in tree if other == old or other.startswith(f"{old}/")]:
            tree["/".join(parts[: at + 1]) + other.removeprefix(old)] = tree.pop(other)
        return f"{old} named {parts[at]!r}"
    if draw == 8 and above:
        twin = rng.choice((above.upper(), above + "2", above.replace("a", "а"), above + "/inner", f"{above}é"))
        for other in [other for other in tree if other.startswith(f"{above}/")]:
            tree[twin + other.removeprefix(above)] = tree[other]
        return f"{above} once more as {twin!r}"
    if draw == 9:
        tree[f"{above}/{'s' * 50}" if above else "stray"] = rng.choice(
            (b"", b"{}", Special("fifo"), Special("link", "/"))
        )
        return "one more entry"
    if draw == 10:
        tree[f"{above}/adapter_model.bin" if above else "adapter_model.bin"] = b"\x80\x04cos\nsystem\n(S'x'\ntR."
        tree.pop(f"{above}/{WEIGHTS}" if above else WEIGHTS, None)
        return "a pickle in the place of the weights"
    source = tree[rng.choice(list(tree))]
    tree[path] = source
    return f"{path} with the content of another file"


Seal = Callable[[Tree], None]


def damage(case: Case, rng: random.Random) -> None:
    """One damage more of a tree; of none there is nothing to damage."""
    if not case.tree:
        return
    files = [path for path, node in case.tree.items() if isinstance(node, bytes)]
    if not files or rng.random() < 0.12:
        case.damages.append(damage_tree(case, rng))
        return
    path = rng.choice(files)
    data = case.tree[path]
    assert isinstance(data, bytes)
    is_bad, ending = False, path.rpartition(".")[2]
    if rng.random() < 0.2 or len(data) > LARGE:
        data, words = damage_bytes(data, rng)
    else:
        try:
            if ending == "safetensors":
                data, words, is_bad = damage_safetensors(data, rng)
            elif ending == "jsonl":
                data, words = _damage_lines(data, rng)
            elif ending in ("csv", "tsv", "txt", "yaml", "md"):
                data, words = _damage_text(data, rng)
            elif ending in ("parquet", "arrow", "gguf"):
                data, words = damage_bytes(data, rng)
            else:
                data, words, is_bad = damage_document(json.loads(data), rng)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):  # damaged before
            data, words = damage_bytes(data, rng)
    case.tree[path] = data
    case.damages.append(f"{path}: {words}")
    if is_bad:
        case.must_refuse, case.where = True, path


def _damage_lines(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    draw = rng.random()
    if draw < 0.7:
        lines[at], words, _ = damage_document(json.loads(lines[at]), rng)
    elif draw < 0.8:
        lines, words = lines * (2 if len(data) > MANY else rng.choice((2, 100))), "lines again"
    elif draw < 0.9:
        lines[at], words = (
            rng.choice((b"", b"null", b"[]", b"x" * 100_000, b"{" * 2000, b"\r", b'{"a":1}{"a":1}')),
            "a line",
        )
    else:
        lines, words = [b" ".join(lines)], "one line"
    return b"\n".join(lines), f"line {at + 1}, {words}"


def _damage_text(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    piece = rng.choice((
        b'"', b",", b'"a\nb"', b"\t", b"\r", b"\0", b"," * 10_000, b'"' * 999, b"=1+1", b"&a [*a, *a]",
        b"!!python/object:os",
        b"- " * 3000 + b"a", b"? ", b"{" * 500, b"\xff", "\u2028".encode(), b"a: &x b\nc: *x", b"---\n", b": :",
        b"!!float x",
        b"x" * 200_000, b"1" * 5000, b"0x" + b"f" * 3000, b"2001-99-99", b"~: ~", b"<<: {a: 1}", b"!!set {a}",
        b"!!binary x",
    ))  # fmt: skip
    if rng.random() < 0.5:
        lines[at] = rng.choice((lines[at] + piece, piece + lines[at], piece, lines[at].replace(b" ", piece, 1)))
    else:
        lines.insert(at, rng.choice((piece, lines[at] + piece)))
    return b"\n".join(lines), f"line {at + 1} with {piece[:20]!r}"


def draw_case(kind: str, whole: Tree, rng: random.Random, seal: Seal | None = None) -> Case:
    """A damaged tree.

    Args:
        kind: its name.
        whole: the tree to damage, which stays as it is.
        rng: decides all.
        seal: computes the hashes anew that the tree holds of itself; done to three of four.
    """
    case = Case(kind, dict(whole))
    number = rng.choice((1, 1, 1, 2, 2, 3))
    for _ in range(number):
        damage(case, rng)
    case.must_refuse = case.must_refuse and number == 1
    if seal is not None and rng.random() < 0.75:
        with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, UnicodeError):
            seal(case.tree)
        case.must_refuse = False  # what stood twice stands once in a document that is written anew
    return case


def sha256(data: bytes) -> str:
    """As hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
