"""An index that is made by another item's form is the one that the item itself gives; any other item is left alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from places import DATA
from rankload.loader.errors import RankloadError
from rankload.loader.formats.dcp_metadata import read_metadata
from rankload.loader.formats.pickle.inert import PickledTensor
from rankload.loader.formats.torch_file import FileIndex
from rankload.loader.formats.torch_items import (
    ITEM_END_BYTES,
    SMALL_ITEM_BYTES,
    ItemForms,
    item_ends,
    read_item,
)

FOLDERS = ("dcp-fsdp2-w2", "dcp-tp-fsdp-w4", "lightning-mp-w2")


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def told(index: FileIndex) -> Any:
    """All that an index says."""
    tree = index.tree
    if isinstance(tree, PickledTensor):
        tree = (tree.dtype, tree.shape, tree._stride, tree._offset, tree.requires_grad, tree.storage)
    return index.path, index.name, index.size_bytes, index.verifiable, index.storages, index.format, tree


class Reader:
    """Reads the items of one file, by their forms where these are known."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.forms = ItemForms()
        self.by_form = 0

    def read(self, start: int, stop: int) -> FileIndex:
        """The item's index; whether or not it is made by a form, all that it says is compared with the item's own."""
        by_form = self.index(start, stop)
        own = read_item(str(self.file), start, stop, name="it", key="w:", forms=self.forms)
        if by_form is not None:
            self.by_form += 1
            assert told(by_form) == told(own)
        return own

    def index(self, start: int, stop: int) -> FileIndex | None:
        data = self.file.read_bytes()[start:stop]
        ends = b"".join(data[at : at + length] for at, length in item_ends(stop - start))
        return self.forms.index(str(self.file), start, stop - start, ends, "it", "w:")


@pytest.mark.parametrize("name", FOLDERS)
def test_items_as_torch_writes_them(name: str) -> None:
    folder = DATA / name / "ckpt"
    readers: dict[str, Reader] = {}
    items = list(read_metadata(str(folder / ".metadata"), name="it").items())
    for item in items:
        reader = readers.setdefault(item.file, Reader(folder / item.file))
        reader.read(item.offset, item.stop)
    assert sum(reader.by_form for reader in readers.values()) > len(items) // 3


VALUES: dict[str, Any] = {
    "a tensor": torch.arange(6.0).reshape(2, 3),
    "another one's values": torch.ones(2, 3),
    "transposed": torch.arange(6.0).reshape(3, 2).t(),
    "of another dtype": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    "bfloat16": torch.ones(2, 3, dtype=torch.bfloat16),
    "without elements": torch.ones(0, 3),
    "without dimensions": torch.tensor(3.0),
    "a part of its storage": torch.arange(12.0)[3:9].reshape(2, 3),
    "that requires gradients": torch.ones(2, 3, requires_grad=True),
    "a number": 3,
    "another number": 4,
    "text": "abc",
    "nothing": None,
    "a list": [1, 2],
    "a dict of tensors": {"a": torch.ones(2), "b": torch.ones(2)},
    "as large as is read at once": torch.ones((SMALL_ITEM_BYTES - 1600) // 4),
    "larger": torch.ones(SMALL_ITEM_BYTES),
    "larger, of other values": torch.zeros(SMALL_ITEM_BYTES),
}


def test_items_of_every_form_in_one_file(tmp_path: Path) -> None:
    """Each twice, in two orders: what comes between them changes nothing."""
    file = tmp_path / "it"
    items = [saved(value) for value in (*VALUES.values(), *reversed(VALUES.values()))]
    file.write_bytes(b"".join(items))
    reader, start = Reader(file), 0
    for data in items:
        reader.read(start, start + len(data))
        start += len(data)
    # A list and a dict, which could be changed by who has them, are made for each.
    assert len(VALUES) - 2 <= reader.by_form <= len(items) - 4


@pytest.mark.parametrize("numel", [4, SMALL_ITEM_BYTES])
def test_what_contradicts_itself_has_no_form(numel: int, tmp_path: Path) -> None:
    """Whatever byte is another one, of those that are read: the item's own index, or its error."""
    data = saved(torch.arange(float(numel)))
    file = tmp_path / "it"
    file.write_bytes(data)
    reader = Reader(file)
    reader.read(0, len(data))
    assert reader.index(0, len(data)) is not None
    places = [at for first, length in item_ends(len(data)) for at in range(first, first + length)]
    assert len(places) == (len(data) if numel == 4 else 2 * ITEM_END_BYTES)
    by_form = 0
    for number, at in enumerate(places):
        changed = bytearray(data)
        changed[at] ^= 1 << number % 8
        file.write_bytes(changed)
        found = reader.index(0, len(data))
        if found is not None:
            by_form += 1
            assert told(found) == told(read_item(str(file), 0, len(data), name="it", key="w:")), at
    # The values, the checksums of two records, what torch makes of these, and their descriptors.
    assert 0 < by_form < (150 if numel == 4 else 3000)


def test_a_form_is_not_made_of_what_is_refused(tmp_path: Path) -> None:
    data = bytearray(saved(torch.arange(4.0)))
    data[data.index(b"data/0") - 8] ^= 1  # in the record's header
    file = tmp_path / "it"
    file.write_bytes(data)
    reader = Reader(file)
    with pytest.raises(RankloadError):
        reader.read(0, len(data))
    assert reader.index(0, len(data)) is None


def test_no_form_where_nothing_is_summed(tmp_path: Path) -> None:
    """Such a file is told from one whose checksums are all zero by its index alone."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        data = saved(torch.arange(4.0))
    finally:
        torch.serialization.set_crc32_options(before)
    file = tmp_path / "it"
    file.write_bytes(data)
    reader = Reader(file)
    assert not reader.read(0, len(data)).verifiable
    assert reader.index(0, len(data)) is None
