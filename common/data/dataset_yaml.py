"""Reads a `dataset.yaml` into a `DatasetSpec`, strictly: a key or value that is not understood is an error."""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from common.config import from_tree, read_config
from common.data.files import Range, Uint8, voc_colormap
from common.data.spec import BUILT_IN, IGNORE, INVALID, SPLITS, DatasetSpec, LabelPattern, image_folders
from common.errors import UserError

MAX_CLASSES = 254


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """Keys of a dataset.yaml, see `splits/README.md`; those of type Any may be written in several ways."""

    name: str | None = None
    root: str | None = None
    inside: tuple[str, ...] = (".",)
    images: tuple[str, ...] = ()
    labels: Any = ()
    variables: Any = field(default_factory=dict)
    classes: tuple[str, ...]
    palette: Any = "voc"
    ignore: Any = IGNORE
    label_map: Any = None
    others: Literal["ignore"] | None = None
    label_format: Literal["index", "color"] = "index"
    ignore_colors: tuple[tuple[int, int, int], ...] = ()
    ids: Literal["name", "path"] = "name"
    lists: Any = field(default_factory=dict)
    generator: Literal["splits.shapes_images"] | None = None
    confirm_0_255: bool = False
    orientation: Literal["upright", "stored"] = "upright"
    value_range: Range | None = None


def load_spec(name_or_yaml: str | Path, root: str | Path | None = None) -> DatasetSpec:
    """The dataset of a built-in name, of a folder with a `dataset.yaml`, or of such a file.

    The files need not be there yet: reading a list raises where they are not.

    Args:
        name_or_yaml: "voc", "splits/pets", "/data/pets/dataset.yaml" ...
        root: The data folder. Default: the one that an own dataset's yaml states; else the first of `SSS_DATA/<name>`,
            the yaml's folder or what it states, and `SSS_DATA` that holds the images.

    Raises:
        UserError: No such dataset, or a mistake in its yaml.
    """
    source = _find_yaml(str(name_or_yaml))
    tree = read_config(source)
    for key in ("inside", "images", "classes"):
        if isinstance(tree.get(key), str):
            tree[key] = [tree[key]]
    try:
        return Parser(source, from_tree(Description, tree, where=str(source))).spec(root)
    except UserError as error:
        quote = "; put names such as no, on, null and numbers in quotes" if "'classes[" in str(error) else ""
        raise UserError(f"{error}{quote}") from None


def _find_yaml(name: str) -> Path:
    path = Path(name)
    for place in (SPLITS / name / "dataset.yaml", path / "dataset.yaml", path):
        if place.is_file():
            return place
    known = sorted(folder.parent.name for folder in SPLITS.glob("*/dataset.yaml"))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else "give a name of these or the path of a dataset.yaml"
    raise UserError(f"dataset '{name}': unknown (known: {', '.join(known) or 'none'}); {hint}")


class Parser:
    """Turns the description of one dataset.yaml into a `DatasetSpec`, refusing whatever it does not understand."""

    def __init__(self, source: Path, description: Description) -> None:
        self.source, self.values = source, description

    def spec(self, root: str | Path | None) -> DatasetSpec:
        """The dataset, with its root resolved."""
        values, name = self.values, self.values.name or self.source.parent.name
        classes = self._classes()
        label_map = self._lut(len(classes), values.label_map, values.others)
        labels = self._labels(len(classes), label_map)
        variables = self._variables()
        self._check_patterns([*values.images, *(label.pattern for label in labels)], variables)
        if values.value_range and not values.value_range[0] < values.value_range[1]:
            self._fail("value_range", repr(values.value_range), "give [low, high] with low < high")
        found, searched = self._root(name, root, variables)
        lists, ranges = self._lists(found)
        return DatasetSpec(
            name=name,
            root=found,
            classes=classes,
            palette=self._palette(len(classes)),
            label_map=label_map,
            lists=lists,
            ranges=ranges,
            splits_dir=self.source.parent,
            source=self.source,
            images=values.images,
            labels=labels,
            variables=variables,
            label_format=values.label_format,
            ignore_colors=values.ignore_colors,
            keep_folders=values.ids == "path",
            generator=values.generator,
            confirmed_0_255=values.confirm_0_255,
            upright=values.orientation == "upright",
            value_range=values.value_range,
            searched=searched,
        )

    def _fail(self, key: str, what: str, remedy: str) -> NoReturn:
        raise UserError(f"{self.source}: {key}: {what}; {remedy}")

    def _mapping(self, value: Any, key: str) -> dict[Any, Any]:
        if not isinstance(value, dict):
            self._fail(key, f"expected 'key: value' lines, got {type(value).__name__}", "correct it")
        return value

    def _known(self, key: str, values: Mapping[Any, Any], keys: Sequence[str]) -> None:
        unknown = next((one for one in values if one not in keys), None)
        if unknown is not None:
            self._fail(key, f"unknown key '{unknown}'", f"known keys: {', '.join(keys)}")

    def _classes(self) -> tuple[str, ...]:
        names = tuple(unicodedata.normalize("NFC", name.strip()) for name in self.values.classes)
        if not 1 < len(names) <= MAX_CLASSES:
            self._fail("classes", f"{len(names)} names", f"give 2 to {MAX_CLASSES}")
        for i, name in enumerate(names):
            if not name or not name.isprintable():
                self._fail("classes", f"entry {i} is {name!r}", "give every class a name to print")
            if name in names[:i]:
                self._fail("classes", f"'{name}' names two classes", "give every class a name of its own")
        return names

    def _palette(self, count: int) -> Uint8:
        rows = self.values.palette
        if rows == "voc":
            return voc_colormap(count)
        if not isinstance(rows, list) or not all(
            isinstance(row, list) and len(row) == 3 and all(type(x) is int and 0 <= x <= 255 for x in row)
            for row in (*rows, *map(list, self.values.ignore_colors))
        ):
            self._fail("palette", "not a list of colours", "write each as [red, green, blue], 0..255")
        if len(rows) != count:
            self._fail("palette", f"{len(rows)} colours for {count} classes", "give one colour per class")
        if self.values.label_format == "color" and len({tuple(row) for row in rows}) < count:
            self._fail(
                "palette", "two classes share a colour", "masks painted in the palette need distinct colours"
            )
        return np.array(rows, dtype=np.uint8)

    def _variables(self) -> dict[str, str | tuple[str, ...]]:
        result: dict[str, str | tuple[str, ...]] = {}
        for name, value in self._mapping(self.values.variables, "variables").items():
            result[str(name)] = tuple(map(str, value)) if isinstance(value, list) else str(value)
            try:
                re.compile("" if isinstance(value, list) else str(value))
            except re.error as error:
                self._fail(f"variables.{name}", f"not a regular expression ({error})", "correct it")
        return result

    def _check_patterns(self, patterns: Iterable[str], variables: Mapping[str, object]) -> None:
        for pattern in patterns:
            names = set(re.findall(r"\{(.*?)\}", pattern))
            unknown = sorted(names - {"id", *variables})
            if unknown:
                self._fail(
                    "patterns", f"'{{{unknown[0]}}}' in '{pattern}' is unknown", "name it in 'variables'"
                )
            if "id" not in names:
                self._fail("patterns", f"'{pattern}' lacks '{{id}}'", "put {id} where the image's id stands")

    def _ids(self, key: str, value: Any) -> list[int]:
        if value in (None, "none"):
            return []
        ids = value if isinstance(value, list) else [value]
        if not all(type(item) is int and -1 <= item <= 65535 for item in ids):
            self._fail(key, repr(value), "give stored values -1..65535, a list of them, or 'none'")
        return ids

    def _lut(self, count: int, label_map: Any, others: Any) -> Uint8:
        """The table from stored values to train ids.

        `label_map` comes first, then `ignore`, then `others`. Values that none of them names stay as they are,
        unless the map already gives every class a source: then they can only be mistakes.
        """
        lut = np.full(65536, INVALID, dtype=np.uint8)
        targets = self._targets(count, label_map)
        if others == "ignore":
            lut[:] = IGNORE
        elif others is not None:
            self._fail("others", repr(others), "the only choice is 'ignore'")
        elif not set(targets.values()) >= set(range(count)):
            lut[:count] = np.arange(count, dtype=np.uint8)
        ignored = dict.fromkeys(self._ids("ignore", self.values.ignore), IGNORE)
        for stored, train_id in {**ignored, **targets}.items():
            lut[[255, 65535] if stored == -1 else stored] = train_id  # -1 as files of 8 and 16 bits hold it
        return lut

    def _targets(self, count: int, label_map: Any) -> dict[int, int]:
        targets: dict[int, int] = {}
        for stored, target in self._mapping(label_map or {}, "label_map").items():
            train_id = IGNORE if target in ("ignore", IGNORE) else target
            if type(stored) is not int or not -1 <= stored <= 65535:
                self._fail("label_map", f"stored value {stored!r}", "give numbers -1..65535")
            if type(train_id) is not int or not (0 <= train_id < count or train_id == IGNORE):
                self._fail("label_map", f"{stored}: {target}", f"targets are 0..{count - 1} or 'ignore'")
            targets[stored] = train_id
        return targets

    def _labels(self, count: int, default: Uint8) -> tuple[LabelPattern, ...]:
        value, patterns = self.values.labels, list[LabelPattern]()
        for entry in value if isinstance(value, list | tuple) else [value]:
            if isinstance(entry, str):
                patterns.append(LabelPattern(entry, default))
                continue
            values = self._mapping(entry, "labels")
            self._known("labels", values, ("path", "label_map", "others"))
            lut = self._lut(count, values.get("label_map"), values.get("others"))
            paths = values.get("path", [])
            patterns += [
                LabelPattern(str(path), lut) for path in ([paths] if isinstance(paths, str) else paths)
            ]
        return tuple(patterns)

    def _root(
        self, name: str, root: str | Path | None, variables: Mapping[str, str | tuple[str, ...]]
    ) -> tuple[Path | None, tuple[Path, ...]]:
        """The data folder and the places tried; see `load_spec`."""
        values, env = self.values, os.environ.get("SSS_DATA")
        if values.generator is not None:
            if root is not None:
                self._fail("root", f"'{root}' given for a generated dataset", "leave data.root unset")
            return None, ()
        built_in = name in BUILT_IN and self.source.parent.parent == SPLITS
        own = self.source.parent / Path(os.path.expandvars(values.root or ".")).expanduser()
        bases = [own]
        if root is not None:
            bases = [Path(root).expanduser()]
        elif env and (built_in or values.root is None):
            data = Path(env).expanduser()
            bases = [data / name, data, own] if built_in else [data / name, own, data]
        folders = image_folders(values.images, variables) or ["."]
        for base in bases:
            for place in (Path(os.path.normpath(base / part)) for part in values.inside):
                if any((place / folder).is_dir() for folder in folders):
                    return place, tuple(bases)
        existing = [base for base in bases if base.is_dir()]
        return Path(os.path.normpath((existing or bases)[0])), tuple(bases)

    def _lists(self, root: Path | None) -> tuple[dict[str, Path], dict[str, range]]:
        lists: dict[str, Path] = {}
        ranges: dict[str, range] = {}
        for name, value in self._mapping(self.values.lists, "lists").items():
            if isinstance(value, dict):
                self._known(f"lists.{name}", value, ("first", "count"))
                first, count = value.get("first", 0), value.get("count")
                if type(first) is not int or type(count) is not int or first < 0 or count < 1:
                    self._fail(f"lists.{name}", repr(value), "give 'first' and 'count' as numbers")
                ranges[str(name)] = range(first, first + count)
                continue
            files = value if isinstance(value, list) else [value]
            places = [self.source.parent / str(file) for file in files]
            places += [root / str(file) for file in files] if root else []
            lists[str(name)] = next((place for place in places if place.is_file()), places[0])
        return lists, ranges
