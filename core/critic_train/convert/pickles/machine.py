"""A pickle machine of our own: it knows the opcodes of plain data, and names only from a list.

Python's own unpickler imports what a file names and calls it; even with `find_class` overridden it writes to the
attributes of whatever a file builds, sizes its memo by a number in the file, and hashes any tuple as a key. Here no
name is ever looked up in a module: a name is a key of `names`, whose builders are ours.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any

from critic_train.convert.pickles import runs
from critic_train.convert.pickles.budget import PYTHON_OBJECT, Budget, RefusedError

HIGHEST_PROTOCOL = 5
LONGEST_INTEGER = 16
"""Bytes of a whole number; an id or a hash has at most as many."""
LONGEST_KEY = 2**12
DAMAGE = (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, BufferError, struct.error)
"""What a step raises where a pickle is not what a pickler writes."""
PLAIN = (str, int, float, bool, type(None), bytes)

CODE_OPCODES = {
    ord("o"): "OBJ", 0x92: "NEWOBJ_EX", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", ord("P"): "PERSID",
    0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER",
}  # fmt: skip
"""Opcodes that a dump of plain data never has."""


class Name:
    """A name that a file may use, as it stands on the stack; inert.

    Args:
        text: module and name.
        build: arguments and machine -> what calling it makes.
        instance: whether an instance may be made of it without arguments, to be finished by a state.
    """

    __slots__ = ("build", "instance", "text")

    def __init__(
        self, text: str, build: "Callable[[tuple[Any, ...], Machine], Any] | None" = None, *, instance: bool = False
    ) -> None:
        self.text = text
        self.build = build
        self.instance = instance


class Unfinished:
    """What a state must complete; replaced by what `finish` returns wherever the file has kept it."""

    __slots__ = ("kept",)

    def __init__(self) -> None:
        self.kept: list[int] = []

    def finish(self, state: Any, machine: "Machine") -> Any:
        """The value, given the state."""
        raise NotImplementedError


class Machine:
    """Reads one pickle.

    Args:
        data: its bytes.
        names: (module, name) -> what a file may use.
        budget: what may be built.
        persistent: persistent id -> the object, for archives that keep storages apart.
        instance_of: makes the unfinished instance of a name with `instance`.
    """

    def __init__(
        self,
        data: memoryview,
        *,
        names: Mapping[tuple[str, str], Name],
        budget: Budget,
        persistent: Callable[[Any], Any] | None = None,
        instance_of: Callable[[Name], Unfinished] | None = None,
    ) -> None:
        self.budget = budget
        self._data = data
        self._names = names
        self._persistent = persistent
        self._instance_of = instance_of
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._steps = {code: step.__get__(self) for code, step in STEPS.items()}

    def load(self) -> Any:
        """The object that the pickle describes.

        Raises:
            RefusedError: it names something not in `names`, uses an opcode that is none of plain data, costs too much,
                or is damaged.
        """
        try:
            return self._run()
        except DAMAGE as error:
            reason = f"{type(error).__name__}: {error}"
            raise RefusedError(f"the pickle is damaged at byte {self._at:,} ({reason})") from None
        finally:
            # The steps are bound to this machine: as long as it has them, only the collector frees what it has read.
            self._steps.clear()
            self._memo.clear()
            self._stack = []

    def _run(self) -> Any:
        while True:
            code = self._byte()
            if code == ord("."):
                return self._stack.pop()
            step = self._steps.get(code)
            if step is None:
                raise RefusedError(f"opcode {CODE_OPCODES.get(code, hex(code))} is no part of plain data")
            step()

    def _take(self, count: int) -> memoryview:
        end = self._at + count
        if end > len(self._data):
            raise RefusedError(
                f"the pickle ends at byte {len(self._data):,}, {end - len(self._data):,} bytes too early"
            )
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def _byte(self) -> int:
        at = self._at
        if at >= len(self._data):
            raise RefusedError("the pickle ends 1 byte too early")
        self._at = at + 1
        return self._data[at]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _push(self, value: Any, cost: int = PYTHON_OBJECT) -> None:
        self.budget.spend(cost)
        self._stack.append(value)

    def _to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _protocol(self) -> None:
        if self._number(1) > HIGHEST_PROTOCOL:
            raise RefusedError("the pickle protocol is newer than 5")

    def _frame(self) -> None:
        self._take(8)

    def _mark(self) -> None:
        self.budget.spend(2 * PYTHON_OBJECT)
        self._marks.append(self._stack)
        self._stack = []

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._to_mark()

    def _pop_mark(self) -> None:
        self._to_mark()

    def _put(self, key: int) -> None:
        self.budget.spend(2 * PYTHON_OBJECT)
        value = self._stack[-1]
        self._memo[key] = value
        if isinstance(value, Unfinished):
            value.kept.append(key)

    def _integer(self) -> None:
        self._extend(*runs.integers(self._data, self._at - 1))

    def _float(self) -> None:
        self._extend(*runs.floats(self._data, self._at - 1))

    def _extend(self, values: list[Any], end: int) -> None:
        if end > len(self._data):
            raise RefusedError("the pickle ends in the middle of a number")
        self.budget.spend(len(values) * (PYTHON_OBJECT // 2))
        self._stack.extend(values)
        self._at = end

    def _long(self, size: int) -> None:
        length = self._number(size)
        if length > LONGEST_INTEGER:
            raise RefusedError(f"a whole number of {length:,} bytes")
        self._push(int.from_bytes(self._take(length), "little", signed=True))

    def _text(self, size: int) -> None:
        length = self._number(size)
        self.budget.spend(length)
        self._push(str(self._take(length), "utf-8", "replace"))

    def _bytes(self, size: int) -> None:
        piece = self._take(self._number(size))
        if len(piece) <= LONGEST_KEY:
            self._push(bytes(piece), PYTHON_OBJECT + len(piece))
        else:
            self._push(piece)

    def _tuple(self, count: int | None) -> None:
        items = self._to_mark() if count is None else [self._stack.pop() for _ in range(count)][::-1]
        self._push(tuple(items), PYTHON_OBJECT + 8 * len(items))

    def _list(self) -> None:
        self._push(self._to_mark())

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise RefusedError(f"an item is added to {described(target)}")
        self.budget.spend(8 * len(items))
        target.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise RefusedError(f"an entry is set in {described(target)}")
        self.budget.spend(100 * (len(items) // 2))
        for i in range(0, len(items), 2):
            target[checked_key(items[i])] = items[i + 1]

    def _dict(self) -> None:
        items = self._to_mark()
        self._push({})
        self._set_items(items)

    def _add_items(self) -> None:
        items = self._to_mark()
        target = self._stack[-1]
        if type(target) is not set:
            raise RefusedError(f"an element is added to {described(target)}")
        self.budget.spend(100 * len(items))
        target.update(checked_key(item) for item in items)

    def _frozen_set(self) -> None:
        items = self._to_mark()
        self._push(frozenset(checked_key(item) for item in items), 100 * (1 + len(items)))

    def _line(self) -> str:
        end = bytes(self._data[self._at : self._at + LONGEST_KEY]).find(b"\n")
        if end < 0:
            raise RefusedError("a name without an end")
        line = str(self._take(end), "utf-8", "replace")
        self._at += 1
        return line

    def _name(self, module: Any, name: Any) -> None:
        known = self._names.get((module, name)) if type(module) is str and type(name) is str else None
        if known is None:
            raise RefusedError(
                f"it wants {module}.{name}, which is no tensor, array or plain container; nothing of it was run",
                hint="take that field out before the dump is written; a rollout needs none of it",
            )
        self._push(known)

    def _global(self) -> None:
        module = self._line()
        self._name(module, self._line())

    def _old_instance(self) -> None:
        module = self._line()
        self._name(module, self._line())
        raise RefusedError(f"it makes an instance of {described(self._stack[-1])}")

    def _stack_global(self) -> None:
        name = self._stack.pop()
        self._name(self._stack.pop(), name)

    def _reduce(self) -> None:
        arguments = self._stack.pop()
        name = self._stack.pop()
        if type(name) is not Name or name.build is None or type(arguments) is not tuple:
            raise RefusedError(f"it calls {described(name)}")
        self._push(name.build(arguments, self))

    def _new_object(self) -> None:
        arguments = self._stack.pop()
        name = self._stack.pop()
        if type(name) is not Name or not name.instance or arguments != () or self._instance_of is None:
            raise RefusedError(f"it makes an instance of {described(name)}")
        self._push(self._instance_of(name))

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack.pop()
        if not isinstance(target, Unfinished):
            raise RefusedError(f"it gives a state to {described(target)}")
        value = target.finish(state, self)
        for key in target.kept:
            self._memo[key] = value
        self._push(value)
        if isinstance(value, Unfinished):
            value.kept = list(target.kept)

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise RefusedError("it refers to something outside of it")
        self._push(self._persistent(self._stack.pop()))


def described(value: Any) -> str:
    """What stands on the stack, by its name or kind."""
    return value.text if isinstance(value, Name) else f"a {type(value).__name__}"


def checked_key(key: Any) -> Any:
    """A dict key or set element: plain, or a short tuple of texts. Nested tuples may take for ever to hash."""
    if type(key) in PLAIN or (type(key) is tuple and len(key) <= 8 and all(type(part) is str for part in key)):
        return key
    raise RefusedError(f"a key is {described(key)}")


STEPS: dict[int, Callable[[Machine], None]] = {
    0x80: Machine._protocol,
    0x95: Machine._frame,
    ord("("): Machine._mark,
    ord("0"): Machine._pop,
    ord("1"): Machine._pop_mark,
    ord("2"): lambda m: m._push(m._stack[-1]),
    ord("q"): lambda m: m._put(m._byte()),
    ord("r"): lambda m: m._put(m._number(4)),
    0x94: lambda m: m._put(len(m._memo)),
    ord("h"): lambda m: m._push(m._memo[m._byte()], 8),
    ord("j"): lambda m: m._push(m._memo[m._number(4)], 8),
    ord("N"): lambda m: m._push(None, 8),
    0x88: lambda m: m._push(True, 8),
    0x89: lambda m: m._push(False, 8),
    ord("K"): Machine._integer,
    ord("M"): Machine._integer,
    ord("J"): Machine._integer,
    0x8A: lambda m: m._long(1),
    0x8B: lambda m: m._long(4),
    ord("G"): Machine._float,
    0x8C: lambda m: m._text(1),
    ord("X"): lambda m: m._text(4),
    0x8D: lambda m: m._text(8),
    ord("C"): lambda m: m._bytes(1),
    ord("B"): lambda m: m._bytes(4),
    0x8E: lambda m: m._bytes(8),
    0x96: lambda m: m._bytes(8),
    ord("t"): lambda m: m._tuple(None),
    ord(")"): lambda m: m._tuple(0),
    0x85: lambda m: m._tuple(1),
    0x86: lambda m: m._tuple(2),
    0x87: lambda m: m._tuple(3),
    ord("]"): lambda m: m._push([]),
    ord("l"): Machine._list,
    ord("a"): lambda m: m._append([m._stack.pop()]),
    ord("e"): lambda m: m._append(m._to_mark()),
    ord("}"): lambda m: m._push({}),
    ord("d"): Machine._dict,
    ord("s"): lambda m: m._set_items([m._stack.pop(), m._stack.pop()][::-1]),
    ord("u"): lambda m: m._set_items(m._to_mark()),
    0x8F: lambda m: m._push(set(), 4 * PYTHON_OBJECT),
    0x90: Machine._add_items,
    0x91: Machine._frozen_set,
    ord("c"): Machine._global,
    ord("i"): Machine._old_instance,
    0x93: Machine._stack_global,
    ord("R"): Machine._reduce,
    0x81: Machine._new_object,
    ord("b"): Machine._build,
    ord("Q"): Machine._persistent_id,
}
"""Opcode -> what it does. What is not here is refused."""
