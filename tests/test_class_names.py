"""Names of classes: in files of all forms, and against those of the weights."""

import json

import pytest

from loading.class_names import read_names
from loading.video_lists import listed_classes
from tasks.checkpoints import check_classes
from utils.errors import UserError

NAMES = ["cat", "dog", "sea owl"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\nsea owl\n",
        "cat\r\n\r\ndog\r\nsea owl",
        "0\tcat\n1\tdog\n2\tsea owl",
        "2: sea owl\n0: cat\n1: dog",
        "1 cat\n2 dog\n3 sea owl",
        "cat\t0\nsea owl\t2\ndog\t1",
        "cat,0\nsea owl,2\ndog,1",
        json.dumps(NAMES),
        json.dumps({"0": "cat", "1": "dog", "2": "sea owl"}),
        json.dumps({"0": ["n1", "cat"], "1": ["n2", "dog"], "2": ["n3", "sea owl"]}),
        json.dumps({"dog": 1, "cat": 0, "sea owl": 2}),
    ],
)
def test_names_by_index(tmp_path, text, encoding):
    file = tmp_path / "classes.txt"
    file.write_text(text, encoding=encoding, newline="")
    assert read_names(file) == listed_classes(tmp_path) == NAMES


FOLDERS = ["1", "10", "2"]


@pytest.mark.parametrize(
    "text",
    [
        "2\tsea owl\n1\tcat\n10\tdog",
        "1 cat\n2 sea owl\n10 dog",
        json.dumps({"10": "dog", "1": "cat", "2": "sea owl"}),
        json.dumps({str(n): {1: "cat", 10: "dog", 2: "sea owl"}.get(n, "?") for n in range(12)}),
        json.dumps({"0": ["2", "sea owl"], "1": ["10", "dog"], "2": ["1", "cat"]}),
    ],
)
def test_names_by_folder(tmp_path, text):
    (tmp_path / "names").write_text(text)
    assert read_names(tmp_path / "names", FOLDERS) == NAMES


def test_lines_that_only_look_like_columns_stay_whole(tmp_path):
    file = tmp_path / "names.txt"
    for lines in (["1 star", "2 star"], ["golden retriever", "great dane"], ["type 0", "type 1"]):
        file.write_text("\n".join(lines))
        assert read_names(file) == lines
    file.write_text("tench\tSchleie\nshark\tHai")
    assert read_names(file) == ["tench Schleie", "shark Hai"]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"1": "x", "2": "y"}', "no name for class '0'; give a JSON list, .* or a name a line"),
        ('{"a": 0, "b": 2}', r"indices are not 0 \.\.\. 1"),
        ("[1,", "not JSON"),
        ("10\n1\n2", r"in another order than that of training \(1, 10, 2, \.\.\.\)"),
    ],
)
def test_names_that_cannot_be_meant(tmp_path, text, message):
    (tmp_path / "names").write_text(text)
    with pytest.raises(UserError, match=f"names: .*{message}"):
        read_names(tmp_path / "names", FOLDERS)


def test_weights_without_names_take_those_of_the_data_and_doubts_are_told(caplog):
    with caplog.at_level("INFO"):
        check_classes({"model": {}}, ["cat", "dog"], "a.pth")
    [record] = caplog.records
    assert record.levelname == "INFO" and "those of the data set, cat to dog" in record.message
    check_classes({"model": {}}, ["1", "10", "2"], "b.pth")
    assert "b.pth does not name its classes, which are taken to be in the order of" in caplog.text
    assert "text: 1, 10, 2, ...; if it was trained in the order of their numbers" in caplog.text
    check_classes({"model": {}}, sorted(f"animal-{chr(97 + n % 26)}{n}x" for n in range(1000)), "c")
    assert "c does not name its 1000 classes; if they are ImageNet's" in caplog.text


def test_names_in_another_order_or_unicode_form():
    check_classes({"class_names": ["caf\u00e9"]}, ["cafe\u0301"], "a.pth")
    with pytest.raises(UserError, match="class 0 was 'b', here it is 'a', the same in another ord"):
        check_classes({"class_names": ["b", "a"]}, ["a", "b"], "a.pth")
