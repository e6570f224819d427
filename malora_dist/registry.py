"""Registries: to add a method, an exchange, a model family or a logger is to add one file.

A registry belongs to one package. Each of the package's files registers its class under the name that the
config uses; the files are imported when the registry is first asked, not before.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from malora_dist.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T], Mapping[str, type[T]]):
    """The classes of one kind by name, in alphabetical order.

    Args:
        package: dotted name of the package whose files register themselves.
        key: the config key that names one of them, for errors.
    """

    def __init__(self, package: str, key: str) -> None:
        self._package, self._key = package, key
        self._classes: dict[str, type[T]] = {}
        self._is_loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: make the class known under ``name``.

        Raises:
            ValueError: another class has that name.
        """

        def add(cls: type[T]) -> type[T]:
            taken = self._classes.get(name, cls)
            if (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"{self._key}={name!r} is already {taken.__module__}.{taken.__qualname__}")
            self._classes[name] = cls
            return cls

        return add

    @contextlib.contextmanager
    def registered(self, **classes: type[T]) -> Iterator[None]:
        """Inside it these classes are known too, under the names that they are given as."""
        for name, cls in classes.items():
            self.register(name)(cls)
        try:
            yield
        finally:
            for name in classes:
                del self._classes[name]

    def _load(self) -> dict[str, type[T]]:
        if not self._is_loaded:
            for module in pkgutil.iter_modules(importlib.import_module(self._package).__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._is_loaded = True
        return self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._load()))

    def __len__(self) -> int:
        return len(self._load())

    def __getitem__(self, name: str) -> type[T]:
        """The class of that name.

        Raises:
            ConfigError: there is none; names those there are.
        """
        if name not in self._load():
            raise ConfigError(self._key, name, f"must be one of {', '.join(self)}", "choose one of them")
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._load()
