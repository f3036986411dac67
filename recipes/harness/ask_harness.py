"""Asks lm-evaluation-harness the first items of local JSONL files and writes one line an item.

    python ask_harness.py MODEL_DIR --data DIR --tasks gsm8k,mmlu:5 --items 100 --threads 2 --batch 16 --out FOLDER

The tasks are the harness's own definitions; only where their items come from is replaced: `DIR/<task>/test.jsonl`, with
examples from `train.jsonl` or else `calib.jsonl` (MMLU: `dev.jsonl`). Nothing is fetched. A line of `FOLDER/TASK/harness-16.jsonl`
(16 is the batch size) has `task`, `index`, `prediction`, `gold` and `loglikelihoods` or `completion`, as those of
`tailorq eval --log-samples`; `harness-16.json` has the metrics and the seconds. `mmlu:5` is MMLU with five examples.
"""

import argparse
import json
import os
import pathlib
import time

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import datasets
import lm_eval
import lm_eval.evaluator
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

TASKS = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "piqa": "piqa/piqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "gsm8k_cot": "gsm8k/gsm8k-cot.yaml",
}
FOLDER = {"gsm8k_cot": "gsm8k"}
DEFINITIONS = pathlib.Path(lm_eval.__file__).parent / "tasks"


def rows(path, most=None):
    with open(path, encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines if line.strip()]
    return found[:most]


def as_on_hub(task, row, index):
    """A row with the fields that the harness's definition reads, and its place in the file."""
    row = dict(row, place=index)
    if task == "boolq":
        row["label"] = int(row["label"] if "label" in row else row["answer"])
    if task == "hellaswag" and "ctx_a" not in row:
        row.update(ctx_a=row["ctx"], ctx_b="")
    return row


def table(found):
    kept = set.intersection(*(set(row) for row in found))
    return datasets.Dataset.from_list([{key: row[key] for key in row if key in kept} for row in found])


def task_of(definition, splits, name):
    """The harness's task with the items of `splits` in the place of those of the hub."""
    config = load_yaml(DEFINITIONS / definition, resolve_func=True)
    for key in ("tag", "group", "dataset_name"):
        config.pop(key, None)
    return ConfigurableTask(config=dict(config, task=name, dataset_path="local", custom_dataset=lambda **_: splits))


def tasks_of(task, data, items):
    folder = pathlib.Path(data) / FOLDER.get(task, task)
    test = [as_on_hub(task, row, index) for index, row in enumerate(rows(folder / "test.jsonl", items))]
    if task == "mmlu":
        examples = rows(folder / "dev.jsonl")
        made = []
        for subject in dict.fromkeys(row["subject"] for row in test):
            splits = {
                "test": table([row for row in test if row["subject"] == subject]),
                "dev": table([row for row in examples if row["subject"] == subject]),
            }
            made.append(task_of(f"mmlu/default/mmlu_{subject}.yaml", splits, f"mmlu_{subject}"))
        return made
    pool = folder / "train.jsonl"
    pool = pool if pool.exists() else folder / "calib.jsonl"
    train = table([as_on_hub(task, row, index) for index, row in enumerate(rows(pool))])
    tested = table(test)
    return [task_of(TASKS[task], {"train": train, "validation": tested, "test": tested}, task)]


def lines_of(task, results):
    """A line for each item, in the order of the file, and what the model was asked."""
    found = {}
    for samples in results["samples"].values():
        for sample in samples:
            place = sample["doc"]["place"]
            line = found.setdefault(place, {"task": task, "index": place})
            metrics = {key: float(sample[key]) for key in sample["metrics"] if isinstance(sample[key], (int, float))}
            if task.startswith("gsm8k"):
                line["completion"] = sample["resps"][0][0]
                line["gold"] = str(sample["target"]).split("####")[-1].strip()
                line.setdefault("prediction", {})[sample["filter"]] = sample["filtered_resps"][0]
                line.setdefault("correct", {})[sample["filter"]] = metrics["exact_match"]
                line["prompt"] = sample["arguments"][0][0]
            else:
                line["loglikelihoods"] = [response[0] for response in sample["filtered_resps"]]
                line["prediction"] = max(range(len(line["loglikelihoods"])), key=line["loglikelihoods"].__getitem__)
                line["gold"] = gold(task, sample)
                line["correct"] = metrics
    return [found[place] for place in sorted(found)]


def gold(task, sample):
    target = sample["target"]
    if task == "winogrande":
        return int(sample["doc"]["answer"]) - 1
    return int(target)


def timed(function, seconds):
    """The function, which also tells its seconds, by the clock and of the processors."""

    def call(*arguments, **named):
        began = time.perf_counter(), time.process_time()
        told = function(*arguments, **named)
        seconds.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        return told

    return call


def ask(model, spec, options):
    """Has one task scored and writes what came out."""
    task, _, shots = spec.partition(":")
    tasks = tasks_of(task, options.data, options.items)
    # What counts is the evaluation alone: `simple_evaluate` also asks for the packages and processors of the machine.
    whole, asked = [], []
    evaluate, requests = lm_eval.evaluator.evaluate, ("loglikelihood", "generate_until")
    lm_eval.evaluator.evaluate = timed(evaluate, whole)
    for request in requests:
        setattr(model, request, timed(getattr(type(model), request).__get__(model), asked))
    try:
        results = lm_eval.evaluator.simple_evaluate(
            model=model, tasks=tasks, num_fewshot=int(shots) if shots else None, log_samples=True
        )
    finally:
        lm_eval.evaluator.evaluate = evaluate
    lines = lines_of(task, results)
    told = {
        "seconds": sum(clock for clock, _ in whole),
        "processor_seconds": sum(processor for _, processor in whole),
        "seconds_in_model": sum(clock for clock, _ in asked),
        "items": len(lines),
        "batch": options.batch,
        "device": options.device,
        "results": results["results"],
        "versions": {"lm_eval": lm_eval.__version__, "torch": torch.__version__},
    }
    return lines, told


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = HFLM(pretrained=options.model, dtype="float32", batch_size=options.batch, device=options.device)
    for spec in options.tasks.split(","):
        out = pathlib.Path(options.out) / spec.replace(":", "-") / f"harness-{options.batch}.jsonl"
        if out.with_suffix(".json").exists():
            continue
        lines, told = ask(model, spec, options)
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        out.with_suffix(".json").write_text(json.dumps(told, default=str))


if __name__ == "__main__":
    main()
