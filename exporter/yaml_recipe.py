"""YAML as recipes need it: no key may stand twice, and single values may be changed from the command line."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from exporter.errors import RecipeError
from exporter.validation import flat

_MAX_BYTES = 2**20


def read_yaml(path: Path, settings: Iterable[str]) -> dict[str, Any]:
    """Read a file as a mapping and change it.

    Args:
        path: the YAML file.
        settings: changes; see `apply_setting`.

    Raises:
        RecipeError: it cannot be read, is no YAML or no mapping, or a change has no place in it.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            msg = f"{path}: too large; got {path.stat().st_size} bytes, expected at most {_MAX_BYTES}. Is it a recipe?"
            raise RecipeError(msg)
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: TID251 - a subclass of SafeLoader
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}. Check the path."
        raise RecipeError(msg) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        msg = f"{path}: not valid YAML: {flat(str(error))}. Mend the line it names."
        raise RecipeError(msg) from error
    if not isinstance(raw, dict):
        msg = (
            f"{path.name}: got {type(raw).__name__}, expected a mapping with name, source, targets, ... See the README."
        )
        raise RecipeError(msg)
    for setting in settings:
        apply_setting(raw, setting)
    return raw


def take_out(raw: dict[str, Any], loc: tuple[int | str, ...]) -> bool:
    """Remove the key that a path leads to; False where there is none, or a list would lose an entry.

    Args:
        raw: the recipe as read; changed in place.
        loc: as pydantic states places; what is no key of `raw`, such as a union's branch, ends the path.
    """
    holder: Any = None
    here: Any = raw
    key: int | str = ""
    for part in loc:
        inside = part in here if isinstance(here, dict) else isinstance(part, int) and isinstance(here, list)
        if not inside or (isinstance(here, list) and not 0 <= int(part) < len(here)):
            break
        holder, key, here = here, part, here[part]
    if not isinstance(holder, dict):
        return False
    del holder[key]
    return True


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, which YAML itself would resolve silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping whose keys are unique."""
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {  # 2:4 is a pattern of zeros; YAML 1.1 reads it as 124, a number of base 60
    first: [("tag:yaml.org,2002:str", re.compile(r"\d+:\d+\Z")), *known] if first.isdigit() else known
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def apply_setting(raw: dict[str, Any], setting: str) -> None:
    """Change one value in place.

    Args:
        raw: the recipe as read.
        setting: such as ``stages[0].prune.keep_ratio=0.5``; the value is read as YAML.

    Raises:
        RecipeError: no value, or no such place.
    """
    path, equals, text = setting.partition("=")
    keys = [int(key) if key.isdigit() else key for key in re.sub(r"\[(\d+)\]", r".\1", path).split(".")]
    if not equals or not path:
        msg = f"--set {setting}: got no '=', expected KEY.PATH=VALUE, such as sampling.steps=10."
        raise RecipeError(msg)
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: TID251 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        msg = f"--set {setting}: the value is not valid YAML: {flat(str(error))}. Quote it."
        raise RecipeError(msg) from error
    here: Any = raw
    for key in keys[:-1]:
        if isinstance(key, int) and isinstance(here, list) and key < len(here):
            here = here[key]
        elif isinstance(key, str) and isinstance(here, dict):
            here = here.setdefault(key, {})
        else:
            msg = f"--set {setting}: there is no '{key}' in that place of the recipe. Check the path."
            raise RecipeError(msg)
    last = keys[-1]
    in_mapping = isinstance(here, dict) and isinstance(last, str)
    in_list = isinstance(here, list) and isinstance(last, int) and last < len(here)
    if in_mapping or in_list:
        here[last] = value
    else:
        msg = f"--set {setting}: there is no '{last}' in that place of the recipe. Check the path."
        raise RecipeError(msg)
