"""What the task of videos computes: the mean of views, their meter, mixup of clips."""

import numpy as np
import torch

from loading.loaders import Batch
from models import Result
from tasks.video import ClipMixup, VideoMeter, _mean
from utils.distributed import Distributed

CPU = torch.device("cpu")


def test_the_mean_of_views_is_that_of_probabilities():
    torch.manual_seed(0)
    logits, gates = torch.randn(3, 4, 5), torch.rand(2, 3, 4, 2)
    kept = [torch.arange(3 * 4).view(3, 4, 1)]
    results = [
        Result(logits[:, v], *[torch.zeros(0)] * 3, gates[:, :, v], kept=[kept[0][:, v]])
        for v in range(4)
    ]
    merged = _mean(results)
    torch.testing.assert_close(merged.logits.exp(), logits.softmax(-1).mean(1))
    assert torch.equal(merged.gates, gates.flatten(1, 2)) and torch.equal(
        merged.view_logits, logits
    )
    assert merged.kept[0].flatten().tolist() == list(range(12)), "those of a video are neighbours"


def test_the_meter_tells_views_from_videos():
    meter = VideoMeter(CPU, slots=2)
    views = torch.tensor([[[4.0, 0, 0], [0, 1, 0]], [[0, 3, 0], [2, 0, 0]]])  # [B, V, C]
    merged = views.softmax(-1).mean(1).log()
    result = Result(
        merged, *[torch.zeros(0)] * 3, torch.ones(1, 4, 2), view_logits=views,
        owner=torch.zeros(2, 6), kept=[torch.tensor([[0, 1], [2, 3], [3, 4], [0, 5]])],
    )  # fmt: skip
    meter.update(Batch(torch.zeros(2, 1), torch.tensor([0, 1]), torch.arange(2)), result)
    values = meter.compute(Distributed(CPU))
    assert values["top1"] == 100 and values["view_top1"] == 50
    assert values["kept_per_slot"] == [[4 / 4, 4 / 4]]


def test_mixup_treats_all_frames_alike():
    torch.manual_seed(0)
    np.random.seed(0)
    still = torch.randn(4, 3, 1, 8, 8).expand(-1, -1, 5, -1, -1)
    for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0)):
        mixed, targets = ClipMixup(mixup, cutmix, num_classes=3)(still.clone(), torch.arange(4) % 3)
        assert mixed.shape == still.shape and targets.shape == (4, 3)
        assert torch.equal(mixed, mixed[:, :, :1].expand_as(mixed))
        assert not torch.equal(mixed, still)
