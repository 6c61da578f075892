"""Several processes on a CPU: one step equals that of a single process on the joined batch;
evaluation counts once.
"""

import json

import pytest
import torch
from helpers.processes import launch

STEP = """
import json, sys
import torch
from torch import nn
from models import FAMILIES, DynamicVisionMamba, VisionMamba, sampling
from models.importance import with_importance
from losses import Budgets, ClassificationTerms, Distillation, Objective
from utils.distributed import init_distributed

way, output = json.loads(sys.argv[1]), sys.argv[2]
dynamic = way is not None
distributed = init_distributed("cpu")
# Python's lock seldom changes hands: a gloo thread that still needs it at the end aborts.
sys.setswitchinterval(10)
torch.manual_seed(0)
sizes = dict(img_size=32, patch_size=8, embed_dim=16, depth=4, num_classes=5)
teacher = VisionMamba(FAMILIES["vim"], **sizes).eval()
model = teacher
classify = ClassificationTerms(nn.CrossEntropyLoss())
objective = Objective(classify)
if dynamic:
    stages = dict(pruning_layers=(1, 3), token_keep=(0.7, 0.4))
    stages = {} if "merge_tokens" in way else stages
    model = DynamicVisionMamba(FAMILIES["vim"], **stages, **sizes, **way)
    keep = model.token_keep if model.reduction.draws else None
    distillation = Distillation(tokens=not model.reduction.merges)
    objective = Objective(classify, Budgets(keep, 0.5), distillation)
images, targets = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
noise = {f"token.stage{s}": torch.randn(8, 16, 2) for s in range(2)}
noise |= {f"router.layer{i}.gumbels{k}": 8 * torch.randn(8, 2) for i in range(4) for k in (1, 2)}
rank, world_size = distributed.rank, distributed.world_size
share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
noise = {name: value[share] for name, value in noise.items()}
model.train()
parallel = nn.parallel.DistributedDataParallel(model) if distributed.world_size > 1 else model
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
teacher_result = None
if dynamic:
    teacher.requires_grad_(False)
    def answer(result):
        return classify(result, targets[share])["cls"]
    teacher_result = with_importance(teacher, images[share], answer, model.pruning_layers)
with sampling.replay(noise):
    result = parallel(images[share])
if dynamic:
    assert 0 < result.gates.mean() < 1
    assert 0 < result.alive.mean() < 1 or 0 < result.alive.shape[1] < 16
    assert bool(result.scored) == model.reduction.taught
loss, _ = objective(result, targets[share], teacher_result)
loss.backward()
optimizer.step()
if distributed.is_main:
    torch.save(model.state_dict(), output)
distributed.shutdown()
"""


WAYS = {
    "dense": None,
    "dyvm": {},
    "inplace": dict(selector_gradient="inplace"),
    "distilled": dict(token_strategy="distilled"),
    "distilled+inplace+merge": dict(
        token_strategy="distilled", selector_gradient="inplace", reduction="prune+merge"
    ),
    "merge": dict(reduction="merge", merge_tokens=3),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_one_step_of_two_processes_is_that_of_one_on_the_joined_batch(way, tmp_path):
    for processes in (1, 2):
        launch(processes, ["-c", STEP, json.dumps(way), tmp_path / f"{processes}.pth"])
    one, two = (
        torch.load(tmp_path / f"{processes}.pth", weights_only=True) for processes in (1, 2)
    )
    for key, value in one.items():
        torch.testing.assert_close(
            two[key], value, atol=1e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_two_processes_train_and_count_every_image_once(tmp_path):
    arguments = [
        "main.py",
        "--model-kwargs",
        "embed_dim=16",
        "depth=3",
        "--input-size",
        "16",
        "--subset",
        "48",
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "--num-workers",
        "0",
        "--device",
        "cpu",
        "--throughput-seconds",
        "0",
    ]
    launch(2, [*arguments, "--output_dir", tmp_path / "two"])
    trained = json.loads((tmp_path / "two" / "eval.json").read_text())
    assert trained["images"] == 360
    alone = [
        "main.py",
        "--eval",
        "--model-path",
        tmp_path / "two" / "checkpoint.pth",
        "--device",
        "cpu",
        "--throughput-seconds",
        "0",
        "--output_dir",
        tmp_path / "one",
    ]
    launch(1, alone)
    evaluated = json.loads((tmp_path / "one" / "eval.json").read_text())
    for key in ("top1", "top5", "ema_top1"):
        assert evaluated["dense"][key] == trained["dense"][key]
    assert evaluated["dense"]["loss"] == pytest.approx(trained["dense"]["loss"], rel=1e-6)
