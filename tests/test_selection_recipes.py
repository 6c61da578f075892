"""Recipes of ways to reduce tokens other than the paper's."""

import pytest
from helpers.recipes import recipe

from models.build import ModelSpec

OURS = {
    "distilled-vim-s": {"token_strategy": "distilled"},
    "inplace-vim-s": {"selector_gradient": "inplace"},
    "distilled-merge-vim-s": {"token_strategy": "distilled", "reduction": "prune+merge"},
}
R_MEETO = {  # model, tokens merged by each stage, epochs
    "r-meeto-vim-t": ("dyvm_vim_tiny", 5, 30),
    "r-meeto-vim-s": ("dyvm_vim_small", 11, 15),
    "r-meeto-vim-b": ("dyvm_vim_base", 11, 15),
}


@pytest.mark.parametrize("name, flags", OURS.items())
def test_one_flag_or_two_differ_from_the_papers_recipe(name, flags, tmp_path):
    _, paper = recipe("vim-s", tmp_path, GPUS="4")
    launcher, args = recipe(f"selection/{name}", tmp_path, GPUS="4")
    assert "--nproc_per_node=4" in launcher
    changed = {key: value for key, value in vars(args).items() if value != vars(paper)[key]}
    assert changed.pop("output_dir").endswith(f"output/selection/{name}")
    assert changed == flags


@pytest.mark.parametrize("name", R_MEETO)
def test_merging_is_as_published(name, tmp_path):
    model, merged, epochs = R_MEETO[name]
    _, args = recipe(f"selection/{name}", tmp_path, GPUS="4")
    spec = ModelSpec.from_args(args)
    assert (spec.name, spec.method, spec.reduction) == (model, "token", "merge")
    assert (spec.merge_tokens, args.epochs, args.lr, args.min_lr) == (merged, epochs, 2e-5, 1e-6)
    assert spec.pruning_layers is None, "every second layer"
