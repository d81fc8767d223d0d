"""`python -m splits get` and `list`: published lists, downloaded and verified."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from common.data.dataset_yaml import load_spec
from common.data.files import write_bytes
from common.data.lists import read_ids
from common.errors import UserError
from splits.published import (
    Content,
    Published,
    derive,
    fetch,
    find_published,
    list_ids,
    load_published,
    say,
    store,
)


def get(names: Sequence[str], out: Path, base_url: str, order: Path | None, *, force: bool) -> None:
    """Download and verify published lists, and say of each where it is.

    With a setting come the official training and evaluation list of its dataset; those are no condition, as they may
    lie with the data already.

    Args:
        names: Names as `list` prints them, or the beginning of several.
        out: Folder of splits to write to.
        base_url: Where raw files are served, as GitHub does.
        order: For s4GAN's permutations: the list their indices count, where it is not a published one.
        force: Replace other lists that are in the way.

    Raises:
        UserError: An unknown name, a failed download, contents other than on record.
    """
    records = load_published()
    wanted = [record for name in names for record in find_published(name, records)]
    for record in wanted:
        if record.permutation is None:
            data = fetch(record, base_url)
        else:
            data = _derived(record, records, out, base_url, order)
        path = out / record.target
        state = "written" if store(path, data, record, force=force) else "already there"
        note = f" ({record.note})" if record.note else ""
        say(f"{path}: {record.count} {_unit(record)}, verified, {state}{note}")
    for record in records:
        if not _accompanies(record, wanted) or (out / record.target).is_file():
            continue
        try:
            store(out / record.target, fetch(record, base_url), record, force=False)
            say(f"{out / record.target}: {record.count} ids, verified, written")
        except UserError as error:
            say(f"note: {error}")


def _accompanies(record: Published, wanted: Sequence[Published]) -> bool:
    """Whether a run on the wanted lists reads this official list, too."""
    if record.protocol != "official" or record in wanted or record.name == "cityscapes/train_val":
        return False
    datasets = {other.dataset for other in wanted if other.role == "labeled"}
    return record.role in {"train", "val"} and record.dataset in datasets


def _unit(record: Published) -> str:
    return {"permutation": "indices", "flags": "rows"}.get(record.role, "ids")


def _derived(
    record: Published, records: Sequence[Published], out: Path, base_url: str, order: Path | None
) -> bytes:
    """A text list cut from a permutation; the permutation is kept beside it."""
    whole = next(other for other in records if other.name == record.permutation)
    pickled = out / whole.target
    if not pickled.is_file() or not whole.is_known(Content(pickled.read_bytes(), str(pickled))):
        write_bytes(pickled, fetch(whole, base_url))
    ids = read_ids(order) if order else _order(whole, records, base_url)
    return ("\n".join(derive(record, pickled.read_bytes(), ids)) + "\n").encode()


def _order(whole: Published, records: Sequence[Published], base_url: str) -> list[str]:
    """The ids that the indices of a permutation count, in order."""
    listed = next((record for record in records if record.name == whole.order), None)
    if listed is None:
        spec = load_spec(whole.dataset)
        path = spec.lists["train"]
        if not path.is_file():
            raise UserError(
                f"{whole.name}: its indices count the training images of '{whole.dataset}', which are not there; run "
                f"'python -m splits prepare {whole.dataset}' and set SSS_DATA, or give the list with --order FILE"
            )
        return read_ids(path)
    ids = list_ids(fetch(listed, base_url), listed.name)
    if whole.dataset == "cityscapes":
        return sorted(ids, key=lambda name: (name.split("_")[0], name))
    return ids


def print_names(out: Path) -> None:
    """Print every published name with its counts, its origin, and whether it is in `out`."""
    by_name: dict[str, list[Published]] = defaultdict(list)
    for record in load_published():
        by_name[record.name].append(record)
    for name, group in by_name.items():
        counts = " + ".join(f"{record.count} {record.role}" for record in group)
        here = "here" if all((out / record.target).is_file() for record in group) else "-"
        origin = next((record.sources[0].repository for record in group if record.sources), "permutation")
        say(f"{name:32} {here:5} {counts:34} {origin}")
