"""Reads a `dataset.yaml` into a `DatasetSpec`, strictly: a key or value that is not understood is an error."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml

from common.data.files import Uint8, voc_colormap
from common.data.spec import IGNORE, INVALID, SPLITS, DatasetSpec, LabelPattern, image_folders
from common.errors import UserError

MAX_CLASSES = 254
KEYS = (
    *("name", "root", "inside", "images", "labels", "variables", "classes", "palette", "ignore", "label_map"),
    *("others", "label_format", "ignore_colors", "ids", "lists", "generator", "confirm_0_255"),
)


def load_spec(name_or_yaml: str | Path, root: str | Path | None = None) -> DatasetSpec:
    """The dataset of a built-in name, of a folder with a `dataset.yaml`, or of such a file.

    The files need not be there yet: reading a list raises where they are not.

    Args:
        name_or_yaml: "voc", "splits/pets", "/data/pets/dataset.yaml" ...
        root: The data folder. Default: the first of `SSS_DATA/<name>`, `SSS_DATA` and the yaml's own root that
            holds the images.

    Raises:
        UserError: No such dataset, or a mistake in its yaml.
    """
    source = _find_yaml(str(name_or_yaml))
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not valid YAML ({' '.join(str(error).split())})") from None
    return Parser(source, content).spec(root)


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
    """Turns the content of one dataset.yaml into a `DatasetSpec`, refusing whatever it does not understand."""

    def __init__(self, source: Path, content: Any) -> None:
        self.source = source
        self.values = self._mapping(content, "the file")
        self._known(self.values, KEYS)

    def spec(self, root: str | Path | None) -> DatasetSpec:
        """The dataset, with its root resolved."""
        name = str(self.values.get("name", self.source.parent.name))
        classes = self._strings("classes")
        if not 1 < len(classes) <= MAX_CLASSES:
            self._fail("classes", f"{len(classes)} names", f"give 2 to {MAX_CLASSES}")
        generator = self.values.get("generator")
        if generator not in (None, "shapes"):
            self._fail("generator", repr(generator), "the only generator is 'shapes'")
        ignore_colors = tuple(tuple(map(int, row)) for row in self._colors("ignore_colors"))
        images = self._strings("images") if "images" in self.values else ()
        variables = self._variables()
        label_map = self._lut(len(classes), self.values.get("label_map"), self.values.get("others"))
        labels = self._labels(len(classes), label_map)
        self._check_patterns([*images, *(label.pattern for label in labels)], variables)
        found, searched = self._root(name, root, images, variables, generator is not None)
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
            images=images,
            labels=labels,
            variables=variables,
            label_format=self._choice("label_format", "index", "color"),
            ignore_colors=ignore_colors,  # type: ignore[arg-type]  # rows of three, checked by _colors
            keep_folders=self._choice("ids", "name", "path") == "path",
            generator=generator,
            confirmed_0_255=self._choice("confirm_0_255", False, True),
            searched=searched,
        )

    def _fail(self, key: str, what: str, remedy: str) -> NoReturn:
        raise UserError(f"{self.source}: {key}: {what}; {remedy}")

    def _mapping(self, value: Any, what: str) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise UserError(
                f"{self.source}: {what}: expected 'key: value' lines, got {type(value).__name__}; correct it"
            )
        return value

    def _known(self, values: Mapping[Any, Any], keys: Sequence[str]) -> None:
        for key in values:
            if key not in keys:
                close = difflib.get_close_matches(str(key), keys, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(keys)}"
                raise UserError(f"{self.source}: unknown key '{key}'; {hint}")

    def _choice(self, key: str, default: Any, *others: Any) -> Any:
        value = self.values.get(key, default)
        if value not in (default, *others):
            self._fail(key, repr(value), f"choose one of {', '.join(map(str, (default, *others)))}")
        return value

    def _strings(self, key: str) -> tuple[str, ...]:
        if key not in self.values:
            raise UserError(f"{self.source}: key '{key}' is missing; see splits/README.md")
        value = self.values[key]
        values = [value] if isinstance(value, str) else value
        if (
            not isinstance(values, list)
            or not values
            or any(isinstance(item, dict | list) for item in values)
        ):
            self._fail(key, repr(value), "give a text or a list of texts")
        return tuple(str(item) for item in values)

    def _colors(self, key: str) -> list[list[int]]:
        rows = self.values.get(key, [])
        ok = isinstance(rows, list) and all(
            isinstance(row, list) and len(row) == 3 and all(type(x) is int and 0 <= x <= 255 for x in row)
            for row in rows
        )
        if not ok:
            self._fail(key, "not a list of colours", "write each as [red, green, blue], 0..255")
        return [list(row) for row in rows]

    def _palette(self, count: int) -> Uint8:
        if self.values.get("palette", "voc") == "voc":
            return voc_colormap(count)
        rows = self._colors("palette")
        if len(rows) != count:
            self._fail("palette", f"{len(rows)} colours for {count} classes", "give one colour per class")
        if self.values.get("label_format") == "color" and len({tuple(row) for row in rows}) < count:
            self._fail(
                "palette", "two classes share a colour", "masks painted in the palette need distinct colours"
            )
        return np.array(rows, dtype=np.uint8)

    def _variables(self) -> dict[str, str | tuple[str, ...]]:
        result: dict[str, str | tuple[str, ...]] = {}
        for name, value in self._mapping(self.values.get("variables", {}), "variables").items():
            if isinstance(value, list):
                result[str(name)] = tuple(map(str, value))
                continue
            try:
                re.compile(str(value))
            except re.error as error:
                self._fail(f"variables.{name}", f"not a regular expression ({error})", "correct it")
            result[str(name)] = str(value)
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
        ignored = dict.fromkeys(self._ids("ignore", self.values.get("ignore", IGNORE)), IGNORE)
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
        value = self.values.get("labels", [])
        patterns: list[LabelPattern] = []
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, str):
                patterns.append(LabelPattern(entry, default))
                continue
            values = self._mapping(entry, "labels")
            self._known(values, ("path", "label_map", "others"))
            lut = self._lut(count, values.get("label_map"), values.get("others"))
            paths = values.get("path", [])
            patterns += [
                LabelPattern(str(path), lut) for path in ([paths] if isinstance(paths, str) else paths)
            ]
        return tuple(patterns)

    def _root(
        self,
        name: str,
        root: str | Path | None,
        images: tuple[str, ...],
        variables: Mapping[str, str | tuple[str, ...]],
        generated: bool,
    ) -> tuple[Path | None, tuple[Path, ...]]:
        """The data folder and the places tried: the argument alone, or SSS_DATA and then the yaml's own root."""
        if generated:
            if root is not None:
                self._fail("root", f"'{root}' given for a generated dataset", "leave data.root unset")
            return None, ()
        if root is not None:
            bases = [Path(root).expanduser()]
        else:
            env = os.environ.get("SSS_DATA")
            bases = [Path(env).expanduser() / name, Path(env).expanduser()] if env else []
            own = Path(os.path.expandvars(str(self.values.get("root", ".")))).expanduser()
            own = own if own.is_absolute() else self.source.parent / own
            bases.insert(
                len(bases) if images else 1, own
            )  # without a pattern SSS_DATA itself cannot be recognized
        inside = self._strings("inside") if "inside" in self.values else (".",)
        folders = image_folders(images, variables) or ["."]
        for base in bases:
            for place in (Path(os.path.normpath(base / part)) for part in inside):
                if any((place / folder).is_dir() for folder in folders):
                    return place, tuple(bases)
        existing = [base for base in bases if base.is_dir()]
        return Path(os.path.normpath((existing or bases)[0])), tuple(bases)

    def _lists(self, root: Path | None) -> tuple[dict[str, Path], dict[str, range]]:
        lists: dict[str, Path] = {}
        ranges: dict[str, range] = {}
        for name, value in self._mapping(self.values.get("lists", {}), "lists").items():
            if isinstance(value, dict):
                self._known(value, ("first", "count"))
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
