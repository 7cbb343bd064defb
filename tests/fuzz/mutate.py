"""Changes to an input that keep most of its structure: of bytes, of JSON, of protobuf messages by their fields."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

ODD_NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    127,
    128,
    255,
    256,
    65535,
    1 << 31,
    (1 << 31) - 1,
    -(1 << 31),
    1 << 32,
    (1 << 63) - 1,
    -(1 << 63),
    1 << 40,
    10**12,
)
ODD_TEXTS = ("", "a", "/etc/passwd", "../../x", "\0", "é", "\U0001f600", "x" * 3000, "%s%n", "{}", "[1", "-1", "nan",
    "MatMul", "Add", "If", "Loop",
"ai.onnx", "trt",
             "com.microsoft", "input_ids", "x", "y", "external", "location", "model.onnx.data")  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1e308,
    float("nan"),
    float("inf"),
    10**30,
    "",
    [],
    {},
    [[]],
    {"a": {}},
    *ODD_TEXTS[:8],
)


def mutated_bytes(random: Random, data: bytes) -> bytes:
    """A few bytes changed, taken out, doubled or exchanged for numbers that overflow."""
    made = bytearray(data)
    for _ in range(1 + int(random.expovariate(0.5))):
        at = random.randrange(len(made) + 1)
        size = random.choice((1, 1, 2, 4, 8, 16, 200))
        kind = random.randrange(6)
        if kind == 0 and made:
            made[min(at, len(made) - 1)] ^= 1 << random.randrange(8)
        elif kind == 1:
            made[at : at + size] = b""
        elif kind == 2:
            made[at:at] = made[at : at + size] * random.choice((1, 2, 50))
        elif kind == 3:
            made[at : at + size] = random.randbytes(size)
        elif kind == 4:
            width = random.choice((1, 2, 4, 8))
            made[at : at + width] = (random.choice(ODD_NUMBERS) & ((1 << 8 * width) - 1)).to_bytes(
                width, random.choice(("little", "big"))
            )
        else:
            del made[at:]
    return bytes(made)


def mutated_json(random: Random, data: bytes) -> bytes:
    """Values, keys and nesting changed; sometimes the text itself."""
    if random.random() < 0.15:
        return mutated_bytes(random, data)
    tree = json.loads(data)
    for _ in range(1 + int(random.expovariate(0.5))):
        tree = _changed(random, copy.deepcopy(tree))
    return json.dumps(tree).encode()


def _changed(random: Random, tree: Any) -> Any:
    if random.random() < 0.1 or not isinstance(tree, (dict, list)) or not tree:
        return _odd(random, tree)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key, kind = random.choice(keys), random.random()
    if kind < 0.15:
        del tree[key]
    elif kind < 0.25 and isinstance(tree, dict):
        tree[random.choice((*ODD_TEXTS, str(key) + "x"))] = copy.deepcopy(tree[key])
    elif kind < 0.35:
        tree[key] = copy.deepcopy(tree[random.choice(keys)])
    else:
        tree[key] = _changed(random, tree[key])
    return tree


def _odd(random: Random, value: Any) -> Any:
    kind = random.random()
    if kind < 0.5:
        return copy.deepcopy(random.choice(ODD_VALUES))
    if kind < 0.7:
        return random.choice(ODD_NUMBERS)
    if kind < 0.8:
        for _ in range(random.choice((1, 5, 60))):
            value = [value]
        return value
    return [value] * random.choice((2, 50)) if kind < 0.9 else random.choice(ODD_TEXTS)


def mutate_message(random: Random, message: Message) -> None:
    """Fields of the message, or of those inside it, cleared, doubled, exchanged or set to odd values; it stays a
    message of its type.
    """
    for _ in range(1 + int(random.expovariate(0.6))):
        _mutate_field(random, _inner(random, message))


def _inner(random: Random, message: Message) -> Message:
    """The message or one at a random depth; of a thousand weights few are chosen."""
    while random.random() < 0.85:
        inside = [
            (field, value)
            for field, value in message.ListFields()
            if field.type == FieldDescriptor.TYPE_MESSAGE and (not _many(field) or len(value))
        ]
        if not inside:
            break
        field, value = random.choice(inside)
        message = random.choice(value) if _many(field) else value
    return message


def _many(field: Any) -> bool:
    return bool(field.is_repeated)


def _mutate_field(random: Random, message: Message) -> None:
    known = [field for field, _ in message.ListFields()]
    field = random.choice(known) if known and random.random() < 0.8 else random.choice(message.DESCRIPTOR.fields)
    if _many(field):
        values = getattr(message, field.name)
        kind = random.randrange(4)
        if kind == 0 and len(values):
            del values[random.randrange(len(values))]
        elif kind == 1 and len(values):
            values.extend([values[random.randrange(len(values))]] * random.choice((1, 1, 3, 40)))
        elif kind == 2 and len(values) > 1:
            chosen = list(values)
            random.shuffle(chosen)
            chosen = [
                type(one).FromString(one.SerializeToString()) if isinstance(one, Message) else one for one in chosen
            ]
            del values[:]
            values.extend(chosen)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            values.add()
        else:
            values.append(_value(random, field))
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        if random.random() < 0.5:
            message.ClearField(field.name)
        else:
            getattr(message, field.name).SetInParent()
    elif random.random() < 0.15:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _value(random, field, getattr(message, field.name)))


def _value(random: Random, field: Any, old: Any = None) -> Any:
    kind = field.type
    if kind == FieldDescriptor.TYPE_STRING:
        return random.choice(ODD_TEXTS)
    if kind == FieldDescriptor.TYPE_BYTES:
        return mutated_bytes(random, old or b"\0" * 8)
    if kind in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return random.choice((0.0, -1.0, 1e-40, 1e30, float("nan"), float("inf")))
    if kind == FieldDescriptor.TYPE_ENUM:
        return random.choice(field.enum_type.values).number
    number = (
        random.choice(ODD_NUMBERS)
        if random.random() < 0.6 or not isinstance(old, int)
        else old + random.choice((-1, 1))
    )
    wide = kind in (FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_SINT64)
    low, high = (
        (0, 1 << (64 if wide else 32))
        if kind in (FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_UINT32)
        else (-(1 << (63 if wide else 31)), 1 << (63 if wide else 31))
    )
    return min(max(number, low), high - 1)
