"""Train and evaluate Vision Mamba and its dynamic form, DyVM.

    python main.py                                                   a dense vim_micro on handwritten digits
    python main.py --method dyvm --model-path output/best_checkpoint.pth --output_dir output/dyvm
    python main.py --eval --model-path output/dyvm/best_checkpoint.pth
    torchrun --standalone --nproc_per_node 4 main.py --method dyvm --model vim_small --data-set IMNET \
        --data-path IMAGENET --model-path DENSE.pth --token-keep-ratio 0.7 --block-keep-ratio 0.8

`scripts/` has the recipes of the paper.
"""

import os

from evaluation.summary import draw_decisions, report_evaluation

# Threads that wait for each other sleep. Spinning, the default, makes steps many times slower on a
# shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import functools
import logging
import sys
from pathlib import Path
from typing import Any

import options
from datasets import Data, build_data
from engine import Interrupted, Training, build_training, evaluate, train_one_epoch
from evaluation.calibration import calibrate
from evaluation.sweep import run_sweep
from loading.loaders import WORKER_DIED
from models import VisionMamba
from models.build import (
    STORED,
    build_dense,
    check_classes,
    model_image_size,
    recorded_arguments,
    restore_model,
    set_threshold,
)
from models.weights import load_weights
from utils import preemption, resume
from utils.checkpoint import BEST, load_checkpoint, save_checkpoint
from utils.distributed import Distributed, init_distributed
from utils.environment import describe_environment
from utils.errors import UsageError, UserError
from utils.files import prepare_output_dir, write_json
from utils.logging import Averages, EpochLog, setup_logging, tensorboard_writer, write_args
from utils.nonfinite import NonFiniteError
from utils.program import run_main

CALIBRATED = "calibrated_checkpoint.pth"

_logger = logging.getLogger("dyvm")


def train(args: argparse.Namespace, data: Data, distributed: Distributed) -> int:
    """Train to the last epoch and evaluate; -> exit code, that of preemption when told to leave."""
    preemption.install()
    run = build_training(args, data, distributed)
    record = resume.identity(
        args, distributed.world_size, data.class_names, data.steps_per_epoch, run.model.family.name
    )
    averages = resume.start_or_resume(run, record, args, distributed)

    def before_save() -> None:
        run.guard.look()
        data.list_bad_images(args.output_dir, distributed.rank)

    saver = resume.Saver(run, record, args, distributed, before_save)
    log = EpochLog(args.output_dir)
    if distributed.is_main:
        write_args(args.output_dir, args)
        write_json(Path(args.output_dir) / "environment.json", describe_environment())
        log.resume_at(run.epoch)
    tensorboard = tensorboard_writer(args.output_dir, distributed, purge_step=run.epoch)
    _logger.info(
        "%s: %s parameters, %s of %d classes, %d steps an epoch",
        args.model,
        f"{sum(p.numel() for p in run.model.parameters()):,}",
        args.data_set,
        data.num_classes,
        data.steps_per_epoch,
    )
    while run.epoch < args.epochs:
        after_step = functools.partial(saver.after_step, averages)
        try:
            finished = train_one_epoch(run, data, args, distributed, averages, after_step)
        except NonFiniteError as error:
            raise saver.save_for_inspection(averages, error) from None
        if not finished:
            return _leave(saver)
        saver.save(averages)
        try:
            epoch_record, best = evaluate_epoch(run, data, args, distributed, averages)
        except Interrupted:
            return _leave(saver)
        if (
            distributed.is_main
        ):  # before the checkpoint that says the epoch is done; resuming drops lines too many
            log.append(epoch_record)
            show_epoch(tensorboard, run, data, epoch_record, distributed)
        run.epoch, run.step, averages = run.epoch + 1, 0, Averages()
        saver.save(averages, best=best)
    saver.close()
    if tensorboard is not None:
        tensorboard.close()
    distributed.barrier()
    evaluate_best(run, data, args, distributed)
    return 0


def _leave(saver: resume.Saver) -> int:
    saver.close()
    _logger.warning(
        "told to leave by %s; saved, continue with --resume auto", preemption.received()
    )
    return preemption.EXIT_CODE


def evaluate_epoch(
    run: Training,
    data: Data,
    args: argparse.Namespace,
    distributed: Distributed,
    averages: Averages,
) -> tuple[dict[str, Any], bool]:
    """Evaluate after an epoch; -> its line of log.txt, whether it is the best so far."""
    trained = averages.means(distributed)
    trained["skipped_steps"] = round(
        trained["skipped_steps"] * (data.steps_per_epoch // args.accum_steps)
    )
    metrics = evaluate(run.model, data, args, distributed, interrupted=preemption.requested)
    record = {f"train_{name}": value for name, value in trained.items()}
    record |= {"test_loss": metrics.loss, "test_acc1": metrics.top1, "test_acc5": metrics.top5}
    if run.ema is not None:
        record["test_ema_acc1"] = evaluate(
            run.ema.module, data, args, distributed, "evaluation (EMA)", preemption.requested
        ).top1
    if args.bad_images == "skip":
        listed = distributed.gather_objects(data.list_bad_images(args.output_dir, distributed.rank))
        record["bad_images"] = len(set().union(*listed or []))
    best = metrics.top1 >= run.best
    run.best = max(run.best, metrics.top1)
    _logger.info(
        "epoch %d/%d: loss %.4f, top-1 %.2f (best %.2f)",
        run.epoch + 1,
        args.epochs,
        trained["loss"],
        metrics.top1,
        run.best,
    )
    parameters = sum(p.numel() for p in run.model.parameters())
    return record | {"best_acc1": run.best, "epoch": run.epoch, "n_parameters": parameters}, best


def evaluate_best(
    run: Training, data: Data, args: argparse.Namespace, distributed: Distributed
) -> None:
    """The full report on the best checkpoint of a run; on its last weights if the best were left in
    another folder.
    """
    best = Path(args.output_dir) / BEST
    ema, weights = None if run.ema is None else run.ema.module, None
    if best.exists():
        weights = load_checkpoint(best)
        run.model.load_state_dict(weights["model"])
        if ema is not None:
            ema.load_state_dict(weights["ema"])
    thresholds = calibrate({"model": run.model, "ema": ema}, data, args, distributed)
    if thresholds and weights and distributed.is_main:
        save_checkpoint(weights | {STORED: thresholds}, best)
    if args.gate_threshold != "calibrated":
        for model in (run.model, ema):
            set_threshold(model, args.gate_threshold)
    report_evaluation(run.model, ema, run.teacher, data, args, distributed)


def show_epoch(
    tensorboard, run: Training, data: Data, record: dict[str, Any], distributed: Distributed
) -> None:
    """TensorBoard: every number of the epoch's log line, and what was dropped of a few validation
    images.
    """
    epoch = record["epoch"]
    for name, value in record.items():
        if name not in ("epoch", "n_parameters"):
            tensorboard.add_scalar(name, value, epoch)
    picture = draw_decisions(run.model, data, distributed.device)
    if picture is not None:
        tensorboard.add_image("kept_patches", picture, epoch, dataformats="HWC")


def evaluate_checkpoint(
    args: argparse.Namespace, checkpoint: dict[str, Any], data: Data, distributed: Distributed
) -> None:
    """`--eval`: a checkpoint of ours or an official one, beside its dense counterpart where that is
    known.
    """
    device = distributed.device
    check_classes(checkpoint, data.class_names, args.model_path)
    model = restore_model(args, checkpoint, data.num_classes).to(device)
    dense = None
    if args.dense_path and args.method != "dense":
        dense = build_dense(args, data.num_classes).to(device)
        load_weights(dense, load_checkpoint(args.dense_path), args.dense_path)
    environment = Path(args.output_dir) / "environment.json"
    if (
        distributed.is_main and not environment.exists()
    ):  # that of the training, if it wrote to this folder, stays
        write_json(environment, describe_environment())
    ema = (
        restore_model(args, checkpoint, data.num_classes, ema=True).to(device)
        if checkpoint.get("ema")
        else None
    )
    if args.calibrate:
        thresholds = calibrate({"model": model, "ema": ema}, data, args, distributed)
        if distributed.is_main:
            save_calibrated(checkpoint, thresholds, model, args)
    if args.sweep:
        run_sweep(
            model,
            dense,
            recorded_arguments(checkpoint).get("token_keep_ratio"),
            data,
            args,
            distributed,
        )
        return
    report_evaluation(model, ema, dense, data, args, distributed)


def save_calibrated(
    checkpoint: dict[str, Any],
    thresholds: dict[str, float],
    model: VisionMamba,
    args: argparse.Namespace,
) -> None:
    """`--calibrate`: the checkpoint with thresholds and the budgets they are for; of a foreign one
    its weights.
    """
    known = {"model": checkpoint["model"], "family": model.family.name}
    if recorded_arguments(checkpoint):
        budgets = {
            "block_keep_ratio": args.block_keep_ratio,
            "token_keep_ratio": args.token_keep_ratio,
        }
        known = checkpoint | {"args": checkpoint["args"] | budgets}
    save_checkpoint(known | {STORED: thresholds}, Path(args.output_dir) / CALIBRATED)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = options.parse(argv)
    distributed = init_distributed(args.device)
    setup_logging(distributed.is_main)
    checkpoint = None
    if args.eval:
        checkpoint = load_checkpoint(args.model_path)
        args = options.parse(argv, recorded_arguments(checkpoint))
    data = build_data(
        args,
        model_image_size(args),
        rank=distributed.rank,
        world_size=distributed.world_size,
        train=not args.eval or args.calibrate,
    )
    if args.calibrate and data.calibration_loader is None:
        raise UsageError(
            f"--calibrate: {args.data_set} is read as a stream, of which no fixed part can be "
            "shown; "
            "choose a threshold with --gate-threshold P"
        )
    prepare_output_dir(args.output_dir)
    code = 0
    try:
        if args.eval:
            evaluate_checkpoint(args, checkpoint, data, distributed)
        else:
            code = train(args, data, distributed)
    except RuntimeError as error:
        if not str(error).startswith(WORKER_DIED):
            raise
        raise UserError(
            f"reading the data failed: {error}; out of memory? Try fewer --num-workers"
        ) from None
    distributed.shutdown()
    return code


if __name__ == "__main__":
    run_main(main)
