"""Folders and lists of videos."""

import numpy as np
import pytest
from helpers.videos import numbered, numbers_of, write_video
from PIL import Image

from loading.images import BadImageError
from loading.video_sets import open_video, video_folders, video_list
from utils.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """train/ and val/ with two classes; in one of them a video is a folder of frames."""
    folder, frames = tmp_path_factory.mktemp("videos"), numbered(6, 16, 32)
    for split in ("train", "val"):
        for name in ("left", "right"):
            (folder / split / name).mkdir(parents=True)
            write_video(folder / split / name / "b.mp4", frames)
        write_video(folder / split / "left" / "a.avi", frames, "mpeg4")
        (folder / split / "left" / "notes.txt").write_text("no video")
        (folder / split / "right" / "shots").mkdir()
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / split / "right" / "shots" / f"img_{number:05}.png")
    return folder


def test_a_folder_for_each_class(root):
    videos = video_folders(root, "train")
    assert videos.classes == ["left", "right"] and videos.labels.tolist() == [0, 0, 1, 1]
    names = [videos.describe(index).removeprefix(f"{root}/train/") for index in range(4)]
    assert names == ["left/a.avi", "left/b.mp4", "right/b.mp4", "right/shots"]
    for index in range(4):
        video, target = videos.load(index)
        assert len(video) == 6 and numbers_of(video.read([1, 4])) == [1, 4]
        assert target == videos.labels[index]


def test_folders_without_classes_or_videos(root, tmp_path):
    with pytest.raises(UserError, match="no folder train/ in it"):
        video_folders(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="train: no class folders in it"):
        video_folders(tmp_path, "train")
    (tmp_path / "train" / "left").mkdir()
    with pytest.raises(UserError, match="left: no videos in it"):
        video_folders(tmp_path, "train")
    with pytest.raises(BadImageError, match="a folder without images"):
        open_video(str(tmp_path / "train"))


LISTS = {
    "commas": ["train/left/a.avi,0", "train/left/b.mp4,0", "train/right/b.mp4,2"],
    "blanks": ["train/left/a.avi 0", "train/left/b.mp4 0", "", "train/right/b.mp4 2"],
    "frames": ["train/right/shots 6 1", "train/left/b.mp4 6 2"],
    "a comma in a name": ["train/left/a,1.avi,0", "train/left/b.mp4,2"],
    "a blank in a name": ["train/left/a 1.avi 0", "train/left/b.mp4 2"],
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists(root, tmp_path, kind):
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(root / split)
    lines = LISTS[kind]
    if "name" in kind:
        (tmp_path / "train").unlink()
        (tmp_path / "train" / "left").mkdir(parents=True)
        for name in ("a,1.avi", "a 1.avi"):
            (tmp_path / "train" / "left" / name).symlink_to(root / "train" / "left" / "a.avi")
        (tmp_path / "train" / "left" / "b.mp4").symlink_to(root / "train" / "left" / "b.mp4")
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "val.csv").write_text("val/left/a.avi,0\n")
    train, val = (video_list(tmp_path, split) for split in ("train", "val"))
    assert train.classes == val.classes == ["0", "1", "2"]
    assert train.labels.tolist() == [int(line[-1]) for line in lines if line]
    for videos in (train, val):
        for index in range(len(videos)):
            assert numbers_of(videos.load(index).image.read([5])) == [5]


def test_names_of_the_classes(root, tmp_path):
    (tmp_path / "train.csv").write_text(f"{root}/train/left/a.avi 1\n")
    (tmp_path / "classes.txt").write_text("left\nright\n")
    assert video_list(tmp_path, "train").classes == ["left", "right"]
    (tmp_path / "train.csv").write_text(f"{root}/train/left/a.avi 2\n")
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
        ("a.mp4,1\n", "its first video a.mp4 is not in .*paths are relative to that folder"),
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


def test_paths_take_no_more_memory_in_workers_than_once(root):
    assert isinstance(video_folders(root, "val").paths, np.ndarray)
