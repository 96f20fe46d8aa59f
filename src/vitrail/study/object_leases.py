"""Leases in an object store.

A lease is an object that is created only if it is not there, which the store decides. Its holder writes it anew every
few seconds. It is free once nobody has done that for `LEASE_S` by the observer's own clock, or at once if its holder
was a process of this machine that has ended; the store also decides which of several takes it then.
"""

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

from vitrail.study.locking import LEASE_S, LEASES, say_looking
from vitrail.study.object_store import ObjectStudy

__all__ = ["ObjectLeases"]


LOOK_S = 1.0
"""Between two looks at a lease that another machine may still renew."""


class ObjectLeases:
    """The leases of one worker on the parts of a study; the same methods as `locking.Leases`.

    Args:
        study: The study.
    """

    def __init__(self, study: ObjectStudy) -> None:
        self._study = study
        self._tokens: dict[str, str] = {}
        self._looks: dict[str, tuple[str, float]] = {}
        self._count = 0
        self._lock = threading.Lock()  # no lease is renewed while it is given back
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, name: str) -> bool:
        """Takes a lease if it is free.

        Args:
            name: What it is for.

        Returns:
            Whether this process holds it now.
        """
        from obstore.exceptions import AlreadyExistsError

        key, token = f"{LEASES}/{name}", uuid.uuid4().hex
        try:
            self._study.store.put(key, self._content(token), mode="create")
        except AlreadyExistsError:
            tag = self._tag_if_abandoned(key)
            if tag is None or not self._take_over(key, token, tag):
                return False
        self._looks.pop(key, None)
        self._tokens[name] = token
        if self._thread is None:
            self._thread = threading.Thread(target=self._renew, name="vitrail-leases", daemon=True)
            self._thread.start()
        return True

    def release(self, name: str) -> None:
        """Gives a lease back.

        Args:
            name: What it is for.
        """
        with self._lock, suppress(FileNotFoundError):
            token = self._tokens.pop(name)
            if self._token_in_store(name) == token:
                self._study.store.delete(f"{LEASES}/{name}")

    def others(self) -> bool:
        """Whether other workers are at work; those of other machines are looked at until one renews its lease.

        Returns:
            False once nobody has renewed any for `LEASE_S`.
        """
        names = [key for key in self._keys() if key.startswith("worker-") and key not in self._tokens]
        tags: dict[str, str] = {}
        while names:
            unclear = []
            for name in names:
                content, tag = self._read(f"{LEASES}/{name}")
                if not tag or self._tag_if_abandoned(f"{LEASES}/{name}") is not None:
                    continue
                host = content.get("host")
                if host == socket.gethostname() or tags.get(name, tag) != tag:
                    return True
                if not tags:
                    say_looking(f"Process {content.get('pid')} on {host}", self._study.address)
                tags[name] = tag
                unclear.append(name)
            names = unclear
            if names:
                time.sleep(LOOK_S)
        return False

    def sweep(self) -> None:
        """Removes leases that processes which were killed have left."""
        for name in self._keys():
            if name not in self._tokens and self._tag_if_abandoned(f"{LEASES}/{name}") is not None:
                with suppress(FileNotFoundError):
                    self._study.store.delete(f"{LEASES}/{name}")

    def release_all(self) -> None:
        """Gives every lease back."""
        self._end.set()
        for name in list(self._tokens):
            self.release(name)

    def _keys(self) -> list[str]:
        return [each["path"].rpartition("/")[2] for page in self._study.store.list(LEASES) for each in page]

    def _content(self, token: str) -> bytes:
        self._count += 1
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "token": token, "renewed": self._count}
        return json.dumps(holder).encode()

    def _token_in_store(self, name: str) -> str:
        return str(self._read(f"{LEASES}/{name}")[0].get("token", ""))

    def _read(self, key: str) -> tuple[dict[str, Any], str]:
        """What a lease says, and the tag of the object; empty where it is not there or says nothing."""
        try:
            answer = self._study.store.get(key)
            content = json.loads(bytes(answer.bytes()))
        except (FileNotFoundError, ValueError):
            return {}, ""
        return (content if isinstance(content, dict) else {}), str(answer.meta["e_tag"])

    def _take_over(self, key: str, token: str, tag: str) -> bool:
        """Writes an abandoned lease anew, unless another worker has done so since it was read."""
        from obstore.exceptions import PreconditionError

        try:
            self._study.store.put(key, self._content(token), mode={"e_tag": tag})
        except (PreconditionError, FileNotFoundError):
            return False
        return True

    def _tag_if_abandoned(self, key: str) -> str | None:
        """The tag of a lease whose holder has ended or not renewed it for a while, else None."""
        content, tag = self._read(key)
        if content.get("host") == socket.gethostname() and _has_ended(content.get("pid")):
            return tag
        if not tag:  # given back since it was seen
            return None
        now = time.monotonic()
        if self._looks.get(key, ("", 0.0))[0] != tag:
            self._looks[key] = tag, now
        return tag if now - self._looks[key][1] >= LEASE_S else None

    def _renew(self) -> None:
        """Writes the leases of this worker anew; one that another worker has taken meanwhile is left to it."""
        from obstore.exceptions import BaseError

        while not self._end.wait(LEASE_S / 3):
            for name, token in list(self._tokens.items()):
                with self._lock, suppress(BaseError, FileNotFoundError):  # the store may answer the next time
                    if name in self._tokens and self._token_in_store(name) == token:
                        self._study.store.put(f"{LEASES}/{name}", self._content(token), use_multipart=False)


def _has_ended(pid: object) -> bool:
    if not isinstance(pid, int) or os.name == "nt":  # where a signal of number 0 would end the process
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
