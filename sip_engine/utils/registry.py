"""Names that a setting may hold and what stands behind each: built in, registered by a call, or an entry point."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from sip_engine.utils.errors import ConfigError

T = TypeVar("T")
U = TypeVar("U")


class Registry(Generic[T]):
    """Implementations of one thing by name.

    Built-in ones are named by `module:attribute` and imported when first asked for, so that a config is read without
    what its implementations need. Other packages add theirs by `register`, or by an entry point of the group
    `group`, which is looked at only for a name that is neither built in nor registered.
    """

    def __init__(self, what: str, group: str, built_in: Mapping[str, str]) -> None:
        """what: how messages call the thing, such as "objective"."""
        self.what, self.group = what, group
        self._built_in = dict(built_in)
        self._registered: dict[str, T] = {}

    def register(self, name: str) -> Callable[[U], U]:
        """A decorator that gives an implementation its name; the same one may be registered again.

        Raises:
            ConfigError: the name belongs to another implementation.
        """

        def add(implementation: U) -> U:
            known = self._registered.get(name)
            if name in self._built_in or (known is not None and known is not implementation):
                raise ConfigError(f"{self.what} {name!r} is there already: give yours another name")
            self._registered[name] = implementation  # type: ignore[assignment]
            return implementation

        return add

    def forget(self, name: str) -> None:
        """Take a registered name back, as a test does."""
        del self._registered[name]

    def __contains__(self, name: object) -> bool:
        """Whether a name is known; nothing is imported, and packages are looked at last."""
        return (
            name in self._built_in
            or name in self._registered
            or any(point.name == name for point in entry_points(group=self.group))
        )

    def check(self, name: str) -> str:
        """The name itself, for a setting's validator; nothing is imported.

        Raises:
            ValueError: there is no such name; says those there are.
        """
        if name not in self:
            raise ValueError(self._unknown(name))
        return name

    def is_built_in(self, name: str) -> bool:
        """Whether a name is one of the engine's own."""
        return name in self._built_in

    def names(self) -> list[str]:
        """All names: built in, registered, and of installed packages."""
        found = {point.name for point in entry_points(group=self.group)}
        return list(dict.fromkeys([*self._built_in, *self._registered, *sorted(found)]))

    def get(self, name: str) -> T:
        """What stands behind a name.

        Raises:
            ConfigError: no such name (lists those there are), or its package cannot be loaded.
        """
        if name in self._built_in:
            module, _, attribute = self._built_in[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        if name in self._registered:
            return self._registered[name]
        points = list(entry_points(group=self.group, name=name))
        if not points:
            raise ConfigError(self._unknown(name))
        if len({point.value for point in points}) > 1:
            values = " and ".join(sorted(point.value for point in points))
            raise ConfigError(f"{self.what} {name!r} is in two installed packages, {values}: remove one")
        found = self._load(name, points[0])
        self.register(name)(found)
        return found

    def _load(self, name: str, point: EntryPoint) -> T:
        try:
            return point.load()
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{self.what} {name!r} (entry point {point.value}) cannot be loaded: {type(error).__name__}: {reason}"
            ) from error

    def _unknown(self, name: str) -> str:
        names = self.names()
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown {self.what} {name!r}; known: {', '.join(names)}{hint}"
