"""Which rank sums which of an engine's files, and how a tag's folder gets its name."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.stores.manifest import FOLDER_SUMS
from rankload.loader.writing.engine import deal_files, list_files, remove_unfinished, take_name

files = st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(0, 3), st.integers(0, 1)).map(list))


@given(st.lists(files, min_size=1, max_size=4))
def test_each_file_is_summed_once_by_a_rank_that_sees_the_lowest_ranks(seen):
    dealt = deal_files(seen)
    assert len(dealt) == len(seen)
    names = [name for own in dealt for name in own]
    assert sorted(names) == sorted({name for one in seen for name in one})
    for rank, own in enumerate(dealt):
        for name in own:
            first = next(one for one in seen if name in one)
            assert seen[rank][name] == first[name]


@given(st.integers(1, 6), st.lists(st.integers(0, 1000), max_size=30))
def test_files_that_all_see_are_shared_equally(world_size, sizes):
    seen = {f"file{index}": [size, index] for index, size in enumerate(sizes)}
    loads = [sum(seen[name][0] for name in own) for own in deal_files([seen] * world_size)]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def folder_of(path: Path, **contents: str) -> Path:
    path.mkdir(parents=True)
    for name, text in contents.items():
        (path / name).write_text(text)
    return path


def test_files_are_listed_with_those_in_folders_inside(tmp_path: Path):
    folder_of(tmp_path / "tag" / "offloaded", b="22")
    (tmp_path / "tag" / "a").write_text("1")
    assert {name: one[0] for name, one in list_files(str(tmp_path / "tag")).items()} == {
        "a": 1,
        "offloaded/b": 2,
    }
    assert list_files(str(tmp_path / "none")) == {}


def test_a_tag_takes_the_place_of_one_of_its_name(tmp_path: Path):
    for text in ("old", "new"):
        part = folder_of(tmp_path / "step1.0123abcd.part", a=text)
        take_name(str(part), str(tmp_path / "step1"))
        assert os.listdir(tmp_path) == ["step1"]
        assert (tmp_path / "step1" / "a").read_text() == text


def test_a_tag_takes_the_place_of_a_link_to_a_folder_which_stays(tmp_path: Path):
    folder_of(tmp_path / "mine", a="old")
    (tmp_path / "step1").symlink_to("mine")
    take_name(str(folder_of(tmp_path / "step1.0123abcd.part", a="new")), str(tmp_path / "step1"))
    assert sorted(os.listdir(tmp_path)) == ["mine", "step1"]
    assert (tmp_path / "mine" / "a").read_text() == "old"
    assert (tmp_path / "step1" / "a").read_text() == "new"


def test_unfinished_tags_go_and_whole_ones_get_their_name_where_it_is_free(tmp_path: Path):
    whole = {FOLDER_SUMS: ""}
    folder_of(tmp_path / "step1.0123abcd.part")
    folder_of(tmp_path / "step2.0123abcd.part", **whole)
    folder_of(tmp_path / "step3.0123abcd.part", **whole)
    folder_of(tmp_path / "step3", a="")
    (tmp_path / "latest.0123abcd.part").write_text("")
    folder_of(tmp_path / "mine.part")
    remove_unfinished(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["mine.part", "step2", "step3"]
    assert os.listdir(tmp_path / "step3") == ["a"]
