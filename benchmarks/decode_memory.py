"""Does the memory of decoding grow with the length of the video?

Decodes random latents with a random VAE of middle size, once per length, each in a fresh process, and compares the
peak memory beyond that of the model and the latents. The chunks are dropped as they come, as a video writer would.
The last row decodes the short video at once.

On the CPU the figure is VmHWM (the peak of resident memory) less the resident memory before decoding. As large blocks
are freed, glibc raises the size from which it maps them one by one, and keeps freed blocks below it in its heap, in
pieces: that adds a fifth to a third to the peak, by chance. The processes therefore run with that size fixed at 1 MiB,
so that a freed block leaves at once.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import ROOT, write_result
from pyramid_flow import CausalVideoVAE
from pyramid_flow.vae.model import temporal_chunks

GOAL_RATIO = 1.3
SHORT, LONG = 49, 241
CHANNELS = (32, 64, 128, 128)
LATENT_SIZE = (24, 40)
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def build_model(device: torch.device) -> CausalVideoVAE:
    torch.manual_seed(0)
    vae = CausalVideoVAE(encoder_block_out_channels=CHANNELS, decoder_block_out_channels=CHANNELS)
    vae.eval().requires_grad_(False).to(device)
    return vae


def decode(num_frames: int, window: int | None, device: torch.device) -> dict[str, Any]:
    """Decode in this process; the peak extra memory in MiB."""
    vae = build_model(device)
    latents = torch.randn(1, 16, 1 + (num_frames - 1) // 8, *LATENT_SIZE, device=device)
    before = memory_bytes(device)
    decoded = 0
    with torch.inference_mode():
        for frames in vae.decode_stream(temporal_chunks(latents, window)):
            decoded += frames.shape[2]
    if decoded != num_frames:
        raise RuntimeError(f"{decoded} frames came out, not {num_frames}")
    peak = peak_memory_bytes(device)
    return {
        "num_frames": num_frames,
        "window": window,
        "peak_extra_mib": round((peak - before) / 2**20, 1),
    }


def memory_bytes(device: torch.device) -> int:
    """Memory in use now; the peak is counted from here."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return torch.accelerator.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    return _process_bytes("VmRSS")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use since `memory_bytes`."""
    return _process_bytes("VmHWM") if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)


def _process_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def decode_in_fresh_process(num_frames: int, window: int | None, device: str) -> dict[str, Any]:
    job = json.dumps([num_frames, window])
    command = [sys.executable, "-m", "benchmarks.decode_memory", "--device", device, "--job", job]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | MALLOC, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=int, default=SHORT, help="frames of the short video, 1 + 8k (%(default)s)")
    parser.add_argument("--long", type=int, default=LONG, help="frames of the long video, 1 + 8k (%(default)s)")
    parser.add_argument("--window", type=int, default=1, help="latents per chunk (%(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device to decode on (%(default)s)")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.job:
        num_frames, window = arguments.job
        print(json.dumps(decode(num_frames, window, torch.device(arguments.device))))
        return
    jobs = [(arguments.short, arguments.window), (arguments.long, arguments.window), (arguments.short, None)]
    rows = []
    print(f"{'frames':>7} {'window':>7} {'peak extra MiB':>15}")
    for num_frames, window in jobs:
        row = decode_in_fresh_process(num_frames, window, arguments.device)
        print(f"{num_frames:>7} {window or 'all':>7} {row['peak_extra_mib']:>15}", flush=True)
        rows.append(row)
    ratio = round(rows[1]["peak_extra_mib"] / rows[0]["peak_extra_mib"], 3)
    print(f"long / short: {ratio}, the goal is below {GOAL_RATIO}: {'met' if ratio < GOAL_RATIO else 'MISSED'}")
    model = {"channels": CHANNELS, "latent_size": LATENT_SIZE, "dtype": "float32", "device": arguments.device}
    figures = {"ratio": ratio, "goal_ratio": GOAL_RATIO, "model": model, "environment": MALLOC, "decodes": rows}
    path = write_result("decode_memory", figures, sys.argv[1:])
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
