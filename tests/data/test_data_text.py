"""Laws of corpora: fixed order, a split by document, fingerprints, clear errors."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain import data
from functrain.data.text import is_validation

LAW = settings(deadline=None, derandomize=True, max_examples=50)
# texts without the zero byte and without halves of surrogate pairs, which are not UTF-8
# and without a byte order mark before them, which is no text of theirs: see below
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: not text.startswith("\ufeff")
)
NAMES = st.text("abcdefgh", min_size=1, max_size=4)
FOLDERS = st.dictionaries(NAMES, TEXTS, min_size=1, max_size=8)


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder


def names(corpus):
    return [document.name for document in corpus.documents]


def test_the_python_corpus_is_split_into_disjoint_documents_about_a_tenth_of_them_validation():
    train, validation = data.corpus("python"), data.corpus("python", split="validation")
    assert not set(names(train)) & set(names(validation))
    assert sorted(names(train) + names(validation)) == names(data.corpus("python", validation=0.0))
    sizes = [len(side.text.encode()) for side in (train, validation)]
    assert 5e6 < sum(sizes) < 20e6
    # 700 documents of mean 15 kB and standard deviation about 22 kB: the fraction has a deviation near 0.02
    assert 0.05 < sizes[1] / sum(sizes) < 0.15


def test_the_python_corpus_holds_the_help_topics_as_prose_and_no_tests_or_installed_packages():
    everything = data.corpus("python", validation=0.0)
    texts = dict(everything.documents)
    assert "traceback" in texts["pydoc_data/topics/exceptions"]
    assert "pydoc_data/topics.py" not in texts
    assert "json/decoder.py" in texts
    left_out = {"test", "tests", "site-packages", "encodings", "__pycache__"}
    assert not any(left_out & set(name.split("/")) for name in texts)
    assert names(everything) == sorted(names(everything))
    assert len(repr(everything)) < 100


def test_two_processes_give_the_python_corpus_one_fingerprint():
    program = "from functrain import data; print(data.corpus('python').fingerprint)"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == data.corpus("python").fingerprint


@LAW
@given(files=FOLDERS, fraction=st.floats(0.0, 0.9))
def test_a_folder_is_the_disjoint_union_of_its_two_sides(tmp_path_factory, files, fraction):
    folder = write(tmp_path_factory.mktemp("folder"), files)
    together = {}
    for split in ("train", "validation"):
        try:
            side = data.corpus(folder, split=split, validation=fraction)
        except ValueError as error:
            assert "holds no text for split" in str(error)
            continue
        assert names(side) == sorted(names(side))
        assert not together.keys() & set(names(side))
        together |= dict(side.documents)
    assert together == files


@LAW
@given(name=TEXTS, low=st.floats(0.0, 1.0), high=st.floats(0.0, 1.0))
def test_a_larger_fraction_only_adds_to_validation(name, low, high):
    low, high = sorted((low, high))
    assert is_validation(name, low) <= is_validation(name, high)
    assert not is_validation(name, 0.0)
    assert is_validation(name, 1.0)


def test_the_side_of_a_name_is_fixed_for_ever():
    # those whose sha256, as `sha256sum` prints it, begins below 1999 9999 9999 9999, a tenth of 2**64
    assert [name for name in map(str, range(50)) if is_validation(name, 0.1)] == ["9", "39", "49"]
    assert is_validation("a.txt", 0.1) and not is_validation("b.txt", 0.1)  # 18b7..., ffa0...


@LAW
@given(files=FOLDERS, chooser=st.data())
def test_the_fingerprint_changes_when_any_byte_of_a_text_or_name_does(tmp_path_factory, files, chooser):
    def fingerprint(files):
        return data.corpus(write(tmp_path_factory.mktemp("folder"), files), validation=0.0).fingerprint

    before = fingerprint(files)
    assert fingerprint(files) == before
    name = chooser.draw(st.sampled_from(sorted(files)))
    place = chooser.draw(st.integers(0, len(files[name]) - 1))
    other = "y" if files[name][place] == "x" else "x"
    assert fingerprint(files | {name: files[name][:place] + other + files[name][place + 1 :]}) != before
    assert fingerprint(files | {name: files[name] + "x"}) != before
    renamed = {("z" + key if key == name else key): text for key, text in files.items()}
    assert fingerprint(renamed) != before


def test_moving_a_byte_from_one_document_to_the_next_changes_the_fingerprint(tmp_path):
    one = data.corpus(write(tmp_path / "one", {"a": "xb", "b": "y"}), validation=0.0)
    two = data.corpus(write(tmp_path / "two", {"a": "x", "b": "by"}), validation=0.0)
    assert one.fingerprint != two.fingerprint


@LAW
@given(text=TEXTS, fraction=st.floats(0.0, 0.99))
def test_a_file_is_split_by_position(tmp_path_factory, text, fraction):
    path = write(tmp_path_factory.mktemp("folder"), {"text": text}) / "text"
    sides = []
    for split in ("train", "validation"):
        try:
            sides.append(data.corpus(path, split=split, validation=fraction).text)
        except ValueError as error:
            assert "holds no text for split" in str(error)
            sides.append("")
    assert "".join(sides) == text
    assert len(sides[0]) == int(len(text) * (1.0 - fraction))


def test_a_file_is_cut_where_nanogpt_cuts_it(tmp_path):
    text = "".join(chr(97 + i * i % 26) for i in range(1003))
    path = write(tmp_path, {"input.txt": text}) / "input.txt"
    assert data.corpus(path).text == text[: int(1003 * 0.9)]
    assert data.corpus(path, split="validation").text == text[int(1003 * 0.9) :]


def test_bytes_are_read_as_they_are(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("one\ufeff\r\ntwo\rthree\n".encode())
    assert data.corpus(path, validation=0.0).text.encode() == path.read_bytes()


def test_a_byte_order_mark_before_a_text_is_none_of_it(tmp_path):
    one = data.corpus(write(tmp_path / "one", {"a": "\ufefftext\ufeff", "b": "\ufeff"}), validation=0.0)
    assert dict(one.documents) == {"a": "text\ufeff"}  # one of nothing else is empty
    assert one.fingerprint == data.corpus(write(tmp_path / "two", {"a": "text\ufeff"}), validation=0.0).fingerprint


def test_hidden_and_empty_files_are_left_out_and_a_pattern_selects(tmp_path):
    folder = write(tmp_path, {"a.md": "a", "b.txt": "b", ".c.md": "c", ".git/d.md": "d", "sub/e.md": "e", "f.md": ""})
    assert names(data.corpus(folder, validation=0.0)) == ["a.md", "b.txt", "sub/e.md"]
    assert names(data.corpus(folder, validation=0.0, pattern="*.md")) == ["a.md", "sub/e.md"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"caf\xe9", "expected UTF-8 text, came byte 0xe9 at position 3"), (b"ab\0c", "zero byte at position 2")],
)
def test_a_binary_file_is_an_error_with_its_path(tmp_path, content, message):
    (tmp_path / "bad").write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    for path in (tmp_path, tmp_path / "bad"):
        with pytest.raises(ValueError, match=message) as caught:
            data.corpus(path, validation=0.0)
        assert str(tmp_path / "bad") in str(caught.value)
        assert "pattern=" in str(caught.value)
    assert names(data.corpus(tmp_path, validation=0.0, pattern="*.txt")) == ["good.txt"]


def test_missing_and_empty_sources_are_errors_with_their_path(tmp_path):
    with pytest.raises(ValueError, match="'pyhton' is neither a file nor a folder, nor the corpus 'python'"):
        data.corpus("pyhton")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    for path in (tmp_path / "folder", tmp_path / "empty"):
        with pytest.raises(ValueError, match="holds no text for split 'train'") as caught:
            data.corpus(path)
        assert str(path) in str(caught.value)


def test_no_validation_document_is_an_error_that_names_the_fraction(tmp_path):
    write(tmp_path, {"b.txt": "text"})
    with pytest.raises(ValueError, match=r"no text for split 'validation' with validation=0.1.*another fraction"):
        data.corpus(tmp_path, split="validation")


@pytest.mark.parametrize("wrong", [{"split": "test"}, {"validation": 1.0}, {"validation": -0.1}, {"pattern": "*.md"}])
def test_wrong_arguments_are_errors(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        data.corpus("python", **wrong)


def test_linked_folders_are_followed_once_and_loops_lead_nowhere(tmp_path):
    folder, outside = tmp_path / "corpus", tmp_path / "outside"
    write(folder, {"own/a.txt": "a", "b.txt": "b"})
    write(outside, {"c.txt": "c", "deep/d.txt": "d"})
    for link, to in [
        ("linked", "../outside"), ("loop", "."), ("own/up", ".."), ("again", "own"), ("second", "../outside/deep"),
        ("dead", "nowhere"), ("self", "self"), (".hidden", "../outside"),
    ]:  # fmt: skip
        (folder / link).symlink_to(to)
    (outside / "back").symlink_to("../corpus")
    found = data.corpus(folder, validation=0.0)
    assert [document.name for document in found.documents] == [
        "b.txt",
        "linked/c.txt",
        "linked/deep/d.txt",
        "own/a.txt",
    ]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfone two")
    assert data.corpus(tmp_path / "text.txt", validation=0.0).text == "one two"
