"""Rings of pinned slots: the only host memory that a transfer takes, kept from one transfer to the next.

To pin memory takes longer than to send it. So a slot is pinned when a reader first has need of it, while others read
and copy already, and is kept when the transfer has ended, until `free_pinned_memory`.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from typing import NamedTuple

from fastload.storage.devices import Device, Event, PinnedMemory
from fastload.storage.windows import free_kept_windows, kept_window_bytes

__all__ = ["Ring", "Turn", "free_pinned_memory", "kept_pinned_bytes", "pin_ahead"]


class Turn(NamedTuple):
    """The right to a slot of a ring: to one that is there, or to one that is pinned when it is asked for."""

    slot: PinnedMemory | None


class _AtOnce:
    """An event of no copies."""

    def wait(self) -> None:
        """Nothing."""

    def is_done(self) -> bool:
        """Yes."""
        return True


class _Used(NamedTuple):
    """A slot whose copies may be under way still."""

    slot: PinnedMemory
    event: Event


class _Pool:
    """Slots that no ring uses, by kind of device and size."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._idle: dict[tuple[str, int], list[PinnedMemory]] = {}
        self._n_coming: Counter[tuple[str, int]] = Counter()

    def take(self, device: Device, slot_bytes: int) -> PinnedMemory:
        """An idle slot, one that is being pinned ahead, or else a new one."""
        kind = device.kind, slot_bytes
        with self._changed:
            while self._n_coming[kind] and not self._idle.get(kind):
                self._changed.wait()
            if self._idle.get(kind):
                return self._idle[kind].pop()
        return device.pin(slot_bytes)

    def put(self, device: Device, slot: PinnedMemory) -> None:
        """Keep a slot that nothing uses any more."""
        with self._changed:
            self._idle.setdefault((device.kind, slot.n_bytes), []).append(slot)
            self._changed.notify()

    def pin_ahead(self, device: Device, slot_bytes: int, n_slots: int) -> None:
        """Pin as many slots as are missing, if need be on a thread of its own."""
        kind = device.kind, slot_bytes
        with self._changed:
            n_missing = n_slots - len(self._idle.get(kind, ())) - self._n_coming[kind]
            if n_missing <= 0:
                return
            self._n_coming[kind] += n_missing
        thread = threading.Thread(target=self._pin, args=(device, slot_bytes, n_missing), name="fastload-pin")
        thread.daemon = True
        thread.start()

    def _pin(self, device: Device, slot_bytes: int, n_slots: int) -> None:
        kind = device.kind, slot_bytes
        try:
            device.set_current()
            for _ in range(n_slots):
                slot = device.pin(slot_bytes)
                with self._changed:
                    n_slots -= 1
                    self._n_coming[kind] -= 1
                self.put(device, slot)
        except (MemoryError, OSError, RuntimeError):
            # Help and not more: a ring pins what is missing, and tells what cannot be pinned.
            with self._changed:
                self._n_coming[kind] -= n_slots
                self._changed.notify_all()

    def n_bytes(self) -> int:
        """Bytes of all idle slots."""
        with self._changed:
            return sum(slot.n_bytes for slots in self._idle.values() for slot in slots)

    def free(self) -> int:
        """Give all idle slots back to the system. Returns their bytes."""
        with self._changed:
            slots = [slot for slots in self._idle.values() for slot in slots]
            self._idle.clear()
        n_bytes = sum(slot.n_bytes for slot in slots)
        for slot in slots:
            slot.release()
        return n_bytes

    def forget(self) -> None:
        """In a forked child: the slots are the parent's, and not even mapped here."""
        self._changed = threading.Condition()
        self._idle.clear()
        self._n_coming.clear()


_pool = _Pool()
os.register_at_fork(after_in_child=_pool.forget)


def free_pinned_memory() -> int:
    """Give back the pinned host memory that loads to accelerators keep for the next one, and registered pages of files.

    What a load that is under way uses is kept until it ends; call this again then.

    Returns:
        Bytes that were given back.
    """
    return _pool.free() + free_kept_windows()


def kept_pinned_bytes() -> int:
    """Pinned host memory that is kept for the next load, in bytes."""
    return _pool.n_bytes() + kept_window_bytes()


def pin_ahead(device: Device, slot_bytes: int, n_slots: int) -> None:
    """Begin to pin slots for a transfer to come, so that so many are there; on a thread, and without waiting."""
    _pool.pin_ahead(device, slot_bytes, n_slots)


class Ring:
    """The slots of one transfer. Readers take them, and give them back with the event of their last copy.

    Args:
        device: whom the slots are pinned for.
        slot_bytes: size of a slot.
        n_slots: most slots at a time.
    """

    def __init__(self, device: Device, slot_bytes: int, n_slots: int) -> None:
        self._device = device
        self._slot_bytes = slot_bytes
        self._n_left = n_slots  # slots that may still be taken from the pool or pinned
        self._used: deque[_Used] = deque()
        self._held: dict[int, PinnedMemory] = {}
        self._changed = threading.Condition()
        self._closed = False

    @property
    def n_bytes(self) -> int:
        """Host memory that the ring has taken so far."""
        return len(self._held) * self._slot_bytes

    def take(self) -> PinnedMemory | None:
        """A slot, as soon as there is one; None once the ring is stopped."""
        turn = self.turn()
        return None if turn is None else self.slot(turn)

    def turn(self) -> Turn | None:
        """The right to a slot, as soon as there is one; None once the ring is stopped.

        A slot whose copies are done comes first, then a new one, then the one that was used longest ago.
        """
        used: _Used | None = None
        with self._changed:
            while not self._closed and not self._n_left and not self._used:
                self._changed.wait()
            if self._closed:
                return None
            if self._used and (not self._n_left or self._used[0].event.is_done()):
                used = self._used.popleft()
            else:
                self._n_left -= 1
        if used is None:
            return Turn(None)
        used.event.wait()
        return Turn(used.slot)

    def slot(self, turn: Turn) -> PinnedMemory:
        """The slot that there is a right to."""
        if turn.slot is not None:
            return turn.slot
        slot = _pool.take(self._device, self._slot_bytes)
        with self._changed:
            self._held[slot.address] = slot
        return slot

    def forgo(self, turn: Turn) -> None:
        """The slot is not needed."""
        with self._changed:
            if turn.slot is None:
                self._n_left += 1
            else:
                self._used.appendleft(_Used(turn.slot, _AtOnce()))
            self._changed.notify()

    def give_back(self, slot: PinnedMemory, event: Event) -> None:
        """The slot may be used again once the event is done."""
        with self._changed:
            self._used.append(_Used(slot, event))
            self._changed.notify()

    def stop(self) -> None:
        """Hand out nothing more, and wake who waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Give all slots to the pool. No thread uses them any more, and no copy is under way."""
        self.stop()
        with self._changed:
            held, self._held = self._held, {}
            self._used.clear()
        for slot in held.values():
            _pool.put(self._device, slot)
