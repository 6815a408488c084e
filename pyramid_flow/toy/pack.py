"""Put a trained model into the package: `python -m pyramid_flow.toy.pack FOLDER` copies it with weights in bfloat16."""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = Path(__file__).parent / "weights"


def pack(folder: Path, target: Path = WEIGHTS) -> int:
    """Copy a checkpoint folder, its float tensors as bfloat16; returns the bytes of all files."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    for file in target.rglob("*.safetensors"):
        tensors = load_file(file)
        halved = {name: each.bfloat16() if each.is_floating_point() else each for name, each in tensors.items()}
        save_file(halved, file, metadata={"format": "pt"})
    for file in target.rglob("config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # a folder of the machine that trained it
        file.write_text(json.dumps(config, indent=2) + "\n")
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())


if __name__ == "__main__":
    sys.stderr.write(f"{pack(Path(sys.argv[1])) / 1e6:.1f} MB\n")
