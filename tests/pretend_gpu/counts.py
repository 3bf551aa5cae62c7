"""What the pretended device was asked to do: launches, copies, waits; and where in the code the host waited."""

import collections
import ctypes
import threading
import traceback

runtime = ctypes.CDLL("libcudart.so.13")
runtime.pretended_name.restype = ctypes.c_char_p

WAITS = ("stream_sync", "event_sync", "device_sync", "h2d_pageable", "d2h_pageable", "d2h_pinned")
"""Of the counts, those for which the host waits until the device is through: copies to the host, and from memory that
is not pinned, among them."""

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)


def _names() -> list[str]:
    names: list[str] = []
    while name := runtime.pretended_name(len(names)):
        names.append(name.decode())
    return names


NAMES = _names()
_COUNTS = (ctypes.c_long * len(NAMES)).in_dll(runtime, "pretended_counts")
_BYTES = (ctypes.c_long * len(NAMES)).in_dll(runtime, "pretended_bytes")


class Watch:
    """Counts within a `with` block.

    Attributes:
        counts: name -> how often.
        sizes: name -> bytes of all of them.
        waits: (kind, function of critic_train that led to it) -> how often the main thread waited.
    """

    def __enter__(self) -> "Watch":
        self.counts: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self._callback = _CALLBACK(self._called)
        runtime.pretended_reset()
        runtime.pretended_set_callback(self._callback, 1)
        return self

    def __exit__(self, *_: object) -> None:
        runtime.pretended_set_callback(self._callback, 0)
        self.counts = {name: count for name, count in zip(NAMES, _COUNTS, strict=True) if count}
        self.sizes = {name: size for name, size in zip(NAMES, _BYTES, strict=True) if size}

    def _called(self, what: bytes, size: int, extra: int) -> None:
        kind = what.decode()
        if kind in WAITS and threading.current_thread() is threading.main_thread():
            frames = [f for f in traceback.extract_stack() if "critic_train/" in f.filename]
            where = f"{frames[-1].filename.rsplit('critic_train/', 1)[1]}:{frames[-1].name}" if frames else "elsewhere"
            self.waits[kind, where] += 1
