"""Folders of videos."""

import numpy as np
import pytest
from helpers.videos import numbers_of

from loading.images import BadImageError
from loading.video_sets import open_video, video_folders
from utils.errors import UserError


def test_a_folder_for_each_class(video_root):
    videos = video_folders(video_root, "train")
    assert videos.classes == ["left", "right"] and videos.labels.tolist() == [0, 0, 1, 1]
    names = [videos.describe(index).removeprefix(f"{video_root}/train/") for index in range(4)]
    assert names == ["left/a.avi", "left/b.mp4", "right/b.mp4", "right/shots"]
    for index in range(4):
        video, target = videos.load(index)
        assert len(video) == 6 and numbers_of(video.read([1, 4])) == [1, 4]
        assert target == videos.labels[index]


def test_folders_without_classes_or_videos(video_root, tmp_path):
    with pytest.raises(UserError, match="no folder train/ in it"):
        video_folders(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="train: no class folders in it"):
        video_folders(tmp_path, "train")
    (tmp_path / "train" / "left").mkdir()
    with pytest.raises(UserError, match="train: no videos in class left"):
        video_folders(tmp_path, "train")
    with pytest.raises(BadImageError, match="a folder without images"):
        open_video(str(tmp_path / "train"))


def test_paths_take_no_more_memory_in_workers_than_once(video_root):
    assert isinstance(video_folders(video_root, "val").paths, np.ndarray)
