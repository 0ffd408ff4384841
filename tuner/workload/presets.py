"""Models known by name, and the way from a name or a path to a workload."""

from __future__ import annotations

from pathlib import Path

from tuner.errors import UsageError
from tuner.workload.core import Shape, Workload, default_buckets
from tuner.workload.huggingface import SLIDING, read_shapes

PRESETS: dict[str, Workload] = {
    name: Workload(name, shapes, default_buckets())
    for name, shapes in (
        # 48 layers, every fourth with full attention, the others with linear attention
        ("qwen3.5-122b", ((Shape(256, 32, 2), 12),)),
        # 88 layers of Mamba, experts and, 8 times, attention
        ("nemotron-h-120b", ((Shape(128, 32, 2), 8),)),
        # every sixth of 60 layers is global, with larger heads
        ("gemma-4-31b", ((Shape(512, 32, 4), 10), (Shape(256, 32, 16, SLIDING), 50))),
        ("llama-3.1-8b", ((Shape(128, 32, 8), 32),)),
        ("qwen3-4b", ((Shape(128, 32, 8), 36),)),
    )
}


def load_model(name_or_path: str | Path) -> Workload:
    """The preset of that name, or the workload of a Hugging Face ``config.json`` (or the folder that holds one).

    Raises UsageError for an unknown name, or a file that does not describe attention that can be tuned.
    """
    preset = PRESETS.get(str(name_or_path))
    if preset is not None:
        return preset
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        known = ", ".join(PRESETS)
        raise UsageError(f"no model {str(name_or_path)!r}: expected one of {known}, or the path of a config.json")
    name = path.parent.resolve().name if path.name == "config.json" else path.stem
    return Workload(name, read_shapes(path), default_buckets())
