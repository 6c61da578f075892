"""Train and evaluate Vision Mamba and its dynamic form, DyVM.

    python main.py                                        a dense vim_micro on handwritten digits
    python main.py --method dyvm --model-path output/best_checkpoint.pth --output_dir output/dyvm
    python main.py --eval --model-path output/dyvm/best_checkpoint.pth
    torchrun --standalone --nproc_per_node 4 main.py --method dyvm --model vim_small \
        --data-set IMNET --data-path IMAGENET --model-path DENSE.pth \
        --token-keep-ratio 0.7 --block-keep-ratio 0.8

`scripts/` holds the paper's recipes.
"""

from utils.startup import prepare, require

prepare()

import argparse
import functools
import logging
import sys
from typing import Any

import options
from datasets import task_of
from engine import Interrupted, train_one_epoch, validate
from evaluation.calibration import calibrate, calibrate_tokens
from evaluation.summary import draw_decisions, report_evaluation
from evaluation.sweep import run_sweep
from exporting.record import refuse_exported
from loading.fingerprint import fingerprints
from loading.loaders import worker_died
from models import VisionMamba
from models.build import (
    STAGE_KEEP,
    STORED,
    TOKEN_THRESHOLDS,
    recorded_arguments,
    restore,
    set_threshold,
    token_budget,
    token_thresholds,
)
from models.weights import load_weights
from tasks import Experiment, check_task, task_named, task_of_checkpoint
from training import Training, build_training
from utils import preemption, resume, run_folder
from utils.checkpoint import BEST, NEWEST, load_checkpoint, save_checkpoint
from utils.distributed import init_distributed
from utils.environment import describe_environment
from utils.errors import UsageError
from utils.files import prepare_output_dir, write_json
from utils.logging import (
    NOT_PLOTTED,
    Averages,
    EpochLog,
    setup_logging,
    tensorboard_writer,
    write_args,
)
from utils.nonfinite import NonFiniteError
from utils.precision import check_amp
from utils.program import run_main
from utils.run_folder import CALIBRATED

_logger = logging.getLogger("dyvm")


def train(experiment: Experiment) -> int:
    """Train to the last epoch and evaluate; -> exit code, `preemption.EXIT_CODE` if preempted."""
    args, data, distributed = experiment.args, experiment.data, experiment.distributed
    preemption.install()
    training = build_training(experiment)
    record = resume.identity(
        args,
        distributed.world_size,
        data.class_names,
        data.steps_per_epoch,
        training.model.family.name,
        experiment.task.name,
        fingerprints(data, args.data_path) if distributed.is_main else None,
    )
    averages = resume.start_or_resume(training, record, args, distributed)

    def before_save() -> None:
        training.guard.look()
        data.list_bad_images(experiment.output, distributed.rank)

    saver = resume.Saver(training, record, args, distributed, before_save)
    log = EpochLog(experiment.output)
    if distributed.is_main:
        write_args(experiment.output, args, task=experiment.task.name)
        write_json(experiment.output / "environment.json", describe_environment())
        log.resume_at(training.epoch)
    tensorboard = tensorboard_writer(experiment.output, distributed, purge_step=training.epoch)
    _logger.info(
        "%s: %s parameters, %s%s, %d steps an epoch",
        args.model,
        f"{sum(p.numel() for p in training.model.parameters()):,}",
        args.data_set,
        f" of {data.num_classes} classes" if data.num_classes else "",
        data.steps_per_epoch,
    )
    while training.epoch < args.epochs and not gives_up(training, args.patience):
        after_step = functools.partial(saver.after_step, averages)
        try:
            finished = train_one_epoch(training, experiment, averages, after_step)
        except NonFiniteError as error:
            raise saver.save_for_inspection(averages, error) from None
        if not finished:
            return _leave(saver)
        saver.save(averages)
        try:
            epoch_record, best = evaluate_epoch(training, experiment, averages)
        except Interrupted:
            return _leave(saver)
        # Before the checkpoint that marks the epoch as done; resuming drops surplus lines.
        if distributed.is_main:
            log.append(epoch_record)
            show_epoch(tensorboard, training.model, epoch_record, experiment)
        training.epoch, training.step, averages = training.epoch + 1, 0, Averages()
        saver.save(averages, best=best)
    saver.close()
    if tensorboard is not None:
        tensorboard.close()
    distributed.barrier()
    evaluate_best(training, experiment)
    return 0


def gives_up(training: Training, patience: int | None) -> bool:
    """Whether the best epoch is `--patience` epochs back."""
    if not patience or training.best_epoch is None:
        return False
    since = training.epoch - 1 - training.best_epoch
    if since >= patience:
        _logger.info(
            "--patience %d: no epoch since %d was as good; the training ends after %d of them",
            *(patience, training.best_epoch + 1, training.epoch),
        )
    return since >= patience


def _leave(saver: resume.Saver) -> int:
    saver.close()
    _logger.warning(
        "told to leave by %s; saved, continue with --resume auto", preemption.received()
    )
    return preemption.EXIT_CODE


def evaluate_epoch(
    training: Training, experiment: Experiment, averages: Averages
) -> tuple[dict[str, Any], bool]:
    """Evaluate after an epoch; -> its line of log.txt, whether it is the best so far."""
    args, data, task = experiment.args, experiment.data, experiment.task
    trained = averages.means(experiment.distributed)
    trained["skipped_steps"] = round(
        trained["skipped_steps"] * (data.steps_per_epoch // args.accum_steps)
    )
    values = validate(training.model, experiment, interrupted=preemption.requested, quick=True)
    record = {f"train_{name}": value for name, value in trained.items()}
    record |= {f"test_{measure.log_name}": values[measure.key] for measure in task.measures}
    if "object" in values:
        for part in ("share", "mass"):
            record[f"test_object_{part}"] = values["object"][part][-1]
    decisive = task.best
    if training.ema is not None:
        record[f"test_ema_{decisive.log_name}"] = validate(
            training.ema.module,
            experiment,
            "evaluation (EMA)",
            interrupted=preemption.requested,
            quick=True,
        )[decisive.key]
    if args.bad_images == "skip":
        rank = experiment.distributed.rank
        listed = experiment.distributed.gather_objects(
            data.list_bad_images(experiment.output, rank)
        )
        record["bad_images"] = len(set().union(*listed or []))
    value = values[decisive.key]
    best = decisive.improves(value, training.best)
    if best:
        training.best, training.best_epoch = value, training.epoch
    _logger.info(
        "epoch %d/%d: loss %.4f, %s %s (best %s)",
        training.epoch + 1,
        args.epochs,
        trained["loss"],
        decisive.name,
        decisive.text(value),
        decisive.text(training.best),
    )
    return record | {
        f"best_{decisive.log_name}": training.best,
        "best_epoch": training.best_epoch,
        "epoch": training.epoch,
        "n_parameters": sum(p.numel() for p in training.model.parameters()),
    }, best


def evaluate_best(training: Training, experiment: Experiment) -> None:
    """The full report on a run's best checkpoint, or on its last weights if that lies elsewhere."""
    best = experiment.output / BEST
    model, ema = training.model, None if training.ema is None else training.ema.module
    source, weights = experiment.output / NEWEST, None
    if best.exists():
        source, weights = best, load_checkpoint(best)
        model.load_state_dict(weights["model"])
        if training.keep_schedule is not None:
            spec = experiment.spec
            own = weights.get(STAGE_KEEP)  # None: of epochs before --resume-override
            training.set_token_keep(own or spec.stage_keep or spec.token_keep_ratio)
        if ema is not None:
            ema.load_state_dict(weights["ema"])
    else:
        _logger.warning("%s is missing: the report is on the last epoch's weights", best)
    thresholds = calibrate({"model": model, "ema": ema}, experiment)
    if thresholds and weights and experiment.is_main:
        save_checkpoint(weights | {STORED: thresholds}, best)
    if experiment.args.gate_threshold != "calibrated":
        for each in (model, *([] if ema is None else [ema])):
            set_threshold(each, experiment.args.gate_threshold)
    report_evaluation(model, ema, training.teacher, experiment, source)


def show_epoch(
    tensorboard, model: VisionMamba, record: dict[str, Any], experiment: Experiment
) -> None:
    """TensorBoard: every number of the epoch's log line, and a picture of the patches kept."""
    epoch = record["epoch"]
    for name, value in record.items():
        if name not in NOT_PLOTTED:
            tensorboard.add_scalar(name, value, epoch)
    picture = draw_decisions(model, experiment)
    if picture is not None:
        tensorboard.add_image("kept_patches", picture, epoch, dataformats="HWC")


def evaluate_checkpoint(checkpoint: dict[str, Any], experiment: Experiment) -> None:
    """`--eval`: a checkpoint of ours or an official one, beside its dense counterpart if known."""
    args, spec = experiment.args, experiment.spec
    experiment.task.check_checkpoint(checkpoint, experiment.data.class_names, args.model_path)

    def restored(ema: bool) -> VisionMamba:
        model = experiment.model(spec)
        return restore(model, checkpoint, args.model_path, ema=ema, threshold=args.gate_threshold)

    model, dense = restored(ema=False), None
    if args.dense_path and spec.dynamic and not starts_from_another_task(checkpoint, experiment):
        dense = experiment.model(spec.dense())
        load_weights(dense, load_checkpoint(args.dense_path), args.dense_path)
    # A training that wrote to this folder has recorded its own: that one stays.
    environment = experiment.output / "environment.json"
    if experiment.is_main and not environment.exists():
        write_json(environment, describe_environment())
    ema = restored(ema=True) if checkpoint.get("ema") else None
    models = {"model": model, "ema": ema}
    gates = calibrate(models, experiment) if args.calibrate else {}
    tokens = {}
    if args.token_budget == "image":
        tokens = {} if args.calibrate else token_thresholds(checkpoint, args)
        for name, odds in tokens.items():
            models[name].set_token_thresholds(odds)
        if tokens:
            _logger.info("thresholds of tokens: those that %s holds", args.model_path)
        tokens = tokens or calibrate_tokens(models, experiment)
    if args.calibrate and experiment.is_main:
        save_calibrated(checkpoint, gates, tokens, model, experiment)
    if args.sweep:
        recorded = recorded_arguments(checkpoint)
        trained = recorded.get("token_keep_ratio")
        if own := recorded.get(STAGE_KEEP):
            trained = None
            _logger.info(
                "--sweep R: stage j keeps R^j; what the checkpoint's own stages keep, %s, is not "
                "among these budgets",
                ", ".join(f"{keep:.3g}" for keep in own),
            )
        run_sweep(model, dense, trained, experiment)
        return
    report_evaluation(model, ema, dense, experiment, args.model_path)


def needs_training_images(args: argparse.Namespace, checkpoint: dict[str, Any]) -> bool:
    """Whether an evaluation chooses thresholds."""
    return args.calibrate or (
        args.token_budget == "image" and not token_thresholds(checkpoint, args)
    )


def starts_from_another_task(checkpoint: dict[str, Any], experiment: Experiment) -> bool:
    """Whether `--dense-path` is a checkpoint's own start, and that of another task: no teacher."""
    path = experiment.args.dense_path
    if path != recorded_arguments(checkpoint).get("dense_path"):
        return False
    trained = task_of_checkpoint(load_checkpoint(path)).name
    if trained == experiment.task.name:
        return False
    _logger.info("%s was trained for %s: the dense column has no score", path, trained)
    return True


def save_calibrated(
    checkpoint: dict[str, Any],
    gates: dict[str, float],
    tokens: dict[str, list[float]],
    model: VisionMamba,
    experiment: Experiment,
) -> None:
    """`--calibrate`: write the checkpoint with its thresholds and the budgets they are for.

    Of a checkpoint without recorded arguments only the weights and class names are kept.
    """
    content = {"model": checkpoint["model"], "family": model.family.name}
    content |= {name: checkpoint[name] for name in ("class_names",) if name in checkpoint}
    if recorded_arguments(checkpoint):
        budgets = {
            "block_keep_ratio": experiment.args.block_keep_ratio,
            "token_keep_ratio": experiment.args.token_keep_ratio,
            STAGE_KEEP: experiment.args.stage_keep,
        }
        content = checkpoint | {"args": checkpoint["args"] | budgets, STAGE_KEEP: None}
    if gates:
        content[STORED] = gates
    if content.pop(TOKEN_THRESHOLDS, None) and not tokens:
        _logger.info(
            "%s: left out the thresholds of tokens, which were chosen with other gates; "
            "--token-budget image chooses them anew",
            CALIBRATED,
        )
    if tokens:
        content[TOKEN_THRESHOLDS] = tokens | {"of": token_budget(experiment.args)}
    save_checkpoint(content, experiment.output / CALIBRATED)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = options.parse(argv)
    distributed = init_distributed(args.device)
    check_amp(distributed.device, args.amp)
    setup_logging(distributed.is_main)
    checkpoint = None
    if args.eval:
        refuse_exported(args.model_path, "main.py")
        checkpoint = load_checkpoint(args.model_path)
        recorded = recorded_arguments(checkpoint, task_of_checkpoint(checkpoint).recorded)
        args = options.parse(argv, recorded)
        check_task(checkpoint, task_named(task_of(args.data_set)), args.model_path)
    require("matplotlib")
    if not args.eval:
        require("tensorboard")
        run_folder.check(args, distributed)  # reading the data may take long
    choosing = args.eval and needs_training_images(args, checkpoint)
    experiment = Experiment.prepare(args, distributed, train=not args.eval or choosing)
    if choosing and experiment.data.calibration_loader is None:
        flag, way = "--calibrate", "--gate-threshold P sets the threshold of gates"
        if not args.calibrate:
            flag, way = "--token-budget image", "a checkpoint that --calibrate wrote has its own"
        raise UsageError(
            f"{flag}: {args.data_set} is read as a stream, of which no fixed part can be shown; "
            f"{way}"
        )
    prepare_output_dir(args.output_dir)
    code = 0
    try:
        if args.eval:
            evaluate_checkpoint(checkpoint, experiment)
        else:
            with run_folder.claimed(args, distributed):
                code = train(experiment)
    except RuntimeError as error:
        if failure := worker_died(error):
            raise failure from None
        raise
    distributed.shutdown()
    return code


if __name__ == "__main__":
    run_main(main)
