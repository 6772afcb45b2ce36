"""One adapter method on random weights of a known shape: its training step and its answers, without a task.

``python -m bench.adapter_steps ARM SHAPE [--runs N]`` prints its row as JSON; `bench.adapters --shape` calls it. Peak
memory is taken first, alone; then its step is timed in turns with PEFT's LoRA, and its answers, with the adapter beside
the weights, in turns with the plain model: what a method costs that is not merged, or cannot be.
"""

import argparse
import json
from typing import Any

import torch

import apt
from bench.adapter_arms import ARMS, BASELINE, Arm, file_bytes, prepared
from bench.contestants import Contestant, controlled_step
from bench.memory import PeakMemory
from bench.rows import environment
from bench.shapes import SHAPES, Shape
from bench.timing import Clock

STEPS = 1000  # of the run that schedules such as AdaLoRA's are made for
ALONE = 3  # steps in which peak memory is taken


def measure(name: str, shape_name: str, runs: int) -> dict[str, Any]:
    """The row of an arm; what cannot be done says why."""
    arm, shape = ARMS[name], SHAPES[shape_name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    row: dict[str, Any] = {"arm": name, "seed": 0, "shape": shape_name, "overrides": ""}
    try:
        mine = contestant(arm, shape, device)
        with PeakMemory() as peak:
            for _ in range(ALONE):
                mine.step()
    except (ValueError, TypeError) as error:  # such as a model that takes no prefixes
        return row | {"refused": str(error).replace("\n", " ")[:200]} | environment()
    row |= {"layers": shape.layers, "of": shape.of, "peak_mb": round(peak.mb, 1)}
    row |= {"trainable_start": sum(p.numel() for p in mine.model.parameters() if p.requires_grad)}
    clock = Clock(torch.device(device), runs=runs, seconds=120.0)
    theirs = mine if name == BASELINE else contestant(ARMS[BASELINE], shape, device)
    steps = clock.interleaved({"mine": [mine.step], "theirs": [theirs.step]})
    row |= {"ms_p50": round(steps["mine"].median, 3), "runs": len(steps["mine"].device_ms)}
    row["over_peft"] = 1.0 if theirs is mine else steps["mine"].over(steps["theirs"])

    plain, model = shape.model().to(device).eval(), mine.model.eval()
    inputs = shape.inputs(plain, device)  # labels too: an encoder-decoder makes its decoder's input of them
    with torch.inference_mode():
        answers = clock.interleaved({"mine": [lambda: model(**inputs)], "plain": [lambda: plain(**inputs)]})
    row["answer_ms"] = round(answers["mine"].median, 3)
    row["over_plain"] = answers["mine"].over(answers["plain"])
    return row | {"file_bytes": file_bytes(model, arm)} | environment()


def contestant(arm: Arm, shape: Shape, device: str) -> Contestant:
    """An arm's model of a shape, and its step: ours by the controller, PEFT's with what PEFT asks for."""
    torch.manual_seed(0)
    model: Any = prepared(arm, shape.model().to(device), STEPS, shape.targets).train()
    batch = shape.inputs(model, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    if not arm.peft:
        return Contestant(model, controlled_step(apt.Controller(model, optimizer, STEPS), model, batch, optimizer))
    done = 0

    def step() -> None:
        nonlocal done
        model(**batch).loss.backward()
        optimizer.step()
        done += 1
        if arm.method == "adalora":
            model.base_model.update_and_allocate(done)
        optimizer.zero_grad()

    return Contestant(model, step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=list(ARMS))
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--runs", type=int, default=7, help="timed turns")
    options = parser.parse_args()
    print("ROW " + json.dumps(measure(options.arm, options.shape, options.runs)), flush=True)


if __name__ == "__main__":
    main()
