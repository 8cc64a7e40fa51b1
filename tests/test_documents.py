"""Text from every source: read whole, and never both trained on and held out."""

import gzip
import json
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec.compression
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.texts import COMPRESS, DOCUMENTS, pack, sides, write
from unnorm.data import STDLIB, documents, files, open_documents
from unnorm.data.files import _PACKAGES, COMPRESSIONS, find_files
from unnorm.errors import UnnormError


class TestStdlib:
    def test_split_is_disjoint_stable_and_fair(self) -> None:
        train, validation = sides(open_documents(STDLIB))
        assert len(train) > 400
        assert not {text for text in train if text.strip()} & set(validation)
        assert sum(map(len, validation)) > 0.02 * sum(map(len, train))
        assert list(open_documents(STDLIB).validation()) == validation

    def test_no_tests_and_no_installed_packages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kept, others = ["a.py", "b/c.py"], ["test/d.py", "b/tests/e.py", "b/idle_test/f.py"]
        others += ["site-packages/g.py", "dist-packages/h.py"]
        for name in kept + others:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
        monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
        train, validation = sides(open_documents(STDLIB))
        assert {*train, *validation} == set(kept)

    def test_a_directory_of_that_name_does_not_matter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        (tmp_path / STDLIB).mkdir()
        monkeypatch.chdir(tmp_path)
        assert len(pack(STDLIB, tiny_tokenizer, 4, 2).train) == 4


class TestFiles:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
    def test_rows_are_documents(self, name: str, tmp_path: Path) -> None:
        train, validation = sides(open_documents(str(write(tmp_path / name, DOCUMENTS))))
        assert sorted([*train, *validation]) == sorted(DOCUMENTS)
        assert validation
        assert not set(train) & set(validation)
        assert [text for text in DOCUMENTS if text in train] == train  # in order

    @pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT"])
    def test_a_text_file_is_one_document(self, name: str, tmp_path: Path) -> None:
        path = tmp_path / name
        path.write_text("\n".join(DOCUMENTS))
        (train,), (validation,) = sides(open_documents(str(path)))
        assert train + validation == path.read_text()

    @pytest.mark.parametrize("compression", sorted(COMPRESS))
    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
    def test_compressed(self, suffix: str, compression: str, tmp_path: Path) -> None:
        plain = open_documents(str(write(tmp_path / f"a{suffix}", DOCUMENTS)))
        compressed = open_documents(str(write(tmp_path / f"a{suffix}{compression}", DOCUMENTS)))
        assert sides(compressed) == sides(plain)

    @pytest.mark.parametrize(("suffix", "package"), sorted(_PACKAGES.items()))
    def test_missing_decompressor_is_named(
        self, suffix: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delitem(fsspec.compression.compr, COMPRESSIONS[suffix], raising=False)
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(b"x")
        with pytest.raises(UnnormError, match=f"pip install {package}"):
            open_documents(str(path))

    @pytest.mark.parametrize("name", ["a.parquet.gz", "a.bin.gz", "a.tsv", "a.gz", "a"])
    def test_unknown_formats_are_refused(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b"some text")
        with pytest.raises(UnnormError, match=r"Don't know how to read .* Known: \.txt"):
            open_documents(str(tmp_path / name))

    def test_a_first_row_without_text_does_not_choose_another_column(self, tmp_path: Path) -> None:
        texts = [None, *(f"text {i}" for i in range(40))]
        for name, more in (("numbered", {"number": 1}), ("named", {"author": "x"})):
            rows = [json.dumps({"content": text, **more}) for text in texts]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        train, validation = sides(open_documents(str(tmp_path / "numbered.jsonl")))
        assert sorted(train + validation) == sorted(texts[1:])
        with pytest.raises(UnnormError, match="--text-field: content, author"):
            sides(open_documents(str(tmp_path / "named.jsonl")))

    @pytest.mark.parametrize("later", [{"meta": 1}, {"id": "x4"}, {"meta": {"b": [1]}}, {"id": None, "text": None}])
    def test_other_fields_may_change_from_row_to_row(self, later: dict[str, Any], tmp_path: Path) -> None:
        """Also after the ten million characters that `datasets` takes the fields from."""
        rows = [{"id": 1, "meta": {"a": 1}, "text": "x" * 2_000_000}] * 6
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "the last one", **later}]))
        texts = [len(text) for text in chain(*sides(open_documents(str(path))))]
        assert sum(texts) == 12_000_000 + (0 if "text" in later else len("the last one"))

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
    def test_files_need_not_have_the_same_columns(self, suffix: str, tmp_path: Path) -> None:
        tables = [{"text": DOCUMENTS[:60], "id": range(60)}, {"date": ["x"] * 60, "text": DOCUMENTS[60:]}]
        for name, table in zip("ab", tables, strict=True):
            frame = pd.DataFrame({key: list(values) for key, values in table.items()})
            path = tmp_path / "same" / f"{name}{suffix}"
            path.parent.mkdir(exist_ok=True)
            if suffix == ".jsonl":
                frame.to_json(path, orient="records", lines=True)
            else:
                (frame.to_csv if suffix == ".csv" else frame.to_parquet)(path, index=False)
        assert sorted(chain(*sides(open_documents(str(tmp_path / "same"))))) == sorted(DOCUMENTS)
        shutil.copytree(tmp_path / "same", tmp_path / "other")
        write(tmp_path / "other" / f"c{suffix}", DOCUMENTS, column="content")
        with pytest.raises(UnnormError, match=r"have no field 'text', unlike those before them: they have id, content"):
            list(open_documents(str(tmp_path / "other")).train())

    def test_a_list_of_objects_is_read_as_well(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in DOCUMENTS], indent=1))
        assert sorted(chain(*sides(open_documents(str(tmp_path / "a.json"))))) == sorted(DOCUMENTS)

    def test_a_line_that_is_no_json_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n{"text": unquoted}\n')
        with pytest.raises(UnnormError, match=r"Could not read .*a\.jsonl, line 3: Expecting value"):
            list(open_documents(str(tmp_path / "a.jsonl")).train())

    def test_what_can_not_be_written_elsewhere_is_no_damage(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import datasets

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", "elsewhere/cache")

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        path = write(tmp_path / "a.parquet", DOCUMENTS)
        with pytest.raises(UnnormError, match=r"Permission denied: 'elsewhere/cache'. Make that place writable"):
            open_documents(str(path))

    def test_a_file_that_can_not_be_read_is_not_taken_for_the_cache(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where it was named by a relative path, which its reader makes absolute."""

        def refuse(path: Path, newline: str | None) -> None:
            raise PermissionError(13, "Permission denied", str(path.absolute()))

        write(tmp_path / "a.jsonl", DOCUMENTS)
        monkeypatch.setattr("unnorm.data.files._open_text", refuse)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UnnormError, match=r"Permission denied: '.*a\.jsonl'\. Give yourself permission to read it"):
            open_documents("a.jsonl")

    def test_a_text_file_that_is_not_utf_8_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
        with pytest.raises(UnnormError, match=r"'utf-8' codec can't decode .* or not UTF-8"):
            open_documents(str(tmp_path / "a.txt"))

    @pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
    def test_every_end_of_line_is_read_alike(self, newline: str, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("\ufeff" + "\n".join(DOCUMENTS), newline=newline)
        (train,), (validation,) = sides(open_documents(str(tmp_path / "a.txt")))
        assert train + validation == "\n".join(DOCUMENTS)

    def test_no_more_texts_are_in_memory_than_it_takes_to_know_their_column(self, tmp_path: Path) -> None:
        """One text file may be as large as memory allows, so not a hundred of them are read before the first."""
        for number in range(3):
            (tmp_path / f"{number}.txt").write_text(f"text {number}")
        (tmp_path / "3.txt").write_bytes(b"\xff")
        texts = documents._texts("", files.rows_by_split(str(tmp_path), files.find_files(str(tmp_path)))["train"], None)
        assert [next(texts) for _ in range(3)] == [f"text {number}" for number in range(3)]

    def test_half_a_surrogate_pair_is_no_reason_to_stop(self, tmp_path: Path) -> None:
        """JSON has it where text was cut off in the middle of an emoji; tokenizers take none."""
        texts = [f"cut \ud83d end {i}" for i in range(40)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        found = sorted(chain(*sides(open_documents(str(tmp_path / "a.jsonl")))))
        assert found == sorted(text.replace("\ud83d", "?") for text in texts)

    def test_text_field(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"title": "T", "body": text}) + "\n" for text in DOCUMENTS))
        train, validation = sides(open_documents(str(path), text_field="body"))
        assert sorted([*train, *validation]) == sorted(DOCUMENTS)
        with pytest.raises(UnnormError, match="--text-field: title, body"):
            open_documents(str(path))

    def test_the_only_column_of_strings_is_the_text(self, tmp_path: Path) -> None:
        train, _ = sides(open_documents(str(write(tmp_path / "a.parquet", DOCUMENTS, column="content"))))
        assert set(train) < set(DOCUMENTS)

    def test_missing_and_blank_texts_are_passed_over(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        texts = ["first", None, "", "  \n", *DOCUMENTS]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        train, validation = sides(open_documents(str(path)))
        assert sorted([*train, *validation]) == sorted(["first", *DOCUMENTS])

    @pytest.mark.parametrize("name", ["a[1].txt", "st*r.txt", "what?.txt", "with space.txt", "ünïcode.txt"])
    def test_odd_names_are_names_and_no_patterns(self, name: str, tmp_path: Path) -> None:
        for other in ("a1.txt", "star.txt", "whats.txt"):
            (tmp_path / other).write_text("of another file")
        (tmp_path / name).write_text("of this file")
        (train,), (validation,) = sides(open_documents(str(tmp_path / name)))
        assert train + validation == "of this file"

    def test_home_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "a.jsonl", DOCUMENTS)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert len(sides(open_documents("~/a.jsonl"))[0]) > 90
        with pytest.raises(UnnormError, match="No data at '~no"):
            open_documents("~no.such.user/a.txt")

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
    def test_a_changed_file_is_read_anew(self, suffix: str, tmp_path: Path) -> None:
        path = write(tmp_path / f"a{suffix}", DOCUMENTS)
        stamp = path.stat()
        before = sides(open_documents(str(path)))
        write(path, [text.replace("Document", "Chapters") for text in DOCUMENTS])
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        after = sides(open_documents(str(path)))
        assert all("Document" in text for side in before for text in side)
        assert all("Chapters" in text and "Document" not in text for side in after for text in side)


class TestDirectoriesAndGlobs:
    def test_a_directory_is_all_files_in_it(self, tmp_path: Path) -> None:
        for number in range(4):
            write(tmp_path / f"deep/er/{number}.jsonl", DOCUMENTS[number * 30 : number * 30 + 30])
        train, validation = sides(open_documents(str(tmp_path)))
        assert sorted([*train, *validation]) == sorted(DOCUMENTS)

    def test_plain_and_compressed_files_of_one_format(self, tmp_path: Path) -> None:
        write(tmp_path / "0.jsonl", DOCUMENTS[:60])
        write(tmp_path / "1.jsonl.gz", DOCUMENTS[60:])
        train, validation = sides(open_documents(str(tmp_path)))
        assert sorted([*train, *validation]) == sorted(DOCUMENTS)

    def test_a_glob_picks_files(self, tmp_path: Path) -> None:
        write(tmp_path / "in/a.jsonl", DOCUMENTS[:60])
        write(tmp_path / "in/b.jsonl", DOCUMENTS[60:])
        write(tmp_path / "in/c.txt", ["not this"])
        train, validation = sides(open_documents(str(tmp_path / "**/*.jsonl")))
        assert sorted([*train, *validation]) == sorted(DOCUMENTS)
        with pytest.raises(UnnormError, match="No data at"):
            open_documents(str(tmp_path / "in/*.csv"))

    def test_mixed_formats_are_refused(self, tmp_path: Path) -> None:
        write(tmp_path / "a.txt", DOCUMENTS)
        write(tmp_path / "a.jsonl", DOCUMENTS)
        with pytest.raises(UnnormError, match=r"mixes formats \(\.jsonl, \.txt\)"):
            open_documents(str(tmp_path))

    @pytest.mark.parametrize("content", [{}, {"model.pt": b""}, {"a.bin.gz": b"", ".hidden/a.txt": b"x"}])
    def test_a_directory_without_data(self, content: dict[str, bytes], tmp_path: Path) -> None:
        for name, data in content.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
        with pytest.raises(UnnormError, match="holds no data files"):
            open_documents(str(tmp_path))

    def test_a_local_copy_of_a_hub_data_set(self, tmp_path: Path) -> None:
        """Its card and caches are no data; its splits are told by the names of the files."""
        (tmp_path / "README.md").write_text("# The card")
        (tmp_path / "dataset_infos.json").write_text("{}")
        (tmp_path / ".cache").mkdir()
        (tmp_path / ".cache/x.json").write_text("{}")
        write(tmp_path / "data/train-00000-of-00002.parquet", DOCUMENTS[:50])
        write(tmp_path / "data/train-00001-of-00002.parquet", DOCUMENTS[50:100])
        write(tmp_path / "data/validation-00000-of-00001.parquet", DOCUMENTS[100:110])
        write(tmp_path / "data/test-00000-of-00001.parquet", DOCUMENTS[110:])
        for source in (tmp_path, tmp_path / "data/*.parquet"):
            documents = open_documents(str(source))
            assert sides(documents) == (DOCUMENTS[:100], DOCUMENTS[100:110])
            assert documents.held_out == "the validation files"
        train, validation = sides(open_documents(str(tmp_path), split="test"))
        assert (train, validation) == (DOCUMENTS[110:], DOCUMENTS[100:110])
        train, validation = sides(open_documents(str(tmp_path), split="validation"))
        assert "".join(train + validation)
        assert {text[:11] for text in train} <= {text[:11] for text in DOCUMENTS[100:110]}
        with pytest.raises(UnnormError, match="no split 'dev'"):
            open_documents(str(tmp_path), split="dev")

    def test_a_local_copy_with_training_files_only(self, tmp_path: Path) -> None:
        write(tmp_path / "data/train-00000-of-00001.parquet", DOCUMENTS)
        train, validation = sides(open_documents(str(tmp_path)))
        assert sorted([*train, *validation]) == sorted(DOCUMENTS)

    @pytest.mark.parametrize("source", [STDLIB, "file"])
    def test_a_split_that_is_not_there(self, source: str, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", DOCUMENTS)
        with pytest.raises(UnnormError, match=r"no split 'test' \(--split\). It has: train"):
            open_documents(str(path) if source == "file" else source, split="test")

    def test_a_word_in_one_name_of_several_is_no_split(self, tmp_path: Path) -> None:
        for name in ("installation.md", "training.md", "usage.md"):
            (tmp_path / name).write_text("\n".join(f"line {i} of {name}" for i in range(40)))
        assert len(list(open_documents(str(tmp_path)).train())) == 3


class TestHeldOut:
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=150))
    def test_every_character_is_on_one_side(self, texts: list[str], tmp_path: Path) -> None:
        documents = open_documents(str(write(tmp_path / "a.jsonl", texts)))
        train, validation = sides(documents)
        if "hash" in documents.held_out:
            assert sorted([*train, *validation]) == sorted(texts)
            assert not set(train) & set(validation)
        else:
            halves = zip(documents.train(), documents.validation(), strict=True)
            assert [start + end for start, end in halves] == texts

    def test_the_last_tenth_of_a_single_document(self, tmp_path: Path) -> None:
        lines = [f"line {i}" for i in range(1000)]
        path = tmp_path / "a.txt"
        path.write_text("\n".join(lines))
        documents = open_documents(str(path))
        (train,), (validation,) = sides(documents)
        assert documents.held_out == "the last tenth of each document"
        assert 0.09 < len(validation) / len(train + validation) < 0.11
        assert train.endswith("\n")  # cut between lines


def test_a_hub_data_set_with_subsets_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: object) -> None:
        raise ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['small-v1', 'large-v1']\n"
            "Example of usage:\n\t`load_dataset('owner/text', 'small-v1')`"
        )

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(UnnormError, match=r"several subsets: small-v1, large-v1\. Name one .*'owner/text:small-v1'"):
        open_documents("owner/text")


def test_a_hub_data_set_that_is_a_script_is_read_as_the_hub_converted_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In folders as the hub's conversion lays them out, where a large data set's train split is a part of it."""
    import datasets

    for folder in ("plain_text/partial-train", "other/train", "other/test"):
        (tmp_path / folder).mkdir(parents=True)
        rows = {"text": [f"document {i} of {folder}" for i in range(200)]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / folder / "0000.parquet")

    def of_the_branch(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(name: str, subset: str | None = None, revision: str | None = None, **options: Any) -> Any:
            if revision != "refs/convert/parquet":
                raise RuntimeError("Dataset scripts are no longer supported, but found text.py")
            return function(str(tmp_path), **options)

        return call

    for function in (datasets.get_dataset_split_names, datasets.load_dataset_builder, datasets.load_dataset):
        monkeypatch.setattr(datasets, function.__name__, of_the_branch(function))
    with pytest.raises(UnnormError, match=r"several subsets: other, plain_text\. Name one .*'owner/text:other'"):
        open_documents("owner/text")
    documents = open_documents("owner/text:plain_text")
    texts = sorted([*documents.train(), *documents.validation()])
    assert texts == sorted(f"document {i} of plain_text/partial-train" for i in range(200))
    assert len(list(open_documents("owner/text:other", split="test").train())) > 100
    with pytest.raises(UnnormError, match=r"no split 'validation' .*It has: train, test"):
        open_documents("owner/text:other", split="validation")
    with pytest.raises(UnnormError, match=r"No data at 'owner/text:nothing'"):
        open_documents("owner/text:nothing")


def test_a_connection_that_breaks_is_not_taken_for_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def rows(*_: object, **__: object) -> Iterator[dict[str, object]]:
        yield {"text": "some text"}
        raise TimeoutError("Read timed out.")

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", rows)
    with pytest.raises(UnnormError, match=r"Read timed out\. If the connection broke, try again\."):
        list(open_documents("owner/text").train())


@pytest.mark.parametrize("pattern", ["*/*.jsonl", "**/*.jsonl", "t*/*.jsonl"])
def test_the_folders_of_a_glob_tell_splits(pattern: str, tmp_path: Path) -> None:
    for split in ("train", "test", "validation"):
        write(tmp_path / split / "0000.jsonl", [f"{split} {i}" for i in range(30)])
    train, validation = sides(open_documents(str(tmp_path / pattern)))
    assert {text.split()[0] for text in train} == {"train"}
    assert {text.split()[0] for text in validation} == {"train" if pattern.startswith("t") else "validation"}
    tested, _ = sides(open_documents(str(tmp_path / pattern), split="test"))
    assert {text.split()[0] for text in tested} == {"test"}


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".csv.gz", ".jsonl.gz"])
def test_files_without_rows_are_passed_over(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / f"b{suffix}", DOCUMENTS)
    alone = sides(open_documents(str(tmp_path)))
    write(tmp_path / f"a{suffix}", [])
    if suffix == ".csv.gz":
        (tmp_path / f"c{suffix}").write_bytes(gzip.compress(b""))
    assert sides(open_documents(str(tmp_path))) == alone


def test_parquet_may_have_an_index_of_names(tmp_path: Path) -> None:
    """As pandas writes it; in CSV such columns are fields too many."""
    names = [f"row {number}" for number in range(len(DOCUMENTS))]
    pd.DataFrame({"text": DOCUMENTS}, index=names).to_parquet(tmp_path / "a.parquet")
    found = sides(open_documents(str(tmp_path / "a.parquet"), "text"))
    assert found == sides(open_documents(str(write(tmp_path / "b.jsonl", DOCUMENTS))))


def test_csv_holds_text_alone(tmp_path: Path) -> None:
    """Words that stand for nothing elsewhere are kept, and so are numbers, however many there are."""
    texts = ["null", "NA", "nan", "None", *map(str, range(3000))]
    path = tmp_path / "a.csv"
    path.write_text("id,body\n0,some words\n" + "".join(f"{i},{text}\n" for i, text in enumerate(texts)))
    train, held_out = sides(open_documents(str(path)))
    assert sorted([*train, *held_out]) == sorted([*texts, "some words"])


@pytest.mark.parametrize(
    "beside", [[{"from": "human", "value": "some words"}], ["some words", "and more"], [["some words"]]]
)
def test_a_name_beside_lists_is_not_taken_for_the_text(beside: Any, tmp_path: Path) -> None:
    rows = [{"id": f"chat-{i}", "turns": beside} for i in range(100)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(UnnormError, match=r"unclear which field .* is the text\. .*--text-field: id, turns\."):
        open_documents(str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text(json.dumps([row | {"turns": [1, 2], "about": {"a": "b"}} for row in rows]))
    assert sum(map(len, sides(open_documents(str(tmp_path / "b.json"))))) == 100


@pytest.mark.parametrize("values", [["True", "False"], ["1.5e-07", "-2"], ["", "NaN"], ["", ""]])
def test_what_is_no_text_in_csv_is_not_taken_for_it(values: list[str], tmp_path: Path) -> None:
    rows = "".join(f"some words {i},{values[i % 2]}\n" for i in range(100))
    (tmp_path / "a.csv").write_text("content,other\n" + rows)
    assert sum(map(len, sides(open_documents(str(tmp_path / "a.csv"))))) == 100


def test_lists_of_lists_of_numbers_are_no_text(tmp_path: Path) -> None:
    rows = [{"content": f"some words {i}", "spans": [[0, 3], [4, 9]]} for i in range(100)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert sum(map(len, sides(open_documents(str(tmp_path / "a.json"))))) == 100


def test_of_a_single_line_a_tenth_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words " * 500 + "\n")
    documents = open_documents(str(tmp_path / "a.txt"))
    (train,), (validation,) = list(documents.train()), list(documents.validation())
    assert 0.09 < len(validation) / len(train + validation) < 0.11


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_files_of_a_development_split_are_held_out(name: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "to train on"}))
    (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "to hold out"}))
    assert sides(open_documents(str(tmp_path))) == (["to train on"], ["to hold out"])


def test_linked_directories_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "data" / "own").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "data" / "own" / "a.jsonl", DOCUMENTS[:60])
    write(tmp_path / "elsewhere" / "b.jsonl", DOCUMENTS[60:])
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "own" / "loop").symlink_to(tmp_path / "data")
    for source in (tmp_path / "data", tmp_path / "data" / "**" / "*.jsonl"):
        train, held_out = sides(open_documents(str(source)))
        assert sorted([*train, *held_out]) == sorted(DOCUMENTS)


def test_a_link_to_a_split_does_not_hide_it(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / "d" / split).mkdir(parents=True)
        (tmp_path / "d" / split / "part.jsonl").write_text(f'{{"text": "of {split}"}}\n')
    (tmp_path / "d" / "a_link").symlink_to("train")
    (tmp_path / "f").mkdir()
    for split in ("train", "val"):
        (tmp_path / "f" / f"{split}.jsonl").write_text(f'{{"text": "of {split}"}}\n')
    (tmp_path / "f" / "a_link.jsonl").symlink_to("train.jsonl")
    for source in (tmp_path / "d", tmp_path / "f", tmp_path / "f" / "*.jsonl"):
        documents = open_documents(str(source))
        assert list(documents.train()) == ["of train"] and documents.held_out == "the validation files", source


def test_readmes_are_data_where_nothing_else_is(tmp_path: Path) -> None:
    for part in ("one", "two"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "README.md").write_text(f"about {part}")
    assert len(find_files(str(tmp_path))) == 2
    (tmp_path / "notes.md").write_text("more")
    assert len(find_files(str(tmp_path))) == 3
    (tmp_path / "notes.md").rename(tmp_path / "notes.txt")
    assert [path.name for path in find_files(str(tmp_path))] == ["notes.txt"]
