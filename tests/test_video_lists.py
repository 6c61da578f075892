"""Lists of videos, of parts of long videos, and shards."""

import argparse
import io
import tarfile

import numpy as np
import pytest
from helpers.videos import numbered, numbers_of, write_video

import datasets
from loading.images import BadImageError
from loading.options import DataOptions
from loading.transforms import Transforms
from loading.video_lists import long_video_list, video_list
from loading.video_shards import video_shards
from utils.errors import UsageError, UserError

LISTS = {
    "commas": ["train/left/a.avi,0", "train/left/b.mp4,0", "train/right/b.mp4,2"],
    "blanks": ["train/left/a.avi 0", "train/left/b.mp4 0", "", "train/right/b.mp4 2"],
    "frames": ["train/right/shots 6 1", "train/left/b.mp4 6 2"],
    "a comma in a name": ["train/left/a,1.avi,0", "train/left/b.mp4,2"],
    "a blank in a name": ["train/left/a 1.avi 0", "train/left/b.mp4 2"],
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists(video_root, tmp_path, kind):
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(video_root / split)
    lines = LISTS[kind]
    if "name" in kind:
        (tmp_path / "train").unlink()
        (tmp_path / "train" / "left").mkdir(parents=True)
        for name in ("a,1.avi", "a 1.avi"):
            (tmp_path / "train" / "left" / name).symlink_to(video_root / "train" / "left" / "a.avi")
        (tmp_path / "train" / "left" / "b.mp4").symlink_to(video_root / "train" / "left" / "b.mp4")
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "val.csv").write_text("val/left/a.avi,0\n")
    train, val = (video_list(tmp_path, split) for split in ("train", "val"))
    assert train.classes == val.classes == ["0", "1", "2"]
    assert train.labels.tolist() == [int(line[-1]) for line in lines if line]
    for videos in (train, val):
        for index in range(len(videos)):
            assert numbers_of(videos.load(index).image.read([5])) == [5]


def test_names_of_the_classes(video_root, tmp_path):
    (tmp_path / "train.csv").write_text(f"{video_root}/train/left/a.avi 1\n")
    (tmp_path / "classes.txt").write_text("left\nright\n")
    assert video_list(tmp_path, "train").classes == ["left", "right"]
    (tmp_path / "train.csv").write_text(f"{video_root}/train/left/a.avi 2\n")
    with pytest.raises(UserError, match=r"train.csv: label 2 is beyond the 2 names in classes.txt"):
        video_list(tmp_path, "train")


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "train.csv: it lists no videos"),
        ("a.mp4\n", "train.csv, line 1: 'a.mp4' is no path and label"),
        ("\na.mp4,one\n", "line 2: the label 'one' is no integer from 0 on"),
        ("a.mp4 -1\n", "the label '-1' is no integer"),
        ("a.mp4;1\n", "'a.mp4;1' is no path and label"),
        (",1\n", "is no path and label"),
        ("a.mp4,1\n", "its first video a.mp4 is not in .*to that folder, and --prefix names"),
    ],
)
def test_wrong_lists(tmp_path, content, words):
    (tmp_path / "train.csv").write_text(content)
    with pytest.raises(UserError, match=words) as raised:
        video_list(tmp_path, "train")
    assert "\n" not in str(raised.value)


def test_a_list_that_is_missing(tmp_path):
    with pytest.raises(UserError, match="val.csv: cannot be read .No such file"):
        video_list(tmp_path, "val")


def test_a_label_that_is_no_class(video_root, tmp_path):
    (tmp_path / "train.csv").write_text(f"{video_root}/train/left/a.avi 4000000000\n")
    with pytest.raises(UserError, match="label 4000000000, which can hardly be the number of a cl"):
        video_list(tmp_path, "train")


def build(data_set: str, path, **given):
    arguments = vars(DataOptions(data_set=data_set, data_path=str(path), num_workers=0)) | given
    same = Transforms(None, lambda video, target: (video, target))
    return datasets.build_data(argparse.Namespace(**arguments), 16, train=False, transforms=same)


def test_paths_may_have_a_prefix(video_root, tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text(f"{split}/left/a.avi,0\n{split}/right/b.mp4,1\n")
    with pytest.raises(UserError, match="--prefix names another one"):
        build("K400", tmp_path)
    data = build("SSV2", tmp_path, prefix=str(video_root))
    assert data.val.describe(1) == f"{video_root}/val/right/b.mp4" and data.class_names == [
        "0",
        "1",
    ]
    with pytest.raises(UserError, match="--prefix /nowhere: no such folder"):
        build("K400", tmp_path, prefix="/nowhere")
    with pytest.raises(UsageError, match="--prefix is for --data-set K400, SSV2, LVU, not DIGITS"):
        build("DIGITS", tmp_path, prefix=str(video_root))
    with pytest.raises(UsageError, match="--part-stride is for --data-set LVU, not K400"):
        build("K400", tmp_path, part_stride=3)


@pytest.fixture(scope="module")
def long_videos(tmp_path_factory, video_root):
    """A video of 4 seconds at 10 frames a second, and one of 1 second."""
    folder = tmp_path_factory.mktemp("long")
    write_video(folder / "long.mp4", numbered(41, 16, 32), rate=10)
    write_video(folder / "short.mp4", numbered(11, 16, 32), rate=10)
    (folder / "train.csv").write_text("long.mp4,1,4.0\nshort.mp4,0,1.0\n")
    (folder / "val.csv").write_text("short.mp4 0 1\n")
    return folder


def test_parts_of_long_videos(long_videos):
    parts = long_video_list(long_videos, "train", part_seconds=2, part_stride=1)
    assert parts.classes == ["0", "1"] and parts.labels.tolist() == [1, 1, 1, 0]
    names = [parts.describe(index).removeprefix(f"{long_videos}/") for index in range(4)]
    assert names == ["long.mp4, 0 to 2 s", "long.mp4, 1 to 3 s", "long.mp4, 2 to 4 s"] + [
        "short.mp4, 0 to 1 s"
    ]
    shown = [parts.load(index).image for index in range(4)]
    assert [len(part) for part in shown] == [21, 21, 21, 11]
    assert [numbers_of(part.read([0, len(part) - 1])) for part in shown] == [
        [0, 20],
        [10, 30],
        [20, 40],
        [0, 10],
    ]
    assert len(build("LVU", long_videos).val) == 1
    (long_videos / "val.csv").write_text("long.mp4 1 4\n")
    assert len(build("LVU", long_videos, part_seconds=2, part_stride=2).val) == 2


def test_a_part_behind_the_end_of_its_video(long_videos, tmp_path):
    (tmp_path / "train.csv").write_text(f"{long_videos}/long.mp4,1,100\n")
    parts = long_video_list(tmp_path, "train", part_seconds=2, part_stride=2)
    assert len(parts.load(1).image) == 21
    with pytest.raises(BadImageError, match="it ends at 4.1 s, and its list has a part from 6 s"):
        len(parts.load(3).image)


def test_a_byte_order_mark_is_no_name(video_root, tmp_path):
    content = f"{video_root}/train/left/a.avi 1\n"
    (tmp_path / "train.csv").write_text(content, encoding="utf-8-sig")
    assert numbers_of(video_list(tmp_path, "train").load(0).image.read([2])) == [2]


def test_parts_that_are_none(video_root, tmp_path):
    (tmp_path / "train.csv").write_text(f"{video_root}/train/right/shots,0,4\n")
    with pytest.raises(BadImageError, match="does not say when each of them is shown"):
        long_video_list(tmp_path, "train").load(0)
    for line, words in (
        ("a.mp4,0", "line 1: 'a.mp4,0' is no path, label and length in seconds"),
        ("a.mp4,0,long", "the length 'long' is no number of seconds"),
        ("a.mp4,0,-1", "the length '-1' is no number"),
        ("a.mp4,0,nan", "the length 'nan' is no number"),
        ("a.mp4,zero,3", "the label 'zero' is no integer"),
    ):
        (tmp_path / "train.csv").write_text(line + "\n")
        with pytest.raises(UserError, match=words):
            long_video_list(tmp_path, "train")


def pack(path, files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(video_root, tmp_path):
    """Two shards of training, one of validation."""
    contents = {
        name: (video_root / "train" / name).read_bytes() for name in ("left/a.avi", "left/b.mp4")
    }
    (tmp_path / "train").mkdir()
    pack(
        tmp_path / "train" / "000.tar",
        {
            "one.cls": b"0",
            "one.AVI": contents["left/a.avi"],
            "one.json": b"{}",
            "deep/one.mp4": contents["left/b.mp4"],
            "deep/one.cls": b"1\n",
        },
    )
    pack(tmp_path / "train" / "001.tar", {"thrée.mp4": contents["left/b.mp4"], "thrée.cls": b"1"})
    pack(tmp_path / "clips-val-0.tar", {"x.mp4": contents["left/b.mp4"], "x.cls": b"1"})
    (tmp_path / "classes.txt").write_text("left\nright\n")
    return tmp_path


def test_videos_in_shards(shards):
    train = video_shards(shards, "train")
    assert train.labels.tolist() == [0, 1, 1] and train.classes == ["left", "right"]
    names = [train.describe(index).removeprefix(f"{shards}/train/") for index in range(3)]
    assert names == ["000.tar: one.AVI", "000.tar: deep/one.mp4", "001.tar: thrée.mp4"]
    for index in (2, 0, 1):
        video, label = train.load(index)
        assert len(video) == 6 and numbers_of(video.read([5, 2])) == [5, 2]
        assert label == train.labels[index]
    assert len(build("VIDEO_SHARDS", shards).val) == 1
    assert isinstance(train.keys, np.ndarray), "workers share it"


def test_a_damaged_video_in_a_shard(shards):
    pack(shards / "train" / "002.tar", {"bad.mp4": b"no video" * 99, "bad.cls": b"0"})
    train = video_shards(shards, "train")
    with pytest.raises(BadImageError, match="Invalid data"):
        len(train.load(3).image)
    assert numbers_of(train.load(2).image.read([3])) == [3], "its neighbours are none the worse"


@pytest.mark.parametrize("where", ["header", "cut at a header", "cut in a video", "joined"])
def test_a_damaged_shard_loses_no_videos_without_a_word(video_root, tmp_path, where):
    video = (video_root / "train" / "left" / "b.mp4").read_bytes()
    (tmp_path / "classes.txt").write_text("left\nright\n")
    shard = tmp_path / "a-train-0.tar"
    pack(
        shard,
        {f"{n}.{end}": video if end == "mp4" else b"1" for n in "abc" for end in ("mp4", "cls")},
    )
    assert len(video_shards(tmp_path, "train")) == 3
    with tarfile.open(shard) as tar:
        header = tar.getmember("b.mp4").offset
    content = bytearray(shard.read_bytes())
    if where == "header":
        content[header + 3] ^= 0xFF
    elif where == "joined":
        content = content * 2
    else:
        content = content[: header + (5000 if where == "cut in a video" else 0)]
    shard.write_bytes(content)
    with pytest.raises(
        UserError, match="a-train-0.tar: (damaged|cut off|not an uncompressed|a.mp4)"
    ):
        video_shards(tmp_path, "train")


def test_shards_are_of_one_split(shards):
    """A word of the name tells it."""
    (shards / "clips-val-0.tar").rename(shards / "medieval-val-0.tar")
    (shards / "medieval-train-0.tar").write_bytes(b"")
    assert len(video_shards(shards, "val")) == 1
    (shards / "medieval-train-0.tar").rename(shards / "train-and-val.tar")
    with pytest.raises(UserError, match="its name has both train and val"):
        video_shards(shards, "val")


def test_wrong_shards(shards, video_root, tmp_path_factory):
    video = (video_root / "train" / "left" / "b.mp4").read_bytes()
    wrong = shards / "train" / "002.tar"
    for files, words in (
        ({"a.mp4": video}, "002.tar: a.mp4 has no label; it needs a.cls in the same shard"),
        ({"a.mp4": video, "a.cls": b"left"}, "a.cls holds 'left', no label from 0 on"),
        ({"a.mp4": video, "a.cls": b"2"}, "a.mp4 has the label 2, beyond the 2 names in classes"),
        ({"a.txt": b"text"}, "002.tar: no videos in it"),
        ({"a.b.mp4": video, "a.cls": b"1"}, "a.b.mp4 has a dot in its key"),
        ({"a.mp4": video, "a.avi": video, "a.cls": b"1"}, "a.avi is a second video of its key"),
        ({"a.mp4": video, "a.cls": b"1", "b.cls": b"1"}, "b.cls has no video of a known kind"),
    ):
        pack(wrong, files)
        with pytest.raises(UserError, match=words):
            video_shards(shards, "train")
    pack(wrong, {"a.mp4": video, "a.cls": b"1"}, "w:gz")
    with pytest.raises(UserError, match="002.tar: not an uncompressed tar file"):
        video_shards(shards, "train")
    (shards / "classes.txt").unlink()
    with pytest.raises(UserError, match="classes.txt: no such file; shards need it"):
        video_shards(shards, "train")
    with pytest.raises(UserError, match="no shards of val in it, neither val/.* nor"):
        video_shards(tmp_path_factory.mktemp("empty"), "val")
