"""Flags of a training of seconds on a CPU."""


def tiny(
    *more: str, depth: int = 4, batch_size: int = 16, epochs: int = 1, subset: int = 64
) -> list[str]:
    """A small model and few images; `more` may say otherwise."""
    return [
        *("--model-kwargs", "embed_dim=16", f"depth={depth}", "--input-size", "16"),
        *("--subset", str(subset), "--batch-size", str(batch_size), "--epochs", str(epochs)),
        *("--warmup-epochs", "0", "--num-workers", "0", "--device", "cpu"),
        *more,
    ]
