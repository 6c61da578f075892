"""Video classification from end to end: training, views, resume, evaluation, pictures."""

import json

import numpy as np
import pytest
import torch
from helpers.processes import launch, wait_until
from helpers.videos import write_video

import main
import options
import predict
import visualize
from tasks import VIDEO, task_of_checkpoint
from utils.checkpoint import load_checkpoint
from utils.errors import UsageError, UserError


def moving(generator, right: bool, frames: int = 12) -> np.ndarray:
    """A bright square that moves to the right or to the left: [frames, 16, 24, 3]."""
    clip = generator.integers(0, 60, (frames, 16, 24, 3)).astype(np.uint8)
    top, path = generator.integers(0, 10), np.linspace(0, 18, frames).astype(int)
    for frame, left in zip(clip, path if right else path[::-1], strict=True):
        frame[top : top + 6, left : left + 6] = 220
    return clip


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for name in ("left", "right"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                path = folder / split / name / f"{number}.mp4"
                write_video(path, moving(generator, name == "right"))
    return folder


def flags(videos, *more: str) -> list[str]:
    return [
        *("--data-set", "VIDEO_FOLDER", "--data-path", str(videos), "--model", "videomamba_tiny"),
        *("--model-kwargs", "embed_dim=16", "depth=4", "patch_size=8", "--input-size", "16"),
        *("--num-frames", "4", "--batch-size", "4", "--num-workers", "0", "--device", "cpu"),
        *("--aa", "none", "--throughput-seconds", "0.1", "--epochs", "1", *more),
    ]


@pytest.fixture(scope="module")
def dense(videos, tmp_path_factory):
    output = tmp_path_factory.mktemp("dense")
    assert main.main(flags(videos, "--num-sample", "2", "--output_dir", str(output))) == 0
    return output


@pytest.fixture(scope="module")
def dynamic(videos, dense, tmp_path_factory):
    output = tmp_path_factory.mktemp("dynamic")
    more = ("--method", "dyvm", "--pruning-layers", "1", "2")
    more += ("--model-path", str(dense / "best_checkpoint.pth"), "--output_dir", str(output))
    assert main.main(flags(videos, *more)) == 0
    return output


def report(folder) -> dict:
    return json.loads((folder / "eval.json").read_text())


def test_a_run_leaves_its_files(dense, dynamic):
    assert report(dense)["images"] == 10 and report(dense)["dense"]["view_top1"] is not None
    column = report(dynamic)["dynamic"]
    stages = column["kept_per_slot"]
    assert [len(stage) for stage in stages] == [4, 4]
    assert [sum(stage) for stage in stages] == pytest.approx([11, 7]), "of 16 patches"
    assert column["view_top1"] == column["top1"]
    assert (dynamic / "kept_patches.png").exists()
    assert (
        (dynamic / "decisions" / "keep_maps.csv").read_text().startswith("patch,stage1,stage2,slot")
    )
    assert (dynamic / "decisions" / "sample1.png").exists()
    assert (dynamic / "decisions" / "sample1.gif").exists()


@pytest.mark.parametrize(
    "way, kept",
    [
        (["--token-strategy", "distilled"], [11, 7]),
        (["--selector-gradient", "inplace"], [11, 7]),
        (["--reduction", "mtr"], [11, 7]),
        (["--reduction", "prune+merge", "--token-strategy", "distilled"], [11, 7]),
        (["--reduction", "merge", "--merge-tokens", "3"], [13, 10]),
        (["--stage-keep", "0.75", "0.25"], [12, 4]),
    ],
    ids=lambda value: "-".join(value[1::2]) if isinstance(value[0], str) else "",
)
def test_other_ways_to_reduce_the_tokens_of_clips(way, kept, videos, dense, tmp_path):
    path = ["--model-path", str(dense / "best_checkpoint.pth")]
    more = ["--method", "dyvm", "--pruning-layers", "1", "2", *path, *way]
    assert main.main(flags(videos, *more, "--output_dir", str(tmp_path))) == 0
    trained = report(tmp_path)["dynamic"]
    assert [sum(stage) for stage in trained["kept_per_slot"]] == pytest.approx(kept)
    assert (tmp_path / "decisions" / "sample1.gif").exists()
    line = json.loads((tmp_path / "log.txt").read_text())
    assert ("train_selector" in line) == ("distilled" in way) and line["train_loss"] > 0
    evaluate = ["--eval", "--model-path", str(tmp_path / "best_checkpoint.pth"), "--device", "cpu"]
    evaluate += ["--num-workers", "0", "--throughput-seconds", "0"]
    assert main.main([*evaluate, "--output_dir", str(tmp_path / "again")]) == 0
    again = report(tmp_path / "again")["dynamic"]
    assert all(again[key] == trained[key] for key in ("top1", "loss", "kept_per_slot", "flops"))


def test_views_are_merged_by_their_mean_probability(dynamic, tmp_path):
    """Two segments of three crops; a video counts once, its operations six times."""
    path = str(dynamic / "best_checkpoint.pth")
    views = ("--eval-segments", "2", "--eval-crops", "3", "--output_dir", str(tmp_path))
    evaluate = ["--eval", "--model-path", path, "--device", "cpu", "--num-workers", "0"]
    assert main.main([*evaluate, *views, "--throughput-seconds", "0"]) == 0
    one, six = report(dynamic)["dynamic"], report(tmp_path)["dynamic"]
    assert report(tmp_path)["images"] == 10 and six["passes"] == 6
    assert six["flops"]["exact"] == pytest.approx(6 * one["flops"]["exact"], rel=0.05)
    assert [sum(stage) for stage in six["kept_per_slot"]] == pytest.approx([11, 7])
    with open(tmp_path / "decisions" / "costs.csv") as file:
        costs = [int(line) for line in file.read().splitlines()[1:]]
    assert len(costs) == 10 and np.mean(costs) == pytest.approx(six["flops"]["exact"])


def test_between_epochs_one_view_is_looked_at(videos, dense, tmp_path, monkeypatch):
    """And in the calibration and the picture of the epoch; the report at the end is on all."""
    seen = []
    predict_all = type(VIDEO).predict

    def noted(self, model, images):
        seen.append(tuple(images.shape[:-2]))
        return predict_all(self, model, images)

    monkeypatch.setattr(type(VIDEO), "predict", noted)
    more = ["--eval-segments", "2", "--eval-crops", "3", "--batch-size", "12", "--method", "dyvm"]
    more += ["--pruning-layers", "1", "2", "--model-path", str(dense / "best_checkpoint.pth")]
    assert main.main(flags(videos, *more, "--output_dir", str(tmp_path))) == 0
    assert (tmp_path / "kept_patches.png").exists()
    quick = [shape for shape in seen if shape[1:] == (3, 4)]
    assert [shape[0] for shape in quick[:2]] == [10, 10], "the model and its average, in one batch"
    whole = [shape for shape in seen if shape[1:] == (6, 3, 4)]
    assert sum(shape[0] for shape in whole) >= 10 and {shape[0] for shape in whole} == {2}
    assert report(tmp_path)["dynamic"]["passes"] == 6


def test_two_processes_train_with_several_views(videos, tmp_path):
    """Every validation video counts once between epochs and at the end."""
    more = ("--eval-segments", "2", "--eval-crops", "3", "--output_dir", str(tmp_path))
    launch(2, ["main.py", *flags(videos, *more)])
    assert report(tmp_path)["images"] == 10 and report(tmp_path)["dense"]["passes"] == 6
    [line] = (tmp_path / "log.txt").read_text().splitlines()
    assert json.loads(line)["test_acc1"] % 10 == 0, "of ten videos"


def test_shuffled_frames(dynamic, tmp_path):
    """Another result, the same whatever else is in the batch."""
    path = str(dynamic / "best_checkpoint.pth")
    evaluate = ["--eval", "--model-path", path, "--device", "cpu", "--num-workers", "0"]
    evaluate += ["--throughput-seconds", "0", "--eval-shuffle-frames"]
    losses = []
    for name, batch in (("one", "4"), ("two", "3")):
        more = ["--batch-size", batch, "--output_dir", str(tmp_path / name)]
        assert main.main([*evaluate, *more]) == 0
        losses.append(report(tmp_path / name)["dynamic"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != report(dynamic)["dynamic"]["loss"]
    assert report(tmp_path / "one")["evaluation"]["eval_shuffle_frames"] is True


def test_the_report_shows_clips_in_motion(dynamic):
    import report as program

    program.main([str(dynamic)])
    page = (dynamic / "report.html").read_text()
    assert page.count("data:image/gif;base64,") == 4 and "Patches kept in each frame" in page


def test_evaluation_needs_no_repeated_flags(dynamic, tmp_path):
    evaluate = ["--eval", "--model-path", str(dynamic / "best_checkpoint.pth"), "--device", "cpu"]
    more = ["--num-workers", "0", "--throughput-seconds", "0", "--output_dir", str(tmp_path)]
    assert main.main([*evaluate, *more]) == 0
    assert report(tmp_path)["dynamic"]["loss"] == report(dynamic)["dynamic"]["loss"]


def test_another_number_of_frames_is_resampled(dense, tmp_path, capsys):
    evaluate = ["--eval", "--model-path", str(dense / "best_checkpoint.pth"), "--device", "cpu"]
    more = ["--num-workers", "0", "--throughput-seconds", "0", "--output_dir", str(tmp_path)]
    assert main.main([*evaluate, *more, "--num-frames", "6"]) == 0
    assert "temporal position embedding resampled from 4 to 6 positions" in capsys.readouterr().out


def test_an_interrupted_run_ends_bit_identical(videos, tmp_path, monkeypatch):
    from engine import train_one_epoch

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ("--num-sample", "2", "--save-minutes", "1e-6", "--reprob", "0.5")
    assert main.main(flags(videos, *more, "--output_dir", str(whole))) == 0

    def interrupted(training, experiment, *rest, **options):
        batches, steps = experiment.data.train_batches, 0

        def some(*arguments):
            nonlocal steps
            for batch in batches(*arguments):
                steps += 1
                if steps == 4:
                    raise KeyboardInterrupt
                yield batch

        with monkeypatch.context() as patch:
            patch.setattr(type(experiment.data), "train_batches", lambda self, *a: some(*a))
            return train_one_epoch(training, experiment, *rest, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(main, "train_one_epoch", interrupted)
        main.main(flags(videos, *more, "--output_dir", str(parts)))
    # Its save in the background goes on; between two renames there is no newest one.
    wait_until((parts / "checkpoint.pth").exists)
    assert 0 < load_checkpoint(parts / "checkpoint.pth")["step"] < 6
    assert main.main(flags(videos, *more, "--resume", "auto", "--output_dir", str(parts))) == 0
    one, other = (load_checkpoint(folder / "checkpoint.pth") for folder in (whole, parts))
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name


def test_two_processes_evaluate_as_one(dense, tmp_path):
    """Every video once, also where they cannot be shared out evenly."""
    evaluate = [
        "main.py",
        "--eval",
        "--model-path",
        dense / "best_checkpoint.pth",
        "--device",
        "cpu",
    ]
    more = ["--num-workers", "0", "--throughput-seconds", "0", "--batch-size", "3"]
    views = ["--eval-segments", "2", "--eval-crops", "3"]
    found = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        launch(processes, [*evaluate, *more, *views, "--output_dir", output])
        found.append(report(output)["dense"])
    assert found[0] == found[1]


def test_a_start_from_an_image_model(videos, tmp_path, capsys):
    image = ("--model", "videomamba_tiny", "--model-kwargs", "embed_dim=16", "depth=4")
    digits = ["--input-size", "16", "--epochs", "1", "--subset", "32", "--batch-size", "16"]
    common = ["--num-workers", "0", "--device", "cpu", "--throughput-seconds", "0"]
    start = tmp_path / "images"
    kwargs = [*image, "patch_size=8", *digits, *common, "--output_dir", str(start)]
    assert main.main(["--data-set", "DIGITS", *kwargs]) == 0
    capsys.readouterr()
    path = str(start / "checkpoint.pth")
    output = tmp_path / "clips"
    assert main.main(flags(videos, "--model-path", path, "--output_dir", str(output))) == 0
    assert "an image model; its patches are inflated to 1 frames" in capsys.readouterr().out
    with pytest.raises((UserError, UsageError), match="classification|images"):
        main.main(["--eval", *flags(videos, "--model-path", path)])
    video = str(output / "best_checkpoint.pth")
    with pytest.raises((UserError, UsageError), match="was trained for video"):
        main.main(["--eval", "--data-set", "DIGITS", "--model-path", video, "--device", "cpu"])


def test_a_checkpoint_of_clips_tells_its_task(dense):
    checkpoint = load_checkpoint(dense / "best_checkpoint.pth")
    assert task_of_checkpoint({"model": checkpoint["model"]}) is VIDEO


def test_checkpoints_of_earlier_flags_evaluate(dense, tmp_path):
    """They record a sampling rate that uniform sampling does not read, and no prefix."""
    checkpoint = load_checkpoint(dense / "best_checkpoint.pth")
    for name in ("prefix", "part_seconds", "part_stride", "eval_shuffle_frames", "crop_area"):
        del checkpoint["args"][name]
    assert checkpoint["args"]["sampling_rate"] == 4
    torch.save(checkpoint, tmp_path / "old.pth")
    evaluate = ["--eval", "--model-path", str(tmp_path / "old.pth"), "--device", "cpu"]
    more = ["--num-workers", "0", "--throughput-seconds", "0", "--output_dir", str(tmp_path)]
    assert main.main([*evaluate, *more]) == 0
    assert report(tmp_path)["dense"]["loss"] == report(dense)["dense"]["loss"]


def test_a_run_records_where_its_lists_begin(videos, tmp_path):
    """Evaluations need neither --prefix nor the parts again; a resume may have another prefix."""
    from utils.resume import flag_differences

    lists = tmp_path / "lists"
    lists.mkdir()
    for split, count in (("train", 12), ("val", 5)):
        lines = [
            f"{split}/{name}/{number}.mp4,{label},0.48"
            for number in range(count)
            for label, name in enumerate(("left", "right"))
        ]
        (lists / f"{split}.csv").write_text("\n".join(lines) + "\n")
    source = ["--data-set", "LVU", "--data-path", str(lists), "--prefix", str(videos)]
    parts = ["--part-seconds", "1", "--part-stride", "1", "--output_dir", str(tmp_path)]
    assert main.main(flags(videos, *source, *parts)) == 0
    trained = report(tmp_path)["dense"]
    evaluate = ["--eval", "--model-path", str(tmp_path / "best_checkpoint.pth"), "--device", "cpu"]
    more = ["--num-workers", "0", "--throughput-seconds", "0", "--output_dir", str(tmp_path / "2")]
    assert main.main([*evaluate, *more]) == 0
    assert report(tmp_path / "2")["dense"]["loss"] == trained["loss"]
    args = load_checkpoint(tmp_path / "best_checkpoint.pth")["args"]
    assert (args["part_seconds"], args["prefix"]) == (1, str(videos))
    assert not flag_differences(args, args | {"prefix": "/elsewhere", "eval_crops": 3})
    assert flag_differences(args, args | {"part_seconds": 2})


def test_lists_of_other_classes_than_the_checkpoints(videos, dense, tmp_path):
    lines = [f"{videos}/val/left/0.mp4,0", f"{videos}/val/right/0.mp4,2"]
    (tmp_path / "val.csv").write_text("\n".join(lines) + "\n")
    evaluate = ["--eval", "--model-path", str(dense / "best_checkpoint.pth"), "--device", "cpu"]
    source = ["--data-set", "K400", "--data-path", str(tmp_path), "--output_dir", str(tmp_path)]
    with pytest.raises(UserError, match="classes") as raised:
        main.main([*evaluate, *source, "--num-workers", "0"])
    assert "\n" not in str(raised.value)


def test_predictions_of_ones_own_videos(dense, videos, tmp_path, capsys):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    path = str(dense / "best_checkpoint.pth")
    clip = str(videos / "val" / "left" / "0.mp4")
    predict.main(["--model-path", path, "--json", clip, str(tmp_path)])
    said = capsys.readouterr()
    entry, broken = json.loads(said.out)
    assert entry["file"] == clip and entry["name"] in ("left", "right")
    assert broken["file"].endswith("broken.mp4") and "Invalid data" in broken["error"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no videos in this folder"):
        predict.main(["--model-path", path, str(empty)])


def test_pictures_of_ones_own_videos(dynamic, videos, tmp_path):
    from PIL import Image

    path = str(dynamic / "best_checkpoint.pth")
    visualize.main(
        ["--model-path", path, "--images", str(videos / "val"), "--output_dir", str(tmp_path)]
    )
    assert len(list(tmp_path.glob("left_*.png"))) == 5 and (tmp_path / "images.csv").exists()
    with Image.open(next(tmp_path.glob("left_*.png"))) as picture:
        assert picture.width > 4 * 16
    moving = sorted(tmp_path.glob("left_*.gif"))
    assert len(moving) == 5
    with Image.open(moving[0]) as picture:
        assert picture.n_frames == 4


def test_a_bad_video_is_named_or_skipped(videos, tmp_path):
    import shutil

    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    (folder / "train" / "left" / "3.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"3\.mp4: the file is empty.*--bad-images skip"):
        main.main(flags(folder, "--output_dir", str(tmp_path / "one")))
    more = ("--bad-images", "skip", "--output_dir", str(tmp_path / "two"))
    assert main.main(flags(folder, *more)) == 0
    assert "3.mp4: the file is empty" in (tmp_path / "two" / "bad_images_rank0.txt").read_text()


@pytest.mark.parametrize(
    "more, words",
    [
        (["--num-frames", "5", "--tubelet-size", "2"], "5 is not divided by tubelet_size 2"),
        (["--input-size", "16x24"], "crops of videos are square"),
        (["--eval-short-side", "8"], "--eval-short-side 8 is less than a crop of 16"),
        (["--model", "vim_tiny"], "num_frames is for videomamba"),
        (["--aa", "augmix-m3"], "rand-mM-nN-mstdS-inc1"),
        (["--batch-size", "3"], "must be even for mixup"),
        (["--crop-area", "0.9", "0.5"], "--crop-area 0.9 0.5: the first is the least"),
        (["--sampling-rate", "2"], "has no meaning without --frame-sampling dense"),
        (["--model-kwargs", "num_frames=4"], "use --num-frames"),
        (["--model-kwargs", "patch_size=8", "stride=4"], "do not overlap"),
    ],
)
def test_flags_that_do_not_fit(videos, tmp_path, more, words):
    with pytest.raises(UsageError, match=words):
        main.main(flags(videos, *more, "--output_dir", str(tmp_path)))


def test_a_dynamic_model_wants_a_teacher_of_clips(videos, dense, tmp_path):
    checkpoint = load_checkpoint(dense / "best_checkpoint.pth")
    weights = {k: v for k, v in checkpoint["model"].items() if not k.startswith("temporal_")}
    weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"][:, :, 0]
    path = tmp_path / "images.pth"
    torch.save({"model": weights}, path)
    more = ("--method", "dyvm", "--pruning-layers", "1", "2", "--model-path", str(path))
    with pytest.raises(UsageError, match="is an image model; a dynamic model of clips starts from"):
        main.main(flags(videos, *more, "--output_dir", str(tmp_path / "run")))


@pytest.mark.parametrize("name, sampling, flip", [("SSV2", "parts", 0), ("K400", "uniform", 0.5)])
def test_defaults_follow_the_data_set(videos, name, sampling, flip):
    source = ["--data-set", name, "--data-path", str(videos)]
    args = options.parse(source)
    assert (args.frame_sampling, args.hflip) == (sampling, flip)
    args = options.parse([*source, "--hflip", "0.3", "--frame-sampling", "dense"])
    assert (args.frame_sampling, args.hflip) == ("dense", 0.3)


def test_images_have_no_clips(tmp_path):
    with pytest.raises(UsageError, match="num_frames"):
        main.main(
            ["--model", "videomamba_tiny", "--model-kwargs", "num_frames=4", "--input-size", "16",
             "--device", "cpu", "--output_dir", str(tmp_path)]
        )  # fmt: skip
