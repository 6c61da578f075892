"""What `--eval` reports: measures, operations in both conventions, measured throughput.

It goes to `eval.json` and to a table on the screen.
"""

import json
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from drawing.pictures import decision_picture, with_row_names
from engine import evaluation_forward, validate
from loading.images import BadImageError
from models import Result, VisionMamba
from models.build import sigmoid
from models.flops import count_flops, decoder_operations
from ops.selective_scan import backend_for
from tasks import Experiment, Meter, Task
from utils.environment import device_name
from utils.files import sha256_of, write_json
from utils.run_folder import EVAL_BAD_IMAGES, clear_pictures
from utils.tables import text_table
from utils.timing import interleaved

from .columns import rows_of
from .decisions import DecisionMeter
from .inference import Predictor
from .samples import draw_samples

WARM_UP = 2  # calls of each model; a CUDA graph is captured in the second one
LEAST_ROUNDS = 5
MISSED = 0.02  # of the budget of all images

_logger = logging.getLogger(__name__)


def evaluate_all(
    model: VisionMamba,
    ema: VisionMamba | None,
    dense: VisionMamba | None,
    dense_trained: bool,
    experiment: Experiment,
    meters: Sequence[Meter] = (),
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Evaluate a model, its EMA and its dense counterpart.

    Args:
        model: dense or dynamic.
        dense: the dense counterpart of a dynamic model; without `dense_trained` its weights are
            unknown, and only its operations, parameters and throughput are reported.
        meters: additional ones for the model's pass.

    Returns:
        The content of eval.json on rank 0, else None; all values of the model.
    """
    values = validate(model, experiment, "evaluation", meters)
    best, ema_best = experiment.task.best, None
    if ema is not None:
        ema_best = validate(ema, experiment, "evaluation (EMA)")[best.key]
    dense_values = validate(dense, experiment, "evaluation (dense)") if dense_trained else None
    if not experiment.is_main:
        return None, values
    task, dynamic = experiment.task, experiment.spec.dynamic
    models = {"dynamic": model, "dense": dense} if dynamic else {"dense": model}
    speeds, timed = forward_speeds(models, experiment, experiment.args.throughput_seconds)
    own = column(model, task, values, speeds["dynamic" if dynamic else "dense"])
    own |= {best.ema_key: ema_best}
    if dynamic:
        other = column(dense, task, dense_values, speeds["dense"], values["passes"])
        report = _comparison(other, own | _kept(model, values, task))
    else:
        report = {"dense": own, "dynamic": None, "reduction": None, "speedup": None}
    report |= {
        "model": experiment.spec.name,
        "data_set": experiment.args.data_set,
        "images": values["images"],
        "batch_size": timed,
        "backend": _backend(model),
        "device": device_name(experiment.device),
        "precision": experiment.precision,
    }
    if task.evaluation_flags:
        report["evaluation"] = {
            flag: getattr(experiment.args, flag) for flag in task.evaluation_flags
        }
    return report, values


def column(
    model: VisionMamba,
    task: Task,
    values: Mapping[str, Any] | None,
    images_per_s: float | None,
    passes: float = 1,
) -> dict[str, Any]:
    """What is reported of one model; without `values`, what does not depend on its weights.

    passes: forward passes of an image, if there are no values.
    """
    if values and "flops" in values:
        flops = values["flops"]
    else:
        flops = count_flops(model, values["gates"] if values else None)
    passes = values["passes"] if values else passes
    scores = {}
    if values:
        scores = {key: values[key] for key in (*(m.key for m in task.measures), *task.details)}
    decoder = decoder_operations(model)
    if decoder:
        scores["decoder_flops"] = passes * decoder
    if decoder or passes != 1:
        scores["passes"] = passes
    return scores | {
        "flops": {kind: passes * count for kind, count in flops._asdict().items()},
        "images_per_s": images_per_s,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _kept(model: VisionMamba, values: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """What a dynamic model's column has in addition to a dense one's."""
    kept = {"keep": values["keep"], "gates": values["gates"]}
    if "object" in values:
        kept["object"] = values["object"]
    if model.route_blocks:
        kept["gate_threshold"] = sigmoid(model.gate_threshold)
    if "counts" in values:
        kept["token_budget"] = _of_images(model, values, task.example)
    return kept


def _of_images(model: VisionMamba, values: Mapping[str, Any], example: str) -> dict[str, Any]:
    """How the images differ in what they keep, see `--token-budget image`."""
    shares = values["counts"].cumsum(1) / values["counts"].sum(1, keepdim=True)
    patches = {
        name: [int((stage >= share - 1e-12).nonzero()[0]) for stage in shares]
        for name, share in (("least", 1e-9), ("tenth", 0.1), ("median", 0.5), ("nine_tenths", 0.9))
    }
    patches["most"] = [int(stage.nonzero()[-1]) for stage in values["counts"]]
    share, error = values["cost"], values["cost_error"]
    if not abs(share - 1) <= max(MISSED, 2 * (error or 0)):
        _logger.warning(
            "the mean cost is %.1f %% of the fixed budget's: these %ss earn other numbers of "
            "tokens than those of the training set on which the thresholds were chosen",
            100 * share,
            example,
        )
    return {
        "thresholds": [sigmoid(odds) for odds in model.reduction.thresholds],
        "patches": patches,
        "exact_to_fixed_at_equal_gates": share,
        "standard_error": error,
    }


def _comparison(dense: dict[str, Any], dynamic: dict[str, Any]) -> dict[str, Any]:
    speeds = dynamic["images_per_s"], dense["images_per_s"]
    reduction = {
        kind: 1 - dynamic["flops"][kind] / dense["flops"][kind] for kind in dynamic["flops"]
    }
    if "decoder_flops" in dense:
        alone = [column["flops"]["exact"] - column["decoder_flops"] for column in (dynamic, dense)]
        reduction["backbone_exact"] = 1 - alone[0] / alone[1]
    return {
        "dense": dense,
        "dynamic": dynamic,
        "reduction": reduction,
        "speedup": speeds[0] / speeds[1] if speeds[1] else None,
    }


def forward_speeds(
    models: Mapping[Hashable, VisionMamba],
    experiment: Experiment,
    seconds: float,
    settings: Mapping[Hashable, Callable[[], None]] | None = None,
) -> tuple[dict[Hashable, float | None], int | None]:
    """Median images/s of each model on the same validation images, in turn, by this process alone,
    and how many images these are; None for each when `seconds` is 0.

    settings: called before the model of that name runs, for one model at several budgets.
    """
    if not seconds:
        return dict.fromkeys(models), None
    images = next(iter(experiment.data.val_batches())).images.to(experiment.device)
    calls = {
        name: partial(
            _run, evaluation_forward(model, experiment), images, (settings or {}).get(name)
        )
        for name, model in models.items()
    }
    with torch.inference_mode():
        for call in [*calls.values()] * WARM_UP:
            call()
        times = interleaved(calls, images.device.type, LEAST_ROUNDS, seconds)
    return {name: 1e3 * len(images) / row["ms"] for name, row in times.items()}, len(images)


def _run(
    forward: Callable[[Tensor], Result], images: Tensor, setting: Callable[[], None] | None
) -> Result:
    if setting is not None:
        setting()
    return forward(images)


def _backend(model: VisionMamba) -> str:
    mixer = model.layers[0].mixer
    device = mixer.in_proj.weight.device
    with torch.no_grad():
        return backend_for(
            torch.zeros(1, 1, mixer.in_proj.out_features, device=device), mixer.branch(False)
        )


def table(report: Mapping[str, Any], task: Task) -> str:
    """The report as a table for the screen, of what was measured."""
    dense, dynamic = report["dense"], report["dynamic"]
    columns = {name: report[name] for name in ("dense", "dynamic") if report[name]}
    rows = []
    for row in rows_of(task, report["batch_size"]):
        if any(row.cell(column, "") for column in columns.values()):
            changed = [row.changed(dense, dynamic)] if dense and dynamic else []
            rows.append([row.label, *map(row.cell, columns.values()), *changed])
    lines = [
        f"{report['model']} on {report['data_set']}, {report['images']} {task.example}s; backend "
        f"{report['backend']}, {report['device']}, {report['precision']}",
        text_table(rows, ["", *columns, *(["change"] if dense and dynamic else [])]),
    ]
    return "\n".join(lines + (_kept_lines(dynamic, task.example) if dynamic else []))


def _kept_lines(dynamic: Mapping[str, Any], example: str) -> list[str]:
    lines = []
    if dynamic["keep"]:
        shares = ", ".join(f"{100 * share:.1f} %" for share in dynamic["keep"])
        lines.append(f"patches kept after each stage: {shares}")
    if "token_budget" in dynamic:
        own = dynamic["token_budget"]
        error, without = "", ""
        if own["standard_error"] is not None:
            error = f" (standard error {100 * own['standard_error']:.2f} %)"
        if "decoder_flops" in dynamic:
            without = " without the decoder"
        ranges = ", ".join(
            f"{least} to {most}"
            for least, most in zip(
                own["patches"]["tenth"], own["patches"]["nine_tenths"], strict=True
            )
        )
        lines.append(
            f"patches of four {example}s in five after each stage: {ranges}; the mean "
            f"cost{without} is {100 * own['exact_to_fixed_at_equal_gates']:.2f} % of that with "
            f"equal numbers{error}"
        )
    if "object" in dynamic:
        seen = dynamic["object"]
        share, mass = (", ".join(f"{part:.1f} %" for part in seen[k]) for k in ("share", "mass"))
        lines.append(
            f"of these on the object: {share} (of all patches {seen['chance']:.1f} %); of the "
            f"object's mass: {mass}"
        )
    forward, backward = (sum(gates) / len(gates) for gates in zip(*dynamic["gates"], strict=True))
    threshold = ""
    if "gate_threshold" in dynamic:
        threshold = f" (gate threshold {dynamic['gate_threshold']:.3f})"
    lines.append(
        f"scans kept: forward {100 * forward:.1f} %, backward {100 * backward:.1f} %{threshold}"
    )
    return lines


@torch.no_grad()
def draw_decisions(model: VisionMamba, experiment: Experiment, count: int = 8):
    """Picture [H, W, 3] of validation images, and what each stage keeps; None if all is kept."""
    if not model.pruning_layers:
        return None
    count = max(1, count // model.patch_embed.slots)
    images = _model_sized(experiment, model.patch_embed.img_size, count)
    if images is None:
        return None
    result = evaluation_forward(model, experiment)(images.to(experiment.device))
    if len(result.kept[0]) != len(images):
        return None  # the task looks at an image more than once
    scale = max(1, 96 // images.shape[-1])
    picture = decision_picture(images, result.kept, model.patch_embed, scale, result.groups)
    shares = [100 * (kept >= 0).sum(1).double().mean() / model.num_patches for kept in result.kept]
    stages = [f"stage {i}:\n{share:.0f} % kept" for i, share in enumerate(shares, start=1)]
    return with_row_names(picture, ["input", *stages])


def _model_sized(experiment: Experiment, size: tuple[int, int], count: int) -> Tensor | None:
    """The first validation images [B, 3, *size]; None where there are none of this size."""
    task, val = experiment.task, experiment.data.val
    if task.fixed_size:
        images = next(iter(experiment.data.val_batches(quick=True))).images[:count]
        return images if images.shape[-2:] == size else None
    transform, images = task.image_transform(experiment.args, size), []
    for index in range(0 if val is None else min(count, len(val))):
        with suppress(BadImageError):  # the evaluation has reported it
            images.append(transform(val.load(index).image))
    return torch.stack(images) if images else None


def _list_bad_images(experiment: Experiment) -> None:
    """`--eval` has a list of its own, which begins anew: another list is of the training."""
    data, distributed, output = experiment.data, experiment.distributed, experiment.output
    if not experiment.args.eval:
        data.list_bad_images(output, distributed.rank)
        return
    if experiment.is_main:
        for earlier in output.glob(EVAL_BAD_IMAGES.format("*")):
            earlier.unlink()
    distributed.barrier()
    data.bad_images.write(output / EVAL_BAD_IMAGES.format(distributed.rank))


def _tell_of_replaced(path: Path, digest: str) -> None:
    """Say so where the evaluation of another checkpoint will be replaced."""
    with suppress(OSError, ValueError, AttributeError):
        if json.loads(path.read_text()).get("checkpoint_sha256") != digest:
            _logger.info("%s is of another checkpoint, and will be replaced", path)


def report_evaluation(
    model: VisionMamba,
    ema: VisionMamba | None,
    dense: VisionMamba | None,
    experiment: Experiment,
    source: str | Path,
) -> None:
    """Evaluate, print the table, write eval.json, pictures of the decisions and the task's own.

    source: the checkpoint that the model is of.
    """
    task, data, output = experiment.task, experiment.data, experiment.output
    dense_trained = dense is not None
    if experiment.spec.dynamic and dense is None:
        dense = experiment.model(experiment.spec.dense())
    decides = model.route_blocks or model.pruning_layers
    meters = [DecisionMeter(model, data.class_names, task.labels)] if decides else []
    if experiment.is_main:
        digest = sha256_of(source)
        _tell_of_replaced(output / "eval.json", digest)
    report, values = evaluate_all(model, ema, dense, dense_trained, experiment, meters)
    _list_bad_images(experiment)
    if not experiment.is_main:
        return
    report["checkpoint_sha256"] = digest
    clear_pictures(output)
    predictor = Predictor.of(model, experiment)
    if decides:
        values["decisions"].write(output / "decisions")
        draw_samples(predictor, data, output / "decisions")
    write_json(output / "eval.json", report)
    task.draw_evaluation(predictor.forward, data, predictor.img_size, values, output)
    print(table(report, task))
    picture = draw_decisions(model, experiment)
    if picture is not None:
        Image.fromarray(picture).save(output / "kept_patches.png")
    _logger.info("written to %s", output / "eval.json")
