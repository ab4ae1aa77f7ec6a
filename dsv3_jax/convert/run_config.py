"""A configuration file that fine-tunes the weights of a folder: a whole run, to be edited."""

from pathlib import Path
from typing import Any

from dsv3_jax.config import ModelConfig
from dsv3_jax.convert import compare, mapping

_FILE = '''"""Fine-tunes the weights of {folder}.

    python train.py --config={file} --workdir=runs/fine-tune
    dsv3 export --from runs/fine-tune --to fine-tuned --dtype bfloat16

The model is that of the folder. Data, rate and length are a start: put yours. Parameters, gradients and
moments are float32, 16 bytes a parameter over all devices.
"""

from dsv3_jax.config import config_dict


def get_config():
    return config_dict(
{sections}
    )
'''


def text(config: ModelConfig, folder: Path, tokenizer: str, file: Path) -> str:
    """The file.

    Args:
      config: the model of the folder.
      folder: with the weights: `train.init_from`.
      tokenizer: as `data.tokenizer` takes it; "" is bytes.
      file: where the text will be, for its first lines.
    """
    model = compare.architecture(config)
    for name in ("max_seq_len", "init_std"):
        model[name] = compare.value(config, name)
    if config.moe.n_dense_layers < config.n_layers:
        # A class without a router bias cannot be exported with one.
        model["moe.bias_speed"] = config.moe.bias_speed if mapping.has_bias(config) else 0.0
    seq_len = min(2048, config.max_seq_len)
    sections = {
        "model": _nested(model),
        "data": {"source": "python_stdlib", "tokenizer": tokenizer or "byte", "mask_documents": True},
        "optimizer": {"peak_lr": 1e-5, "schedule": "constant", "warmup_steps": 10},
        "train": {
            "init_from": str(folder),
            "steps": 100,
            "seq_len": seq_len,
            "batch_size": 8,
            "remat": "full",
            "loss_chunk": 512 if seq_len % 512 == 0 else 0,
            "eval_every": 50,
        },
        "checkpoint": {"every": 50},
        "mesh": {"sharding": "fsdp"},
    }
    return _FILE.format(folder=folder, file=file, sections="\n".join(_lines(sections, 8)))


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in flat.items() if "." not in name}
    sections = mapping.nested((tuple(name.split(".")), value) for name, value in flat.items() if "." in name)
    return fields | sections


def _lines(tree: dict[str, Any], indent: int) -> list[str]:
    """`name=value,` a line, sections as `name=dict(...)`."""
    lines = []
    for name, value in tree.items():
        if isinstance(value, dict):
            lines += [f"{' ' * indent}{name}=dict(", *_lines(value, indent + 4), f"{' ' * indent}),"]
        else:
            lines.append(f"{' ' * indent}{name}={value!r},")
    return lines
