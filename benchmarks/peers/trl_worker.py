"""One update a line, by TRL's trainers: run by `diffrl.benchmarks.peers` with the Python that has TRL.

Reads the task as JSON from its arguments, prints "ready", then for every line on stdin takes one update and
prints its seconds; at the end of stdin it prints the process's peak memory. Imports nothing of diffrl.
"""

import io
import json
import random
import resource
import sys
import time
import warnings

import torch
from accelerate import PartialState
from PIL import Image


def jpeg(images, prompts, metadata):
    """Return minus the JPEG size in kB of each picture, as `reward=jpeg`."""
    sizes = []
    for picture in (255 * images.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=95)
        sizes.append(-buffer.tell() / 1000)
    return torch.tensor(sizes), {}


def flatness(images, prompts, metadata):
    """Return minus the variance about mid-grey: differentiable, at no cost."""
    return -(images - 0.5).square().mean((1, 2, 3)), {}


def main():
    """Build the trainer and take updates as they are asked for."""
    task = json.loads(sys.argv[1])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(task["threads"])
    PartialState()
    from trl import AlignPropConfig, AlignPropTrainer, DDPOConfig, DDPOTrainer
    from trl.models import DefaultDDPOStableDiffusionPipeline

    pipeline = DefaultDDPOStableDiffusionPipeline(task["model"], use_lora=True)
    common = {
        "mixed_precision": "no",
        "sample_num_steps": task["steps"],
        "sample_eta": 1.0,
        "sample_guidance_scale": task["guidance"],
        "train_batch_size": task["batch"],
        "train_gradient_accumulation_steps": 1,
        "save_freq": 10**9,
    }

    def prompt():
        return random.choice(task["prompts"]), {}

    if task["method"] == "ddpo":
        trainer = DDPOTrainer(
            DDPOConfig(sample_batch_size=task["batch"], sample_num_batches_per_epoch=1, **common),
            jpeg,
            prompt,
            pipeline,
        )
    else:
        cut = {"truncated_backprop_rand": False, "truncated_backprop_timestep": task["cut"]}
        trainer = AlignPropTrainer(AlignPropConfig(**common, **cut), flatness, prompt, pipeline)
    trainer.sd_pipeline.set_progress_bar_config(disable=True)
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        begin = time.perf_counter()
        trainer.step(number, number)
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)
    print(
        json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}), flush=True
    )


if __name__ == "__main__":
    main()
